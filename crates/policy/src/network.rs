//! Network objects: what their fields may be, and that they do not change under their pods.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::{AdmissionRequest, FieldError, meta};

/// The smallest network has the router and room for a pod.
const MAX_PREFIX_V4: u8 = 29;
const MIN_PREFIX_V4: u8 = 8;

pub(crate) fn check(request: &AdmissionRequest<'_>, object: &Value, causes: &mut Vec<FieldError>) {
    let name = object
        .get("metadata")
        .and_then(|m| m.get("name"))
        .and_then(Value::as_str);
    if let Some(name) = name
        && meta::foreign_network(name).is_some()
    {
        causes.push(FieldError::new(
            "metadata.name",
            "must be an RFC 1123 label",
        ));
    }
    let namespace = request.namespace.unwrap_or_default();
    if let Some(name) = name
        && namespace.len() + 1 + name.len() > 64
    {
        causes.push(FieldError::new(
            "metadata.name",
            "is too long: namespace and name together may have 63 characters",
        ));
    }
    let subnets = &object["spec"]["subnets"];
    match subnets.as_array() {
        Some(list) if list.len() == 1 => subnet(&list[0], causes),
        Some(list) if list.len() > 1 => causes.push(FieldError::new(
            "spec.subnets[1]",
            "is not supported: a network has one IPv4 subnet",
        )),
        _ => causes.push(FieldError::new(
            "spec.subnets",
            "must hold one subnet with its cidr",
        )),
    }
    if let Some(mtu) = object["spec"].get("mtu")
        && !mtu.as_u64().is_some_and(|mtu| (576..=9000).contains(&mtu))
    {
        causes.push(FieldError::new(
            "spec.mtu",
            "must be a number from 576 to 9000",
        ));
    }
    let known = ["subnets", "mtu", "external"];
    for key in object["spec"]
        .as_object()
        .into_iter()
        .flat_map(|spec| spec.keys())
    {
        if !known.contains(&key.as_str()) {
            causes.push(FieldError::new(format!("spec.{key}"), "is not supported"));
        }
    }
    let external = &object["spec"]["external"];
    for key in external
        .as_object()
        .into_iter()
        .flat_map(|external| external.keys())
    {
        if key != "snat" {
            causes.push(FieldError::new(
                format!("spec.external.{key}"),
                "is not supported",
            ));
        }
    }
    if let Some(snat) = external.get("snat")
        && !snat.is_boolean()
    {
        causes.push(FieldError::new(
            "spec.external.snat",
            "must be true or false",
        ));
    }
    if let Some(old) = request.old_object
        && old["spec"]["subnets"] != *subnets
    {
        causes.push(FieldError::new("spec.subnets", "field is immutable"));
    }
}

fn subnet(subnet: &Value, causes: &mut Vec<FieldError>) {
    for key in subnet
        .as_object()
        .into_iter()
        .flat_map(|subnet| subnet.keys())
    {
        if key != "cidr" && key != "gateway" {
            causes.push(FieldError::new(
                format!("spec.subnets[0].{key}"),
                "is not supported",
            ));
        }
    }
    let Some(cidr) = check_cidr(&subnet["cidr"], "spec.subnets[0].cidr", causes) else {
        return;
    };
    if let Some(gateway) = subnet.get("gateway") {
        let inside = gateway
            .as_str()
            .and_then(|text| text.parse::<IpAddr>().ok())
            .is_some_and(|address| {
                cidr.contains(&address) && address != cidr.network() && address != cidr.broadcast()
            });
        if !inside {
            causes.push(FieldError::new(
                "spec.subnets[0].gateway",
                format!("must be a host address inside {cidr}"),
            ));
        }
    }
}

/// An IPv4 range that pods can have addresses of; pushes what is wrong otherwise.
pub(crate) fn check_cidr(
    value: &Value,
    field: &str,
    causes: &mut Vec<FieldError>,
) -> Option<IpNet> {
    let Some(cidr) = value.as_str().and_then(|text| text.parse::<IpNet>().ok()) else {
        causes.push(FieldError::new(
            field,
            "must be a CIDR such as 10.244.0.0/16",
        ));
        return None;
    };
    let IpNet::V4(v4) = cidr else {
        causes.push(FieldError::new(field, "must be IPv4"));
        return None;
    };
    if v4.trunc() != v4 {
        causes.push(FieldError::new(
            field,
            format!("has host bits set; {} has not", v4.trunc()),
        ));
    } else if !(MIN_PREFIX_V4..=MAX_PREFIX_V4).contains(&v4.prefix_len()) {
        causes.push(FieldError::new(
            field,
            "must have a prefix length from 8 to 29",
        ));
    } else if v4.addr().is_loopback()
        || v4.addr().is_link_local()
        || v4.addr().is_multicast()
        || v4.addr().octets()[0] == 0
        || v4.addr().octets()[0] >= 240
    {
        causes.push(FieldError::new(
            field,
            "must not be a loopback, link-local or reserved range",
        ));
    } else {
        return Some(cidr);
    }
    None
}
