//! The directory of one VM: which files are in it, and its sockets.
//!
//! The directory belongs to the daemon alone (0700). The VMM's user has no access to it: the VMM is
//! handed listening sockets that were bound here. So nothing in it can be forged by a VMM that its
//! guest has taken over, the launch record above all.

use std::{
    fs::{DirBuilder, File, Permissions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use tokio::net::UnixStream;

pub(crate) const AGENT: &str = "agent.sock";
pub(crate) const QMP: &str = "qmp.sock";
pub(crate) const CONSOLE: &str = "console.sock";
/// Where the server of host directories waits for the VMM.
pub(crate) const SHARE: &str = "share.sock";
const MESSAGES: &str = "vmm.err";
/// The root of that server's process.
const JAIL: &str = "jail";
const SERVER_RECORD: &str = "server.json";
const RECORD: &str = "launch.json";
const CONSOLE_LOG: &str = "console.log";

/// The two files that take turns in holding what is on the console of the VM with that directory,
/// the older one first. Either may be missing.
pub fn console_logs(dir: &Path) -> [PathBuf; 2] {
    let log = dir.join(CONSOLE_LOG);
    [log.with_extension("log.1"), log]
}

/// The run directory of a VM.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the directory if it is missing, and closes it to everybody else.
    pub(crate) fn create(&self) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)?;
        std::fs::set_permissions(&self.0, Permissions::from_mode(0o700))
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.0.join(RECORD)
    }

    pub(crate) fn server_record(&self) -> PathBuf {
        self.0.join(SERVER_RECORD)
    }

    /// Makes the directory that becomes the root of the server of host directories.
    pub(crate) fn make_jail(&self) -> io::Result<PathBuf> {
        let path = self.0.join(JAIL);
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(path),
        }
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.0.join(CONSOLE_LOG)
    }

    /// A path of the socket that fits `sun_path` (108 bytes) however deep the directory is, valid
    /// while the returned descriptor is open.
    fn short(&self, name: &str) -> io::Result<(OwnedFd, PathBuf)> {
        let dir = rustix::fs::open(
            &self.0,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
        Ok((dir, path))
    }

    /// Binds the listening socket that the VMM is given.
    pub(crate) fn listen(&self, name: &str) -> io::Result<OwnedFd> {
        remove(&self.0.join(name))?;
        let (_dir, path) = self.short(name)?;
        Ok(UnixListener::bind(path)?.into())
    }

    /// Connects to the VMM's side of a socket.
    pub(crate) async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let (_dir, path) = self.short(name)?;
        UnixStream::connect(path).await
    }

    /// Makes the pipe that takes the VMM's own messages, and opens the VMM's end of it.
    ///
    /// A fifo, and not a file, because the kernel bounds it: what is above 64 KiB is dropped, a
    /// guest that makes its VMM complain cannot fill the disk. The VMM holds it open for reading
    /// too, so that it lives on without a daemon.
    pub(crate) fn make_messages(&self) -> io::Result<OwnedFd> {
        let path = self.0.join(MESSAGES);
        remove(&path)?;
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&path, flags, Mode::empty())?)
    }

    /// Opens the writers' end of that pipe once more.
    pub(crate) fn messages_end(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::open(
            self.0.join(MESSAGES),
            flags,
            Mode::empty(),
        )?)
    }

    /// Opens our end of that pipe.
    pub(crate) fn open_messages(&self) -> io::Result<File> {
        std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(self.0.join(MESSAGES))
    }

    /// Removes what is of no use without the VMM. Logs stay, for whoever asks why.
    pub(crate) fn remove_live_files(&self) -> io::Result<()> {
        for name in [AGENT, QMP, CONSOLE, SHARE, MESSAGES, RECORD, SERVER_RECORD] {
            remove(&self.0.join(name))?;
        }
        match std::fs::remove_dir(self.0.join(JAIL)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[tokio::test]
    async fn sockets_work_in_directories_too_deep_for_sun_path() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunDir::new(&temp.path().join("d".repeat(120)));
        run.create().unwrap();
        let listener = UnixListener::from(run.listen(AGENT).unwrap());
        run.connect(AGENT).await.unwrap();
        listener.accept().unwrap();
        run.listen(AGENT).unwrap();
        run.remove_live_files().unwrap();
        assert!(!run.path().join(AGENT).exists());
    }

    #[test]
    fn messages_are_bounded_by_the_kernel() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunDir::new(temp.path());
        let mut vmm = File::from(run.make_messages().unwrap());
        let mut ours = run.open_messages().unwrap();
        vmm.write_all(b"complaint\n").unwrap();
        while vmm.write(&[b'x'; 4096]).is_ok() {}
        drop(vmm);
        let mut text = Vec::new();
        ours.read_to_end(&mut text).unwrap();
        assert!(
            text.starts_with(b"complaint\n") && text.len() <= 65536,
            "{}",
            text.len()
        );
    }
}
