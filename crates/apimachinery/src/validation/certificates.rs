//! Rules of requests for certificates.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use super::{ErrorKind, Found, Path, items, text};

/// The shortest life that may be asked for.
const SHORTEST: i64 = 600;
const USAGES: [&str; 23] = [
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];

pub(super) fn request(object: &Value, found: &mut Found) {
    let (spec, path) = (&object["spec"], Path::root("spec"));
    pem(spec, &path, found);
    if spec["usages"].as_array().is_none_or(Vec::is_empty) {
        found.required(&path.field("usages"), "");
    }
    let mut seen: Vec<&Value> = Vec::new();
    for (usage, at) in items(&spec["usages"], &path.field("usages")) {
        if !USAGES.contains(&usage.as_str().unwrap_or_default()) {
            found.not_supported(&at, usage, &USAGES);
        } else if seen.contains(&usage) {
            found.duplicate(&at, usage);
        }
        seen.push(usage);
    }
    signer(spec, &path, found);
    if spec["expirationSeconds"]
        .as_i64()
        .is_some_and(|seconds| seconds < SHORTEST)
    {
        found.invalid(
            &path.field("expirationSeconds"),
            &spec["expirationSeconds"],
            "may not specify a duration less than 600 seconds (10 minutes)",
        );
    }
}

fn pem(spec: &Value, path: &Path, found: &mut Found) {
    const HEAD: &str = "-----BEGIN CERTIFICATE REQUEST-----";
    let at = path.field("request");
    let bytes = STANDARD.decode(text(spec, "request")).unwrap_or_default();
    if bytes.is_empty() {
        found.required(&at, "");
        return;
    }
    let is_request = std::str::from_utf8(&bytes).is_ok_and(|text| {
        text.trim_start().starts_with(HEAD) && text.contains("-----END CERTIFICATE REQUEST-----")
    });
    if !is_request {
        found.invalid(
            &at,
            &spec["request"],
            "PEM block type must be CERTIFICATE REQUEST",
        );
    }
}

fn signer(spec: &Value, path: &Path, found: &mut Found) {
    let (name, at) = (text(spec, "signerName"), path.field("signerName"));
    if name.is_empty() {
        found.required(&at, "");
        return;
    }
    let parts: Vec<&str> = name.split('/').collect();
    match parts.as_slice() {
        [domain, rest] if domain.contains('.') && !rest.is_empty() => {
            found.all_invalid(&at, name, crate::meta::rules::subdomain(domain));
        }
        [_, _] => found.invalid(
            &at,
            &spec["signerName"],
            "should be a domain with at least two segments separated by dots",
        ),
        _ => found.invalid(
            &at,
            &spec["signerName"],
            "must be a fully qualified domain and path of the form \"example.com/signer-name\"",
        ),
    }
}

/// A request is approved or denied, and that once.
pub(super) fn status(new: &Value, old: &Value, found: &mut Found) {
    let path = Path::root("status").field("conditions");
    let has = |object: &Value, kind: &str| {
        let list = object["status"]["conditions"].as_array();
        list.into_iter().flatten().any(|one| one["type"] == kind)
    };
    for (condition, at) in items(&new["status"]["conditions"], &path) {
        let kind = text(condition, "type");
        if kind.is_empty() {
            found.required(&at.field("type"), "");
        }
        let decided = matches!(kind, "Approved" | "Denied" | "Failed");
        if decided && condition["status"] != "True" {
            found.not_supported(&at.field("status"), &condition["status"], &["True"]);
        }
        let other = match kind {
            "Approved" => "Denied",
            "Denied" => "Approved",
            _ => continue,
        };
        if has(new, other) {
            let detail = "Approved and Denied conditions are mutually exclusive";
            found.invalid(&at.field("type"), &condition["type"], detail);
        }
    }
    for kind in ["Approved", "Denied", "Failed"] {
        if has(old, kind) && !has(new, kind) {
            let detail = format!("updates may not remove a condition of type {kind:?}");
            found.add(ErrorKind::Forbidden, &path, &Value::Null, detail);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        kinds::by_api_version,
        validation::{validate_create, validate_status_update},
    };

    fn made(change: impl FnOnce(&mut Value)) -> Value {
        let pem = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n";
        let mut object = json!({"metadata": {"name": "a"}, "spec": {
            "request": STANDARD.encode(pem), "signerName": "kubernetes.io/kube-apiserver-client",
            "usages": ["client auth"]}});
        change(&mut object);
        object
    }

    #[test]
    fn requests_are_refused_by_the_field() {
        let kind = by_api_version("certificates.k8s.io/v1", "CertificateSigningRequest").unwrap();
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 5] = [
            (|_| {}, ""),
            (
                |o| o["spec"]["request"] = STANDARD.encode("x").into(),
                "spec.request: Invalid value: \"eA==\": PEM block type must be CERTIFICATE REQUEST",
            ),
            (
                |o| o["spec"]["usages"] = json!([]),
                "spec.usages: Required value",
            ),
            (
                |o| o["spec"]["signerName"] = "here".into(),
                "spec.signerName: Invalid value: \"here\": must be a fully qualified domain and path \
                 of the form \"example.com/signer-name\"",
            ),
            (
                |o| o["spec"]["expirationSeconds"] = 5.into(),
                "spec.expirationSeconds: Invalid value: 5: may not specify a duration less than 600 \
                 seconds (10 minutes)",
            ),
        ];
        for (change, expected) in cases {
            let found = validate_create(kind, &made(change));
            let texts: Vec<String> = found.iter().map(ToString::to_string).collect();
            assert_eq!(texts.join("\n"), expected);
        }
    }

    #[test]
    fn a_decision_is_one_and_stays() {
        let kind = by_api_version("certificates.k8s.io/v1", "CertificateSigningRequest").unwrap();
        let with = |kinds: &[&str]| {
            made(|o| {
                let list = kinds
                    .iter()
                    .map(|kind| json!({"type": kind, "status": "True"}));
                o["status"]["conditions"] = list.collect();
            })
        };
        assert!(validate_status_update(kind, &with(&["Approved"]), &with(&[])).is_empty());
        assert!(
            !validate_status_update(kind, &with(&["Approved", "Denied"]), &with(&[])).is_empty()
        );
        assert!(!validate_status_update(kind, &with(&[]), &with(&["Denied"])).is_empty());
    }
}
