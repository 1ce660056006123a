//! Pod volumes that live in the guest: empty directories and files.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, symlink},
    path::{Component, Path, PathBuf},
};

use hypernetes_agent_api::v1::{self, volume::Kind};
use nix::mount::{MsFlags, mount};

use crate::{
    boot::dir,
    error::{Attempt, GuestError},
    request,
};

const MAX_VOLUMES: usize = 256;
const MAX_FILES: usize = 1024;
const MAX_FILE: usize = 1024 * 1024;
const MAX_TOTAL: usize = 3 * 1024 * 1024;
/// The link that is switched to change everything at once.
const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

#[derive(Debug, Clone, PartialEq, Eq)]
enum Sort {
    Empty { memory: bool },
    Files,
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
        let v1::Volume { name, kind } = volume;
        if !request::is_plain_name(&name) {
            return Err(GuestError::Invalid(format!("{name:?} is no volume name")));
        }
        let kind = kind.ok_or_else(|| GuestError::Invalid(format!("volume {name} has no kind")))?;
        let sort = match &kind {
            Kind::EmptyDir(empty) => Sort::Empty {
                memory: empty.memory,
            },
            Kind::Files(_) => Sort::Files,
        };
        let known = match self.by_name.get(&name) {
            Some(known) if known.sort != sort => {
                return Err(GuestError::AlreadyExists(format!(
                    "volume {name} is of another kind"
                )));
            }
            Some(_) => true,
            None if self.by_name.len() >= MAX_VOLUMES => {
                return Err(GuestError::Exhausted(format!(
                    "more than {MAX_VOLUMES} volumes"
                )));
            }
            None => false,
        };
        let parent = match sort {
            Sort::Empty { memory: false } => Path::new(dir::SCRATCH).join("volumes"),
            _ => PathBuf::from(dir::VOLUMES),
        };
        let path = parent.join(&name);
        match kind {
            // What is in it belongs to the containers.
            Kind::EmptyDir(_) if known => return Ok(()),
            Kind::EmptyDir(empty) => {
                make_empty(&path, &empty, gid).attempt(format!("make volume {name}"))?;
            }
            Kind::Files(files) => {
                check(&files)?;
                self.version += 1;
                write_files(&path, &files, files.gid.or(gid), self.version)
                    .attempt(format!("write volume {name}"))?;
            }
        }
        self.by_name.insert(name, Volume { sort, path });
        Ok(())
    }
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
    chown(path, None, gid)?;
    // Files made in a volume with a group belong to the group.
    fs::set_permissions(
        path,
        PermissionsExt::from_mode(if gid.is_some() { 0o2777 } else { 0o777 }),
    )
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
