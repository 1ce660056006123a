//! Containers: their life, their fields, their mounts, their limits.

use std::{fs, os::unix::fs::symlink, time::Duration};

use hypernetes_cri::v1;
use hypernetes_runtime::{Output, PodRuntime, VolumeKind};
use tonic::Code;

use crate::bed::{Bed, refused};

fn stop(id: &str, timeout: i64) -> v1::StopContainerRequest {
    v1::StopContainerRequest {
        container_id: id.into(),
        timeout,
    }
}

fn remove(id: &str) -> v1::RemoveContainerRequest {
    v1::RemoveContainerRequest {
        container_id: id.into(),
    }
}

#[tokio::test]
async fn a_container_comes_back_as_it_was_asked_for() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let hosts = bed.temp.path().join("kubelet/pods/uid-a/etc-hosts");
    fs::create_dir_all(hosts.parent().unwrap()).unwrap();
    fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    let mut asked = Bed::container("c");
    asked.mounts = vec![v1::Mount {
        container_path: "/etc/hosts".into(),
        host_path: hosts.to_str().unwrap().into(),
        selinux_relabel: true,
        ..Default::default()
    }];
    asked.stop_signal = v1::Signal::Sigquit.into();
    let resources = v1::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        memory_swap_limit_in_bytes: 64 << 20,
        oom_score_adj: 1000,
        hugepage_limits: vec![v1::HugepageLimit {
            page_size: "2MB".into(),
            limit: 0,
        }],
        unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    asked.linux = Some(v1::LinuxContainerConfig {
        resources: Some(resources.clone()),
        security_context: Some(v1::LinuxContainerSecurityContext {
            run_as_user: Some(v1::Int64Value { value: 1000 }),
            supplemental_groups: vec![7],
            namespace_options: Some(v1::NamespaceOption {
                pid: v1::NamespaceMode::Container.into(),
                ..Default::default()
            }),
            seccomp: Some(v1::SecurityProfile::default()),
            ..Default::default()
        }),
    });
    let id = bed.create(&sandbox, asked.clone()).await.unwrap();
    assert_eq!(bed.create(&sandbox, asked.clone()).await.unwrap(), id);
    let mut other = asked.clone();
    other.tty = true;
    refused(bed.create(&sandbox, other).await, Code::AlreadyExists, &id);

    let status = bed.status(&id).await.unwrap();
    assert_eq!(status.state(), v1::ContainerState::ContainerCreated);
    assert_eq!(status.metadata, asked.metadata);
    assert_eq!((status.created_at > 0, status.started_at), (true, 0));
    let image = status.image.unwrap();
    assert_eq!(
        image.image, "registry.example/web:1",
        "as the user named it"
    );
    assert!(!status.image_ref.is_empty() && status.image_id.starts_with("sha256:"));
    assert_eq!(
        (&status.labels, &status.annotations),
        (&asked.labels, &asked.annotations)
    );
    assert_eq!(status.mounts, asked.mounts);
    assert_eq!(
        status.log_path,
        bed.logs("a").join("c/0.log").to_str().unwrap()
    );
    assert_eq!(status.resources.unwrap().linux.unwrap(), resources);
    assert_eq!(status.stop_signal, i32::from(v1::Signal::Sigquit));
    let user = status.user.unwrap().linux.unwrap();
    assert_eq!((user.uid, user.supplemental_groups), (1000, vec![0, 7]));

    bed.start(&id).await.unwrap();
    bed.start(&id).await.unwrap();
    let running = bed.status(&id[..12]).await.unwrap();
    assert_eq!(running.state(), v1::ContainerState::ContainerRunning);
    assert!(running.started_at > 0);
    bed.runtime.end(&id.parse().unwrap(), 137, "OOMKilled", "");
    let ended = bed.status(&id).await.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
    assert!(ended.finished_at > 0);
    refused(bed.start(&id).await, Code::FailedPrecondition, "exited");
}

#[tokio::test]
async fn last_words_are_where_the_kubelet_reads_them() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let file = bed
        .temp
        .path()
        .join("kubelet/pods/uid-a/containers/c/0a1b2c");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "").unwrap();
    let mut config = Bed::container("c");
    config.mounts = vec![v1::Mount {
        container_path: "/dev/termination-log".into(),
        host_path: file.to_str().unwrap().into(),
        ..Default::default()
    }];
    let id = bed.create(&sandbox, config.clone()).await.unwrap();
    bed.start(&id).await.unwrap();
    bed.runtime
        .end(&id.parse().unwrap(), 1, "Error", "no more work");
    let status = bed.status(&id).await.unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "no more work");
    assert_eq!(status.message, "", "the kubelet would show it twice");
    assert_eq!(status.mounts, config.mounts);

    // Why a container could not run is the node's word, not the container's.
    config.metadata.as_mut().unwrap().attempt = 1;
    config.log_path = "c/1.log".into();
    fs::write(&file, "").unwrap();
    let id = bed.create(&sandbox, config).await.unwrap();
    bed.start(&id).await.unwrap();
    bed.runtime.end(
        &id.parse().unwrap(),
        127,
        "ContainerCannotRun",
        "no such file",
    );
    assert_eq!(bed.status(&id).await.unwrap().message, "no such file");
    assert_eq!(fs::read_to_string(&file).unwrap(), "");
}

#[tokio::test]
async fn stopping_and_removing_can_be_repeated() {
    let mut bed = Bed::new().await;
    let (_, id) = bed.running("a").await;
    for _ in 0..2 {
        bed.client.stop_container(stop(&id, 1)).await.unwrap();
    }
    assert_eq!(bed.status(&id).await.unwrap().exit_code, 143);
    for _ in 0..2 {
        bed.client.remove_container(remove(&id)).await.unwrap();
        bed.client.stop_container(stop(&id, 1)).await.unwrap();
    }
    refused(bed.status(&id).await, Code::NotFound, &id);
    let (_, id) = bed.running("b").await;
    bed.runtime.set_obedient(false);
    bed.client.stop_container(stop(&id, 0)).await.unwrap();
    assert_eq!(bed.status(&id).await.unwrap().exit_code, 137);
    let (_, id) = bed.running("d").await;
    bed.client.remove_container(remove(&id)).await.unwrap();
    refused(bed.status(&id).await, Code::NotFound, &id);
}

#[tokio::test]
async fn lists_are_narrowed_by_every_condition_at_once() {
    let mut bed = Bed::new().await;
    let (a, one) = bed.running("a").await;
    let (b, _) = bed.running("b").await;
    let two = bed.create(&b, Bed::container("second")).await.unwrap();
    let mut list = async |filter: v1::ContainerFilter| -> Vec<String> {
        let request = v1::ListContainersRequest {
            filter: Some(filter),
        };
        let answer = bed.client.list_containers(request).await.unwrap();
        let containers = answer.into_inner().containers;
        containers.into_iter().map(|item| item.id).collect()
    };
    let base = v1::ContainerFilter::default;
    assert_eq!(list(base()).await.len(), 3);
    let of = |pod_sandbox_id: &str| v1::ContainerFilter {
        pod_sandbox_id: pod_sandbox_id.into(),
        ..base()
    };
    assert_eq!(list(of(&a)).await, [one.as_str()]);
    let created = v1::ContainerFilter {
        state: Some(v1::ContainerStateValue {
            state: v1::ContainerState::ContainerCreated.into(),
        }),
        ..base()
    };
    assert_eq!(list(created.clone()).await, [two.as_str()]);
    let label = v1::ContainerFilter {
        label_selector: [("container".to_owned(), "second".to_owned())].into(),
        ..base()
    };
    assert_eq!(list(label).await, [two.as_str()]);
    let none = v1::ContainerFilter {
        pod_sandbox_id: a,
        ..created
    };
    assert!(list(none).await.is_empty());
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_with_its_field() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut cases: Vec<(v1::ContainerConfig, &str)> = Vec::new();
    let mut case = |name: &'static str, change: &dyn Fn(&mut v1::ContainerConfig)| {
        let mut config = Bed::container("x");
        change(&mut config);
        cases.push((config, name));
    };
    case("config.metadata.name", &|c| c.metadata = None);
    case("config.image.image", &|c| c.image = None);
    case("config.devices", &|c| c.devices.push(v1::Device::default()));
    case("config.CDI_devices", &|c| {
        c.cdi_devices.push(v1::CdiDevice::default());
    });
    case("config.log_path", &|c| c.log_path = "../x.log".into());
    case("config.envs[0].value", &|c| {
        c.envs.push(v1::KeyValue {
            key: "A".into(),
            value: vec![0xff],
        });
    });
    case("config.mounts[0].host_path: /etc/ssl", &|c| {
        c.mounts.push(v1::Mount {
            container_path: "/certs".into(),
            host_path: "/etc/ssl".into(),
            readonly: true,
            ..Default::default()
        });
    });
    case("hostPaths.copied", &|c| {
        c.mounts.push(v1::Mount {
            container_path: "/sock".into(),
            host_path: "/run/x.sock".into(),
            ..Default::default()
        });
    });
    case("config.mounts[0].readonly", &|c| {
        c.mounts.push(v1::Mount {
            container_path: "/image".into(),
            image: Some(v1::ImageSpec::default()),
            ..Default::default()
        });
    });
    case("namespace_options.pid: POD needs", &|c| {
        c.linux = Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption::default()),
                ..Default::default()
            }),
            ..Default::default()
        });
    });
    case("config.linux.resources.cpuset_cpus", &|c| {
        c.linux = Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                cpuset_cpus: "0-".into(),
                ..Default::default()
            }),
            ..Default::default()
        });
    });
    for (config, name) in cases {
        refused(
            bed.create(&sandbox, config).await,
            Code::InvalidArgument,
            name,
        );
    }
    refused(
        bed.create("none", Bed::container("x")).await,
        Code::NotFound,
        "none",
    );
    let mut config = Bed::container("x");
    config.mounts.push(image_mount("gone", ""));
    refused(
        bed.create(&sandbox, config).await,
        Code::FailedPrecondition,
        "ImageVolumeMountFailed: ",
    );
    let mut config = Bed::container("x");
    config.image.as_mut().unwrap().image = "gone".into();
    refused(bed.create(&sandbox, config).await, Code::NotFound, "gone");
    assert!(bed.runtime.volumes(&sandbox.parse().unwrap()).is_empty());
}

fn image_mount(image: &str, sub_path: &str) -> v1::Mount {
    v1::Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(v1::ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        image_sub_path: sub_path.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_device_that_is_refused_attaches_nothing() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut config = Bed::container("c");
    config.devices.push(v1::Device {
        host_path: "/dev/null".into(),
        container_path: "/dev/xvda".into(),
        permissions: "rwm".into(),
    });
    refused(
        bed.create(&sandbox, config).await,
        Code::InvalidArgument,
        "config.devices[0].host_path: ",
    );
    assert!(bed.runtime.list_containers(None).await.is_empty());
}

#[tokio::test]
async fn an_image_is_mounted_by_its_id_and_shown_with_it() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut config = Bed::container("c");
    config.mounts.push(image_mount("web", "etc"));
    let id = bed.create(&sandbox, config.clone()).await.unwrap();
    assert_eq!(bed.create(&sandbox, config).await.unwrap(), id);
    let status = bed.status(&id).await.unwrap();
    let shown = status.mounts[0].image.clone().unwrap();
    assert_eq!(shown.image, "web");
    assert_eq!(shown.image_ref, status.image_id);
    assert_eq!(status.mounts[0].image_sub_path, "etc");
    let made = bed.runtime.container(&id.parse().unwrap()).await.unwrap();
    let mount = &made.config.mounts[0];
    assert_eq!(
        (&mount.image, mount.sub_path.as_str()),
        (&shown.image_ref, "etc")
    );
    assert!(mount.readonly && mount.volume.is_empty());
}

#[tokio::test]
async fn the_kubelet_s_directories_travel_to_the_guest() {
    let mut bed = Bed::new().await;
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let volumes = bed.temp.path().join("kubelet/pods/uid-a/volumes");
    let token = volumes.join("kubernetes.io~projected/kube-api-access-1");
    let work = volumes.join("kubernetes.io~empty-dir/work");
    fs::create_dir_all(token.join("..2026_a")).unwrap();
    fs::create_dir_all(&work).unwrap();
    fs::write(token.join("..2026_a/token"), "secret").unwrap();
    symlink("..2026_a", token.join("..data")).unwrap();
    symlink("..data/token", token.join("token")).unwrap();
    let mount = |host: &std::path::Path, path: &str, readonly| v1::Mount {
        container_path: path.into(),
        host_path: host.to_str().unwrap().into(),
        readonly,
        ..Default::default()
    };
    let mut config = Bed::container("c");
    config.mounts = vec![
        mount(
            &token,
            "/var/run/secrets/kubernetes.io/serviceaccount",
            true,
        ),
        mount(&work, "/work", false),
    ];
    bed.create(&sandbox, config).await.unwrap();
    let volumes = bed.runtime.volumes(&sandbox.parse().unwrap());
    let VolumeKind::Files { files } = &volumes["projected.kube-api-access-1"].kind else {
        panic!("{volumes:?}");
    };
    assert_eq!(files["token"].content, "secret");
    assert!(matches!(
        volumes["empty-dir.work"].kind,
        VolumeKind::EmptyDir { .. }
    ));
}

#[tokio::test]
async fn a_command_is_waited_for_and_killed_when_it_is_late() {
    let mut bed = Bed::new().await;
    let (_, id) = bed.running("a").await;
    bed.runtime
        .on_exec(|_, config, _| match config.command[0].as_str() {
            "probe" => (b"out".to_vec(), b"err".to_vec(), 3),
            _ => (vec![b'x'; 20 << 20], Vec::new(), 0),
        });
    let exec = |cmd: &str, timeout| v1::ExecSyncRequest {
        container_id: id.clone(),
        cmd: match cmd {
            "" => Vec::new(),
            cmd => vec![cmd.into()],
        },
        timeout,
    };
    let answer = bed
        .client
        .exec_sync(exec("probe", 5))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (answer.stdout, answer.stderr),
        (b"out".to_vec(), b"err".to_vec())
    );
    assert_eq!(answer.exit_code, 3, "in the reply, not as an error");
    let mut big = bed.client.clone().max_decoding_message_size(16 << 20);
    let answer = big.exec_sync(exec("flood", 0)).await.unwrap().into_inner();
    assert!(
        (15 << 20..16 << 20).contains(&answer.stdout.len()),
        "bounded"
    );
    refused(
        bed.client.exec_sync(exec("", 0)).await,
        Code::InvalidArgument,
        "cmd",
    );
    bed.runtime.exit(&id.parse().unwrap(), 0);
    refused(
        bed.client.exec_sync(exec("probe", 5)).await,
        Code::FailedPrecondition,
        "not running",
    );
}

#[tokio::test]
async fn a_late_command_has_the_code_that_probes_understand() {
    let mut bed = Bed::new().await;
    let (_, id) = bed.running("a").await;
    // Blocks the exec until the call has been given up.
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    bed.runtime.on_exec(move |_, _, _| {
        held.lock()
            .unwrap()
            .recv_timeout(Duration::from_secs(60))
            .ok();
        (Vec::new(), Vec::new(), 0)
    });
    let request = v1::ExecSyncRequest {
        container_id: id,
        cmd: vec!["sleep".into()],
        timeout: 1,
    };
    refused(
        bed.client.exec_sync(request).await,
        Code::DeadlineExceeded,
        "killed",
    );
    release.send(()).unwrap();
}

#[tokio::test]
async fn new_limits_are_shown_and_what_is_not_named_stays() {
    let mut bed = Bed::new().await;
    let (_, id) = bed.running("a").await;
    let update = |change: &dyn Fn(&mut v1::LinuxContainerResources)| {
        let mut resources = v1::LinuxContainerResources::default();
        change(&mut resources);
        v1::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(resources),
            ..Default::default()
        }
    };
    let memory = update(&|r| r.memory_limit_in_bytes = 128 << 20);
    bed.client.update_container_resources(memory).await.unwrap();
    let cpu = update(&|r| {
        r.cpu_quota = 20_000;
        r.cpu_period = 100_000;
    });
    bed.client.update_container_resources(cpu).await.unwrap();
    let shown = bed
        .status(&id)
        .await
        .unwrap()
        .resources
        .unwrap()
        .linux
        .unwrap();
    assert_eq!(
        (shown.memory_limit_in_bytes, shown.cpu_quota),
        (128 << 20, 20_000)
    );
    let config = hypernetes_runtime::PodRuntime::container(&bed.runtime, &id.parse().unwrap())
        .await
        .unwrap()
        .config;
    assert_eq!(
        (
            config.resources.memory_limit,
            config.resources.cpu_limit_milli
        ),
        (128 << 20, 200)
    );
    let too_much = update(&|r| r.memory_limit_in_bytes = 1 << 40);
    refused(
        bed.client.update_container_resources(too_much).await,
        Code::InvalidArgument,
        "linux.memory_limit_in_bytes",
    );
}

#[tokio::test]
async fn a_log_is_written_and_goes_on_in_a_new_file() {
    let mut bed = Bed::new().await;
    let (_, id) = bed.running("a").await;
    let log = bed.logs("a").join("c/0.log");
    let say = |text: &'static str| {
        let output = Output::Stdout(text.into());
        bed.runtime.output(&id.parse().unwrap(), &output).unwrap();
    };
    say("one\n");
    fs::rename(&log, log.with_extension("1")).unwrap();
    let request = v1::ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    bed.client
        .reopen_container_log(request.clone())
        .await
        .unwrap();
    assert!(log.exists());
    say("two\n");
    let text = fs::read_to_string(&log).unwrap();
    assert!(
        text.ends_with(" stdout F two\n") && !text.contains("one"),
        "{text}"
    );
    bed.runtime.exit(&id.parse().unwrap(), 0);
    refused(
        bed.client.reopen_container_log(request).await,
        Code::FailedPrecondition,
        "not running",
    );
}

#[tokio::test]
async fn statistics_are_of_running_containers() {
    let mut bed = Bed::new().await;
    let (sandbox, id) = bed.running("a").await;
    bed.create(&sandbox, Bed::container("created"))
        .await
        .unwrap();
    bed.running("b").await;
    let request = v1::ContainerStatsRequest {
        container_id: id.clone(),
    };
    let stats = bed.client.container_stats(request.clone()).await.unwrap();
    let stats = stats.into_inner().stats.unwrap();
    let attributes = stats.attributes.unwrap();
    assert_eq!(
        (attributes.id, attributes.metadata.unwrap().name),
        (id.clone(), "c".into())
    );
    let (cpu, memory) = (stats.cpu.unwrap(), stats.memory.unwrap());
    assert!(cpu.timestamp > 0 && memory.timestamp > 0);
    assert_eq!(cpu.usage_core_nano_seconds.unwrap().value, 1_000_000_000);
    assert_eq!(memory.working_set_bytes.unwrap().value, 1 << 20);

    let all = bed
        .client
        .list_container_stats(v1::ListContainerStatsRequest::default())
        .await;
    assert_eq!(all.unwrap().into_inner().stats.len(), 2);
    let filter = v1::ContainerStatsFilter {
        pod_sandbox_id: sandbox.clone(),
        ..Default::default()
    };
    let request_list = v1::ListContainerStatsRequest {
        filter: Some(filter),
    };
    let of_one = bed.client.list_container_stats(request_list).await.unwrap();
    assert_eq!(of_one.into_inner().stats.len(), 1);
    let pod = v1::PodSandboxStatsRequest {
        pod_sandbox_id: sandbox,
    };
    let pod = bed
        .client
        .pod_sandbox_stats(pod)
        .await
        .unwrap()
        .into_inner();
    let linux = pod.stats.unwrap().linux.unwrap();
    let network = linux.network.unwrap().default_interface.unwrap();
    assert_eq!(
        (network.name.as_str(), network.tx_bytes.unwrap().value),
        ("eth0", 200)
    );
    assert_eq!(linux.containers.len(), 1);
    let pods = bed
        .client
        .list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest::default())
        .await;
    assert_eq!(pods.unwrap().into_inner().stats.len(), 2);
    bed.runtime.exit(&id.parse().unwrap(), 0);
    refused(
        bed.client.container_stats(request).await,
        Code::FailedPrecondition,
        "not running",
    );
}
