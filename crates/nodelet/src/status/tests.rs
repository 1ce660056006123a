use hypernetes_runtime::{ContainerState::*, SandboxState::*};
use serde_json::{Value, json};

use super::*;
use crate::plan::{
    Trouble,
    tests::{World, at},
};

fn status(world: &World) -> PodStatus {
    build(&world.view(), &world.plan(), "192.0.2.1".parse().unwrap())
}

fn value(world: &World) -> Value {
    serde_json::to_value(status(world)).unwrap()
}

fn condition<'a>(status: &'a PodStatus, name: &str) -> &'a PodCondition {
    status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == name)
        .unwrap()
}

#[test]
fn a_running_pod_in_full() {
    let world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    let time = "2027-01-15T08:00:00Z";
    let condition =
        |name: &str| json!({"type": name, "status": "True", "lastTransitionTime": time});
    assert_eq!(
        value(&world),
        json!({
            "phase": "Running",
            "hostIP": "192.0.2.1", "hostIPs": [{"ip": "192.0.2.1"}],
            "podIP": "10.244.0.2", "podIPs": [{"ip": "10.244.0.2"}],
            "qosClass": "BestEffort",
            "startTime": time,
            "conditions": [
                condition("PodReadyToStartContainers"), condition("Initialized"),
                condition("Ready"), condition("ContainersReady"), condition("PodScheduled"),
            ],
            "containerStatuses": [{
                "name": "c", "image": "busybox", "ready": true, "started": true, "restartCount": 0,
                "imageID": "docker.io/library/busybox@sha256:2",
                "containerID": "hypernetes://00000000000000000000000000000010",
                "state": {"running": {"startedAt": "2027-01-15T07:59:10Z"}},
            }],
        })
    );
}

#[test]
fn a_new_pod_is_pending_with_containers_creating() {
    let status = status(&World::new(json!({})));
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let container = &status.container_statuses.as_ref().unwrap()[0];
    let waiting = container.state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("ContainerCreating"));
    let ready = condition(&status, "Ready");
    assert_eq!(ready.reason.as_deref(), Some("ContainersNotReady"));
    assert_eq!(
        ready.message.as_deref(),
        Some("containers with unready status: [c]")
    );
    assert_eq!(
        condition(&status, "PodReadyToStartContainers").status,
        "False"
    );
}

#[test]
fn others_wait_while_init_containers_run() {
    let spec = json!({"initContainers": [{"name": "i", "image": "busybox"}]});
    let world = World::new(spec.clone())
        .sandbox(Ready, None)
        .container("i", Running, None);
    let pending = status(&world);
    assert_eq!(pending.phase.as_deref(), Some("Pending"));
    let waiting = pending.container_statuses.as_ref().unwrap()[0]
        .state
        .as_ref()
        .unwrap();
    assert_eq!(
        waiting.waiting.as_ref().unwrap().reason.as_deref(),
        Some("PodInitializing")
    );
    let initialized = condition(&pending, "Initialized");
    assert_eq!(
        initialized.reason.as_deref(),
        Some("ContainersNotInitialized")
    );
    assert_eq!(
        initialized.message.as_deref(),
        Some("containers with incomplete status: [i]")
    );
    let world = World::new(spec)
        .sandbox(Ready, None)
        .container("i", Exited, Some((0, -3)))
        .container("c", Running, None);
    let running = status(&world);
    assert_eq!(running.phase.as_deref(), Some("Running"));
    assert!(running.init_container_statuses.as_ref().unwrap()[0].ready);
}

#[test]
fn phases_of_ended_pods() {
    for (policy, codes, phase) in [
        ("Never", [0, 0], "Succeeded"),
        ("Never", [0, 3], "Failed"),
        ("OnFailure", [0, 0], "Succeeded"),
        ("OnFailure", [0, 1], "Running"),
        ("Always", [0, 0], "Running"),
    ] {
        let world = World::new(json!({"restartPolicy": policy,
            "containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "x"}]}))
        .sandbox(Ready, None)
        .container("a", Exited, Some((codes[0], -1)))
        .container("b", Exited, Some((codes[1], -1)));
        assert_eq!(
            status(&world).phase.as_deref(),
            Some(phase),
            "{policy} {codes:?}"
        );
    }
}

#[test]
fn a_terminal_phase_stays() {
    let mut world = World::new(json!({}));
    world.pod.status = Some(PodStatus {
        phase: Some("Succeeded".into()),
        ..PodStatus::default()
    });
    assert_eq!(status(&world).phase.as_deref(), Some("Succeeded"));
}

#[test]
fn a_crash_loop_shows_the_last_end_and_counts() {
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Exited, Some((1, -30)))
        .container("c", Exited, Some((3, -2)));
    world.memory.container("c").restart.next(at(-5), at(-5));
    let status = status(&world);
    let container = &status.container_statuses.as_ref().unwrap()[0];
    assert_eq!(container.restart_count, 1);
    let waiting = container.state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
    let last = container
        .last_state
        .as_ref()
        .unwrap()
        .terminated
        .as_ref()
        .unwrap();
    assert_eq!((last.exit_code, last.reason.as_deref()), (3, Some("Error")));
    assert_eq!(status.phase.as_deref(), Some("Running"));
}

#[test]
fn trouble_is_a_waiting_reason() {
    let mut world = World::new(json!({})).sandbox(Ready, None);
    let memory = world.memory.container("c");
    memory.retry.next(at(0), at(0));
    memory.trouble = Some(Trouble {
        reason: "CreateContainerConfigError",
        message: "configmap \"x\" not found".into(),
        since: at(0),
    });
    let status = status(&world);
    let state = status.container_statuses.as_ref().unwrap()[0]
        .state
        .clone()
        .unwrap();
    let waiting = state.waiting.unwrap();
    assert_eq!(
        waiting.reason.as_deref(),
        Some("CreateContainerConfigError")
    );
    assert_eq!(
        waiting.message.as_deref(),
        Some("configmap \"x\" not found")
    );
}

#[test]
fn a_refused_pod_says_only_why() {
    let mut world = World::new(json!({}));
    world.memory.failed = Some(("UnsupportedField".into(), "spec.x: no".into()));
    let status = status(&world);
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("UnsupportedField"));
    assert_eq!(status.message.as_deref(), Some("spec.x: no"));
    assert_eq!(status.container_statuses, None);
}

#[test]
fn transition_times_change_only_with_the_condition() {
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    world.pod.status = Some(status(&world));
    world.now = at(100);
    let later = status(&world);
    assert_eq!(world.pod.status.as_ref(), Some(&later));
    let mut world =
        World::new(json!({}))
            .sandbox(Ready, None)
            .container("c", Exited, Some((1, 99)));
    world.pod.status = Some(later);
    world.now = at(100);
    let changed = status(&world);
    assert_eq!(
        condition(&changed, "Ready").last_transition_time,
        Some(seconds(at(100)))
    );
    assert_eq!(
        condition(&changed, "Initialized").last_transition_time,
        Some(seconds(at(0)))
    );
}

#[test]
fn another_vm_remembers_what_the_status_tells() {
    let mut world =
        World::new(json!({}))
            .sandbox(Ready, None)
            .container("c", Exited, Some((2, -9)));
    world.pod.status = Some(status(&world));
    world.containers.clear();
    let status = status(&world);
    let container = &status.container_statuses.as_ref().unwrap()[0];
    assert_eq!(
        container
            .last_state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .exit_code,
        2
    );
}

#[test]
fn conditions_of_others_are_kept() {
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    let foreign = PodCondition {
        type_: "DisruptionTarget".into(),
        status: "True".into(),
        ..PodCondition::default()
    };
    world.pod.status = Some(PodStatus {
        conditions: Some(vec![foreign.clone()]),
        ..PodStatus::default()
    });
    assert!(status(&world).conditions.unwrap().contains(&foreign));
}

#[test]
fn probes_decide_whether_a_container_is_ready() {
    let mut world = World::new(json!({"containers": [{"name": "c", "image": "busybox",
        "readinessProbe": {}}]}))
    .sandbox(Ready, None)
    .container("c", Running, None);
    let before = status(&world);
    assert!(!before.container_statuses.as_ref().unwrap()[0].ready);
    assert_eq!(condition(&before, "Ready").status, "False");
    let id = world.containers[0].id.clone();
    let health = crate::prober::Health {
        started: true,
        ready: true,
        failed: None,
    };
    world.memory.health.insert(id, health);
    assert_eq!(condition(&status(&world), "Ready").status, "True");
}

#[test]
fn a_container_runs_when_its_post_start_hook_has_ended() {
    let spec = json!({"containers": [{"name": "c", "image": "busybox",
        "lifecycle": {"postStart": {"sleep": {"seconds": 1}}}}]});
    let mut world = World::new(spec)
        .sandbox(Ready, None)
        .container("c", Running, None);
    world.memory.starting.insert("c".into());
    let hooked = status(&world);
    assert_eq!(hooked.phase.as_deref(), Some("Pending"));
    let container = &hooked.container_statuses.as_ref().unwrap()[0];
    let state = container.state.as_ref().unwrap();
    assert!(state.waiting.is_some() && !container.ready, "{container:?}");
    world.memory.starting.clear();
    assert_eq!(status(&world).phase.as_deref(), Some("Running"));
}

#[test]
fn readiness_gates_are_conditions_of_others() {
    let mut world = World::new(json!({"readinessGates": [{"conditionType": "x.io/up"}]}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    let closed = status(&world);
    let ready = condition(&closed, "Ready");
    assert_eq!(ready.reason.as_deref(), Some("ReadinessGatesNotReady"));
    assert_eq!(
        ready.message.as_deref(),
        Some("corresponding condition of pod readiness gate \"x.io/up\" does not exist.")
    );
    assert_eq!(condition(&closed, "ContainersReady").status, "True");
    let gate = |value: &str| {
        serde_json::from_value(json!({"conditions": [{"type": "x.io/up", "status": value}]}))
            .unwrap()
    };
    world.pod.status = Some(gate("False"));
    assert_eq!(
        condition(&status(&world), "Ready").message.as_deref(),
        Some("the status of pod readiness gate \"x.io/up\" is not \"True\", but False")
    );
    world.pod.status = Some(gate("True"));
    assert_eq!(condition(&status(&world), "Ready").status, "True");
}
