//! VMs that wait for a sandbox, and what becomes of them.

use std::sync::atomic::Ordering;

use hypernetes_vmm::VmExit;

use crate::{
    testing::{World, eventually, running},
    *,
};

/// A runtime with one template and a full pool.
async fn filled(world: &mut World, pool: usize) -> NodeRuntime {
    world.templates = 1;
    world.pool = pool;
    let runtime = world.open().await;
    runtime
        .make_template(1, 128, VmExtras::default())
        .await
        .unwrap();
    full(&runtime).await;
    runtime
}

async fn full(runtime: &NodeRuntime) {
    eventually("a full pool", || async { runtime.pool_is_full() }).await;
}

#[tokio::test]
async fn a_sandbox_gets_a_vm_that_waits_and_another_follows() {
    let mut world = World::new().await;
    let runtime = filled(&mut world, 2).await;
    let waiting = world.vmm.sandboxes();
    assert_eq!(waiting.len(), 2);
    for id in &waiting {
        assert_eq!(world.vmm.standing(id), Some((true, None)));
        assert!(world.agent(id).sandbox().is_none(), "it is nobody's");
    }
    let mut config = world.sandbox("a");
    config.cgroup_parent = Some("tenants/acme".into());
    let sandbox = runtime.run_sandbox(config.clone()).await.unwrap();
    assert!(waiting.contains(&sandbox), "it has the id of the VM");
    let timing = runtime.start_timing(&sandbox).await.unwrap();
    assert!(timing.from_pool && timing.from_template, "{timing:?}");
    let cgroup = format!("tenants/acme/{sandbox}");
    assert_eq!(world.vmm.standing(&sandbox), Some((false, Some(cgroup))));
    assert_eq!(world.vmm.disks(&sandbox), Some(vec![1]));
    let configured = world.agent(&sandbox).sandbox().unwrap();
    assert_eq!(configured.hostname, "a");
    assert_eq!(configured.interfaces[0].device_mac, "02:00:00:00:00:00");
    // Asked for again it is the same sandbox, and takes no other VM.
    assert_eq!(runtime.run_sandbox(config).await.unwrap(), sandbox);
    full(&runtime).await;
    assert_eq!(world.vmm.sandboxes().len(), 3);
    let pool = runtime.figures().await.pool;
    assert_eq!((pool.idle, pool.hits, pool.misses), (2, 1, 0));
    assert_eq!(runtime.figures().await.starts.from_pool, 1);

    runtime.drain().await;
    let left = world.vmm.sandboxes();
    assert_eq!(left, std::slice::from_ref(&sandbox));
    drop(runtime);
    // The VM that was taken outlives the runtime, and the next one finds it.
    world.pool = 0;
    let runtime = world.open().await;
    let report = runtime.recovery_report();
    assert_eq!((report.adopted, report.orphans), (1, 0));
    runtime.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(runtime.free_uids(), 8);
    world.assert_clean().await;
}

#[tokio::test]
async fn what_waits_when_the_runtime_dies_is_swept_by_the_next() {
    let mut world = World::new().await;
    let runtime = filled(&mut world, 2).await;
    drop(runtime);
    assert_eq!(world.vmm.sandboxes().len(), 2);
    world.pool = 0;
    let runtime = world.open().await;
    assert_eq!(runtime.recovery_report().orphans, 2);
    assert_eq!(runtime.free_uids(), 8);
    world.assert_clean().await;
}

#[tokio::test]
async fn a_vm_that_has_ended_is_given_to_nobody() {
    let mut world = World::new().await;
    let runtime = filled(&mut world, 1).await;
    for id in world.vmm.sandboxes() {
        world.vmm.end(&id, VmExit::Shutdown);
    }
    let (sandbox, _container) = running(&world, &runtime, "a").await;
    let timing = runtime.start_timing(&sandbox).await.unwrap();
    assert!(timing.from_template && !timing.from_pool, "{timing:?}");
    full(&runtime).await;
    assert_eq!(runtime.figures().await.pool.misses, 1);
    runtime.remove_sandbox(&sandbox).await.unwrap();
    runtime.drain().await;
    assert_eq!(runtime.free_uids(), 8);
    world.assert_clean().await;
}

#[tokio::test]
async fn a_vm_that_cannot_be_used_is_no_reason_for_a_pod_to_fail() {
    let mut world = World::new().await;
    let runtime = filled(&mut world, 1).await;
    world.refuse_plugs.store(1, Ordering::SeqCst);
    let (sandbox, _container) = running(&world, &runtime, "a").await;
    let timing = runtime.start_timing(&sandbox).await.unwrap();
    assert!(timing.from_template && !timing.from_pool, "{timing:?}");
    runtime.remove_sandbox(&sandbox).await.unwrap();
    runtime.drain().await;
    world.assert_clean().await;
}

#[tokio::test]
async fn another_shape_takes_nothing_from_the_pool() {
    let mut world = World::new().await;
    let runtime = filled(&mut world, 1).await;
    let waiting = world.vmm.sandboxes();
    let mut config = world.sandbox("a");
    config.memory_mib = 256;
    let sandbox = runtime.run_sandbox(config).await.unwrap();
    assert!(!waiting.contains(&sandbox));
    assert_eq!(world.vmm.is_restored(&sandbox), Some(false));
    let pool = runtime.figures().await.pool;
    assert_eq!((pool.idle, pool.misses), (1, 1));
    runtime.remove_sandbox(&sandbox).await.unwrap();
    runtime.drain().await;
    world.assert_clean().await;
}
