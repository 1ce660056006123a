//! Namespaces that the containers of a pod share, pinned by bind mounts: no process holds them.

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    unistd::sethostname,
};

use crate::rootfs::unmount;

/// What a pod has for itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// Host name in a UTS namespace of its own; `None` = the host's.
    pub(crate) hostname: Option<String>,
    /// An IPC namespace of its own.
    pub(crate) ipc: bool,
    /// The pinned network namespace that it is in; `None` = the host's.
    pub(crate) netns: Option<PathBuf>,
    /// Kernel parameters of these namespaces, with dots.
    pub(crate) sysctls: Vec<(String, String)>,
}

/// Which namespace a kernel parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Ipc,
    Net,
    Uts,
    /// All of the host.
    Host,
}

/// Where a kernel parameter counts.
pub(crate) fn scope(name: &str) -> Scope {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    match name {
        name if IPC.contains(&name) || name.starts_with("fs.mqueue.") => Scope::Ipc,
        name if name.starts_with("net.") => Scope::Net,
        "kernel.domainname" | "kernel.hostname" => Scope::Uts,
        _ => Scope::Host,
    }
}

/// The file of a kernel parameter.
fn sysctl_file(name: &str) -> PathBuf {
    // Names of interfaces may have dots, which are written as slashes: a.b/c is a/b.c.
    let swap = |c: char| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    Path::new("/proc/sys").join(name.chars().map(swap).collect::<String>())
}

/// Runs `work` on a thread of its own, which ends with it: it may enter other namespaces.
pub(crate) fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("hn-hostpod".to_owned())
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|_panic| Err(io::Error::other("the namespace's thread panicked")))
    })
}

/// Bind mounts a namespace's file on `target`.
pub(crate) fn pin(source: &Path, target: &Path) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(target)?;
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND, none).map_err(Into::into)
}

/// Makes the namespaces, sets their parameters, and pins them as `ipc` and `uts` in `directory`.
/// Blocks.
pub(crate) fn make(wanted: &Wanted, directory: &Path) -> io::Result<()> {
    on_own_thread(|| {
        let mut flags = CloneFlags::empty();
        flags.set(CloneFlags::CLONE_NEWIPC, wanted.ipc);
        flags.set(CloneFlags::CLONE_NEWUTS, wanted.hostname.is_some());
        unshare(flags)?;
        if let Some(netns) = &wanted.netns {
            setns(fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
        }
        if let Some(hostname) = &wanted.hostname {
            sethostname(hostname)?;
            pin(
                Path::new("/proc/thread-self/ns/uts"),
                &directory.join("uts"),
            )?;
        }
        for (name, value) in &wanted.sysctls {
            let file = sysctl_file(name);
            fs::write(&file, value).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", file.display()))
            })?;
        }
        if wanted.ipc {
            pin(
                Path::new("/proc/thread-self/ns/ipc"),
                &directory.join("ipc"),
            )?;
        }
        Ok(())
    })
}

/// Runs `work` in a pinned network namespace. Blocks.
pub(crate) fn in_netns<T: Send>(
    netns: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_own_thread(|| {
        setns(fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// Takes the pins of a pod away. Blocks.
pub(crate) fn unpin(directory: &Path) -> io::Result<()> {
    ["ipc", "uts", "pid"]
        .iter()
        .try_for_each(|name| unmount(&directory.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_counts_in_its_namespace() {
        for (name, expected) in [
            ("kernel.shm_rmid_forced", Scope::Ipc),
            ("fs.mqueue.msg_max", Scope::Ipc),
            ("net.ipv4.ip_forward", Scope::Net),
            ("kernel.hostname", Scope::Uts),
            ("kernel.panic", Scope::Host),
            ("kernel.shmmaxx", Scope::Host),
            ("vm.swappiness", Scope::Host),
        ] {
            assert_eq!(scope(name), expected, "{name}");
        }
        assert_eq!(
            sysctl_file("net.ipv4.conf.eth0/1.forwarding"),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
    }
}
