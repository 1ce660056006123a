//! From a stored intent to a ready sandbox.

use std::sync::Arc;

use hypernetes_agent_api::{AgentClient, FEATURE_USER_NAMESPACE};
use hypernetes_network::Attachment;
use hypernetes_vmm::{Disk, GuestKernel, NetDevice, Origin, Vm, VmExit, VmSpec};
use tokio::time::{Instant, timeout_at};
use tracing::{Instrument, info_span};

use super::{Actor, Source, containers::unknown_to_guest};
use crate::{
    api::Failure,
    error::RuntimeError,
    guest::{clean, clean_console},
    identity::{SCRATCH_SLOT, configure_request, network_request},
    link::{self, Link},
    pool::Pooled,
    records::VmSize,
    sandbox,
    scratch::blocking,
    templates::{self, Wish},
    timing::Stopwatch,
};

/// How much of a guest's console goes into a message.
pub(super) const CONSOLE_TAIL: usize = 2048;

/// What a VM is launched with.
pub(super) struct Parts {
    pub(super) attachment: Option<Attachment>,
    pub(super) disks: Vec<Disk>,
    pub(super) kernel: GuestKernel,
    pub(super) size: VmSize,
}

impl Actor {
    /// Boots the sandbox. On error what was made is undone, as far as that is possible.
    pub(super) async fn start(
        &mut self,
        asked: Stopwatch,
        source: Source,
    ) -> Result<(), RuntimeError> {
        let shared = Arc::clone(&self.shared);
        let _under_way = shared.starts.begin();
        let begun = self.start_phases(asked, source).await;
        let Err(error) = begun else {
            self.timing.total = asked.elapsed();
            shared.starts.came_up(&self.timing);
            tracing::info!(total = ?self.timing.total, from_template = self.timing.from_template, from_pool = self.timing.from_pool, phases = ?self.timing.phases, "sandbox is ready");
            self.publish_sandbox();
            return Ok(());
        };
        let mut message = hypernetes_telemetry::chain(&error).to_string();
        if let (Some(vm), RuntimeError::GuestSilent { .. }) = (&self.vm, &error) {
            let console = clean_console(&vm.console_tail(), CONSOLE_TAIL);
            message = format!("{message}; console: {console}");
        }
        tracing::warn!(error = message, "cannot start the sandbox");
        self.shared.starts.failed();
        self.record.failure = Some(Failure {
            reason: reason(&error).into(),
            message,
        });
        self.forget_clone().await;
        // From here on the sandbox is being stopped; a failure to write that down is told by the
        // first error already, and a restarted node undoes what is still marked as starting.
        if self.advance("run", sandbox::Event::BootFailed).is_ok()
            && let Err(undo) = self.undo_start().await
        {
            let undo = hypernetes_telemetry::chain(&undo).to_string();
            tracing::error!(error = undo, "cannot undo the start of the sandbox");
        }
        self.publish_sandbox();
        Err(error)
    }

    async fn start_phases(&mut self, asked: Stopwatch, source: Source) -> Result<(), RuntimeError> {
        self.record_intent()
            .instrument(info_span!("request"))
            .await?;
        self.timing.phases.push(("request", asked.elapsed()));
        self.publish_sandbox();

        let stopping = self.stopping.clone();
        let up = async {
            match source {
                Source::New => self.bring_up(None).await,
                Source::Pool(pooled) => self.bring_up(Some(pooled)).await,
                Source::Clone(plan) => Box::pin(self.bring_up_clone(*plan)).await,
            }
        };
        tokio::select! {
            result = up => result?,
            () = stopping.cancelled() => return Err(self.refused("run")),
        }
        let starting = self.record.clone();
        self.record.was_ready = true;
        self.advance("run", sandbox::Event::Booted)?;
        let saved = self.save().await;
        if saved.is_err() {
            // What a restarted node would undo is not ready in memory either.
            self.record = starting;
        }
        saved
    }

    async fn record_intent(&mut self) -> Result<(), RuntimeError> {
        let path = self.record.config.log_directory.clone();
        let action = format!("make log directory {}", path.display());
        let look = path.clone();
        let absent = blocking(action.clone(), move || Ok(!look.try_exists()?)).await?;
        // Written down before it is made, or a crash in between would leave it behind. Removing it
        // spares what somebody else has put there meanwhile.
        self.record.owns_log_directory = absent;
        self.save().await?;
        let checkpoints = self.shared.checkpoints(&self.record.id);
        blocking(action, move || {
            std::fs::create_dir_all(&path)?;
            std::fs::create_dir_all(checkpoints)
        })
        .await
    }

    async fn bring_up(&mut self, pooled: Option<Box<Pooled>>) -> Result<(), RuntimeError> {
        let taken = match pooled {
            Some(pooled) => self.take_over(*pooled).await?,
            None => None,
        };
        let (vm, client) = match taken {
            Some(taken) => taken,
            None => {
                let vm = self.bring_up_vm().await?;
                let watch = Stopwatch::start();
                let client = self
                    .wait_for_agent(&vm)
                    .instrument(info_span!("boot"))
                    .await?;
                self.timing.phases.push(("boot", watch.elapsed()));
                (vm, client)
            }
        };
        let watch = Stopwatch::start();
        let call = self.shared.config.deadlines.call;
        let device_mac = self.timing.from_template.then_some(templates::MAC);
        if self.record.config.user_namespace.is_some() && !client.has(FEATURE_USER_NAMESPACE) {
            return Err(unknown_to_guest("user_namespace"));
        }
        let lease = self.record.lease.as_ref();
        let request = configure_request(&self.record.config, lease, device_mac)?;
        client
            .configure_sandbox(request, call)
            .instrument(info_span!("configure"))
            .await
            .map_err(|error| {
                crate::guest::error(&self.record.id, "configure the sandbox", &error)
            })?;
        self.record.kernel_release = Some(clean(&client.hello().kernel_release));
        self.timing.phases.push(("configure", watch.elapsed()));
        let deadlines = &self.shared.config.deadlines;
        self.link = Some(Link::spawn(&self.record.id, vm, Some(client), deadlines));
        Ok(())
    }

    /// A VM from a template if there is one, else one that boots.
    async fn bring_up_vm(&mut self) -> Result<Arc<dyn Vm>, RuntimeError> {
        let parts = self.prepare().await?;
        let wish = self.wish(&parts);
        let (origin, why) = self.shared.templates.origin(&wish);
        let from_template = matches!(origin, Origin::Template(_));
        tracing::debug!(why, from_template, "where the VM begins");
        let watch = Stopwatch::start();
        let launched = self
            .launch(parts, origin)
            .instrument(info_span!("vmm"))
            .await;
        let vm = match launched {
            Err(RuntimeError::Vmm(error)) if from_template => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(error, "cannot start from the template: booting instead");
                self.shared.templates.distrust(&wish);
                self.shared.pool.look();
                let parts = self.prepare().await?;
                self.launch(parts, Origin::Kernel).await?
            }
            launched => {
                self.timing.from_template = from_template;
                launched?
            }
        };
        self.timing.phases.push(("vmm", watch.elapsed()));
        Ok(vm)
    }

    fn wish(&self, parts: &Parts) -> Wish {
        Wish {
            kernel: parts.kernel.clone(),
            vcpus: parts.size.vcpus,
            memory_mib: parts.size.memory_mib,
            nic: parts.attachment.is_some(),
            extras: self.record.config.extras,
        }
    }

    /// What the VM is started with.
    pub(super) fn first_size(&self) -> VmSize {
        self.shared.first_size(&self.record.config)
    }

    /// Network, scratch disk and kernel, all at once.
    async fn prepare(&mut self) -> Result<Parts, RuntimeError> {
        let (id, config) = (self.record.id.clone(), self.record.config.clone());
        let shared = Arc::clone(&self.shared);
        let run_dir = shared.run_dir(&id);
        let network = async {
            let watch = Stopwatch::start();
            let attachment = match &config.network {
                Some(network) => Some(
                    shared
                        .config
                        .network
                        .attach(&id, network, &network_request(&config))
                        .await?,
                ),
                None => None,
            };
            Ok::<_, RuntimeError>((attachment, watch.elapsed()))
        };
        let scratch = async {
            let watch = Stopwatch::start();
            let file = match config.scratch_mib {
                0 => None,
                mib => Some(shared.scratch.create(&id, mib).await?),
            };
            blocking(format!("make {}", run_dir.display()), {
                let run_dir = run_dir.clone();
                move || {
                    use std::os::unix::fs::DirBuilderExt;
                    std::fs::DirBuilder::new()
                        .recursive(true)
                        .mode(0o700)
                        .create(run_dir)
                }
            })
            .await?;
            Ok((file, watch.elapsed()))
        };
        let kernel = async {
            let watch = Stopwatch::start();
            let hyperstart = &shared.config.hyperstart;
            let kernel = shared
                .config
                .kernels
                .prepare(config.kernel.as_ref(), hyperstart)
                .await?;
            Ok((kernel, watch.elapsed()))
        };
        let ((attachment, network_time), (scratch, scratch_time), (kernel, kernel_time)) = tokio::try_join!(
            network.instrument(info_span!("network")),
            scratch.instrument(info_span!("scratch")),
            kernel.instrument(info_span!("kernel")),
        )?;
        self.timing.phases.extend([
            ("network", network_time),
            ("scratch", scratch_time),
            ("kernel", kernel_time),
        ]);
        let disks = scratch.into_iter().map(|file| Disk {
            slot: SCRATCH_SLOT,
            file,
            read_only: false,
        });
        Ok(Parts {
            attachment,
            disks: disks.collect(),
            kernel,
            size: self.first_size(),
        })
    }

    pub(super) async fn launch(
        &mut self,
        parts: Parts,
        origin: Origin,
    ) -> Result<Arc<dyn Vm>, RuntimeError> {
        let config = &self.record.config;
        let (net, lease) = match parts.attachment {
            Some(attachment) => {
                let mac = attachment.lease.mac.clone();
                (
                    Some(NetDevice {
                        tap: attachment.tap,
                        mac,
                    }),
                    Some(attachment.lease),
                )
            }
            None => (None, None),
        };
        self.plugged = parts.disks.iter().map(|disk| disk.slot).collect();
        let spec = VmSpec {
            sandbox: self.record.id.clone(),
            kernel: parts.kernel,
            origin,
            vcpus: parts.size.vcpus,
            memory_mib: parts.size.memory_mib,
            extras: config.extras,
            net,
            disks: parts.disks,
            run_dir: self.shared.run_dir(&self.record.id),
            uid: self.record.uid,
            cgroup: self.cgroup(),
            ephemeral: false,
        };
        let vm: Arc<dyn Vm> = Arc::from(self.shared.config.vmm.launch(spec).await?);
        self.vm = Some(Arc::clone(&vm));
        self.record.vm = Some(vm.record());
        self.record.lease = lease;
        self.save().await?;
        Ok(vm)
    }

    /// The cgroup of the VMM, if it has one.
    pub(super) fn cgroup(&self) -> Option<String> {
        let parent = self.record.config.cgroup_parent.as_ref()?;
        Some(format!(
            "{}/{}",
            parent.trim_end_matches('/'),
            self.record.id
        ))
    }

    pub(super) async fn wait_for_agent(
        &self,
        vm: &Arc<dyn Vm>,
    ) -> Result<AgentClient, RuntimeError> {
        let waited = self.shared.config.deadlines.boot;
        let deadline = Instant::now() + waited;
        let attempts = link::connect_when_up(vm.as_ref(), waited);
        let sandbox = self.record.id.to_string();
        tokio::select! {
            client = timeout_at(deadline, attempts) => {
                client.map_err(|_late| crate::guest::silent(&self.record.id, "boot", waited))
            }
            exit = vm.wait() => {
                let failure = failure(&exit, &vm.console_tail());
                let message = format!("{}: {}", failure.reason, failure.message);
                Err(RuntimeError::Guest { sandbox, action: "boot", message })
            }
        }
    }
}

/// What is told of a VM that has ended by itself.
pub(super) fn failure(exit: &VmExit, console: &str) -> Failure {
    let tail = clean_console(console, CONSOLE_TAIL);
    let (reason, message) = match exit {
        VmExit::Shutdown => (
            "GuestShutdown",
            "the guest powered off by itself".to_owned(),
        ),
        VmExit::Panic { console_tail } => (
            "KernelPanic",
            crate::guest::clean_console_head(console_tail, CONSOLE_TAIL),
        ),
        VmExit::VmmDied { status } if tail.is_empty() => {
            ("VmmDied", format!("the VMM ended: {}", clean(status)))
        }
        VmExit::VmmDied { status } => (
            "VmmDied",
            format!("the VMM ended: {}; console: {tail}", clean(status)),
        ),
    };
    Failure {
        reason: reason.into(),
        message,
    }
}

fn reason(error: &RuntimeError) -> &'static str {
    match error {
        RuntimeError::Network(_) => "NetworkFailed",
        RuntimeError::Vmm(_) => "VmmFailed",
        RuntimeError::GuestSilent { .. } => "BootTimeout",
        RuntimeError::Guest { .. } => "BootFailed",
        RuntimeError::Storage { .. } => "StorageFailed",
        _ => "StartFailed",
    }
}
