//! The calls of the runtime service.

use std::{collections::BTreeMap, time::Duration};

use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{
    HOST_HANDLER, RUNTIME_NAME, container, events, exec_sync, filter, metrics,
    pages::pages,
    sandbox,
    service::{Service, now_nanos},
    stats::{self, Look},
    status::CriError,
    v1::{self, runtime_service_server::RuntimeService},
};

type Answer<T> = Result<Response<T>, Status>;

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
        let runtime_ready = v1::RuntimeCondition {
            r#type: "RuntimeReady".to_owned(),
            status: true,
            reason: String::new(),
            message: String::new(),
        };
        let network_problem = self.network.ready().await.err();
        let network_ready = v1::RuntimeCondition {
            r#type: "NetworkReady".to_owned(),
            status: network_problem.is_none(),
            reason: match &network_problem {
                Some(_) => "NetworkPluginNotReady".to_owned(),
                None => String::new(),
            },
            message: network_problem
                .map(|error| hypernetes_telemetry::chain(&error).to_string())
                .unwrap_or_default(),
        };
        let handler = |name: &str| v1::RuntimeHandler {
            name: name.to_owned(),
            features: Some(v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: true,
                user_namespaces: name != HOST_HANDLER,
            }),
        };
        Ok(Response::new(v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![runtime_ready, network_ready],
            }),
            info: match request.into_inner().verbose {
                true => self.info(),
                false => BTreeMap::new(),
            },
            runtime_handlers: self.handlers().into_iter().map(handler).collect(),
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..Default::default()
            }),
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
        // Before the look: what is told is at least as new.
        let timestamp = now_nanos();
        let status = self.sandbox(&request.pod_sandbox_id).await?;
        Ok(Response::new(v1::PodSandboxStatusResponse {
            status: Some(sandbox::full(&status)),
            info: match request.verbose {
                true => sandbox::info(&status),
                false => BTreeMap::new(),
            },
            containers_statuses: events::containers(self, &status.id).await,
            // Anything but 0 tells the kubelet that events can be had.
            timestamp,
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
        let node = stats::of_node(&self.runtime, Look::Quick).await;
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
        for (status, all) in stats::of_node(&self.runtime, Look::Quick).await {
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

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Answer<BoxStream<v1::ContainerEventResponse>> {
        events::stream(self)
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<BoxStream<v1::StreamPodSandboxesResponse>> {
        let filter = request.into_inner().filter;
        let request = Request::new(v1::ListPodSandboxRequest { filter });
        let items = self.list_pod_sandbox(request).await?.into_inner().items;
        pages(items, |pod_sandboxes| v1::StreamPodSandboxesResponse {
            pod_sandboxes,
        })
    }

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<BoxStream<v1::StreamContainersResponse>> {
        let filter = request.into_inner().filter;
        let request = Request::new(v1::ListContainersRequest { filter });
        let items = self.list_containers(request).await?.into_inner().containers;
        pages(items, |containers| v1::StreamContainersResponse {
            containers,
        })
    }

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<BoxStream<v1::StreamContainerStatsResponse>> {
        let filter = request.into_inner().filter;
        let request = Request::new(v1::ListContainerStatsRequest { filter });
        let items = self.list_container_stats(request).await?.into_inner().stats;
        pages(items, |container_stats| v1::StreamContainerStatsResponse {
            container_stats,
        })
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<BoxStream<v1::StreamPodSandboxStatsResponse>> {
        let filter = request.into_inner().filter;
        let request = Request::new(v1::ListPodSandboxStatsRequest { filter });
        let items = self
            .list_pod_sandbox_stats(request)
            .await?
            .into_inner()
            .stats;
        pages(items, |pod_sandbox_stats| {
            v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        })
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        Ok(Response::new(v1::ListMetricDescriptorsResponse {
            descriptors: metrics::descriptors(),
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        let containers = self.runtime.list_containers(None).await;
        let node = stats::of_node(&self.runtime, Look::Detailed).await;
        let of = |(status, stats)| metrics::of_sandbox(status, &containers, stats);
        Ok(Response::new(v1::ListPodSandboxMetricsResponse {
            pod_metrics: node
                .iter()
                .map(|(status, stats)| (status, stats))
                .map(of)
                .collect(),
        }))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<BoxStream<v1::StreamPodSandboxMetricsResponse>> {
        let request = Request::new(v1::ListPodSandboxMetricsRequest {});
        let items = self.list_pod_sandbox_metrics(request).await?;
        pages(items.into_inner().pod_metrics, |pod_sandbox_metrics| {
            v1::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        })
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        self.update_pod_resources(&request.into_inner()).await?;
        Ok(Response::new(v1::UpdatePodSandboxResourcesResponse {}))
    }
}
