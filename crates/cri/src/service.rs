//! What calls do that takes more than one step: finding what a call is about, asking the runtime,
//! and taking back what was half done.

use std::{collections::BTreeMap, ops::Deref, sync::Arc};

use hypernetes_runtime::{
    ContainerState, ContainerStatus, DeviceConfig, PodRuntime, RuntimeError, SandboxMetadata,
    SandboxState, SandboxStatus, SeccompProfile,
};
use hypernetes_streaming::ProcessRequest;
use hypernetes_telemetry::VERSION;
use hypernetes_types::{ContainerId, SandboxId};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use crate::{
    HANDLER, HOST_HANDLER,
    carried::Carried,
    config::CriConfig,
    container::{self, Asked, Confinement},
    devices, host, lookup, mounts,
    network::NodeNetwork,
    sandbox, seccomp, stats,
    status::CriError,
    streams::{Stream, Streams},
    termination, v1,
};

/// Both services of the API; clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Service(Arc<Inner>);

/// What calls work with.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: CriConfig,
    pub(crate) runtime: Arc<dyn PodRuntime>,
    pub(crate) network: Arc<NodeNetwork>,
    pub(crate) streams: Arc<Streams>,
    /// What guests have of the host's files.
    pub(crate) carried: Arc<Carried>,
    /// Work that outlives the call that began it.
    pub(crate) tasks: TaskTracker,
    /// Places for readers of events.
    pub(crate) subscribers: Arc<Semaphore>,
    /// Cancelled when the server stops, which waits for streams that are open.
    pub(crate) closing: CancellationToken,
}

impl Deref for Service {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

pub(crate) fn now_nanos() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

impl Service {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    pub(crate) fn runtime(&self) -> &dyn PodRuntime {
        self.runtime.as_ref()
    }

    pub(crate) async fn sandbox(&self, id: &str) -> Result<SandboxStatus, CriError> {
        lookup::sandbox(self.runtime(), id).await
    }

    pub(crate) async fn container(&self, id: &str) -> Result<ContainerStatus, CriError> {
        lookup::container(self.runtime(), id).await
    }

    pub(crate) async fn running(&self, id: &str) -> Result<ContainerStatus, CriError> {
        let status = self.container(id).await?;
        match status.state {
            ContainerState::Running => Ok(status),
            state => Err(CriError::State {
                what: format!("container {}", status.id),
                state: format!("{state:?}, not running").to_lowercase(),
            }),
        }
    }

    pub(crate) async fn run_sandbox(
        &self,
        request: v1::RunPodSandboxRequest,
    ) -> Result<SandboxId, CriError> {
        let namespace = sandbox::namespace(&request);
        let pod_network = self.network.of(namespace);
        let config = match host::is_asked(&request, &self.config)? {
            true => host::plan_sandbox(&request, &self.config, &pod_network)?,
            false => sandbox::plan(&request, &self.config, &pod_network)?,
        };
        self.network
            .check_host_ports(namespace, &config.host_ports)?;
        let wanted = config.memo.clone();
        let (network, runtime) = (Arc::clone(&self.network), Arc::clone(&self.runtime));
        // To its end, even if the caller goes: the network must not be taken away under it.
        let run = async move {
            let joining = network.join(&pod_network).await?;
            let (metadata, begun) = (config.metadata.clone(), now_nanos());
            let result = runtime.run_sandbox(config).await;
            drop(joining);
            if result.is_err() {
                clear_failed(runtime.as_ref(), &metadata, begun).await;
                network.leave().await;
            }
            Ok::<_, CriError>(result?)
        };
        let run = self.tasks.spawn(run.in_current_span());
        let id = run
            .await
            .map_err(|_panic| CriError::Lost("the start of the sandbox was lost"))??;
        let status = self.runtime.sandbox(&id).await;
        let same = status.is_none_or(|status| status.config.memo == wanted);
        if same {
            Ok(id)
        } else {
            Err(CriError::Exists {
                kind: "sandbox",
                id: id.to_string(),
            })
        }
    }

    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<(), CriError> {
        let status = self.sandbox(id).await?;
        self.runtime.stop_sandbox(&status.id).await?;
        self.network.leave().await;
        Ok(())
    }

    pub(crate) async fn remove_sandbox(&self, id: &str) -> Result<(), CriError> {
        let status = self.sandbox(id).await?;
        self.runtime.remove_sandbox(&status.id).await?;
        self.network.leave().await;
        Ok(())
    }

    pub(crate) async fn create(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Result<ContainerId, CriError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        let asked = Asked::of(&request)?;
        if sandbox.config.host.is_some() {
            let mut config = host::plan_container(&asked, &sandbox)?;
            for image in config.host.iter_mut().flat_map(host::images) {
                self.name_image(image).await?;
            }
            let wanted = config.memo.clone();
            let id = self.runtime.create_container(&sandbox.id, config).await?;
            return self.created(id, &wanted).await;
        }
        // Everything that can be refused is, before a file of the host is read.
        let nothing = (mounts::Plan::default(), Confinement::default());
        container::plan(&asked, &sandbox, &nothing.0, nothing.1)?;
        let confinement = Confinement {
            pid_target: self.pid_target(&asked, &sandbox).await?,
            seccomp: read_seccomp(&asked, &sandbox).await?,
        };
        let ledger = self.carried.of(&sandbox.id);
        let mut ledger = ledger.lock().await;
        let mut mounts = self.plan_mounts(&asked, &sandbox).await?;
        self.name_images(&mut mounts).await?;
        for (index, share) in std::mem::take(&mut mounts.shares) {
            mounts.mounts[index].sub_path = self.runtime.share(&sandbox.id, share).await?;
        }
        for volume in std::mem::take(&mut mounts.volumes) {
            ledger.write(self.runtime(), &sandbox.id, volume).await?;
        }
        // Devices that wait for their container must not be taken for another's.
        // And memory that a VM grows by, not for another's huge pages.
        let apart = !asked.config.devices.is_empty() || container::has_huge_pages(&asked);
        let turn = Some(ledger).filter(|_| apart);
        let made = self.attach_and_create(&asked, &sandbox, mounts, confinement);
        let (id, wanted) = made.await?;
        drop(turn);
        self.created(id, &wanted).await
    }

    /// The container, if it is the one that was asked for and not another of its name.
    async fn created(&self, id: ContainerId, wanted: &str) -> Result<ContainerId, CriError> {
        let status = self.runtime.container(&id).await;
        let same = status.is_none_or(|status| status.config.memo == wanted);
        if same {
            Ok(id)
        } else {
            Err(CriError::Exists {
                kind: "container",
                id: id.to_string(),
            })
        }
    }

    /// Creates a container with its devices. What it does not take is detached again.
    async fn attach_and_create(
        &self,
        asked: &Asked<'_>,
        sandbox: &SandboxStatus,
        mut mounts: mounts::Plan,
        confinement: Confinement,
    ) -> Result<(ContainerId, String), CriError> {
        let (wanted, allowed) = (asked.config.devices.clone(), self.config.devices.clone());
        let attached = !wanted.is_empty();
        // A container that is there already has its devices, alone.
        let containers = self.runtime.list_containers(Some(&sandbox.id)).await;
        let same = containers.iter().any(|container| {
            let config = &container.config;
            config.name == asked.metadata.name && config.attempt == asked.metadata.attempt
        });
        let work = async {
            if attached && !same {
                let open = tokio::task::spawn_blocking(move || devices::open(&wanted, &allowed));
                let open = open
                    .await
                    .map_err(|_panic| CriError::Lost("opening the devices was lost"))??;
                for (device, destination) in open {
                    let slot = self.runtime.attach_device(&sandbox.id, device).await?;
                    mounts.devices.push(DeviceConfig {
                        slot,
                        destination,
                        ..DeviceConfig::default()
                    });
                }
            }
            let config = container::plan(asked, sandbox, &mounts, confinement)?;
            if !same {
                self.make_room(container::RESOURCES, sandbox, &config.resources)
                    .await?;
            }
            let memo = config.memo.clone();
            let id = self.runtime.create_container(&sandbox.id, config).await?;
            Ok((id, memo))
        };
        let made = work.await;
        if made.is_err()
            && attached
            && let Err(error) = self.runtime.detach_unused(&sandbox.id).await
        {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(sandbox = %sandbox.id, error, "cannot detach devices that nobody has");
        }
        made
    }

    /// Puts ids in the place of names, so that a container's status tells what is mounted even if the
    /// name means something else later.
    async fn name_images(&self, plan: &mut mounts::Plan) -> Result<(), CriError> {
        let images = plan.mounts.iter_mut().map(|mount| &mut mount.image);
        for image in images.filter(|image| !image.is_empty()) {
            self.name_image(image).await?;
        }
        Ok(())
    }

    async fn name_image(&self, image: &mut String) -> Result<(), CriError> {
        let found = self.runtime.image(image).await.ok_or_else(|| {
            let missing = format!("{:?} is not on this node", lookup::shown(image));
            CriError::Runtime(RuntimeError::ImageVolume(missing))
        })?;
        *image = found.id.to_string();
        Ok(())
    }

    /// The container whose processes a new one shall see.
    async fn pid_target(
        &self,
        asked: &Asked<'_>,
        sandbox: &SandboxStatus,
    ) -> Result<Option<ContainerId>, CriError> {
        let Some((field, id)) = container::pid_target(asked) else {
            return Ok(None);
        };
        if id.is_empty() {
            return Err(CriError::invalid(field, "must be given with TARGET"));
        }
        let target = match self.container(&id).await {
            Ok(target) if target.sandbox == sandbox.id => target,
            Err(error) if !error.is_not_found() => return Err(error),
            // Of another pod's container not even that it is there.
            Ok(_) | Err(_) => {
                let rule = format!("{:?} is no container of this sandbox", lookup::shown(&id));
                return Err(CriError::invalid(field, rule));
            }
        };
        match target.state {
            ContainerState::Running => Ok(Some(target.id)),
            state => {
                let state = format!("{state:?}").to_lowercase();
                let rule = format!("container {} is {state}, not running", target.id);
                Err(CriError::invalid(field, rule))
            }
        }
    }

    async fn plan_mounts(
        &self,
        asked: &Asked<'_>,
        sandbox: &SandboxStatus,
    ) -> Result<mounts::Plan, CriError> {
        let (service, wanted) = (self.clone(), asked.config.mounts.clone());
        let owner = container::owner(asked, sandbox);
        let (pod_uid, name) = (owner.pod_uid.to_owned(), owner.container.to_owned());
        let read = move || {
            let owner = mounts::Owner {
                pod_uid: &pod_uid,
                container: &name,
            };
            mounts::plan(&wanted, owner, &service.config)
        };
        tokio::task::spawn_blocking(read)
            .await
            .map_err(|_panic| CriError::Lost("reading the mounts' files was lost"))?
    }

    pub(crate) async fn exec_url(&self, request: v1::ExecRequest) -> Result<String, CriError> {
        if request.cmd.is_empty() {
            return Err(CriError::invalid("cmd", "must name a program"));
        }
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let status = self.running(&request.container_id).await?;
        let process = ProcessRequest {
            command: request.cmd,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        self.streams.url(Stream::Exec(status.id, process))
    }

    pub(crate) async fn attach_url(&self, request: v1::AttachRequest) -> Result<String, CriError> {
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let status = self.running(&request.container_id).await?;
        if request.tty != status.config.tty {
            let rule = format!("the container was started with tty {}", status.config.tty);
            return Err(CriError::invalid("tty", rule));
        }
        let process = ProcessRequest {
            command: Vec::new(),
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        self.streams.url(Stream::Attach(status.id, process))
    }

    pub(crate) async fn forward_url(
        &self,
        request: v1::PortForwardRequest,
    ) -> Result<String, CriError> {
        let port = |port: &i32| {
            let port = u16::try_from(*port).ok().filter(|port| *port > 0);
            port.ok_or_else(|| CriError::invalid("port", "must be 1 to 65535"))
        };
        let ports = request.port.iter().map(port).collect::<Result<_, _>>()?;
        let status = self.sandbox(&request.pod_sandbox_id).await?;
        if status.state != SandboxState::Ready {
            return Err(CriError::State {
                what: format!("sandbox {}", status.id),
                state: "not ready".to_owned(),
            });
        }
        self.streams.url(Stream::PortForward(status.id, ports))
    }

    pub(crate) async fn stats_of(&self, id: &str) -> Result<v1::ContainerStats, CriError> {
        let status = self.running(id).await?;
        let all = self.runtime.stats(&status.sandbox).await?;
        let found = all.containers.iter().find(|stats| stats.id == status.id);
        let found = found.ok_or_else(|| CriError::State {
            what: format!("container {}", status.id),
            state: "unknown to its guest".to_owned(),
        })?;
        Ok(stats::of_container(&status, found, all.unix_nanos))
    }

    /// Puts a termination message where the kubelet looks for it. If that fails, the status has it.
    pub(crate) async fn tell_end(&self, status: &mut ContainerStatus) {
        let Some(sandbox) = self.runtime.sandbox(&status.sandbox).await else {
            return;
        };
        let kubelet = &self.config.kubelet_dir;
        let uid = &sandbox.config.metadata.uid;
        let Some(path) = termination::file_of(status, uid, kubelet) else {
            return;
        };
        let (file, message) = (path.clone(), status.message.clone());
        let write = tokio::task::spawn_blocking(move || termination::write(&file, &message));
        match write.await {
            Ok(Ok(())) => status.message.clear(),
            Ok(Err(error)) => {
                tracing::debug!(path = %path.display(), %error, "cannot write a termination message");
            }
            Err(panic) => tracing::warn!(%panic, "writing a termination message failed"),
        }
    }

    /// Names of the handlers that this node has.
    pub(crate) fn handlers(&self) -> Vec<&'static str> {
        let host = self.config.host.is_on().then_some(HOST_HANDLER);
        ["", HANDLER].into_iter().chain(host).collect()
    }

    pub(crate) fn info(&self) -> BTreeMap<String, String> {
        let config = json!({
            "stateDir": self.config.state_dir,
            "kubeletDir": self.config.kubelet_dir,
            "copiedHostPaths": self.config.copied_paths,
            "sharedHostPaths": self.config.shared_paths.iter().map(|shared| &shared.path).collect::<Vec<_>>(),
            "streamAddress": self.config.stream_address.to_string(),
            "handlers": self.handlers(),
            "network": self.network.info(),
        });
        BTreeMap::from([
            ("config".to_owned(), config.to_string()),
            ("version".to_owned(), json!(VERSION).to_string()),
        ])
    }
}

/// Removes a sandbox that this call has made and that did not come up: the caller knows no id for it.
/// One that cannot be removed stays to be seen as not ready, for the kubelet to remove.
async fn clear_failed(runtime: &dyn PodRuntime, metadata: &SandboxMetadata, begun: i64) {
    let made_here = |status: &SandboxStatus| {
        status.config.metadata == *metadata
            && status.created_unix_nanos >= begun
            && status.state == SandboxState::NotReady
            && status.failure.is_some()
    };
    let all = runtime.list_sandboxes().await;
    for status in all.into_iter().filter(made_here) {
        if let Err(error) = runtime.remove_sandbox(&status.id).await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(sandbox = %status.id, error, "cannot remove a sandbox that did not come up");
        }
    }
}

/// The system call filter of the node's that a container asks for.
async fn read_seccomp(
    asked: &Asked<'_>,
    sandbox: &SandboxStatus,
) -> Result<Option<SeccompProfile>, CriError> {
    let Some((field, path)) = container::seccomp_file(asked)? else {
        return Ok(None);
    };
    let (path, kernel) = (path.to_owned(), sandbox.kernel_release.clone());
    let read = move || seccomp::read(&field, &path, kernel.as_deref().unwrap_or_default());
    let read = tokio::task::spawn_blocking(read).await;
    read.map_err(|_panic| CriError::Lost("reading the system call filter was lost"))?
        .map(Some)
}

fn check_streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<(), CriError> {
    if tty && stderr {
        let rule = "cannot be had with tty: a terminal has one output";
        return Err(CriError::invalid("stderr", rule));
    }
    if !(stdin || stdout || stderr) {
        let rule = "one of stdin, stdout and stderr must be asked for";
        return Err(CriError::invalid("stdout", rule));
    }
    Ok(())
}
