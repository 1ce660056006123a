//! Tenant objects.

use hypernetes_types::Quantity;
use serde_json::Value;

use crate::{FieldError, network};

/// Namespaces that exist before any tenant.
const TAKEN: [&str; 2] = ["default", "hypernetes-system"];

pub(crate) fn check(object: &Value, causes: &mut Vec<FieldError>) {
    if let Some(name) = object["metadata"]["name"].as_str() {
        if let Err(error) = name.parse::<hypernetes_types::TenantName>() {
            causes.push(FieldError::new("metadata.name", error.to_string()));
        }
        if TAKEN.contains(&name) || name.starts_with("kube-") || name == "kube" {
            causes.push(FieldError::new(
                "metadata.name",
                "is a name that the system keeps",
            ));
        }
    }
    let spec = &object["spec"];
    if !spec.is_null() && !spec.is_object() {
        causes.push(FieldError::new("spec", "must be an object"));
    }
    for key in spec.as_object().into_iter().flat_map(|spec| spec.keys()) {
        if !["displayName", "network", "kernels", "nodePorts", "storage"].contains(&key.as_str()) {
            causes.push(FieldError::new(format!("spec.{key}"), "is not supported"));
        }
    }
    if let Some(name) = spec.get("displayName")
        && name.as_str().is_none_or(|text| text.len() > 256)
    {
        causes.push(FieldError::new(
            "spec.displayName",
            "must be text of at most 256 bytes",
        ));
    }
    if let Some(cidr) = spec["network"]["default"].get("cidr") {
        network::check_cidr(cidr, "spec.network.default.cidr", causes);
    }
    if let Some(count) = spec.get("nodePorts")
        && count.as_u64().is_none_or(|count| count > 65_535)
    {
        causes.push(FieldError::new(
            "spec.nodePorts",
            "must be a number from 0 to 65535",
        ));
    }
    if let Some(storage) = spec.get("storage") {
        let text = storage.as_str().unwrap_or_default();
        let amount = text.parse::<Quantity>().ok();
        if text != "unlimited" && amount.is_none_or(|amount| amount < Quantity::default()) {
            causes.push(FieldError::new(
                "spec.storage",
                "must be a quantity such as 10Gi, or unlimited",
            ));
        }
    }
    if let Some(kernels) = spec.get("kernels") {
        let valid = kernels.as_array().is_some_and(|list| {
            list.len() <= 64
                && list.iter().all(|kernel| {
                    kernel
                        .as_str()
                        .is_some_and(|name| name.parse::<hypernetes_types::KernelName>().is_ok())
                })
        });
        if !valid {
            causes.push(FieldError::new(
                "spec.kernels",
                "must be a list of at most 64 kernel names",
            ));
        }
    }
}
