//! Ports of the node that services have: a port is one service's, of whatever network and
//! protocol, as upstream.
//!
//! Kept as the addresses of services are ([`crate::services`]): a key beside the objects, written
//! with the service.

use std::collections::BTreeSet;

use hypernetes_apimachinery::{
    Status, kinds, meta,
    validation::{ErrorKind, FieldError},
};
use hypernetes_store::{Compare, Op, Value as Stored};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    engine::Engine,
    services::{Allocation, holder},
    status::Result,
};

/// Beginning of the keys of ports.
const PORTS: &str = "service-node-ports/";

fn key(port: u16) -> String {
    format!("{PORTS}{port}")
}

fn has_node_ports(service: &Value) -> bool {
    service["spec"]["type"] == "NodePort"
}

fn number(port: &Value) -> u16 {
    let number = port["nodePort"].as_u64().unwrap_or_default();
    u16::try_from(number).unwrap_or_default()
}

fn ports(service: &Value) -> impl Iterator<Item = &Value> {
    service["spec"]["ports"].as_array().into_iter().flatten()
}

/// The ports that a service has, or asks for.
fn held(service: &Value) -> BTreeSet<u16> {
    ports(service)
        .filter(|_port| has_node_ports(service))
        .map(number)
        .filter(|number| *number != 0)
        .collect()
}

/// Takes over from the old service what its author need not know, and drops what no longer fits
/// the type.
pub(crate) fn prepare_update(new: &mut Value, old: &Value) {
    let (was, is) = (has_node_ports(old), has_node_ports(new));
    let known = held(old);
    let mut asked = held(new);
    let list = new
        .get_mut("spec")
        .and_then(|spec| spec.get_mut("ports")?.as_array_mut());
    for port in list.into_iter().flatten().filter_map(Value::as_object_mut) {
        let own = port.get("nodePort").and_then(Value::as_u64).unwrap_or(0);
        if was && !is && known.iter().any(|known| u64::from(*known) == own) {
            port.remove("nodePort");
        } else if was && is && own == 0 {
            let protocol = |port: &Value| match port["protocol"].as_str() {
                None | Some("") => "TCP".to_owned(),
                Some(other) => other.to_owned(),
            };
            let this = Value::Object(port.clone());
            let same = |other: &&Value| {
                other["port"] == this["port"] && protocol(other) == protocol(&this)
            };
            if let Some(number) = ports(old).find(same).map(number)
                && number != 0
                && asked.insert(number)
            {
                port.insert("nodePort".into(), number.into());
            }
        }
    }
}

impl Engine {
    /// Gives each port of a service of type `NodePort` its port of the node, or the one that it
    /// asks for; gives back what `old` had.
    pub(crate) fn allocate_node_ports(
        &self,
        object: &mut Value,
        old: Option<&Value>,
        allocation: &mut Allocation,
    ) -> Result<()> {
        let before = old.map(held).unwrap_or_default();
        let mut taken = held(object);
        let count = if has_node_ports(object) {
            ports(object).count()
        } else {
            0
        };
        for index in 0..count {
            let port = &object["spec"]["ports"][index];
            let asked = number(port);
            if asked != 0 {
                if !before.contains(&asked) {
                    self.check_node_port(object, index, asked)?;
                }
                continue;
            }
            // One number for both protocols of a port, where they do not ask otherwise.
            let twin = ports(object)
                .find(|other| {
                    other["port"] == port["port"]
                        && other["protocol"] != port["protocol"]
                        && number(other) != 0
                })
                .map(number);
            let chosen = match twin {
                Some(number) => number,
                None => self.any_node_port(object, &taken)?,
            };
            taken.insert(chosen);
            object["spec"]["ports"][index]["nodePort"] = chosen.into();
        }
        for port in taken.difference(&before) {
            let key = key(*port);
            allocation.compares.push(match self.store.get(&key) {
                Some(entry) => Compare::ModRevision(key.clone(), entry.mod_revision),
                None => Compare::Absent(key.clone()),
            });
            (allocation.ops).push(Op::Put(key, Stored::Bytes(holder(object))));
        }
        if let Some(old) = old {
            let gone = before.difference(&taken).copied();
            allocation.ops.extend(self.free_node_ports(old, gone));
        }
        Ok(())
    }

    /// Gives back the service's ports of the node.
    pub(crate) fn release_node_ports(&self, service: &Value) -> Vec<Op> {
        self.free_node_ports(service, held(service).into_iter())
    }

    fn free_node_ports(&self, service: &Value, ports: impl Iterator<Item = u16>) -> Vec<Op> {
        let holder = holder(service);
        ports
            .map(key)
            .filter(|key| {
                let entry = self.store.get(key);
                entry.is_some_and(|entry| entry.value == holder)
            })
            .map(Op::Delete)
            .collect()
    }

    fn check_node_port(&self, service: &Value, index: usize, port: u16) -> Result<()> {
        let range = &self.node_ports;
        let problem = if !range.contains(&port) {
            format!(
                "provided port is not in the valid range. The range of valid ports is {}-{}",
                range.start(),
                range.end()
            )
        } else if !self.is_node_port_free(service, port) {
            "provided port is already allocated".to_owned()
        } else {
            return Ok(());
        };
        let error = FieldError {
            kind: ErrorKind::Invalid,
            field: format!("spec.ports[{index}].nodePort"),
            value: port.into(),
            detail: problem,
        };
        let name = meta::name(service).unwrap_or_default();
        Err(Status::invalid("", "Service", name, &[error]))
    }

    /// Any free port; where the search begins depends on the service.
    fn any_node_port(&self, service: &Value, taken: &BTreeSet<u16>) -> Result<u16> {
        let (first, last) = (*self.node_ports.start(), *self.node_ports.end());
        let digest = Sha256::digest(meta::uid(service).unwrap_or_default());
        let count = u32::from(last - first) + 1;
        let start = u32::from(u16::from_be_bytes([digest[0], digest[1]])) % count;
        (0..count)
            .filter_map(|step| u16::try_from(u32::from(first) + (start + step) % count).ok())
            .find(|port| !taken.contains(port) && self.is_node_port_free(service, *port))
            .ok_or_else(|| Status::internal("failed to allocate a nodePort: range is full"))
    }

    fn is_node_port_free(&self, service: &Value, port: u16) -> bool {
        let Some(entry) = self.store.get(&key(port)) else {
            return true;
        };
        let holder: Value = serde_json::from_slice(&entry.value).unwrap_or_default();
        if meta::uid(&holder) == meta::uid(service) {
            return true;
        }
        let (namespace, name) = (
            meta::namespace(&holder).unwrap_or_default(),
            meta::name(&holder).unwrap_or_default(),
        );
        let Some(kind) = kinds::by_resource("", "v1", "services") else {
            return true;
        };
        let Ok((_entry, found)) = self.find(kind, namespace, name) else {
            return true;
        };
        meta::uid(&found) != meta::uid(&holder) || !held(&found).contains(&port)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_update_need_not_know_the_ports() {
        let old = json!({"spec": {"type": "NodePort", "ports": [
            {"port": 80, "protocol": "TCP", "nodePort": 30080},
            {"port": 53, "protocol": "UDP", "nodePort": 30053}]}});
        let mut new = json!({"spec": {"type": "NodePort", "ports": [
            {"port": 53, "protocol": "UDP"},
            {"port": 81, "protocol": "TCP"}]}});
        prepare_update(&mut new, &old);
        assert_eq!(new["spec"]["ports"][0]["nodePort"], 30053);
        assert!(new["spec"]["ports"][1]["nodePort"].is_null());
        // They go with the type that has them.
        let mut new = old.clone();
        new["spec"]["type"] = "ClusterIP".into();
        prepare_update(&mut new, &old);
        assert!(held(&new).is_empty() && new["spec"]["ports"][0]["nodePort"].is_null());
        // One that was given to another port of the service is not given twice.
        let mut new = old.clone();
        new["spec"]["ports"][0]["nodePort"] = 30053.into();
        new["spec"]["ports"][1]["nodePort"] = Value::Null;
        prepare_update(&mut new, &old);
        assert!(new["spec"]["ports"][1]["nodePort"].is_null());
    }
}
