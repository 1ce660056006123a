//! QEMU: with KVM where that truly works, else emulation.
//!
//! ```text
//! daemon ── fork ──▶ launcher ── exec ──▶ QEMU
//!   │ binds agent, qmp and console sockets, opens kernel, tap and disks, hands all over by number
//!   ├── qmp.sock      commands and events
//!   ├── console.sock  serial console
//!   ├── agent.sock    byte stream to the agent in the guest
//!   └── pidfd         end of the process
//! ```
//! All of it survives the daemon: the three sockets listen again once their client is gone.

mod argv;
mod claim;
mod console;
mod cpus;
mod disk;
mod memory;
mod migration;
pub mod probe;
mod qmp;
mod restore;
mod share;
mod spawn;
mod stall;
mod suspend;
mod vm;

use std::{
    fs::File,
    io,
    os::{
        fd::{OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::timeout;

pub use self::{argv::Accelerator, probe::Probe, spawn::Launcher};
use self::{
    argv::{Boot, BootDisk, CommandLine, MachineArgs, Memory, Net, Sockets},
    console::Console,
    probe::ProbeError,
    qmp::{Qmp, QmpError, QmpEvent},
    share::Shares,
    spawn::Handover,
    vm::{Parts, QemuVm, ShutdownReason, clear_up, read_messages},
};
use crate::{
    Disk, Machine, Origin, Suspended, Template, Vm, VmRecord, VmSpec, Vmm, VmmError,
    launcher::LaunchSpec,
    process::{LaunchRecord, Process},
    run_dir::{AGENT, CONSOLE, QMP, RunDir},
    template::{self, Shape},
};

/// Settings of the driver.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// Where the answer of the probe is kept.
    pub state_dir: PathBuf,
    /// How the launcher is started.
    pub launcher: Launcher,
    /// A certain QEMU instead of the ones that are looked for.
    pub qemu: Option<PathBuf>,
    /// A certain accelerator instead of the best that works.
    pub accelerator: Option<Accelerator>,
    /// The program that serves host directories to guests: QEMU's own virtiofsd, or another that
    /// takes its options.
    pub virtiofsd: PathBuf,
    /// User of the VMM that boots the probe guest.
    pub probe_uid: u32,
    /// How long one control command may take.
    pub command_deadline: Duration,
    /// How long QEMU may take to answer after its start.
    pub launch_deadline: Duration,
}

impl QemuConfig {
    /// The usual settings.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            state_dir,
            launcher: Launcher::current_program(),
            qemu: None,
            accelerator: None,
            virtiofsd: "/usr/lib/qemu/virtiofsd".into(),
            probe_uid: 65534,
            command_deadline: Duration::from_secs(15),
            launch_deadline: Duration::from_secs(60),
        }
    }
}

/// Starts VMs as QEMU processes.
#[derive(Debug)]
pub struct QemuDriver {
    config: QemuConfig,
    probe: Probe,
}

impl QemuDriver {
    /// Finds out what this host can run VMs with.
    pub async fn detect(config: QemuConfig) -> Result<Self, ProbeError> {
        let probe = probe::probe(&config).await?;
        Ok(Self { config, probe })
    }

    /// What was found out.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// What states of VMs are good for: they are the VMM's own, and no other version reads them.
    fn maker(&self) -> String {
        format!("{} {}", self.name(), self.probe.version)
    }

    fn program(&self, machine: Machine) -> Result<&Path, VmmError> {
        match machine {
            Machine::Microvm => Ok(&self.probe.microvm),
            Machine::Q35 => self.probe.q35.as_deref().ok_or_else(|| VmmError::Spec {
                field: "kernel.machine",
                rule: "q35 needs qemu-system-x86_64, which is not installed".to_owned(),
            }),
        }
    }

    /// Starts the process. Everything up to here is undone by the caller.
    fn start(
        &self,
        spec: VmSpec,
        run: &RunDir,
        copy: Option<OwnedFd>,
    ) -> Result<Started, VmmError> {
        let machine = spec.machine();
        let program = self.program(machine)?.to_owned();
        let in_run_dir = |action| {
            move |source| VmmError::Io {
                action,
                path: run.path().to_owned(),
                source,
            }
        };
        run.create().map_err(in_run_dir("create"))?;

        let memory_failed = |source| VmmError::Io {
            action: "share the guest memory of",
            path: run.path().to_owned(),
            source,
        };
        let shape = Shape::of(&spec);
        let mut handover = Handover::default();
        let boot = match &spec.origin {
            Origin::Template(_) | Origin::Suspended(_) => None,
            Origin::Kernel | Origin::Savable => Some(Boot {
                kernel: handover.add(open_for_all(&spec.kernel.kernel)?.into()),
                initrd: handover.add(open_for_all(&spec.kernel.initrd)?.into()),
                tsc_khz: self.probe.tsc_khz,
                cpus: (spec.extras.max_vcpus > spec.vcpus).then_some(spec.vcpus),
                extra: spec.kernel.extra_cmdline,
            }),
        };
        let (mut savable, mut template, mut suspended) = (None, None, None);
        let memory_mib = spec.memory_mib;
        let (growth_mib, mut growth) = (spec.extras.growth_mib(memory_mib), None);
        let memory = match spec.origin {
            Origin::Kernel => Memory::Own,
            Origin::Savable => {
                let file = template::memory(spec.memory_mib).map_err(memory_failed)?;
                let copy = file.try_clone().map_err(memory_failed)?;
                savable = Some((shape, file));
                Memory::Savable(handover.add(copy))
            }
            Origin::Suspended(found) => {
                let file = template::memory(memory_mib).map_err(memory_failed)?;
                let copy = file.try_clone().map_err(memory_failed)?;
                let mut memory = vec![file];
                if growth_mib > 0 {
                    let file = template::memory(growth_mib).map_err(memory_failed)?;
                    let copy = file.try_clone().map_err(memory_failed)?;
                    memory.push(file);
                    growth = Some(handover.add(copy));
                }
                suspended = Some(Restore::Suspended {
                    suspended: found,
                    memory,
                    bytes: u64::from(memory_mib + growth_mib) << 20,
                });
                Memory::Copy(handover.add(copy))
            }
            Origin::Template(found) => match copy {
                Some(file) => {
                    template = Some((found, None));
                    Memory::Copy(handover.add(file))
                }
                None => {
                    let file = found.share_memory().map_err(memory_failed)?;
                    let memory = handover.add(file);
                    template = Some((found, Some(memory)));
                    Memory::Template(memory)
                }
            },
        };
        let mut listen = |name| {
            run.listen(name)
                .map(|fd| handover.add(fd))
                .map_err(in_run_dir("bind sockets in"))
        };
        let sockets = Sockets {
            agent: listen(AGENT)?,
            qmp: listen(QMP)?,
            console: listen(CONSOLE)?,
        };
        let net = spec.net.map(|net| Net {
            tap: handover.add(net.tap),
            mac: net.mac,
        });
        // A VM from a template has the template's devices and no others when its state arrives.
        let (boot_disks, later) = match &template {
            Some(_) => (Vec::new(), spec.disks),
            None => (spec.disks, Vec::new()),
        };
        let mut disks = Vec::new();
        for disk in boot_disks {
            let (slot, read_only, kind, fd) = disk::prepare(disk)?;
            disks.push(BootDisk {
                slot,
                read_only,
                kind,
                fd: handover.add(fd),
            });
        }
        let mut read_only = spawn::readable(&program);
        // No Landlock rule for guest memory: a memfd is on no mount that a rule could name, and allowed.
        read_only.extend(boot.iter().flat_map(|boot| {
            [boot.kernel, boot.initrd].map(|fd| format!("/proc/self/fd/{fd}").into())
        }));
        let command_line = CommandLine {
            name: spec.sandbox.to_string(),
            machine: MachineArgs {
                machine,
                accelerator: self.probe.accelerator,
                vcpus: spec.vcpus,
                memory_mib: spec.memory_mib,
                memory,
                max_vcpus: spec.extras.max_vcpus,
                growth_mib,
                growth,
                shares: spec.extras.shares,
            },
            boot,
            sockets,
            net,
            disks,
        };
        let (mut groups, mut read_write) = (Vec::new(), vec!["/dev/null".into()]);
        if self.probe.accelerator == Accelerator::Kvm {
            groups.extend(self.probe.kvm_group);
            read_write.push("/dev/kvm".into());
        }
        let launch = LaunchSpec {
            program,
            args: command_line.render(),
            uid: spec.uid,
            groups,
            parent: std::process::id(),
            record: Some(run.record()),
            cgroup: spec.cgroup,
            keep: handover.numbers(),
            read_only,
            read_write,
            keep_holes_out_of: template
                .as_ref()
                .filter(|(_, memory)| memory.is_some())
                .and_then(|(template, _)| template.memory_fd.get().copied()),
            jail: None,
            ephemeral: spec.ephemeral,
        };
        let vmm_end = run.make_messages().map_err(in_run_dir("make a pipe in"))?;
        let messages = run
            .open_messages()
            .map_err(in_run_dir("open the pipe in"))?;
        let spawn_failed = |source| VmmError::Spawn {
            vmm: launch.program.display().to_string(),
            sandbox: spec.sandbox.clone(),
            source,
        };
        let copy = vmm_end.try_clone().map_err(spawn_failed)?;
        // Not handed to another thread: the launcher dies with the thread that started it until it
        // has left its record.
        let child = spawn::spawn(
            &self.config.launcher,
            &launch,
            handover,
            copy.into(),
            vmm_end.into(),
        )
        .map_err(spawn_failed)?;
        let process = Process::open(child.id(), None)
            .and_then(|found| found.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(spawn_failed)?;
        Ok(Started {
            process,
            messages,
            savable,
            restore: suspended.or(template.map(|(template, memory)| Restore::Template {
                template,
                memory,
                disks: later,
            })),
        })
    }

    /// Connects to a QEMU that runs or is about to.
    async fn attach(
        &self,
        record: VmRecord,
        process: Process,
        messages: File,
        savable: Option<(Shape, OwnedFd)>,
        deadline: Duration,
    ) -> Result<QemuVm, QmpError> {
        let run = RunDir::new(&record.run_dir);
        let shutdown = ShutdownReason::default();
        let work = async {
            let closed = |_| QmpError::Closed;
            let console = run.connect(CONSOLE).await.map_err(closed)?;
            let console = Console::start(console, run.console_log());
            let control = run.connect(QMP).await.map_err(closed)?;
            let on_event = remember_shutdown(Arc::clone(&shutdown));
            let qmp = Qmp::start(control, self.config.command_deadline, on_event).await?;
            Ok((console, qmp))
        };
        let (console, qmp) = timeout(deadline, work)
            .await
            .unwrap_or(Err(QmpError::Timeout(deadline)))?;
        let deadline = self.config.command_deadline;
        Ok(QemuVm::new(Parts {
            record,
            maker: self.maker(),
            process,
            qmp,
            console,
            messages,
            savable,
            shutdown,
            deadline,
            shares: Shares::new(self.config.launcher.clone(), self.config.virtiofsd.clone()),
        }))
    }
}

/// A process that will be a VM.
struct Started {
    process: Process,
    messages: File,
    /// Memory that a template can be made of.
    savable: Option<(Shape, OwnedFd)>,
    restore: Option<Restore>,
}

/// What a VM that does not boot is still to be given.
enum Restore {
    Template {
        template: Arc<Template>,
        /// Number under which the VMM was handed the template's memory, if it maps that itself.
        memory: Option<RawFd>,
        disks: Vec<Disk>,
    },
    Suspended {
        suspended: Arc<Suspended>,
        /// The memory that the VMM fills.
        memory: Vec<OwnedFd>,
        /// Its size.
        bytes: u64,
    },
}

fn remember_shutdown(reason: ShutdownReason) -> impl Fn(&QmpEvent) + Send + 'static {
    move |event| {
        if event.name == "SHUTDOWN" {
            let guest = event.data["guest"].as_bool().unwrap_or(false);
            let text = event.data["reason"].as_str().unwrap_or_default().to_owned();
            *reason.lock().expect("no holder of this lock panics") = Some((guest, text));
        }
    }
}

/// Opens a file that the VMM's user opens again by number, which takes a mode that lets it.
fn open_for_all(path: &Path) -> Result<File, VmmError> {
    let failed = |source| VmmError::Io {
        action: "open",
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() || meta.mode() & 0o004 == 0 {
        return Err(VmmError::Spec {
            field: "kernel",
            rule: format!("{} must be a file that everybody may read", path.display()),
        });
    }
    Ok(file)
}

/// Refuses what QEMU would refuse with fewer words, and text that would be more than one option.
fn check_spec(spec: &VmSpec) -> Result<(), VmmError> {
    let refuse = |field, rule: &str| {
        Err(VmmError::Spec {
            field,
            rule: rule.to_owned(),
        })
    };
    if spec.uid == 0 || spec.uid == u32::MAX {
        return refuse("uid", "must be a user of its own, not root");
    }
    if !(1..=64).contains(&spec.vcpus) {
        return refuse("vcpus", "must be 1 to 64");
    }
    if !(64..=1 << 20).contains(&spec.memory_mib) {
        return refuse("memory_mib", "must be 64 to 1048576");
    }
    if spec.extras.max_vcpus > 64 {
        return refuse("extras.max_vcpus", "must be at most 64");
    }
    if spec.extras.max_memory_mib > 1 << 20 {
        return refuse("extras.max_memory_mib", "must be at most 1048576");
    }
    let line = &spec.kernel.extra_cmdline;
    if line.len() > 1024 || line.chars().any(char::is_control) {
        return refuse(
            "kernel.extra_cmdline",
            "must be one line of at most 1024 bytes",
        );
    }
    if let Some(net) = &spec.net {
        let parts: Vec<&str> = net.mac.split(':').collect();
        let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        if parts.len() != 6 || !parts.iter().all(hex) {
            return refuse("net.mac", "must be six hexadecimal bytes with colons");
        }
    }
    if let Origin::Template(template) = &spec.origin {
        template.check(spec)?;
    }
    let mut slots: Vec<u32> = spec.disks.iter().map(|disk| disk.slot).collect();
    slots.sort_unstable();
    slots.dedup();
    if slots.len() != spec.disks.len() {
        return refuse("disks", "must have a slot each");
    }
    Ok(())
}

/// The memory of a VM whose memory others map too: they would not see what it changes of a private
/// mapping of its template.
async fn copy_memory(spec: &VmSpec) -> Result<Option<OwnedFd>, VmmError> {
    let Origin::Template(template) = &spec.origin else {
        return Ok(None);
    };
    if !spec.extras.shares {
        return Ok(None);
    }
    let failed = |source| VmmError::Io {
        action: "copy the template's memory for",
        path: spec.run_dir.clone(),
        source,
    };
    let template = Arc::clone(template);
    let copied = tokio::task::spawn_blocking(move || template.copy_memory());
    match copied.await {
        Ok(copy) => copy.map(Some).map_err(failed),
        Err(e) => Err(failed(io::Error::other(e))),
    }
}

/// Kills a VM that did not come up, also when the caller no longer waits for it.
struct Unfinished {
    process: Process,
    run: RunDir,
    cgroup: Option<String>,
    armed: bool,
}

impl Unfinished {
    async fn undo(mut self) {
        self.armed = false;
        drop(self.process.kill());
        drop(timeout(Duration::from_secs(10), self.process.exited()).await);
        clear_up(&self.run, self.cgroup.as_deref()).await;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        drop(self.process.kill());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (process, run) = (self.process.clone(), self.run.clone());
            let rest = Self {
                process,
                run,
                cgroup: self.cgroup.take(),
                armed: false,
            };
            runtime.spawn(rest.undo());
        }
    }
}

#[async_trait]
impl Vmm for QemuDriver {
    fn name(&self) -> &'static str {
        match self.probe.accelerator {
            Accelerator::Kvm => "qemu-kvm",
            Accelerator::Tcg => "qemu-tcg",
        }
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, VmmError> {
        check_spec(&spec)?;
        if let Origin::Suspended(suspended) = &spec.origin
            && suspended.maker() != self.maker()
        {
            return Err(VmmError::Spec {
                field: "origin",
                rule: format!(
                    "must be a VM that {} has suspended, not {}",
                    self.maker(),
                    suspended.maker()
                ),
            });
        }
        let run = RunDir::new(&spec.run_dir);
        let (sandbox, cgroup) = (spec.sandbox.clone(), spec.cgroup.clone());
        let copy = copy_memory(&spec).await?;
        let Started {
            process,
            messages,
            savable,
            restore,
        } = match self.start(spec, &run, copy) {
            Ok(started) => started,
            Err(e) => {
                clear_up(&run, None).await;
                return Err(e);
            }
        };
        let guard = Unfinished {
            process: process.clone(),
            run: run.clone(),
            cgroup: cgroup.clone(),
            armed: true,
        };
        let record = VmRecord {
            driver: self.name().to_owned(),
            sandbox: sandbox.clone(),
            pid: process.pid,
            start_time: process.start_time,
            run_dir: run.path().to_owned(),
            cgroup,
        };
        let deadline = self.config.launch_deadline;
        let words = messages.try_clone();
        let attached = self
            .attach(record, process, messages, savable, deadline)
            .await;
        match attached {
            Ok(vm) => {
                let restored = match restore {
                    None => Ok(()),
                    Some(Restore::Template {
                        template,
                        memory,
                        disks,
                    }) => vm.restore(template, memory, disks).await,
                    Some(Restore::Suspended {
                        suspended,
                        memory,
                        bytes,
                    }) => vm.restore_suspended(suspended, memory, bytes).await,
                };
                if let Err(error) = restored {
                    drop(vm);
                    drop(guard.process.kill());
                    drop(timeout(Duration::from_secs(10), guard.process.exited()).await);
                    let output = words.map(|pipe| read_messages(&pipe)).unwrap_or_default();
                    guard.undo().await;
                    // It has ended over what it was given, and said why.
                    return Err(match error {
                        VmmError::Gone { sandbox } => VmmError::EarlyExit {
                            vmm: self.name().to_owned(),
                            sandbox,
                            output,
                        },
                        other => other,
                    });
                }
                let mut guard = guard;
                guard.armed = false;
                Ok(Box::new(vm))
            }
            Err(e) => {
                // An early end shows as a closed connection; its message is in the pipe by then.
                let vmm = self.name().to_owned();
                drop(guard.process.kill());
                drop(timeout(Duration::from_secs(10), guard.process.exited()).await);
                let output = words.map(|pipe| read_messages(&pipe)).unwrap_or_default();
                guard.undo().await;
                Err(match e {
                    QmpError::Timeout(waited) => VmmError::Timeout {
                        action: "the launch".to_owned(),
                        sandbox,
                        waited,
                    },
                    QmpError::Closed => VmmError::EarlyExit {
                        vmm,
                        sandbox,
                        output,
                    },
                    other => VmmError::Control {
                        action: "negotiate".to_owned(),
                        sandbox,
                        message: other.to_string(),
                    },
                })
            }
        }
    }

    async fn adopt(&self, record: &VmRecord) -> Result<Box<dyn Vm>, VmmError> {
        let run = RunDir::new(&record.run_dir);
        let failed = |source| VmmError::Io {
            action: "adopt the VM of",
            path: record.run_dir.clone(),
            source,
        };
        let gone = || VmmError::Gone {
            sandbox: record.sandbox.clone(),
        };
        let Some(process) = Process::open(record.pid, Some(record.start_time)).map_err(failed)?
        else {
            clear_up(&run, record.cgroup.as_deref()).await;
            return Err(gone());
        };
        let messages = run.open_messages().map_err(failed)?;
        let deadline = self.config.command_deadline;
        match self
            .attach(record.clone(), process, messages, None, deadline)
            .await
        {
            Ok(vm) => {
                vm.adopt_server().await?;
                Ok(Box::new(vm))
            }
            Err(QmpError::Closed) => Err(gone()),
            Err(QmpError::Timeout(waited)) => Err(VmmError::Timeout {
                action: "the adoption".to_owned(),
                sandbox: record.sandbox.clone(),
                waited,
            }),
            Err(other) => Err(VmmError::Control {
                action: "negotiate".to_owned(),
                sandbox: record.sandbox.clone(),
                message: other.to_string(),
            }),
        }
    }

    async fn destroy(&self, run_dir: &Path) -> Result<(), VmmError> {
        let run = RunDir::new(run_dir);
        let failed = |action| {
            move |source| VmmError::Io {
                action,
                path: run_dir.to_owned(),
                source,
            }
        };
        let Some(record) =
            LaunchRecord::read(&run.record()).map_err(failed("read the record in"))?
        else {
            clear_up(&run, None).await;
            return Ok(());
        };
        if let Some(process) =
            Process::open(record.pid, Some(record.start_time)).map_err(failed("open the VMM of"))?
        {
            process.kill().map_err(failed("kill the VMM of"))?;
            timeout(Duration::from_secs(30), process.exited())
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .map_err(failed("wait for the VMM of"))?;
        }
        clear_up(&run, record.cgroup.as_deref()).await;
        Ok(())
    }
}
