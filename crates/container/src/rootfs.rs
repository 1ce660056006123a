//! The container's root file system and everything mounted in it.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt, chown},
    },
    path::Path,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::{
    fs::{FileType, Mode, OFlags, StatVfsMountFlags, fstat, fstatvfs, mknodat},
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::{
    child::{Because, Refusal},
    devices,
    path::{Kind, ensure_beneath, ensure_in_root, open_beneath, open_dir, open_in_root, proc_path},
    spec::{
        DeviceSpec, IMAGE_VOLUME_FAILED, InitSpec, MountSource, MountSpec, RootfsSpec, UserMap,
    },
    sys, users,
};

const NONE: Option<&str> = None;
const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Whose the container is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    /// The ids of its user namespace.
    pub(crate) map: UserMap,
    /// The user namespace.
    pub(crate) namespace: BorrowedFd<'a>,
}

impl Owner<'_> {
    /// From here on the container's root owns what is made.
    fn act(owner: Option<Self>) -> Result<(), Refusal> {
        match owner {
            Some(Self { map, .. }) => users::create_as(map.uids.first, map.gids.first),
            None => Ok(()),
        }
    }

    /// From here on the guest's root owns what is made.
    fn rest(owner: Option<Self>) -> Result<(), Refusal> {
        match owner {
            Some(_) => users::create_as(0, 0),
            None => Ok(()),
        }
    }
}

/// Mounts everything and makes it the root of this process, which is alone in its mount namespace.
/// With an owner the process goes on making files for that.
pub(crate) fn enter(spec: &InitSpec, owner: Option<Owner<'_>>) -> Result<(), Refusal> {
    let root_of_all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, root_of_all, NONE).or_machine("cannot make the mounts private")?;
    if let Some(owner) = owner {
        map_layers(spec, owner)?;
    }
    let root = mount_overlay(&spec.rootfs)?;
    Owner::act(owner)?;
    let own = |destination: &str| {
        spec.mounts
            .iter()
            .any(|mount| same_place(&mount.destination, destination))
    };

    mount_new(&root, "/proc", "proc", SAFE, "")?;
    mount_new(
        &root,
        "/dev",
        "tmpfs",
        MsFlags::MS_NOSUID,
        "mode=0755,size=65536k",
    )?;
    let dev = at(&root, "/dev")?;
    devices::populate(&proc_path(&dev)).or_machine("cannot fill /dev")?;
    if spec.privileged {
        // The guest's devices stay the guest's.
        Owner::rest(owner)?;
        devices::copy_all(Path::new("/dev"), &proc_path(&dev), 4)
            .or_machine("cannot copy the guest's devices")?;
        Owner::act(owner)?;
    }
    let no_exec = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_new(
        &root,
        "/dev/pts",
        "devpts",
        no_exec,
        &format!(
            "newinstance,ptmxmode=0666,mode=0620,gid={}",
            tty_group(owner)
        ),
    )?;
    if !own("/dev/shm") {
        bind(
            &open_dir(&spec.shm).or_machine("no shared memory directory")?,
            &root,
            "/dev/shm",
            None,
        )?;
    }
    // Kernels built without message queues exist.
    drop(mount_new(&root, "/dev/mqueue", "mqueue", SAFE, ""));
    let sys = if spec.privileged {
        SAFE
    } else {
        SAFE | MsFlags::MS_RDONLY
    };
    mount_new(&root, "/sys", "sysfs", sys, "")?;
    mount_new(&root, "/sys/fs/cgroup", "cgroup2", sys, "")?;

    // Parents before children, whatever order they came in.
    let mut mounts: Vec<_> = spec.mounts.iter().collect();
    mounts.sort_by_key(|mount| Path::new(&mount.destination).components().count());
    mounts
        .into_iter()
        .enumerate()
        .try_for_each(|(index, mount)| mount_volume(&root, &spec.rootfs, mount, index, owner))?;
    for file in spec.files.iter().filter(|file| !own(&file.destination)) {
        let place = ensure_in_root(&root, &file.destination, Kind::File)
            .or_request(format!("cannot make {}", file.destination))?;
        mount(
            Some(&file.source),
            &proc_path(&place),
            NONE,
            MsFlags::MS_BIND,
            NONE,
        )
        .or_machine(format!("cannot bind {}", file.destination))?;
    }
    spec.devices
        .iter()
        .try_for_each(|device| make_device(&root, device, owner))?;
    spec.readonly_paths
        .iter()
        .try_for_each(|path| make_readonly(&root, path))?;
    spec.masked_paths
        .iter()
        .try_for_each(|path| mask(&root, path))?;
    pivot(&root)
}

/// Makes the root read-only. The last step that touches it.
pub(crate) fn seal() -> Result<(), Refusal> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(NONE, "/", NONE, flags, NONE).or_machine("cannot make the root read-only")
}

/// The group of terminals, as images have it.
fn tty_group(owner: Option<Owner<'_>>) -> u32 {
    const TTY: u32 = 5;
    let outside = |owner: Owner<'_>| owner.map.gids.outside(TTY);
    owner.map_or(Some(TTY), outside).unwrap_or(TTY)
}

/// Covers each layer with a view of itself in which the container's ids own what is theirs inside.
/// Nobody outside of this mount namespace sees it.
fn map_layers(spec: &InitSpec, owner: Owner<'_>) -> Result<(), Refusal> {
    let images = spec.mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Image { layers, .. } => Some(layers),
        _other => None,
    });
    let root = &spec.rootfs;
    // A layer of several images is mapped once.
    let layers: BTreeSet<&String> = images.flatten().chain(&root.layers).collect();
    for name in layers {
        let place = open_dir(&root.layers_dir.join(name)).or_machine("a layer is gone")?;
        let view = view(&place, owner).or_machine("cannot map the owners of a layer")?;
        attach_mount(&view, &place).or_machine("cannot mount a layer")?;
    }
    Ok(())
}

/// A detached mount of a place, with owners mapped.
fn view(place: &OwnedFd, owner: Owner<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let view = open_tree(place, "", flags)?;
    sys::map_owners(view.as_fd(), owner.namespace)?;
    Ok(view)
}

fn attach_mount(mount: &OwnedFd, place: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", place, "", flags)?)
}

fn same_place(a: &str, b: &str) -> bool {
    Path::new(a).components().eq(Path::new(b).components())
}

fn mount_overlay(spec: &RootfsSpec) -> Result<OwnedFd, Refusal> {
    let failed = "cannot mount the image's layers";
    let Some(top) = spec.layers.last() else {
        return Err(Refusal::invalid("the image has no layers"));
    };
    let (upper, work) = (spec.writable.join("upper"), spec.writable.join("work"));
    fs::create_dir_all(&upper).or_machine(failed)?;
    fs::create_dir_all(&work).or_machine(failed)?;
    // The merged root takes its owner and mode from the upper directory.
    let model = fs::metadata(spec.layers_dir.join(top)).or_machine(failed)?;
    chown(&upper, Some(model.uid()), Some(model.gid())).or_machine(failed)?;
    fs::set_permissions(&upper, PermissionsExt::from_mode(model.mode() & 0o7777))
        .or_machine(failed)?;

    // Relative names keep many layers within the one page that mount(2) takes.
    std::env::set_current_dir(&spec.layers_dir).or_machine(failed)?;
    let lower: Vec<&str> = spec.layers.iter().rev().map(String::as_str).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        upper.display(),
        work.display()
    );
    // The upper layer dies with the VM: syncing it to the disk is of no use to anybody.
    let volatile = format!("{options},volatile");
    let overlay = |options: &str| {
        mount(
            Some("overlay"),
            &spec.target,
            Some("overlay"),
            MsFlags::empty(),
            Some(options),
        )
    };
    overlay(&volatile)
        .or_else(|_| overlay(&options))
        .or_machine(failed)?;
    open_dir(&spec.target).or_machine(failed)
}

fn at(root: &OwnedFd, path: &str) -> Result<OwnedFd, Refusal> {
    open_in_root(root, path, OFlags::PATH).or_machine(format!("cannot open {path}"))
}

fn mount_new(
    root: &OwnedFd,
    path: &str,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), Refusal> {
    let place = ensure_in_root(root, path, Kind::Directory)
        .or_request(format!("the image has no usable {path}"))?;
    mount(
        Some(kind),
        &proc_path(&place),
        Some(kind),
        flags,
        Some(options),
    )
    .or_machine(format!("cannot mount {path}"))
}

/// Binds an open file or directory to a place of the same kind; with an owner, as that sees it.
fn bind(
    source: &OwnedFd,
    root: &OwnedFd,
    destination: &str,
    owner: Option<Owner<'_>>,
) -> Result<(), Refusal> {
    let stat = fstat(source).or_machine("cannot inspect a mount's source")?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Directory,
        _ => Kind::File,
    };
    let place = ensure_in_root(root, destination, kind)
        .or_request(format!("cannot make the mount point {destination}"))?;
    if let Some(owner) = owner {
        let failed = format!("cannot bind {destination} with its owners mapped");
        let view = view(source, owner).or_machine(&failed)?;
        return attach_mount(&view, &place).or_machine(&failed);
    }
    mount(
        Some(&proc_path(source)),
        &proc_path(&place),
        NONE,
        MsFlags::MS_BIND,
        NONE,
    )
    .or_machine(format!("cannot bind {destination}"))
}

/// An image's files: an overlay without an upper layer, so that nothing can be written, with whiteouts
/// and upper layers' files as in a container of that image.
fn mount_image(rootfs: &RootfsSpec, layers: &[String], index: usize) -> std::io::Result<OwnedFd> {
    let place = rootfs.writable.join("images").join(index.to_string());
    // An overlay of a single layer needs another one.
    let (empty, target) = (place.join("empty"), place.join("root"));
    fs::create_dir_all(&empty)?;
    fs::create_dir_all(&target)?;
    std::env::set_current_dir(&rootfs.layers_dir)?;
    let lower: Vec<&str> = layers.iter().rev().map(String::as_str).collect();
    let options = format!("lowerdir={}:{}", lower.join(":"), empty.display());
    mount(
        Some("overlay"),
        &target,
        Some("overlay"),
        MsFlags::MS_RDONLY | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )?;
    open_dir(&target)
}

fn mount_volume(
    root: &OwnedFd,
    rootfs: &RootfsSpec,
    spec: &MountSpec,
    index: usize,
    owner: Option<Owner<'_>>,
) -> Result<(), Refusal> {
    let destination = spec.destination.as_str();
    match &spec.source {
        MountSource::Volume {
            directory,
            sub_path,
        } => {
            let volume = open_dir(directory).or_machine("the volume is gone")?;
            let wrong = format!("cannot use the sub path of {destination}");
            let source = match sub_path.is_empty() {
                true => volume,
                false => {
                    // Root of the volume is the guest's, which the container sees as its own.
                    Owner::rest(owner)?;
                    let source = ensure_beneath(&volume, sub_path).or_request(&wrong)?;
                    Owner::act(owner)?;
                    source
                }
            };
            bind(&source, root, destination, owner)?;
        }
        MountSource::Image { layers, sub_path } => {
            let wrong = |what: String| format!("{IMAGE_VOLUME_FAILED}: cannot {what}");
            // The overlay acts as who has mounted it, and its layers are seen with owners mapped.
            Owner::rest(owner)?;
            let image = mount_image(rootfs, layers, index)
                .or_machine(wrong(format!("mount the image on {destination}")))?;
            Owner::act(owner)?;
            let source = match sub_path.is_empty() {
                true => image,
                false => open_beneath(&image, sub_path, OFlags::PATH).or_request(wrong(
                    format!("use the sub path {sub_path:?} of the image on {destination}"),
                ))?,
            };
            bind(&source, root, destination, None)?;
            return remount_readonly(root, destination);
        }
        MountSource::Tmpfs { size, mode } => {
            let mode = if *mode == 0 { 0o1777 } else { mode & 0o7777 };
            let options = format!("mode={mode:o},size={size}");
            mount_new(
                root,
                destination,
                "tmpfs",
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
                &options,
            )?;
        }
    }
    if spec.readonly {
        remount_readonly(root, destination)
    } else {
        Ok(())
    }
}

/// Makes the node of a block device, in a place that nothing has.
fn make_device(root: &OwnedFd, spec: &DeviceSpec, owner: Option<Owner<'_>>) -> Result<(), Refusal> {
    let wrong = format!("cannot make the device {}", spec.destination);
    let path = Path::new(&spec.destination);
    let (Some(parent), Some(name)) = (path.parent().and_then(Path::to_str), path.file_name())
    else {
        return Err(Refusal::invalid(wrong));
    };
    let meta = fs::metadata(&spec.source).or_machine(&wrong)?;
    let place = ensure_in_root(root, parent, Kind::Directory).or_request(&wrong)?;
    let (kind, mode) = (FileType::BlockDevice, Mode::from_raw_mode(0o660));
    // Only the guest's root may make it, for the container's.
    Owner::rest(owner)?;
    mknodat(&place, name, kind, mode, meta.rdev()).or_request(&wrong)?;
    if let Some(Owner { map, .. }) = owner {
        let own = (map.uids.first, map.gids.first);
        let made = Path::new(&proc_path(&place)).join(name);
        chown(made, Some(own.0), Some(own.1)).or_machine(&wrong)?;
    }
    Owner::act(owner)
}

fn remount_readonly(root: &OwnedFd, path: &str) -> Result<(), Refusal> {
    let failed = format!("cannot make {path} read-only");
    let place = open_in_root(root, path, OFlags::PATH).or_machine(&failed)?;
    // A remount sets all flags: those that are there must be repeated.
    let have = fstatvfs(&place).or_machine(&failed)?.f_flag;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    for (is, flag) in [
        (StatVfsMountFlags::NOSUID, MsFlags::MS_NOSUID),
        (StatVfsMountFlags::NODEV, MsFlags::MS_NODEV),
        (StatVfsMountFlags::NOEXEC, MsFlags::MS_NOEXEC),
    ] {
        flags.set(flag, have.contains(is));
    }
    mount(NONE, &proc_path(&place), NONE, flags, NONE).or_machine(&failed)
}

fn make_readonly(root: &OwnedFd, path: &str) -> Result<(), Refusal> {
    let place = match open_in_root(root, path, OFlags::PATH) {
        Ok(place) => place,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).or_machine(format!("cannot open {path}")),
    };
    let name = proc_path(&place);
    mount(
        Some(&name),
        &name,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
    .or_machine(format!("cannot bind {path}"))?;
    remount_readonly(root, path)
}

fn mask(root: &OwnedFd, path: &str) -> Result<(), Refusal> {
    let place = match open_in_root(root, path, OFlags::PATH) {
        Ok(place) => place,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).or_machine(format!("cannot open {path}")),
    };
    let stat = fstat(&place).or_machine(format!("cannot inspect {path}"))?;
    let place = proc_path(&place);
    let masked = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        mount(
            Some("tmpfs"),
            &place,
            Some("tmpfs"),
            SAFE | MsFlags::MS_RDONLY,
            Some("mode=0555"),
        )
    } else {
        // The guest's own null device, never the container's.
        mount(Some("/dev/null"), &place, NONE, MsFlags::MS_BIND, NONE)
    };
    masked.or_machine(format!("cannot mask {path}"))
}

/// Changes the root and leaves nothing of the old one reachable (pivot_root(2), "." over ".").
fn pivot(root: &OwnedFd) -> Result<(), Refusal> {
    let failed = "cannot change the root";
    rustix::process::fchdir(root).or_machine(failed)?;
    rustix::process::pivot_root(".", ".").or_machine(failed)?;
    umount2(".", MntFlags::MNT_DETACH).or_machine(failed)?;
    rustix::process::chdir("/").or_machine(failed)
}

/// Binds the container's terminal to `/dev/console`, which programs without a controlling terminal
/// of their own look for.
pub(crate) fn bind_console(slave: impl AsFd) -> Result<(), Refusal> {
    let failed = "cannot make /dev/console";
    let root = open_dir(Path::new("/")).or_machine(failed)?;
    let slave = rustix::fs::fstat(&slave).or_machine(failed)?;
    let name = format!("dev/pts/{}", rustix::fs::minor(slave.st_rdev));
    let source = open_beneath(&root, &name, OFlags::PATH | OFlags::NOFOLLOW).or_machine(failed)?;
    let place = ensure_in_root(&root, "/dev/console", Kind::File).or_machine(failed)?;
    mount(
        Some(&proc_path(&source)),
        &proc_path(&place),
        NONE,
        MsFlags::MS_BIND,
        NONE,
    )
    .or_machine(failed)
}
