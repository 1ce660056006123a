//! One `hypernetes up` with directories and a port of its own.

use std::{
    ffi::OsString,
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{HostPicture, eventually, host, kubectl, release_dir, run, workspace_root};

/// What a daemon is started with beyond the defaults.
#[derive(Debug, Clone, Default)]
pub struct DaemonOptions {
    /// More arguments for `hypernetes up`.
    pub args: Vec<OsString>,
    /// State directory to use instead of a fresh one.
    pub state_dir: Option<PathBuf>,
}

/// A running daemon. Dropping it kills the daemon and every VM that it started.
#[derive(Debug)]
pub struct Daemon {
    dir: TempDir,
    run_dir: TempDir,
    state_dir: PathBuf,
    options: DaemonOptions,
    child: Option<Child>,
    port: u16,
    kubectl: PathBuf,
}

impl Daemon {
    /// Starts a daemon and waits until it is ready.
    pub fn start(options: DaemonOptions) -> Self {
        let dir = TempDir::new().unwrap();
        // Socket paths are limited to 107 bytes.
        let run_dir = tempfile::Builder::new()
            .prefix("hn-")
            .tempdir_in("/run")
            .unwrap();
        let state_dir = options
            .state_dir
            .clone()
            .unwrap_or_else(|| dir.path().join("state"));
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let kubectl = kubectl(crate::KUBECTL_VERSIONS[0]);
        let mut daemon = Self {
            dir,
            run_dir,
            state_dir,
            options,
            child: None,
            port,
            kubectl,
        };
        daemon.spawn();
        daemon.wait_ready();
        daemon
    }

    /// Starts the process without waiting for it.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "the daemon runs already");
        let release = release_dir();
        let kernel = fs::read_to_string(release.join("kernel-path")).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .unwrap();
        let child = Command::new(release.join("hypernetes"))
            .arg("--state-dir")
            .arg(&self.state_dir)
            .args(["--log", "info", "up", "--node-name", "node", "--listen"])
            .arg(format!("127.0.0.1:{}", self.port))
            .arg("--run-dir")
            .arg(self.run_dir.path())
            .args(["--kernel-dir", kernel.trim()])
            .args(&self.options.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// Waits until the API answers `/readyz`.
    pub fn wait_ready(&mut self) {
        let end = Instant::now() + Duration::from_secs(180);
        loop {
            if let Some(status) = self
                .child
                .as_mut()
                .and_then(|child| child.try_wait().unwrap())
            {
                panic!("the daemon ended with {status}:\n{}", self.log_tail());
            }
            if self.admin_kubeconfig().exists() {
                let probe = self
                    .kubectl(&["--request-timeout=3s", "get", "--raw", "/readyz"])
                    .output();
                if probe.is_ok_and(|output| output.status.success()) {
                    return;
                }
            }
            assert!(
                Instant::now() < end,
                "the daemon is not ready:\n{}",
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until pods of the usual shape start from a template, and returns its size in KiB.
    pub fn wait_template(&self) -> u64 {
        let ready = || -> Result<u64, String> {
            let log = self.log_text();
            let line = log
                .lines()
                .rfind(|line| line.contains("a template is ready"));
            line.and_then(|line| line.split("size_kib=").nth(1))
                .and_then(|rest| rest.split(' ').next()?.parse().ok())
                .ok_or_else(|| "no template yet".to_owned())
        };
        eventually("a template is made", Duration::from_secs(120), ready)
    }

    /// SIGKILL, as a crash.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the daemon runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM and wait; pods run on.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("the daemon runs");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        eventually("the daemon stops", Duration::from_secs(60), || {
            child
                .try_wait()
                .unwrap()
                .map(|_| ())
                .ok_or_else(|| "it still runs".to_owned())
        });
    }

    /// Daemon, VMs and everything that the kernel had for them end, as when the machine loses its power. What is
    /// in the state directory stays.
    pub fn lose_power(&mut self) {
        self.kill();
        host::kill_vmms(self.run_dir.path());
        eventually("the VMMs are gone", Duration::from_secs(30), || {
            let left = self.vmm_processes();
            left.is_empty().then_some(()).ok_or(format!("{left:?}"))
        });
        let instance = fs::read_to_string(self.state_dir.join("instance")).unwrap();
        remove_leftovers(instance.trim());
        for entry in fs::read_dir(self.run_dir.path()).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => fs::remove_dir_all(path).unwrap(),
                false => fs::remove_file(path).unwrap(),
            }
        }
    }

    /// Starts it again after its end and waits until it is ready.
    pub fn start_again(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Creates a tenant and returns the path of its administrator's kubeconfig.
    pub fn tenant(&self, name: &str, cidr: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.kubeconfig"));
        run(self
            .hypernetes(&["tenant", "create", name, "--cidr", cidr, "--kubeconfig"])
            .arg(&path));
        path
    }

    /// `hypernetes --state-dir … ARGS`.
    pub fn hypernetes(&self, args: &[&str]) -> Command {
        let mut command = Command::new(release_dir().join("hypernetes"));
        command
            .arg("--state-dir")
            .arg(&self.state_dir)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// kubectl with the cluster administrator's kubeconfig.
    pub fn kubectl(&self, args: &[&str]) -> Command {
        self.kubectl_as(&self.admin_kubeconfig(), args)
    }

    /// kubectl with some kubeconfig.
    pub fn kubectl_as(&self, kubeconfig: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(args)
            .env("HOME", self.dir.path())
            .stdin(Stdio::null());
        command
    }

    /// Written by the daemon at start.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.state_dir.join("admin.kubeconfig")
    }

    /// Everything durable.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The value of `PATH` with a directory of these programs, by their names, ahead of all others.
    pub fn path_with(&self, programs: &[(&str, &Path)]) -> String {
        let tools = self.dir().join("bin");
        fs::create_dir(&tools).unwrap();
        for (name, program) in programs {
            std::os::unix::fs::symlink(program, tools.join(name)).unwrap();
        }
        format!("{}:{}", tools.display(), std::env::var("PATH").unwrap())
    }

    /// Scratch space of the test, removed with the daemon.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the daemon runs").id()
    }

    /// Processes of VMs that this daemon (or one before it) started.
    pub fn vmm_processes(&self) -> Vec<u32> {
        host::vmm_processes(self.run_dir.path())
    }

    /// What of this daemon is on the host.
    pub fn host_picture(&self) -> HostPicture {
        let instance = fs::read_to_string(self.state_dir.join("instance")).unwrap();
        HostPicture::take(instance.trim(), self.run_dir.path())
    }

    /// Files in the run directory and those of pods in the state directory.
    pub fn pod_files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for dir in [
            self.run_dir.path().to_owned(),
            self.state_dir.join("runtime"),
            self.state_dir.join("logs"),
        ] {
            files(&dir, &mut found);
        }
        // The formatted empty disk that scratch disks are copied from is the node's.
        found.retain(|path| !path.to_string_lossy().contains("template"));
        found
    }

    /// Its log, without colours.
    pub fn log_text(&self) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let mut pieces = log.split("\u{1b}[");
        let mut text = pieces.next().unwrap_or_default().to_owned();
        // A colour ends with the letter m.
        text.extend(pieces.filter_map(|piece| Some(piece.split_once('m')?.1)));
        text
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let log = self.log_text();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("daemon.log")
    }
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's last lines:\n{}", self.log_tail());
        }
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        host::kill_vmms(self.run_dir.path());
        // What a failed test left on the host would disturb the next one.
        if let Ok(instance) = fs::read_to_string(self.state_dir.join("instance")) {
            remove_leftovers(instance.trim());
        }
    }
}

fn remove_leftovers(instance: &str) {
    // The script that the demo uses for the same purpose.
    let script = workspace_root().join("scripts/lib.sh");
    let removal = ". \"$1\" && remove_host_objects \"$2\"";
    let output = Command::new("bash")
        .args(["-c", removal, "bash"])
        .arg(script)
        .arg(instance)
        .output();
    if !output.is_ok_and(|output| output.status.success()) {
        eprintln!("objects of instance {instance} may be left on the host");
    }
}
