//! MicroVM drivers behind one trait.
//!
//! A driver turns a [`VmSpec`] into a running [`Vm`]: a VMM process with its own uid, no network,
//! nothing open but what it was handed. VMs outlive this process: [`Vm::record`] is what a restarted
//! daemon needs to [`Vmm::adopt`] them.
#![forbid(unsafe_code)]

mod channel;
#[cfg(any(test, feature = "fake"))]
pub mod conformance;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod launcher;
mod process;
pub mod qemu;
mod run_dir;
mod share;
mod suspended;
mod template;

use std::{fs::File, os::fd::OwnedFd, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use hypernetes_types::{CpuSet, SandboxId};
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};

pub use run_dir::console_logs;
pub use share::HostShare;
pub use suspended::Suspended;
pub use template::Template;

/// How the guest's devices are attached: decided by what the kernel can drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// QEMU `microvm`, virtio-mmio announced on the command line. HyperKernel.
    Microvm,
    /// QEMU `q35`, virtio-pci. Distribution kernels.
    Q35,
}

/// The kernel to boot, as files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestKernel {
    /// vmlinux (PVH) or bzImage.
    pub kernel: PathBuf,
    /// cpio archive with HyperStart as `/init`, and the modules the kernel needs.
    pub initrd: PathBuf,
    /// Machine that this kernel can drive.
    pub machine: Machine,
    /// Appended to the driver's own command line.
    pub extra_cmdline: String,
}

/// Network device of the VM.
#[derive(Debug)]
pub struct NetDevice {
    /// An open tap queue (IFF_TAP | IFF_NO_PI, with IFF_VNET_HDR).
    pub tap: OwnedFd,
    /// MAC address in the guest.
    pub mac: String,
}

/// A block device of the VM.
#[derive(Debug)]
pub struct Disk {
    /// SCSI id on the bus, 1..=254; the guest finds the disk as `<host>:0:<slot>:0`.
    pub slot: u32,
    /// A regular file or a block device, opened by the daemon; the VMM never sees a path.
    pub file: File,
    /// Image layers are read-only for VMM and guest.
    pub read_only: bool,
}

/// Where a VM begins.
#[derive(Debug, Clone, Default)]
pub enum Origin {
    /// Boots its kernel.
    #[default]
    Kernel,
    /// Boots its kernel, so that [`Vm::save`] can make a template of it, before this process ends.
    Savable,
    /// Goes on where the VM was that a template was made of. The template must be of the same
    /// kernel, virtual CPUs and memory, and its VM had a NIC exactly if this one has. The guest
    /// still has the MAC address of the template's VM.
    Template(Arc<Template>),
    /// Goes on where the VM was that [`Vm::suspend`] wrote, once [`Vm::resume`] says so; until then it
    /// stands still. Everything else of the specification is as that VM was started, and its disks are
    /// the ones that it had when it was suspended, with the content that they had.
    Suspended(Arc<Suspended>),
}

/// What a VM can be given after its start.
///
/// Memory and host directories need [`Machine::Q35`], whatever the kernel prefers, because nothing can
/// be plugged into the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmExtras {
    /// Virtual CPUs at most; those beyond [`VmSpec::vcpus`] are there, and the guest leaves them off
    /// until it is told otherwise. Less than that: no more.
    #[serde(default)]
    pub max_vcpus: u32,
    /// Guest memory in MiB at most. Less than [`VmSpec::memory_mib`]: no more.
    #[serde(default)]
    pub max_memory_mib: u32,
    /// Whether [`Vm::share`] can be called: the guest's memory can be seen by the process that serves
    /// directories, and is the VM's own, also if it comes from a template.
    #[serde(default)]
    pub shares: bool,
}

impl VmExtras {
    /// Memory in MiB that a VM of this size can be given later: whole blocks of the guest's memory.
    pub(crate) fn growth_mib(&self, memory_mib: u32) -> u32 {
        const BLOCK_MIB: u32 = 128;
        let more = self.max_memory_mib.saturating_sub(memory_mib);
        more.div_ceil(BLOCK_MIB).saturating_mul(BLOCK_MIB)
    }

    /// The machine of a VM of this size, for a kernel that prefers `machine`.
    pub(crate) fn machine(&self, machine: Machine, memory_mib: u32) -> Machine {
        match self.shares || self.growth_mib(memory_mib) > 0 {
            true => Machine::Q35,
            false => machine,
        }
    }
}

/// What to start.
#[derive(Debug)]
pub struct VmSpec {
    /// Names the VM; one VM per sandbox.
    pub sandbox: SandboxId,
    /// What boots, or has booted in the template.
    pub kernel: GuestKernel,
    /// Boot or template.
    pub origin: Origin,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// Guest memory in MiB, at least 64.
    pub memory_mib: u32,
    /// What it can be given later.
    pub extras: VmExtras,
    /// The NIC, if the pod has a network.
    pub net: Option<NetDevice>,
    /// Disks that are there at boot.
    pub disks: Vec<Disk>,
    /// Empty directory that belongs to this VM: sockets, console log, launch record.
    pub run_dir: PathBuf,
    /// User and group id of the VMM process, used by no other VM.
    pub uid: u32,
    /// cgroup path below each controller's root that the VMM process is put into, if any.
    pub cgroup: Option<String>,
    /// The VM does not outlive this process, however that ends.
    pub ephemeral: bool,
}

impl VmSpec {
    /// The machine that it becomes.
    pub(crate) fn machine(&self) -> Machine {
        self.extras.machine(self.kernel.machine, self.memory_mib)
    }
}

/// What a restarted daemon needs to find a VM again. Stored before the VM is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Driver that made the VM.
    pub driver: String,
    /// The VM's sandbox.
    pub sandbox: SandboxId,
    /// Process id of the VMM.
    pub pid: u32,
    /// Start time of that process in clock ticks (`/proc/PID/stat` field 22): tells a reused pid.
    pub start_time: u64,
    /// The VM's directory.
    pub run_dir: PathBuf,
    /// cgroup of the VMM.
    pub cgroup: Option<String>,
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmExit {
    /// The guest powered off or rebooted as it was told.
    Shutdown,
    /// The guest kernel panicked; the last lines of the console.
    Panic {
        /// From the panic line on, bounded.
        console_tail: String,
    },
    /// The VMM process ended without the guest having asked for it.
    VmmDied {
        /// Exit status or signal, as far as known.
        status: String,
    },
}

/// What happens to a VM without being asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// The last event of every VM.
    Exited(VmExit),
}

/// The byte stream to the agent in the guest.
pub trait Channel: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Channel for T {}

/// A running VM.
#[async_trait]
pub trait Vm: Send + Sync + std::fmt::Debug {
    /// What is to be stored to find this VM again.
    fn record(&self) -> VmRecord;
    /// Hot-plugs a disk. An occupied slot is an error. Cancelled, it may leave the disk attached.
    async fn plug_disk(&self, disk: Disk) -> Result<(), VmmError>;
    /// Unplugs a disk that the guest no longer uses. Idempotent.
    async fn unplug_disk(&self, slot: u32) -> Result<(), VmmError>;
    /// Lets the guest see that a writable disk, whose file has grown, has so many bytes now. Idempotent.
    async fn resize_disk(&self, slot: u32, bytes: u64) -> Result<(), VmmError>;
    /// Slots that the VM has disks in, boot disks included.
    async fn list_disks(&self) -> Result<Vec<u32>, VmmError>;
    /// Lets the guest see a directory or file of the host, by the tag [`SHARE_TAG`]. Returns the name
    /// that it has there. What is shared already has the same name again. It stays until the VM ends.
    async fn share(&self, share: HostShare) -> Result<String, VmmError>;
    /// Gives the guest more memory than it was started with, in MiB, or takes that back. Returns how
    /// much more it has after a while: a guest may take its time to give memory back, or not do it.
    async fn set_extra_memory(&self, mib: u32) -> Result<u32, VmmError>;
    /// Has the virtual CPUs run on these CPUs of the host only; `None` = where the VMM itself may. It is
    /// so until it is changed, also for whoever adopts the VM. Idempotent.
    async fn set_cpus(&self, cpus: Option<&CpuSet>) -> Result<(), VmmError>;
    /// Opens the raw byte stream to the agent. One at a time: a new one ends the former.
    async fn open_channel(&self) -> Result<Box<dyn Channel>, VmmError>;
    /// Events from now on; [`Vm::exit`] tells what was missed.
    fn events(&self) -> broadcast::Receiver<VmEvent>;
    /// The reason, once the VM has ended.
    fn exit(&self) -> Option<VmExit>;
    /// Waits until the VM has ended.
    async fn wait(&self) -> VmExit;
    /// Whether the VM stands still because the host has no room for what its guest writes. It goes on by
    /// itself when there is.
    fn stalled(&self) -> watch::Receiver<bool>;
    /// The last bytes of the guest's serial console, at most 64 KiB.
    fn console_tail(&self) -> String;
    /// Makes a template of a VM that was launched as [`Origin::Savable`], whose guest has nobody's
    /// data yet. The VM ends by it, whether it succeeds or not.
    async fn save(&self) -> Result<Template, VmmError>;
    /// Has the VM stand still, and writes it with all of its memory into a new file, which is on the
    /// disk and whole afterwards. It ends the agent's channel. More than `limit` bytes are an error; on
    /// an error the VM goes on. Cancelled, it may stand still. A VM that has directories of the host is
    /// refused.
    async fn suspend(&self, to: File, limit: u64) -> Result<(), VmmError>;
    /// Has a VM go on that stands still, whatever it was that made it. Idempotent.
    async fn resume(&self) -> Result<(), VmmError>;
    /// Moves the VMM, which was launched into no cgroup, to one: from then on what it takes is counted
    /// there. Memory that it has taken already is not.
    async fn join_cgroup(&self, cgroup: &str) -> Result<(), VmmError>;
    /// Whether the VMM stands back where others want the host's CPUs: nobody waits for it yet.
    async fn stand_back(&self, back: bool) -> Result<(), VmmError>;
    /// Kills the VMM and waits until it is gone. Idempotent.
    async fn kill(&self) -> Result<(), VmmError>;
}

/// The name of the file system in the guest that holds what [`Vm::share`] shows.
pub const SHARE_TAG: &str = "hypernetes";

/// Starts and owns virtual machines of one kind.
#[async_trait]
pub trait Vmm: Send + Sync + std::fmt::Debug {
    /// Name of the driver, for records and messages: `qemu-kvm`, `qemu-tcg`.
    fn name(&self) -> &'static str;
    /// Starts a VM. On error nothing is left running. Returns once the VMM answers; a guest that boots
    /// may still be at it, one that was suspended stands still.
    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, VmmError>;
    /// Takes over a VM that survived a restart of this process. [`VmmError::Gone`] if it did not.
    async fn adopt(&self, record: &VmRecord) -> Result<Box<dyn Vm>, VmmError>;
    /// Kills what is left of a VM of which only the run directory is known (a launch that was cut
    /// short), by the pid file there. Idempotent.
    async fn destroy(&self, run_dir: &std::path::Path) -> Result<(), VmmError>;
}

/// Failure of a VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// The VMM program could not be started.
    #[error("cannot start {vmm} for sandbox {sandbox}")]
    Spawn {
        /// Program.
        vmm: String,
        /// Sandbox.
        sandbox: SandboxId,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The VMM ended during the launch.
    #[error("{vmm} for sandbox {sandbox} ended during launch: {output}")]
    EarlyExit {
        /// Program.
        vmm: String,
        /// Sandbox.
        sandbox: SandboxId,
        /// What it printed, bounded.
        output: String,
    },
    /// The VM is not running any more.
    #[error("the VM of sandbox {sandbox} is gone")]
    Gone {
        /// Sandbox.
        sandbox: SandboxId,
    },
    /// A control command failed.
    #[error("cannot {action} in sandbox {sandbox}: {message}")]
    Control {
        /// What was attempted.
        action: String,
        /// Sandbox.
        sandbox: SandboxId,
        /// The VMM's answer.
        message: String,
    },
    /// The VMM did not answer in time.
    #[error("the VMM of sandbox {sandbox} did not answer to {action} within {waited:?}")]
    Timeout {
        /// What was attempted.
        action: String,
        /// Sandbox.
        sandbox: SandboxId,
        /// Deadline.
        waited: std::time::Duration,
    },
    /// A file or directory of the VM cannot be used.
    #[error("cannot {action} {path}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The specification is impossible.
    #[error("invalid VM specification: {field}: {rule}")]
    Spec {
        /// Field.
        field: &'static str,
        /// What would be right.
        rule: String,
    },
}
