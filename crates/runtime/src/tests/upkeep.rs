//! What is done to containers while they run: rotation of logs, new limits, statistics.

use std::time::Duration;

use hypernetes_agent_api::fake::{Behaviour, Method};

use crate::{
    testing::{STDOUT, World, eventually, exited, running},
    *,
};

fn lines(path: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| line.splitn(4, ' ').nth(3).unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_log_that_was_taken_away_goes_on_in_a_new_file_also_after_a_restart() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let log = runtime.container(&container).await.unwrap().log_path;
    let rotated = log.with_extension("1");
    agent.output(container.as_str(), STDOUT, b"one\ntwo\nunfin");
    eventually("two lines", async || lines(&log).len() == 2).await;
    std::fs::rename(&log, &rotated).unwrap();
    runtime.reopen_log(&container).await.unwrap();
    assert_eq!(std::fs::metadata(&log).unwrap().len(), 0);
    agent.output(container.as_str(), STDOUT, b"ished\nfour\n");
    eventually("two more", async || lines(&log).len() == 2).await;
    assert_eq!(lines(&log), ["unfinished", "four"]);
    assert_eq!(lines(&rotated), ["one", "two"]);
    // Nothing to do, nothing done.
    runtime.reopen_log(&container).await.unwrap();
    assert_eq!(lines(&log).len(), 2);

    drop(runtime);
    let runtime = world.open().await;
    agent.output(container.as_str(), STDOUT, b"five\n");
    eventually("the fifth line", async || lines(&log).len() == 3).await;
    assert_eq!(lines(&log), ["unfinished", "four", "five"]);
    agent.exit(container.as_str(), 0);
    exited(&runtime, &container).await;
    assert!(runtime.reopen_log(&container).await.is_err());
}

/// What became of the log while no node ran.
enum Fate {
    /// Renamed, as the kubelet does before it asks for a new one.
    Renamed,
    Deleted,
    /// Deleted, and the node's own note of it too.
    Forgotten,
}

#[tokio::test]
async fn a_log_that_went_away_while_no_node_ran_goes_on_with_the_next_byte() {
    for fate in [Fate::Renamed, Fate::Deleted, Fate::Forgotten] {
        let world = World::new().await;
        let runtime = world.open().await;
        let (sandbox, container) = running(&world, &runtime, "a").await;
        let agent = world.agent(&sandbox);
        let log = runtime.container(&container).await.unwrap().log_path;
        let rotated = log.with_extension("log.20260102-030405");
        agent.output(container.as_str(), STDOUT, b"one\ntwo\nunfin");
        let freed = || async { agent.acked(container.as_str(), STDOUT) == Some(8) };
        eventually("the guest may forget two lines", freed).await;
        drop(runtime);
        match fate {
            Fate::Renamed => std::fs::rename(&log, &rotated).unwrap(),
            Fate::Deleted => std::fs::remove_file(&log).unwrap(),
            Fate::Forgotten => {
                std::fs::remove_file(&log).unwrap();
                let directory = format!("state/sandboxes/{sandbox}/logs");
                std::fs::remove_dir_all(world.temp.path().join(&directory)).unwrap();
                std::fs::create_dir(world.temp.path().join(&directory)).unwrap();
            }
        }
        agent.output(container.as_str(), STDOUT, b"ished\n");
        let runtime = world.open().await;
        eventually("the third line", async || lines(&log).len() == 1).await;
        // The kubelet asks in the end.
        runtime.reopen_log(&container).await.unwrap();
        agent.output(container.as_str(), STDOUT, b"four\n");
        eventually("the fourth line", async || lines(&log).len() == 2).await;
        assert_eq!(lines(&log), ["unfinished", "four"]);
        if matches!(fate, Fate::Renamed) {
            assert_eq!(lines(&rotated), ["one", "two"]);
        }
        agent.exit(container.as_str(), 0);
        exited(&runtime, &container).await;
    }
}

#[tokio::test]
async fn limits_change_in_the_guest_and_in_the_record() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let update = ContainerUpdate {
        resources: ResourceConfig {
            memory_limit: 64 << 20,
            cpu_limit_milli: 500,
            ..ResourceConfig::default()
        },
        memo: "new".into(),
        host: None,
    };
    runtime
        .update_container(&container, update.clone())
        .await
        .unwrap();
    let mut requests = world.agent(&sandbox).containers();
    let request = requests.remove(container.as_str()).unwrap();
    let limits = request.resources.unwrap();
    assert_eq!((limits.memory_limit, limits.cpu_quota), (64 << 20, 50_000));
    drop(runtime);
    let runtime = world.open().await;
    let config = runtime.container(&container).await.unwrap().config;
    assert_eq!(
        (config.resources, config.memo),
        (update.resources.clone(), "new".into())
    );
    world.agent(&sandbox).exit(container.as_str(), 0);
    exited(&runtime, &container).await;
    let late = runtime.update_container(&container, update).await;
    assert!(matches!(late, Err(RuntimeError::State { .. })));
}

#[tokio::test]
async fn statistics_come_from_the_guest() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let stats = runtime.stats(&sandbox).await.unwrap();
    assert_eq!(stats.containers.len(), 1);
    assert_eq!(stats.containers[0].id, container);
    assert!(stats.unix_nanos > 0 && stats.memory_total > stats.memory_available);
    assert!(world.agent(&sandbox).calls().contains(&Method::Stats));
    runtime.stop_sandbox(&sandbox).await.unwrap();
    assert!(runtime.stats(&sandbox).await.is_err());
}

#[tokio::test]
async fn an_image_in_use_stays() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (_, container) = running(&world, &runtime, "a").await;
    let image = runtime.container(&container).await.unwrap().config.image;
    let refused = runtime.remove_image(&image).await;
    assert!(matches!(
        refused,
        Err(RuntimeError::Image(hypernetes_image::ImageError::InUse(_)))
    ));
    runtime.remove_container(&container).await.unwrap();
    runtime.remove_image(&image).await.unwrap();
    assert!(runtime.image(&image).await.is_none());
}

fn larger(vcpus: u32, memory_mib: u32) -> SandboxUpdate {
    SandboxUpdate {
        vcpus,
        memory_mib,
        memo: None,
    }
}

#[tokio::test]
async fn a_vm_changes_its_size_within_what_was_planned_and_the_record_tells() {
    let world = World::new().await;
    let runtime = world.open().await;
    let mut config = world.sandbox("a");
    let (vcpus, memory_mib) = (config.vcpus, config.memory_mib);
    config.extras = VmExtras {
        max_vcpus: vcpus + 2,
        max_memory_mib: memory_mib + 512,
        shares: false,
    };
    let sandbox = runtime.run_sandbox(config).await.unwrap();
    let most = larger(vcpus + 2, memory_mib + 512);
    for (bad, name) in [
        (larger(0, memory_mib), "vcpus"),
        (larger(vcpus + 3, memory_mib), "vcpus"),
        (larger(vcpus, memory_mib + 513), "memory_mib"),
    ] {
        let refused = runtime.resize_sandbox(&sandbox, bad).await;
        assert!(
            matches!(&refused, Err(RuntimeError::Invalid { field, .. }) if field == name),
            "{refused:?}"
        );
    }
    runtime
        .resize_sandbox(&sandbox, most.clone())
        .await
        .unwrap();
    assert_eq!(world.vmm.extra_memory(&sandbox), Some(512));
    assert!(world.agent(&sandbox).calls().contains(&Method::Resize));

    drop(runtime);
    let runtime = world.open().await;
    let status = runtime.sandbox(&sandbox).await.unwrap();
    assert_eq!(
        (status.vcpus, status.memory_mib),
        (vcpus + 2, memory_mib + 512)
    );
    assert_eq!(status.config.memory_mib, memory_mib, "as it was asked for");
    let resizes = || {
        let calls = world.agent(&sandbox).calls();
        calls.iter().filter(|call| **call == Method::Resize).count()
    };
    let before = resizes();
    // What is so already is not asked of the guest again.
    runtime.resize_sandbox(&sandbox, most).await.unwrap();
    assert_eq!(resizes(), before);
    let memo = SandboxUpdate {
        memo: Some("new".into()),
        ..larger(vcpus, memory_mib)
    };
    runtime.resize_sandbox(&sandbox, memo).await.unwrap();
    assert_eq!(world.vmm.extra_memory(&sandbox), Some(0));
    assert_eq!(runtime.sandbox(&sandbox).await.unwrap().config.memo, "new");
}

#[tokio::test]
async fn a_path_of_the_host_is_shared_once_and_only_where_that_was_planned() {
    let world = World::new().await;
    let runtime = world.open().await;
    let plain = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let share = || HostShare {
        source: std::fs::File::open("/").unwrap().into(),
        read_only: false,
        recursive: false,
        follow_mounts: false,
    };
    let refused = runtime.share(&plain, share()).await;
    assert!(
        matches!(refused, Err(RuntimeError::Invalid { field, .. }) if field == "extras.shares")
    );
    let mut config = world.sandbox("b");
    config.extras.shares = true;
    let sandbox = runtime.run_sandbox(config).await.unwrap();
    let name = runtime.share(&sandbox, share()).await.unwrap();
    drop(runtime);
    let runtime = world.open().await;
    assert_eq!(runtime.share(&sandbox, share()).await.unwrap(), name);
    let other = HostShare {
        read_only: true,
        ..share()
    };
    assert_ne!(runtime.share(&sandbox, other).await.unwrap(), name);
    assert_eq!(world.vmm.shares(&sandbox), Some(2));
    let volume = &world.agent(&sandbox).volumes()[SHARED_VOLUME];
    assert!(matches!(
        volume.kind,
        Some(hypernetes_agent_api::v1::volume::Kind::Shared(_))
    ));
}

#[tokio::test]
async fn a_guest_s_clock_is_put_right() {
    let mut world = World::new().await;
    world.deadlines.beat = Duration::from_millis(20);
    let runtime = world.open().await;
    let (sandbox, _) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    for hours in [1, -2] {
        agent.set_clock_ahead(hours * 3_600_000_000_000);
        let right = || async { agent.clock_ahead().abs() < 100_000_000 };
        eventually("a clock that is right", right).await;
    }
    // A guest that does not change it is left alone, and asked again.
    let no = Behaviour::Fail(tonic::Code::Internal, "no".into());
    agent.set_behaviour(Method::Clock, no);
    let asked = || {
        agent
            .calls()
            .iter()
            .filter(|call| **call == Method::Clock)
            .count()
    };
    let before = asked();
    eventually("more questions", || async { asked() > before + 2 }).await;
}

#[tokio::test]
async fn a_guest_that_falls_silent_is_noticed_without_being_called() {
    let mut world = World::new().await;
    world.deadlines.beat = Duration::from_millis(20);
    world.deadlines.call = Duration::from_millis(300);
    world.deadlines.silent = Duration::from_millis(100);
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let state = || async { runtime.container(&container).await.unwrap().state };
    agent.set_behaviour(Method::Hello, Behaviour::Stall);
    agent.set_behaviour(Method::Clock, Behaviour::Stall);
    eventually("an unknown state", || async {
        state().await == ContainerState::Unknown
    })
    .await;
    agent.set_behaviour(Method::Clock, Behaviour::Normal);
    agent.set_behaviour(Method::Hello, Behaviour::Normal);
    eventually("a running container", || async {
        state().await == ContainerState::Running
    })
    .await;
}
