use serde_json::json;

use super::*;
use crate::kinds::{self, by_api_version};

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().unwrap()
}

fn cells(api_version: &str, kind: &str, mut object: Value) -> Vec<String> {
    let kind = by_api_version(api_version, kind).unwrap();
    object["metadata"]["name"] = "x".into();
    object["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    row(kind, &object, IncludeObject::None, now())["cells"]
        .as_array()
        .unwrap()
        .iter()
        .map(|cell| {
            cell.as_str()
                .map_or_else(|| cell.to_string(), str::to_owned)
        })
        .collect()
}

fn pod(spec: Value, status: Value) -> Vec<String> {
    cells(
        "v1",
        "Pod",
        json!({"metadata": {}, "spec": spec, "status": status}),
    )
}

#[test]
fn a_running_pod_wide() {
    let out = pod(
        json!({"containers": [{"name": "a"}], "nodeName": "n"}),
        json!({"phase": "Running", "podIP": "10.0.0.1",
            "containerStatuses": [{"name": "a", "ready": true, "restartCount": 0, "state": {"running": {}}}]}),
    );
    assert_eq!(
        out,
        [
            "x", "1/1", "Running", "0", "60m", "10.0.0.1", "n", "<none>", "<none>"
        ]
    );
}

#[test]
fn the_status_of_pods() {
    let one = json!({"containers": [{"name": "a"}]});
    let status = |status: Value| pod(one.clone(), status)[2].clone();
    let state = |state: Value| json!({"phase": "Running", "containerStatuses": [{"name": "a", "state": state}]});
    assert_eq!(status(json!({"phase": "Pending"})), "Pending");
    assert_eq!(
        status(state(json!({"waiting": {"reason": "ContainerCreating"}}))),
        "ContainerCreating"
    );
    assert_eq!(
        status(state(json!({"waiting": {"reason": "CrashLoopBackOff"}}))),
        "CrashLoopBackOff"
    );
    assert_eq!(
        status(state(
            json!({"terminated": {"exitCode": 0, "reason": "Completed"}})
        )),
        "Completed"
    );
    assert_eq!(
        status(state(
            json!({"terminated": {"exitCode": 1, "reason": "Error"}})
        )),
        "Error"
    );
    assert_eq!(
        status(state(json!({"terminated": {"exitCode": 3}}))),
        "ExitCode:3"
    );
    assert_eq!(
        status(state(json!({"terminated": {"exitCode": 137, "signal": 9}}))),
        "Signal:9"
    );
    assert_eq!(
        status(json!({"phase": "Failed", "reason": "Evicted"})),
        "Evicted"
    );
    let mixed = json!({"phase": "Running", "containerStatuses": [
        {"name": "a", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
        {"name": "b", "ready": true, "state": {"running": {}}},
    ]});
    assert_eq!(status(mixed), "NotReady");
}

#[test]
fn the_status_of_initializing_pods() {
    let spec =
        json!({"containers": [{"name": "a"}], "initContainers": [{"name": "i"}, {"name": "j"}]});
    let status = |state: Value| {
        pod(spec.clone(), json!({"phase": "Pending", "initContainerStatuses": [
            {"name": "i", "state": {"terminated": {"exitCode": 0}}}, {"name": "j", "state": state},
        ]}))[2]
            .clone()
    };
    assert_eq!(status(json!({"running": {}})), "Init:1/2");
    assert_eq!(
        status(json!({"waiting": {"reason": "PodInitializing"}})),
        "Init:1/2"
    );
    assert_eq!(
        status(json!({"waiting": {"reason": "ImagePullBackOff"}})),
        "Init:ImagePullBackOff"
    );
    assert_eq!(
        status(json!({"terminated": {"exitCode": 1, "reason": "Error"}})),
        "Init:Error"
    );
    assert_eq!(
        status(json!({"terminated": {"exitCode": 2}})),
        "Init:ExitCode:2"
    );
}

#[test]
fn pods_that_are_deleted_terminate() {
    let object = |phase: &str| json!({"metadata": {"deletionTimestamp": "2026-01-01T00:30:00Z"}, "spec": {}, "status": {"phase": phase}});
    assert_eq!(cells("v1", "Pod", object("Running"))[2], "Terminating");
    assert_eq!(cells("v1", "Pod", object("Succeeded"))[2], "Succeeded");
}

#[test]
fn restarts_tell_when() {
    let out = pod(
        json!({"containers": [{"name": "a"}]}),
        json!({"phase": "Running", "containerStatuses": [{"name": "a", "restartCount": 3,
            "lastState": {"terminated": {"finishedAt": "2026-01-01T00:59:55Z"}}, "state": {"running": {}}}]}),
    );
    assert_eq!(out[3], "3 (5s ago)");
}

#[test]
fn nodes_wide() {
    let node = json!({
        "metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}},
        "spec": {"unschedulable": true},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.2"}],
            "nodeInfo": {"kubeletVersion": "v1", "osImage": "Debian", "kernelVersion": "6.1",
                "containerRuntimeVersion": "hypernetes://0.1"},
        },
    });
    assert_eq!(
        cells("v1", "Node", node),
        [
            "x",
            "Ready,SchedulingDisabled",
            "control-plane",
            "60m",
            "v1",
            "10.0.0.2",
            "<none>",
            "Debian",
            "6.1",
            "hypernetes://0.1"
        ]
    );
    assert_eq!(
        cells("v1", "Node", json!({"metadata": {}}))[1..3],
        ["Unknown", "<none>"]
    );
}

#[test]
fn smaller_kinds() {
    let data =
        json!({"metadata": {}, "data": {"a": ""}, "binaryData": {"b": ""}, "type": "Opaque"});
    assert_eq!(cells("v1", "ConfigMap", data.clone()), ["x", "2", "60m"]);
    assert_eq!(cells("v1", "Secret", data), ["x", "Opaque", "1", "60m"]);
    let binding = json!({"metadata": {}, "roleRef": {"kind": "Role", "name": "r"}, "subjects": [
        {"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "name": "s", "namespace": "n"}]});
    assert_eq!(
        cells("rbac.authorization.k8s.io/v1", "RoleBinding", binding),
        ["x", "Role/r", "60m", "u", "", "n/s"]
    );
    let role = json!({"metadata": {}});
    assert_eq!(
        cells("rbac.authorization.k8s.io/v1", "Role", role),
        ["x", "2026-01-01T00:00:00Z"]
    );
}

#[test]
fn events_of_both_views() {
    let core = json!({"metadata": {}, "type": "Normal", "reason": "Started", "message": "hi\n",
        "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec.containers{a}"},
        "source": {"component": "nodelet", "host": "n"}, "count": 2,
        "firstTimestamp": "2026-01-01T00:50:00Z", "lastTimestamp": "2026-01-01T00:59:00Z"});
    assert_eq!(
        cells("v1", "Event", core),
        [
            "60s (x2 over 10m)",
            "Normal",
            "Started",
            "pod/p",
            "spec.containers{a}",
            "nodelet, n",
            "hi",
            "10m",
            "2",
            "x"
        ]
    );
    let group = json!({"metadata": {}, "type": "Normal", "reason": "R", "note": "n",
        "regarding": {"kind": "Pod", "name": "p"}, "eventTime": "2026-01-01T00:59:00.000000Z",
        "reportingController": "c", "reportingInstance": "i"});
    let out = cells("events.k8s.io/v1", "Event", group);
    assert_eq!(
        (out[0].as_str(), out[3].as_str(), out[5].as_str()),
        ("60s", "pod/p", "c, i")
    );
}

#[test]
fn our_kinds() {
    let tenant = json!({"metadata": {}, "spec": {"network": {"default": {"cidr": "10.0.0.0/16"}}},
        "status": {"namespaces": ["a"], "conditions": [{"type": "Ready", "status": "True"}]}});
    assert_eq!(
        cells("hypernetes.io/v1alpha1", "Tenant", tenant),
        ["x", "10.0.0.0/16", "1", "True", "60m", ""]
    );
    let snapshot = json!({"metadata": {}, "spec": {"podName": "web", "sizeLimit": "1Gi"},
        "status": {"sizeBytes": 12_345_678}});
    assert_eq!(
        cells("hypernetes.io/v1alpha1", "PodSnapshot", snapshot),
        ["x", "web", "11Mi", "1Gi", "Unknown", "60m"]
    );
    let network = json!({"metadata": {}, "spec": {"external": {"snat": true},
        "subnets": [{"cidr": "10.0.0.0/16", "gateway": "10.0.0.1"}]}, "status": {"ipsUsed": 1, "ipsTotal": 9}});
    assert_eq!(
        cells("hypernetes.io/v1alpha1", "Network", network),
        [
            "x",
            "10.0.0.0/16",
            "10.0.0.1",
            "SNAT",
            "1/9",
            "Unknown",
            "60m",
            "<default>"
        ]
    );
}

#[test]
fn every_kind_has_as_many_cells_as_columns_and_no_object_panics() {
    for kind in kinds::all() {
        let columns = columns(kind);
        for object in [
            json!({}),
            json!({"metadata": 1, "spec": [], "status": "x"}),
            json!(null),
        ] {
            let row = row(kind, &object, IncludeObject::Metadata, now());
            assert_eq!(
                row["cells"].as_array().unwrap().len(),
                columns.as_array().unwrap().len()
            );
        }
    }
}

#[test]
fn a_table_carries_what_was_asked_for() {
    let kind = by_api_version("v1", "ConfigMap").unwrap();
    let object = json!({"metadata": {"name": "a"}, "data": {}});
    let meta = json!({"resourceVersion": "5"});
    let out = table(
        kind,
        &[&object],
        IncludeObject::Metadata,
        &meta,
        true,
        now(),
    );
    assert_eq!(out["metadata"], meta);
    assert_eq!(out["columnDefinitions"][0]["format"], "name");
    assert_eq!(out["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    assert_eq!(out["rows"][0]["object"]["metadata"]["name"], "a");
    let out = table(kind, &[&object], IncludeObject::Object, &meta, false, now());
    assert_eq!(out["columnDefinitions"], json!([]));
    assert_eq!(out["rows"][0]["object"], object);
}
