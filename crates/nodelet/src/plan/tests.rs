use hypernetes_runtime::{
    ContainerConfig, ContainerStatus, DnsConfig, Failure, ResourceConfig, SandboxConfig,
    SandboxMetadata, SecurityConfig,
};
use serde_json::{Value, json};

use super::*;
use crate::prober::ProbeKind;

pub(crate) const NOW: i64 = 1_800_000_000;

pub(crate) fn at(offset: i64) -> Timestamp {
    Timestamp::from_second(NOW + offset).unwrap()
}

fn nanos(offset: i64) -> i64 {
    (NOW + offset) * 1_000_000_000
}

/// A pod's world, built by hand.
pub(crate) struct World {
    pub(crate) pod: Pod,
    pub(crate) sandboxes: Vec<SandboxStatus>,
    pub(crate) containers: Vec<ContainerStatus>,
    pub(crate) memory: Memory,
    pub(crate) busy: BTreeSet<Slot>,
    pub(crate) gone: bool,
    pub(crate) now: Timestamp,
}

impl World {
    pub(crate) fn new(spec: Value) -> Self {
        let mut spec = spec;
        if spec["containers"].is_null() {
            spec["containers"] = json!([{"name": "c", "image": "busybox"}]);
        }
        let pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "acme", "uid": "u1"}, "spec": spec}))
        .unwrap();
        Self {
            pod,
            sandboxes: Vec::new(),
            containers: Vec::new(),
            memory: Memory::default(),
            busy: BTreeSet::new(),
            gone: false,
            now: at(0),
        }
    }

    /// One container, which runs.
    pub(crate) fn running() -> Self {
        Self::new(json!({}))
            .sandbox(SandboxState::Ready, None)
            .container("c", ContainerState::Running, None)
    }

    pub(crate) fn annotate(mut self, key: &str, value: &str) -> Self {
        let annotations = self.pod.metadata.annotations.get_or_insert_default();
        annotations.insert(key.into(), value.into());
        self
    }

    /// Adds a sandbox; a ready one has its volumes.
    pub(crate) fn sandbox(mut self, state: SandboxState, failure: Option<&str>) -> Self {
        let attempt = u32::try_from(self.sandboxes.len()).unwrap();
        let id: SandboxId = format!("{attempt:032x}").parse().unwrap();
        if state == SandboxState::Ready {
            self.memory.volumes = Some(id.clone());
        }
        let metadata = SandboxMetadata {
            name: "web".into(),
            namespace: "acme".into(),
            uid: "u1".into(),
            attempt,
        };
        let config = SandboxConfig {
            metadata,
            hostname: "web".into(),
            network: Some("acme.default".parse().unwrap()),
            requested_address: None,
            host_ports: Vec::new(),
            bandwidth: hypernetes_types::Bandwidth::default(),
            kernel: None,
            vcpus: 1,
            memory_mib: 192,
            extras: Default::default(),
            scratch_mib: 1,
            dns: DnsConfig::default(),
            hosts: vec![],
            sysctls: BTreeMap::new(),
            share_process_namespace: false,
            user_namespace: None,
            log_directory: "/logs".into(),
            cgroup_parent: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            memo: String::new(),
            host: None,
        };
        self.sandboxes.push(SandboxStatus {
            vcpus: 1,
            memory_mib: 128,
            id,
            config,
            state,
            suspended: false,
            stalled: false,
            created_unix_nanos: nanos(-100),
            address: (state == SandboxState::Ready).then(|| "10.244.0.2".parse().unwrap()),
            more_addresses: Vec::new(),
            kernel_release: None,
            failure: failure.map(|reason| Failure {
                reason: reason.into(),
                message: format!("{reason}!"),
            }),
        });
        self
    }

    /// Adds a container to the newest sandbox. `ended`: exit code and when.
    pub(crate) fn container(
        mut self,
        name: &str,
        state: ContainerState,
        ended: Option<(i32, i64)>,
    ) -> Self {
        let sandbox = self.sandboxes.last().unwrap().id.clone();
        let attempt = u32::try_from(
            self.containers
                .iter()
                .filter(|c| c.config.name == name)
                .count(),
        )
        .unwrap();
        let number = self.containers.len() + 16;
        let config = ContainerConfig {
            name: name.into(),
            attempt,
            image: "sha256:1".into(),
            command: vec![],
            args: vec![],
            env: vec![],
            working_dir: String::new(),
            mounts: vec![],
            devices: Vec::new(),
            tty: false,
            stdin: false,
            stdin_once: false,
            pid_target: None,
            security: SecurityConfig::default(),
            resources: ResourceConfig::default(),
            stop_signal: None,
            memo: String::new(),
            host: None,
            log_path: format!("{name}/{attempt}.log").into(),
            termination_path: String::new(),
            labels: BTreeMap::new(),
            annotations: [(
                crate::container::IMAGE_ANNOTATION.to_owned(),
                "busybox".to_owned(),
            )]
            .into(),
        };
        self.containers.push(ContainerStatus {
            id: format!("{number:032x}").parse().unwrap(),
            sandbox,
            config,
            state,
            image_id: "sha256:1".into(),
            user: None,
            image_ref: "docker.io/library/busybox@sha256:2".into(),
            created_unix_nanos: nanos(-60),
            started_unix_nanos: nanos(-50),
            finished_unix_nanos: ended.map_or(0, |(_, when)| nanos(when)),
            exit_code: ended.map_or(0, |(code, _)| code),
            reason: String::new(),
            message: String::new(),
            log_path: format!("/logs/{name}/{attempt}.log").into(),
            paused: false,
        });
        self
    }

    pub(crate) fn view(&self) -> View<'_> {
        View {
            pod: &self.pod,
            gone: self.gone,
            sandboxes: &self.sandboxes,
            containers: &self.containers,
            memory: &self.memory,
            busy: &self.busy,
            now: self.now,
        }
    }

    pub(crate) fn plan(&self) -> Plan {
        plan(&self.view())
    }

    fn id(&self) -> SandboxId {
        self.sandboxes.last().unwrap().id.clone()
    }

    fn run(&self, container: &str, attempt: u32) -> Vec<Action> {
        vec![Action::Run {
            container: container.into(),
            sandbox: self.id(),
            attempt,
        }]
    }

    fn deleted(mut self, grace: i64) -> Self {
        self.pod.metadata.deletion_timestamp = Some(crate::status::seconds(at(30)));
        self.pod.metadata.deletion_grace_period_seconds = Some(grace);
        self
    }
}

use ContainerState::{Created, Exited, Running};
use SandboxState::{NotReady, Ready};

fn with_init() -> Value {
    json!({"initContainers": [{"name": "i1", "image": "busybox"}, {"name": "i2", "image": "busybox"}]})
}

#[test]
fn a_new_pod_gets_a_sandbox_and_then_its_container() {
    let world = World::new(json!({}));
    assert_eq!(world.plan().actions, [Action::RunSandbox { attempt: 0 }]);
    let world = World::new(json!({})).sandbox(Ready, None);
    assert_eq!(world.plan().actions, world.run("c", 0));
}

#[test]
fn a_busy_slot_gets_nothing_new() {
    let mut world = World::new(json!({}));
    world.busy.insert(Slot::Sandbox);
    assert_eq!(world.plan().actions, []);
    let mut world = World::new(json!({})).sandbox(Ready, None);
    world.busy.insert(Slot::Container("c".into()));
    assert_eq!(world.plan().actions, []);
}

#[test]
fn volumes_come_before_the_first_container_and_never_after() {
    let mut world = World::new(json!({})).sandbox(Ready, None);
    world.memory.volumes = None;
    assert_eq!(
        world.plan().actions,
        [Action::FillVolumes {
            sandbox: world.id()
        }]
    );
    // A daemon that was restarted knows nothing of volumes; writing would empty the emptyDirs.
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    world.memory.volumes = None;
    assert_eq!(world.plan().actions, []);
}

#[test]
fn a_container_left_created_is_started_under_the_same_attempt() {
    let world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Created, None);
    assert_eq!(world.plan().actions, world.run("c", 0));
}

#[test]
fn init_containers_run_one_by_one_and_before_all_others() {
    let world = World::new(with_init()).sandbox(Ready, None);
    assert_eq!(world.plan().actions, world.run("i1", 0));
    let world = world.container("i1", Running, None);
    assert_eq!(world.plan().actions, []);
    let world = World::new(with_init())
        .sandbox(Ready, None)
        .container("i1", Exited, Some((0, -5)));
    assert_eq!(world.plan().actions, world.run("i2", 0));
    let world = world.container("i2", Exited, Some((0, -4)));
    assert_eq!(world.plan().actions, world.run("c", 0));
}

#[test]
fn a_failed_init_container_is_tried_again_or_ends_the_pod() {
    let world = World::new(with_init())
        .sandbox(Ready, None)
        .container("i1", Exited, Some((1, -5)));
    assert_eq!(world.plan().actions, world.run("i1", 1));
    let mut spec = with_init();
    spec["restartPolicy"] = "Never".into();
    let world = World::new(spec)
        .sandbox(Ready, None)
        .container("i1", Exited, Some((1, -5)));
    assert_eq!(world.plan().actions, [Action::StopSandbox(world.id())]);
}

#[test]
fn restart_policies() {
    for (policy, code, restarts) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 0, false),
        ("Never", 1, false),
    ] {
        let world = World::new(json!({"restartPolicy": policy}))
            .sandbox(Ready, None)
            .container("c", Exited, Some((code, -1)));
        let expected = if restarts {
            world.run("c", 1)
        } else {
            vec![Action::StopSandbox(world.id())]
        };
        assert_eq!(world.plan().actions, expected, "{policy} {code}");
    }
}

#[test]
fn a_crash_loop_waits_and_says_so() {
    let mut world =
        World::new(json!({}))
            .sandbox(Ready, None)
            .container("c", Exited, Some((1, -3)));
    world.memory.container("c").restart.next(at(-5), at(-5));
    let plan = world.plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.wake, Some(at(7)));
    assert_eq!(
        plan.waiting["c"],
        Waiting {
            reason: "CrashLoopBackOff".into(),
            message: "back-off 10s restarting failed container=c pod=web_acme(u1)".into(),
        }
    );
    world.now = at(7);
    assert_eq!(world.plan().actions, world.run("c", 1));
}

#[test]
fn image_trouble_is_fresh_first_and_a_back_off_then() {
    let mut world = World::new(json!({})).sandbox(Ready, None);
    let memory = world.memory.container("c");
    memory.retry.next(at(0), at(0));
    memory.trouble = Some(Trouble {
        reason: "ErrImagePull",
        message: "no route".into(),
        since: at(0),
    });
    let plan = world.plan();
    assert_eq!((plan.actions.len(), plan.wake), (0, Some(at(2))));
    assert_eq!(plan.waiting["c"].reason, "ErrImagePull");
    world.now = at(3);
    let plan = world.plan();
    assert_eq!((plan.actions.len(), plan.wake), (0, Some(at(10))));
    assert_eq!(plan.waiting["c"].reason, "ImagePullBackOff");
    assert_eq!(
        plan.waiting["c"].message,
        "Back-off pulling image \"busybox\": ErrImagePull: no route"
    );
    world.now = at(10);
    assert_eq!(world.plan().actions, world.run("c", 0));
}

#[test]
fn a_dead_vm_is_booted_again_and_starts_over_with_the_init_containers() {
    let world = World::new(with_init())
        .sandbox(NotReady, Some("VmmDied"))
        .container("i1", Exited, Some((0, -9)))
        .container("i2", Exited, Some((0, -8)))
        .container("c", Exited, Some((137, -1)));
    assert_eq!(world.plan().actions, [Action::RunSandbox { attempt: 1 }]);
    let world = world.sandbox(Ready, None);
    assert_eq!(world.plan().actions, world.run("i1", 1));
}

#[test]
fn a_pod_that_never_restarts_fails_with_its_vm() {
    let world = World::new(json!({"restartPolicy": "Never"}))
        .sandbox(NotReady, Some("KernelPanic"))
        .container("c", ContainerState::Unknown, None);
    assert_eq!(
        world.plan().actions,
        [Action::Fail {
            reason: "KernelPanic".into(),
            message: "KernelPanic!".into()
        }]
    );
}

#[test]
fn a_boot_that_failed_waits_for_the_next_try() {
    let mut world = World::new(json!({}));
    world.memory.sandbox.next(at(0), at(0));
    world.memory.sandbox_failed = Some(at(0));
    let plan = world.plan();
    assert_eq!((plan.actions.len(), plan.wake), (0, Some(at(10))));
    world.now = at(10);
    assert_eq!(world.plan().actions, [Action::RunSandbox { attempt: 0 }]);
}

#[test]
fn an_ended_pod_gives_its_vm_back_and_rests() {
    let world = World::new(json!({"restartPolicy": "Never"}))
        .sandbox(NotReady, None)
        .container("c", Exited, Some((0, -1)));
    assert_eq!(world.plan(), Plan::default());
}

#[test]
fn the_deadline_fails_the_pod_and_stops_it() {
    let mut world = World::new(json!({"activeDeadlineSeconds": 60}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    let start = |seconds| k8s_openapi::api::core::v1::PodStatus {
        start_time: Some(crate::status::seconds(at(seconds))),
        ..Default::default()
    };
    world.pod.status = Some(start(-50));
    assert_eq!(world.plan().wake, Some(at(10)));
    world.pod.status = Some(start(-60));
    assert!(
        matches!(&world.plan().actions[..], [Action::Fail { reason, .. }] if reason == "DeadlineExceeded")
    );
    world.memory.failed = Some(("DeadlineExceeded".into(), String::new()));
    assert_eq!(
        world.plan().actions,
        [Action::StopContainers { grace_seconds: 30 }]
    );
}

#[test]
fn deletion_goes_step_by_step() {
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None)
        .deleted(7);
    assert_eq!(
        world.plan().actions,
        [Action::StopContainers { grace_seconds: 7 }]
    );
    world.busy.insert(Slot::Teardown);
    assert_eq!(world.plan().actions, []);
    world.busy.clear();
    world.memory.stopped = true;
    assert_eq!(world.plan().actions, [Action::RemoveSandboxes]);
    world.sandboxes.clear();
    world.containers.clear();
    assert_eq!(world.plan().actions, [Action::DeleteObject]);
    world.gone = true;
    assert!(world.plan().finished);
}

#[test]
fn a_pod_deleted_by_force_is_torn_down_too() {
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    world.gone = true;
    assert_eq!(
        world.plan().actions,
        [Action::StopContainers { grace_seconds: 2 }]
    );
}

#[test]
fn a_pod_failed_by_somebody_else_is_stopped() {
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    world.pod.status = Some(k8s_openapi::api::core::v1::PodStatus {
        phase: Some("Failed".into()),
        ..Default::default()
    });
    assert_eq!(
        world.plan().actions,
        [Action::StopContainers { grace_seconds: 30 }]
    );
}

#[test]
fn a_new_image_replaces_the_container() {
    let mut world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Running, None);
    world.pod.spec.as_mut().unwrap().containers[0].image = Some("busybox:2".into());
    let id = world.containers[0].id.clone();
    assert_eq!(
        world.plan().actions,
        [Action::Kill {
            container: "c".into(),
            id,
            message: "Container c definition changed, will be restarted".into(),
            grace: 30,
            restarts: true,
        }]
    );
}

#[test]
fn only_two_records_of_a_container_are_kept() {
    let world = World::new(json!({}))
        .sandbox(Ready, None)
        .container("c", Exited, Some((1, -30)))
        .container("c", Exited, Some((1, -20)))
        .container("c", Running, None);
    let oldest = world.containers[0].id.clone();
    assert_eq!(world.plan().actions, [Action::RemoveContainer(oldest)]);
}

fn with_sidecar() -> Value {
    json!({"initContainers": [
        {"name": "s", "image": "busybox", "restartPolicy": "Always",
            "startupProbe": {"tcpSocket": {"port": 1}}},
        {"name": "i", "image": "busybox"}]})
}

fn healthy(world: &mut World, started: bool, failed: Option<ProbeKind>) {
    let id = world.containers.last().unwrap().id.clone();
    let health = Health {
        started,
        ready: started,
        failed,
    };
    world.memory.health.insert(id, health);
}

#[test]
fn a_sidecar_must_have_started_before_the_next_one_starts() {
    let world = World::new(with_sidecar()).sandbox(Ready, None);
    assert_eq!(world.plan().actions, world.run("s", 0));
    let mut world = world.container("s", Running, None);
    healthy(&mut world, false, None);
    assert_eq!(world.plan().actions, []);
    healthy(&mut world, true, None);
    assert_eq!(world.plan().actions, world.run("i", 0));
    let world = world.container("i", Exited, Some((0, -5)));
    assert_eq!(world.plan().actions, world.run("c", 0));
}

#[test]
fn a_sidecar_runs_again_whatever_the_pods_policy_and_does_not_keep_it_going() {
    let mut spec = with_sidecar();
    spec["restartPolicy"] = "Never".into();
    let world = World::new(spec.clone())
        .sandbox(Ready, None)
        .container("s", Exited, Some((0, -5)))
        .container("i", Exited, Some((0, -5)))
        .container("c", Running, None);
    assert_eq!(world.plan().actions, world.run("s", 1));
    let mut world = World::new(spec)
        .sandbox(Ready, None)
        .container("s", Running, None);
    healthy(&mut world, true, None);
    let world = world
        .container("i", Exited, Some((0, -5)))
        .container("c", Exited, Some((0, -5)));
    let stop = Action::StopContainers { grace_seconds: 30 };
    assert_eq!(world.plan().actions, [stop]);
}

#[test]
fn a_failed_liveness_probe_ends_the_container_with_its_own_grace() {
    for (policy, message) in [
        (
            "Always",
            "Container c failed liveness probe, will be restarted",
        ),
        ("Never", "Container c failed liveness probe"),
    ] {
        let mut world = World::new(json!({"restartPolicy": policy, "containers": [{"name": "c",
            "image": "busybox", "livenessProbe": {"terminationGracePeriodSeconds": 3}}]}))
        .sandbox(Ready, None)
        .container("c", Running, None);
        healthy(&mut world, true, Some(ProbeKind::Liveness));
        let id = world.containers[0].id.clone();
        assert_eq!(
            world.plan().actions,
            [Action::Kill {
                container: "c".into(),
                id,
                message: message.into(),
                grace: 3,
                restarts: policy == "Always",
            }]
        );
    }
}

#[test]
fn what_was_ended_to_run_again_does_so_whatever_it_exits_with() {
    let mut world = World::new(json!({"restartPolicy": "OnFailure"}))
        .sandbox(Ready, None)
        .container("c", Exited, Some((0, -5)));
    assert_eq!(world.plan().actions, [Action::StopSandbox(world.id())]);
    let id = world.containers[0].id.clone();
    world.memory.killed.insert(id);
    assert_eq!(world.plan().actions, world.run("c", 1));
}

#[test]
fn containers_have_policies_and_rules_of_their_own() {
    for (container, code, restarts) in [
        (json!({"restartPolicy": "Never"}), 1, false),
        (json!({"restartPolicy": "OnFailure"}), 1, true),
        (json!({"restartPolicy": "OnFailure"}), 0, false),
        (
            json!({"restartPolicy": "Never", "restartPolicyRules": [{"action": "Restart",
                "exitCodes": {"operator": "In", "values": [42]}}]}),
            42,
            true,
        ),
        (
            json!({"restartPolicy": "Never", "restartPolicyRules": [{"action": "Restart",
                "exitCodes": {"operator": "NotIn", "values": [42]}}]}),
            42,
            false,
        ),
    ] {
        let mut given = json!({"name": "c", "image": "busybox"});
        given
            .as_object_mut()
            .unwrap()
            .extend(container.as_object().unwrap().clone());
        let world = World::new(json!({"containers": [given]}))
            .sandbox(Ready, None)
            .container("c", Exited, Some((code, -5)));
        let runs = world.plan().actions == world.run("c", 1);
        assert_eq!(runs, restarts, "{container} {code}");
    }
}

#[test]
fn an_ephemeral_container_comes_once_to_a_vm_that_runs() {
    let spec = json!({"ephemeralContainers": [{"name": "e", "image": "busybox"}]});
    let world = World::new(spec.clone())
        .sandbox(Ready, None)
        .container("c", Running, None);
    assert_eq!(world.plan().actions, world.run("e", 0));
    let world = world.container("e", Exited, Some((1, -5)));
    assert_eq!(world.plan().actions, []);
    let world = World::new(spec);
    assert_eq!(world.plan().actions, [Action::RunSandbox { attempt: 0 }]);
}

#[test]
fn restarts_end_at_the_most_that_was_asked_for() {
    let world = |failures: usize| {
        let mut world =
            World::new(json!({"restartPolicy": "OnFailure"})).sandbox(SandboxState::Ready, None);
        world.pod.metadata.annotations = Some(BTreeMap::from([(
            "hypernetes.io/max-restarts".to_owned(),
            "3".to_owned(),
        )]));
        for _failure in 0..failures {
            world = world.container("c", ContainerState::Exited, Some((1, -1000)));
        }
        world
    };
    for failures in 1..=3 {
        let view = world(failures);
        assert!(!view.view().is_finished(), "{failures} failures");
    }
    assert!(world(4).view().is_finished(), "three restarts were made");
}

#[test]
fn a_pod_that_is_stopped_at_its_deadline_has_the_time_that_was_asked_for() {
    let mut world = World::new(json!({"terminationGracePeriodSeconds": 30}));
    assert_eq!(world.view().grace_seconds(), 30);
    world.pod.metadata.annotations = Some(BTreeMap::from([(
        "hypernetes.io/stop-grace-seconds".to_owned(),
        "0".to_owned(),
    )]));
    assert_eq!(world.view().grace_seconds(), 0);
    world.pod.metadata.deletion_grace_period_seconds = Some(5);
    assert_eq!(world.view().grace_seconds(), 5, "a deletion says its own");
}
