//! HorizontalPodAutoscaler: as many replicas as the use of resources asks for.
//!
//! Usage comes from `metrics.k8s.io`, sizes are read and written by `scale`. What was recommended and done lately is
//! remembered in memory only: after a restart the windows begin anew.

mod behavior;
mod usage;

use std::time::Duration;

use hypernetes_apimachinery::{meta, quota};
use jiff::Timestamp;
use kube::runtime::controller::Action;
use serde_json::{Value, json};

use super::{
    cluster::{
        Cluster, Kind, autoscalers, deployments, encode, name, namespace, pods, replica_sets,
        replication_controllers, stateful_sets, uid,
    },
    owned::{is_true, number, set_condition},
};
use crate::error::ReconcileError;
pub(super) use behavior::Memory;
use usage::{Sample, Target};

/// How often use is looked at.
const PERIOD: Duration = Duration::from_secs(15);

/// Why there is no recommendation: reason and message of a condition.
type Failure = (&'static str, String);

pub(super) async fn reconcile(cluster: &Cluster, scaler: Value) -> Result<Action, ReconcileError> {
    let again = Ok(Action::requeue(PERIOD));
    if meta::is_deleting(&scaler) {
        return Ok(Action::await_change());
    }
    let now = Timestamp::now();
    let mut status = scaler["status"].clone();
    if !status.is_object() {
        status = json!({});
    }
    let target = &scaler["spec"]["scaleTargetRef"];
    let scale = match scale_of(cluster, &scaler, target).await? {
        Ok(scale) => scale,
        Err(why) => {
            let message =
                format!("the HPA controller was unable to get the target's current scale: {why}");
            set_condition(
                &mut status,
                "AbleToScale",
                false,
                "FailedGetScale",
                &message,
                now,
            );
            cluster
                .event(&scaler, "Warning", "FailedGetScale", &why)
                .await;
            cluster
                .update_status(&autoscalers(), &scaler, status)
                .await?;
            return again;
        }
    };
    let current = number(&scale.object["spec"]["replicas"]);
    let spec = &scaler["spec"];
    let least = spec["minReplicas"].as_i64().unwrap_or(1);
    let most = number(&spec["maxReplicas"]);
    let able = "the HPA controller was able to get the target's current scale";
    set_condition(
        &mut status,
        "AbleToScale",
        true,
        "SucceededGetScale",
        able,
        now,
    );
    status["currentReplicas"] = current.into();
    let mut desired = current;
    let mut why = String::new();
    if current == 0 {
        let message = "scaling is disabled since the replica count of the target is zero";
        set_condition(
            &mut status,
            "ScalingActive",
            false,
            "ScalingDisabled",
            message,
            now,
        );
    } else if current > most {
        (desired, why) = (
            most,
            "Current number of replicas above Spec.MaxReplicas".into(),
        );
    } else if current < least {
        (desired, why) = (
            least,
            "Current number of replicas below Spec.MinReplicas".into(),
        );
    } else {
        match recommend(cluster, &scaler, &scale.object, current, now).await? {
            Ok((wanted, reason, metrics)) => {
                let message = "the HPA was able to successfully calculate a replica count";
                set_condition(
                    &mut status,
                    "ScalingActive",
                    true,
                    "ValidMetricFound",
                    message,
                    now,
                );
                status["currentMetrics"] = metrics.into();
                let memory = &mut cluster.memory();
                let memory = memory.entry(uid(&scaler).to_owned()).or_default();
                let bounded = memory.bound(&spec["behavior"], current, wanted, now);
                desired = bounded.clamp(least, most);
                why = reason;
                let (limited, reason, message) = if bounded > most {
                    (
                        true,
                        "TooManyReplicas",
                        "the desired replica count is more than the maximum replica count",
                    )
                } else if bounded < least {
                    (
                        true,
                        "TooFewReplicas",
                        "the desired replica count is less than the minimum replica count",
                    )
                } else {
                    (
                        false,
                        "DesiredWithinRange",
                        "the desired count is within the acceptable range",
                    )
                };
                set_condition(&mut status, "ScalingLimited", limited, reason, message, now);
            }
            Err((reason, message)) => {
                set_condition(&mut status, "ScalingActive", false, reason, &message, now);
                cluster.event(&scaler, "Warning", reason, &message).await;
            }
        }
    }
    if desired != current {
        let patch = json!({"spec": {"replicas": desired}});
        let at = (namespace(&scaler), name(&scale.object));
        cluster.patch(&scale.kind, at, "scale", &patch).await?;
        let message = format!("New size: {desired}; reason: {why}");
        cluster
            .event(&scaler, "Normal", "SuccessfulRescale", &message)
            .await;
        let message =
            format!("the HPA controller was able to update the target scale to {desired}");
        set_condition(
            &mut status,
            "AbleToScale",
            true,
            "SucceededRescale",
            &message,
            now,
        );
        status["lastScaleTime"] = meta::format_time(now).into();
        let mut memory = cluster.memory();
        let memory = memory.entry(uid(&scaler).to_owned()).or_default();
        memory.scaled(current, desired, now);
    } else if is_true(&status, "ScalingActive") {
        set_condition(
            &mut status,
            "AbleToScale",
            true,
            "ReadyForNewScale",
            "recommended size matches current size",
            now,
        );
    }
    status["desiredReplicas"] = desired.into();
    cluster
        .update_status(&autoscalers(), &scaler, status)
        .await?;
    again
}

struct Scale {
    kind: Kind,
    object: Value,
}

async fn scale_of(
    cluster: &Cluster,
    scaler: &Value,
    target: &Value,
) -> Result<Result<Scale, String>, ReconcileError> {
    let text = |field: &str| target[field].as_str().unwrap_or_default();
    let group = text("apiVersion")
        .split_once('/')
        .map_or("", |(group, _)| group);
    let kind = match (group, text("kind")) {
        ("apps", "Deployment") => Some(deployments()),
        ("apps", "ReplicaSet") => Some(replica_sets()),
        ("apps", "StatefulSet") => Some(stateful_sets()),
        ("", "ReplicationController") => Some(replication_controllers()),
        (group, kind) => super::collector::kinds(cluster)
            .await?
            .into_iter()
            .find(|own| own.group == group && own.kind == kind),
    };
    let Some(kind) = kind else {
        let why = format!("no matches for kind {:?} in group {group:?}", text("kind"));
        return Ok(Err(why));
    };
    match cluster
        .get_scale(&kind, namespace(scaler), text("name"))
        .await
    {
        Ok(object) => Ok(Ok(Scale { kind, object })),
        Err(error) if error.is_not_found() => Ok(Err(error.said())),
        Err(error) => Err(error),
    }
}

/// The most that any metric asks for, why, and what the metrics are.
async fn recommend(
    cluster: &Cluster,
    scaler: &Value,
    scale: &Value,
    current: i64,
    now: Timestamp,
) -> Result<Result<(i64, String, Vec<Value>), Failure>, ReconcileError> {
    let selector = scale["status"]["selector"].as_str().unwrap_or_default();
    if selector.is_empty() {
        let message = "the HPA target's scale is missing a selector".to_owned();
        return Ok(Err(("InvalidSelector", message)));
    }
    let (mut best, mut reason, mut shown) = (None, String::new(), Vec::new());
    let mut failure = None;
    for metric in scaler["spec"]["metrics"].as_array().into_iter().flatten() {
        let (source, container) = match metric["type"].as_str() {
            Some("Resource") => (&metric["resource"], None),
            Some("ContainerResource") => (
                &metric["containerResource"],
                metric["containerResource"]["container"].as_str(),
            ),
            other => {
                let kind = other.unwrap_or_default();
                failure = Some((
                    "InvalidMetricSourceType",
                    format!("metrics of type {kind:?} are not served by this cluster"),
                ));
                continue;
            }
        };
        let resource = source["name"].as_str().unwrap_or_default();
        let samples = samples(
            cluster,
            namespace(scaler),
            selector,
            resource,
            container,
            now,
        )
        .await?;
        let Some(target) = Target::of(&source["target"]) else {
            failure = Some((
                "FailedGetResourceMetric",
                "the metric has no target".to_owned(),
            ));
            continue;
        };
        match usage::replicas(&samples, target, current) {
            Ok((wanted, is)) => {
                let field = if container.is_some() {
                    "containerResource"
                } else {
                    "resource"
                };
                let mut metric = json!({"type": metric["type"], field: {"name": resource, "current": is.show(resource)}});
                if let Some(container) = container {
                    metric[field]["container"] = container.into();
                }
                shown.push(metric);
                if best.is_none_or(|best| wanted > best) {
                    best = Some(wanted);
                    let direction = if wanted > current { "above" } else { "below" };
                    let what = match target {
                        Target::Utilization(_) => "utilization (percentage of request)",
                        Target::Average(_) => "use",
                    };
                    reason = if wanted == current {
                        String::new()
                    } else if wanted > current {
                        format!("{resource} resource {what} {direction} target")
                    } else {
                        "All metrics below target".to_owned()
                    };
                }
            }
            Err(why) => {
                failure = Some(("FailedGetResourceMetric", why.replace("RESOURCE", resource)));
            }
        }
    }
    match (best, failure) {
        // With a metric missing, the others are no reason to have less.
        (Some(wanted), Some(failure)) if wanted < current => Ok(Err(failure)),
        (Some(wanted), _) => Ok(Ok((wanted, reason, shown))),
        (None, Some(failure)) => Ok(Err(failure)),
        (None, None) => Ok(Err((
            "FailedGetResourceMetric",
            "there are no metrics".to_owned(),
        ))),
    }
}

/// What each of the target's pods asks for and uses.
async fn samples(
    cluster: &Cluster,
    namespace: &str,
    selector: &str,
    resource: &str,
    container: Option<&str>,
    now: Timestamp,
) -> Result<Vec<Sample>, ReconcileError> {
    let query = format!("?labelSelector={}", encode(selector));
    let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods{query}");
    let metrics = match cluster.read(&path).await {
        Ok(list) => list["items"].as_array().cloned().unwrap_or_default(),
        Err(error) if error.is_not_found() => Vec::new(),
        Err(error) => return Err(error),
    };
    let selected = cluster.list_selected(&pods(), namespace, &query).await?;
    let usage_of = |pod: &Value| {
        let own = metrics
            .iter()
            .find(|own| meta::name(own) == meta::name(pod))?;
        let mut sum = None;
        for own in own["containers"].as_array().into_iter().flatten() {
            if container.is_none_or(|only| own["name"] == only) {
                let amount = quota::quantity(&own["usage"][resource])?.milli_value();
                sum = Some(sum.unwrap_or(0) + i128::from(amount));
            }
        }
        sum
    };
    Ok(selected
        .iter()
        .filter_map(|pod| Sample::of(pod, resource, container, usage_of(pod), now))
        .collect())
}
