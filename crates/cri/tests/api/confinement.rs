//! What confines a container: system call filters, namespaces.

use std::fs;

use hypernetes_cri::v1;
use hypernetes_runtime::{PodRuntime, SeccompAction};
use tonic::Code;

use crate::bed::{Bed, refused};

fn confined(name: &str, context: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
    let mut config = Bed::container(name);
    config.linux = Some(v1::LinuxContainerConfig {
        resources: None,
        security_context: Some(v1::LinuxContainerSecurityContext {
            namespace_options: context.namespace_options.clone().or_else(|| {
                Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..Default::default()
                })
            }),
            ..context
        }),
    });
    config
}

fn localhost(path: &str) -> v1::LinuxContainerSecurityContext {
    v1::LinuxContainerSecurityContext {
        seccomp: Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::Localhost.into(),
            localhost_ref: path.into(),
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_filter_of_the_node_s_is_read_when_the_container_is_created() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let file = bed.temp.path().join("kubelet/seccomp/deny.json");
    let path = file.to_str().unwrap();
    let field = "config.linux.security_context.seccomp.localhost_ref";
    let missing = bed.create(&sandbox, confined("c", localhost(path))).await;
    refused(missing, Code::InvalidArgument, field);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "nonsense").unwrap();
    let invalid = bed.create(&sandbox, confined("c", localhost(path))).await;
    refused(invalid, Code::InvalidArgument, "is no JSON");
    // What is privileged is confined by nothing, so nothing is read for it.
    let privileged = v1::LinuxContainerSecurityContext {
        privileged: true,
        ..localhost(path)
    };
    let free = bed
        .create(&sandbox, confined("free", privileged))
        .await
        .unwrap();

    fs::write(
        &file,
        r#"{"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}]}"#,
    )
    .unwrap();
    let id = bed
        .create(&sandbox, confined("c", localhost(path)))
        .await
        .unwrap();
    let status = bed.runtime.container(&id.parse().unwrap()).await.unwrap();
    let security = status.config.security;
    let profile = security.seccomp.unwrap();
    assert!(!security.seccomp_default);
    assert_eq!(profile.default_action, SeccompAction::Allow);
    assert_eq!(profile.rules[0].action, SeccompAction::Errno(1));
    let free = bed.runtime.container(&free.parse().unwrap()).await.unwrap();
    assert_eq!(free.config.security.seccomp, None);
}

#[tokio::test]
async fn a_container_can_see_the_processes_of_one_other() {
    let mut bed = Bed::new().await;
    let (sandbox, target) = bed.running("a").await;
    let (_, stranger) = bed.running("b").await;
    let asks = |id: &str| {
        let context = v1::LinuxContainerSecurityContext {
            namespace_options: Some(v1::NamespaceOption {
                pid: v1::NamespaceMode::Target.into(),
                target_id: id.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        confined("debug", context)
    };
    let field = "config.linux.security_context.namespace_options.target_id";
    for id in ["", "0123456789abcdef", stranger.as_str()] {
        let refusal = bed.create(&sandbox, asks(id)).await;
        refused(refusal, Code::InvalidArgument, field);
    }
    let id = bed.create(&sandbox, asks(&target)).await.unwrap();
    let status = bed.runtime.container(&id.parse().unwrap()).await.unwrap();
    assert_eq!(status.config.pid_target, Some(target.parse().unwrap()));

    bed.runtime
        .end(&target.parse().unwrap(), 0, "Completed", "");
    let mut late = asks(&target);
    late.metadata.as_mut().unwrap().attempt = 1;
    late.log_path = "debug/1.log".into();
    let refusal = bed.create(&sandbox, late).await;
    refused(refusal, Code::InvalidArgument, "is exited, not running");
}

#[tokio::test]
async fn a_pod_and_its_containers_share_one_user_namespace() {
    let mut bed = Bed::new().await;
    let users = |first| v1::UserNamespace {
        mode: v1::NamespaceMode::Pod.into(),
        uids: vec![v1::IdMapping {
            host_id: first,
            container_id: 0,
            length: 65_536,
        }],
        gids: vec![v1::IdMapping {
            host_id: 7,
            container_id: 0,
            length: 8,
        }],
    };
    let options = |users: Option<v1::UserNamespace>| v1::NamespaceOption {
        pid: v1::NamespaceMode::Container.into(),
        userns_options: users,
        ..Default::default()
    };
    let container = |name: &str, users| {
        confined(
            name,
            v1::LinuxContainerSecurityContext {
                namespace_options: Some(options(users)),
                ..Default::default()
            },
        )
    };
    let mut pod = bed.pod("a");
    let context = |pod: &mut v1::PodSandboxConfig, users| {
        let linux = pod.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().namespace_options = Some(options(users));
    };
    let base = "config.linux.security_context.namespace_options.userns_options";
    context(&mut pod, Some(v1::UserNamespace::default()));
    refused(bed.run(pod.clone()).await, Code::InvalidArgument, base);
    context(&mut pod, Some(users(1000)));
    let sandbox = bed.run(pod).await.unwrap();
    let status = bed.sandbox_status(&sandbox).await.unwrap();
    let shown = status.linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(shown.userns_options, Some(users(1000)));
    let status = bed
        .runtime
        .sandbox(&sandbox.parse().unwrap())
        .await
        .unwrap();
    let asked = status.config.user_namespace.unwrap();
    assert_eq!((asked.uids.first, asked.gids.first), (1000, 7));

    for other in [None, Some(users(2000))] {
        let refusal = bed.create(&sandbox, container("c", other)).await;
        refused(refusal, Code::InvalidArgument, base);
    }
    let directory = bed
        .temp
        .path()
        .join("kubelet/pods/uid-a/volumes/kubernetes.io~empty-dir/v");
    fs::create_dir_all(&directory).unwrap();
    let mut config = container("c", Some(users(1000)));
    config.mounts = vec![v1::Mount {
        container_path: "/v".into(),
        host_path: directory.to_str().unwrap().into(),
        uid_mappings: users(2000).uids,
        gid_mappings: users(2000).gids,
        ..Default::default()
    }];
    let refusal = bed.create(&sandbox, config.clone()).await;
    refused(
        refusal,
        Code::InvalidArgument,
        "config.mounts[0].uidMappings",
    );
    config.mounts[0].uid_mappings = users(1000).uids;
    bed.create(&sandbox, config).await.unwrap();

    let (plain, _) = bed.running("b").await;
    let refusal = bed.create(&plain, container("d", Some(users(1000)))).await;
    refused(refusal, Code::InvalidArgument, base);
}
