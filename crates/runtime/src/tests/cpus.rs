//! Containers that name CPUs of the host.

use std::time::Duration;

use hypernetes_agent_api::fake::{Behaviour, Method};
use hypernetes_types::CpuSet;

use crate::{
    testing::{World, container_config, exited, running},
    *,
};

/// The first and the last CPU of the host, which may be the same.
fn first_and_last() -> (CpuSet, CpuSet) {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let online: CpuSet = online.trim().parse().unwrap();
    let one = |cpu: Option<u32>| CpuSet::from_iter(cpu);
    (one(online.iter().next()), one(online.iter().last()))
}

fn named(name: &str, cpus: &CpuSet) -> ContainerConfig {
    let mut config = container_config(name);
    config.resources.cpuset_cpus = cpus.clone();
    config
}

#[tokio::test]
async fn a_vm_runs_on_the_cpus_of_all_its_containers() {
    let (first, last) = first_and_last();
    let mut both = first.clone();
    both.extend(&last);
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, plain) = running(&world, &runtime, "a").await;
    let cpus = || world.vmm.cpus(&sandbox);
    assert_eq!(cpus(), None);
    let one = named("one", &first);
    let one = runtime.create_container(&sandbox, one).await.unwrap();
    assert_eq!(cpus().as_ref(), Some(&first));
    let two = named("two", &last);
    let two = runtime.create_container(&sandbox, two).await.unwrap();
    assert_eq!(cpus().as_ref(), Some(&both));
    runtime.start_container(&two).await.unwrap();

    // Whoever comes after a restart knows it, and puts right what was cut off.
    drop(runtime);
    let runtime = world.open().await;
    assert_eq!(cpus().as_ref(), Some(&both));
    let none = Duration::ZERO;
    runtime.stop_container(&two, none).await.unwrap();
    exited(&runtime, &two).await;
    runtime.remove_container(&two).await.unwrap();
    assert_eq!(cpus().as_ref(), Some(&first));

    // An update the guest refuses changes nothing; one that it takes moves the VM.
    let update = |cpus: &CpuSet| ContainerUpdate {
        resources: named("one", cpus).resources,
        memo: String::new(),
        host: None,
    };
    let agent = world.agent(&sandbox);
    let failure = Behaviour::Fail(tonic::Code::Internal, "no".into());
    agent.set_behaviour(Method::UpdateContainer, failure);
    assert!(runtime.update_container(&one, update(&last)).await.is_err());
    assert_eq!(cpus().as_ref(), Some(&first));
    agent.set_behaviour(Method::UpdateContainer, Behaviour::Normal);
    runtime.update_container(&one, update(&last)).await.unwrap();
    assert_eq!(cpus().as_ref(), Some(&last));
    runtime.remove_container(&one).await.unwrap();
    assert_eq!(cpus(), None);
    assert_eq!(
        runtime.container(&plain).await.unwrap().state,
        ContainerState::Running
    );
}

#[tokio::test]
async fn cpus_and_nodes_that_are_not_there_are_refused_by_name() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, plain) = running(&world, &runtime, "a").await;
    let far: CpuSet = "8000".parse().unwrap();
    let mut nodes = container_config("nodes");
    nodes.resources.cpuset_mems = far.clone();
    for (config, field) in [(named("one", &far), "cpuset_cpus"), (nodes, "cpuset_mems")] {
        let error = runtime.create_container(&sandbox, config.clone()).await;
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with(&format!("invalid {field}: ")), "{error}");
        let update = ContainerUpdate {
            resources: config.resources,
            memo: String::new(),
            host: None,
        };
        let error = runtime.update_container(&plain, update).await.unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    assert_eq!(world.vmm.cpus(&sandbox), None);
    assert_eq!(runtime.list_containers(None).await.len(), 1);
}
