//! Field selectors: equality on the few fields that a kind offers.

use serde_json::Value;

use crate::kinds::ResourceKind;

use super::SelectorError;

/// Requirements on fields, all of which must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    requirements: Vec<Requirement>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    field: String,
    equal: bool,
    value: String,
}

const POD: &[&str] = &[
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "spec.hostNetwork",
    "status.phase",
    "status.podIP",
    "status.podIPs",
    "status.nominatedNodeName",
];
const CORE_EVENT: &[&str] = &[
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];
const GROUP_EVENT: &[&str] = &[
    "regarding.kind",
    "regarding.namespace",
    "regarding.name",
    "regarding.uid",
    "regarding.apiVersion",
    "regarding.resourceVersion",
    "regarding.fieldPath",
    "reason",
    "reportingController",
    "type",
];

/// Fields beside `metadata.name` and `metadata.namespace`.
fn fields(kind: &ResourceKind) -> &'static [&'static str] {
    match (kind.group, kind.kind) {
        ("", "Pod") => POD,
        ("", "Event") => CORE_EVENT,
        ("events.k8s.io", "Event") => GROUP_EVENT,
        ("", "Namespace") => &["status.phase"],
        ("", "Node") => &["spec.unschedulable"],
        ("", "Secret") => &["type"],
        ("", "Service") => &["spec.clusterIP", "spec.type"],
        ("", "ReplicationController") => &["status.replicas"],
        ("batch", "Job") => &["status.successful"],
        ("certificates.k8s.io", "CertificateSigningRequest") => &["spec.signerName"],
        _ => &[],
    }
}

/// What upstream says of a field that the kind does not offer: kinds with fields of their own say
/// less than the others.
fn unknown(kind: &ResourceKind, custom: bool, field: &str) -> SelectorError {
    match (kind.group, kind.kind) {
        ("batch", "Job") => SelectorError::JobField(field.to_owned()),
        _ if custom || !fields(kind).is_empty() => SelectorError::Field(field.to_owned()),
        _ => SelectorError::UnknownField(field.to_owned()),
    }
}

impl FieldSelector {
    /// Parses `a=b,c==d,e!=f` for a kind. `\` escapes the next character.
    ///
    /// # Errors
    /// [`SelectorError`].
    pub fn parse(text: &str, kind: &ResourceKind) -> Result<Self, SelectorError> {
        Self::parse_with(text, kind, &[])
    }

    /// Parses a selector that may name more fields.
    ///
    /// # Errors
    /// [`SelectorError`].
    pub fn parse_with(
        text: &str,
        kind: &ResourceKind,
        more: &[String],
    ) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for part in split(text) {
            if part.is_empty() {
                continue;
            }
            let broken = || SelectorError::FieldSyntax(text.to_owned(), part.clone());
            let at = part.find(['=', '!']).ok_or_else(broken)?;
            let (field, rest) = part.split_at(at);
            let (equal, value) = rest
                .strip_prefix("==")
                .map(|v| (true, v))
                .or_else(|| rest.strip_prefix("!=").map(|v| (false, v)))
                .or_else(|| rest.strip_prefix('=').map(|v| (true, v)))
                .ok_or_else(broken)?;
            let known = field == "metadata.name"
                || (field == "metadata.namespace" && (kind.namespaced || kind.group.is_empty()))
                || fields(kind).contains(&field)
                || more.iter().any(|known| known == field);
            if !known {
                return Err(unknown(kind, crate::kinds::is_custom(kind), field));
            }
            let value = unescape(value).ok_or_else(broken)?;
            requirements.push(Requirement {
                field: field.to_owned(),
                equal,
                value,
            });
        }
        Ok(Self { requirements })
    }

    /// Whether everything is selected.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether the selection is of one value of this field and of nothing else.
    pub fn is_only(&self, field: &str) -> bool {
        matches!(self.requirements.as_slice(), [one] if one.equal && one.field == field)
    }

    /// The value that a field must have, if the selector pins it (`metadata.name=x`).
    pub fn pinned(&self, field: &str) -> Option<&str> {
        self.requirements
            .iter()
            .find(|r| r.equal && r.field == field)
            .map(|r| r.value.as_str())
    }

    /// Whether the object meets every requirement.
    pub fn matches(&self, object: &Value) -> bool {
        self.requirements
            .iter()
            .all(|r| (value(object, &r.field) == r.value) == r.equal)
    }
}

/// Splits at commas that are not escaped.
fn split(text: &str) -> Vec<String> {
    let (mut out, mut part, mut escaped) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        if c == ',' && !escaped {
            out.push(std::mem::take(&mut part));
        } else {
            part.push(c);
        }
        escaped = c == '\\' && !escaped;
    }
    out.push(part);
    out
}

fn unescape(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut letters = text.chars();
    while let Some(c) = letters.next() {
        match c {
            '\\' => out.push(letters.next().filter(|c| matches!(c, '\\' | ',' | '='))?),
            ',' | '=' => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

fn value(object: &Value, field: &str) -> String {
    let found = field
        .split('.')
        .try_fold(object, |value, key| value.get(key));
    match (field, found) {
        // Unset booleans read as false.
        ("spec.unschedulable" | "spec.hostNetwork", None) => "false".to_owned(),
        ("status.successful", _) => number_of(&object["status"]["succeeded"]),
        ("status.replicas", _) => number_of(&object["status"]["replicas"]),
        ("source", Some(source)) => source["component"].as_str().unwrap_or_default().to_owned(),
        ("status.podIPs", Some(Value::Array(ips))) => ips
            .iter()
            .filter_map(|ip| ip["ip"].as_str())
            .collect::<Vec<_>>()
            .join(","),
        (_, Some(Value::String(text))) => text.clone(),
        (_, Some(Value::Bool(value))) => value.to_string(),
        (_, Some(Value::Number(number))) => number.to_string(),
        _ => String::new(),
    }
}

fn number_of(value: &Value) -> String {
    value.as_i64().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::by_api_version;
    use serde_json::json;

    fn parse(text: &str, api_version: &str, kind: &str) -> Result<FieldSelector, SelectorError> {
        FieldSelector::parse(text, by_api_version(api_version, kind).unwrap())
    }

    #[test]
    fn fields_of_the_kind_are_compared() {
        let pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        for (selector, expected) in [
            ("spec.nodeName=n", true),
            ("spec.nodeName==n,status.phase!=Failed", true),
            ("status.phase=Failed", false),
            ("spec.hostNetwork=false", true),
            ("status.podIP=", true),
            ("metadata.name=b", false),
        ] {
            assert_eq!(
                parse(selector, "v1", "Pod").unwrap().matches(&pod),
                expected,
                "{selector}"
            );
        }
        let selector = parse("metadata.name=a", "v1", "Pod").unwrap();
        assert_eq!(selector.pinned("metadata.name"), Some("a"));
        assert_eq!(
            parse("metadata.name!=a", "v1", "Pod")
                .unwrap()
                .pinned("metadata.name"),
            None
        );
    }

    #[test]
    fn other_fields_are_refused() {
        for (text, api_version, kind, expected) in [
            (
                "spec.image=x",
                "v1",
                "Pod",
                "field label not supported: spec.image",
            ),
            (
                "data.x=y",
                "v1",
                "ConfigMap",
                "\"data.x\" is not a known field selector: only \"metadata.name\", \
                 \"metadata.namespace\"",
            ),
            (
                "spec.parallelism=1",
                "batch/v1",
                "Job",
                "field label \"spec.parallelism\" not supported for batchv1.Job",
            ),
            (
                "involvedObject.name=x",
                "events.k8s.io/v1",
                "Event",
                "field label not supported: involvedObject.name",
            ),
        ] {
            assert_eq!(
                parse(text, api_version, kind).unwrap_err().to_string(),
                expected
            );
        }
        assert_eq!(
            parse("metadata.name", "v1", "Pod").unwrap_err().to_string(),
            "invalid selector: 'metadata.name'; can't understand 'metadata.name'"
        );
    }

    #[test]
    fn values_may_be_escaped() {
        let selector = parse("involvedObject.fieldPath=a\\,b\\=c,type=x", "v1", "Event").unwrap();
        assert_eq!(selector.pinned("involvedObject.fieldPath"), Some("a,b=c"));
        assert_eq!(selector.pinned("type"), Some("x"));
    }
}
