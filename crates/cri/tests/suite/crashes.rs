//! The daemon dies between any two calls, and every call may be repeated.

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods, eventually};

use crate::client::{Client, PATIENCE, end, log_content, log_dir, sandbox, shell};

/// SIGKILL, and a new daemon.
async fn crash(node: &mut Node) -> Client {
    node.kill();
    node.spawn();
    Client::of(node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_s_life_with_a_crash_after_each_call() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.4.0/24", "templates: 1\n");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    client = crash(&mut node).await;
    let list = v1::ListImagesRequest::default();
    let images = client
        .images
        .list_images(list)
        .await
        .unwrap()
        .into_inner()
        .images;
    assert_eq!((images.len(), &images[0].id), (1, &image));

    let config = sandbox(&node, "phoenix");
    let pod = client.run(&config).await;
    client = crash(&mut node).await;
    assert_eq!(client.run(&config).await, pod);
    let status = client.sandbox_status(&pod).await;
    assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);

    let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done";
    let container = shell("main", &image, script);
    let id = client.create(&pod, &config, &container).await;
    client = crash(&mut node).await;
    assert_eq!(client.create(&pod, &config, &container).await, id);
    assert_eq!(
        client.status(&id).await.state(),
        v1::ContainerState::ContainerCreated
    );

    client.start(&id).await;
    client = crash(&mut node).await;
    client.start(&id).await;
    let running = client.status(&id).await;
    assert_eq!(running.state(), v1::ContainerState::ContainerRunning);

    let (first, _) = client
        .exec(
            &id,
            "echo $$ > /tmp/mark; cat /proc/1/stat | cut -d' ' -f22",
        )
        .await;
    client = crash(&mut node).await;
    let (again, _) = client
        .exec(&id, "test -s /tmp/mark; cat /proc/1/stat | cut -d' ' -f22")
        .await;
    assert_eq!(first, again, "the container was started anew");

    let update = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 48 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    let update_again = update.clone();
    client
        .runtime
        .update_container_resources(update)
        .await
        .unwrap();
    client = crash(&mut node).await;
    client
        .runtime
        .update_container_resources(update_again)
        .await
        .unwrap();
    let resources = client.status(&id).await.resources.unwrap().linux.unwrap();
    assert_eq!(resources.memory_limit_in_bytes, 48 << 20);
    let (limit, _) = client.exec(&id, "cat /sys/fs/cgroup/memory.max").await;
    assert_eq!(limit.trim(), (48 << 20).to_string());

    let log = log_dir(&node, "phoenix").join("main.log");
    let rotated = log.with_extension("old");
    std::fs::rename(&log, &rotated).unwrap();
    let reopen = || v1::ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    client.runtime.reopen_container_log(reopen()).await.unwrap();
    client = crash(&mut node).await;
    client.runtime.reopen_container_log(reopen()).await.unwrap();
    eventually("the new log is written", PATIENCE, || {
        let length = std::fs::metadata(&log).map_or(0, |metadata| metadata.len());
        (length > 0).then_some(()).ok_or("it is empty".to_owned())
    });

    let stop = || v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 0,
    };
    client.runtime.stop_container(stop()).await.unwrap();
    client = crash(&mut node).await;
    client.runtime.stop_container(stop()).await.unwrap();
    let ended = client.status(&id).await;
    assert_eq!(
        (ended.state(), ended.exit_code),
        (v1::ContainerState::ContainerExited, 137)
    );
    assert!(ended.started_at == running.started_at && ended.finished_at > ended.started_at);

    // No line is missing, none is there twice.
    let mut text = Vec::new();
    for file in [&rotated, &log] {
        log_content(file, |content| text.extend_from_slice(content));
    }
    let text = String::from_utf8(text).unwrap();
    let count = text.lines().count();
    let wanted: Vec<_> = (0..count).map(|number| format!("line {number}")).collect();
    assert_eq!(text.lines().collect::<Vec<_>>(), wanted);
    assert!(count > 10, "{count} lines");

    let remove = || v1::RemoveContainerRequest {
        container_id: id.clone(),
    };
    client.runtime.remove_container(remove()).await.unwrap();
    client = crash(&mut node).await;
    client.runtime.remove_container(remove()).await.unwrap();
    let all = v1::ListContainersRequest::default();
    let left = client
        .runtime
        .list_containers(all)
        .await
        .unwrap()
        .into_inner()
        .containers;
    assert!(left.is_empty(), "{left:?}");

    client.stop(&pod).await;
    client = crash(&mut node).await;
    client.stop(&pod).await;
    let status = client.sandbox_status(&pod).await;
    assert_eq!(status.state(), v1::PodSandboxState::SandboxNotready);
    client.remove(&pod).await;
    client = crash(&mut node).await;
    client.remove(&pod).await;
    let all = v1::ListPodSandboxRequest::default();
    let left = client
        .runtime
        .list_pod_sandbox(all)
        .await
        .unwrap()
        .into_inner()
        .items;
    assert!(left.is_empty(), "{left:?}");
    node.stop();
    assert!(node.host_picture().is_clean(), "{:?}", node.host_picture());
}

/// What the kernel of a pod says is there, also from before a crash of the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_s_words_are_kept() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.7.0/24", "templates: 0\n");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "speaker");
    let pod = client.run(&config).await;
    let script = "echo '<0>first words' > /dev/kmsg; sleep 100000";
    let mut container = shell("main", &image, script);
    container.linux.as_mut().unwrap().security_context = Some(v1::LinuxContainerSecurityContext {
        privileged: true,
        ..Default::default()
    });
    let id = client.create(&pod, &config, &container).await;
    client.start(&id).await;
    let reads = |node: &Node, pod: &str, words: &str| {
        eventually("the console has the words", PATIENCE, || {
            // A daemon that has just started may not answer the operator yet.
            let output = node.hypernetes(&["console", pod]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.contains(words)
                .then_some(())
                .ok_or_else(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
        });
    };
    reads(&node, "default/speaker", "first words");
    let mut client = crash(&mut node).await;
    let (_, code) = client.exec(&id, "echo '<0>second words' > /dev/kmsg").await;
    assert_eq!(code, 0);
    reads(&node, &pod[..12], "second words");
    reads(&node, &pod, "first words");
    let unknown = node
        .hypernetes(&["console", "default/nobody"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&unknown.stderr);
    assert!(
        !unknown.status.success() && error.contains("default/nobody"),
        "{error}"
    );
    end(&mut node, client, &pod).await;
}

/// Kills while calls are under way: what was answered holds, what was not can be repeated.
#[tokio::test(flavor = "multi_thread")]
async fn crashes_within_calls() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.5.0/24", "templates: 1\n");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    for round in 0..6_u32 {
        let config = sandbox(&node, &format!("round-{round}"));
        let (mut caller, wanted) = (client.clone(), config.clone());
        let call = tokio::spawn(async move { caller.try_run(&wanted).await });
        // At another step of the start in each round.
        tokio::time::sleep(std::time::Duration::from_millis(u64::from(round) * 150)).await;
        client = crash(&mut node).await;
        let answered = call.await.unwrap().ok();
        let pod = client.run(&config).await;
        if let Some(answered) = answered {
            assert_eq!(answered, pod);
        }
        let id = client
            .create(&pod, &config, &shell("main", &image, "exit 7"))
            .await;
        client.start(&id).await;
        assert_eq!(client.ended(&id, PATIENCE).await.exit_code, 7);
        let (mut caller, doomed) = (client.clone(), pod.clone());
        let call = tokio::spawn(async move {
            let pod_sandbox_id = doomed;
            let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
            caller.runtime.remove_pod_sandbox(request).await.ok();
        });
        tokio::time::sleep(std::time::Duration::from_millis(u64::from(round) * 40)).await;
        client = crash(&mut node).await;
        call.await.unwrap();
        client.remove(&pod).await;
    }
    let all = v1::ListPodSandboxRequest::default();
    let left = client
        .runtime
        .list_pod_sandbox(all)
        .await
        .unwrap()
        .into_inner()
        .items;
    assert!(left.is_empty(), "{left:?}");
    node.stop();
    assert!(node.host_picture().is_clean(), "{:?}", node.host_picture());
}
