//! Probes, hooks, sidecars, ephemeral containers and resizes, as under a kubelet.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// A server that answers every request with what `healthy` says; its address.
async fn serve(healthy: Arc<AtomicBool>) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let healthy = healthy.load(Ordering::SeqCst);
            tokio::spawn(async move {
                let mut request = [0; 1024];
                let _read = stream.read(&mut request).await;
                let answer = if healthy {
                    "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
                } else {
                    "HTTP/1.1 503 Not Now\r\ncontent-length: 0\r\n\r\n"
                };
                let _sent = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    address
}

pub(crate) fn container(more: &Value) -> Value {
    let mut container = json!({"name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent"});
    container
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    container
}

#[tokio::test]
async fn probes_make_ready_and_restart() {
    let world = World::start().await;
    let healthy = Arc::new(AtomicBool::new(false));
    let address = serve(healthy.clone()).await;
    world.networks.set_pods_listen_at(Some(address));
    let alive = Arc::new(AtomicBool::new(true));
    let seen = alive.clone();
    world.runtime.on_exec(move |_, config, _| {
        assert_eq!(config.command, ["alive"]);
        let code = i32::from(!seen.load(Ordering::SeqCst));
        (b"not well".to_vec(), Vec::new(), code)
    });
    let spec = json!({"terminationGracePeriodSeconds": 1, "containers": [container(&json!({
        "ports": [{"name": "web", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"port": "web", "path": "/ready"}, "periodSeconds": 1,
            "failureThreshold": 1},
        "livenessProbe": {"exec": {"command": ["alive"]}, "periodSeconds": 1,
            "failureThreshold": 2}}))]});
    world.create("probed", spec).await;
    let status = world.running("probed").await;
    assert_eq!(status["containerStatuses"][0]["ready"], false);
    assert_eq!(status["containerStatuses"][0]["started"], true);
    let event = world.event("Unhealthy").await;
    assert_eq!(
        event.message.as_deref(),
        Some("Readiness probe failed: HTTP probe failed with statuscode: 503")
    );
    healthy.store(true, Ordering::SeqCst);
    world
        .until("probed", "ready", |s| {
            s["containerStatuses"][0]["ready"] == true
        })
        .await;
    alive.store(false, Ordering::SeqCst);
    world
        .until("probed", "restarted", |s| {
            s["containerStatuses"][0]["restartCount"] == 1
        })
        .await;
    let event = world.event("Killing").await;
    assert_eq!(
        event.message.as_deref(),
        Some("Container c failed liveness probe, will be restarted")
    );
    world.end().await;
}

#[tokio::test]
async fn sidecars_start_first_and_end_last_and_hooks_run() {
    let world = World::start().await;
    world.runtime.on_exec(|_, _, _| (Vec::new(), Vec::new(), 0));
    let spec = json!({"terminationGracePeriodSeconds": 10,
        "initContainers": [
            {"name": "proxy", "image": "busybox", "imagePullPolicy": "IfNotPresent",
                "restartPolicy": "Always"}],
        "containers": [container(&json!({"lifecycle": {
            "postStart": {"exec": {"command": ["hello"]}},
            "preStop": {"exec": {"command": ["bye"]}}}}))]});
    let pod = world.create("both", spec).await;
    let status = world.running("both").await;
    let proxy = &status["initContainerStatuses"][0];
    assert_eq!(
        (&proxy["ready"], &proxy["started"]),
        (&json!(true), &json!(true))
    );
    let ids = ["proxy", "c"].map(|name| world.runtime.find(uid(&pod), name).unwrap().to_string());
    let at = |call: &str, id: &str| {
        let calls = world.runtime.calls();
        calls
            .iter()
            .position(|made| *made == format!("{call} {id}"))
    };
    assert!(at("start_container", &ids[0]) < at("start_container", &ids[1]));
    world
        .pods()
        .delete("both", &DeleteParams::default())
        .await
        .unwrap();
    world.gone("both").await;
    let calls = world.runtime.calls();
    let stops: Vec<_> = calls
        .iter()
        .filter(|c| c.starts_with("stop_container"))
        .collect();
    assert_eq!(
        stops,
        [
            &format!("stop_container {}", ids[1]),
            &format!("stop_container {}", ids[0])
        ]
    );
    let hooks = calls.iter().filter(|call| call.starts_with("exec")).count();
    assert_eq!(hooks, 2, "{calls:?}");
    world.end().await;
}

#[tokio::test]
async fn a_container_is_added_to_look_into_another() {
    let world = World::start().await;
    let pod = world.create("web", json!({})).await;
    world.running("web").await;
    let patch = Patch::Strategic(json!({"spec": {"ephemeralContainers": [{"name": "debugger",
        "image": "busybox", "imagePullPolicy": "IfNotPresent", "targetContainerName": "c",
        "stdin": true, "tty": true}]}}));
    world
        .pods()
        .patch_subresource(
            "ephemeralcontainers",
            "web",
            &PatchParams::default(),
            &patch,
        )
        .await
        .unwrap();
    world
        .until("web", "debugged", |status| {
            status["ephemeralContainerStatuses"][0]["state"]["running"].is_object()
        })
        .await;
    let debugger = world.runtime.find(uid(&pod), "debugger").unwrap();
    let record = world.runtime.container(&debugger).await.unwrap();
    assert_eq!(record.config.pid_target, world.runtime.find(uid(&pod), "c"));
    world.runtime.exit(&debugger, 0);
    let status = world
        .until("web", "left alone", |status| {
            status["ephemeralContainerStatuses"][0]["state"]["terminated"].is_object()
        })
        .await;
    assert_eq!(status["phase"], "Running");
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0);
    world.end().await;
}

#[tokio::test]
async fn a_pod_is_resized_in_place_or_says_why_not() {
    let world = World::start().await;
    let spec = json!({"containers": [container(&json!({
        "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}}}))]});
    let pod = world.create("web", spec).await;
    let status = world.running("web").await;
    assert_eq!(
        status["containerStatuses"][0]["allocatedResources"]["memory"],
        "64Mi"
    );
    let id = world.runtime.find(uid(&pod), "c").unwrap();
    let resize = async |memory: &str| {
        let amounts = json!({"memory": memory, "cpu": "500m"});
        let patch = Patch::Strategic(json!({"spec": {"containers": [{"name": "c",
            "resources": {"limits": amounts, "requests": amounts}}]}}));
        world
            .pods()
            .patch_subresource("resize", "web", &PatchParams::default(), &patch)
            .await
    };
    resize("256Mi").await.unwrap();
    let status = world
        .until("web", "resized", |status| {
            status["containerStatuses"][0]["resources"]["limits"]["memory"] == "256Mi"
        })
        .await;
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0);
    assert_eq!(world.runtime.find(uid(&pod), "c"), Some(id.clone()));
    let record = world.runtime.container(&id).await.unwrap();
    assert_eq!(record.config.resources.memory_limit, 256 << 20);
    resize("900Gi").await.unwrap();
    let status = world
        .until("web", "too large", |status| {
            let conditions = status["conditions"].as_array().unwrap();
            conditions
                .iter()
                .any(|c| c["type"] == "PodResizePending" && c["reason"] == "Infeasible")
        })
        .await;
    assert_eq!(
        status["containerStatuses"][0]["resources"]["limits"]["memory"],
        "256Mi"
    );
    let other_class = Patch::Strategic(json!({"spec": {"containers": [{"name": "c",
        "resources": {"requests": {"cpu": "100m"}}}]}}));
    let refused = world
        .pods()
        .patch_subresource("resize", "web", &PatchParams::default(), &other_class)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("QOS Class"), "{refused}");
    world.end().await;
}
