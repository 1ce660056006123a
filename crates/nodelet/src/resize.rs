//! Pods that are resized in place: limits of containers, and the VM around them.
//!
//! What a container has been given is kept with its record in the runtime; what the pod asks for now is
//! in its spec. The VM grows before a limit does and shrinks after one has, within what was planned when it
//! was booted. Memory that a guest does not give back stays with it.

use std::collections::BTreeMap;

use hypernetes_runtime::{
    ContainerState, ContainerStatus, ContainerUpdate, SandboxStatus, SandboxUpdate,
};
use hypernetes_telemetry::chain;
use hypernetes_types::{ContainerId, SandboxId};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

use crate::{
    events::Level,
    plan::{Slot, View},
    resources::{self, VmSize},
    roles::{self, Role},
    steps::{Node, Outcome},
};

/// Why a resize has not happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResizeState {
    /// Of the pod's spec.
    pub(crate) generation: Option<i64>,
    /// `Infeasible`, or `Error` if it shall be tried again.
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) since: Timestamp,
}

/// Seconds until a resize that failed is tried again.
const RETRY_SECONDS: i64 = 10;
const MIB: u64 = 1 << 20;

/// What a container has been given, as it asked for it.
pub(crate) fn allocated(record: &ContainerStatus) -> Option<ResourceRequirements> {
    serde_json::from_str(&record.config.memo).ok()
}

/// The note of what a container is given.
pub(crate) fn memo(container: &Container) -> String {
    let resources = container.resources.clone().unwrap_or_default();
    serde_json::to_string(&resources).unwrap_or_default()
}

/// CPU and memory, which are all that a resize changes.
fn amounts(resources: &ResourceRequirements) -> BTreeMap<(&'static str, &'static str), i64> {
    let mut amounts = BTreeMap::new();
    for (list, map) in [
        ("limits", &resources.limits),
        ("requests", &resources.requests),
    ] {
        for name in ["cpu", "memory"] {
            let quantity = map.as_ref().and_then(|map| map.get(name));
            let parsed = quantity.and_then(|q| q.0.parse::<hypernetes_types::Quantity>().ok());
            if let Some(quantity) = parsed {
                amounts.insert((list, name), quantity.milli_value());
            }
        }
    }
    amounts
}

/// Names of the resources in which a container differs from what it has been given.
fn changes(container: &Container, record: &ContainerStatus) -> Vec<&'static str> {
    let Some(has) = allocated(record) else {
        return Vec::new();
    };
    let has = amounts(&has);
    let wants = amounts(&container.resources.clone().unwrap_or_default());
    ["cpu", "memory"]
        .into_iter()
        .filter(|name| {
            ["limits", "requests"]
                .iter()
                .any(|list| has.get(&(*list, *name)) != wants.get(&(*list, *name)))
        })
        .collect()
}

/// Containers that can be resized.
fn resizable(pod: &Pod) -> Vec<Container> {
    let all = pod.spec.as_ref().map(roles::all).unwrap_or_default();
    all.into_iter()
        .filter(|(_, role)| matches!(role, Role::Main | Role::Sidecar))
        .map(|(container, _)| container)
        .collect()
}

/// Running containers that differ from the spec, with the resources in which they do.
fn differing(
    pod: &Pod,
    sandbox: &SandboxId,
    records: &[ContainerStatus],
) -> Vec<(Container, ContainerStatus, Vec<&'static str>)> {
    let mut found = Vec::new();
    for container in resizable(pod) {
        let record = records.iter().find(|record| {
            record.config.name == container.name
                && record.sandbox == *sandbox
                && record.state == ContainerState::Running
        });
        let Some(record) = record else { continue };
        let changes = changes(&container, record);
        if !changes.is_empty() {
            found.push((container, record.clone(), changes));
        }
    }
    found
}

/// The running containers have not got what the pod asks for, and it is time to try.
pub(crate) fn is_wanted(view: &View<'_>) -> bool {
    let Some(sandbox) = view.ready() else {
        return false;
    };
    if view.busy.contains(&Slot::Resize) || view.busy.contains(&Slot::Sandbox) {
        return false;
    }
    if let Some(state) = &view.memory.resize
        && state.generation == view.pod.metadata.generation
    {
        let waited = view.now.duration_since(state.since).as_secs();
        if state.reason == "Infeasible" || waited < RETRY_SECONDS {
            return false;
        }
    }
    !differing(view.pod, &sandbox.id, view.containers).is_empty()
}

/// When a failed resize is to be looked at again.
pub(crate) fn retry_at(state: Option<&ResizeState>) -> Option<Timestamp> {
    let state = state.filter(|state| state.reason == "Error")?;
    state
        .since
        .checked_add(jiff::SignedDuration::from_secs(RETRY_SECONDS))
        .ok()
}

/// Whether the VM can be as large as the pod asks; the reason if not.
fn feasible(node: &Node, pod: &Pod, sandbox: &SandboxStatus, wanted: VmSize) -> Result<(), String> {
    let capacity = node.capacity;
    let all = resizable(pod);
    for (name, has) in [
        ("cpu", i64::from(capacity.cpus) * 1000),
        ("memory", capacity.memory_bytes),
    ] {
        let sum = all
            .iter()
            .filter_map(|container| resources::request(container, name))
            .map(|amount| match name {
                "cpu" => amount.milli_value(),
                _ => amount.value(),
            })
            .fold(0i64, i64::saturating_add);
        if sum > has {
            return Err(format!(
                "Node didn't have enough capacity: {name}, requested: {sum}, capacity: {has}"
            ));
        }
    }
    let config = &sandbox.config;
    let most_memory = config.extras.max_memory_mib.max(config.memory_mib);
    if wanted.memory_mib > most_memory {
        let room = most_memory.saturating_sub(node.config.overhead_mib);
        return Err(format!(
            "The pod's virtual machine cannot have more than {room}Mi for its containers; create the \
             pod anew"
        ));
    }
    let most_cpus = config.extras.max_vcpus.max(config.vcpus);
    if wanted.vcpus > most_cpus {
        return Err(format!(
            "The pod's virtual machine cannot have more than {most_cpus} CPUs; create the pod anew"
        ));
    }
    Ok(())
}

impl Node {
    /// Gives the running containers of a pod what its spec asks for.
    pub(crate) async fn resize(&self, pod: &Pod, id: SandboxId) -> Outcome {
        let outcome = |reason, message| {
            Outcome::Resized(Err(ResizeState {
                generation: pod.metadata.generation,
                reason,
                message,
                since: Timestamp::now(),
            }))
        };
        let (Some(sandbox), Some(spec)) = (self.runtime.sandbox(&id).await, &pod.spec) else {
            return Outcome::Done;
        };
        let wanted = resources::vm_size(spec, &self.config, self.capacity);
        if let Err(message) = feasible(self, pod, &sandbox, wanted) {
            let said = format!("Pod resize infeasible: {message}");
            self.events
                .pod(pod, None, Level::Warning, "ResizeInfeasible", said);
            return outcome("Infeasible", message);
        }
        match self.resize_now(pod, &sandbox, wanted).await {
            Ok(restarts) => {
                let done = "Pod resize completed".to_owned();
                self.events
                    .pod(pod, None, Level::Normal, "ResizeCompleted", done);
                Outcome::Resized(Ok(restarts))
            }
            Err(message) => {
                let said = format!("Pod resize error: {message}");
                self.events
                    .pod(pod, None, Level::Warning, "ResizeError", said);
                outcome("Error", message)
            }
        }
    }

    /// Makes the VM large enough for what is about to start in it: its pod may have been resized while
    /// nothing ran.
    pub(crate) async fn make_room(&self, pod: &Pod, id: &SandboxId) -> Result<(), String> {
        let (Some(sandbox), Some(spec)) = (self.runtime.sandbox(id).await, &pod.spec) else {
            return Ok(());
        };
        let wanted = resources::vm_size(spec, &self.config, self.capacity);
        let update = SandboxUpdate {
            vcpus: wanted.vcpus.max(sandbox.vcpus),
            memory_mib: wanted.memory_mib.max(sandbox.memory_mib),
            memo: None,
        };
        if (update.vcpus, update.memory_mib) == (sandbox.vcpus, sandbox.memory_mib) {
            return Ok(());
        }
        feasible(self, pod, &sandbox, wanted)?;
        let grown = self.runtime.resize_sandbox(id, update).await;
        grown.map_err(|error| chain(&error).to_string())
    }

    async fn resize_now(
        &self,
        pod: &Pod,
        sandbox: &SandboxStatus,
        wanted: VmSize,
    ) -> Result<Vec<(String, ContainerId)>, String> {
        let text = |error: hypernetes_runtime::RuntimeError| chain(&error).to_string();
        let least = &sandbox.config;
        let wanted = VmSize {
            vcpus: wanted.vcpus.max(least.vcpus),
            memory_mib: wanted.memory_mib.max(least.memory_mib),
        };
        let grown = SandboxUpdate {
            vcpus: wanted.vcpus.max(sandbox.vcpus),
            memory_mib: wanted.memory_mib.max(sandbox.memory_mib),
            memo: None,
        };
        if (grown.vcpus, grown.memory_mib) != (sandbox.vcpus, sandbox.memory_mib) {
            self.runtime
                .resize_sandbox(&sandbox.id, grown)
                .await
                .map_err(text)?;
        }
        let records = self.runtime.list_containers(Some(&sandbox.id)).await;
        let usage = self.runtime.stats(&sandbox.id).await.map_err(text)?;
        let mut restarts = Vec::new();
        for (container, record, changes) in differing(pod, &sandbox.id, &records) {
            let restart = container.resize_policy.iter().flatten().any(|policy| {
                policy.restart_policy == "RestartContainer"
                    && changes.contains(&policy.resource_name.as_str())
            });
            if restart {
                restarts.push((container.name.clone(), record.id.clone()));
                continue;
            }
            let resources = resources::container_resources(&container, pod.spec.as_ref());
            let limit = u64::try_from(resources.memory_limit).unwrap_or(0);
            let used = usage.containers.iter().find(|stats| stats.id == record.id);
            let used = used.map_or(0, |stats| stats.memory_working_set);
            // Below what is in use the guest's kernel would kill it.
            if limit > 0 && limit < used {
                return Err(format!(
                    "attempting to set container {} memory limit ({limit}) below current usage ({used})",
                    container.name
                ));
            }
            let update = ContainerUpdate {
                resources,
                memo: memo(&container),
                host: None,
            };
            self.runtime
                .update_container(&record.id, update)
                .await
                .map_err(text)?;
        }
        let now = self.runtime.sandbox(&sandbox.id).await;
        let larger =
            now.is_some_and(|now| (now.vcpus, now.memory_mib) != (wanted.vcpus, wanted.memory_mib));
        if larger {
            let update = SandboxUpdate {
                vcpus: wanted.vcpus,
                memory_mib: wanted.memory_mib,
                memo: None,
            };
            if let Err(error) = self.runtime.resize_sandbox(&sandbox.id, update).await {
                tracing::warn!(sandbox = %sandbox.id, error = %chain(&error), "a VM stays larger than its pod");
            }
        }
        Ok(restarts)
    }
}

/// What the VM of a pod can be given later. A pod without any limit or request cannot be resized: it would
/// change its quality of service.
pub(crate) fn room(
    spec: &k8s_openapi::api::core::v1::PodSpec,
    size: VmSize,
    capacity: resources::Capacity,
) -> hypernetes_runtime::VmExtras {
    let all = roles::all(spec);
    let has = |name: &str| {
        all.iter()
            .any(|(container, _)| resources::request(container, name).is_some())
    };
    if !has("cpu") && !has("memory") {
        return hypernetes_runtime::VmExtras::default();
    }
    let node = u32::try_from(u64::try_from(capacity.memory_bytes).unwrap_or(0) / MIB);
    let node = node.unwrap_or(u32::MAX).max(size.memory_mib);
    let memory = size.memory_mib.saturating_mul(4).max(1024).min(node);
    hypernetes_runtime::VmExtras {
        max_vcpus: capacity.cpus.max(size.vcpus),
        // Memory that can be added needs another machine, which boots a little slower.
        max_memory_mib: if has("memory") { memory } else { 0 },
        shares: false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::plan::tests::World;

    #[test]
    fn a_changed_limit_is_found_and_an_infeasible_one_not_tried_again() {
        let spec = json!({"containers": [{"name": "c", "image": "busybox",
            "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}}}]});
        let mut world = World::new(spec)
            .sandbox(hypernetes_runtime::SandboxState::Ready, None)
            .container("c", ContainerState::Running, None);
        assert!(!is_wanted(&world.view()), "nothing is known of it");
        let same = r#"{"limits":{"cpu":"0.5","memory":"65536Ki"}}"#;
        same.clone_into(&mut world.containers[0].config.memo);
        assert!(!is_wanted(&world.view()), "the same in other words");
        let less = r#"{"limits":{"cpu":"500m","memory":"32Mi"}}"#;
        less.clone_into(&mut world.containers[0].config.memo);
        assert!(is_wanted(&world.view()));
        world.memory.resize = Some(ResizeState {
            generation: None,
            reason: "Infeasible",
            message: String::new(),
            since: world.now,
        });
        assert!(!is_wanted(&world.view()));
        world.pod.metadata.generation = Some(2);
        assert!(is_wanted(&world.view()), "a new wish");
        world.busy.insert(Slot::Resize);
        assert!(!is_wanted(&world.view()));
    }

    #[test]
    fn only_pods_with_resources_have_room() {
        let room = |containers| {
            let spec = serde_json::from_value(json!({"containers": containers})).unwrap();
            let size = VmSize {
                vcpus: 1,
                memory_mib: 128,
            };
            let capacity = resources::Capacity {
                cpus: 4,
                memory_bytes: 8 << 30,
                storage_bytes: 0,
            };
            super::room(&spec, size, capacity)
        };
        let none = room(json!([{"name": "c"}]));
        assert_eq!((none.max_vcpus, none.max_memory_mib), (0, 0));
        let cpu = room(json!([{"name": "c", "resources": {"limits": {"cpu": "1"}}}]));
        assert_eq!((cpu.max_vcpus, cpu.max_memory_mib), (4, 0));
        let memory = room(json!([{"name": "c", "resources": {"requests": {"memory": "1Mi"}}}]));
        assert_eq!((memory.max_vcpus, memory.max_memory_mib), (4, 1024));
    }
}
