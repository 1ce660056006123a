//! Host directories in a guest: a server for one VM, started with the first of them.
//!
//! ```text
//! guest ── virtio-fs ──▶ QEMU ── vhost-user, guest memory ──▶ server, in a jail
//!                                                               ▲
//! daemon ── mounts what is shared into the server's namespace ──┘
//! ```
//! The server survives the daemon, as QEMU does, and ends with QEMU. A VM whose server has ended is
//! killed: its guest would wait for files for ever.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use rustix::{
    fs::{CWD, FileType},
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};
use serde_json::{Value, json};
use tokio::{sync::Mutex, task::JoinSet, time::timeout};

use super::{
    argv::SHARE_PORT,
    qmp::QmpError,
    spawn::{self, Handover, Launcher},
    vm::{QemuVm, read_messages},
};
use crate::{
    HostShare, SHARE_TAG, VmmError,
    launcher::{Jail, LaunchSpec, PLACES, Place, SHARED},
    process::{LaunchRecord, Process},
    run_dir::{RunDir, SHARE},
};

const NONE: Option<&str> = None;
/// The server's device in QEMU, and its connection.
const DEVICE: &str = "share0";
const CHARDEV: &str = "share";
/// How long the server may outlive QEMU before that is taken for a sign that QEMU lives.
const TOGETHER: Duration = Duration::from_secs(2);
/// How long the waiting process of a killed server may take to follow it.
const FOLLOW: Duration = Duration::from_millis(500);
/// How long a killed server may take to vanish.
const END: Duration = Duration::from_secs(10);

/// A VM's shares.
#[derive(Debug)]
pub(crate) struct Shares {
    launcher: Launcher,
    program: PathBuf,
    server: Mutex<Option<Server>>,
    lost: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Server {
    process: Process,
    _watch: JoinSet<()>,
}

impl Shares {
    pub(crate) fn new(launcher: Launcher, program: PathBuf) -> Self {
        Self {
            launcher,
            program,
            server: Mutex::default(),
            lost: Arc::default(),
        }
    }

    /// Set when the VM is killed because its server has ended.
    pub(crate) fn lost(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.lost)
    }

    /// Kills the VM if its server ends before it.
    fn watch(&self, process: Process, vm: &Process) -> Server {
        let mut watch = JoinSet::new();
        let (server, lost) = (process.clone(), self.lost());
        let (pid, started) = (vm.pid, vm.start_time);
        watch.spawn(async move {
            drop(server.exited().await);
            // Opened anew: a descriptor can be waited for in one place only.
            let Ok(Some(vm)) = Process::open(pid, Some(started)) else {
                return;
            };
            // Usually it ends because QEMU does.
            if let Ok(Ok(())) = timeout(TOGETHER, vm.ended()).await {
                return;
            }
            lost.store(true, Ordering::Relaxed);
            tracing::error!("the server of a VM's host directories has ended: killing the VM");
            if let Err(error) = vm.kill() {
                tracing::error!(%error, "cannot kill a VM without its server");
            }
        });
        Server {
            process,
            _watch: watch,
        }
    }
}

impl QemuVm {
    /// See [`crate::Vm::share`].
    pub(super) async fn share_host(&self, share: HostShare) -> Result<String, VmmError> {
        let action = "share a host path";
        let mut server = self.shares.server.lock().await;
        if server.is_none() {
            *server = Some(self.start_server().await?);
        }
        let Some(Server { process, .. }) = server.as_ref() else {
            return Err(self.control(action.to_owned(), "there is no server"));
        };
        let (process, stage) = (process.clone(), self.run.make_jail());
        let work = move || place(&process, &stage?, &share);
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(name)) => Ok(name),
            Ok(Err(e)) => Err(self.control(action.to_owned(), &e.to_string())),
            Err(e) => Err(self.control(action.to_owned(), &e.to_string())),
        }
    }

    /// Finds a server that survived with its VM. A VM that has lost its server is killed.
    pub(super) async fn adopt_server(&self) -> Result<(), VmmError> {
        let failed = |source| VmmError::Io {
            action: "adopt the server of",
            path: self.run.path().to_owned(),
            source,
        };
        let Some(record) = LaunchRecord::read(&self.run.server_record()).map_err(failed)? else {
            return Ok(());
        };
        let process = Process::open(record.pid, Some(record.start_time)).map_err(failed)?;
        let plugged = self.is_plugged().await;
        let plugged = plugged.map_err(self.failed("look for the server of host directories"))?;
        match (process, plugged) {
            (Some(process), true) => {
                let server = self.shares.watch(process, &self.process);
                *self.shares.server.lock().await = Some(server);
            }
            // Its start was cut short: the next share has a new one.
            (_, false) => end_server(&self.run).await,
            (None, true) => {
                self.shares.lost.store(true, Ordering::Relaxed);
                self.process.kill().map_err(failed)?;
            }
        }
        Ok(())
    }

    pub(super) async fn is_plugged(&self) -> Result<bool, QmpError> {
        let path = json!({ "path": "/machine/peripheral" });
        let devices = self.qmp.execute("qom-list", path).await?;
        let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(devices.iter().any(|device| device["name"] == DEVICE))
    }

    async fn start_server(&self) -> Result<Server, VmmError> {
        let action = "start the server of host directories";
        if !self.has_port().await.map_err(self.failed(action))? {
            return Err(VmmError::Spec {
                field: "extras.shares",
                rule: "must be set for host directories".to_owned(),
            });
        }
        end_server(&self.run).await;
        let io_failed = |e: io::Error| self.control(action.to_owned(), &e.to_string());
        let listener = self.run.listen(SHARE).map_err(io_failed)?;
        let stream = self.run.connect(SHARE).await.map_err(io_failed)?;
        let stream = stream.into_std().map_err(io_failed)?;
        stream.set_nonblocking(false).map_err(io_failed)?;
        let (run, launcher) = (self.run.clone(), self.shares.launcher.clone());
        let (program, cgroup) = (self.shares.program.clone(), self.record.cgroup.clone());
        let launched =
            tokio::task::spawn_blocking(move || launch(&run, &launcher, program, cgroup, listener));
        let process = match launched.await {
            Ok(process) => process.map_err(io_failed)?,
            Err(e) => return Err(self.control(action.to_owned(), &e.to_string())),
        };
        if let Err(e) = self.plug_server(stream.into()).await {
            let undo = self.qmp.execute("chardev-remove", json!({ "id": CHARDEV }));
            drop(undo.await);
            end_server(&self.run).await;
            let said = self.run.open_messages().map(|pipe| read_messages(&pipe));
            let message = format!("{e}: {}", said.unwrap_or_default());
            return Err(self.control(action.to_owned(), &message));
        }
        Ok(self.shares.watch(process, &self.process))
    }

    async fn has_port(&self) -> Result<bool, QmpError> {
        let path = json!({ "path": "/machine/peripheral" });
        let devices = self.qmp.execute("qom-list", path).await?;
        let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(devices.iter().any(|device| device["name"] == SHARE_PORT))
    }

    async fn plug_server(&self, stream: OwnedFd) -> Result<(), QmpError> {
        let pass = json!({ "fdname": CHARDEV });
        self.qmp.execute_with_fd("getfd", pass, stream).await?;
        let backend: Value = json!({
            "type": "socket",
            "data": { "addr": { "type": "fd", "data": { "str": CHARDEV } }, "server": false },
        });
        let chardev = json!({ "id": CHARDEV, "backend": backend });
        self.qmp.execute("chardev-add", chardev).await?;
        let device = json!({
            "driver": "vhost-user-fs-pci",
            "id": DEVICE,
            "chardev": CHARDEV,
            "tag": SHARE_TAG,
            "bus": SHARE_PORT,
        });
        // Succeeds once the server has answered, and so has locked itself up.
        self.qmp.execute("device_add", device).await?;
        Ok(())
    }
}

/// Starts the server and writes the maps of its user namespace. Blocks.
fn launch(
    run: &RunDir,
    launcher: &Launcher,
    program: PathBuf,
    cgroup: Option<String>,
    listener: OwnedFd,
) -> io::Result<Process> {
    if !program.is_file() {
        let text = format!("{} is not installed", program.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    let mut handover = Handover::default();
    let socket = handover.add(listener);
    let (ready, ready_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (go_end, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (ready_end, go_end) = (handover.add(ready_end), handover.add(go_end));
    let args = [
        "-f".to_owned(),
        format!("--fd={socket}"),
        // A process in a user namespace cannot raise its limits; they are the highest already.
        "--rlimit-nofile=0".to_owned(),
        // In this form both QEMU's server and its successor take them.
        "-o".to_owned(),
        format!("source={SHARED},sandbox=namespace,cache=auto,log_level=err"),
    ];
    let spec = LaunchSpec {
        program,
        args: args.to_vec(),
        uid: 0,
        groups: Vec::new(),
        parent: std::process::id(),
        record: Some(run.server_record()),
        cgroup,
        keep: handover.numbers(),
        read_only: Vec::new(),
        read_write: Vec::new(),
        keep_holes_out_of: None,
        ephemeral: false,
        jail: Some(Jail {
            root: run.make_jail()?,
            ready: ready_end,
            go: go_end,
        }),
    };
    let words = run.messages_end()?;
    let copy = words.try_clone()?;
    let child = spawn::spawn(launcher, &spec, handover, copy.into(), words.into())?;
    let process =
        Process::open(child.id(), None)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    let mapped = || -> io::Result<()> {
        let said = |e: io::Error| match run.open_messages() {
            Ok(pipe) => io::Error::new(e.kind(), format!("{e}: {}", read_messages(&pipe))),
            Err(_) => e,
        };
        File::from(ready).read_exact(&mut [0]).map_err(said)?;
        for map in ["uid_map", "gid_map"] {
            // Every id means what it means outside.
            fs::write(format!("/proc/{}/{map}", process.pid), "0 0 4294967295")?;
        }
        File::from(go).write_all(b"g")
    };
    if let Err(e) = mapped() {
        process.kill()?;
        return Err(e);
    }
    Ok(process)
}

/// Ends the server that a record in a run directory tells of, with its processes.
pub(crate) async fn end_server(run: &RunDir) {
    let path = run.server_record();
    let ended = async {
        let Some(record) = LaunchRecord::read(&path)? else {
            return Ok(());
        };
        if let Some(process) = Process::open(record.pid, Some(record.start_time))? {
            let children = process.children();
            for child in &children {
                child.kill()?;
            }
            // The one that waits for it takes note and ends: killed at once, it would leave a zombie to
            // the host's first process.
            if !children.is_empty() && timeout(FOLLOW, process.exited()).await.is_ok() {
                return fs::remove_file(&path);
            }
            process.kill()?;
            timeout(END, process.exited())
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        }
        fs::remove_file(&path)
    };
    if let Err(error) = ended.await {
        tracing::warn!(path = %run.path().display(), %error, "cannot end a server of host directories");
    }
}

/// Mounts a path of the host in a free place of the server, or finds it in one. Blocks.
fn place(server: &Process, stage: &Path, share: &HostShare) -> io::Result<String> {
    // The process that serves is alone in its pid namespace, below the one that waits for it.
    let children = server.children();
    let holder = children.first().map_or(server.pid, |child| child.pid);
    let namespace = File::open(format!("/proc/{holder}/ns/mnt"))?;
    let own = fs::metadata("/proc/self/ns/mnt")?.ino();
    if namespace.metadata()?.ino() == own {
        return Err(io::Error::other("the server is not locked up"));
    }
    std::thread::scope(|scope| {
        // A thread of its own: what it changes of itself must not come back to a pool.
        let work = scope.spawn(|| in_thread(&namespace, stage, share));
        work.join()
            .unwrap_or_else(|_panic| Err(io::Error::other("the mounting thread panicked")))
    })
}

fn in_thread(namespace: &File, stage: &Path, share: &HostShare) -> io::Result<String> {
    let stat = rustix::fs::fstat(&share.source)?;
    let sort = Place {
        directory: FileType::from_raw_mode(stat.st_mode) == FileType::Directory,
        read_only: share.read_only,
        recursive: share.recursive,
        follow_mounts: share.follow_mounts,
    };
    let tree = prepare(stage, share, sort)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    let empty = rustix::fs::stat("/")?.st_dev;
    let mut free = None;
    for number in 0..PLACES {
        let name = sort.name(number);
        let found = rustix::fs::lstat(format!("/{name}"))?;
        if (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino) {
            return Ok(name);
        }
        if found.st_dev == empty && free.is_none() {
            free = Some(name);
        }
    }
    let name = free.ok_or_else(|| {
        io::Error::other(format!("a pod can have {PLACES} host paths of one sort"))
    })?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, format!("/{name}"), flags)?;
    Ok(name)
}

/// A copy of the mounts at and below a path, attached nowhere, with the flags that they are to have.
/// This thread gets a mount namespace of its own, because only mounts in one can be given flags.
fn prepare(stage: &Path, share: &HostShare, sort: Place) -> io::Result<OwnedFd> {
    let copy = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(&share.source, "", copy | OpenTreeFlags::AT_EMPTY_PATH)?;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    // What is done here stays here; what the host mounts still arrives in copies that follow it.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    mount(Some("stage"), stage, Some("tmpfs"), MsFlags::empty(), NONE)?;
    let place = stage.join("place");
    match sort.directory {
        true => fs::create_dir(&place)?,
        false => drop(File::create_new(&place)?),
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, &place, flags)?;
    let propagation = match share.follow_mounts {
        true => MsFlags::MS_SLAVE,
        false => MsFlags::MS_PRIVATE,
    };
    mount(NONE, &place, NONE, MsFlags::MS_REC | propagation, NONE)?;
    let mut table = String::new();
    let mut file = File::open("/proc/thread-self/mountinfo")?;
    file.rewind()?;
    file.read_to_string(&mut table)?;
    for (point, flags) in mounts_below(&table, &place) {
        let mut flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        if share.read_only && (share.recursive || point == place) {
            flags |= MsFlags::MS_RDONLY;
        }
        let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
        mount(NONE, &point, NONE, remount | flags, NONE)?;
    }
    Ok(open_tree(CWD.as_fd(), &place, copy)?)
}

/// The mounts at and below a path, with the flags that they have (proc_pid_mountinfo(5)).
fn mounts_below(table: &str, path: &Path) -> Vec<(PathBuf, MsFlags)> {
    let line = |line: &str| {
        let mut fields = line.split(' ').skip(4);
        let point = PathBuf::from(unescape(fields.next()?));
        let options = fields.next()?;
        let mut flags = MsFlags::empty();
        for option in options.split(',') {
            flags |= match option {
                "ro" => MsFlags::MS_RDONLY,
                "nosuid" => MsFlags::MS_NOSUID,
                "nodev" => MsFlags::MS_NODEV,
                "noexec" => MsFlags::MS_NOEXEC,
                "noatime" => MsFlags::MS_NOATIME,
                "nodiratime" => MsFlags::MS_NODIRATIME,
                "relatime" => MsFlags::MS_RELATIME,
                _ => MsFlags::empty(),
            };
        }
        point.starts_with(path).then_some((point, flags))
    };
    table.lines().filter_map(line).collect()
}

/// Octal escapes of blanks and backslashes.
fn unescape(field: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    let bytes = field.as_bytes();
    let mut text = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let code = field.get(at + 1..at + 4).filter(|_| *byte == b'\\');
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(code) => {
                text.push(code);
                at += 4;
            }
            None => {
                text.push(*byte);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_mounts_below_a_path_are_kept() {
        let table = "\
36 35 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 36 8:1 /x /run/jail/place ro,nosuid,noexec,relatime master:1 - ext4 /dev/sda1 rw
91 90 0:50 / /run/jail/place/a\\040b rw,nodev - tmpfs tmpfs rw
92 36 0:51 / /run/jail/places rw - tmpfs tmpfs rw
";
        let found = mounts_below(table, Path::new("/run/jail/place"));
        assert_eq!(found.len(), 2);
        assert_eq!(
            found[0].1,
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_RELATIME
        );
        assert_eq!(found[1].0, Path::new("/run/jail/place/a b"));
        assert_eq!(found[1].1, MsFlags::MS_NODEV);
        assert_eq!(unescape("a\\134b\\9"), "a\\b\\9");
    }
}
