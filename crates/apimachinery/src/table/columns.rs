//! The columns of each kind.

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::{Quantity, kinds::ResourceKind, meta, quota::show};

use super::{Column, age, age::since, legacy, or, pod, service, storage, text, workloads};

pub(super) const fn column(
    name: &'static str,
    kind: &'static str,
    priority: u8,
    cell: fn(&Value, Timestamp) -> Value,
) -> Column {
    Column {
        name,
        kind,
        format: "",
        priority,
        cell,
    }
}

pub(super) const fn string(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    column(name, "string", 0, cell)
}

pub(super) const fn wide(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    column(name, "string", 1, cell)
}

pub(super) const NAME: Column = Column {
    name: "Name",
    kind: "string",
    format: "name",
    priority: 0,
    cell: |object, _| meta::name(object).unwrap_or_default().into(),
};
pub(super) const AGE: Column = string("Age", |object, now| age(object, now).into());

/// The columns of a kind.
pub(super) fn of(kind: &ResourceKind) -> &'static [Column] {
    match (kind.group, kind.kind) {
        ("", "Pod") => PODS,
        ("", "Node") => NODES,
        ("", "Namespace") => NAMESPACES,
        ("", "ConfigMap") => CONFIG_MAPS,
        ("", "Secret") => SECRETS,
        ("", "ServiceAccount") => SERVICE_ACCOUNTS,
        ("", "Service") => SERVICES,
        ("discovery.k8s.io", "EndpointSlice") => ENDPOINT_SLICES,
        ("" | "events.k8s.io", "Event") => EVENTS,
        ("coordination.k8s.io", "Lease") => LEASES,
        ("node.k8s.io", "RuntimeClass") => RUNTIME_CLASSES,
        ("rbac.authorization.k8s.io", "Role" | "ClusterRole") => ROLES,
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => BINDINGS,
        (crate::usage::GROUP, "NodeMetrics" | "PodMetrics") => METRICS,
        (crate::kinds::images::GROUP, "Image") => super::images::IMAGES,
        ("hypernetes.io", "Tenant") => TENANTS,
        ("hypernetes.io", "Network") => NETWORKS,
        ("hypernetes.io", "PodSnapshot") => SNAPSHOTS,
        _ => workloads::of(kind)
            .or_else(|| legacy::of(kind))
            .or_else(|| storage::of(kind))
            .unwrap_or(OTHERS),
    }
}

static OTHERS: &[Column] = &[NAME, AGE];

static PODS: &[Column] = &[
    NAME,
    string("Ready", |object, _| pod::ready(object).into()),
    string("Status", |object, _| pod::status(object).into()),
    string("Restarts", |object, now| pod::restarts(object, now).into()),
    AGE,
    wide("IP", |object, _| {
        or(text(object, &["status", "podIP"]), "<none>").into()
    }),
    wide("Node", |object, _| {
        or(text(object, &["spec", "nodeName"]), "<none>").into()
    }),
    wide("Nominated Node", |object, _| {
        or(text(object, &["status", "nominatedNodeName"]), "<none>").into()
    }),
    wide("Readiness Gates", |object, _| {
        pod::readiness_gates(object).into()
    }),
];

/// Amounts of resource metrics: a node's, or the sum of a pod's containers'.
fn used(object: &Value, resource: &str) -> Value {
    let containers = object["containers"].as_array().into_iter().flatten();
    let all = containers.chain([object]);
    let amounts = all.filter_map(|of| of["usage"][resource].as_str()?.parse().ok());
    let sum = amounts
        .map(|amount: crate::Quantity| match resource {
            "cpu" => amount.milli_value(),
            _ => amount.value(),
        })
        .fold(0i64, i64::saturating_add);
    match resource {
        "cpu" => format!("{sum}m"),
        _ => format!("{}Mi", sum >> 20),
    }
    .into()
}

static METRICS: &[Column] = &[
    NAME,
    string("CPU", |object, _| used(object, "cpu")),
    string("Memory", |object, _| used(object, "memory")),
    string("Window", |object, _| text(object, &["window"]).into()),
];

static NAMESPACES: &[Column] = &[
    NAME,
    string("Status", |object, _| {
        text(object, &["status", "phase"]).into()
    }),
    AGE,
];

fn count(object: &Value, fields: &[&str]) -> Value {
    fields
        .iter()
        .map(|field| object[*field].as_object().map_or(0, Map::len))
        .sum::<usize>()
        .into()
}

static CONFIG_MAPS: &[Column] = &[
    NAME,
    column("Data", "string", 0, |object, _| {
        count(object, &["data", "binaryData"])
    }),
    AGE,
];

static SECRETS: &[Column] = &[
    NAME,
    string("Type", |object, _| text(object, &["type"]).into()),
    column("Data", "string", 0, |object, _| count(object, &["data"])),
    AGE,
];

static SERVICE_ACCOUNTS: &[Column] = &[
    NAME,
    column("Secrets", "string", 0, |object, _| {
        object["secrets"].as_array().map_or(0, Vec::len).into()
    }),
    AGE,
];

static SERVICES: &[Column] = &[
    NAME,
    string("Type", |object, _| text(object, &["spec", "type"]).into()),
    string("Cluster-IP", |object, _| service::cluster_ip(object).into()),
    string("External-IP", |object, _| {
        service::external_ip(object).into()
    }),
    string("Port(s)", |object, _| service::ports(object).into()),
    AGE,
    wide("Selector", |object, _| service::selector(object).into()),
];

static ENDPOINT_SLICES: &[Column] = &[
    NAME,
    string("AddressType", |object, _| {
        text(object, &["addressType"]).into()
    }),
    string("Ports", |object, _| service::slice_ports(object).into()),
    string("Endpoints", |object, _| {
        service::slice_endpoints(object).into()
    }),
    AGE,
];

static LEASES: &[Column] = &[
    NAME,
    string("Holder", |object, _| {
        text(object, &["spec", "holderIdentity"]).into()
    }),
    AGE,
];

static RUNTIME_CLASSES: &[Column] = &[
    NAME,
    string("Handler", |object, _| text(object, &["handler"]).into()),
    AGE,
];

static ROLES: &[Column] = &[
    NAME,
    string("Created At", |object, _| {
        text(object, &["metadata", "creationTimestamp"]).into()
    }),
];

fn subjects(object: &Value, kind: &str) -> Value {
    let names: Vec<String> = object["subjects"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|subject| subject["kind"] == kind)
        .map(|subject| {
            let name = text(subject, &["name"]);
            match text(subject, &["namespace"]) {
                namespace if kind == "ServiceAccount" && !namespace.is_empty() => {
                    format!("{namespace}/{name}")
                }
                _ => name.to_owned(),
            }
        })
        .collect();
    names.join(", ").into()
}

static BINDINGS: &[Column] = &[
    NAME,
    string("Role", |object, _| {
        let role = &object["roleRef"];
        format!("{}/{}", text(role, &["kind"]), text(role, &["name"])).into()
    }),
    AGE,
    wide("Users", |object, _| subjects(object, "User")),
    wide("Groups", |object, _| subjects(object, "Group")),
    wide("ServiceAccounts", |object, _| {
        subjects(object, "ServiceAccount")
    }),
];

fn time_of(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// First and last time of an event, in either of its two views.
fn event_times(event: &Value) -> (Option<Timestamp>, Option<Timestamp>) {
    let at = |field: &str| time_of(&event[field]);
    let first = at("firstTimestamp")
        .or_else(|| at("deprecatedFirstTimestamp"))
        .or_else(|| at("eventTime"));
    let last = time_of(&event["series"]["lastObservedTime"])
        .or_else(|| at("lastTimestamp"))
        .or_else(|| at("deprecatedLastTimestamp"))
        .or(first);
    (first, last)
}

fn event_age(time: Option<Timestamp>, now: Timestamp) -> String {
    time.map_or_else(|| "<unknown>".to_owned(), |time| since(time, now))
}

fn event_count(event: &Value) -> i64 {
    [
        &event["series"]["count"],
        &event["count"],
        &event["deprecatedCount"],
    ]
    .into_iter()
    .find_map(Value::as_i64)
    .unwrap_or(1)
    .max(1)
}

fn event_object(event: &Value) -> &Value {
    if event["regarding"].is_object() {
        &event["regarding"]
    } else {
        &event["involvedObject"]
    }
}

fn event_source(event: &Value) -> Value {
    let source = if event["source"].is_object() {
        &event["source"]
    } else {
        &event["deprecatedSource"]
    };
    let component = ["reportingComponent", "reportingController"]
        .iter()
        .map(|field| text(event, &[field]))
        .find(|text| !text.is_empty());
    let component = or(text(source, &["component"]), component.unwrap_or_default());
    match or(text(source, &["host"]), text(event, &["reportingInstance"])) {
        "" => component.into(),
        host => format!("{component}, {host}").into(),
    }
}

static EVENTS: &[Column] = &[
    string("Last Seen", |event, now| {
        let (first, last) = event_times(event);
        let age = event_age(last, now);
        match event_count(event) {
            1 => age,
            count => format!("{age} (x{count} over {})", event_age(first, now)),
        }
        .into()
    }),
    string("Type", |event, _| text(event, &["type"]).into()),
    string("Reason", |event, _| text(event, &["reason"]).into()),
    string("Object", |event, _| {
        let object = event_object(event);
        format!(
            "{}/{}",
            text(object, &["kind"]).to_lowercase(),
            text(object, &["name"])
        )
        .into()
    }),
    wide("Subobject", |event, _| {
        text(event_object(event), &["fieldPath"]).into()
    }),
    wide("Source", |event, _| event_source(event)),
    string("Message", |event, _| {
        or(text(event, &["message"]), text(event, &["note"]))
            .trim()
            .into()
    }),
    wide("First Seen", |event, now| {
        event_age(event_times(event).0, now).into()
    }),
    column("Count", "string", 1, |event, _| event_count(event).into()),
    Column {
        priority: 1,
        ..NAME
    },
];

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a str> {
    object["status"]["conditions"]
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == kind)?
        .get("status")?
        .as_str()
}

fn node_status(node: &Value) -> String {
    let mut out = match condition(node, "Ready") {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node["spec"]["unschedulable"] == true {
        out.push_str(",SchedulingDisabled");
    }
    out
}

fn node_roles(node: &Value) -> String {
    const PREFIX: &str = "node-role.kubernetes.io/";
    let mut roles: Vec<&str> = Vec::new();
    for (key, value) in meta::labels(node).into_iter().flatten() {
        match (key.strip_prefix(PREFIX), value.as_str()) {
            (Some(role), _) if !role.is_empty() => roles.push(role),
            (None, Some(role)) if key == "kubernetes.io/role" && !role.is_empty() => {
                roles.push(role);
            }
            _ => {}
        }
    }
    roles.sort_unstable();
    roles.dedup();
    if roles.is_empty() {
        "<none>".to_owned()
    } else {
        roles.join(",")
    }
}

fn node_address<'a>(node: &'a Value, kind: &str) -> &'a str {
    node["status"]["addresses"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|address| address["type"] == kind)
        .map_or("<none>", |address| text(address, &["address"]))
}

fn node_info<'a>(node: &'a Value, field: &str) -> &'a str {
    or(text(node, &["status", "nodeInfo", field]), "<unknown>")
}

static NODES: &[Column] = &[
    NAME,
    string("Status", |node, _| node_status(node).into()),
    string("Roles", |node, _| node_roles(node).into()),
    AGE,
    string("Version", |node, _| {
        text(node, &["status", "nodeInfo", "kubeletVersion"]).into()
    }),
    wide("Internal-IP", |node, _| {
        node_address(node, "InternalIP").into()
    }),
    wide("External-IP", |node, _| {
        node_address(node, "ExternalIP").into()
    }),
    wide("OS-Image", |node, _| node_info(node, "osImage").into()),
    wide("Kernel-Version", |node, _| {
        node_info(node, "kernelVersion").into()
    }),
    wide("Container-Runtime", |node, _| {
        node_info(node, "containerRuntimeVersion").into()
    }),
];

fn ready(object: &Value) -> Value {
    condition(object, "Ready").unwrap_or("Unknown").into()
}

static TENANTS: &[Column] = &[
    NAME,
    string("Network", |tenant, _| {
        or(
            text(tenant, &["spec", "network", "default", "cidr"]),
            "<none>",
        )
        .into()
    }),
    column("Namespaces", "integer", 0, |tenant, _| {
        tenant["status"]["namespaces"]
            .as_array()
            .map_or(0, Vec::len)
            .into()
    }),
    string("Ready", |tenant, _| ready(tenant)),
    AGE,
    wide("Display Name", |tenant, _| {
        text(tenant, &["spec", "displayName"]).into()
    }),
];

fn subnets(network: &Value, field: &str) -> Value {
    let texts: Vec<&str> = network["spec"]["subnets"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|subnet| or(text(subnet, &[field]), "<none>"))
        .collect();
    or(&texts.join(","), "<none>").into()
}

static SNAPSHOTS: &[Column] = &[
    NAME,
    string("Pod", |snapshot, _| {
        text(snapshot, &["spec", "podName"]).into()
    }),
    string("Size", |snapshot, _| {
        match snapshot["status"]["sizeBytes"].as_i64() {
            Some(bytes) => show("storage", Quantity::from_units(bytes >> 20 << 20)),
            None => "<none>".to_owned(),
        }
        .into()
    }),
    string("Limit", |snapshot, _| {
        text(snapshot, &["spec", "sizeLimit"]).into()
    }),
    string("Ready", |snapshot, _| ready(snapshot)),
    AGE,
];

static NETWORKS: &[Column] = &[
    NAME,
    string("CIDR", |network, _| subnets(network, "cidr")),
    string("Gateway", |network, _| subnets(network, "gateway")),
    string("External", |network, _| {
        match network["spec"]["external"]["snat"].as_bool() {
            Some(true) => "SNAT",
            _ => "<none>",
        }
        .into()
    }),
    string("IPs", |network, _| {
        let status = &network["status"];
        let number = |field: &str| status[field].as_i64();
        match (number("ipsUsed"), number("ipsTotal")) {
            (Some(used), Some(total)) => format!("{used}/{total}"),
            (None, Some(total)) => total.to_string(),
            (_, None) => "<unknown>".to_owned(),
        }
        .into()
    }),
    string("Ready", |network, _| ready(network)),
    AGE,
    wide("MTU", |network, _| {
        network["spec"]["mtu"]
            .as_i64()
            .map_or_else(|| "<default>".into(), |mtu| mtu.to_string().into())
    }),
];
