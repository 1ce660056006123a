//! Service and EndpointSlice.

use std::{collections::HashSet, net::IpAddr};

use serde_json::{Value, json};

use crate::meta::rules;

use super::{ErrorKind, Found, Path, items, meta, text};

const TYPES: [&str; 4] = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
const VALID_IP: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
/// A day.
const MAX_AFFINITY_SECONDS: i64 = 86_400;
/// Port of the kubelet's API.
const KUBELET_PORT: i64 = 10_250;
const MAX_ENDPOINTS: usize = 1000;
const MAX_ADDRESSES: usize = 100;
const MAX_PORTS: usize = 20_000;

fn is_headless(spec: &Value) -> bool {
    text(spec, "clusterIP") == "None"
}

pub(super) fn service(object: &Value, found: &mut Found) {
    let (spec, path) = (&object["spec"], Path::root("spec"));
    let kind = text(spec, "type");
    let headless = is_headless(spec);
    let ports = spec["ports"].as_array().map_or(0, Vec::len);
    if ports == 0 && !headless && kind != "ExternalName" {
        found.required(&path.field("ports"), "");
    }
    match kind {
        "LoadBalancer" => {
            for (port, at) in items(&spec["ports"], &path.field("ports")) {
                if port["port"].as_i64() == Some(KUBELET_PORT) {
                    found.invalid(
                        &at,
                        &port["port"],
                        "may not expose port 10250 externally since it is used by kubelet",
                    );
                }
            }
            if headless {
                not_headless(&path, "LoadBalancer", found);
            }
        }
        "NodePort" if headless => not_headless(&path, "NodePort", found),
        "ExternalName" => external_name(spec, &path, found),
        _ => {}
    }
    service_ports(spec, &path, kind, found);
    meta::labels(&spec["selector"], &path.field("selector"), found);
    affinity(spec, &path, found);
    found.one_of(&path.field("type"), &spec["type"], &TYPES);
    if kind != "ExternalName" {
        cluster_ips(spec, &path, found);
    }
    for (address, at) in items(&spec["externalIPs"], &path.field("externalIPs")) {
        special_address(address, &at, found);
    }
    policies(spec, &path, kind, found);
}

fn not_headless(path: &Path, kind: &str, found: &mut Found) {
    found.invalid(
        &path.field("clusterIPs").index(0),
        &"None".into(),
        format!("may not be set to 'None' for {kind} services"),
    );
}

fn external_name(spec: &Value, path: &Path, found: &mut Found) {
    for field in ["clusterIPs", "ipFamilies"] {
        if spec[field].as_array().is_some_and(|list| !list.is_empty()) {
            found.forbidden(
                &path.field(field),
                "may not be set for ExternalName services",
            );
        }
    }
    if !text(spec, "ipFamilyPolicy").is_empty() {
        found.forbidden(
            &path.field("ipFamilyPolicy"),
            "may not be set for ExternalName services",
        );
    }
    let at = path.field("externalName");
    match text(spec, "externalName").trim_end_matches('.') {
        "" => found.required(&at, ""),
        name => found.all_invalid(&at, name, rules::subdomain(name)),
    }
}

fn service_ports(spec: &Value, path: &Path, kind: &str, found: &mut Found) {
    let several = spec["ports"]
        .as_array()
        .is_some_and(|ports| ports.len() > 1);
    let (mut names, mut taken) = (HashSet::new(), HashSet::new());
    for (port, at) in items(&spec["ports"], &path.field("ports")) {
        let name = text(port, "name");
        if name.is_empty() {
            if several {
                found.required(&at.field("name"), "");
            }
        } else {
            let problems = rules::label(name);
            if problems.is_empty() && !names.insert(name) {
                found.duplicate(&at.field("name"), &port["name"]);
            }
            found.all_invalid(&at.field("name"), name, problems);
        }
        let number = port["port"].as_i64().unwrap_or_default();
        for problem in rules::port_number(number) {
            found.invalid(&at.field("port"), &json!(number), problem);
        }
        found.one_of(&at.field("protocol"), &port["protocol"], &PROTOCOLS);
        let target = &port["targetPort"];
        if let Some(name) = target.as_str() {
            found.all_invalid(&at.field("targetPort"), name, rules::port_name(name));
        } else {
            for problem in rules::port_number(target.as_i64().unwrap_or_default()) {
                found.invalid(&at.field("targetPort"), target, problem);
            }
        }
        let protocol = text(port, "appProtocol");
        if !protocol.is_empty() {
            let problems = rules::qualified_name(protocol);
            found.all_invalid(&at.field("appProtocol"), protocol, problems);
        }
        if !taken.insert((text(port, "protocol"), number)) {
            let key = json!({"protocol": port["protocol"], "port": number});
            found.duplicate(&at, &key);
        }
        let node = port["nodePort"].as_i64().unwrap_or_default();
        if node != 0 {
            for problem in rules::port_number(node) {
                found.invalid(&at.field("nodePort"), &port["nodePort"], problem);
            }
            if kind == "ClusterIP" {
                found.forbidden(
                    &at.field("nodePort"),
                    "may not be used when `type` is 'ClusterIP'",
                );
            }
        }
    }
}

fn affinity(spec: &Value, path: &Path, found: &mut Found) {
    found.one_of(
        &path.field("sessionAffinity"),
        &spec["sessionAffinity"],
        &["ClientIP", "None"],
    );
    let at = path.field("sessionAffinityConfig");
    let config = &spec["sessionAffinityConfig"];
    match text(spec, "sessionAffinity") {
        "ClientIP" => {
            let (at, seconds) = (
                at.field("clientIP.timeoutSeconds"),
                &config["clientIP"]["timeoutSeconds"],
            );
            match seconds.as_i64() {
                None => found.required(&at, "when session affinity type is ClientIP"),
                Some(1..=MAX_AFFINITY_SECONDS) => {}
                Some(_) => found.invalid(
                    &at,
                    seconds,
                    format!("must be greater than 0 and less than {MAX_AFFINITY_SECONDS}"),
                ),
            }
        }
        "None" if !config.is_null() => {
            found.forbidden(&at, "must not be set when session affinity is None");
        }
        _ => {}
    }
}

fn cluster_ips(spec: &Value, path: &Path, found: &mut Found) {
    let at = path.field("clusterIPs");
    let list = &spec["clusterIPs"];
    let first = list[0].as_str().unwrap_or_default();
    if first != text(spec, "clusterIP") {
        found.invalid(&at, list, "first value must match `clusterIP`");
    }
    let count = list.as_array().map_or(0, Vec::len);
    if count > 2 {
        found.invalid(&at, list, "may only hold up to 2 values");
    }
    for (address, one) in items(list, &at) {
        match address.as_str().unwrap_or_default() {
            "None" if count > 1 => {
                found.invalid(&at, list, "'None' must be the first and only value");
            }
            "None" => {}
            text if text.parse::<IpAddr>().is_ok() => {}
            _ => found.invalid(&one, address, VALID_IP),
        }
    }
    for (family, one) in items(&spec["ipFamilies"], &path.field("ipFamilies")) {
        match family.as_str() {
            Some("IPv4") => {}
            Some("IPv6") => found.invalid(&one, family, "not configured on this cluster"),
            _ => found.not_supported(&one, family, &["IPv4", "IPv6"]),
        }
    }
    match text(spec, "ipFamilyPolicy") {
        "" | "SingleStack" | "PreferDualStack" => {}
        "RequireDualStack" => found.invalid(
            &path.field("ipFamilyPolicy"),
            &spec["ipFamilyPolicy"],
            "this cluster is not configured for dual-stack services",
        ),
        _ => found.not_supported(
            &path.field("ipFamilyPolicy"),
            &spec["ipFamilyPolicy"],
            &["SingleStack", "PreferDualStack", "RequireDualStack"],
        ),
    }
}

fn policies(spec: &Value, path: &Path, kind: &str, found: &mut Found) {
    let local = ["Cluster", "Local"];
    if !spec["internalTrafficPolicy"].is_null() {
        let at = path.field("internalTrafficPolicy");
        found.one_of(&at, &spec["internalTrafficPolicy"], &local);
    }
    let at = path.field("externalTrafficPolicy");
    let external = matches!(kind, "NodePort" | "LoadBalancer")
        || spec["externalIPs"]
            .as_array()
            .is_some_and(|ips| !ips.is_empty());
    match text(spec, "externalTrafficPolicy") {
        "" => {}
        _ if !external => found.invalid(
            &at,
            &spec["externalTrafficPolicy"],
            "may only be set for externally-accessible services",
        ),
        _ => found.one_of(&at, &spec["externalTrafficPolicy"], &local),
    }
    if kind == "LoadBalancer" {
        let class = text(spec, "loadBalancerClass");
        if !class.is_empty() {
            let problems = rules::qualified_name(class);
            found.all_invalid(&path.field("loadBalancerClass"), class, problems);
        }
        return;
    }
    for field in ["loadBalancerClass", "allocateLoadBalancerNodePorts"] {
        if !spec[field].is_null() {
            found.forbidden(
                &path.field(field),
                "may only be used when `type` is 'LoadBalancer'",
            );
        }
    }
    if spec["loadBalancerSourceRanges"]
        .as_array()
        .is_some_and(|ranges| !ranges.is_empty())
    {
        found.forbidden(
            &path.field("loadBalancerSourceRanges"),
            "may only be used when `type` is 'LoadBalancer'",
        );
    }
}

pub(super) fn service_update(new: &Value, old: &Value, found: &mut Found) {
    let (is, was) = (&new["spec"], &old["spec"]);
    let without = |spec: &Value| text(spec, "type") == "ExternalName";
    if without(is) || without(was) {
        return;
    }
    let path = Path::root("spec.clusterIPs");
    match (text(is, "clusterIP"), text(was, "clusterIP")) {
        (_, "") => {}
        ("", _) => found.invalid(
            &path.index(0),
            &is["clusterIPs"],
            "primary clusterIP can not be unset",
        ),
        (new, old) if new != old => {
            found.invalid(&path.index(0), &is["clusterIPs"], "may not change once set");
        }
        _ => {}
    }
}

/// An address that is somebody's in particular, not of the machine, link or group.
fn special_address(address: &Value, at: &Path, found: &mut Found) {
    let Some(ip) = address
        .as_str()
        .and_then(|text| text.parse::<IpAddr>().ok())
    else {
        found.invalid(at, address, VALID_IP);
        return;
    };
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => (ip.segments()[0] & 0xffc0) == 0xfe80,
    };
    let link_local_group = match ip {
        IpAddr::V4(ip) => ip.octets()[..3] == [224, 0, 0],
        IpAddr::V6(ip) => (ip.segments()[0] & 0xff0f) == 0xff02,
    };
    let mut refuse = |detail: String| found.invalid(at, address, detail);
    if ip.is_unspecified() {
        refuse(format!("may not be unspecified ({ip})"));
    }
    if ip.is_loopback() {
        refuse("may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned());
    }
    if link_local {
        refuse("may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned());
    }
    if link_local_group {
        refuse("may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned());
    }
}

pub(super) fn endpoint_slice(object: &Value, found: &mut Found) {
    let kind = text(object, "addressType");
    found.one_of(
        &Path::root("addressType"),
        &object["addressType"],
        &["IPv4", "IPv6", "FQDN"],
    );
    let path = Path::root("endpoints");
    too_many(&object["endpoints"], &path, MAX_ENDPOINTS, found);
    for (endpoint, at) in items(&object["endpoints"], &path) {
        slice_endpoint(endpoint, &at, kind, found);
    }
    let path = Path::root("ports");
    too_many(&object["ports"], &path, MAX_PORTS, found);
    let mut names = HashSet::new();
    for (port, at) in items(&object["ports"], &path) {
        let name = text(port, "name");
        if !name.is_empty() {
            found.all_invalid(&at.field("name"), name, rules::label(name));
        }
        if !names.insert(name) {
            found.duplicate(&at.field("name"), &name.into());
        }
        found.one_of(&at.field("protocol"), &port["protocol"], &PROTOCOLS);
        if let Some(number) = port["port"].as_i64() {
            for problem in rules::port_number(number) {
                found.invalid(&at.field("port"), &port["port"], problem);
            }
        }
        let protocol = text(port, "appProtocol");
        if !protocol.is_empty() {
            let problems = rules::qualified_name(protocol);
            found.all_invalid(&at.field("appProtocol"), protocol, problems);
        }
    }
}

fn slice_endpoint(endpoint: &Value, at: &Path, kind: &str, found: &mut Found) {
    let path = at.field("addresses");
    let addresses = &endpoint["addresses"];
    if addresses.as_array().is_none_or(Vec::is_empty) {
        found.required(&path, "must contain at least 1 address");
    }
    too_many(addresses, &path, MAX_ADDRESSES, found);
    for (address, one) in items(addresses, &path) {
        let text = address.as_str().unwrap_or_default();
        match (kind, text.parse::<IpAddr>()) {
            ("FQDN", _) => found.all_invalid(&one, text, rules::subdomain(text)),
            ("IPv4", Ok(IpAddr::V4(_))) | ("IPv6", Ok(IpAddr::V6(_))) => {
                special_address(address, &one, found);
            }
            ("IPv4", _) => found.invalid(&one, address, "must be an IPv4 address"),
            ("IPv6", _) => found.invalid(&one, address, "must be an IPv6 address"),
            _ => {}
        }
    }
    for field in ["hostname", "nodeName", "zone"] {
        let name = text(endpoint, field);
        if name.is_empty() {
            continue;
        }
        let problems = match field {
            "hostname" => rules::label(name),
            "nodeName" => rules::subdomain(name),
            _ => rules::label_value(name),
        };
        found.all_invalid(&at.field(field), name, problems);
    }
}

fn too_many(list: &Value, path: &Path, limit: usize, found: &mut Found) {
    let count = list.as_array().map_or(0, Vec::len);
    if count > limit {
        let detail = format!("must have at most {limit} items");
        found.add(ErrorKind::TooMany, path, &count.into(), detail);
    }
}

pub(super) fn endpoint_slice_update(new: &Value, old: &Value, found: &mut Found) {
    let path = Path::root("addressType");
    found.immutable(&path, &new["addressType"], &old["addressType"]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        defaults,
        kinds::{ResourceKind, by_api_version},
        validation::{validate_create, validate_update},
    };

    fn kind() -> &'static ResourceKind {
        by_api_version("v1", "Service").unwrap()
    }

    fn made(spec: Value) -> Value {
        let mut object = json!({
            "metadata": {"name": "web", "namespace": "acme"},
            "spec": spec,
        });
        defaults::apply(kind(), &mut object);
        object
    }

    fn errors(spec: Value) -> Vec<String> {
        let found = validate_create(kind(), &made(spec));
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn services_are_refused_in_upstream_s_words() {
        let port = || json!([{"port": 80}]);
        for (spec, expected) in [
            (json!({"ports": port()}), vec![]),
            (json!({"clusterIP": "None"}), vec![]),
            (
                json!({"type": "ExternalName", "externalName": "debian.org."}),
                vec![],
            ),
            (json!({}), vec!["spec.ports: Required value"]),
            (
                json!({"ports": [{"port": 0}]}),
                vec![
                    "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
                    "spec.ports[0].targetPort: Invalid value: 0: must be between 1 and 65535, \
                     inclusive",
                ],
            ),
            (
                json!({"ports": [{"port": 80}, {"port": 81, "name": "a"}]}),
                vec!["spec.ports[0].name: Required value"],
            ),
            (
                json!({"ports": port(), "type": "Magic"}),
                vec![
                    "spec.type: Unsupported value: \"Magic\": supported values: \"ClusterIP\", \
                     \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
                ],
            ),
            (
                json!({"type": "ExternalName"}),
                vec!["spec.externalName: Required value"],
            ),
            (
                json!({"ports": port(), "clusterIP": "10.0"}),
                vec![
                    "spec.clusterIPs[0]: Invalid value: \"10.0\": must be a valid IP address, \
                     (e.g. 10.9.8.7 or 2001:db8::ffff)",
                ],
            ),
            (
                json!({"ports": port(), "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.2"]}),
                vec![
                    "spec.clusterIPs: Invalid value: [\"10.0.0.2\"]: first value must match \
                     `clusterIP`",
                ],
            ),
            (
                json!({"ports": port(), "sessionAffinity": "ClientIP",
                    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 90000}}}),
                vec![
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 90000: \
                     must be greater than 0 and less than 86400",
                ],
            ),
            (
                json!({"ports": [{"port": 80, "nodePort": 30000}]}),
                vec![
                    "spec.ports[0].nodePort: Forbidden: may not be used when `type` is \
                     'ClusterIP'",
                ],
            ),
            (
                json!({"ports": port(), "type": "NodePort", "clusterIP": "None"}),
                vec![
                    "spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for \
                     NodePort services",
                ],
            ),
        ] {
            assert_eq!(errors(spec.clone()), expected, "{spec}");
        }
    }

    #[test]
    fn names_are_dns_1035_labels() {
        let mut object = made(json!({"ports": [{"port": 80}]}));
        object["metadata"]["name"] = "1web".into();
        let found = validate_create(kind(), &object);
        assert!(
            found[0].detail.starts_with("a DNS-1035 label must consist"),
            "{found:?}"
        );
    }

    #[test]
    fn an_address_stays() {
        let spec = |ip: &str| json!({"ports": [{"port": 80}], "clusterIP": ip});
        let change = |new: Value, old: Value| {
            let (mut new, mut old) = (made(new), made(old));
            for object in [&mut new, &mut old] {
                object["metadata"]["resourceVersion"] = "1".into();
            }
            let found = validate_update(kind(), &new, &old);
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(change(spec("10.96.0.5"), spec("10.96.0.5")).is_empty());
        assert_eq!(
            change(spec("10.96.0.6"), spec("10.96.0.5")),
            ["spec.clusterIPs[0]: Invalid value: [\"10.96.0.6\"]: may not change once set"]
        );
        let external = json!({"type": "ExternalName", "externalName": "x.org"});
        assert!(change(external, spec("10.96.0.5")).is_empty());
    }

    #[test]
    fn endpoints_are_somebody_s_in_particular() {
        let kind = by_api_version("discovery.k8s.io/v1", "EndpointSlice").unwrap();
        let slice = |address: &str| {
            json!({
                "metadata": {"name": "web-1", "namespace": "acme"},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [address]}],
                "ports": [{"name": "", "protocol": "TCP", "port": 80}],
            })
        };
        assert!(validate_create(kind, &slice("10.0.0.5")).is_empty());
        for bad in [
            "127.0.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "224.0.0.1",
            "fd00::1",
            "x",
        ] {
            assert_eq!(validate_create(kind, &slice(bad)).len(), 1, "{bad}");
        }
    }
}
