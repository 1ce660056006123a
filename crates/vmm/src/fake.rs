//! VMs in memory, for the tests of whoever uses a [`Vmm`].
//!
//! The VMs belong to the [`FakeVmm`]: a test that drops and makes anew what stands above it finds
//! them again by [`Vmm::adopt`], as after a restart of the daemon.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use hypernetes_types::{CpuSet, SandboxId};
use tokio::{
    io::{DuplexStream, copy_bidirectional, duplex},
    sync::{broadcast, watch},
    task::AbortHandle,
};

use crate::{
    Channel, Disk, HostShare, Origin, Suspended, Template, Vm, VmEvent, VmExit, VmRecord, VmSpec,
    Vmm, VmmError,
    suspended::StateWriter,
    template::{self, Shape},
};

/// Plays the guest: called with the guest's end of each channel that is opened.
pub type Guest = dyn Fn(&SandboxId, DuplexStream) + Send + Sync;

/// A driver whose VMs are entries in a table.
#[derive(Clone)]
pub struct FakeVmm {
    guest: Arc<Guest>,
    next_pid: Arc<AtomicU32>,
    vms: Arc<Mutex<HashMap<PathBuf, Arc<State>>>>,
    refusals: Arc<Mutex<Vec<VmmError>>>,
    suspends: Arc<Mutex<Vec<VmmError>>>,
    state_bytes: Arc<AtomicUsize>,
}

impl fmt::Debug for FakeVmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeVmm")
            .field("vms", &self.lock().len())
            .finish_non_exhaustive()
    }
}

impl FakeVmm {
    /// A driver without VMs.
    pub fn new(guest: impl Fn(&SandboxId, DuplexStream) + Send + Sync + 'static) -> Self {
        Self {
            guest: Arc::new(guest),
            next_pid: Arc::new(AtomicU32::new(1_000_000)),
            vms: Arc::default(),
            refusals: Arc::default(),
            suspends: Arc::default(),
            state_bytes: Arc::default(),
        }
    }

    /// Makes the next launch fail.
    pub fn refuse_launch(&self, error: VmmError) {
        self.refusals
            .lock()
            .expect("no holder of this lock panics")
            .push(error);
    }

    /// Makes the next suspend fail.
    pub fn refuse_suspend(&self, error: VmmError) {
        self.suspends
            .lock()
            .expect("no holder of this lock panics")
            .push(error);
    }

    /// Makes VMs at least so large when they are written to a file.
    pub fn set_state_bytes(&self, bytes: usize) {
        self.state_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Whether a VM that has not ended stands still.
    pub fn stands_still(&self, sandbox: &SandboxId) -> Option<bool> {
        let state = self.running(sandbox)?;
        Some(state.still.load(Ordering::Relaxed))
    }

    /// Ends a running VM. False if there is none of this sandbox.
    pub fn end(&self, sandbox: &SandboxId, exit: VmExit) -> bool {
        let state = self.running(sandbox);
        state.as_ref().is_some_and(|state| state.end(exit))
    }

    /// Has a running VM stand still as for want of room, or go on.
    pub fn set_stalled(&self, sandbox: &SandboxId, stalled: bool) {
        if let Some(state) = self.running(sandbox) {
            state.stalled.send_replace(stalled);
        }
    }

    /// Slots of the disks of a running VM.
    pub fn disks(&self, sandbox: &SandboxId) -> Option<Vec<u32>> {
        self.running(sandbox).map(|state| state.slots())
    }

    /// Whether a running VM was started from a template.
    pub fn is_restored(&self, sandbox: &SandboxId) -> Option<bool> {
        self.running(sandbox).map(|state| state.restored)
    }

    /// Whether a running VM stands back behind others, and its cgroup.
    pub fn standing(&self, sandbox: &SandboxId) -> Option<(bool, Option<String>)> {
        let state = self.running(sandbox)?;
        let back = state.back.load(Ordering::Relaxed);
        Some((back, state.cgroup.get().cloned()))
    }

    /// MiB that a running VM has beyond its first memory.
    pub fn extra_memory(&self, sandbox: &SandboxId) -> Option<u32> {
        let state = self.running(sandbox)?;
        Some(state.extra_memory.load(Ordering::Relaxed))
    }

    /// The CPUs of the host that a running VM is kept to, if it is.
    pub fn cpus(&self, sandbox: &SandboxId) -> Option<CpuSet> {
        let state = self.running(sandbox)?;
        let cpus = state.cpus.lock().expect("no holder of this lock panics");
        cpus.clone()
    }

    /// How many different paths of the host a running VM can see.
    pub fn shares(&self, sandbox: &SandboxId) -> Option<usize> {
        let state = self.running(sandbox)?;
        let shares = state.shares.lock().expect("no holder of this lock panics");
        Some(shares.len())
    }

    /// Sandboxes that have a running VM.
    pub fn sandboxes(&self) -> Vec<SandboxId> {
        let vms = self.lock();
        vms.values()
            .filter(|vm| vm.ended().is_none())
            .map(|vm| vm.record.sandbox.clone())
            .collect()
    }

    fn running(&self, sandbox: &SandboxId) -> Option<Arc<State>> {
        let vms = self.lock();
        let of = |vm: &&Arc<State>| vm.record.sandbox == *sandbox && vm.ended().is_none();
        vms.values().find(of).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<State>>> {
        self.vms.lock().expect("no holder of this lock panics")
    }

    fn handle(&self, state: Arc<State>) -> Box<dyn Vm> {
        Box::new(FakeVm {
            guest: Arc::clone(&self.guest),
            suspends: Arc::clone(&self.suspends),
            state_bytes: Arc::clone(&self.state_bytes),
            state,
        })
    }
}

#[derive(Debug)]
struct State {
    record: VmRecord,
    disks: Mutex<BTreeSet<u32>>,
    savable: Mutex<Option<Shape>>,
    /// Started from a template.
    restored: bool,
    /// It stands still.
    still: AtomicBool,
    cgroup: OnceLock<String>,
    /// It stands back behind others.
    back: AtomicBool,
    /// Device, inode, read-only, with later mounts.
    shares: Mutex<Vec<(u64, u64, bool, bool)>>,
    /// MiB.
    extra_memory: AtomicU32,
    cpus: Mutex<Option<CpuSet>>,
    channel: Mutex<Option<AbortHandle>>,
    exit: watch::Sender<Option<VmExit>>,
    stalled: watch::Sender<bool>,
    events: broadcast::Sender<VmEvent>,
}

impl State {
    fn record(&self) -> VmRecord {
        VmRecord {
            cgroup: self.cgroup.get().cloned(),
            ..self.record.clone()
        }
    }

    fn ended(&self) -> Option<VmExit> {
        self.exit.borrow().clone()
    }

    fn end(&self, exit: VmExit) -> bool {
        let first = self.exit.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert_with(|| exit.clone());
            first
        });
        if first {
            self.end_channel();
            // Nobody listening is no error.
            drop(self.events.send(VmEvent::Exited(exit)));
        }
        first
    }

    fn end_channel(&self) {
        let former = self
            .channel
            .lock()
            .expect("no holder of this lock panics")
            .take();
        if let Some(former) = former {
            former.abort();
        }
    }

    fn slots(&self) -> Vec<u32> {
        self.disks
            .lock()
            .expect("no holder of this lock panics")
            .iter()
            .copied()
            .collect()
    }
}

struct FakeVm {
    guest: Arc<Guest>,
    suspends: Arc<Mutex<Vec<VmmError>>>,
    state_bytes: Arc<AtomicUsize>,
    state: Arc<State>,
}

impl fmt::Debug for FakeVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeVm")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl FakeVm {
    fn running(&self) -> Result<(), VmmError> {
        match self.state.ended() {
            None => Ok(()),
            Some(_) => Err(VmmError::Gone {
                sandbox: self.state.record.sandbox.clone(),
            }),
        }
    }
}

fn check_slot(slot: u32) -> Result<(), VmmError> {
    if (1..=254).contains(&slot) {
        return Ok(());
    }
    Err(VmmError::Spec {
        field: "disk.slot",
        rule: format!("must be 1 to 254, not {slot}"),
    })
}

/// A VM goes on with the disks that it had.
fn check_suspended(suspended: &Suspended, slots: &BTreeSet<u32>) -> std::io::Result<()> {
    let (mut reader, mut text) = (suspended.read()?, Vec::new());
    let mut piece = vec![0; 64 << 10];
    loop {
        match reader.read(&mut piece)? {
            0 => break,
            count => text.extend_from_slice(&piece[..count]),
        }
    }
    reader.check()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let had: BTreeSet<u32> = text
        .split(' ')
        .filter_map(|slot| slot.parse().ok())
        .collect();
    if had == *slots {
        return Ok(());
    }
    let message = format!("the VM had disks in {had:?}, not {slots:?}");
    Err(std::io::Error::new(
        std::io::ErrorKind::InvalidData,
        message,
    ))
}

#[async_trait]
impl Vm for FakeVm {
    fn record(&self) -> VmRecord {
        self.state.record()
    }

    async fn join_cgroup(&self, cgroup: &str) -> Result<(), VmmError> {
        self.running()?;
        match self.state.cgroup.set(cgroup.to_owned()) {
            Ok(()) => Ok(()),
            Err(_) => Err(VmmError::Control {
                action: format!("enter {cgroup}"),
                sandbox: self.state.record.sandbox.clone(),
                message: "the VMM has a cgroup already".to_owned(),
            }),
        }
    }

    async fn stand_back(&self, back: bool) -> Result<(), VmmError> {
        self.running()?;
        self.state.back.store(back, Ordering::Relaxed);
        Ok(())
    }

    async fn plug_disk(&self, disk: Disk) -> Result<(), VmmError> {
        check_slot(disk.slot)?;
        self.running()?;
        let mut disks = self
            .state
            .disks
            .lock()
            .expect("no holder of this lock panics");
        if disks.insert(disk.slot) {
            return Ok(());
        }
        Err(VmmError::Control {
            action: format!("plug disk {}", disk.slot),
            sandbox: self.state.record.sandbox.clone(),
            message: "the slot is occupied".to_owned(),
        })
    }

    async fn share(&self, share: HostShare) -> Result<String, VmmError> {
        self.running()?;
        let stat = rustix::fs::fstat(&share.source).map_err(|e| VmmError::Io {
            action: "share",
            path: self.state.record.run_dir.clone(),
            source: e.into(),
        })?;
        let mut shares = self
            .state
            .shares
            .lock()
            .expect("no holder of this lock panics");
        let key = (
            stat.st_dev,
            stat.st_ino,
            share.read_only,
            share.follow_mounts,
        );
        let place = shares.iter().position(|known| *known == key);
        let place = place.unwrap_or_else(|| {
            shares.push(key);
            shares.len() - 1
        });
        Ok(format!("d{place:02}"))
    }

    async fn set_extra_memory(&self, mib: u32) -> Result<u32, VmmError> {
        self.running()?;
        self.state.extra_memory.store(mib, Ordering::Relaxed);
        Ok(mib)
    }

    async fn set_cpus(&self, cpus: Option<&CpuSet>) -> Result<(), VmmError> {
        self.running()?;
        *self
            .state
            .cpus
            .lock()
            .expect("no holder of this lock panics") = cpus.cloned();
        Ok(())
    }

    async fn unplug_disk(&self, slot: u32) -> Result<(), VmmError> {
        self.running()?;
        self.state
            .disks
            .lock()
            .expect("no holder of this lock panics")
            .remove(&slot);
        Ok(())
    }

    async fn resize_disk(&self, slot: u32, _bytes: u64) -> Result<(), VmmError> {
        self.running()?;
        match self.state.slots().contains(&slot) {
            true => Ok(()),
            false => Err(VmmError::Control {
                action: format!("resize disk {slot}"),
                sandbox: self.state.record.sandbox.clone(),
                message: "there is none".to_owned(),
            }),
        }
    }

    async fn list_disks(&self) -> Result<Vec<u32>, VmmError> {
        self.running()?;
        Ok(self.state.slots())
    }

    async fn open_channel(&self) -> Result<Box<dyn Channel>, VmmError> {
        self.running()?;
        self.state.end_channel();
        if self.state.still.load(Ordering::Relaxed) {
            // The VMM takes the connection; nobody answers.
            let (ours, theirs) = duplex(64 * 1024);
            let holder = tokio::spawn(async move {
                let _theirs = theirs;
                std::future::pending::<()>().await;
            });
            *self
                .state
                .channel
                .lock()
                .expect("no holder of this lock panics") = Some(holder.abort_handle());
            return Ok(Box::new(ours));
        }
        // Two pipes with a copier between them: aborting it ends both sides at once.
        let (ours, mut left) = duplex(64 * 1024);
        let (mut right, theirs) = duplex(64 * 1024);
        let copier = tokio::spawn(async move {
            drop(copy_bidirectional(&mut left, &mut right).await);
        });
        *self
            .state
            .channel
            .lock()
            .expect("no holder of this lock panics") = Some(copier.abort_handle());
        (self.guest)(&self.state.record.sandbox, theirs);
        Ok(Box::new(ours))
    }

    fn events(&self) -> broadcast::Receiver<VmEvent> {
        self.state.events.subscribe()
    }

    fn exit(&self) -> Option<VmExit> {
        self.state.ended()
    }

    async fn wait(&self) -> VmExit {
        let mut exit = self.state.exit.subscribe();
        let ended = exit
            .wait_for(Option::is_some)
            .await
            .expect("the sender is in our state");
        ended.clone().expect("waited for")
    }

    fn stalled(&self) -> watch::Receiver<bool> {
        self.state.stalled.subscribe()
    }

    fn console_tail(&self) -> String {
        match self.state.ended() {
            Some(VmExit::Panic { console_tail }) => console_tail,
            _ => String::new(),
        }
    }

    async fn save(&self) -> Result<Template, VmmError> {
        self.running()?;
        let shape = self
            .state
            .savable
            .lock()
            .expect("no holder of this lock panics")
            .take();
        self.kill().await?;
        let Some(shape) = shape else {
            return Err(VmmError::Spec {
                field: "origin",
                rule: "must be savable for a template, which can be made once".to_owned(),
            });
        };
        let made = async { Template::new(shape, template::memory(1)?, Vec::new()).await };
        made.await.map_err(|source| VmmError::Io {
            action: "make a template in",
            path: self.state.record.run_dir.clone(),
            source,
        })
    }

    async fn suspend(&self, to: File, limit: u64) -> Result<(), VmmError> {
        self.running()?;
        let failed = |source| VmmError::Io {
            action: "move the state of the VM of",
            path: self.state.record.run_dir.clone(),
            source,
        };
        if !self
            .state
            .shares
            .lock()
            .expect("no holder of this lock panics")
            .is_empty()
        {
            return Err(VmmError::Spec {
                field: "shares",
                rule: "must not be in use".to_owned(),
            });
        }
        self.state.end_channel();
        let refusal = self
            .suspends
            .lock()
            .expect("no holder of this lock panics")
            .pop();
        if let Some(error) = refusal {
            return Err(error);
        }
        let mut writer = StateWriter::new(to, limit);
        // What a real VMM would refuse to go on with: other disks than it had.
        let slots = self.state.slots();
        let slots = slots.into_iter().map(|slot| slot.to_string());
        let mut state = format!("disks {}", slots.collect::<Vec<_>>().join(" ")).into_bytes();
        let least = self.state_bytes.load(Ordering::Relaxed);
        state.resize(state.len().max(least), b' ');
        let mut pieces = state.chunks(64 << 10);
        let written = pieces.try_for_each(|piece| writer.write(piece));
        written.map_err(failed)?;
        writer.finish("fake").map_err(failed)?;
        self.state.still.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.running()?;
        self.state.still.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.state.end(VmExit::VmmDied {
            status: "killed by signal 9".to_owned(),
        });
        Ok(())
    }
}

#[async_trait]
impl Vmm for FakeVmm {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, VmmError> {
        if let Some(error) = self
            .refusals
            .lock()
            .expect("no holder of this lock panics")
            .pop()
        {
            return Err(error);
        }
        if let Origin::Template(template) = &spec.origin {
            template.check(&spec)?;
        }
        let mut slots = BTreeSet::new();
        for disk in &spec.disks {
            check_slot(disk.slot)?;
            if !slots.insert(disk.slot) {
                let rule = "must have a slot each".to_owned();
                return Err(VmmError::Spec {
                    field: "disks",
                    rule,
                });
            }
        }
        if let Origin::Suspended(suspended) = &spec.origin {
            check_suspended(suspended, &slots).map_err(|source| VmmError::Io {
                action: "move the state of the VM of",
                path: spec.run_dir.clone(),
                source,
            })?;
        }
        let still = AtomicBool::new(matches!(spec.origin, Origin::Suspended(_)));
        let savable = matches!(spec.origin, Origin::Savable).then(|| Shape::of(&spec));
        let restored = matches!(spec.origin, Origin::Template(_));
        let pid = self.next_pid.fetch_add(1, Ordering::Relaxed);
        let record = VmRecord {
            driver: self.name().to_owned(),
            sandbox: spec.sandbox,
            pid,
            start_time: pid.into(),
            run_dir: spec.run_dir.clone(),
            cgroup: None,
        };
        let cgroup = OnceLock::new();
        if let Some(path) = spec.cgroup {
            drop(cgroup.set(path));
        }
        let state = Arc::new(State {
            record,
            disks: Mutex::new(slots),
            savable: Mutex::new(savable),
            restored,
            still,
            cgroup,
            back: AtomicBool::new(false),
            shares: Mutex::default(),
            extra_memory: AtomicU32::new(0),
            cpus: Mutex::default(),
            channel: Mutex::default(),
            exit: watch::Sender::new(None),
            stalled: watch::Sender::new(false),
            events: broadcast::Sender::new(16),
        });
        self.lock().insert(spec.run_dir, Arc::clone(&state));
        Ok(self.handle(state))
    }

    async fn adopt(&self, record: &VmRecord) -> Result<Box<dyn Vm>, VmmError> {
        let found = self.lock().get(&record.run_dir).cloned();
        found
            .filter(|vm| vm.record() == *record && vm.ended().is_none())
            .map(|state| self.handle(state))
            .ok_or_else(|| VmmError::Gone {
                sandbox: record.sandbox.clone(),
            })
    }

    async fn destroy(&self, run_dir: &Path) -> Result<(), VmmError> {
        let found = self.lock().remove(run_dir);
        if let Some(state) = found {
            state.end(VmExit::VmmDied {
                status: "killed by signal 9".to_owned(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::{GuestKernel, Machine, conformance};

    fn echo(_: &SandboxId, stream: DuplexStream) {
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(stream);
            drop(tokio::io::copy(&mut from, &mut to).await);
        });
    }

    fn spec() -> VmSpec {
        let sandbox = SandboxId::random();
        VmSpec {
            run_dir: PathBuf::from("/fake").join(sandbox.as_str()),
            sandbox,
            kernel: GuestKernel {
                kernel: PathBuf::new(),
                initrd: PathBuf::new(),
                machine: Machine::Microvm,
                extra_cmdline: String::new(),
            },
            origin: Origin::Kernel,
            vcpus: 1,
            memory_mib: 64,
            extras: crate::VmExtras::default(),
            net: None,
            disks: Vec::new(),
            uid: 1,
            cgroup: None,
            ephemeral: false,
        }
    }

    #[tokio::test]
    async fn the_fake_conforms() {
        let file = || tempfile::tempfile().unwrap();
        conformance::all(&FakeVmm::new(echo), &spec, &file).await;
    }

    #[tokio::test]
    async fn channels_reach_the_guest_and_exits_are_scripted() {
        let vmm = FakeVmm::new(echo);
        let vm = vmm.launch(spec()).await.unwrap();
        let mut channel = vm.open_channel().await.unwrap();
        channel.write_all(b"hello").await.unwrap();
        let mut word = [0; 5];
        channel.read_exact(&mut word).await.unwrap();
        assert_eq!(&word, b"hello");
        let panic = VmExit::Panic {
            console_tail: "oh".to_owned(),
        };
        assert!(vmm.end(&vm.record().sandbox, panic.clone()));
        assert_eq!(vm.wait().await, panic);
        assert_eq!(channel.read(&mut word).await.unwrap(), 0);
        assert!(vmm.sandboxes().is_empty());
    }

    #[tokio::test]
    async fn a_refused_launch_leaves_nothing() {
        let vmm = FakeVmm::new(echo);
        vmm.refuse_launch(VmmError::Spec {
            field: "x",
            rule: "y".to_owned(),
        });
        assert!(vmm.launch(spec()).await.is_err());
        assert!(vmm.sandboxes().is_empty());
        assert!(vmm.launch(spec()).await.is_ok());
    }
}
