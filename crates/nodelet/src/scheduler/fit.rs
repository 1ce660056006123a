//! Whether a pod fits a node: a pure function of the pod, the node and all pods, in the scheduler's words.

use std::collections::BTreeMap;

use hypernetes_apimachinery::selector::LabelSelector;
use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinityTerm, PodSpec, Taint,
    Toleration,
};
use serde_json::Value;

use crate::{
    resources,
    roles::{self, Role},
};

/// Why a pod does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Misfit {
    pub(crate) reasons: Vec<String>,
    /// Pods that go could make room.
    pub(crate) preemption_helps: bool,
}

type Labels = BTreeMap<String, String>;

/// Looks whether `pod` fits `node` beside `others`, which are all other pods there are.
pub(crate) fn check(pod: &Pod, node: &Node, others: &[&Pod]) -> Result<(), Misfit> {
    let fixed = |reason: &str| {
        Err(Misfit {
            reasons: vec![reason.to_owned()],
            preemption_helps: false,
        })
    };
    let Some(spec) = &pod.spec else {
        return fixed("the pod has no spec");
    };
    let node_spec = node.spec.clone().unwrap_or_default();
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    if node_spec.unschedulable == Some(true) {
        let taint = Taint {
            key: "node.kubernetes.io/unschedulable".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        if !tolerates(tolerations, &taint) {
            return fixed("node(s) were unschedulable");
        }
    }
    let taints = node_spec.taints.unwrap_or_default();
    let bad = taints
        .iter()
        .filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"))
        .any(|taint| !tolerates(tolerations, taint));
    if bad {
        return fixed("node(s) had untolerated taint(s)");
    }
    if !selects(spec, node) {
        return fixed("node(s) didn't match Pod's node affinity/selector");
    }
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let here: Vec<&Pod> = others
        .iter()
        .copied()
        .filter(|other| is_on(other, name) && !is_finished(other))
        .collect();
    let wanted = host_ports(spec);
    let taken = here.iter().filter_map(|other| other.spec.as_ref());
    if taken
        .flat_map(host_ports)
        .any(|taken| wanted.iter().any(|port| port.meets(&taken)))
    {
        return Err(Misfit {
            reasons: vec!["node(s) didn't have free ports for the requested pod ports".to_owned()],
            preemption_helps: true,
        });
    }
    if let Some(reason) = spread(pod, spec, node, &here) {
        return Err(Misfit {
            preemption_helps: !reason.contains("missing"),
            reasons: vec![reason],
        });
    }
    if let Some(reason) = affinity(pod, spec, node, &here, others) {
        return Err(Misfit {
            preemption_helps: reason.contains("anti-affinity"),
            reasons: vec![reason.to_owned()],
        });
    }
    let reasons = shortages(spec, node, &here);
    if reasons.is_empty() {
        return Ok(());
    }
    Err(Misfit {
        preemption_helps: true,
        reasons,
    })
}

pub(crate) fn is_on(pod: &Pod, node: &str) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node)
}

pub(crate) fn is_finished(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

pub(crate) fn priority(pod: &Pod) -> i32 {
    let spec = pod.spec.as_ref();
    spec.and_then(|spec| spec.priority).unwrap_or(0)
}

fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|toleration| {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let (key, effect) = (text(&toleration.key), text(&toleration.effect));
        if !effect.is_empty() && effect != taint.effect {
            return false;
        }
        if !key.is_empty() && key != taint.key {
            return false;
        }
        match text(&toleration.operator).as_str() {
            "Exists" => true,
            "" | "Equal" => !key.is_empty() && text(&toleration.value) == text(&taint.value),
            _ => false,
        }
    })
}

fn selects(spec: &PodSpec, node: &Node) -> bool {
    let empty = Labels::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let simple = spec.node_selector.iter().flatten();
    if !simple
        .into_iter()
        .all(|(key, value)| labels.get(key) == Some(value))
    {
        return false;
    }
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| {
            affinity
                .required_during_scheduling_ignored_during_execution
                .as_ref()
        });
    let Some(required) = required else {
        return true;
    };
    let mut fields = Labels::new();
    let name = node.metadata.name.clone().unwrap_or_default();
    fields.insert("metadata.name".to_owned(), name);
    required
        .node_selector_terms
        .iter()
        .any(|term| matches_term(term, labels, &fields))
}

fn matches_term(term: &NodeSelectorTerm, labels: &Labels, fields: &Labels) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let on_fields = term.match_fields.as_deref().unwrap_or_default();
    // A term that says nothing selects nothing.
    !(expressions.is_empty() && on_fields.is_empty())
        && expressions.iter().all(|one| matches_one(one, labels))
        && on_fields.iter().all(|one| matches_one(one, fields))
}

fn matches_one(one: &NodeSelectorRequirement, labels: &Labels) -> bool {
    let value = labels.get(&one.key);
    let listed = |value: &String| one.values.iter().flatten().any(|other| other == value);
    let compare = |wanted: std::cmp::Ordering| {
        let limit = one.values.as_ref()?.first()?.parse::<i64>().ok()?;
        let has = value?.parse::<i64>().ok()?;
        Some(has.cmp(&limit) == wanted)
    };
    match one.operator.as_str() {
        "In" => value.is_some_and(listed),
        "NotIn" => !value.is_some_and(listed),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(std::cmp::Ordering::Greater).unwrap_or(false),
        "Lt" => compare(std::cmp::Ordering::Less).unwrap_or(false),
        _ => false,
    }
}

/// Whether a selector of pods matches; one that cannot be read, or is absent, matches nothing.
fn matches_pods(selector: Option<&impl serde::Serialize>, pod: &Pod) -> bool {
    let Some(selector) = selector.and_then(|selector| serde_json::to_value(selector).ok()) else {
        return false;
    };
    let labels = serde_json::to_value(pod.metadata.labels.clone().unwrap_or_default());
    match (LabelSelector::from_json(&selector), labels) {
        (Ok(selector), Ok(Value::Object(labels))) => selector.matches_labels(Some(&labels)),
        _ => false,
    }
}

fn matches_affinity(term: &PodAffinityTerm, owner: &Pod, pod: &Pod) -> bool {
    let namespaces = term.namespaces.as_deref().unwrap_or_default();
    let namespace = pod.metadata.namespace.as_ref();
    // An empty selector of namespaces selects all of them; others need labels that are not looked up here,
    // and are refused before.
    let in_scope = if term.namespace_selector.is_some() {
        true
    } else if namespaces.is_empty() {
        namespace == owner.metadata.namespace.as_ref()
    } else {
        namespace.is_some_and(|namespace| namespaces.contains(namespace))
    };
    in_scope && matches_pods(term.label_selector.as_ref(), pod)
}

fn affinity(
    pod: &Pod,
    spec: &PodSpec,
    node: &Node,
    here: &[&Pod],
    all: &[&Pod],
) -> Option<&'static str> {
    let has_label = |key: &str| {
        let labels = node.metadata.labels.as_ref();
        labels.is_some_and(|labels| labels.contains_key(key))
    };
    let affinity = spec.affinity.clone().unwrap_or_default();
    let wanted = affinity.pod_affinity.unwrap_or_default();
    for term in wanted
        .required_during_scheduling_ignored_during_execution
        .iter()
        .flatten()
    {
        let near = here.iter().any(|other| matches_affinity(term, pod, other));
        let anywhere = all.iter().any(|other| matches_affinity(term, pod, other));
        // The first of a group that wants to be together has nobody to be with.
        let first = !anywhere && matches_affinity(term, pod, pod);
        if !has_label(&term.topology_key) || !(near || first) {
            return Some("node(s) didn't match pod affinity rules");
        }
    }
    let unwanted = affinity.pod_anti_affinity.unwrap_or_default();
    for term in unwanted
        .required_during_scheduling_ignored_during_execution
        .iter()
        .flatten()
    {
        let near = here.iter().any(|other| matches_affinity(term, pod, other));
        if has_label(&term.topology_key) && near {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
    }
    for other in here {
        let affinity = other.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
        let terms = affinity
            .and_then(|affinity| affinity.pod_anti_affinity.as_ref())
            .and_then(|anti| {
                anti.required_during_scheduling_ignored_during_execution
                    .as_ref()
            });
        let kept_off = terms
            .into_iter()
            .flatten()
            .any(|term| has_label(&term.topology_key) && matches_affinity(term, other, pod));
        if kept_off {
            return Some("node(s) didn't satisfy existing pods anti-affinity rules");
        }
    }
    None
}

/// With one node there is one domain: it is the least and the most at once.
fn spread(pod: &Pod, spec: &PodSpec, node: &Node, here: &[&Pod]) -> Option<String> {
    const MISMATCH: &str = "node(s) didn't match pod topology spread constraints";
    for constraint in spec.topology_spread_constraints.iter().flatten() {
        if constraint.when_unsatisfiable != "DoNotSchedule" {
            continue;
        }
        let labels = node.metadata.labels.as_ref();
        if !labels.is_some_and(|labels| labels.contains_key(&constraint.topology_key)) {
            return Some(format!("{MISMATCH} (missing required label)"));
        }
        let selector = constraint.label_selector.as_ref();
        let same = |other: &&&Pod| {
            other.metadata.namespace == pod.metadata.namespace && matches_pods(selector, other)
        };
        let count = i32::try_from(here.iter().filter(same).count()).unwrap_or(i32::MAX);
        let own = i32::from(matches_pods(selector, pod));
        let least = match constraint.min_domains {
            Some(domains) if domains > 1 => 0,
            _ => count,
        };
        if count.saturating_add(own).saturating_sub(least) > constraint.max_skew {
            return Some(MISMATCH.to_owned());
        }
    }
    None
}

/// A port of the node that a pod wants.
struct HostPort {
    protocol: String,
    number: i32,
    address: String,
}

impl HostPort {
    fn meets(&self, other: &Self) -> bool {
        let any = |address: &str| matches!(address, "" | "0.0.0.0" | "::");
        self.number == other.number
            && self.protocol == other.protocol
            && (any(&self.address) || any(&other.address) || self.address == other.address)
    }
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| roles::of_init(container) == Role::Sidecar);
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            Some(HostPort {
                number: port.host_port.filter(|number| *number > 0)?,
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                address: port.host_ip.clone().unwrap_or_default(),
            })
        })
        .collect()
}

/// What a pod asks for of a resource: thousandths of CPUs, or bytes.
pub(crate) fn request(spec: &PodSpec, name: &str) -> i64 {
    let amount = |container: &k8s_openapi::api::core::v1::Container| {
        let quantity = resources::request(container, name).unwrap_or_default();
        match name {
            "cpu" => quantity.milli_value(),
            _ => quantity.value(),
        }
        .max(0)
    };
    if let Some(whole) = resources::pod_request(Some(spec), name) {
        return match name {
            "cpu" => whole.milli_value(),
            _ => whole.value(),
        };
    }
    let (mut sidecars, mut most) = (0i64, 0i64);
    for container in spec.init_containers.iter().flatten() {
        let own = amount(container);
        if roles::of_init(container) == Role::Sidecar {
            sidecars = sidecars.saturating_add(own);
            most = most.max(sidecars);
        } else {
            most = most.max(sidecars.saturating_add(own));
        }
    }
    let main = spec.containers.iter().map(amount);
    main.fold(sidecars, i64::saturating_add).max(most)
}

/// What of a resource of the node's a pod takes: huge pages are memory of its VM.
fn needs(spec: &PodSpec, name: &str) -> i64 {
    let asked = request(spec, name);
    if name != "memory" {
        return asked;
    }
    let (mut sidecars, mut most) = (0i64, 0i64);
    for container in spec.init_containers.iter().flatten() {
        let own = resources::huge_page_bytes(container);
        let beside = sidecars.saturating_add(own);
        most = most.max(beside);
        if roles::of_init(container) == Role::Sidecar {
            sidecars = beside;
        }
    }
    let main = spec.containers.iter().map(resources::huge_page_bytes);
    asked.saturating_add(main.fold(sidecars, i64::saturating_add).max(most))
}

fn shortages(spec: &PodSpec, node: &Node, here: &[&Pod]) -> Vec<String> {
    let allocatable = node
        .status
        .as_ref()
        .and_then(|status| status.allocatable.clone())
        .unwrap_or_default();
    let has = |name: &str| {
        let quantity = allocatable.get(name)?;
        quantity.0.parse::<hypernetes_types::Quantity>().ok()
    };
    let mut short = Vec::new();
    if let Some(pods) = has("pods")
        && i64::try_from(here.len()).unwrap_or(i64::MAX) >= pods.value()
    {
        short.push("Too many pods".to_owned());
    }
    for name in ["cpu", "memory", "ephemeral-storage"] {
        let Some(room) = has(name) else { continue };
        let room = match name {
            "cpu" => room.milli_value(),
            _ => room.value(),
        };
        let wanted = needs(spec, name);
        if wanted == 0 {
            continue;
        }
        let used = here
            .iter()
            .filter_map(|other| other.spec.as_ref())
            .map(|spec| needs(spec, name))
            .fold(0i64, i64::saturating_add);
        if wanted > room.saturating_sub(used) {
            short.push(format!("Insufficient {name}"));
        }
    }
    short
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "json! makes values")]
mod tests {
    use serde_json::json;

    use super::*;

    fn node() -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n1", "labels": {"kubernetes.io/hostname": "n1", "zone": "a", "n": "5"}},
            "spec": {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]},
            "status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"}}}))
        .unwrap()
    }

    fn pod(spec: Value, labels: Value) -> Pod {
        let mut spec = spec;
        if spec["containers"].is_null() {
            spec["containers"] = json!([{"name": "c"}]);
        }
        if spec["tolerations"].is_null() {
            spec["tolerations"] = json!([{"operator": "Exists"}]);
        }
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "a", "labels": labels}, "spec": spec}))
        .unwrap()
    }

    fn placed(spec: Value, labels: Value) -> Pod {
        let mut spec = spec;
        spec["nodeName"] = "n1".into();
        pod(spec, labels)
    }

    fn reasons(spec: Value, others: &[Pod]) -> Vec<String> {
        let others: Vec<&Pod> = others.iter().collect();
        match check(&pod(spec, json!({"app": "web"})), &node(), &others) {
            Ok(()) => Vec::new(),
            Err(misfit) => misfit.reasons,
        }
    }

    const SELECTOR: &str = "node(s) didn't match Pod's node affinity/selector";

    #[test]
    fn selectors_and_affinity_of_nodes() {
        let required = |expressions: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": expressions}]}}}})
        };
        let one = |key: &str, operator: &str, values: Value| {
            required(json!([{"key": key, "operator": operator, "values": values}]))
        };
        for (spec, fits) in [
            (json!({"nodeSelector": {"zone": "a"}}), true),
            (json!({"nodeSelector": {"zone": "b"}}), false),
            (one("zone", "In", json!(["a", "b"])), true),
            (one("zone", "NotIn", json!(["a"])), false),
            (one("none", "NotIn", json!(["a"])), true),
            (one("zone", "Exists", json!([])), true),
            (one("zone", "DoesNotExist", json!([])), false),
            (one("n", "Gt", json!(["4"])), true),
            (one("n", "Lt", json!(["5"])), false),
            (required(json!([])), false),
        ] {
            let found = reasons(spec.clone(), &[]);
            assert_eq!(found.is_empty(), fits, "{spec}");
            assert!(fits || found == [SELECTOR], "{spec}");
        }
        let field = json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            {"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In",
                "values": ["n2"]}]}]}}}});
        assert_eq!(reasons(field, &[]), [SELECTOR]);
    }

    #[test]
    fn taints_are_tolerated_or_keep_pods_off() {
        for (tolerations, fits) in [
            (json!([]), false),
            (json!([{"operator": "Exists"}]), true),
            (json!([{"key": "gpu", "operator": "Exists"}]), true),
            (json!([{"key": "gpu", "value": "yes"}]), true),
            (json!([{"key": "gpu", "value": "no"}]), false),
            (
                json!([{"key": "gpu", "value": "yes", "effect": "NoExecute"}]),
                false,
            ),
        ] {
            let found = reasons(json!({"tolerations": tolerations}), &[]);
            assert_eq!(found.is_empty(), fits, "{tolerations}");
        }
        let mut node = node();
        node.spec.as_mut().unwrap().unschedulable = Some(true);
        let tolerations = json!([{"key": "gpu", "operator": "Exists"}]);
        let misfit = check(
            &pod(json!({"tolerations": tolerations}), json!({})),
            &node,
            &[],
        );
        assert_eq!(misfit.unwrap_err().reasons, ["node(s) were unschedulable"]);
    }

    #[test]
    fn requests_and_pods_are_counted() {
        let cpu = |amount: &str| json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": amount}}}]});
        let other = placed(cpu("1500m"), json!({}));
        assert!(reasons(cpu("500m"), std::slice::from_ref(&other)).is_empty());
        assert_eq!(
            reasons(cpu("600m"), std::slice::from_ref(&other)),
            ["Insufficient cpu"]
        );
        let mut ended = other.clone();
        ended.status = Some(serde_json::from_value(json!({"phase": "Succeeded"})).unwrap());
        assert!(reasons(cpu("600m"), &[ended]).is_empty());
        let small = placed(json!({}), json!({}));
        assert_eq!(
            reasons(json!({}), &[small.clone(), small.clone(), small]),
            ["Too many pods"]
        );
    }

    #[test]
    fn ports_of_the_node_are_had_once() {
        let port = |number: i32, protocol: &str, address: &str| {
            json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": number,
                "protocol": protocol, "hostIP": address}]}]})
        };
        let taken = [placed(port(80, "TCP", "127.0.0.1"), json!({}))];
        for (wanted, fits) in [
            (port(80, "TCP", ""), false),
            (port(80, "TCP", "127.0.0.1"), false),
            (port(80, "TCP", "127.0.0.2"), true),
            (port(80, "UDP", ""), true),
            (port(81, "TCP", ""), true),
            (port(0, "TCP", ""), true),
        ] {
            assert_eq!(reasons(wanted.clone(), &taken).is_empty(), fits, "{wanted}");
        }
    }

    #[test]
    fn pods_want_to_be_together_or_apart() {
        let term =
            json!([{"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "db"}}}]);
        let own =
            json!([{"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "web"}}}]);
        let with = |kind: &str, term: &Value| json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": term}}});
        let db = placed(json!({}), json!({"app": "db"}));
        let web = placed(with("podAntiAffinity", &own), json!({"app": "db"}));
        let rules = "node(s) didn't match pod affinity rules";
        assert_eq!(reasons(with("podAffinity", &term), &[]), [rules]);
        assert!(reasons(with("podAffinity", &term), std::slice::from_ref(&db)).is_empty());
        assert!(
            reasons(with("podAffinity", &own), &[]).is_empty(),
            "the first"
        );
        assert_eq!(
            reasons(with("podAntiAffinity", &term), &[db]),
            ["node(s) didn't match pod anti-affinity rules"]
        );
        assert_eq!(
            reasons(json!({}), &[web]),
            ["node(s) didn't satisfy existing pods anti-affinity rules"]
        );
    }

    #[test]
    fn one_node_is_one_domain() {
        let constraint = |key: &str, more: Value| {
            let mut constraint = json!({"maxSkew": 1, "topologyKey": key,
                "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "web"}}});
            constraint
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            json!({"topologySpreadConstraints": [constraint]})
        };
        let web = placed(json!({}), json!({"app": "web"}));
        let others = [web];
        assert!(reasons(constraint("zone", json!({})), &others).is_empty());
        assert!(
            reasons(constraint("rack", json!({})), &others)[0]
                .ends_with("(missing required label)")
        );
        let two = constraint("zone", json!({"minDomains": 2}));
        assert_eq!(reasons(two, &others).len(), 1);
    }
}
