//! StatefulSet: pods with names that stay, made and replaced in order.

use std::collections::BTreeMap;

use hypernetes_apimachinery::meta;
use jiff::Timestamp;
use kube::runtime::controller::Action;
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, name, pods, stateful_sets},
    owned::{
        available, claim, count, create_pods, delete_pods, is_active, is_ready, number, phase,
        pod_of,
    },
    replica_set::until,
    revisions::{self, REVISION_LABEL},
    set_claims,
};
use crate::error::ReconcileError;

const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// What is known of a set at one moment.
struct View<'a> {
    set: &'a Value,
    /// Pods by ordinal.
    pods: BTreeMap<i64, &'a Value>,
    /// Name of the present template's revision, and of the one before it that pods still have.
    update: &'a str,
    current: &'a str,
    now: Timestamp,
}

impl View<'_> {
    fn start(&self) -> i64 {
        number(&self.set["spec"]["ordinals"]["start"])
    }

    fn end(&self) -> i64 {
        self.start() + number(&self.set["spec"]["replicas"])
    }

    fn in_order(&self) -> bool {
        self.set["spec"]["podManagementPolicy"] != "Parallel"
    }

    /// The first ordinal that gets the present template.
    fn partition(&self) -> i64 {
        let strategy = &self.set["spec"]["updateStrategy"];
        match strategy["type"].as_str() {
            Some("OnDelete") => i64::MAX,
            _ => number(&strategy["rollingUpdate"]["partition"]),
        }
    }

    fn is_available(&self, pod: &Value) -> bool {
        let seconds = number(&self.set["spec"]["minReadySeconds"]);
        is_active(pod) && available(pod, seconds, self.now).is_ok()
    }
}

pub(super) async fn reconcile(cluster: &Cluster, set: Value) -> Result<Action, ReconcileError> {
    if meta::is_deleting(&set) {
        return Ok(Action::await_change());
    }
    let now = Timestamp::now();
    let claimed = claim(cluster, &set, &pods()).await?;
    let all = revisions::ensure(cluster, &set).await?;
    let update = all.last().map(revisions::name_of).unwrap_or_default();
    let known = set["status"]["currentRevision"]
        .as_str()
        .unwrap_or_default();
    // A revision that is not there any more cannot be made pods of.
    let current = match all.iter().find(|revision| name(revision) == known) {
        Some(revision) => name(revision),
        None => update,
    };
    let mut by_ordinal = BTreeMap::new();
    for pod in &claimed {
        if let Some(ordinal) = ordinal(&set, pod) {
            by_ordinal.insert(ordinal, pod);
        }
    }
    let view = View {
        set: &set,
        pods: by_ordinal,
        update,
        current,
        now,
    };
    let template_of = |revision: &str| {
        all.iter()
            .find(|own| name(own) == revision)
            .map_or(
                &set["spec"]["template"],
                |own| &own["data"]["spec"]["template"],
            )
    };
    set_claims::own(cluster, &set, |ordinal| view.pods.get(&ordinal).copied()).await?;
    let failure = advance(cluster, &view, template_of).await?;
    let in_use: Vec<&str> = claimed
        .iter()
        .filter_map(|pod| meta::label(pod, REVISION_LABEL))
        .chain([current, update])
        .collect();
    revisions::clean_up(cluster, &set, &all, &in_use).await?;
    let (status, next) = status(&view);
    cluster
        .update_status(&stateful_sets(), &set, status)
        .await?;
    match (failure, next) {
        (Some(error), _) => Err(error),
        (None, Some(at)) => Ok(Action::requeue(until(at, now))),
        (None, None) => Ok(Action::await_change()),
    }
}

fn ordinal(set: &Value, pod: &Value) -> Option<i64> {
    let rest = name(pod).strip_prefix(name(set))?.strip_prefix('-')?;
    let plain = rest.chars().all(|c| c.is_ascii_digit());
    rest.parse().ok().filter(|_| plain)
}

/// Does the next steps; gives why a pod could not be made, if so.
async fn advance<'a>(
    cluster: &Cluster,
    view: &View<'a>,
    template_of: impl Fn(&str) -> &'a Value,
) -> Result<Option<ReconcileError>, ReconcileError> {
    for ordinal in view.start()..view.end() {
        match view.pods.get(&ordinal) {
            // Made anew when it has gone.
            Some(pod)
                if matches!(phase(pod), "Failed" | "Succeeded") && !meta::is_deleting(pod) =>
            {
                delete_pods(cluster, view.set, &[pod]).await?;
                if view.in_order() {
                    return Ok(None);
                }
            }
            Some(pod) => {
                if view.in_order() && !view.is_available(pod) {
                    return Ok(None);
                }
            }
            None => {
                let revision =
                    if ordinal >= view.partition().min(view.end()) || view.current == view.update {
                        view.update
                    } else {
                        view.current
                    };
                let pod = pod(view.set, ordinal, revision, template_of(revision));
                if let Err(error) = set_claims::ensure(cluster, view.set, ordinal).await {
                    return Ok(Some(error));
                }
                let (_, error) = create_pods(cluster, view.set, &[pod]).await;
                if error.is_some() || view.in_order() {
                    return Ok(error);
                }
            }
        }
    }
    // Too many: the last first, and each only when the others serve.
    let surplus = view
        .pods
        .iter()
        .rev()
        .filter(|(ordinal, _)| **ordinal < view.start() || **ordinal >= view.end());
    let mut any = false;
    for (_, pod) in surplus {
        any = true;
        if !meta::is_deleting(pod) {
            delete_pods(cluster, view.set, &[pod]).await?;
        }
        if view.in_order() {
            return Ok(None);
        }
    }
    if any {
        return Ok(None);
    }
    // The last first; what does not serve is replaced without waiting for it.
    for ordinal in (view.start().max(view.partition())..view.end()).rev() {
        let Some(pod) = view.pods.get(&ordinal) else {
            return Ok(None);
        };
        if revision_of(pod) != view.update && !meta::is_deleting(pod) {
            delete_pods(cluster, view.set, &[pod]).await?;
            return Ok(None);
        }
        if !view.is_available(pod) {
            return Ok(None);
        }
    }
    Ok(None)
}

fn revision_of(pod: &Value) -> &str {
    meta::label(pod, REVISION_LABEL).unwrap_or_default()
}

fn pod(set: &Value, ordinal: i64, revision: &str, template: &Value) -> Value {
    let mut pod = pod_of(template, set);
    let pod_name = format!("{}-{ordinal}", name(set));
    meta::remove(&mut pod, "generateName");
    meta::set(&mut pod, "name", pod_name.as_str());
    meta::set_label(&mut pod, POD_NAME, &pod_name);
    meta::set_label(&mut pod, POD_INDEX, &ordinal.to_string());
    meta::set_label(&mut pod, REVISION_LABEL, revision);
    let spec = &mut pod["spec"];
    spec["hostname"] = pod_name.as_str().into();
    let service = set["spec"]["serviceName"].as_str().unwrap_or_default();
    if !service.is_empty() {
        spec["subdomain"] = service.into();
    }
    // Each pod has its own claim of each template.
    for template in set_claims::templates(set) {
        let volume = json!({"name": name(template), "persistentVolumeClaim":
            {"claimName": set_claims::claim_name(template, set, ordinal)}});
        match spec["volumes"].as_array_mut() {
            Some(volumes) => {
                volumes.retain(|own| own["name"] != volume["name"]);
                volumes.push(volume);
            }
            None => spec["volumes"] = json!([volume]),
        }
    }
    pod
}

fn status(view: &View<'_>) -> (Value, Option<Timestamp>) {
    let set = view.set;
    let wanted: Vec<&Value> = view.pods.values().copied().collect();
    let of = |revision: &str| {
        let own = wanted
            .iter()
            .filter(|pod| revision_of(pod) == revision && is_active(pod));
        count(own.count())
    };
    let ready = wanted
        .iter()
        .filter(|pod| is_active(pod) && is_ready(pod))
        .count();
    let serving = wanted.iter().filter(|pod| view.is_available(pod)).count();
    let seconds = number(&set["spec"]["minReadySeconds"]);
    let next = wanted
        .iter()
        .filter_map(|pod| available(pod, seconds, view.now).err().flatten())
        .min();
    let updated = of(view.update);
    let total = number(&set["spec"]["replicas"]);
    // All have the present template: there is no other one any more.
    let done = updated == total && count(ready) == total && count(wanted.len()) == total;
    let current = if done { view.update } else { view.current };
    let mut status = json!({
        "observedGeneration": meta::generation(set),
        "replicas": count(wanted.len()),
        "availableReplicas": count(serving),
        "currentRevision": current,
        "updateRevision": view.update,
        "collisionCount": number(&set["status"]["collisionCount"]),
    });
    for (field, value) in [
        ("readyReplicas", count(ready)),
        ("currentReplicas", of(current)),
        ("updatedReplicas", updated),
    ] {
        if value != 0 {
            status[field] = value.into();
        }
    }
    (status, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_told_by_its_ordinal() {
        let set = json!({"metadata": {"name": "web"}});
        let of = |pod: &str| ordinal(&set, &json!({"metadata": {"name": pod}}));
        assert_eq!(of("web-0"), Some(0));
        assert_eq!(of("web-12"), Some(12));
        for other in ["web", "web-", "web-a", "web-+1", "web-1-2", "other-0"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_pod_carries_its_name_and_its_claims() {
        let set = json!({"metadata": {"name": "web", "namespace": "n"}, "spec": {"serviceName": "s",
            "volumeClaimTemplates": [{"metadata": {"name": "data"}}]}});
        let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": []}});
        let pod = pod(&set, 2, "web-x", &template);
        assert_eq!(name(&pod), "web-2");
        assert_eq!(pod["metadata"]["labels"][POD_INDEX], "2");
        assert_eq!(pod["spec"]["hostname"], "web-2");
        assert_eq!(pod["spec"]["subdomain"], "s");
        assert_eq!(
            pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"],
            "data-web-2"
        );
    }
}
