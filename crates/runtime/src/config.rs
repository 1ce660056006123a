//! What a node runtime is made of.

use std::{path::PathBuf, sync::Arc, time::Duration};

use hypernetes_network::NetworkDriver;
use hypernetes_store::Store;
use hypernetes_types::SandboxId;
use hypernetes_vmm::Vmm;
use hypernetes_volume::VolumeDriver;

use crate::ports::{Images, Kernels};

/// Parts and limits of a [`crate::NodeRuntime`].
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// Durable files: scratch disks, log checkpoints. Belongs to the runtime alone.
    pub state_dir: PathBuf,
    /// One directory per VM: sockets and console logs. Belongs to the runtime alone.
    pub run_dir: PathBuf,
    /// Records of sandboxes and containers, under `/node/`.
    pub store: Store,
    /// Images.
    pub images: Arc<dyn Images>,
    /// Networks.
    pub network: Arc<dyn NetworkDriver>,
    /// Driver of VMs.
    pub vmm: Arc<dyn Vmm>,
    /// Volumes that outlive pods, if this node has such.
    pub volumes: Option<Arc<dyn VolumeDriver>>,
    /// Guest kernels.
    pub kernels: Arc<dyn Kernels>,
    /// The static HyperStart program, `/init` of every guest.
    pub hyperstart: PathBuf,
    /// Users that VMMs run as.
    pub uid_range: UidRange,
    /// What is done when nobody asks for anything else.
    pub defaults: Defaults,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// VMs that have booted before anybody asked.
    pub templates: TemplateConfig,
    /// Sandboxes on these networks that somebody else looks after: their places are kept.
    pub others: Vec<SandboxId>,
}

/// Templates: see [`NodeRuntime::make_template`](crate::NodeRuntime::make_template).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TemplateConfig {
    /// How many are kept at most, one for each kernel and shape of VM that is in use; each takes
    /// the memory of an idle guest, some 50 MiB. 0: every VM boots.
    pub most: usize,
    /// How many VMs wait for a sandbox, for each template that is kept: each takes the memory of a
    /// pod's VM that is idle. 0: none.
    pub pool: usize,
}

impl Default for TemplateConfig {
    fn default() -> Self {
        Self { most: 4, pool: 0 }
    }
}

/// User ids that belong to the runtime: one per VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UidRange {
    /// The first.
    pub first: u32,
    /// How many, and so how many sandboxes at most.
    pub count: u32,
}

impl Default for UidRange {
    fn default() -> Self {
        // Above what distributions, subordinate ids and systemd's dynamic users take.
        Self {
            first: 0x7000_0000,
            count: 65_536,
        }
    }
}

/// Values for what a request leaves open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Guest memory in MiB for `memory_mib: 0`.
    pub memory_mib: u32,
    /// Virtual CPUs for `vcpus: 0`.
    pub vcpus: u32,
    /// Program that formats scratch disk templates.
    pub mkfs: PathBuf,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            memory_mib: 128,
            vcpus: 1,
            mkfs: PathBuf::from("mkfs.ext4"),
        }
    }
}

/// Longest times. Generous: an emulated guest on a loaded host is slow, not dead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadlines {
    /// From the VMM's start to the agent's first answer.
    pub boot: Duration,
    /// One call to an agent.
    pub call: Duration,
    /// From SIGKILL to the guest's word that the container ended.
    pub kill: Duration,
    /// Waiting for the last output of a container that has ended.
    pub drain: Duration,
    /// From the order to power off to the kill of the VMM.
    pub shutdown: Duration,
    /// The same for a VM that has volumes which outlive it: it writes back what it has in memory.
    pub flush: Duration,
    /// From one look at whether a guest still answers to the next; its clock is put right then too.
    pub beat: Duration,
    /// Without a session for so long, running containers are shown as `Unknown`.
    pub silent: Duration,
    /// How long the start of the runtime waits for adopted guests to answer.
    pub readopt: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(60),
            call: Duration::from_secs(60),
            kill: Duration::from_secs(30),
            drain: Duration::from_secs(2),
            shutdown: Duration::from_secs(5),
            flush: Duration::from_secs(60),
            beat: Duration::from_secs(30),
            silent: Duration::from_secs(30),
            readopt: Duration::from_secs(5),
        }
    }
}
