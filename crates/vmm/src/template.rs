//! A VM that has booted, to be gone on with by others.
//!
//! The guest's memory is a memfd that nobody can write any more: it is sealed after the VM has
//! ended. VMs that start from it map it copy-on-write, so that what they share is what they have
//! not changed. The state of processor and devices is a stream of some 300 kB.
//!
//! A template lives in the memory of this process: it is gone with it, and so is never stale after
//! an upgrade of host, VMM or daemon. VMs that came from it run on, the kernel keeps their pages.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
    sync::OnceLock,
};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use tokio::time::{Duration, Instant, sleep};

use crate::{Machine, VmExtras, VmSpec, VmmError};

/// How long memory that somebody still has mapped is waited for.
const SEAL_PATIENCE: Duration = Duration::from_secs(10);
const SEAL_PAUSE: Duration = Duration::from_millis(10);

/// What VMs must have in common with the VM that the template was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) machine: Machine,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) nic: bool,
    pub(crate) extras: VmExtras,
}

impl Shape {
    pub(crate) fn of(spec: &VmSpec) -> Self {
        Self {
            machine: spec.machine(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            nic: spec.net.is_some(),
            extras: spec.extras,
        }
    }
}

/// Memory and device state of a VM that was saved by [`Vm::save`](crate::Vm::save).
#[derive(Debug)]
pub struct Template {
    pub(crate) shape: Shape,
    pub(crate) memory: OwnedFd,
    pub(crate) state: Vec<u8>,
    /// Number that the memory's file has in VMMs that open it, once the first of them has shown it.
    pub(crate) memory_fd: OnceLock<RawFd>,
}

impl Template {
    /// `memory` may have no other writer any more.
    ///
    /// Whoever reads about a process in /proc keeps the memory of one that has ended mapped for that
    /// moment: as long as somebody does, up to [`SEAL_PATIENCE`], the memory cannot be sealed.
    pub(crate) async fn new(shape: Shape, memory: OwnedFd, state: Vec<u8>) -> io::Result<Self> {
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        let until = Instant::now() + SEAL_PATIENCE;
        loop {
            match rustix::fs::fcntl_add_seals(&memory, seals) {
                Err(rustix::io::Errno::BUSY) if Instant::now() < until => sleep(SEAL_PAUSE).await,
                sealed => break sealed?,
            }
        }
        Ok(Self {
            shape,
            memory,
            state,
            memory_fd: OnceLock::new(),
        })
    }

    /// Host memory that the template takes, in bytes: pages that its guest has touched, and the
    /// state of its devices.
    pub fn size(&self) -> u64 {
        let blocks = rustix::fs::fstat(&self.memory).map_or(0, |stat| stat.st_blocks);
        u64::try_from(blocks).unwrap_or(0) * 512 + self.state.len() as u64
    }

    /// The memory, for a process that maps it.
    pub(crate) fn share_memory(&self) -> io::Result<OwnedFd> {
        self.memory.try_clone()
    }

    /// A copy of the memory, for a VM whose memory others may write too.
    pub(crate) fn copy_memory(&self) -> io::Result<OwnedFd> {
        let from = File::from(self.memory.try_clone()?);
        let to = File::from(memory(self.shape.memory_mib)?);
        let length = from.metadata()?.len();
        let mut buffer = vec![0; 1 << 20];
        let mut position = 0;
        while position < length {
            let start = match rustix::fs::seek(&from, SeekFrom::Data(position)) {
                Err(rustix::io::Errno::NXIO) => break,
                other => other?,
            };
            let end = rustix::fs::seek(&from, SeekFrom::Hole(start))?;
            position = start;
            while position < end {
                let room = usize::try_from(end - position).unwrap_or(usize::MAX);
                let room = room.min(buffer.len());
                let read = from.read_at(&mut buffer[..room], position)?;
                if read == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                to.write_all_at(&buffer[..read], position)?;
                position += read as u64;
            }
        }
        Ok(to.into())
    }

    /// Refuses a VM that this template does not fit.
    pub(crate) fn check(&self, spec: &VmSpec) -> Result<(), VmmError> {
        let wanted = Shape::of(spec);
        if self.shape == wanted {
            return Ok(());
        }
        Err(VmmError::Spec {
            field: "origin",
            rule: format!(
                "must be a template of this shape ({wanted:?}), not {:?}",
                self.shape
            ),
        })
    }
}

/// Guest memory that can become a template's.
pub(crate) fn memory(mib: u32) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("guest-memory", flags)?);
    file.set_len(u64::from(mib) << 20)?;
    // The VMM's user opens it by number.
    rustix::fs::fchmod(file.as_fd(), rustix::fs::Mode::from_raw_mode(0o666))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsRawFd, task::Poll};

    use tokio::io::AsyncReadExt;

    use super::*;

    fn shape(memory_mib: u32) -> Shape {
        Shape {
            machine: Machine::Microvm,
            vcpus: 1,
            memory_mib,
            nic: false,
            extras: VmExtras::default(),
        }
    }

    #[tokio::test]
    async fn a_copy_has_the_content_and_the_holes() {
        let memory = memory(8).unwrap();
        let file = File::from(memory.try_clone().unwrap());
        file.write_all_at(b"x", 5 << 20).unwrap();
        let shape = shape(8);
        let template = Template::new(shape, memory, Vec::new()).await.unwrap();
        let copy = File::from(template.copy_memory().unwrap());
        let mut byte = [0];
        copy.read_exact_at(&mut byte, 5 << 20).unwrap();
        assert_eq!(&byte, b"x");
        let stat = rustix::fs::fstat(&copy).unwrap();
        assert_eq!(stat.st_size, 8 << 20);
        assert!(stat.st_blocks * 512 < 1 << 20);
        copy.write_all_at(b"y", 5 << 20).unwrap();
        file.read_exact_at(&mut byte, 5 << 20).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[tokio::test]
    async fn memory_that_somebody_still_has_mapped_is_waited_for() {
        let memory = memory(1).unwrap();
        let shape = shape(1);
        let script = "import mmap, sys; file = open(sys.argv[1], 'r+b'); \
                      held = mmap.mmap(file.fileno(), 0); print('held', flush=True); input()";
        let ours = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
        let mut holder = tokio::process::Command::new("python3")
            .args(["-c", script, &ours])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut told = [0; 4];
        let stdout = holder.stdout.as_mut().unwrap();
        stdout.read_exact(&mut told).await.unwrap();
        let mut sealing = std::pin::pin!(Template::new(shape, memory, Vec::new()));
        let first = std::future::poll_fn(|cx| Poll::Ready(sealing.as_mut().poll(cx))).await;
        assert!(first.is_pending(), "{first:?}");
        holder.kill().await.unwrap();
        sealing.await.unwrap();
    }

    #[tokio::test]
    async fn a_template_cannot_be_written() {
        let memory = memory(1).unwrap();
        let shape = shape(1);
        let template = Template::new(shape, memory, vec![1, 2]).await.unwrap();
        let mut file = File::from(template.share_memory().unwrap());
        let refused = file.write(b"x").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(file.set_len(0).is_err());
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        assert!(rustix::fs::fallocate(&file, punch, 0, 4096).is_err());
        assert_eq!(template.size(), 2);
    }
}
