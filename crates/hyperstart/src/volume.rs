//! Pod volumes that live in the guest: empty directories and files.
//!
//! | volume | directory |
//! | --- | --- |
//! | emptyDir | `/scratch/volumes/NAME` |
//! | emptyDir with a disk of its own | `/disks/NAME/data`, with `/disks/NAME/ballast` beside it |
//! | emptyDir in memory | `/volumes/NAME`, a tmpfs |
//! | huge pages | `/volumes/NAME`, a hugetlbfs |
//! | files | `/volumes/NAME` |
//! | file systems that outlive the pod | `/persistent/SLOT` |
//! | directories of the host | `/shared/NAME` |

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, symlink},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use hypernetes_agent_api::v1::{self, volume::Kind};
use hypernetes_types::PageSize;
use nix::mount::{MsFlags, mount};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use tokio::time::{Instant, sleep};

use crate::{
    boot::dir,
    disks,
    error::{Attempt, GuestError},
    filesystem::{self, FileSystem},
    request, sandbox,
};

const MAX_VOLUMES: usize = 256;
/// How long a plugged file system may take to appear.
const APPEAR: Duration = Duration::from_secs(10);
const MAX_FILES: usize = 1024;
const MAX_FILE: usize = 1024 * 1024;
const MAX_TOTAL: usize = 3 * 1024 * 1024;
/// The link that is switched to change everything at once.
const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";
/// The volume's root on a disk of its own: beside it are things of the file system's.
const ROOT: &str = "data";
/// Takes what a disk has beyond the volume's limit.
const BALLAST: &str = "ballast";

#[derive(Debug, Clone, PartialEq, Eq)]
enum Sort {
    Empty { memory: bool, slot: u32 },
    HugePages { kib: u64 },
    Files,
    Disk { slot: u32, read_only: bool },
    Shared,
}

impl Sort {
    fn directory(&self, name: &str) -> PathBuf {
        match self {
            Self::Empty { slot: 1.., .. } => own_disk(name).join(ROOT),
            Self::Empty { memory: false, .. } => Path::new(dir::SCRATCH).join("volumes").join(name),
            Self::Disk { slot, .. } => filesystem::place(*slot),
            Self::Shared => Path::new(dir::SHARED).join(name),
            Self::Empty { memory: true, .. } | Self::HugePages { .. } | Self::Files => {
                Path::new(dir::VOLUMES).join(name)
            }
        }
    }
}

fn own_disk(name: &str) -> PathBuf {
    Path::new(dir::DISKS).join(name)
}

/// A disk that a new volume has for itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OwnDisk {
    volume: String,
    slot: u32,
    size_limit: u64,
}

impl OwnDisk {
    /// Mounts the disk and leaves as much room on it as the volume may have. Idempotent until the
    /// volume is in use.
    pub(crate) async fn mount(&self) -> Result<(), GuestError> {
        let target = own_disk(&self.volume);
        if !sandbox::is_mounted(&target.to_string_lossy()) {
            let device = disks::find(self.slot).await?;
            let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
            let options = Some(disks::SPARSE);
            disks::mount_disk(device, target.clone(), "ext4", flags, options).await?;
        }
        let limit = self.size_limit;
        disks::blocking(move || leave_room(&target, limit))
            .await
            .attempt(format!("limit volume {}", self.volume))
    }
}

/// Fills a file system with unwritten blocks until no more than `limit` bytes, in whole blocks, can
/// be written. How much a file system of a size can hold is for its kernel to say, not for the
/// node that made it.
fn leave_room(target: &Path, limit: u64) -> io::Result<()> {
    // Before the count: it takes a block.
    fs::create_dir_all(target.join(ROOT))?;
    let mut options = fs::File::options();
    let ballast = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(target.join(BALLAST))?;
    // Blocks that a truncated ballast had are free only then.
    rustix::fs::syncfs(&ballast)?;
    let room = statvfs(target)?;
    let wanted = limit.div_ceil(room.f_frsize);
    let surplus = room.f_bavail.saturating_sub(wanted) * room.f_frsize;
    if surplus > 0 {
        fallocate(&ballast, FallocateFlags::empty(), 0, surplus)?;
    }
    Ok(())
}

/// A file system of the host's that a new volume is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    volume: String,
    tag: String,
}

impl Shared {
    /// Mounts it. Idempotent.
    pub(crate) async fn mount(&self) -> Result<(), GuestError> {
        let target = Path::new(dir::SHARED).join(&self.volume);
        if sandbox::is_mounted(&target.to_string_lossy()) {
            return Ok(());
        }
        let (tag, deadline) = (self.tag.clone(), Instant::now() + APPEAR);
        loop {
            let (tag, target) = (tag.clone(), target.clone());
            let mounted = disks::blocking(move || {
                fs::create_dir_all(&target)?;
                let flags = MsFlags::MS_NODEV;
                mount(
                    Some(tag.as_str()),
                    &target,
                    Some("virtiofs"),
                    flags,
                    None::<&str>,
                )
                .map_err(io::Error::from)
            })
            .await;
            match mounted {
                // The kernel does not know the tag yet: the device was plugged a moment ago.
                Err(error)
                    if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error())
                        && Instant::now() < deadline =>
                {
                    sleep(Duration::from_millis(10)).await;
                }
                result => return result.attempt(format!("mount volume {}", self.volume)),
            }
        }
    }
}

#[derive(Debug)]
struct Volume {
    sort: Sort,
    path: PathBuf,
}

/// The volumes of the pod, by name.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    by_name: HashMap<String, Volume>,
    /// Number of the next version of a files volume.
    version: u64,
}

impl Volumes {
    /// Directory of a volume.
    pub(crate) fn directory(&self, name: &str) -> Option<&Path> {
        self.by_name.get(name).map(|volume| volume.path.as_path())
    }

    /// Makes a volume, or replaces the content of one with files.
    pub(crate) fn write(&mut self, volume: v1::Volume, gid: Option<u32>) -> Result<(), GuestError> {
        let (sort, known) = self.examine(&volume)?;
        let v1::Volume { name, kind } = volume;
        let path = sort.directory(&name);
        match kind {
            None => return Err(no_kind(&name)),
            // What is in it belongs to the containers.
            Some(Kind::EmptyDir(_) | Kind::HugePages(_)) if known => return Ok(()),
            // Mounted before.
            Some(Kind::Shared(_) | Kind::Disk(_)) => {}
            Some(Kind::EmptyDir(empty)) => {
                make_empty(&path, &empty, gid).attempt(format!("make volume {name}"))?;
            }
            Some(Kind::HugePages(huge)) => {
                make_huge(&path, &sort, huge.size_limit, gid)
                    .attempt(format!("make volume {name}"))?;
            }
            Some(Kind::Files(files)) => {
                check(&files)?;
                self.version += 1;
                write_files(&path, &files, files.gid.or(gid), self.version)
                    .attempt(format!("write volume {name}"))?;
            }
        }
        self.by_name.insert(name, Volume { sort, path });
        Ok(())
    }

    /// The disk that must be mounted before this volume can be written.
    pub(crate) fn new_disk(&self, volume: &v1::Volume) -> Result<Option<OwnDisk>, GuestError> {
        match (self.examine(volume)?, &volume.kind) {
            ((Sort::Empty { slot: 1.., .. }, false), Some(Kind::EmptyDir(empty))) => {
                Ok(Some(OwnDisk {
                    volume: volume.name.clone(),
                    slot: empty.disk_slot,
                    size_limit: empty.size_limit,
                }))
            }
            _ => Ok(None),
        }
    }

    /// Whether nothing in a volume can be written.
    pub(crate) fn is_read_only(&self, name: &str) -> bool {
        let volume = self.by_name.get(name);
        volume.is_some_and(|volume| {
            matches!(
                volume.sort,
                Sort::Disk {
                    read_only: true,
                    ..
                }
            )
        })
    }

    /// The file system that outlives the pod and must be mounted before this volume can be written.
    pub(crate) fn new_file_system(
        &self,
        volume: &v1::Volume,
    ) -> Result<Option<FileSystem>, GuestError> {
        match (self.examine(volume)?, &volume.kind) {
            ((Sort::Disk { slot, read_only }, false), Some(Kind::Disk(disk))) => {
                Ok(Some(FileSystem {
                    volume: volume.name.clone(),
                    slot,
                    read_only,
                    keep_matching_root: disk.keep_matching_root,
                }))
            }
            _ => Ok(None),
        }
    }

    /// The file system that must be mounted before this volume can be written.
    pub(crate) fn new_share(&self, volume: &v1::Volume) -> Result<Option<Shared>, GuestError> {
        match (self.examine(volume)?, &volume.kind) {
            ((Sort::Shared, false), Some(Kind::Shared(shared))) => Ok(Some(Shared {
                volume: volume.name.clone(),
                tag: shared.tag.clone(),
            })),
            _ => Ok(None),
        }
    }

    /// What a volume is, and whether it is there already.
    fn examine(&self, volume: &v1::Volume) -> Result<(Sort, bool), GuestError> {
        let name = &volume.name;
        if !request::is_plain_name(name) {
            return Err(GuestError::Invalid(format!("{name:?} is no volume name")));
        }
        let sort = match &volume.kind {
            None => return Err(no_kind(name)),
            Some(Kind::EmptyDir(empty)) => {
                let (memory, slot) = (empty.memory, empty.disk_slot);
                if slot != 0 && (memory || empty.size_limit == 0 || !disks::SLOTS.contains(&slot)) {
                    return Err(GuestError::Invalid(format!(
                        "volume {name} cannot have the disk in slot {slot} for itself"
                    )));
                }
                Sort::Empty { memory, slot }
            }
            Some(Kind::HugePages(huge)) => {
                let size = huge.page_size.parse::<PageSize>();
                let size = size.map_err(|error| GuestError::Invalid(error.to_string()))?;
                Sort::HugePages { kib: size.kib() }
            }
            Some(Kind::Files(_)) => Sort::Files,
            Some(Kind::Disk(disk)) => {
                let (slot, read_only) = (disk.slot, disk.read_only);
                let other = |volume: &Volume| matches!(volume.sort, Sort::Disk { slot: its, read_only: so } if its == slot && so != read_only);
                if !disks::SLOTS.contains(&slot) || self.by_name.values().any(other) {
                    return Err(GuestError::Invalid(format!(
                        "volume {name} cannot be the disk in slot {slot}"
                    )));
                }
                Sort::Disk { slot, read_only }
            }
            Some(Kind::Shared(shared)) => {
                if !request::is_plain_name(&shared.tag) || shared.tag.len() > 36 {
                    let tag = &shared.tag;
                    return Err(GuestError::Invalid(format!(
                        "{tag:?} is no tag of a device"
                    )));
                }
                Sort::Shared
            }
        };
        match self.by_name.get(name) {
            Some(known) if known.sort != sort => Err(GuestError::AlreadyExists(format!(
                "volume {name} is of another kind"
            ))),
            Some(_) => Ok((sort, true)),
            None if self.by_name.len() >= MAX_VOLUMES => Err(GuestError::Exhausted(format!(
                "more than {MAX_VOLUMES} volumes"
            ))),
            None => Ok((sort, false)),
        }
    }
}

fn no_kind(name: &str) -> GuestError {
    GuestError::Invalid(format!("volume {name} has no kind"))
}

fn make_empty(path: &Path, empty: &v1::EmptyDir, gid: Option<u32>) -> io::Result<()> {
    fs::create_dir_all(path)?;
    if empty.memory {
        let size = if empty.size_limit > 0 {
            format!(",size={}", empty.size_limit)
        } else {
            String::new()
        };
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            flags,
            Some(format!("mode=0777{size}").as_str()),
        )?;
    }
    open_to_all(path, gid)
}

fn make_huge(path: &Path, sort: &Sort, size_limit: u64, gid: Option<u32>) -> io::Result<()> {
    let Sort::HugePages { kib } = sort else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let size = match size_limit {
        0 => String::new(),
        limit => format!(",size={limit}"),
    };
    fs::create_dir_all(path)?;
    mount(
        Some("hugetlbfs"),
        path,
        Some("hugetlbfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(format!("pagesize={kib}K{size}").as_str()),
    )?;
    open_to_all(path, gid)
}

/// Every user of the containers writes here. Files made in a volume with a group belong to it.
fn open_to_all(path: &Path, gid: Option<u32>) -> io::Result<()> {
    chown(path, None, gid)?;
    let mode = if gid.is_some() { 0o2777 } else { 0o777 };
    fs::set_permissions(path, PermissionsExt::from_mode(mode))
}

/// Refuses paths that a file cannot have, and too much.
fn check(files: &v1::FilesVolume) -> Result<(), GuestError> {
    if files.files.len() > MAX_FILES {
        return Err(GuestError::Invalid(format!(
            "more than {MAX_FILES} files in a volume"
        )));
    }
    let mut total = 0;
    let mut paths = BTreeSet::new();
    for file in &files.files {
        let path = &file.path;
        let bad = |why: &str| GuestError::Invalid(format!("file {path:?}: {why}"));
        if file.content.len() > MAX_FILE {
            return Err(bad("more than 1 MiB"));
        }
        total += file.content.len();
        let mut components = Path::new(path).components();
        if path.is_empty()
            || path.len() > 1024
            || path.ends_with('/')
            || path.contains("//")
            || path.contains('\0')
        {
            return Err(bad("is no path of a file"));
        }
        if !components
            .all(|component| matches!(component, Component::Normal(name) if name.len() <= 255))
        {
            return Err(bad("is not relative and plain"));
        }
        if path.starts_with("..") {
            return Err(bad(
                "starts with two dots, as only the volume's own links do",
            ));
        }
        if !paths.insert(Path::new(path)) {
            return Err(bad("is there twice"));
        }
    }
    for pair in paths.iter().zip(paths.iter().skip(1)) {
        if pair.1.starts_with(pair.0) {
            return Err(GuestError::Invalid(format!(
                "{} is a file and a directory",
                pair.0.display()
            )));
        }
    }
    if total > MAX_TOTAL {
        return Err(GuestError::Invalid("more than 3 MiB in a volume".into()));
    }
    Ok(())
}

/// Writes a new version beside the old one and switches a link, as the kubelet does: a reader who
/// holds a directory open sees all of one version, and a path leads to all old or all new.
///
/// ```text
/// name -> ..data/name      (stable)
/// ..data -> ..v2           (switched by rename)
/// ..v2/name
/// ```
fn write_files(
    path: &Path,
    files: &v1::FilesVolume,
    gid: Option<u32>,
    version: u64,
) -> io::Result<()> {
    fs::create_dir_all(path)?;
    chown(path, None, gid)?;
    fs::set_permissions(
        path,
        PermissionsExt::from_mode(if gid.is_some() { 0o2755 } else { 0o755 }),
    )?;
    let version_name = format!("..v{version}");
    let directory = path.join(&version_name);
    // Left from an attempt that failed half way.
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    if let Err(error) = fill(&directory, files, gid) {
        drop(fs::remove_dir_all(&directory));
        return Err(error);
    }

    let old = fs::read_link(path.join(DATA)).ok();
    match fs::remove_file(path.join(NEW_DATA)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(&version_name, path.join(NEW_DATA))?;
    fs::rename(path.join(NEW_DATA), path.join(DATA))?;

    let names: BTreeSet<&str> = files
        .files
        .iter()
        .filter_map(|file| file.path.split('/').next())
        .collect();
    for name in &names {
        match symlink(Path::new(DATA).join(name), path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        if !text.starts_with("..") && !names.contains(&*text) {
            fs::remove_file(path.join(&name))?;
        }
    }
    match old {
        Some(old) if old != Path::new(&version_name) => fs::remove_dir_all(path.join(old)),
        _ => Ok(()),
    }
}

fn fill(directory: &Path, files: &v1::FilesVolume, gid: Option<u32>) -> io::Result<()> {
    let directory_mode = if gid.is_some() { 0o2755 } else { 0o755 };
    let make = |path: &Path| {
        if !path.exists() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(path)?;
        }
        chown(path, None, gid)?;
        fs::set_permissions(path, PermissionsExt::from_mode(directory_mode))
    };
    make(directory)?;
    for file in &files.files {
        let target = directory.join(&file.path);
        let parents = Path::new(&file.path)
            .ancestors()
            .skip(1)
            .filter(|path| !path.as_os_str().is_empty());
        for parent in parents.collect::<Vec<_>>().into_iter().rev() {
            make(&directory.join(parent))?;
        }
        let mode = if file.mode != 0 {
            file.mode
        } else {
            files.default_mode
        };
        let mode = if mode != 0 { mode & 0o777 } else { 0o644 };
        // The group must be able to read what was given to it.
        let mode = if gid.is_some() { mode | 0o440 } else { mode };
        let mut options = fs::File::options();
        let mut open = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&target)?;
        io::Write::write_all(&mut open, &file.content)?;
        chown(&target, Some(file.uid), gid)?;
        open.set_permissions(PermissionsExt::from_mode(mode))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> v1::FilesVolume {
        let file = |(path, content): &(&str, &str)| v1::File {
            path: (*path).into(),
            content: content.as_bytes().to_vec(),
            mode: 0,
            uid: 0,
        };
        v1::FilesVolume {
            files: list.iter().map(file).collect(),
            default_mode: 0o640,
            gid: None,
        }
    }

    #[test]
    fn a_reader_of_one_version_never_sees_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        write_files(&path, &files(&[("a", "1"), ("d/b", "1")]), None, 1).unwrap();
        let held = fs::read_dir(path.join(DATA)).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(path.join("d/b")).unwrap(), "1");
        assert_eq!(
            fs::metadata(path.join("a")).unwrap().permissions().mode() & 0o777,
            0o640
        );
        drop(held);
        write_files(&path, &files(&[("a", "2"), ("c", "2")]), None, 2).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "2");
        assert_eq!(
            fs::read_link(path.join("a")).unwrap(),
            Path::new("..data/a")
        );
        let mut names: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["..data", "..v2", "a", "c"]);
    }

    fn limited(memory: bool, size_limit: u64, disk_slot: u32) -> v1::Volume {
        v1::Volume {
            name: "v".into(),
            kind: Some(Kind::EmptyDir(v1::EmptyDir {
                memory,
                size_limit,
                disk_slot,
            })),
        }
    }

    #[test]
    fn a_new_volume_names_its_disk_and_a_known_one_keeps_it() {
        let mut volumes = Volumes::default();
        assert_eq!(volumes.new_disk(&limited(false, 7, 0)).unwrap(), None);
        let disk = volumes.new_disk(&limited(false, 7, 250)).unwrap().unwrap();
        assert_eq!(
            (disk.volume.as_str(), disk.slot, disk.size_limit),
            ("v", 250, 7)
        );
        for bad in [
            limited(true, 7, 250),
            limited(false, 0, 250),
            limited(false, 7, 255),
        ] {
            assert!(matches!(
                volumes.new_disk(&bad),
                Err(GuestError::Invalid(_))
            ));
        }
        let sort = Sort::Empty {
            memory: false,
            slot: 250,
        };
        assert_eq!(sort.directory("v"), Path::new("/disks/v/data"));
        let path = sort.directory("v");
        volumes.by_name.insert("v".into(), Volume { sort, path });
        assert_eq!(volumes.new_disk(&limited(false, 7, 250)).unwrap(), None);
        volumes.write(limited(false, 7, 250), None).unwrap();
        for other in [
            limited(false, 7, 249),
            limited(false, 7, 0),
            limited(true, 7, 0),
        ] {
            let refused = volumes.write(other, None);
            assert!(matches!(refused, Err(GuestError::AlreadyExists(_))));
        }
    }

    #[test]
    fn bad_paths_are_refused() {
        for bad in [
            "", "/abs", "../up", "a/../b", "..data", "..x/y", "a/", "a//b", "./a", "a\0b",
        ] {
            assert!(check(&files(&[(bad, "")])).is_err(), "{bad:?}");
        }
        assert!(check(&files(&[("a", ""), ("a", "")])).is_err());
        assert!(check(&files(&[("a", ""), ("a/b", "")])).is_err());
        assert!(check(&files(&[("a.b/..c", ""), (".hidden", "")])).is_ok());
        let big = "x".repeat(MAX_FILE);
        assert!(check(&files(&[("a", &big), ("b", &big), ("c", &big)])).is_ok());
        assert!(check(&files(&[("a", &big), ("b", &big), ("c", &big), ("d", "x")])).is_err());
    }
}
