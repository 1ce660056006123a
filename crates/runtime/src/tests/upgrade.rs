//! Pods of earlier releases are taken over with their records, and records of later ones are refused.

use std::path::Path;

use hypernetes_agent_api::v1;
use hypernetes_network::{NetworkDriver, PodNetworkRequest};
use hypernetes_store::{Durability, Op, Value};
use hypernetes_vmm::{Origin, VmSpec, Vmm};
use hypernetes_volume::{VolumeDriver, VolumeMode};
use serde_json::{Value as Json, json};

use crate::{
    link,
    records::{ContainerRecord, SandboxRecord},
    testing::{STDOUT, World, eventually, exited},
    *,
};

/// See `recorded/README.md`.
const RECORDED: [(u32, &str); 8] = [
    (1, include_str!("recorded/v1.json")),
    (2, include_str!("recorded/v2.json")),
    (3, include_str!("recorded/v3.json")),
    (4, include_str!("recorded/v4.json")),
    (5, include_str!("recorded/v5.json")),
    (6, include_str!("recorded/v6.json")),
    (7, include_str!("recorded/v7.json")),
    (8, include_str!("recorded/v8.json")),
];
const RUNNING: &str = "22222222222222222222222222222222";
const ENDED: &str = "33333333333333333333333333333333";

async fn put(world: &World, key: &str, value: &Json) {
    let value = Value::Bytes(value.to_string().into());
    let ops = vec![Op::Put(key.into(), value)];
    world
        .store
        .txn(vec![], ops, Durability::Sync)
        .await
        .unwrap();
}

/// A node as the earlier release left it: the VM runs, its guest has the containers.
async fn left_behind(text: &str) -> World {
    let world = World::new().await;
    let mut recorded: Json = serde_json::from_str(text).unwrap();
    let logs = world.temp.path().join("logs/web");
    std::fs::create_dir_all(&logs).unwrap();
    recorded["sandbox"]["config"]["log_directory"] = json!(logs);
    let sandbox: SandboxRecord = serde_json::from_value(recorded["sandbox"].clone()).unwrap();
    let network = "acme.default".parse().unwrap();
    let wish = PodNetworkRequest::default();
    let attached = world
        .network
        .attach(&sandbox.id, &network, &wish)
        .await
        .unwrap();
    assert_eq!(
        Some(attached.lease.address),
        sandbox.lease.as_ref().map(|it| it.address)
    );
    for disk in &sandbox.attached {
        let (id, pod) = (&disk.volume, sandbox.id.as_str());
        let mode = VolumeMode::Filesystem;
        world.volumes.create(id, 1 << 20, mode).await.unwrap();
        world.volumes.attach(id, pod, disk.read_only).await.unwrap();
    }
    let containers: Vec<ContainerRecord> =
        serde_json::from_value(recorded["containers"].clone()).unwrap();
    let slots = containers.iter().flat_map(ContainerRecord::all_slots);
    let mut slots: Vec<u32> = slots.chain(sandbox.disk_slots()).chain([1]).collect();
    slots.sort_unstable();
    slots.dedup();
    let config = world.config();
    let null = || std::fs::File::open("/dev/null").unwrap();
    let run_dir = world.temp.path().join("run").join(sandbox.id.as_str());
    std::fs::create_dir_all(&run_dir).unwrap();
    let spec = VmSpec {
        sandbox: sandbox.id.clone(),
        kernel: config.kernels.prepare(None, Path::new("")).await.unwrap(),
        origin: Origin::Kernel,
        vcpus: 1,
        memory_mib: 128,
        extras: VmExtras::default(),
        net: None,
        disks: slots
            .into_iter()
            .map(|slot| hypernetes_vmm::Disk {
                slot,
                file: null(),
                read_only: false,
            })
            .collect(),
        run_dir,
        uid: sandbox.uid,
        cgroup: None,
        ephemeral: false,
    };
    let vm = world.vmm.launch(spec).await.unwrap();
    recorded["sandbox"]["vm"] = serde_json::to_value(vm.record()).unwrap();
    let call = config.deadlines.call;
    let guest = link::connect_when_up(vm.as_ref(), call).await;
    guest
        .configure_sandbox(Default::default(), call)
        .await
        .unwrap();
    for container in &containers {
        let create = v1::CreateContainerRequest {
            id: container.id.to_string(),
            layer_slots: container.layers.iter().map(|layer| layer.slot).collect(),
            ..Default::default()
        };
        guest.create_container(create, call).await.unwrap();
        let id = container.id.to_string();
        guest
            .start_container(v1::StartContainerRequest { id }, call)
            .await
            .unwrap();
    }
    world.agent(&sandbox.id).exit(ENDED, 7);
    put(
        &world,
        &format!("/node/sandboxes/{}", sandbox.id),
        &recorded["sandbox"],
    )
    .await;
    for container in recorded["containers"].as_array().unwrap() {
        let key = format!("/node/containers/{}", container["id"].as_str().unwrap());
        put(&world, &key, container).await;
    }
    std::fs::create_dir_all(
        config
            .state_dir
            .join("sandboxes")
            .join(sandbox.id.as_str())
            .join("logs"),
    )
    .unwrap();
    world
}

#[tokio::test]
async fn a_pod_of_every_earlier_release_runs_on_and_can_be_used_and_removed() {
    for (version, text) in RECORDED {
        let world = left_behind(text).await;
        let runtime = world.open().await;
        let report = runtime.recovery_report();
        assert_eq!((report.adopted, report.lost), (1, 0), "version {version}");
        let [sandbox] = &runtime.list_sandboxes().await[..] else {
            panic!("version {version}");
        };
        assert_eq!(sandbox.state, SandboxState::Ready, "version {version}");
        let (running, ended) = (RUNNING.parse().unwrap(), ENDED.parse().unwrap());
        let runs = || async {
            let status = runtime.container(&running).await;
            status.is_some_and(|status| status.state == ContainerState::Running)
        };
        eventually("the container runs on", runs).await;
        let status = runtime.container(&ended).await.unwrap();
        assert_eq!(
            (status.state, status.exit_code),
            (ContainerState::Exited, 7)
        );
        assert_eq!(status.finished_unix_nanos, 1_764_000_000_000_000_009);

        let agent = world.agent(&sandbox.id);
        agent.output(RUNNING, STDOUT, b"still here\n");
        let logged = || async { world.log("web", "run", "stdout") == "still here\n" };
        eventually("its log goes on", logged).await;
        let command = ExecConfig {
            command: vec!["true".into()],
            ..ExecConfig::default()
        };
        let mut session = runtime.exec(&running, command).await.unwrap();
        while session.output.recv().await.is_some() {}
        assert_eq!(session.exit.await.unwrap().unwrap(), 0, "version {version}");
        let another = crate::testing::container_config("another");
        let another = runtime
            .create_container(&sandbox.id, another)
            .await
            .unwrap();
        runtime.start_container(&another).await.unwrap();

        // What this release has written since is read by it, too.
        drop(runtime);
        let runtime = world.open().await;
        assert_eq!(runtime.recovery_report().adopted, 1, "version {version}");
        agent.exit(RUNNING, 0);
        exited(&runtime, &running).await;
        runtime.remove_container(&running).await.unwrap();
        runtime.remove_sandbox(&sandbox.id).await.unwrap();
        world.assert_clean().await;
    }
}

#[tokio::test]
async fn a_snapshot_of_an_earlier_release_can_be_used_and_removed() {
    let mut recorded: Json = serde_json::from_str(RECORDED[7].1).unwrap();
    let id = recorded["snapshot"]["id"].as_str().unwrap();
    let id: hypernetes_types::SnapshotId = id.parse().unwrap();
    let world = World::new().await;
    // Files and an image of this release: of older ones other tests know.
    let runtime = world.open().await;
    let (source, container) = crate::testing::running(&world, &runtime, "a").await;
    let key = format!("/node/containers/{container}");
    let stored = world.store.list(&key, None, None, None).unwrap().entries;
    let stored: ContainerRecord = serde_json::from_slice(&stored[0].value).unwrap();
    let of_record = &mut recorded["snapshot"]["content"]["state"]["containers"][0];
    of_record["image_id"] = json!(stored.image_id);
    of_record["layers"] = json!(stored.layers);
    let wish = SnapshotConfig {
        id: hypernetes_types::SnapshotId::random(),
        source: source.clone(),
        size_limit: 1 << 30,
    };
    runtime.take_snapshot(wish.clone()).await.unwrap();
    let place = world.temp.path().join("state/snapshots");
    drop(runtime);
    std::fs::create_dir(place.join(id.as_str())).unwrap();
    for entry in std::fs::read_dir(place.join(wish.id.as_str())).unwrap() {
        let entry = entry.unwrap();
        let to = place.join(id.as_str()).join(entry.file_name());
        std::fs::copy(entry.path(), to).unwrap();
    }
    put(
        &world,
        &format!("/node/snapshots/{id}"),
        &recorded["snapshot"],
    )
    .await;
    let runtime = world.open().await;
    let all = runtime.list_snapshots().await;
    let kept = all.iter().find(|it| it.id == id).unwrap();
    assert_eq!(
        (kept.ready, kept.size_bytes, kept.source.name.as_str()),
        (true, 12288, "former")
    );
    let clone = CloneConfig {
        source: CloneSource::Snapshot(id.clone()),
        containers: kept.containers.clone(),
        volumes: Vec::new(),
    };
    let clone = runtime.clone_sandbox(world.sandbox("b"), clone).await;
    let clone = clone.unwrap();
    let containers = runtime.list_containers(Some(&clone)).await;
    assert_eq!(containers[0].config.name, "run");
    for sandbox in [clone, source] {
        runtime.remove_sandbox(&sandbox).await.unwrap();
    }
    for snapshot in [&id, &wish.id] {
        runtime.remove_snapshot(snapshot).await.unwrap();
    }
    world.assert_clean().await;
}

#[test]
fn every_version_has_its_record() {
    let versions = RECORDED.map(|(version, text)| {
        let recorded: Json = serde_json::from_str(text).unwrap();
        let containers = recorded["containers"].as_array().unwrap().iter();
        let all = containers.chain([&recorded["sandbox"]]);
        let all = all.chain(recorded.get("snapshot"));
        let newest = all.map(|record| record["version"].as_u64().unwrap()).max();
        assert_eq!(newest, Some(version.into()));
        version
    });
    assert_eq!(versions.last(), Some(&crate::records::NEWEST_VERSION));
}

#[tokio::test]
async fn a_record_of_a_later_release_is_refused_by_name() {
    let world = left_behind(RECORDED[0].1).await;
    let mut recorded: Json = serde_json::from_str(RECORDED[0].1).unwrap();
    let later = crate::records::NEWEST_VERSION + 1;
    recorded["sandbox"]["version"] = json!(later);
    let key = "/node/sandboxes/11111111111111111111111111111111";
    put(&world, key, &recorded["sandbox"]).await;
    let error = NodeRuntime::open(world.config())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(key) && error.contains(&format!("not {later}")),
        "{error}"
    );
    // Nothing was done to the pod: the right release finds it as it was.
    assert_eq!(world.vmm.sandboxes().len(), 1);
    assert_eq!(world.network.leases().await, 1);
}
