//! The handler of pods on the node's own kernel.

use hypernetes_cri::{CriConfig, v1};
use hypernetes_runtime::{HostMountSource, PidNamespace, PodRuntime, Propagation, Seccomp};
use tonic::Code;

use crate::bed::{Adjust, Bed, refused};

fn on(config: &mut CriConfig) {
    config.host.namespaces = vec!["acme".into()];
}

fn off(_: &mut CriConfig) {}

fn in_host_network(bed: &Bed, name: &str) -> v1::PodSandboxConfig {
    let mut pod = bed.pod(name);
    let linux = pod.linux.as_mut().unwrap();
    let context = linux.security_context.as_mut().unwrap();
    context.namespace_options = Some(options());
    pod
}

fn options() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Node.into(),
        pid: v1::NamespaceMode::Container.into(),
        ..Default::default()
    }
}

fn request(handler: &str, config: v1::PodSandboxConfig) -> v1::RunPodSandboxRequest {
    v1::RunPodSandboxRequest {
        config: Some(config),
        runtime_handler: handler.into(),
    }
}

#[tokio::test]
async fn it_is_told_and_served_only_where_the_configuration_says_so() {
    for (adjust, handlers) in [
        (off as Adjust, &["", "hyper"][..]),
        (on, &["", "hyper", "host"]),
    ] {
        let mut bed = Bed::with(adjust).await;
        let status = bed.client.status(v1::StatusRequest::default()).await;
        let told = status.unwrap().into_inner().runtime_handlers;
        let names: Vec<_> = told.iter().map(|handler| handler.name.as_str()).collect();
        assert_eq!(names, handlers);
        for handler in &told {
            let features = handler.features.unwrap_or_default();
            assert!(features.recursive_read_only_mounts);
            assert_eq!(features.user_namespaces, handler.name != "host");
        }
    }
    let mut bed = Bed::with(off).await;
    let asked = request("host", in_host_network(&bed, "p"));
    let answer = bed.client.run_pod_sandbox(asked).await;
    refused(answer, Code::InvalidArgument, "hostHandler.namespaces");

    let mut bed = Bed::with(on).await;
    let mut other = in_host_network(&bed, "p");
    other.metadata.as_mut().unwrap().namespace = "tenant".into();
    let answer = bed.client.run_pod_sandbox(request("host", other)).await;
    refused(answer, Code::InvalidArgument, "\"tenant\"");
    // No silent way to the node's kernel, and no pod of it on a network of VMs.
    for handler in ["", "hyper"] {
        let asked = request(handler, in_host_network(&bed, "p"));
        let answer = bed.client.run_pod_sandbox(asked).await;
        refused(answer, Code::InvalidArgument, "handler \"host\"");
    }
    let asked = request("host", bed.pod("p"));
    let answer = bed.client.run_pod_sandbox(asked).await;
    refused(answer, Code::InvalidArgument, "places for VMs only");
    assert!(bed.runtime.list_sandboxes().await.is_empty());
}

#[tokio::test]
async fn a_container_gets_what_it_asks_of_the_host() {
    let mut bed = Bed::with(on).await;
    let asked = request("host", in_host_network(&bed, "agent"));
    let answer = bed.client.run_pod_sandbox(asked).await.unwrap();
    let sandbox = answer.into_inner().pod_sandbox_id;
    let mut config = Bed::container("c");
    config.mounts = vec![
        v1::Mount {
            host_path: "/lib/modules".into(),
            container_path: "/lib/modules".into(),
            readonly: true,
            propagation: v1::MountPropagation::PropagationHostToContainer.into(),
            ..Default::default()
        },
        v1::Mount {
            container_path: "/image".into(),
            readonly: true,
            image: Some(v1::ImageSpec {
                image: "web".into(),
                ..Default::default()
            }),
            ..Default::default()
        },
    ];
    config.devices = vec![v1::Device {
        host_path: "/dev/null".into(),
        container_path: "/dev/void".into(),
        permissions: "rw".into(),
    }];
    config.linux = Some(v1::LinuxContainerConfig {
        resources: Some(v1::LinuxContainerResources {
            cpuset_cpus: "0".into(),
            memory_limit_in_bytes: 1 << 26,
            ..Default::default()
        }),
        security_context: Some(v1::LinuxContainerSecurityContext {
            namespace_options: Some(v1::NamespaceOption {
                pid: v1::NamespaceMode::Node.into(),
                ..options()
            }),
            seccomp: Some(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::Localhost.into(),
                localhost_ref: "/profiles/a.json".into(),
            }),
            ..Default::default()
        }),
    });
    let id = bed.create(&sandbox, config.clone()).await.unwrap();
    let made = bed.runtime.container(&id.parse().unwrap()).await.unwrap();
    let host = made.config.host.unwrap();
    assert_eq!(host.pid, PidNamespace::Host);
    assert_eq!(host.seccomp, Seccomp::Localhost("/profiles/a.json".into()));
    assert_eq!(
        host.mounts[0].source,
        HostMountSource::Path("/lib/modules".into())
    );
    assert_eq!(host.mounts[0].propagation, Propagation::FromHost);
    assert_eq!(host.devices[0].container.to_str(), Some("/dev/void"));
    assert_eq!(
        (host.limits.cpuset_cpus.as_str(), host.limits.memory),
        ("0", 1 << 26)
    );
    let status = bed.client.container_status(v1::ContainerStatusRequest {
        container_id: id.clone(),
        verbose: false,
    });
    let status = status.await.unwrap().into_inner().status.unwrap();
    let image = status.mounts[1].image.as_ref().unwrap();
    assert_eq!(image.image_ref, status.image_id);

    bed.start(&id).await.unwrap();
    let update = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(v1::LinuxContainerResources {
            cpuset_cpus: "0-1".into(),
            memory_limit_in_bytes: 1 << 40,
            ..Default::default()
        }),
        ..Default::default()
    };
    bed.client.update_container_resources(update).await.unwrap();

    // The namespaces of the pod are the pod's.
    let mut bad = config;
    bad.metadata.as_mut().unwrap().name = "bad".into();
    let context = bad
        .linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap();
    context.namespace_options = Some(v1::NamespaceOption::default());
    refused(
        bed.create(&sandbox, bad).await,
        Code::InvalidArgument,
        "namespace_options.network",
    );
}
