//! Addresses of services: each network has the whole range, in a network each address is one
//! service's.
//!
//! An address is a key of the store beside the objects. It is taken and given back in the
//! transaction that writes or deletes the service, so that both agree after a crash. A key whose
//! service is gone, or has another address, is free: nothing has to be swept.

use std::net::Ipv4Addr;

use hypernetes_apimachinery::{
    ResourceKind, Status, kinds, meta,
    validation::{ErrorKind, FieldError},
};
use hypernetes_store::{Compare, Op};
use hypernetes_types::kinds::{GROUP, NETWORK_LABEL, TENANT_LABEL, VERSION};
use ipnet::Ipv4Net;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::{codec, engine::Engine, keys, node_ports, status::Result};

/// Beginning of the keys of addresses.
const ADDRESSES: &str = "service-addresses/";
/// Namespace and name of the API server's own service.
const API: (&str, &str) = ("default", "kubernetes");

/// What else a write of a service does.
#[derive(Debug, Default)]
pub(crate) struct Allocation {
    /// What must hold.
    pub(crate) compares: Vec<Compare>,
    /// What is written.
    pub(crate) ops: Vec<Op>,
}

/// The address of the API server's service.
pub(crate) fn api_address(range: Ipv4Net) -> Ipv4Addr {
    range.hosts().next().unwrap_or_else(|| range.addr())
}

pub(crate) fn is_service(kind: &ResourceKind) -> bool {
    kind.group.is_empty() && kind.kind == "Service"
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The address that the service has, or shall have.
fn address_of(service: &Value) -> Option<&str> {
    let spec = &service["spec"];
    let address = text(spec, "clusterIP");
    (text(spec, "type") != "ExternalName" && !matches!(address, "" | "None")).then_some(address)
}

fn needs_address(service: &Value) -> bool {
    let spec = &service["spec"];
    text(spec, "type") != "ExternalName" && text(spec, "clusterIP") != "None"
}

/// Takes over from the old service what its author need not know, and drops what no longer fits
/// the type.
pub(crate) fn prepare_update(new: &mut Value, old: &Value) {
    node_ports::prepare_update(new, old);
    let (was, Some(is)) = (
        &old["spec"],
        new.get_mut("spec").and_then(Value::as_object_mut),
    ) else {
        return;
    };
    let kind = |spec: &Value| match text(spec, "type") {
        "" => "ClusterIP".to_owned(),
        other => other.to_owned(),
    };
    let absent = |spec: &Map<String, Value>, field: &str| match spec.get(field) {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    };
    let (from, to) = (kind(was), kind(&Value::Object(is.clone())));
    if from != "ExternalName" && to != "ExternalName" {
        if absent(is, "clusterIP") && absent(is, "clusterIPs") {
            for field in ["clusterIP", "clusterIPs"] {
                if let Some(value) = was.get(field) {
                    is.insert(field.into(), value.clone());
                }
            }
        }
        for field in ["ipFamilies", "ipFamilyPolicy"] {
            if absent(is, field)
                && let Some(value) = was.get(field)
            {
                is.insert(field.into(), value.clone());
            }
        }
    }
    if from == to {
        return;
    }
    let mut drop_unchanged = |fields: &[&str]| {
        for field in fields {
            if is.get(*field) == was.get(*field) {
                is.remove(*field);
            }
        }
    };
    if to == "ExternalName" {
        drop_unchanged(&[
            "clusterIP",
            "clusterIPs",
            "ipFamilies",
            "ipFamilyPolicy",
            "internalTrafficPolicy",
        ]);
    }
    if !matches!(to.as_str(), "NodePort" | "LoadBalancer") {
        drop_unchanged(&["externalTrafficPolicy"]);
    }
    if to != "LoadBalancer" {
        drop_unchanged(&[
            "allocateLoadBalancerNodePorts",
            "loadBalancerClass",
            "loadBalancerSourceRanges",
        ]);
    }
    if from == "ExternalName" {
        drop_unchanged(&["externalName"]);
    }
}

impl Engine {
    /// Gives the service an address, if it is to have one and has none, or takes the one that it
    /// asks for; gives back what `old` had. Other kinds have none.
    pub(crate) fn allocate(
        &self,
        kind: &ResourceKind,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<Allocation> {
        if !is_service(kind) {
            return Ok(Allocation::default());
        }
        let namespace = meta::namespace(object).unwrap_or_default().to_owned();
        let network = self.network_of(&namespace);
        let before = old.and_then(address_of).map(str::to_owned);
        let mut allocation = Allocation::default();
        self.allocate_node_ports(object, old, &mut allocation)?;
        if needs_address(object) {
            families(object);
            let asked = address_of(object).map(str::to_owned);
            if asked.is_none() || asked != before {
                let address = match asked {
                    Some(address) => self.asked(&network, object, &address)?,
                    None => self.any(&network, object)?,
                };
                object["spec"]["clusterIP"] = address.to_string().into();
                object["spec"]["clusterIPs"] = json!([address.to_string()]);
                let key = key(&network, address);
                allocation.compares.push(match self.store.get(&key) {
                    Some(entry) => Compare::ModRevision(key.clone(), entry.mod_revision),
                    None => Compare::Absent(key.clone()),
                });
                let value = hypernetes_store::Value::Bytes(holder(object));
                allocation.ops.push(Op::Put(key, value));
            }
        } else if text(&object["spec"], "type") != "ExternalName" {
            families(object);
        }
        if before.is_some()
            && before.as_deref() != address_of(object)
            && let Some(old) = old
        {
            allocation.ops.extend(self.release_address(old));
        }
        Ok(allocation)
    }

    /// Gives back the service's address and ports. Other kinds have none.
    pub(crate) fn release(&self, kind: &ResourceKind, object: &Value) -> Vec<Op> {
        if !is_service(kind) {
            return Vec::new();
        }
        let mut ops = self.release_node_ports(object);
        ops.extend(self.release_address(object));
        ops
    }

    fn release_address(&self, object: &Value) -> Option<Op> {
        let address = address_of(object)?.parse().ok()?;
        let network = self.network_of(meta::namespace(object).unwrap_or_default());
        let key = key(&network, address);
        let entry = self.store.get(&key)?;
        (entry.value == holder(object)).then_some(Op::Delete(key))
    }

    /// The network of a namespace's services: that of its pods that do not choose another.
    fn network_of(&self, namespace: &str) -> String {
        let object = self
            .store
            .get(&keys::namespace(namespace))
            .map(|entry| codec::decode(&entry.value))
            .unwrap_or_default();
        if let Some(name) = meta::label(&object, NETWORK_LABEL) {
            return format!("{namespace}.{name}");
        }
        let own = meta::label(&object, TENANT_LABEL).is_some()
            || kinds::by_kind(GROUP, VERSION, "Network").is_some_and(|kind| {
                let key = keys::object(kind, namespace, "default");
                self.store.get(&key).is_some()
            });
        match own {
            true => format!("{namespace}.default"),
            false => "default".to_owned(),
        }
    }

    fn asked(&self, network: &str, service: &Value, text: &str) -> Result<Ipv4Addr> {
        let refuse = |why: String| {
            let error = FieldError {
                kind: ErrorKind::Invalid,
                field: "spec.clusterIPs".into(),
                value: service["spec"]["clusterIPs"].clone(),
                detail: format!("failed to allocate IP {text}: {why}"),
            };
            let name = meta::name(service).unwrap_or_default();
            Status::invalid("", "Service", name, &[error])
        };
        let range = self.service_range;
        let address = text.parse::<Ipv4Addr>().ok().filter(|address| {
            range.contains(address) && *address != range.network() && *address != range.broadcast()
        });
        let Some(address) = address else {
            return Err(refuse(format!(
                "the provided IP ({text}) is not in the valid range. The range of valid IPs is \
                 {range}"
            )));
        };
        if self.is_free(network, service, address) {
            Ok(address)
        } else {
            Err(refuse("provided IP is already allocated".to_owned()))
        }
    }

    /// Any free address. Where the search begins depends on the service, so that one that was
    /// freed is not given to the next.
    fn any(&self, network: &str, service: &Value) -> Result<Ipv4Addr> {
        let range = self.service_range;
        let first = u32::from(range.network()) + 2;
        let count = u32::from(range.broadcast()).saturating_sub(first);
        let digest = Sha256::digest(meta::uid(service).unwrap_or_default());
        let start = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
        (0..count)
            .map(|step| (start % count.max(1) + step) % count)
            .map(|offset| Ipv4Addr::from(first + offset))
            .find(|address| self.is_free(network, service, *address))
            .ok_or_else(|| Status::internal("failed to allocate a serviceIP: range is full"))
    }

    fn is_free(&self, network: &str, service: &Value, address: Ipv4Addr) -> bool {
        let id = |service: &Value| {
            let text = |part: Option<&str>| part.unwrap_or_default().to_owned();
            (text(meta::namespace(service)), text(meta::name(service)))
        };
        // The same in all networks.
        if address == api_address(self.service_range) {
            return id(service) == (API.0.to_owned(), API.1.to_owned());
        }
        let Some(entry) = self.store.get(&key(network, address)) else {
            return true;
        };
        let holder: Value = serde_json::from_slice(&entry.value).unwrap_or_default();
        let (namespace, name) = id(&holder);
        let Some(kind) = kinds::by_resource("", "v1", "services") else {
            return true;
        };
        let Ok((_entry, found)) = self.find(kind, &namespace, &name) else {
            return true;
        };
        meta::uid(&found) != meta::uid(&holder)
            || address_of(&found) != Some(address.to_string().as_str())
    }

    /// Refuses networks whose pods would have addresses of services.
    pub(crate) fn check_range(&self, kind: &ResourceKind, object: &Value) -> Result<()> {
        let (field, cidr) = match (kind.group, kind.kind) {
            (GROUP, "Network") => (
                "spec.subnets[0].cidr",
                &object["spec"]["subnets"][0]["cidr"],
            ),
            (GROUP, "Tenant") => (
                "spec.network.default.cidr",
                &object["spec"]["network"]["default"]["cidr"],
            ),
            _ => return Ok(()),
        };
        let range = self.service_range;
        let overlaps = cidr
            .as_str()
            .and_then(|text| text.parse::<Ipv4Net>().ok())
            .is_some_and(|net| net.contains(&range) || range.contains(&net));
        if !overlaps {
            return Ok(());
        }
        let error = FieldError {
            kind: ErrorKind::Invalid,
            field: field.into(),
            value: cidr.clone(),
            detail: format!("must not overlap {range}, the addresses of services"),
        };
        let name = meta::name(object).unwrap_or_default();
        Err(Status::invalid(kind.group, kind.kind, name, &[error]))
    }
}

/// What a service that is not `ExternalName` says of its families: this cluster has one.
fn families(service: &mut Value) {
    let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    if spec
        .get("ipFamilies")
        .and_then(Value::as_array)
        .is_none_or(Vec::is_empty)
    {
        spec.insert("ipFamilies".into(), json!(["IPv4"]));
    }
    if spec
        .get("ipFamilyPolicy")
        .and_then(Value::as_str)
        .is_none_or(str::is_empty)
    {
        spec.insert("ipFamilyPolicy".into(), "SingleStack".into());
    }
}

fn key(network: &str, address: Ipv4Addr) -> String {
    format!("{ADDRESSES}{network}/{address}")
}

/// Who has an address, as its key's value.
pub(crate) fn holder(service: &Value) -> bytes::Bytes {
    let holder = json!({"metadata": {
        "namespace": meta::namespace(service),
        "name": meta::name(service),
        "uid": meta::uid(service),
    }});
    holder.to_string().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_need_not_know_the_address() {
        let old = json!({"spec": {"type": "ClusterIP", "clusterIP": "10.96.0.5",
            "clusterIPs": ["10.96.0.5"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}});
        let mut new = json!({"spec": {"ports": []}});
        prepare_update(&mut new, &old);
        assert_eq!(new["spec"]["clusterIP"], "10.96.0.5");
        assert_eq!(new["spec"]["ipFamilies"], json!(["IPv4"]));
        // It goes with the type that has it.
        let mut new = old.clone();
        new["spec"]["type"] = "ExternalName".into();
        prepare_update(&mut new, &old);
        assert_eq!(new["spec"], json!({"type": "ExternalName"}));
    }

    #[test]
    fn the_first_address_is_the_api_servers() {
        assert_eq!(
            api_address("10.96.0.0/16".parse().unwrap()),
            Ipv4Addr::new(10, 96, 0, 1)
        );
    }
}
