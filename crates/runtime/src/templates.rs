//! Templates: VMs that have booted before anybody asked for them.
//!
//! One task makes them, one after the other, when a sandbox could have used one: it boots a VM of
//! that kernel and shape without disks and on a tap that leads nowhere, waits until the agent
//! answers, has it rehearse (module [`rehearsal`]), saves it, and starts one VM from it as a trial. Nothing of any sandbox gets there, so
//! that a template may serve all tenants: it is made of the kernel, HyperStart and the machine's
//! shape, and its VM is configured as nobody's pod.
//!
//! A sandbox for which there is none, or that does not start from one, boots.

use std::{
    collections::HashMap,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use hypernetes_agent_api::AgentClient;
use hypernetes_types::SandboxId;
use hypernetes_vmm::{GuestKernel, NetDevice, Origin, Template, Vm, VmExtras, VmSpec};
use tokio::{sync::mpsc, time::Instant};

use crate::{
    config::TemplateConfig, error::RuntimeError, link, rehearsal, scratch::blocking, shared::Shared,
};

/// The NIC of every template's VM. Locally administered; no pod has it.
pub(crate) const MAC: &str = "02:00:00:00:00:00";
/// After so many boots that a template would have spared, one is made.
const MISSES: u32 = 2;
/// How long a template that could not be made is not tried again.
const RETRY: Duration = Duration::from_secs(600);
/// Shapes that are remembered at most.
const MOST_SHAPES: usize = 256;
/// Templates that wait to be made.
const QUEUE: usize = 16;

/// What a template is made of, and for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    kernel: FileId,
    initrd: FileId,
    extra_cmdline: String,
    vcpus: u32,
    memory_mib: u32,
    nic: bool,
    extras: VmExtras,
}

/// A file as it is now: another content has another identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FileId {
    path: PathBuf,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl FileId {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

/// Kernel and shape of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) kernel: GuestKernel,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) nic: bool,
    pub(crate) extras: VmExtras,
}

impl Wish {
    pub(crate) fn key(&self) -> io::Result<Key> {
        Ok(Key {
            kernel: FileId::of(&self.kernel.kernel)?,
            initrd: FileId::of(&self.kernel.initrd)?,
            extra_cmdline: self.kernel.extra_cmdline.clone(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            nic: self.nic,
            extras: self.extras,
        })
    }
}

#[derive(Debug)]
enum Slot {
    /// So many sandboxes have booted that could have used it.
    Missed(u32),
    Queued,
    Ready(Arc<Template>, Box<Wish>),
    Failed(Instant),
}

#[derive(Debug)]
struct Entry {
    slot: Slot,
    used: Instant,
}

/// The templates of a node.
#[derive(Debug)]
pub(crate) struct Templates {
    config: TemplateConfig,
    entries: Mutex<HashMap<Key, Entry>>,
    wishes: mpsc::Sender<(Key, Wish)>,
    queue: Mutex<Option<mpsc::Receiver<(Key, Wish)>>>,
}

impl Templates {
    pub(crate) fn new(config: TemplateConfig) -> Self {
        let (wishes, queue) = mpsc::channel(QUEUE);
        Self {
            config,
            entries: Mutex::default(),
            wishes,
            queue: Mutex::new(Some(queue)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a VM begins, and in a word why.
    pub(crate) fn origin(&self, wish: &Wish) -> (Origin, &'static str) {
        if self.config.most == 0 {
            return (Origin::Kernel, "templates are off");
        }
        let Ok(key) = wish.key() else {
            return (Origin::Kernel, "the kernel cannot be read");
        };
        let mut entries = self.lock();
        let now = Instant::now();
        let entry = entries.entry(key.clone()).or_insert(Entry {
            slot: Slot::Missed(0),
            used: now,
        });
        entry.used = now;
        match &mut entry.slot {
            Slot::Ready(template, _) => {
                return (Origin::Template(Arc::clone(template)), "from a template");
            }
            Slot::Queued => return (Origin::Kernel, "its template is being made"),
            Slot::Failed(at) if at.elapsed() < RETRY => {
                return (Origin::Kernel, "its template could not be made");
            }
            Slot::Failed(_) => {}
            Slot::Missed(count) => {
                *count += 1;
                if *count < MISSES {
                    forget_oldest(&mut entries, MOST_SHAPES, |_| true);
                    return (Origin::Kernel, "the first of its shape");
                }
            }
        }
        drop(entries);
        self.queue_up(key, wish.clone());
        (Origin::Kernel, "its template will be made")
    }

    /// Has a template made before anybody needs it.
    pub(crate) fn make_ahead(&self, wish: Wish) {
        match wish.key() {
            Ok(key) if self.config.most > 0 => self.queue_up(key, wish),
            _ => {}
        }
    }

    fn queue_up(&self, key: Key, wish: Wish) {
        // A full queue is no loss: the next sandbox of this shape asks again.
        if self.wishes.try_send((key.clone(), wish)).is_ok() {
            self.set(key, Slot::Queued);
        }
    }

    fn set(&self, key: Key, slot: Slot) {
        let mut entries = self.lock();
        let used = Instant::now();
        entries.insert(key, Entry { slot, used });
        forget_oldest(&mut entries, self.config.most, |slot| {
            matches!(slot, Slot::Ready(..))
        });
    }

    /// The templates that are kept, the one that was used last first.
    pub(crate) fn ready(&self) -> Vec<(Key, Wish, Arc<Template>)> {
        let entries = self.lock();
        let mut ready: Vec<_> = entries
            .iter()
            .filter_map(|(key, entry)| match &entry.slot {
                Slot::Ready(template, wish) => Some((entry.used, key, wish, template)),
                Slot::Missed(_) | Slot::Queued | Slot::Failed(_) => None,
            })
            .collect();
        ready.sort_by_key(|(used, ..)| std::cmp::Reverse(*used));
        ready
            .into_iter()
            .map(|(_, key, wish, template)| (key.clone(), Wish::clone(wish), Arc::clone(template)))
            .collect()
    }

    /// A VM that came from a template is in use: so is the template.
    pub(crate) fn touch(&self, key: &Key) {
        if let Some(entry) = self.lock().get_mut(key) {
            entry.used = Instant::now();
        }
    }

    /// A VM did not start from its template: the template is not used again.
    pub(crate) fn distrust(&self, wish: &Wish) {
        if let Ok(key) = wish.key() {
            self.set(key, Slot::Failed(Instant::now()));
        }
    }

    /// Whether no template is being made, or waits to be.
    #[cfg(test)]
    pub(crate) fn is_settled(&self) -> bool {
        let entries = self.lock();
        !entries
            .values()
            .any(|entry| matches!(entry.slot, Slot::Queued))
    }
}

/// Keeps the entries of one sort to a number, dropping those that were used longest ago.
fn forget_oldest(entries: &mut HashMap<Key, Entry>, most: usize, counts: impl Fn(&Slot) -> bool) {
    loop {
        let counted = entries.iter().filter(|(_, entry)| counts(&entry.slot));
        if counted.clone().count() <= most {
            return;
        }
        let oldest = counted
            .min_by_key(|(_, entry)| entry.used)
            .map(|(key, _)| key.clone());
        let Some(oldest) = oldest else { return };
        entries.remove(&oldest);
    }
}

/// Starts the task that makes templates. It ends with the runtime.
pub(crate) fn spawn_maker(shared: &Arc<Shared>) {
    let queue = shared
        .templates
        .queue
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let Some(mut queue) = queue else { return };
    let (shared, closing) = (Arc::downgrade(shared), shared.closing.clone());
    tokio::spawn(closing.run_until_cancelled_owned(async move {
        while let Some((key, wish)) = queue.recv().await {
            let Some(shared) = Weak::upgrade(&shared) else {
                return;
            };
            let begun = Instant::now();
            let slot = match Maker::new(&shared, &wish).make().await {
                Ok(template) => {
                    tracing::info!(
                        vcpus = wish.vcpus,
                        memory_mib = wish.memory_mib,
                        kernel = %wish.kernel.kernel.display(),
                        size_kib = template.size() >> 10,
                        took = ?begun.elapsed(),
                        "a template is ready"
                    );
                    Slot::Ready(template, Box::new(wish))
                }
                Err(error) => {
                    let error = hypernetes_telemetry::chain(&error).to_string();
                    tracing::warn!(error, "cannot make a template: VMs of this shape boot");
                    Slot::Failed(Instant::now())
                }
            };
            shared.templates.set(key, slot);
            shared.pool.look();
        }
    }));
}

struct Maker<'a> {
    shared: &'a Shared,
    wish: &'a Wish,
}

/// The directory of a VM that is nobody's; goes with it, also when the runtime ends meanwhile. The
/// VMM itself dies with this process.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // The next start clears away what is left here.
        drop(std::fs::remove_dir_all(&self.0));
        if let Some(parent) = self.0.parent() {
            // Of the last one; another may be in it.
            drop(std::fs::remove_dir(parent));
        }
    }
}

impl<'a> Maker<'a> {
    fn new(shared: &'a Shared, wish: &'a Wish) -> Self {
        Self { shared, wish }
    }

    async fn make(&self) -> Result<Arc<Template>, RuntimeError> {
        let uid = self.shared.take_uid()?;
        let made = self.make_as(uid).await;
        self.shared.free_uid(uid);
        made
    }

    async fn make_as(&self, uid: u32) -> Result<Arc<Template>, RuntimeError> {
        let (vm, _directory) = self.prepare(uid).await?;
        // The session has ended: the agent waits for the next one.
        let template = Arc::new(vm.save().await?);

        let origin = Origin::Template(Arc::clone(&template));
        let (vm, _directory, _client) = self.bring_up(uid, origin).await?;
        vm.kill().await?;
        Ok(template)
    }

    /// A VM to be saved, which has run a container before if it can.
    async fn prepare(&self, uid: u32) -> Result<(Box<dyn Vm>, Directory), RuntimeError> {
        let (vm, directory, client) = self.bring_up(uid, Origin::Savable).await?;
        match rehearsal::rehearse(self.shared, vm.as_ref(), &client).await {
            Ok(()) => return Ok((vm, directory)),
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(error, "a template is made without a rehearsal");
            }
        }
        vm.kill().await?;
        let (vm, directory, _client) = self.bring_up(uid, Origin::Savable).await?;
        Ok((vm, directory))
    }

    /// A VM whose agent has answered.
    async fn bring_up(
        &self,
        uid: u32,
        origin: Origin,
    ) -> Result<(Box<dyn Vm>, Directory, AgentClient), RuntimeError> {
        let (vm, directory) = self.launch(uid, origin).await?;
        match agent(self.shared, vm.as_ref(), "boot a template").await {
            Ok(client) => Ok((vm, directory, client)),
            Err(error) => {
                vm.kill().await?;
                Err(error)
            }
        }
    }

    async fn launch(
        &self,
        uid: u32,
        origin: Origin,
    ) -> Result<(Box<dyn Vm>, Directory), RuntimeError> {
        let sandbox = SandboxId::random();
        let run_dir = self.shared.template_dir().join(sandbox.as_str());
        let made = run_dir.clone();
        blocking(format!("make {}", run_dir.display()), move || {
            std::fs::create_dir_all(made)
        })
        .await?;
        let directory = Directory(run_dir.clone());
        let net = match self.wish.nic {
            true => Some(NetDevice {
                tap: self.shared.config.network.park().await?.tap,
                mac: MAC.to_owned(),
            }),
            false => None,
        };
        let spec = VmSpec {
            sandbox,
            kernel: self.wish.kernel.clone(),
            origin,
            vcpus: self.wish.vcpus,
            memory_mib: self.wish.memory_mib,
            extras: self.wish.extras,
            net,
            disks: Vec::new(),
            run_dir,
            uid,
            cgroup: None,
            ephemeral: true,
        };
        Ok((self.shared.config.vmm.launch(spec).await?, directory))
    }
}

/// Begins a session with an agent, which must not be a pod's.
pub(crate) async fn agent(
    shared: &Shared,
    vm: &dyn Vm,
    action: &'static str,
) -> Result<AgentClient, RuntimeError> {
    let waited = shared.config.deadlines.boot;
    let sandbox = vm.record().sandbox;
    let client = link::connect_when_up(vm, waited);
    let refused = |message: &str| RuntimeError::Guest {
        sandbox: sandbox.to_string(),
        action,
        message: message.to_owned(),
    };
    let client = tokio::select! {
        client = tokio::time::timeout(waited, client) => {
            client.map_err(|_late| crate::guest::silent(&sandbox, action, waited))?
        }
        _ = vm.wait() => return Err(refused("the VM has ended")),
    };
    if client.hello().configured {
        return Err(refused("the guest says that it is a pod already"));
    }
    Ok(client)
}
