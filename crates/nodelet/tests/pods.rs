//! The node against the real API server, in this process, with a runtime in memory.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "what fails here fails the test; helpers are not seen as tests"
)]

#[path = "pods/clone.rs"]
mod clone;
#[path = "pods/ends.rs"]
mod ends;
#[path = "pods/kubelet.rs"]
mod kubelet;
#[path = "pods/placement.rs"]
mod placement;
#[path = "pods/snapshot.rs"]
mod snapshot;

use std::{path::Path, sync::Arc, time::Duration};

use futures::StreamExt as _;
use hypernetes_apiserver::{ApiServer, ApiServerConfig};
use hypernetes_identity::User;
use hypernetes_image::ImageConfig;
use hypernetes_network::FakeDriver;
use hypernetes_nodelet::{Nodelet, NodeletConfig};
use hypernetes_runtime::{Output, PodRuntime as _, VolumeKind, fake::FakeRuntime};
use hypernetes_store::{Store, StoreConfig};
use hypernetes_streaming::{LogRequest, PodStreams, ProcessRequest, Target};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    runtime::wait::await_condition,
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(30);
const NODE: &str = "n1";

struct World {
    client: Client,
    runtime: Arc<FakeRuntime>,
    networks: Arc<FakeDriver>,
    streams: Arc<dyn PodStreams>,
    state: tempfile::TempDir,
    stop: CancellationToken,
    node: JoinHandle<()>,
}

fn start_node(
    client: &Client,
    runtime: &Arc<FakeRuntime>,
    networks: &Arc<FakeDriver>,
    state: &Path,
) -> (CancellationToken, JoinHandle<()>, Arc<dyn PodStreams>) {
    let config = NodeletConfig::new(
        NODE,
        "192.0.2.1".parse().unwrap(),
        state.to_owned(),
        "10.42.0.0/16".parse().unwrap(),
    );
    let nodelet = Nodelet::new(config, client.clone(), runtime.clone(), networks.clone());
    let streams = nodelet.streams();
    let stop = CancellationToken::new();
    let token = stop.clone();
    let node = tokio::spawn(async move { nodelet.run(token).await.unwrap() });
    (stop, node, streams)
}

impl World {
    async fn start() -> Self {
        let store = Store::in_memory(StoreConfig::default()).unwrap();
        let config = ApiServerConfig::new(store);
        let server = ApiServer::new(config).await.unwrap();
        let client = Client::new(server.service_as(User::system("test")), "default");
        let runtime = Arc::new(FakeRuntime::new());
        runtime.add_image("busybox", ImageConfig::default());
        let networks = Arc::new(FakeDriver::new());
        let state = tempfile::tempdir().unwrap();
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": "work"}})).unwrap();
        let namespaces = Api::<Namespace>::all(client.clone());
        namespaces
            .create(&PostParams::default(), &namespace)
            .await
            .unwrap();
        let (stop, node, streams) = start_node(&client, &runtime, &networks, state.path());
        Self {
            client,
            runtime,
            networks,
            streams,
            state,
            stop,
            node,
        }
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), "work")
    }

    async fn create(&self, name: &str, spec: Value) -> Pod {
        let mut spec = spec;
        if spec["containers"].is_null() {
            spec["containers"] =
                json!([{"name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent"}]);
        }
        let pod: Pod = serde_json::from_value(
            json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}),
        )
        .unwrap();
        self.pods()
            .create(&PostParams::default(), &pod)
            .await
            .unwrap()
    }

    /// Waits until the pod's status is so.
    async fn until(&self, name: &str, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        let condition = await_condition(self.pods(), name, |pod: Option<&Pod>| {
            pod.is_some_and(|pod| so(&serde_json::to_value(pod).unwrap()["status"]))
        });
        match tokio::time::timeout(LIMIT, condition).await {
            Ok(found) => serde_json::to_value(found.unwrap().unwrap()).unwrap()["status"].take(),
            Err(_elapsed) => {
                let pod = self.pods().get(name).await.unwrap();
                panic!(
                    "{name} is not {what}: {:#}",
                    serde_json::to_value(pod.status).unwrap()
                )
            }
        }
    }

    /// A namespace of its own with a pod in it.
    async fn elsewhere(&self, namespace: &str, pod: Value) {
        let object: Namespace =
            serde_json::from_value(json!({"metadata": {"name": namespace}})).unwrap();
        let namespaces = Api::<Namespace>::all(self.client.clone());
        namespaces
            .create(&PostParams::default(), &object)
            .await
            .unwrap();
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let pods = Api::<Pod>::namespaced(self.client.clone(), namespace);
        pods.create(&PostParams::default(), &pod).await.unwrap();
    }

    async fn running(&self, name: &str) -> Value {
        self.until(name, "running", |status| status["phase"] == "Running")
            .await
    }

    async fn gone(&self, name: &str) {
        let condition = await_condition(self.pods(), name, |pod: Option<&Pod>| pod.is_none());
        tokio::time::timeout(LIMIT, condition)
            .await
            .expect("the pod goes")
            .unwrap();
    }

    async fn eventually<F: Future<Output = bool>>(&self, what: &str, so: impl Fn() -> F) {
        let wait = async {
            while !so().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait)
            .await
            .unwrap_or_else(|_| panic!("not so: {what}"));
    }

    async fn event(&self, reason: &str) -> Event {
        let api = Api::<Event>::namespaced(self.client.clone(), "work");
        self.eventually(reason, || async {
            let events = api.list(&ListParams::default()).await.unwrap();
            events
                .items
                .iter()
                .any(|event| event.reason.as_deref() == Some(reason))
        })
        .await;
        let events = api.list(&ListParams::default()).await.unwrap();
        events
            .items
            .into_iter()
            .find(|event| event.reason.as_deref() == Some(reason))
            .unwrap()
    }

    fn target(&self, pod: &Pod, container: &str) -> Target {
        Target {
            namespace: "work".into(),
            pod: pod.metadata.name.clone().unwrap(),
            uid: pod.metadata.uid.clone().unwrap(),
            container: container.into(),
        }
    }

    async fn end(self) {
        self.stop.cancel();
        self.node.await.unwrap();
    }
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap()
}

#[tokio::test]
async fn a_pod_runs_is_reported_and_goes() {
    let world = World::start().await;
    let pod = world
        .create("web", json!({"terminationGracePeriodSeconds": 1}))
        .await;
    let status = world.running("web").await;
    assert_eq!(status["hostIP"], "192.0.2.1");
    let address = status["podIP"].as_str().unwrap().to_owned();
    assert!(
        status["containerStatuses"][0]["containerID"]
            .as_str()
            .unwrap()
            .starts_with("hypernetes://")
    );
    assert_eq!(status["containerStatuses"][0]["ready"], true);
    for reason in ["Scheduled", "Pulled", "Created", "Started"] {
        assert_eq!(
            world.event(reason).await.involved_object.uid,
            pod.metadata.uid
        );
    }
    let id = "default".parse().unwrap();
    let name = format!("{}.work.pod.cluster.local", address.replace('.', "-"));
    world
        .eventually("the name", || async {
            world
                .networks
                .names(&id)
                .iter()
                .any(|record| record.name == name)
        })
        .await;
    world
        .pods()
        .delete("web", &DeleteParams::default())
        .await
        .unwrap();
    world.gone("web").await;
    assert!(world.runtime.list_sandboxes().await.is_empty());
    world.event("Killing").await;
    world
        .eventually("no name", || async { world.networks.names(&id).is_empty() })
        .await;
    world.end().await;
}

#[tokio::test]
async fn the_node_is_registered() {
    let world = World::start().await;
    let nodes = Api::<Node>::all(world.client.clone());
    world
        .eventually("a ready node", || async {
            let node = nodes.get_opt(NODE).await.unwrap();
            let conditions = node
                .and_then(|node| node.status?.conditions)
                .unwrap_or_default();
            conditions
                .iter()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
        })
        .await;
    let leases: Api<k8s_openapi::api::coordination::v1::Lease> =
        Api::namespaced(world.client.clone(), "kube-node-lease");
    world
        .eventually("a lease", || async {
            leases.get_opt(NODE).await.unwrap().is_some()
        })
        .await;
    let classes: Api<k8s_openapi::api::node::v1::RuntimeClass> = Api::all(world.client.clone());
    assert!(classes.get_opt("hypernetes").await.unwrap().is_some());
    world.end().await;
}

#[tokio::test]
async fn a_container_that_ends_is_restarted_and_counted() {
    let world = World::start().await;
    let pod = world.create("crash", json!({})).await;
    world.running("crash").await;
    let first = world.runtime.find(uid(&pod), "c").unwrap();
    world
        .runtime
        .output(&first, &Output::Stdout("first life\n".into()))
        .unwrap();
    world.runtime.exit(&first, 3);
    let status = world
        .until("crash", "restarted", |status| {
            status["containerStatuses"][0]["restartCount"] == 1
                && status["containerStatuses"][0]["state"]["running"].is_object()
        })
        .await;
    assert_eq!(
        status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"],
        3
    );
    let second = world.runtime.find(uid(&pod), "c").unwrap();
    assert_ne!(first, second);
    let request = LogRequest {
        previous: true,
        ..LogRequest::default()
    };
    let log = world
        .streams
        .logs(&world.target(&pod, "c"), request)
        .await
        .unwrap();
    let pieces: Vec<_> = log.map(|piece| piece.unwrap()).collect().await;
    assert_eq!(pieces.concat(), b"first life\n");
    world.runtime.exit(&second, 3);
    let status = world
        .until("crash", "in a crash loop", |status| {
            status["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
    assert_eq!(status["phase"], "Running");
    world.event("BackOff").await;
    world.end().await;
}

#[tokio::test]
async fn a_job_like_pod_succeeds_and_its_vm_stops() {
    let world = World::start().await;
    let pod = world.create("job", json!({"restartPolicy": "Never"})).await;
    world.running("job").await;
    world
        .runtime
        .exit(&world.runtime.find(uid(&pod), "c").unwrap(), 0);
    let status = world
        .until("job", "done", |status| status["phase"] == "Succeeded")
        .await;
    let end = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(
        (&end["exitCode"], &end["reason"]),
        (&json!(0), &json!("Completed"))
    );
    world
        .eventually("a stopped VM", || async {
            world.runtime.list_sandboxes().await[0].state
                == hypernetes_runtime::SandboxState::NotReady
        })
        .await;
    world.end().await;
}

#[tokio::test]
async fn a_field_that_is_not_supported_refuses_the_pod_by_name() {
    let world = World::start().await;
    let probe = json!({"containers": [{"name": "c", "image": "busybox",
        "livenessProbe": {"tcpSocket": {"port": 80, "host": "192.0.2.1"}}}]});
    let pod: Pod =
        serde_json::from_value(json!({"metadata": {"name": "probed"}, "spec": probe})).unwrap();
    // Either the API server refuses it already, or the node does.
    match world.pods().create(&PostParams::default(), &pod).await {
        Err(error) => assert!(error.to_string().contains("livenessProbe"), "{error}"),
        Ok(_) => {
            let status = world
                .until("probed", "failed", |s| s["phase"] == "Failed")
                .await;
            assert_eq!(status["reason"], "UnsupportedField");
            let message = status["message"].as_str().unwrap();
            assert!(
                message.contains("spec.containers[0].livenessProbe"),
                "{message}"
            );
        }
    }
    assert!(world.runtime.list_sandboxes().await.is_empty());
    world.end().await;
}

#[tokio::test]
async fn configuration_arrives_and_follows_its_source() {
    let world = World::start().await;
    let spec = json!({
        "containers": [{"name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent",
            "env": [{"name": "KEY", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "k"}}},
                {"name": "BOTH", "value": "$(KEY)-$(POD)"}, {"name": "POD", "value": "x"}],
            "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        "volumes": [{"name": "v", "configMap": {"name": "conf"}}]});
    let pod = world.create("conf", spec).await;
    // Nothing boots for a ConfigMap that is not there.
    let failed = world.event("FailedMount").await;
    assert_eq!(
        failed.message.as_deref(),
        Some("MountVolume.SetUp failed for volume \"v\" : configmap \"conf\" not found")
    );
    assert!(world.runtime.list_sandboxes().await.is_empty());
    let maps = Api::<ConfigMap>::namespaced(world.client.clone(), "work");
    let map: ConfigMap =
        serde_json::from_value(json!({"metadata": {"name": "conf"}, "data": {"k": "one"}}))
            .unwrap();
    maps.create(&PostParams::default(), &map).await.unwrap();
    world.running("conf").await;
    let id = world.runtime.find(uid(&pod), "c").unwrap();
    let record = world.runtime.container(&id).await.unwrap();
    assert!(record.config.env.contains(&("KEY".into(), "one".into())));
    assert!(
        record
            .config
            .env
            .contains(&("BOTH".into(), "one-$(POD)".into()))
    );
    let sandbox = record.sandbox;
    let content = || match &world.runtime.volumes(&sandbox)["v"].kind {
        VolumeKind::Files { files } => files["k"].content.clone(),
        _other => panic!("not files"),
    };
    assert_eq!(content(), "one");
    let patch = Patch::Merge(json!({"data": {"k": "two"}}));
    maps.patch("conf", &PatchParams::default(), &patch)
        .await
        .unwrap();
    world
        .eventually("the new content", || async { content() == "two" })
        .await;
    world.end().await;
}

#[tokio::test]
async fn an_image_that_is_not_there_waits_with_its_reason() {
    let world = World::start().await;
    let container = |image: &str, policy: &str| json!({"containers": [{"name": "c", "image": image, "imagePullPolicy": policy}]});
    world
        .create("none", container("registry.invalid/none:1", "IfNotPresent"))
        .await;
    world
        .create("never", container("registry.invalid/none:1", "Never"))
        .await;
    world
        .create("bad", container("UPPER//case", "Always"))
        .await;
    for (name, reasons) in [
        ("none", &["ErrImagePull", "ImagePullBackOff"][..]),
        ("never", &["ErrImageNeverPull"][..]),
        ("bad", &["InvalidImageName"][..]),
    ] {
        for reason in reasons {
            let status = world
                .until(name, reason, |status| {
                    status["containerStatuses"][0]["state"]["waiting"]["reason"] == *reason
                })
                .await;
            assert_eq!(status["phase"], "Pending");
        }
    }
    world.end().await;
}

#[tokio::test]
async fn a_restarted_node_goes_on_with_what_runs_and_removes_what_is_nobodys() {
    let world = World::start().await;
    let kept = world.create("kept", json!({})).await;
    world.running("kept").await;
    world.create("lost", json!({})).await;
    world.running("lost").await;
    let before = world.runtime.find(uid(&kept), "c").unwrap();
    let World {
        client,
        runtime,
        networks,
        state,
        stop,
        node,
        ..
    } = world;
    stop.cancel();
    node.await.unwrap();
    assert_eq!(runtime.list_sandboxes().await.len(), 2, "VMs run on");
    let pods = Api::<Pod>::namespaced(client.clone(), "work");
    pods.delete("lost", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    let (stop, node, streams) = start_node(&client, &runtime, &networks, state.path());
    let world = World {
        client,
        runtime,
        networks,
        streams,
        state,
        stop,
        node,
    };
    world
        .eventually("only one sandbox", || async {
            world.runtime.list_sandboxes().await.len() == 1
        })
        .await;
    assert_eq!(world.runtime.find(uid(&kept), "c"), Some(before));
    let status = world.running("kept").await;
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0);
    world.end().await;
}

#[tokio::test]
async fn a_dead_vm_is_replaced_and_a_pod_that_never_restarts_fails() {
    let world = World::start().await;
    let always = world.create("always", json!({})).await;
    world.running("always").await;
    let never = world
        .create("never", json!({"restartPolicy": "Never"}))
        .await;
    world.running("never").await;
    let sandbox = |pod: &Pod| {
        let uid = uid(pod).to_owned();
        let runtime = world.runtime.clone();
        async move {
            let all = runtime.list_sandboxes().await;
            all.into_iter()
                .find(|s| s.config.metadata.uid == uid)
                .unwrap()
                .id
        }
    };
    let (first, second) = (sandbox(&always).await, sandbox(&never).await);
    world
        .runtime
        .fail_sandbox(&first, "VmmDied", "the VMM was killed");
    world
        .runtime
        .fail_sandbox(&second, "KernelPanic", "panic: no init");
    world
        .until("always", "running again", |status| {
            status["containerStatuses"][0]["restartCount"] == 1
                && status["phase"] == "Running"
                && status["containerStatuses"][0]["ready"] == true
        })
        .await;
    world
        .until("never", "failed", |status| status["phase"] == "Failed")
        .await;
    world.end().await;
}

#[tokio::test]
async fn exec_reaches_the_container_and_its_exit_code_comes_back() {
    let world = World::start().await;
    let pod = world.create("shell", json!({})).await;
    world.running("shell").await;
    world
        .runtime
        .on_exec(|_, config, _| (config.command.concat().into_bytes(), vec![], 7));
    let request = ProcessRequest {
        command: vec!["a".into(), "b".into()],
        stdout: true,
        ..ProcessRequest::default()
    };
    let target = world.target(&pod, "c");
    let mut session = world.streams.exec(&target, request.clone()).await.unwrap();
    let mut out = Vec::new();
    while let Some(hypernetes_streaming::Output::Stdout(bytes)) = session.output.recv().await {
        out.extend_from_slice(&bytes);
    }
    assert_eq!(out, b"ab");
    assert_eq!(session.exit.await.unwrap(), Ok(7));
    let other = Target {
        uid: "another".into(),
        ..target
    };
    assert!(world.streams.exec(&other, request).await.is_err());
    world.end().await;
}

#[tokio::test]
async fn a_private_image_in_the_store_is_not_for_another_namespace() {
    let world = World::start().await;
    let reference = "registry.invalid/acme/private:1";
    world
        .runtime
        .add_remote_image(reference, ImageConfig::default());
    let secret: k8s_openapi::api::core::v1::Secret = serde_json::from_value(json!({
        "metadata": {"name": "account"}, "type": "kubernetes.io/dockerconfigjson",
        "stringData": {".dockerconfigjson":
            r#"{"auths": {"registry.invalid": {"username": "u", "password": "p"}}}"#}}))
    .unwrap();
    let secrets = Api::namespaced(world.client.clone(), "work");
    secrets
        .create(&PostParams::default(), &secret)
        .await
        .unwrap();
    let containers = json!([{"name": "c", "image": reference, "imagePullPolicy": "IfNotPresent"}]);
    let spec = json!({"containers": containers, "imagePullSecrets": [{"name": "account"}]});
    world.create("first", spec.clone()).await;
    world.running("first").await;
    world.create("second", spec).await;
    world.running("second").await;
    let pulls = || {
        world
            .runtime
            .calls()
            .iter()
            .filter(|call| call.starts_with("pull_image"))
            .count()
    };
    assert_eq!(pulls(), 1, "the own namespace does not ask again");
    let pod = json!({"metadata": {"name": "thief"}, "spec": {"containers": containers}});
    world.elsewhere("globex", pod).await;
    world
        .eventually("a pull of its own", || async { pulls() == 2 })
        .await;
    world.end().await;
}

#[tokio::test]
async fn a_pod_deleted_by_force_is_torn_down() {
    let world = World::start().await;
    world.create("forced", json!({})).await;
    world.running("forced").await;
    let params = DeleteParams::default().grace_period(0);
    world.pods().delete("forced", &params).await.unwrap();
    world.gone("forced").await;
    world
        .eventually("no sandbox", || async {
            world.runtime.list_sandboxes().await.is_empty()
        })
        .await;
    world.end().await;
}

#[tokio::test]
async fn init_containers_run_before_the_others() {
    let world = World::start().await;
    let container =
        |name: &str| json!({"name": name, "image": "busybox", "imagePullPolicy": "IfNotPresent"});
    let spec = json!({"initContainers": [container("i")], "containers": [container("c")]});
    let pod = world.create("init", spec).await;
    let status = world
        .until("init", "initializing", |status| {
            status["initContainerStatuses"][0]["state"]["running"].is_object()
        })
        .await;
    assert_eq!(
        status["containerStatuses"][0]["state"]["waiting"]["reason"],
        "PodInitializing"
    );
    assert_eq!(world.runtime.find(uid(&pod), "c"), None);
    world
        .runtime
        .exit(&world.runtime.find(uid(&pod), "i").unwrap(), 0);
    let status = world.running("init").await;
    assert_eq!(
        status["initContainerStatuses"][0]["state"]["terminated"]["reason"],
        "Completed"
    );
    world.end().await;
}
