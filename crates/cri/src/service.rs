//! The runtime service: each call finds what it is about, and asks the runtime.

use std::{collections::BTreeMap, ops::Deref, sync::Arc, time::Duration};

use hypernetes_runtime::{
    ContainerState, ContainerStatus, ContainerUpdate, PodRuntime, SandboxState, SandboxStatus,
};
use hypernetes_streaming::ProcessRequest;
use hypernetes_telemetry::VERSION;
use hypernetes_types::{ContainerId, SandboxId};
use serde_json::json;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use crate::{
    HANDLER, RUNTIME_NAME,
    config::CriConfig,
    container::{self, Asked},
    exec_sync, filter, lookup, memo, mounts,
    network::NodeNetwork,
    resources, sandbox, stats,
    status::CriError,
    streams::{Stream, Streams},
    termination,
    v1::{self, runtime_service_server::RuntimeService},
};

type Answer<T> = Result<Response<T>, Status>;

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
    /// Work that outlives the call that began it.
    pub(crate) tasks: TaskTracker,
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

fn answer<T>(result: Result<T, CriError>) -> Answer<T> {
    Ok(Response::new(result?))
}

/// What was not there has ended already.
fn idempotent(result: Result<(), CriError>) -> Result<(), CriError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

impl Service {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    pub(crate) fn runtime(&self) -> &dyn PodRuntime {
        self.runtime.as_ref()
    }

    async fn sandbox(&self, id: &str) -> Result<SandboxStatus, CriError> {
        lookup::sandbox(self.runtime(), id).await
    }

    async fn container(&self, id: &str) -> Result<ContainerStatus, CriError> {
        lookup::container(self.runtime(), id).await
    }

    async fn running(&self, id: &str) -> Result<ContainerStatus, CriError> {
        let status = self.container(id).await?;
        match status.state {
            ContainerState::Running => Ok(status),
            state => Err(CriError::State {
                what: format!("container {}", status.id),
                state: format!("{state:?}, not running").to_lowercase(),
            }),
        }
    }

    async fn run_sandbox(&self, request: v1::RunPodSandboxRequest) -> Result<SandboxId, CriError> {
        let config = sandbox::plan(&request, &self.config, self.network.spec())?;
        let wanted = config.memo.clone();
        let (network, runtime) = (Arc::clone(&self.network), Arc::clone(&self.runtime));
        // To its end, even if the caller goes: the network must not be taken away under it.
        let run = self.tasks.spawn(async move {
            let joining = network.join().await?;
            let result = runtime.run_sandbox(config).await;
            drop(joining);
            if result.is_err() {
                network.leave().await;
            }
            Ok::<_, CriError>(result?)
        });
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

    async fn stop_sandbox(&self, id: &str) -> Result<(), CriError> {
        let status = self.sandbox(id).await?;
        self.runtime.stop_sandbox(&status.id).await?;
        self.network.leave().await;
        Ok(())
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), CriError> {
        let status = self.sandbox(id).await?;
        self.runtime.remove_sandbox(&status.id).await?;
        self.network.leave().await;
        Ok(())
    }

    async fn create(&self, request: v1::CreateContainerRequest) -> Result<ContainerId, CriError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        let asked = Asked::of(&request)?;
        // Everything that can be refused is, before a file of the host is read.
        container::plan(&asked, &sandbox, &mounts::Plan::default())?;
        let mounts = self.plan_mounts(&asked, &sandbox).await?;
        let config = container::plan(&asked, &sandbox, &mounts)?;
        let wanted = config.memo.clone();
        for volume in mounts.volumes {
            self.runtime.write_volume(&sandbox.id, volume).await?;
        }
        let id = self.runtime.create_container(&sandbox.id, config).await?;
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

    async fn update_resources(
        &self,
        request: v1::UpdateContainerResourcesRequest,
    ) -> Result<(), CriError> {
        let status = self.container(&request.container_id).await?;
        let update = request
            .linux
            .ok_or_else(|| CriError::invalid("linux", "must be given"))?;
        let mut asked = memo::container(&status.config.memo);
        let linux = asked.linux.get_or_insert_default();
        let old = linux.resources.take().unwrap_or_default();
        let resources = resources::merged(&old, &update);
        let config = resources::of_container("linux", &resources)?;
        let room = self.room_of(&status.sandbox).await;
        if let Some(room) = room.filter(|room| config.memory_limit > *room) {
            return Err(CriError::invalid(
                "linux.memory_limit_in_bytes",
                format!(
                    "{} is more than the {room} bytes of the pod's VM, which does not grow",
                    config.memory_limit
                ),
            ));
        }
        linux.resources = Some(resources);
        let update = ContainerUpdate {
            resources: config,
            memo: memo::of_container(&asked),
        };
        Ok(self.runtime.update_container(&status.id, update).await?)
    }

    /// Bytes that a VM has for its containers.
    async fn room_of(&self, sandbox: &SandboxId) -> Option<i64> {
        let status = self.runtime.sandbox(sandbox).await?;
        let mib = status
            .config
            .memory_mib
            .saturating_sub(self.config.vm.overhead_mib);
        Some(i64::from(mib) << 20)
    }

    async fn exec_url(&self, request: v1::ExecRequest) -> Result<String, CriError> {
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

    async fn attach_url(&self, request: v1::AttachRequest) -> Result<String, CriError> {
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

    async fn forward_url(&self, request: v1::PortForwardRequest) -> Result<String, CriError> {
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

    async fn stats_of(&self, id: &str) -> Result<v1::ContainerStats, CriError> {
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
    async fn tell_end(&self, status: &mut ContainerStatus) {
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

    fn info(&self) -> BTreeMap<String, String> {
        let config = json!({
            "stateDir": self.config.state_dir,
            "kubeletDir": self.config.kubelet_dir,
            "copiedHostPaths": self.config.copied_paths,
            "streamAddress": self.config.stream_address.to_string(),
            "handlers": [HANDLER],
            "network": {
                "driver": "builtin",
                "cidr": self.network.spec().cidr.to_string(),
                "clusterPodCIDR": self.network.pod_cidr(),
            },
        });
        BTreeMap::from([
            ("config".to_owned(), config.to_string()),
            ("version".to_owned(), json!(VERSION).to_string()),
        ])
    }
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

/// Seconds of a request; nothing below 0.
fn seconds(value: i64) -> Duration {
    Duration::from_secs(u64::try_from(value).unwrap_or(0))
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(v1::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: RUNTIME_NAME.to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let condition = |kind: &str| v1::RuntimeCondition {
            r#type: kind.to_owned(),
            status: true,
            reason: String::new(),
            message: String::new(),
        };
        let handler = |name: &str| v1::RuntimeHandler {
            name: name.to_owned(),
            features: Some(v1::RuntimeHandlerFeatures::default()),
        };
        Ok(Response::new(v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![condition("RuntimeReady"), condition("NetworkReady")],
            }),
            info: match request.into_inner().verbose {
                true => self.info(),
                false => BTreeMap::new(),
            },
            runtime_handlers: vec![handler(""), handler(HANDLER)],
            features: Some(v1::RuntimeFeatures::default()),
        }))
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Answer<v1::RuntimeConfigResponse> {
        Ok(Response::new(v1::RuntimeConfigResponse {
            linux: Some(v1::LinuxRuntimeConfiguration {
                cgroup_driver: v1::CgroupDriver::Cgroupfs.into(),
            }),
        }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let config = request.into_inner().runtime_config.unwrap_or_default();
        if let Some(network) = config
            .network_config
            .filter(|network| !network.pod_cidr.is_empty())
        {
            self.network.note_pod_cidr(&network.pod_cidr);
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Answer<v1::RunPodSandboxResponse> {
        let id = self.run_sandbox(request.into_inner()).await?;
        tracing::info!(sandbox = %id, "a sandbox is ready");
        Ok(Response::new(v1::RunPodSandboxResponse {
            pod_sandbox_id: id.to_string(),
        }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        idempotent(self.stop_sandbox(&id).await)?;
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        idempotent(self.remove_sandbox(&id).await)?;
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let status = self.sandbox(&request.pod_sandbox_id).await?;
        Ok(Response::new(v1::PodSandboxStatusResponse {
            status: Some(sandbox::full(&status)),
            info: match request.verbose {
                true => sandbox::info(&status),
                false => BTreeMap::new(),
            },
            containers_statuses: Vec::new(),
            // Anything but 0 would tell the kubelet that events can be had.
            timestamp: 0,
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let mut found = self.runtime.list_sandboxes().await;
        found.retain(|status| {
            filter::is_visible(status) && filter::sandbox_matches(status, &filter)
        });
        found.sort_by_key(|status| status.created_unix_nanos);
        Ok(Response::new(v1::ListPodSandboxResponse {
            items: found.iter().map(sandbox::item).collect(),
        }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let id = self.create(request.into_inner()).await?;
        Ok(Response::new(v1::CreateContainerResponse {
            container_id: id.to_string(),
        }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        let status = self.container(&request.into_inner().container_id).await?;
        let started = self.runtime.start_container(&status.id).await;
        started.map_err(CriError::from)?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Answer<v1::StopContainerResponse> {
        let request = request.into_inner();
        let stop = async {
            let status = self.container(&request.container_id).await?;
            let grace = seconds(request.timeout);
            Ok(self.runtime.stop_container(&status.id, grace).await?)
        };
        idempotent(stop.await)?;
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        let remove = async {
            let status = self.container(&id).await?;
            Ok(self.runtime.remove_container(&status.id).await?)
        };
        idempotent(remove.await)?;
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let mut found = self.runtime.list_containers(None).await;
        found.retain(|status| filter::container_matches(status, &filter));
        found.sort_by_key(|status| status.created_unix_nanos);
        Ok(Response::new(v1::ListContainersResponse {
            containers: found.iter().map(container::item).collect(),
        }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        let mut status = self.container(&request.container_id).await?;
        self.tell_end(&mut status).await;
        Ok(Response::new(v1::ContainerStatusResponse {
            status: Some(container::full(&status)),
            info: match request.verbose {
                true => container::info(&status),
                false => BTreeMap::new(),
            },
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        self.update_resources(request.into_inner()).await?;
        Ok(Response::new(v1::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let status = self.running(&request.into_inner().container_id).await?;
        let reopened = self.runtime.reopen_log(&status.id).await;
        reopened.map_err(CriError::from)?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<v1::ExecSyncRequest>,
    ) -> Answer<v1::ExecSyncResponse> {
        let request = request.into_inner();
        if request.cmd.is_empty() {
            return Err(CriError::invalid("cmd", "must name a program").into());
        }
        let status = self.running(&request.container_id).await?;
        let limit = (request.timeout > 0).then(|| seconds(request.timeout));
        answer(exec_sync::run(self.runtime(), &status.id, request.cmd, limit).await)
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let url = self.exec_url(request.into_inner()).await?;
        Ok(Response::new(v1::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let url = self.attach_url(request.into_inner()).await?;
        Ok(Response::new(v1::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        let url = self.forward_url(request.into_inner()).await?;
        Ok(Response::new(v1::PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Answer<v1::ContainerStatsResponse> {
        let stats = self.stats_of(&request.into_inner().container_id).await?;
        Ok(Response::new(v1::ContainerStatsResponse {
            stats: Some(stats),
        }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let mut wanted = self.runtime.list_containers(None).await;
        wanted.retain(|status| filter::stats_match(status, &filter));
        let node = stats::of_node(&self.runtime).await;
        let of = |(_, all)| stats::of_containers(&wanted, all);
        Ok(Response::new(v1::ListContainerStatsResponse {
            stats: node
                .iter()
                .map(|(status, all)| (status, all))
                .flat_map(of)
                .collect(),
        }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let status = self.sandbox(&request.into_inner().pod_sandbox_id).await?;
        let all = self.runtime.stats(&status.id).await;
        let all = all.map_err(CriError::from)?;
        let containers = self.runtime.list_containers(Some(&status.id)).await;
        Ok(Response::new(v1::PodSandboxStatsResponse {
            stats: Some(stats::of_sandbox(&status, &containers, &all)),
        }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let containers = self.runtime.list_containers(None).await;
        let mut found = Vec::new();
        for (status, all) in stats::of_node(&self.runtime).await {
            let wanted = status.id.as_str().starts_with(&filter.id)
                && filter::labels_match(&status.config.labels, &filter.label_selector);
            if wanted {
                found.push(stats::of_sandbox(&status, &containers, &all));
            }
        }
        Ok(Response::new(v1::ListPodSandboxStatsResponse {
            stats: found,
        }))
    }
}
