//! Columns of Endpoints, requests for certificates, API services and scales.

use serde_json::{Value, json};

use super::{
    Column, age,
    age::human_duration,
    columns::{AGE, NAME, column, string},
    or, text,
};
use crate::kinds::ResourceKind;

/// Addresses beyond these are counted only.
const SHOWN: usize = 3;

/// The columns of a kind, if it is one of these.
pub(super) fn of(kind: &ResourceKind) -> Option<&'static [Column]> {
    let columns: &'static [Column] = match (kind.group, kind.kind) {
        ("", "Endpoints") => ENDPOINTS,
        ("certificates.k8s.io", "CertificateSigningRequest") => SIGNING_REQUESTS,
        ("apiregistration.k8s.io", "APIService") => API_SERVICES,
        _ => return None,
    };
    Some(columns)
}

fn list<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value[field].as_array().into_iter().flatten()
}

fn endpoints(object: &Value) -> String {
    let mut all: Vec<String> = Vec::new();
    for subset in list(object, "subsets") {
        let addresses = list(subset, "addresses").map(|address| text(address, &["ip"]));
        let ports: Vec<i64> = list(subset, "ports")
            .filter_map(|port| port["port"].as_i64())
            .collect();
        if ports.is_empty() {
            all.extend(addresses.map(str::to_owned));
            continue;
        }
        for address in addresses {
            all.extend(ports.iter().map(|port| format!("{address}:{port}")));
        }
    }
    if all.is_empty() {
        return "<none>".to_owned();
    }
    let more = all.len().saturating_sub(SHOWN);
    all.truncate(SHOWN);
    let shown = all.join(",");
    if more == 0 {
        shown
    } else {
        format!("{shown} + {more} more...")
    }
}

static ENDPOINTS: &[Column] = &[
    NAME,
    string("Endpoints", |object, _| endpoints(object).into()),
    AGE,
];

fn decision(request: &Value) -> String {
    let mut words = Vec::new();
    for condition in list(&request["status"], "conditions") {
        match text(condition, &["type"]) {
            "" => {}
            kind => words.push(kind),
        }
    }
    // What was decided goes before what came of it.
    words.sort_by_key(|word| !matches!(*word, "Approved" | "Denied"));
    if words.is_empty() {
        words.push("Pending");
    }
    if !text(request, &["status", "certificate"]).is_empty() {
        words.push("Issued");
    }
    words.join(",")
}

static SIGNING_REQUESTS: &[Column] = &[
    NAME,
    AGE,
    string("SignerName", |object, _| {
        or(text(object, &["spec", "signerName"]), "<none>").into()
    }),
    string("Requestor", |object, _| {
        text(object, &["spec", "username"]).into()
    }),
    string(
        "RequestedDuration",
        |object, _| match object["spec"]["expirationSeconds"].as_i64() {
            Some(seconds) => human_duration(seconds).into(),
            None => "<none>".into(),
        },
    ),
    string("Condition", |object, _| decision(object).into()),
];

static API_SERVICES: &[Column] = &[
    NAME,
    string("Service", |_, _| "Local".into()),
    string("Available", |_, _| "True".into()),
    AGE,
];

/// The table of a scale, which is no kind of its own.
pub fn scale_table(scale: &Value, metadata: &Value, now: jiff::Timestamp) -> Value {
    let number = |field: &str| scale[field]["replicas"].as_i64().unwrap_or_default();
    let columns = [
        NAME,
        column("Desired", "integer", 0, |_, _| Value::Null),
        column("Available", "integer", 0, |_, _| Value::Null),
        AGE,
    ];
    let definitions: Vec<Value> = columns.iter().map(Column::definition).collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": definitions,
        "rows": [{
            "cells": [scale["metadata"]["name"], number("spec"), number("status"), age(scale, now)],
            "object": super::partial_object_metadata(scale),
        }],
    })
}
