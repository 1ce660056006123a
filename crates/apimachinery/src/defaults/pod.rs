//! Defaults of a pod's spec.

use serde_json::{Map, Value, json};

use super::{fill, fill_number, object_in, objects_in};

pub(super) fn apply(spec: &mut Map<String, Value>) {
    fill(spec, "dnsPolicy", "ClusterFirst");
    fill(spec, "restartPolicy", "Always");
    fill(spec, "schedulerName", "default-scheduler");
    fill(spec, "securityContext", json!({}));
    fill(spec, "terminationGracePeriodSeconds", 30);
    fill(spec, "enableServiceLinks", true);
    // The old and the new name of the same field.
    let account = ["serviceAccountName", "serviceAccount"]
        .iter()
        .find_map(|field| {
            spec.get(*field)
                .and_then(Value::as_str)
                .filter(|s| !s.is_empty())
        })
        .map(str::to_owned);
    if let Some(account) = account {
        spec.insert("serviceAccountName".into(), account.as_str().into());
        spec.insert("serviceAccount".into(), account.into());
    }
    let host_network = spec
        .get("hostNetwork")
        .and_then(Value::as_bool)
        .unwrap_or_default();
    for field in ["initContainers", "containers", "ephemeralContainers"] {
        for entry in objects_in(spec, field) {
            container(entry, host_network, field != "ephemeralContainers");
        }
    }
    pod_requests(spec);
    for entry in objects_in(spec, "volumes") {
        volume(entry);
    }
    for constraint in objects_in(spec, "topologySpreadConstraints") {
        fill(constraint, "nodeAffinityPolicy", "Honor");
        fill(constraint, "nodeTaintsPolicy", "Ignore");
    }
}

/// What a whole pod is limited to is also its request, unless its containers say what they need.
fn pod_requests(spec: &mut Map<String, Value>) {
    let limits = spec
        .get("resources")
        .and_then(|resources| resources["limits"].as_object())
        .cloned()
        .unwrap_or_default();
    for (name, limit) in limits {
        let asked = ["containers", "initContainers"].iter().any(|field| {
            let containers = spec.get(*field).and_then(Value::as_array);
            let mut containers = containers.into_iter().flatten();
            containers.any(|container| !container["resources"]["requests"][&name].is_null())
        });
        let Some(resources) = object_in(spec, "resources") else {
            return;
        };
        let requests = resources.entry("requests").or_insert_with(|| json!({}));
        if let (false, Some(requests)) = (asked, requests.as_object_mut()) {
            fill(requests, &name, limit);
        }
    }
}

/// The pull policy of an image that names none: a moving tag is always looked up.
pub fn image_pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    let name = image.rsplit('/').next().unwrap_or(image);
    match name.split_once(':') {
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

fn container(container: &mut Map<String, Value>, host_network: bool, resources: bool) {
    let image = container
        .get("image")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let policy = image_pull_policy(image);
    fill(container, "imagePullPolicy", policy);
    fill(container, "terminationMessagePath", "/dev/termination-log");
    fill(container, "terminationMessagePolicy", "File");
    fill(container, "resources", json!({}));
    for port in objects_in(container, "ports") {
        fill(port, "protocol", "TCP");
        if host_network && let Some(number) = port.get("containerPort").and_then(Value::as_i64) {
            fill_number(port, "hostPort", number);
        }
    }
    for variable in objects_in(container, "env") {
        if let Some(source) = object_in(variable, "valueFrom")
            && let Some(field) = object_in(source, "fieldRef")
        {
            fill(field, "apiVersion", "v1");
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = object_in(container, name) {
            fill_number(probe, "timeoutSeconds", 1);
            fill_number(probe, "periodSeconds", 10);
            fill_number(probe, "successThreshold", 1);
            fill_number(probe, "failureThreshold", 3);
            handler(probe);
        }
    }
    if let Some(lifecycle) = object_in(container, "lifecycle") {
        for name in ["postStart", "preStop"] {
            if let Some(hook) = object_in(lifecycle, name) {
                handler(hook);
            }
        }
    }
    if resources && let Some(resources) = object_in(container, "resources") {
        // A limit without a request is also the request.
        if let Some(Value::Object(limits)) = resources.get("limits").cloned()
            && !limits.is_empty()
        {
            let requests = resources.entry("requests").or_insert_with(|| json!({}));
            if let Some(requests) = requests.as_object_mut() {
                for (name, limit) in limits {
                    fill(requests, &name, limit);
                }
            }
        }
    }
}

fn handler(handler: &mut Map<String, Value>) {
    if let Some(get) = object_in(handler, "httpGet") {
        fill(get, "path", "/");
        fill(get, "scheme", "HTTP");
    }
    if let Some(grpc) = object_in(handler, "grpc") {
        fill(grpc, "service", "");
    }
}

const SOURCES: &[&str] = &[
    "awsElasticBlockStore",
    "azureDisk",
    "azureFile",
    "cephfs",
    "cinder",
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "fc",
    "flexVolume",
    "flocker",
    "gcePersistentDisk",
    "gitRepo",
    "glusterfs",
    "hostPath",
    "image",
    "iscsi",
    "nfs",
    "persistentVolumeClaim",
    "photonPersistentDisk",
    "portworxVolume",
    "projected",
    "quobyte",
    "rbd",
    "scaleIO",
    "secret",
    "storageos",
    "vsphereVolume",
];

fn volume(volume: &mut Map<String, Value>) {
    const MODE: i64 = 0o644;
    if !SOURCES
        .iter()
        .any(|source| volume.get(*source).is_some_and(|s| !s.is_null()))
    {
        volume.insert("emptyDir".into(), json!({}));
    }
    if let Some(source) = object_in(volume, "ephemeral")
        && let Some(template) = object_in(source, "volumeClaimTemplate")
        && let Some(spec) = object_in(template, "spec")
    {
        super::storage::claim(spec);
    }
    for name in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = object_in(volume, name) {
            fill(source, "defaultMode", MODE);
        }
    }
    if let Some(source) = object_in(volume, "downwardAPI") {
        downward(source);
    }
    if let Some(source) = object_in(volume, "projected") {
        for part in objects_in(source, "sources") {
            if let Some(token) = object_in(part, "serviceAccountToken") {
                fill(token, "expirationSeconds", 3600);
            }
            if let Some(source) = object_in(part, "downwardAPI") {
                downward(source);
            }
        }
    }
    if let Some(path) = object_in(volume, "hostPath") {
        fill(path, "type", "");
    }
    if let Some(image) = object_in(volume, "image") {
        let reference = image
            .get("reference")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let policy = image_pull_policy(reference);
        fill(image, "pullPolicy", policy);
    }
}

fn downward(source: &mut Map<String, Value>) {
    for item in objects_in(source, "items") {
        if let Some(field) = object_in(item, "fieldRef") {
            fill(field, "apiVersion", "v1");
        }
    }
}
