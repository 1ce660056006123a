//! Trims Kubernetes' OpenAPI definitions to what is reachable from the served kinds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Write,
    path::Path,
};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Map, Value, json};

/// Directory of the data, from the root of the workspace.
pub(crate) const DATA: &str = "crates/apimachinery/data";

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";

/// What is kept, with everything it refers to.
const ROOTS: &[(&str, &[&str])] = &[
    (
        "io.k8s.api.core.v1",
        &[
            "Binding",
            "ConfigMap",
            "ConfigMapList",
            "Endpoints",
            "EndpointsList",
            "Event",
            "EventList",
            "LimitRange",
            "LimitRangeList",
            "Namespace",
            "NamespaceList",
            "Node",
            "NodeList",
            "PersistentVolume",
            "PersistentVolumeClaim",
            "PersistentVolumeClaimList",
            "PersistentVolumeList",
            "Pod",
            "PodList",
            "ReplicationController",
            "ReplicationControllerList",
            "ResourceQuota",
            "ResourceQuotaList",
            "Secret",
            "SecretList",
            "Service",
            "ServiceAccount",
            "ServiceAccountList",
            "ServiceList",
        ],
    ),
    (
        "io.k8s.api.authentication.v1",
        &["SelfSubjectReview", "TokenRequest", "TokenReview"],
    ),
    (
        "io.k8s.api.authorization.v1",
        &[
            "LocalSubjectAccessReview",
            "SelfSubjectAccessReview",
            "SelfSubjectRulesReview",
            "SubjectAccessReview",
        ],
    ),
    ("io.k8s.api.coordination.v1", &["Lease", "LeaseList"]),
    (
        "io.k8s.kube-aggregator.pkg.apis.apiregistration.v1",
        &["APIService", "APIServiceList"],
    ),
    (
        "io.k8s.api.discovery.v1",
        &["EndpointSlice", "EndpointSliceList"],
    ),
    ("io.k8s.api.events.v1", &["Event", "EventList"]),
    ("io.k8s.api.node.v1", &["RuntimeClass", "RuntimeClassList"]),
    (
        "io.k8s.api.policy.v1",
        &["Eviction", "PodDisruptionBudget", "PodDisruptionBudgetList"],
    ),
    (
        "io.k8s.api.scheduling.v1",
        &["PriorityClass", "PriorityClassList"],
    ),
    (
        "io.k8s.api.storage.v1",
        &[
            "CSIDriver",
            "CSIDriverList",
            "CSINode",
            "CSINodeList",
            "CSIStorageCapacity",
            "CSIStorageCapacityList",
            "StorageClass",
            "StorageClassList",
            "VolumeAttachment",
            "VolumeAttachmentList",
        ],
    ),
    (
        "io.k8s.api.apps.v1",
        &[
            "ControllerRevision",
            "ControllerRevisionList",
            "DaemonSet",
            "DaemonSetList",
            "Deployment",
            "DeploymentList",
            "ReplicaSet",
            "ReplicaSetList",
            "StatefulSet",
            "StatefulSetList",
        ],
    ),
    (
        "io.k8s.api.batch.v1",
        &["CronJob", "CronJobList", "Job", "JobList"],
    ),
    (
        "io.k8s.api.autoscaling.v1",
        &[
            "HorizontalPodAutoscaler",
            "HorizontalPodAutoscalerList",
            "Scale",
        ],
    ),
    (
        "io.k8s.api.certificates.v1",
        &["CertificateSigningRequest", "CertificateSigningRequestList"],
    ),
    (
        "io.k8s.api.autoscaling.v2",
        &["HorizontalPodAutoscaler", "HorizontalPodAutoscalerList"],
    ),
    (
        "io.k8s.api.rbac.v1",
        &[
            "ClusterRole",
            "ClusterRoleBinding",
            "ClusterRoleBindingList",
            "ClusterRoleList",
            "Role",
            "RoleBinding",
            "RoleBindingList",
            "RoleList",
        ],
    ),
    (
        META,
        &[
            "APIGroup",
            "APIGroupList",
            "APIResourceList",
            "APIVersions",
            "Condition",
            "DeleteOptions",
            "LabelSelector",
            "Patch",
            "Status",
            "WatchEvent",
        ],
    ),
];

/// Kinds that extend the API, in a file of their own.
const EXTENSIONS: &[(&str, &[&str])] = &[
    (
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1",
        &["CustomResourceDefinition", "CustomResourceDefinitionList"],
    ),
    ("io.k8s.api.autoscaling.v1", &["Scale"]),
];

pub(crate) fn run(file: &Path) -> Result<()> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut document: Value = serde_json::from_str(&text).context("not JSON")?;
    let all = document["$defs"].take();
    let all = all.as_object().context("no $defs: not the expected file")?;

    write(all, ROOTS, "definitions.json.gz")?;
    write(all, EXTENSIONS, "extensions.json.gz")
}

fn write(all: &Map<String, Value>, roots: &[(&str, &[&str])], name: &str) -> Result<()> {
    let mut kept: BTreeMap<String, Value> = BTreeMap::new();
    let mut wanted: BTreeSet<String> = roots
        .iter()
        .flat_map(|(package, names)| names.iter().map(move |name| format!("{package}.{name}")))
        .collect();
    while let Some(name) = wanted.pop_first() {
        let definition = all
            .get(&name)
            .with_context(|| format!("no definition of {name}"))?;
        let definition = normal(definition, &mut |reference| {
            if !kept.contains_key(reference) && reference != name {
                wanted.insert(reference.to_owned());
            }
        });
        kept.insert(name, definition);
    }
    // The package widens these two; here they are as upstream publishes them.
    for (name, format, types) in [
        (
            "io.k8s.apimachinery.pkg.api.resource.Quantity",
            None,
            ["string", "number"],
        ),
        (
            "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
            Some("int-or-string"),
            ["integer", "string"],
        ),
    ] {
        let Some(definition) = kept.get_mut(name) else {
            continue;
        };
        let description = definition["description"].take();
        *definition = json!({"oneOf": types.map(|t| json!({"type": t}))});
        if !description.is_null() {
            definition["description"] = description;
        }
        if let Some(format) = format {
            definition["format"] = format.into();
        }
    }

    let path = Path::new(DATA).join(name);
    let out = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    // No time stamp: the same input gives the same file.
    let mut out = GzBuilder::new().mtime(0).write(out, Compression::best());
    let text = serde_json::to_vec(&kept)?;
    out.write_all(&text)?;
    out.finish()?.sync_all()?;
    Ok(())
}

/// Upstream's own form: plain references, no `null` beside the type, no fixed type names.
fn normal(value: &Value, refer: &mut impl FnMut(&str)) -> Value {
    match value {
        Value::Object(object) => {
            let mut out = Map::new();
            for (key, value) in object {
                let value = match (key.as_str(), value) {
                    ("$ref", Value::String(reference)) => {
                        let name = reference.trim_start_matches("#/$defs/");
                        refer(name);
                        name.into()
                    }
                    ("type", Value::Array(types)) => types
                        .iter()
                        .find(|t| *t != "null")
                        .cloned()
                        .unwrap_or(Value::Null),
                    ("properties", Value::Object(properties)) => {
                        let mut properties = properties.clone();
                        for name in ["apiVersion", "kind"] {
                            if let Some(Value::Object(property)) = properties.get_mut(name)
                                && property
                                    .get("enum")
                                    .is_some_and(|e| e.as_array().is_some_and(|e| e.len() == 1))
                            {
                                property.remove("enum");
                            }
                        }
                        properties
                            .iter()
                            .map(|(name, value)| (name.clone(), normal(value, refer)))
                            .collect::<Map<_, _>>()
                            .into()
                    }
                    (_, value) => normal(value, refer),
                };
                out.insert(key.clone(), value);
            }
            Value::Object(out)
        }
        Value::Array(values) => values.iter().map(|value| normal(value, refer)).collect(),
        other => other.clone(),
    }
}
