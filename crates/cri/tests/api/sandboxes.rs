//! Version, status and pod sandboxes.

use hypernetes_cri::v1;
use hypernetes_network::NetworkDriver;
use hypernetes_runtime::{PodRuntime, RuntimeError};
use tonic::Code;

use crate::bed::{Bed, refused};

fn filter(change: impl FnOnce(&mut v1::PodSandboxFilter)) -> v1::ListPodSandboxRequest {
    let mut filter = v1::PodSandboxFilter::default();
    change(&mut filter);
    v1::ListPodSandboxRequest {
        filter: Some(filter),
    }
}

#[tokio::test]
async fn a_kubelet_finds_what_it_needs_at_its_start() {
    let mut bed = Bed::new().await;
    let version = bed
        .client
        .version(v1::VersionRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(version.runtime_name, "hypernetes");
    assert_eq!(version.runtime_api_version, "v1");
    assert!(!version.version.is_empty() && !version.runtime_version.is_empty());

    let status = |verbose| v1::StatusRequest { verbose };
    let plain = bed.client.status(status(false)).await.unwrap().into_inner();
    let conditions = plain.status.unwrap().conditions;
    let named: Vec<_> = conditions
        .iter()
        .map(|condition| (condition.r#type.as_str(), condition.status))
        .collect();
    assert_eq!(named, [("RuntimeReady", true), ("NetworkReady", true)]);
    let handlers: Vec<_> = plain
        .runtime_handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    assert_eq!(handlers, ["", "hyper"]);
    assert!(plain.features.unwrap().supplemental_groups_policy);
    for handler in &plain.runtime_handlers {
        let features = handler.features.unwrap_or_default();
        assert!(features.recursive_read_only_mounts && features.user_namespaces);
    }
    assert!(plain.info.is_empty());
    let verbose = bed.client.status(status(true)).await.unwrap().into_inner();
    assert!(verbose.info["config"].contains("\"stateDir\""));

    let config = bed.client.runtime_config(v1::RuntimeConfigRequest {}).await;
    let linux = config.unwrap().into_inner().linux.unwrap();
    assert_eq!(linux.cgroup_driver(), v1::CgroupDriver::Cgroupfs);
    let update = v1::UpdateRuntimeConfigRequest {
        runtime_config: Some(v1::RuntimeConfig {
            network_config: Some(v1::NetworkConfig {
                pod_cidr: "10.1.0.0/24".into(),
            }),
        }),
    };
    bed.client.update_runtime_config(update).await.unwrap();
    let verbose = bed.client.status(status(true)).await.unwrap().into_inner();
    assert!(verbose.info["config"].contains("10.1.0.0/24"));
    let checkpoint = v1::CheckpointContainerRequest::default();
    refused(
        bed.client.checkpoint_container(checkpoint).await,
        Code::Unimplemented,
        "",
    );
}

#[tokio::test]
async fn a_sandbox_comes_back_as_it_was_asked_for() {
    let mut bed = Bed::new().await;
    let asked = bed.pod("web");
    let request = v1::RunPodSandboxRequest {
        config: Some(asked.clone()),
        runtime_handler: "hyper".into(),
    };
    let run = bed.client.run_pod_sandbox(request).await.unwrap();
    let id = run.into_inner().pod_sandbox_id;
    let status = bed.sandbox_status(&id).await.unwrap();
    assert_eq!(status.id, id);
    assert_eq!(status.metadata, asked.metadata);
    assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);
    assert!(status.created_at > 0);
    assert!(status.network.unwrap().ip.starts_with("10."));
    let options = status.linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(options.network(), v1::NamespaceMode::Pod);
    assert_eq!(options.pid(), v1::NamespaceMode::Container);
    assert_eq!(status.labels, asked.labels);
    assert_eq!(status.annotations, asked.annotations);
    assert_eq!(status.runtime_handler, "hyper");
    // A beginning of the id is enough.
    assert_eq!(bed.sandbox_status(&id[..10]).await.unwrap().id, id);
    let verbose = v1::PodSandboxStatusRequest {
        pod_sandbox_id: id,
        verbose: true,
    };
    let verbose = bed
        .client
        .pod_sandbox_status(verbose)
        .await
        .unwrap()
        .into_inner();
    assert!(verbose.info["info"].contains("kernelRelease"));
    assert!(verbose.timestamp > 0, "events can be had");
}

#[tokio::test]
async fn stopping_and_removing_can_be_repeated() {
    let mut bed = Bed::new().await;
    let (id, container) = bed.running("web").await;
    let again = bed.run(bed.pod("web")).await.unwrap();
    assert_eq!(again, id, "the same request gives the same sandbox");
    let mut other = bed.pod("web");
    other.hostname = "other".into();
    refused(bed.run(other).await, Code::AlreadyExists, &id);

    let stop = |id: &str| v1::StopPodSandboxRequest {
        pod_sandbox_id: id.into(),
    };
    let remove = |id: &str| v1::RemovePodSandboxRequest {
        pod_sandbox_id: id.into(),
    };
    for _ in 0..2 {
        bed.client.stop_pod_sandbox(stop(&id)).await.unwrap();
    }
    let status = bed.sandbox_status(&id).await.unwrap();
    assert_eq!(status.state(), v1::PodSandboxState::SandboxNotready);
    assert_eq!(status.network.unwrap().ip, "", "the address is free");
    let ended = bed.status(&container).await.unwrap();
    assert_eq!(ended.state(), v1::ContainerState::ContainerExited);
    for _ in 0..2 {
        bed.client.remove_pod_sandbox(remove(&id)).await.unwrap();
        bed.client.stop_pod_sandbox(stop(&id)).await.unwrap();
    }
    refused(bed.sandbox_status(&id).await, Code::NotFound, &id);
    refused(bed.status(&container).await, Code::NotFound, &container);
    let stranger = "0".repeat(32);
    bed.client.stop_pod_sandbox(stop(&stranger)).await.unwrap();
    bed.client
        .remove_pod_sandbox(remove("no-id-at-all"))
        .await
        .unwrap();
}

#[tokio::test]
async fn the_network_is_there_for_its_pods_only() {
    let mut bed = Bed::new().await;
    let networks = async |bed: &Bed| bed.networks.list_networks().await.unwrap().len();
    assert_eq!(networks(&bed).await, 0);
    let id = bed.run(bed.pod("a")).await.unwrap();
    assert_eq!(networks(&bed).await, 1);
    let request = v1::StopPodSandboxRequest { pod_sandbox_id: id };
    bed.client.stop_pod_sandbox(request).await.unwrap();
    assert_eq!(networks(&bed).await, 0);
    let failure = RuntimeError::Guest {
        sandbox: "x".into(),
        action: "boot",
        message: "no".into(),
    };
    bed.runtime.fail_next("run_sandbox", failure);
    refused(
        bed.run(bed.pod("b")).await,
        Code::Internal,
        "could not boot",
    );
    assert_eq!(networks(&bed).await, 0);
}

#[tokio::test]
async fn lists_are_narrowed_by_every_condition_at_once() {
    let mut bed = Bed::new().await;
    let a = bed.run(bed.pod("a")).await.unwrap();
    let b = bed.run(bed.pod("b")).await.unwrap();
    let request = v1::StopPodSandboxRequest {
        pod_sandbox_id: b.clone(),
    };
    bed.client.stop_pod_sandbox(request).await.unwrap();
    let mut list = async |request: v1::ListPodSandboxRequest| -> Vec<String> {
        let answer = bed.client.list_pod_sandbox(request).await.unwrap();
        let items = answer.into_inner().items;
        items.into_iter().map(|item| item.id).collect()
    };
    let state = |state: v1::PodSandboxState| {
        Some(v1::PodSandboxStateValue {
            state: state.into(),
        })
    };
    let label = |value: &str| [("app".to_owned(), value.to_owned())].into();
    use v1::PodSandboxState::{SandboxNotready, SandboxReady};
    assert_eq!(
        list(v1::ListPodSandboxRequest::default()).await,
        [a.as_str(), b.as_str()]
    );
    assert_eq!(
        list(filter(|f| f.state = state(SandboxReady))).await,
        [a.as_str()]
    );
    assert_eq!(list(filter(|f| f.id.clone_from(&b))).await, [b.as_str()]);
    assert_eq!(
        list(filter(|f| f.label_selector = label("a"))).await,
        [a.as_str()]
    );
    let none = filter(|f| {
        f.label_selector = label("a");
        f.state = state(SandboxNotready);
    });
    assert!(list(none).await.is_empty());
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_with_its_field() {
    let mut bed = Bed::new().await;
    let mut cases: Vec<(v1::PodSandboxConfig, &str)> = Vec::new();
    let mut case = |name: &'static str, change: &dyn Fn(&mut v1::PodSandboxConfig)| {
        let mut config = bed.pod("x");
        change(&mut config);
        cases.push((config, name));
    };
    let context = |config: &mut v1::PodSandboxConfig,
                   change: &dyn Fn(&mut v1::LinuxSandboxSecurityContext)| {
        let linux = config.linux.as_mut().unwrap();
        change(linux.security_context.as_mut().unwrap());
    };
    case("config.metadata", &|c| c.metadata = None);
    case("config.metadata.uid", &|c| {
        c.metadata.as_mut().unwrap().uid.clear();
    });
    case("config.metadata.name", &|c| {
        c.metadata.as_mut().unwrap().name = "../x".into();
    });
    case("config.log_directory", &|c| c.log_directory = "logs".into());
    case("config.port_mappings[0].container_port", &|c| {
        c.port_mappings.push(v1::PortMapping {
            host_port: 80,
            container_port: 0,
            ..Default::default()
        });
    });
    case("namespace_options.network", &|c| {
        context(c, &|context| {
            let options = context.namespace_options.as_mut().unwrap();
            options.network = v1::NamespaceMode::Node.into();
        });
    });
    case("hostNetwork, hostPID and hostIPC", &|c| {
        context(c, &|context| {
            let options = context.namespace_options.as_mut().unwrap();
            options.pid = v1::NamespaceMode::Node.into();
        });
    });
    case("config.linux.cgroup_parent", &|c| {
        c.linux.as_mut().unwrap().cgroup_parent = "/a/../b".into();
    });
    case("hypernetes.io/kernel", &|c| {
        c.annotations
            .insert("hypernetes.io/kernel".into(), "../x".into());
    });
    for (config, name) in cases {
        refused(bed.run(config).await, Code::InvalidArgument, name);
    }
    let request = v1::RunPodSandboxRequest {
        config: Some(bed.pod("x")),
        runtime_handler: "runc".into(),
    };
    refused(
        bed.client.run_pod_sandbox(request).await,
        Code::InvalidArgument,
        "runtime_handler",
    );
    // A container port that wants nothing of the host is no port mapping.
    let mut config = bed.pod("x");
    config.port_mappings.push(v1::PortMapping {
        container_port: 80,
        ..Default::default()
    });
    bed.run(config).await.unwrap();
}

#[tokio::test]
async fn a_vm_is_as_large_as_its_containers_may_be() {
    let mut bed = Bed::new().await;
    let mut config = bed.pod("big");
    config.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 1 << 30,
        ..Default::default()
    });
    let id = bed.run(config).await.unwrap();
    let status = hypernetes_runtime::PodRuntime::sandbox(&bed.runtime, &id.parse().unwrap())
        .await
        .unwrap();
    assert_eq!(status.config.memory_mib, 1024 + 64);
    let parent = status.config.cgroup_parent.as_deref();
    assert_eq!(parent, Some("/kubepods/besteffort/podx"));
}

#[tokio::test]
async fn a_pod_s_limits_may_be_what_its_vm_has() {
    let mut bed = Bed::new().await;
    let id = bed.run(bed.pod("a")).await.unwrap();
    let mut update = async |pod: &str, memory_limit_in_bytes, cpu_quota| {
        let request = v1::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: pod.into(),
            resources: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes,
                cpu_quota,
                ..Default::default()
            }),
            overhead: None,
        };
        bed.client.update_pod_sandbox_resources(request).await
    };
    update(&id, 0, 0).await.unwrap();
    update(&id, 256 << 20, 100_000).await.unwrap();
    let field = "resources.memory_limit_in_bytes: ";
    let late = update(&id, 257 << 20, 0).await;
    refused(late, Code::InvalidArgument, field);
    let late = update(&id, 0, 100_100).await;
    refused(late, Code::InvalidArgument, "resources.cpu_quota: ");
    refused(update("0123456789ab", 0, 0).await, Code::NotFound, "0123");
}

#[tokio::test]
async fn a_vm_grows_and_shrinks_with_its_containers() {
    let mut bed = Bed::with(|config| {
        config.vm.resize_vcpus = 3;
        config.vm.resize_memory_mib = 1024;
    })
    .await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut containers = Vec::new();
    for name in ["c", "d"] {
        containers.push(bed.create(&sandbox, Bed::container(name)).await.unwrap());
    }
    let size = async |bed: &Bed| {
        let status = bed
            .runtime
            .sandbox(&sandbox.parse().unwrap())
            .await
            .unwrap();
        (status.vcpus, status.memory_mib)
    };
    assert_eq!(size(&bed).await, (1, 320));
    let update =
        |container: &str, memory_limit_in_bytes, cpu_quota| v1::UpdateContainerResourcesRequest {
            container_id: container.into(),
            linux: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes,
                cpu_quota,
                cpu_period: 100_000,
                ..Default::default()
            }),
            ..Default::default()
        };
    for (container, memory, quota, expected) in [
        (0, 512 << 20, 150_000, (2, 576)),
        (1, 256 << 20, 100_000, (3, 832)),
        // More than the VM can have in all is shared.
        (1, 1024 << 20, 400_000, (3, 1088)),
        (1, 64 << 20, 50_000, (2, 640)),
        (0, 64 << 20, 50_000, (1, 320)),
    ] {
        let request = update(&containers[container], memory, quota);
        bed.client
            .update_container_resources(request)
            .await
            .unwrap();
        assert_eq!(size(&bed).await, expected);
        let shown = bed.status(&containers[container]).await.unwrap().resources;
        let shown = shown.unwrap().linux.unwrap();
        assert_eq!(
            (shown.memory_limit_in_bytes, shown.cpu_quota),
            (memory, quota)
        );
    }
    let late = update(&containers[0], (1024 << 20) + 1, 0);
    refused(
        bed.client.update_container_resources(late).await,
        Code::InvalidArgument,
        "linux.memory_limit_in_bytes: ",
    );

    // The pod's own limits hold the VM too, until they are lowered.
    let pod = async |bed: &mut Bed, memory_limit_in_bytes, cpu_quota| {
        let request = v1::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: sandbox.clone(),
            resources: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes,
                cpu_quota,
                ..Default::default()
            }),
            overhead: None,
        };
        bed.client.update_pod_sandbox_resources(request).await
    };
    pod(&mut bed, 700 << 20, 300_000).await.unwrap();
    assert_eq!(size(&bed).await, (3, 764));
    let request = update(&containers[0], 128 << 20, 60_000);
    bed.client
        .update_container_resources(request)
        .await
        .unwrap();
    assert_eq!(size(&bed).await, (3, 764));
    refused(
        pod(&mut bed, 0, 301_000).await,
        Code::InvalidArgument,
        "resources.cpu_quota: ",
    );
    pod(&mut bed, 200 << 20, 100_000).await.unwrap();
    assert_eq!(size(&bed).await, (2, 320));
}

#[tokio::test]
async fn streams_have_what_lists_have() {
    let mut bed = Bed::new().await;
    let (sandbox, container) = bed.running("a").await;
    bed.running("b").await;
    let request = v1::StreamPodSandboxesRequest {
        filter: Some(v1::PodSandboxFilter {
            id: sandbox.clone(),
            ..Default::default()
        }),
    };
    let stream = bed.client.stream_pod_sandboxes(request).await.unwrap();
    let page = stream.into_inner().message().await.unwrap().unwrap();
    assert_eq!(page.pod_sandboxes.len(), 1);
    assert_eq!(page.pod_sandboxes[0].id, sandbox);

    let request = v1::StreamContainersRequest::default();
    let stream = bed.client.stream_containers(request).await.unwrap();
    let mut stream = stream.into_inner();
    let page = stream.message().await.unwrap().unwrap();
    assert_eq!(page.containers.len(), 2);
    assert_eq!(stream.message().await.unwrap(), None, "it ends");

    let request = v1::StreamContainerStatsRequest {
        filter: Some(v1::ContainerStatsFilter {
            id: container.clone(),
            ..Default::default()
        }),
    };
    let stream = bed.client.stream_container_stats(request).await.unwrap();
    let page = stream.into_inner().message().await.unwrap().unwrap();
    let stats = page.container_stats.into_iter();
    let ids: Vec<_> = stats.map(|stats| stats.attributes.unwrap().id).collect();
    assert_eq!(ids, [container]);

    let request = v1::StreamPodSandboxStatsRequest::default();
    let stream = bed.client.stream_pod_sandbox_stats(request).await.unwrap();
    let page = stream.into_inner().message().await.unwrap().unwrap();
    assert_eq!(page.pod_sandbox_stats.len(), 2);

    let request = v1::StreamImagesRequest::default();
    let stream = bed.images.stream_images(request).await.unwrap();
    let page = stream.into_inner().message().await.unwrap().unwrap();
    assert_eq!(page.images.len(), 1);
}

#[tokio::test]
async fn the_socket_is_the_operator_s() {
    use std::os::unix::fs::PermissionsExt;
    let mut bed = Bed::new().await;
    let socket = bed.temp.path().join("run/cri.sock");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    assert!(
        hypernetes_cri::CriServer::bind(&socket).is_err(),
        "it is in use"
    );
    bed.stop.cancel();
    bed.server.take().unwrap().await.unwrap();
    drop(hypernetes_cri::CriServer::bind(&socket).unwrap());
    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "a file").unwrap();
    assert!(
        hypernetes_cri::CriServer::bind(&socket).is_err(),
        "not ours"
    );
}
