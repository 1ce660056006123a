use serde_json::{Value, json};

use super::*;

/// A pod of hyper's making in some state.
#[allow(clippy::needless_pass_by_value, reason = "tests give literals")]
pub(crate) fn pod(name: &str, id: char, status: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {
            "name": name, "uid": format!("u-{name}"), "creationTimestamp": "2026-01-02T03:00:00Z",
            "labels": {meta::NAME: name},
            "annotations": {meta::ID: id.to_string().repeat(64)},
        },
        "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "busybox:1", "command": ["sh"], "args": ["-c", "x"]}]},
        "status": status,
    }))
    .unwrap()
}

#[allow(clippy::needless_pass_by_value, reason = "tests give literals")]
pub(crate) fn status(phase: &str, state: Value) -> Value {
    json!({"phase": phase, "containerStatuses": [{"name": "main", "image": "busybox:1", "imageID": "", "ready": phase == "Running",
        "restartCount": 0, "state": state}]})
}

fn now() -> Timestamp {
    "2026-01-02T03:05:00Z".parse().unwrap()
}

fn one(pod: Pod) -> Container {
    containers(vec![pod]).remove(0)
}

#[test]
fn states_and_their_texts() {
    let ended = json!({"terminated": {"exitCode": 3, "startedAt": "2026-01-02T03:01:00Z", "finishedAt": "2026-01-02T03:04:57Z"}});
    for (status, state, text) in [
        (json!({"phase": "Pending"}), State::Created, "Created"),
        (
            status("Pending", json!({"waiting": {"reason": "ErrImagePull"}})),
            State::Created,
            "Created (ErrImagePull)",
        ),
        (
            status(
                "Running",
                json!({"running": {"startedAt": "2026-01-02T03:00:00Z"}}),
            ),
            State::Running,
            "Up 5 minutes",
        ),
        (
            status("Failed", ended.clone()),
            State::Exited,
            "Exited (3) 3 seconds ago",
        ),
        (
            json!({"phase": "Failed", "reason": "UnsupportedField"}),
            State::Dead,
            "Dead",
        ),
        (
            status(
                "Failed",
                json!({"running": {"startedAt": "2026-01-02T03:04:59Z"}}),
            ),
            State::Running,
            "Up 1 second",
        ),
    ] {
        let container = one(pod("web", 'a', status.clone()));
        assert_eq!(container.state(), state, "{status}");
        assert_eq!(container.status_text(now()), text, "{status}");
    }
    let mut paused = status(
        "Running",
        json!({"running": {"startedAt": "2026-01-02T03:00:00Z"}}),
    );
    paused["conditions"] = json!([{"type": "hypernetes.io/Paused", "status": "True"}]);
    let paused = one(pod("web", 'a', paused));
    assert_eq!(paused.state(), State::Paused);
    assert_eq!(paused.status_text(now()), "Up 5 minutes (Paused)");
    let mut stalled = paused.clone();
    let condition = json!([{"type": "hypernetes.io/Stalled", "status": "True"}]);
    stalled.pod.status.as_mut().unwrap().conditions = serde_json::from_value(condition).unwrap();
    assert_eq!(stalled.state(), State::Running);
    assert_eq!(stalled.status_text(now()), "Up 5 minutes (Stalled)");
    let mut suspended = paused.pod.clone();
    let both = json!([
        {"type": "hypernetes.io/Paused", "status": "True"},
        {"type": "hypernetes.io/Suspended", "status": "True"},
    ]);
    suspended.status.as_mut().unwrap().conditions = serde_json::from_value(both).unwrap();
    let suspended = Container {
        pod: suspended,
        ..paused
    };
    assert_eq!(suspended.state(), State::Suspended);
    assert_eq!(suspended.status_text(now()), "Up 5 minutes (Suspended)");
    let mut restarting = pod(
        "web",
        'a',
        json!({"phase": "Running", "containerStatuses": [{"name": "main", "image": "", "imageID": "",
        "ready": false, "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended}]}),
    );
    restarting.spec.as_mut().unwrap().restart_policy = Some("Always".into());
    let container = one(restarting);
    assert_eq!(container.state(), State::Restarting);
    assert_eq!(container.status_text(now()), "Restarting (3) 3 seconds ago");
}

#[test]
fn runs_of_one_container_are_one_container() {
    let first = pod("web", 'a', json!({"phase": "Failed"}));
    let mut second = pod("web-1f", 'a', json!({"phase": "Running"}));
    second
        .metadata
        .annotations
        .as_mut()
        .unwrap()
        .insert(meta::RUN.into(), "1".into());
    second
        .metadata
        .labels
        .as_mut()
        .unwrap()
        .insert(meta::NAME.into(), "web".into());
    let found = containers(vec![second, first]);
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].name.as_str(), found[0].pod_name()),
        ("web", "web-1f")
    );
    assert_eq!(found[0].earlier.len(), 1);
    assert_eq!(found[0].short_id(), "aaaaaaaaaaaa");
}

#[test]
fn pods_of_other_tools_are_containers_too() {
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "pair", "uid": "0123-4567"},
        "spec": {"containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "j"}]}}))
    .unwrap();
    let found = containers(vec![pod]);
    let names: Vec<_> = found.iter().map(|c| (c.name.as_str(), c.image())).collect();
    assert_eq!(
        names,
        [("pair/a", "i".to_owned()), ("pair/b", "j".to_owned())]
    );
    assert_ne!(found[0].id, found[1].id);
    let single: Pod =
        serde_json::from_value(json!({"metadata": {"name": "one", "uid": "0123-4567"},
        "spec": {"containers": [{"name": "a", "image": "i"}]}}))
        .unwrap();
    assert_eq!(one(single).id, "01234567");
}
