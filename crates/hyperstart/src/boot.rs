//! From the first instruction of user space to a machine that can make containers.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use hypernetes_container::cgroup;
use nix::mount::{MsFlags, mount};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    process::{Resource, Rlimit, setrlimit},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use crate::{console::log, error::GuestError};

/// Kernel modules in the initramfs, and the file that lists them in order.
const MODULES: &str = "/lib/modules/hypernetes";
/// Where the root is made before it becomes the root.
const NEW_ROOT: &str = "/newroot";
const NONE: Option<&str> = None;
/// Whether the kernel hurries its grace periods (RCU).
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// Directories of the agent, on the tmpfs that is its root.
pub(crate) mod dir {
    /// Mounted image layers, by slot.
    pub(crate) const LAYERS: &str = "/layers";
    /// Mount points of the containers' roots: empty outside of the containers.
    pub(crate) const ROOTS: &str = "/roots";
    /// The scratch disk: writable layers and emptyDirs.
    pub(crate) const SCRATCH: &str = "/scratch";
    /// Files volumes and memory-backed emptyDirs.
    pub(crate) const VOLUMES: &str = "/volumes";
    /// emptyDirs that have a disk of their own.
    pub(crate) const DISKS: &str = "/disks";
    /// File systems that outlive the pod, by the slots of their disks.
    pub(crate) const PERSISTENT: &str = "/persistent";
    /// File systems of the host, by volume.
    pub(crate) const SHARED: &str = "/shared";
    /// The pod's hosts, resolv.conf, hostname.
    pub(crate) const FILES: &str = "/files";
    /// The pod's shared memory.
    pub(crate) const SHM: &str = "/shm";
    /// A /sys that shows the pod's network, where that is not the guest's first one.
    pub(crate) const POD_SYS: &str = "/podsys";
}

fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, GuestError> {
    result.map_err(|source| GuestError::Boot {
        step,
        source: source.into(),
    })
}

/// Boots. Nothing but the kernel has run before.
pub(crate) fn prepare() -> Result<(), GuestError> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for path in ["/proc", "/sys", "/dev"] {
        step("make the first directories", fs::create_dir_all(path))?;
    }
    step(
        "mount /proc",
        mount(Some("proc"), "/proc", Some("proc"), safe, NONE),
    )?;
    step(
        "mount /sys",
        mount(Some("sysfs"), "/sys", Some("sysfs"), safe, NONE),
    )?;
    let device = MsFlags::MS_NOSUID;
    step(
        "mount /dev",
        mount(
            Some("devtmpfs"),
            "/dev",
            Some("devtmpfs"),
            device,
            Some("mode=0755"),
        ),
    )?;
    open_console();
    load_modules(Path::new(MODULES));
    step("move the root", move_root())?;

    for path in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        step("make the directories of /dev", fs::create_dir_all(path))?;
    }
    let pts = Some("newinstance,ptmxmode=0666,mode=0620,gid=5");
    let terminal = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    step(
        "mount /dev/pts",
        mount(Some("devpts"), "/dev/pts", Some("devpts"), terminal, pts),
    )?;
    step(
        "mount cgroups",
        mount(Some("cgroup2"), cgroup::ROOT, Some("cgroup2"), safe, NONE),
    )?;
    step("set the cgroups up", cgroup::prepare_tree())?;
    for path in [
        dir::LAYERS,
        dir::ROOTS,
        dir::SCRATCH,
        dir::VOLUMES,
        dir::DISKS,
        dir::PERSISTENT,
        dir::SHARED,
        dir::FILES,
        dir::SHM,
    ] {
        step("make the agent's directories", fs::create_dir_all(path))?;
    }
    crate::resize::prepare();
    hurry_grace_periods();
    // For the agent's own descriptors; containers get limits of their own.
    let files = Rlimit {
        current: Some(1_048_576),
        maximum: Some(1_048_576),
    };
    step(
        "raise the limit of open files",
        setrlimit(Resource::Nofile, files),
    )
}

/// Has the kernel interrupt CPUs where it would wait for each of them to pass through its scheduler: with a tick of 10 ms
/// that takes 20 ms and more, and moving a process into a cgroup, plugging a disk or ending a namespace waits for it. A
/// pod has few CPUs. See `Documentation/admin-guide/kernel-parameters.txt` of Linux, `rcupdate.rcu_expedited`.
fn hurry_grace_periods() {
    // What a kernel does not have it need not hurry.
    if Path::new(EXPEDITED).exists()
        && let Err(error) = fs::write(EXPEDITED, "1")
    {
        log!("cannot hurry the kernel's grace periods: {error}");
    }
}

/// Makes the console the standard streams: the initramfs need not have a node for it.
fn open_console() {
    let console = openat(
        CWD,
        "/dev/console",
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .or_else(|_| {
        openat(
            CWD,
            "/dev/null",
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        )
    });
    if let Ok(console) = console {
        // Without streams the agent is mute, not broken.
        for attached in [
            dup2_stdin(&console),
            dup2_stdout(&console),
            dup2_stderr(&console),
        ] {
            if attached.is_err() {
                return;
            }
        }
    }
}

/// Loads the modules that the kernel's import packed: a kernel that has its drivers built in has no
/// list. One that does not load is reported; whether it was needed shows later.
fn load_modules(directory: &Path) {
    let Ok(order) = fs::read_to_string(directory.join("order")) else {
        return;
    };
    for name in order
        .lines()
        .map(str::trim)
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
    {
        let path: PathBuf = directory.join(name);
        let loaded =
            fs::File::open(&path).and_then(|file| Ok(rustix::system::finit_module(&file, c"", 0)?));
        match loaded {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                log!("cannot load {}: {error}", path.display());
            }
            _ => {}
        }
    }
    // The initramfs is memory.
    if let Err(error) = fs::remove_dir_all(directory) {
        log!("cannot free {}: {error}", directory.display());
    }
}

/// Moves to a tmpfs as the root. pivot_root(2), which every container needs, refuses to leave the
/// kernel's own first root file system.
fn move_root() -> io::Result<()> {
    fs::create_dir_all(NEW_ROOT)?;
    mount(
        Some("root"),
        NEW_ROOT,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )?;
    for name in ["proc", "sys", "dev"] {
        let target = Path::new(NEW_ROOT).join(name);
        fs::create_dir(&target)?;
        let source = Path::new("/").join(name);
        mount(Some(&source), &target, NONE, MsFlags::MS_MOVE, NONE)?;
    }
    rustix::process::chdir(NEW_ROOT)?;
    mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    // Nothing that happens in a container's mount namespace may come back.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    Ok(())
}
