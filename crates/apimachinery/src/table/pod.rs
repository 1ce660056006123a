//! The cells of a pod, by the rules of kubectl's own printer.

use jiff::Timestamp;
use serde_json::Value;

use crate::meta;

use super::{age::since, text};

fn list<'a>(object: &'a Value, path: [&str; 2]) -> &'a [Value] {
    object[path[0]][path[1]]
        .as_array()
        .map_or(&[], Vec::as_slice)
}

/// An init container that goes on running beside the others.
fn is_sidecar(pod: &Value, name: &str) -> bool {
    list(pod, ["spec", "initContainers"])
        .iter()
        .any(|container| container["name"] == name && container["restartPolicy"] == "Always")
}

/// `1/2`.
pub(super) fn ready(pod: &Value) -> String {
    let sidecars = list(pod, ["spec", "initContainers"])
        .iter()
        .filter(|container| container["restartPolicy"] == "Always")
        .count();
    let total = list(pod, ["spec", "containers"]).len() + sidecars;
    let ready = list(pod, ["status", "containerStatuses"])
        .iter()
        .filter(|status| status["ready"] == true && status["state"]["running"].is_object())
        .count()
        + list(pod, ["status", "initContainerStatuses"])
            .iter()
            .filter(|status| {
                is_sidecar(pod, text(status, &["name"]))
                    && status["ready"] == true
                    && status["started"] == true
            })
            .count();
    format!("{ready}/{total}")
}

/// `Running`, `Init:0/1`, `CrashLoopBackOff`, …
pub(super) fn status(pod: &Value) -> String {
    let phase = text(pod, &["status", "phase"]);
    let own_reason = text(pod, &["status", "reason"]);
    let mut reason = if own_reason.is_empty() {
        phase
    } else {
        own_reason
    }
    .to_owned();
    let conditions = list(pod, ["status", "conditions"]);
    let condition = |kind: &str| {
        conditions
            .iter()
            .find(|condition| condition["type"] == kind)
    };
    if condition("PodScheduled").is_some_and(|c| c["reason"] == "SchedulingGated") {
        "SchedulingGated".clone_into(&mut reason);
    }

    let inits = list(pod, ["spec", "initContainers"]).len();
    let mut initializing = false;
    for (index, status) in list(pod, ["status", "initContainerStatuses"])
        .iter()
        .enumerate()
    {
        let state = &status["state"];
        let sidecar = is_sidecar(pod, text(status, &["name"]));
        if state["terminated"]["exitCode"] == 0 && state["terminated"].is_object()
            || sidecar && status["started"] == true
        {
            continue;
        }
        reason = if state["terminated"].is_object() {
            format!("Init:{}", terminated(&state["terminated"]))
        } else {
            match text(state, &["waiting", "reason"]) {
                "" | "PodInitializing" => format!("Init:{index}/{inits}"),
                waiting => format!("Init:{waiting}"),
            }
        };
        initializing = true;
        break;
    }
    let initialized = condition("Initialized").is_some_and(|c| c["status"] == "True");
    if !initializing || initialized {
        let mut running = false;
        for status in list(pod, ["status", "containerStatuses"]).iter().rev() {
            let state = &status["state"];
            let waiting = text(state, &["waiting", "reason"]);
            if !waiting.is_empty() {
                waiting.clone_into(&mut reason);
            } else if state["terminated"].is_object() {
                reason = terminated(&state["terminated"]);
            } else if status["ready"] == true && state["running"].is_object() {
                running = true;
            }
        }
        // One container has ended while another goes on.
        if reason == "Completed" && running {
            let ready = condition("Ready").is_some_and(|c| c["status"] == "True");
            if ready { "Running" } else { "NotReady" }.clone_into(&mut reason);
        }
    }
    if meta::is_deleting(pod) {
        if own_reason == "NodeLost" {
            "Unknown".clone_into(&mut reason);
        } else if !matches!(phase, "Failed" | "Succeeded") {
            "Terminating".clone_into(&mut reason);
        }
    }
    reason
}

/// Why a container ended: its reason, else its signal or exit code.
fn terminated(state: &Value) -> String {
    match text(state, &["reason"]) {
        "" => match state["signal"].as_i64().unwrap_or_default() {
            0 => format!(
                "ExitCode:{}",
                state["exitCode"].as_i64().unwrap_or_default()
            ),
            signal => format!("Signal:{signal}"),
        },
        reason => reason.to_owned(),
    }
}

/// `0`, or `3 (5s ago)`.
pub(super) fn restarts(pod: &Value, now: Timestamp) -> String {
    let inits = list(pod, ["status", "initContainerStatuses"]);
    let mains = list(pod, ["status", "containerStatuses"]);
    // While the pod initializes only the init containers count, afterwards the sidecars with the
    // main ones.
    let initializing = inits.iter().any(|status| {
        let done = status["state"]["terminated"]["exitCode"] == 0
            && status["state"]["terminated"].is_object();
        let sidecar = is_sidecar(pod, text(status, &["name"])) && status["started"] == true;
        !(done || sidecar)
    });
    let counted: Vec<&Value> = if initializing {
        inits.iter().collect()
    } else {
        inits
            .iter()
            .filter(|status| is_sidecar(pod, text(status, &["name"])))
            .chain(mains)
            .collect()
    };
    let count: i64 = counted
        .iter()
        .filter_map(|status| status["restartCount"].as_i64())
        .sum();
    let last = counted
        .iter()
        .filter_map(|status| {
            text(status, &["lastState", "terminated", "finishedAt"])
                .parse::<Timestamp>()
                .ok()
        })
        .max();
    match last {
        Some(last) if count > 0 => format!("{count} ({} ago)", since(last, now)),
        _ => count.to_string(),
    }
}

/// `1/2`, or `<none>`.
pub(super) fn readiness_gates(pod: &Value) -> String {
    let gates = list(pod, ["spec", "readinessGates"]);
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let conditions = list(pod, ["status", "conditions"]);
    let met = gates
        .iter()
        .filter(|gate| {
            conditions.iter().any(|condition| {
                condition["type"] == gate["conditionType"] && condition["status"] == "True"
            })
        })
        .count();
    format!("{met}/{}", gates.len())
}
