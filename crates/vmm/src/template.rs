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
    os::fd::{AsFd, OwnedFd, RawFd},
    sync::OnceLock,
};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::{Machine, VmSpec, VmmError};

/// What VMs must have in common with the VM that the template was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) machine: Machine,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) nic: bool,
}

impl Shape {
    pub(crate) fn of(spec: &VmSpec) -> Self {
        Self {
            machine: spec.kernel.machine,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            nic: spec.net.is_some(),
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
    pub(crate) fn new(shape: Shape, memory: OwnedFd, state: Vec<u8>) -> io::Result<Self> {
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&memory, seals)?;
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
    use std::io::Write;

    use super::*;

    #[test]
    fn a_template_cannot_be_written() {
        let memory = memory(1).unwrap();
        let shape = Shape {
            machine: Machine::Microvm,
            vcpus: 1,
            memory_mib: 1,
            nic: false,
        };
        let template = Template::new(shape, memory, vec![1, 2]).unwrap();
        let mut file = File::from(template.share_memory().unwrap());
        let refused = file.write(b"x").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(file.set_len(0).is_err());
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        assert!(rustix::fs::fallocate(&file, punch, 0, 4096).is_err());
        assert_eq!(template.size(), 2);
    }
}
