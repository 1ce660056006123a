//! `hypernetes node` as a process of a test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use crate::{HostPicture, eventually, host, release_dir};

/// An emulated guest on a loaded host is slow, not dead.
const PATIENCE: Duration = Duration::from_secs(120);

/// A node runtime with directories of its own. Dropping it ends it and its VMs.
#[derive(Debug)]
pub struct Node {
    temp: TempDir,
    run_dir: TempDir,
    namespace: Option<String>,
    cidr: String,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl Node {
    /// Starts one whose pods are on `cidr`; `settings` are further lines of its configuration.
    pub fn start(cidr: &str, settings: &str) -> Self {
        Self::start_in(None, cidr, settings)
    }

    /// Starts one in a network namespace below `/run/netns`.
    pub fn start_in(namespace: Option<&str>, cidr: &str, settings: &str) -> Self {
        let mut node = Self::prepare(namespace, cidr);
        node.configure(settings);
        node.spawn();
        node
    }

    /// Makes the directories of one that is to be configured and spawned.
    pub fn prepare(namespace: Option<&str>, cidr: &str) -> Self {
        let temp = TempDir::new().unwrap();
        // Socket paths are limited to 107 bytes.
        let run_dir = tempfile::Builder::new()
            .prefix("hn-")
            .tempdir_in("/run")
            .unwrap();
        Self {
            temp,
            run_dir,
            namespace: namespace.map(str::to_owned),
            cidr: cidr.to_owned(),
            arguments: Vec::new(),
            child: None,
        }
    }

    /// Adds arguments of its command line, for the next start.
    pub fn arguments(&mut self, arguments: &[&str]) {
        self.arguments
            .extend(arguments.iter().map(|&argument| argument.to_owned()));
    }

    /// Replaces the further lines of its configuration, for the next start.
    pub fn configure(&self, settings: &str) {
        self.configure_vm("", settings);
    }

    /// As [`configure`](Self::configure), with further lines below `vm`.
    pub fn configure_vm(&self, vm: &str, settings: &str) {
        let network = match self.cidr.as_str() {
            "" => String::new(),
            cidr => format!("network:\n  cidr: {cidr}\n"),
        };
        let config = format!(
            "socket: {0}/cri.sock\nrunDir: {0}\nkubeletDir: {1}/kubelet\n\
             vm:\n  memoryMiB: 192\n  scratchMiB: 2048\n{vm}{network}{settings}",
            self.run_dir.path().display(),
            self.temp.path().display(),
        );
        fs::write(self.temp.path().join("node.yaml"), config).unwrap();
    }

    /// Starts the daemon, again if it was ended, and waits until it serves its socket.
    pub fn spawn(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.temp.path().join("node.log"))
            .unwrap();
        let binary = release_dir().join("hypernetes");
        let mut command = match &self.namespace {
            None => Command::new(binary),
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).arg(binary);
                command
            }
        };
        let child = command
            .arg("--state-dir")
            .arg(self.state())
            .args(["--log", "info", "node", "--config"])
            .arg(self.temp.path().join("node.yaml"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let socket = self.socket();
        eventually("the socket is served", PATIENCE, || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the node ended:\n{}", self.log_tail());
            std::os::unix::net::UnixStream::connect(&socket)
                .map(drop)
                .map_err(|error| error.to_string())
        });
    }

    /// The command for this node's state.
    pub fn hypernetes(&self, args: &[&str]) -> Command {
        let mut command = Command::new(release_dir().join("hypernetes"));
        command.arg("--state-dir").arg(self.state()).args(args);
        command
    }

    /// SIGKILL, as a crash.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; the daemon must end well.
    pub fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success(), "{}", self.log_tail());
    }

    /// Whether the daemon has ended, by itself or by somebody else.
    pub fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_none_or(|child| child.try_wait().unwrap().is_some())
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// A number of the daemon's /proc/PID/status, such as `VmRSS` in KiB.
    pub fn proc_status(&self, name: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Forgets the daemon's peak of resident memory (`VmHWM`), so that it can be read of what
    /// follows.
    pub fn reset_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.pid()), "5").unwrap();
    }

    /// Descriptors that the daemon has open.
    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }

    /// Directory of the test's own files.
    pub fn dir(&self) -> &Path {
        self.temp.path()
    }

    /// Directory of sockets and VMs.
    pub fn run_dir(&self) -> &Path {
        self.run_dir.path()
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.temp.path().join("state")
    }

    /// The kubelet's directory, as configured.
    pub fn kubelet_dir(&self) -> PathBuf {
        self.temp.path().join("kubelet")
    }

    /// The runtime's socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.path().join("cri.sock")
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.temp.path().join("node.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Processes of its VMs.
    pub fn vmm_processes(&self) -> Vec<u32> {
        host::vmm_processes(self.run_dir.path())
    }

    /// What is this node's on the host.
    pub fn host_picture(&self) -> HostPicture {
        let instance = fs::read_to_string(self.state().join("instance")).unwrap();
        HostPicture::take(instance.trim(), self.run_dir.path())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the node's last lines:\n{}", self.log_tail());
        }
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        host::kill_vmms(self.run_dir.path());
    }
}
