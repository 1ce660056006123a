//! Locks the server of host directories up: a process that its guest talks to, and that writes as
//! anybody.
//!
//! It has a user namespace in which every id means what it means outside, so that files keep their
//! owners, but no capability counts for anything but files that it can see: it makes no device node,
//! mounts no file system, raises no limit. And it has a root of its own: a tmpfs with the system's
//! programs, and one directory of places for what is shared. The server makes that directory its
//! root in turn, in further namespaces for mounts, processes and network, and then has nothing else.
//! What is shared is mounted there later, from outside, with [`crate::Vm::share`].
//!
//! The daemon writes the maps of the user namespace, because the process itself may not.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::RawFd,
        unix::fs::{DirBuilderExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use rustix::fs::StatVfsMountFlags;
use serde::{Deserialize, Serialize};

use super::{LaunchSpec, step};

/// Places of one sort in one server.
pub(crate) const PLACES: u32 = 32;
/// Where the places are in the server's first root.
pub(crate) const SHARED: &str = "/share";
const NONE: Option<&str> = None;

/// How the server is locked up.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Jail {
    /// An empty directory, on which the root is mounted where nobody else sees it.
    pub(crate) root: PathBuf,
    /// Pipe that is written to when the process is in its user namespace.
    pub(crate) ready: RawFd,
    /// Pipe that is read from until the maps of that are written.
    pub(crate) go: RawFd,
}

/// A sort of place: what is shared in the same way is looked for among its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) directory: bool,
    pub(crate) read_only: bool,
    pub(crate) recursive: bool,
    pub(crate) follow_mounts: bool,
}

impl Place {
    fn all() -> impl Iterator<Item = Self> {
        (0..16_u8).map(|bits| Self {
            directory: bits & 1 != 0,
            read_only: bits & 2 != 0,
            recursive: bits & 4 != 0,
            follow_mounts: bits & 8 != 0,
        })
    }

    /// Name of the place with this number.
    pub(crate) fn name(self, number: u32) -> String {
        let letter = |is, yes: char, no| if is { yes } else { no };
        format!(
            "{}{}{}{}{number:02}",
            letter(self.directory, 'd', 'f'),
            letter(self.read_only, 'r', 'w'),
            letter(self.recursive, 'a', 't'),
            letter(self.follow_mounts, 's', 'p'),
        )
    }
}

/// Turns this process into one that may become the server.
pub(super) fn enter(jail: &Jail, spec: &LaunchSpec) -> io::Result<Command> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // The server holds a descriptor for each file that the guest knows.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;

    unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| step("enter a user namespace")(e.into()))?;
    handshake(jail).map_err(step("have the user namespace's maps written"))?;
    let rest = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(rest).map_err(|e| step("enter new namespaces")(e.into()))?;
    build(&jail.root).map_err(step("build the server's root"))?;
    pivot(&jail.root).map_err(step("change the root"))?;
    rustix::thread::set_no_new_privs(true)?;

    let mut server = Command::new(&spec.program);
    server.args(&spec.args).env_clear().env("LC_ALL", "C");
    Ok(server)
}

fn handshake(jail: &Jail) -> io::Result<()> {
    // By name, because a bare number cannot be owned without unsafe code.
    let pipe = |fd: RawFd| format!("/proc/self/fd/{fd}");
    OpenOptions::new()
        .write(true)
        .open(pipe(jail.ready))?
        .write_all(b"r")?;
    let mut go = File::open(pipe(jail.go))?;
    for fd in [jail.ready, jail.go] {
        nix::unistd::close(fd)?;
    }
    // Otherwise the end of the daemon would not be seen: its end is then the only writer's.
    go.read_exact(&mut [0])
}

/// Mounts the root: programs and libraries, read-only, and the places.
fn build(root: &Path) -> io::Result<()> {
    // Nothing goes out, nothing comes in.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("jail"),
        root,
        Some("tmpfs"),
        plain,
        Some("mode=0755,size=1m"),
    )?;
    for name in ["usr", "lib", "lib64", "bin", "sbin"] {
        let (from, to) = (Path::new("/").join(name), root.join(name));
        match fs::symlink_metadata(&from) {
            Ok(meta) if meta.is_symlink() => symlink(fs::read_link(&from)?, &to)?,
            Ok(_) => {
                fs::create_dir(&to)?;
                bind(&from, &to)?;
                remount_readonly(&to)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    fs::create_dir(root.join("etc"))?;
    match fs::copy("/etc/ld.so.cache", root.join("etc/ld.so.cache")) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Until the server has one for its own processes.
    fs::create_dir(root.join("proc"))?;
    bind(Path::new("/proc"), &root.join("proc"))?;

    let shared = root.join(SHARED.trim_start_matches('/'));
    fs::create_dir(&shared)?;
    let nothing = plain | MsFlags::MS_NOEXEC;
    let options = Some("mode=0755,size=64k,nr_inodes=2048");
    mount(Some("share"), &shared, Some("tmpfs"), nothing, options)?;
    for place in Place::all() {
        for number in 0..PLACES {
            let path = shared.join(place.name(number));
            match place.directory {
                true => DirBuilder::new().mode(0o755).create(path)?,
                false => drop(File::create_new(path)?),
            }
        }
    }
    // The guest is not to put anything beside the places.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | nothing;
    mount(NONE, &shared, NONE, flags, NONE)?;
    Ok(())
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    Ok(mount(Some(from), to, NONE, flags, NONE)?)
}

fn remount_readonly(path: &Path) -> io::Result<()> {
    // Flags that the mount has from outside may not be left out in a user namespace.
    let have = rustix::fs::statvfs(path)?.f_flag;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    for (is, flag) in [
        (StatVfsMountFlags::NOSUID, MsFlags::MS_NOSUID),
        (StatVfsMountFlags::NODEV, MsFlags::MS_NODEV),
        (StatVfsMountFlags::NOEXEC, MsFlags::MS_NOEXEC),
        (StatVfsMountFlags::NOATIME, MsFlags::MS_NOATIME),
        (StatVfsMountFlags::NODIRATIME, MsFlags::MS_NODIRATIME),
        (StatVfsMountFlags::RELATIME, MsFlags::MS_RELATIME),
    ] {
        flags.set(flag, have.contains(is));
    }
    Ok(mount(NONE, path, NONE, flags, NONE)?)
}

/// Leaves nothing of the old root reachable (pivot_root(2), "." over ".").
fn pivot(root: &Path) -> io::Result<()> {
    rustix::process::chdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<String> = Place::all()
            .flat_map(|place| (0..PLACES).map(move |number| place.name(number)))
            .collect();
        assert_eq!(names.len(), 16 * PLACES as usize);
        let place = Place {
            directory: true,
            read_only: true,
            recursive: false,
            follow_mounts: true,
        };
        assert_eq!(place.name(3), "drts03");
    }
}
