//! Tenant and Network.

use std::net::Ipv4Addr;

use hypernetes_types::KernelName;
use ipnet::Ipv4Net;
use serde_json::Value;

use super::{Found, Path, items, text};

/// A range smaller than this has no room for a gateway and a pod.
const LONGEST_PREFIX: u8 = 29;
/// A range larger than this is not private (RFC 1918).
const SHORTEST_PREFIX: u8 = 8;

pub(super) fn tenant(object: &Value, found: &mut Found) {
    let spec = &object["spec"];
    let path = Path::root("spec");
    if text(spec, "displayName").len() > 253 {
        found.too_long(&path.field("displayName"), 253);
    }
    for (member, at) in items(&spec["members"], &path.field("members")) {
        found.one_of(
            &at.field("kind"),
            &member["kind"],
            &["User", "Group", "ServiceAccount"],
        );
        if text(member, "name").is_empty() {
            found.required(&at.field("name"), "");
        }
        found.one_of(
            &at.field("role"),
            &member["role"],
            &["admin", "edit", "view"],
        );
    }
    let mut seen: Vec<&Value> = Vec::new();
    for (kernel, at) in items(&spec["kernels"], &path.field("kernels")) {
        if let Err(error) = kernel.as_str().unwrap_or_default().parse::<KernelName>() {
            found.invalid(&at, kernel, error.to_string());
        }
        if seen.contains(&kernel) {
            found.duplicate(&at, kernel);
        }
        seen.push(kernel);
    }
    let network = &spec["network"]["default"];
    if !network["cidr"].is_null() {
        private_range(&network["cidr"], &path.field("network.default.cidr"), found);
    }
}

pub(super) fn tenant_update(new: &Value, old: &Value, found: &mut Found) {
    let cidr = |object: &Value| object["spec"]["network"]["default"]["cidr"].clone();
    let was = cidr(old);
    if !was.is_null() {
        found.immutable(&Path::root("spec.network.default.cidr"), &cidr(new), &was);
    }
}

pub(super) fn network(object: &Value, found: &mut Found) {
    let spec = &object["spec"];
    let path = Path::root("spec");
    let subnets = path.field("subnets");
    if spec["subnets"].as_array().is_none_or(Vec::is_empty) {
        found.required(&subnets, "a network needs a subnet");
    }
    let mut ranges: Vec<Ipv4Net> = Vec::new();
    for (subnet, at) in items(&spec["subnets"], &subnets) {
        let Some(range) = private_range(&subnet["cidr"], &at.field("cidr"), found) else {
            continue;
        };
        if ranges
            .iter()
            .any(|other| other.contains(&range) || range.contains(other))
        {
            found.invalid(
                &at.field("cidr"),
                &subnet["cidr"],
                "must not overlap with another subnet",
            );
        }
        ranges.push(range);
        let gateway = &subnet["gateway"];
        if !gateway.is_null() {
            let inside = gateway
                .as_str()
                .unwrap_or_default()
                .parse::<Ipv4Addr>()
                .is_ok_and(|a| {
                    range.contains(&a) && a != range.network() && a != range.broadcast()
                });
            if !inside {
                let detail = format!("must be a host address inside {range}");
                found.invalid(&at.field("gateway"), gateway, detail);
            }
        }
        for (server, at) in items(&subnet["dns"], &at.field("dns")) {
            if server
                .as_str()
                .unwrap_or_default()
                .parse::<Ipv4Addr>()
                .is_err()
            {
                found.invalid(&at, server, "must be a valid IPv4 address");
            }
        }
    }
    if let Some(mtu) = spec["mtu"].as_i64()
        && !(576..=65535).contains(&mtu)
    {
        found.invalid(
            &path.field("mtu"),
            &spec["mtu"],
            "must be between 576 and 65535, inclusive",
        );
    }
}

pub(super) fn network_update(new: &Value, old: &Value, found: &mut Found) {
    let path = Path::root("spec.subnets");
    found.immutable(&path, &new["spec"]["subnets"], &old["spec"]["subnets"]);
}

fn private_range(value: &Value, path: &Path, found: &mut Found) -> Option<Ipv4Net> {
    let text = value.as_str().unwrap_or_default();
    if text.is_empty() {
        found.required(path, "");
        return None;
    }
    let Ok(range) = text.parse::<Ipv4Net>() else {
        found.invalid(
            path,
            value,
            "must be a valid IPv4 CIDR address, e.g. 10.244.0.0/16",
        );
        return None;
    };
    if range != range.trunc() {
        found.invalid(
            path,
            value,
            format!("must be the network address, {}", range.trunc()),
        );
        return None;
    }
    if !(SHORTEST_PREFIX..=LONGEST_PREFIX).contains(&range.prefix_len()) {
        found.invalid(
            path,
            value,
            "prefix length must be between 8 and 29, inclusive",
        );
        return None;
    }
    if !(range.network().is_private() && range.broadcast().is_private()) {
        found.invalid(
            path,
            value,
            "must be inside a private range: 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
        );
        return None;
    }
    Some(range)
}
