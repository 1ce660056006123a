//! A pod that goes on from another one of its namespace, as its annotation `hypernetes.io/clone-of` says, or from
//! a snapshot, as `hypernetes.io/clone-of-snapshot` says.
//!
//! Only its first VM does: once that has ended, the pod starts as any. What it asks for must be what the source
//! asked for, because the processes that it goes on with are the source's.

use hypernetes_runtime::{
    CloneConfig, CloneSource, ContainerConfig, ContainerState, ContainerStatus, SandboxConfig,
    SandboxState, VolumeConfig,
};
use hypernetes_telemetry::chain;
use hypernetes_types::SandboxId;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::Api;
use serde_json::Value;

use crate::{
    events::Level,
    plan::{Plan, View, Waiting},
    roles,
    steps::Node,
    wishes::CloneOf,
};

/// Fields of a pod's spec that its processes were made by.
const SAME: [&str; 9] = [
    "containers",
    "initContainers",
    "volumes",
    "securityContext",
    "serviceAccountName",
    "runtimeClassName",
    "shareProcessNamespace",
    "hostUsers",
    "resources",
];
/// Volumes that two pods cannot both have.
const SHARED: [&str; 4] = ["persistentVolumeClaim", "ephemeral", "hostPath", "csi"];

/// Why the containers of a clone do not run.
pub(crate) fn waiting(message: &str) -> Waiting {
    Waiting {
        reason: "CloneError".to_owned(),
        message: message.to_owned(),
    }
}

/// Says of the containers what the clone waits for.
pub(crate) fn tell(view: &View<'_>, plan: &mut Plan) {
    let Some(message) = &view.memory.clone_trouble else {
        return;
    };
    for container in view.init_containers().iter().chain(view.containers()) {
        let told = plan.waiting.entry(container.name.clone());
        told.or_insert_with(|| waiting(message));
    }
}

impl Node {
    /// Has the pod's VM go on from that of another pod or of a snapshot, with the pod's own files in its volumes.
    pub(crate) async fn clone_sandbox(
        &self,
        pod: &Pod,
        of: CloneOf<'_>,
        config: SandboxConfig,
        volumes: &[VolumeConfig],
    ) -> Result<SandboxId, String> {
        let (source, containers) = match of {
            CloneOf::Pod(name) => self.source(pod, name).await?,
            CloneOf::Snapshot(name) => {
                let kept = self.snapshot(pod, name).await?;
                let containers = configs(pod, kept.containers.iter());
                (CloneSource::Snapshot(kept.id), containers)
            }
        };
        let clone = CloneConfig {
            source,
            containers,
            volumes: volumes.to_vec(),
        };
        let cloned = self.runtime.clone_sandbox(config, clone).await;
        let sandbox = cloned.map_err(|error| chain(&error).to_string())?;
        let said = format!("Cloned the virtual machine of {of}");
        self.events.pod(pod, None, Level::Normal, "Cloned", said);
        Ok(sandbox)
    }

    /// The VM of the source, and what its containers are in the clone.
    async fn source(
        &self,
        pod: &Pod,
        name: &str,
    ) -> Result<(CloneSource, Vec<ContainerConfig>), String> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let pods = Api::<Pod>::namespaced(self.client.clone(), &namespace);
        let found = pods.get_opt(name).await;
        let found = found.map_err(|error| format!("cannot read pod {name}: {}", chain(&error)))?;
        let source = found.ok_or_else(|| format!("pods \"{name}\" not found"))?;
        check(pod, &source)?;
        let (sandbox, records) = self.running(&source).await?;
        let records = records.iter().filter(|it| it.sandbox == sandbox);
        let configs = configs(pod, records.filter(was_started).map(|it| &it.config));
        Ok((CloneSource::Sandbox(sandbox), configs))
    }

    /// The VM of a pod, if it is on this node, and the containers that it has had.
    pub(crate) async fn running(
        &self,
        source: &Pod,
    ) -> Result<(SandboxId, Vec<ContainerStatus>), String> {
        let uid = source.metadata.uid.clone().unwrap_or_default();
        let (sandboxes, records) = self.records(&uid).await;
        let sandbox = sandboxes
            .last()
            .filter(|sandbox| sandbox.state == SandboxState::Ready);
        let sandbox = sandbox.ok_or_else(|| {
            let name = source.metadata.name.as_deref().unwrap_or_default();
            format!("pod {name} has no virtual machine that runs on this node")
        })?;
        Ok((sandbox.id.clone(), records))
    }
}

fn was_started(record: &&ContainerStatus) -> bool {
    matches!(
        record.state,
        ContainerState::Running | ContainerState::Unknown | ContainerState::Exited
    )
}

/// The newest container of each name, as the first of the new pod's.
fn configs<'a>(
    pod: &Pod,
    of_source: impl Iterator<Item = &'a ContainerConfig>,
) -> Vec<ContainerConfig> {
    let mut newest: Vec<&ContainerConfig> = Vec::new();
    for config in of_source.filter(|it| roles::find(pod, &it.name).is_some()) {
        match newest.iter_mut().find(|other| other.name == config.name) {
            Some(other) if other.attempt < config.attempt => *other = config,
            Some(_) => {}
            None => newest.push(config),
        }
    }
    newest
        .into_iter()
        .map(|config| ContainerConfig {
            attempt: 0,
            log_path: std::path::Path::new(&config.name).join("0.log"),
            ..config.clone()
        })
        .collect()
}

/// Refuses a clone that would not be what it says, and a source of which there can be only one.
fn check(pod: &Pod, source: &Pod) -> Result<(), String> {
    let name = source.metadata.name.as_deref().unwrap_or_default();
    if pod.metadata.uid == source.metadata.uid {
        return Err("a pod cannot be a clone of itself".to_owned());
    }
    if source.metadata.deletion_timestamp.is_some() {
        return Err(format!("pod {name} is being deleted"));
    }
    let spec = source.spec.as_ref().map(value);
    let spec = spec.ok_or_else(|| format!("pod {name} has no spec"))?;
    check_same(pod, CloneOf::Pod(name), &spec)?;
    match only_once(&spec) {
        Some(path) => Err(format!("{path}: cannot be cloned with pod {name}")),
        None => Ok(()),
    }
}

/// Refuses a pod whose processes would be others than it asks for.
pub(crate) fn check_same(pod: &Pod, of: CloneOf<'_>, spec: &Value) -> Result<(), String> {
    let wanted = pod.spec.as_ref().map(value).unwrap_or_default();
    for field in SAME {
        if let Some(path) = difference(&format!("spec.{field}"), &wanted[field], &spec[field]) {
            return Err(format!("{path}: must be as in {of}, which is cloned"));
        }
    }
    Ok(())
}

pub(crate) fn value(spec: &PodSpec) -> Value {
    serde_json::to_value(spec).unwrap_or_default()
}

/// The path of the first difference.
fn difference(path: &str, one: &Value, other: &Value) -> Option<String> {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let keys = one.keys().chain(other.keys());
            keys.into_iter().find_map(|key| {
                let get = |map: &serde_json::Map<String, Value>| map.get(key).cloned();
                let (one, other) = (get(one).unwrap_or_default(), get(other).unwrap_or_default());
                difference(&format!("{path}.{key}"), &one, &other)
            })
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            let pairs = one.iter().zip(other).enumerate();
            pairs.into_iter().find_map(|(index, (one, other))| {
                difference(&format!("{path}[{index}]"), one, other)
            })
        }
        (one, other) => (one != other).then(|| path.to_owned()),
    }
}

/// The path of the first thing that only one pod can have.
pub(crate) fn only_once(spec: &Value) -> Option<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    for (index, volume) in list(&spec["volumes"]).iter().enumerate() {
        if let Some(kind) = SHARED.iter().find(|kind| !volume[**kind].is_null()) {
            return Some(format!("spec.volumes[{index}].{kind}"));
        }
        let medium = volume["emptyDir"]["medium"].as_str().unwrap_or_default();
        if medium.starts_with("HugePages") {
            return Some(format!("spec.volumes[{index}].emptyDir.medium"));
        }
    }
    for kind in ["initContainers", "containers"] {
        for (index, container) in list(&spec[kind]).iter().enumerate() {
            for (port, asked) in list(&container["ports"]).iter().enumerate() {
                if asked["hostPort"].as_i64().unwrap_or(0) != 0 {
                    return Some(format!("spec.{kind}[{index}].ports[{port}].hostPort"));
                }
            }
            let limits = container["resources"]["limits"].as_object();
            let mut limits = limits.into_iter().flatten();
            if let Some((name, _)) = limits.find(|(name, _)| name.starts_with("hugepages-")) {
                return Some(format!("spec.{kind}[{index}].resources.limits[{name}]"));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(uid: &str, spec: &Value) -> Pod {
        let pod = json!({"metadata": {"name": uid, "namespace": "acme", "uid": uid}, "spec": spec});
        serde_json::from_value(pod).unwrap()
    }

    fn refused(wanted: &Value, source: &Value) -> Option<String> {
        check(&pod("b", wanted), &pod("a", source)).err()
    }

    #[test]
    fn a_clone_asks_for_what_its_source_has() {
        let spec = json!({"containers": [{"name": "c", "image": "x", "env": [{"name": "A", "value": "1"}]}]});
        let mut other = spec.clone();
        other["nodeName"] = json!("n");
        other["hostname"] = json!("h");
        other["restartPolicy"] = json!("Never");
        assert_eq!(refused(&other, &spec), None);
        for (path, change) in [
            (
                "spec.containers[0].image",
                ("/containers/0/image", json!("y")),
            ),
            (
                "spec.containers[0].env[0].value",
                ("/containers/0/env/0/value", json!("2")),
            ),
            ("spec.containers", ("/containers", json!([]))),
            (
                "spec.volumes",
                ("/volumes", json!([{"name": "v", "emptyDir": {}}])),
            ),
            ("spec.hostUsers", ("/hostUsers", json!(false))),
        ] {
            let mut other = spec.clone();
            let (at, value) = change;
            match other.pointer_mut(at) {
                Some(place) => *place = value,
                None => other[at.trim_start_matches('/')] = value,
            }
            let said = format!("{path}: must be as in pod a, which is cloned");
            assert_eq!(refused(&other, &spec), Some(said));
        }
    }

    #[test]
    fn what_there_is_once_is_not_cloned() {
        let container = |more: Value| {
            let mut container = json!({"name": "c", "image": "x"});
            container
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            json!({"containers": [container]})
        };
        let volume = |source: Value| {
            let mut volume = json!({"name": "v"});
            volume
                .as_object_mut()
                .unwrap()
                .extend(source.as_object().unwrap().clone());
            json!({"containers": [{"name": "c"}], "volumes": [volume]})
        };
        for (spec, path) in [
            (
                volume(json!({"persistentVolumeClaim": {"claimName": "x"}})),
                "spec.volumes[0].persistentVolumeClaim",
            ),
            (
                volume(json!({"hostPath": {"path": "/x"}})),
                "spec.volumes[0].hostPath",
            ),
            (
                volume(json!({"emptyDir": {"medium": "HugePages-2Mi"}})),
                "spec.volumes[0].emptyDir.medium",
            ),
            (
                container(
                    json!({"ports": [{"containerPort": 80}, {"containerPort": 81, "hostPort": 81}]}),
                ),
                "spec.containers[0].ports[1].hostPort",
            ),
            (
                container(json!({"resources": {"limits": {"cpu": "1", "hugepages-2Mi": "2Mi"}}})),
                "spec.containers[0].resources.limits[hugepages-2Mi]",
            ),
        ] {
            let said = format!("{path}: cannot be cloned with pod a");
            assert_eq!(refused(&spec, &spec), Some(said));
        }
        let fine = volume(json!({"emptyDir": {"medium": "Memory"}}));
        assert_eq!(refused(&fine, &fine), None);
    }

    #[test]
    fn a_source_that_goes_is_none() {
        let spec = json!({"containers": [{"name": "c"}]});
        let same = pod("a", &spec);
        assert!(check(&same, &same).unwrap_err().contains("itself"));
        let mut going = pod("a", &spec);
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now());
        going.metadata.deletion_timestamp = Some(now);
        let error = check(&pod("b", &spec), &going).unwrap_err();
        assert_eq!(error, "pod a is being deleted");
    }
}
