//! conmon: the parent of a container, which outlives the daemon.
//!
//! It has the container made, keeps its streams, writes its log, and leaves its exit code in a file
//! before it ends. It listens to clients on `attach` and to orders on `ctl`, both in the bundle.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use hypernetes_runtime::{RuntimeError, TtySize};
use hypernetes_types::ContainerId;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    pipe::{PipeFlags, pipe_with},
};
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use crate::{
    cgroup::Hierarchies,
    config::Programs,
    oci::{Oci, PATH, message},
    process::Process,
    records::{failed, storage},
};

/// Longest answer that is read of a monitor.
const MAX_ANSWER: u64 = 64 << 10;
/// Name of the file with the exit code, in the bundle's directory `exit`.
const EXITS: &str = "exit";
const PID_FILE: &str = "conmon.pid";
const ERRORS: &str = "conmon.err";

/// A container to be watched.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) id: ContainerId,
    pub(crate) bundle: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
    pub(crate) stdin_once: bool,
    pub(crate) cgroup: String,
}

/// What conmon says of the container's making.
#[derive(Debug, Deserialize)]
struct Answer {
    data: i64,
    #[serde(default)]
    message: String,
}

/// Starts a monitor, which makes the container. Returns the monitor's process id. Blocks.
///
/// If it fails, no process is left but those in the two cgroups.
pub(crate) fn launch(launch: &Launch, programs: &Programs, oci: &Oci) -> Result<u32, RuntimeError> {
    let action = "start the container's monitor";
    let io = |error: io::Error| storage(action, error);
    std::fs::create_dir_all(launch.bundle.join(EXITS)).map_err(io)?;
    let (answer, answer_end) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| io(e.into()))?;
    let (gate_end, gate) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| io(e.into()))?;
    let errors = File::create(launch.bundle.join(ERRORS)).map_err(io)?;
    let mut command = Command::new(&programs.conmon);
    command
        .env_clear()
        .env("PATH", PATH)
        .env("_OCI_SYNCPIPE", "3")
        .env("_OCI_STARTPIPE", "4")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .args(["--api-version", "1", "-c", launch.id.as_str(), "-u"])
        .args([launch.id.as_str(), "-n", launch.id.as_str()])
        .arg("-r")
        .arg(&oci.program)
        .arg("--runtime-arg")
        .arg(oci.root_option())
        .arg("-b")
        .arg(&launch.bundle)
        .arg("-p")
        .arg(launch.bundle.join("pid"))
        .arg("-P")
        .arg(launch.bundle.join(PID_FILE))
        .arg("--exit-dir")
        .arg(launch.bundle.join(EXITS))
        .arg("-l")
        .arg(format!("k8s-file:{}", launch.log.display()))
        .args(["--full-attach", "--log-level", "warn"]);
    if launch.tty {
        command.arg("-t");
    }
    if launch.stdin {
        command.arg("-i");
        if !launch.stdin_once {
            command.arg("--leave-stdin-open");
        }
    }
    let mapping = |parent_fd, child_fd| FdMapping {
        parent_fd,
        child_fd,
    };
    command
        .fd_mappings(vec![mapping(answer_end, 3), mapping(gate_end, 4)])
        .map_err(|error| storage(action, error))?;
    let mut child = command.spawn().map_err(io)?;
    // Our copies of its ends: without them the end of the monitor is the end of its answer.
    drop(command);
    // It waits for a byte before it does anything, so that all it starts is in the group too.
    let mut gate = File::from(gate);
    let joined = Hierarchies::read()
        .and_then(|all| all.join(&launch.cgroup, child.id()))
        .and_then(|()| gate.write_all(b"1"));
    if let Err(error) = joined {
        drop(child.kill());
        drop(child.wait());
        return Err(io(error));
    }
    drop(gate);
    // The first process ends as soon as it has left the monitor behind.
    child.wait().map_err(io)?;
    let line = read_line(File::from(answer), oci.patience).map_err(io)?;
    let said: Option<Answer> = serde_json::from_slice(&line).ok();
    match said {
        Some(answer) if answer.data > 0 => {}
        Some(answer) if !answer.message.is_empty() => {
            return Err(failed(
                "make the container",
                message(answer.message.as_bytes()),
            ));
        }
        _ => {
            let errors = std::fs::read(launch.bundle.join(ERRORS)).unwrap_or_default();
            let said = match message(&errors) {
                said if said.is_empty() => "it ended without a word".to_owned(),
                said => said,
            };
            return Err(failed("make the container", said));
        }
    }
    let pid = std::fs::read_to_string(launch.bundle.join(PID_FILE)).map_err(io)?;
    pid.trim()
        .parse()
        .map_err(|error| storage("read the monitor's process id", error))
}

fn read_line(mut pipe: File, patience: Duration) -> io::Result<Vec<u8>> {
    let wait = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let mut line = Vec::new();
    while !line.contains(&b'\n') && line.len() as u64 <= MAX_ANSWER {
        let mut fds = [PollFd::new(&pipe, PollFlags::IN)];
        if poll(&mut fds, Some(&wait))? == 0 {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        let mut piece = [0; 4096];
        match pipe.read(&mut piece)? {
            0 => break,
            got => line.extend_from_slice(&piece[..got]),
        }
    }
    Ok(line)
}

/// The monitor of a container, if it runs.
pub(crate) fn find(pid: u32, id: &ContainerId) -> io::Result<Option<Process>> {
    Process::find(pid, &["-c", id.as_str()])
}

/// The monitor that a launch has left behind, as far as it has come.
pub(crate) fn left_behind(bundle: &Path, id: &ContainerId) -> Option<Process> {
    let pid = std::fs::read_to_string(bundle.join(PID_FILE)).ok()?;
    find(pid.trim().parse().ok()?, id).ok().flatten()
}

/// The exit code that a monitor has left: 128 and the signal's number for one that was killed.
pub(crate) fn exit_code(bundle: &Path, id: &ContainerId) -> Option<i32> {
    let text = std::fs::read_to_string(bundle.join(EXITS).join(id.as_str())).ok()?;
    text.trim().parse().ok()
}

/// Whether the monitor has seen the kernel kill for want of memory.
pub(crate) fn saw_oom(bundle: &Path) -> bool {
    bundle.join("oom").exists()
}

fn order(bundle: &Path, text: &str) -> io::Result<()> {
    // Without a reader the monitor is gone, and this fails instead of waiting.
    let mut fifo = OpenOptions::new()
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(bundle.join("ctl"))?;
    fifo.write_all(text.as_bytes())
}

/// Changes the size of a container's terminal.
pub(crate) fn resize(bundle: &Path, size: TtySize) -> io::Result<()> {
    // conmon takes no more.
    let (height, width) = (size.height.min(1000), size.width.min(1000));
    order(bundle, &format!("1 {height} {width}\n"))
}

/// Whether the monitor writes to the file of this name.
fn writes_to(pid: u32, log: &Path) -> io::Result<bool> {
    let Ok(named) = std::fs::metadata(log) else {
        return Ok(false);
    };
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor may be closed while the list is read.
        if let Ok(open) = std::fs::metadata(entry?.path())
            && (open.dev(), open.ino()) == (named.dev(), named.ino())
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Has the monitor go on in a new file if somebody has taken its log away. When it returns, the
/// file is there and the old one gets no more.
pub(crate) async fn reopen_log(
    pid: u32,
    bundle: &Path,
    log: &Path,
    patience: Duration,
) -> Result<(), RuntimeError> {
    let action = "reopen a container log";
    let io = |error: io::Error| storage(action, error);
    if writes_to(pid, log).map_err(io)? {
        return Ok(());
    }
    order(bundle, "2 0 0\n").map_err(io)?;
    // It opens the new file before it gives it the name, and after it has closed the old one.
    let until = Instant::now() + patience;
    while !writes_to(pid, log).map_err(io)? {
        if Instant::now() > until {
            return Err(io(io::Error::from(io::ErrorKind::TimedOut)));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
