//! Rules of ReplicationControllers and Endpoints.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::{meta::rules, selector::LabelSelector};

use super::{Found, Path, items, meta, text, workloads::template};

const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];

pub(super) fn replication_controller(object: &Value, found: &mut Found) {
    let (spec, path) = (&object["spec"], Path::root("spec"));
    found.not_negative(&path.field("replicas"), &spec["replicas"]);
    found.not_negative(&path.field("minReadySeconds"), &spec["minReadySeconds"]);
    let at = path.field("selector");
    let selector = &spec["selector"];
    if selector.as_object().is_none_or(serde_json::Map::is_empty) {
        found.required(&at, "");
    } else {
        meta::labels(selector, &at, found);
        let labels = &spec["template"]["metadata"]["labels"];
        let fits = LabelSelector::from_json(&json!({"matchLabels": selector}))
            .is_ok_and(|selector| selector.matches_labels(labels.as_object()));
        if spec["template"].is_object() && !fits {
            found.invalid(
                &path.field("template.metadata.labels"),
                labels,
                "`selector` does not match template `labels`",
            );
        }
    }
    if spec["template"].is_object() {
        template(spec, &path, &["Always"], found);
    } else {
        found.required(&path.field("template"), "");
    }
}

pub(super) fn endpoints(object: &Value, found: &mut Found) {
    for (subset, at) in items(&object["subsets"], &Path::root("subsets")) {
        let mut any = false;
        for field in ["addresses", "notReadyAddresses"] {
            for (address, one) in items(&subset[field], &at.field(field)) {
                any = true;
                if text(address, "ip").parse::<IpAddr>().is_err() {
                    found.invalid(
                        &one.field("ip"),
                        &address["ip"],
                        "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
                    );
                }
                let name = text(address, "hostname");
                if !name.is_empty() {
                    found.all_invalid(&one.field("hostname"), name, rules::label(name));
                }
            }
        }
        if !any {
            found.required(&at, "must specify `addresses` or `notReadyAddresses`");
        }
        let several = subset["ports"]
            .as_array()
            .is_some_and(|ports| ports.len() > 1);
        for (port, one) in items(&subset["ports"], &at.field("ports")) {
            let name = text(port, "name");
            if name.is_empty() && several {
                found.required(&one.field("name"), "");
            } else if !name.is_empty() {
                found.all_invalid(&one.field("name"), name, rules::label(name));
            }
            for problem in rules::port_number(port["port"].as_i64().unwrap_or_default()) {
                found.invalid(&one.field("port"), &port["port"], problem);
            }
            found.one_of(&one.field("protocol"), &port["protocol"], &PROTOCOLS);
        }
    }
}
