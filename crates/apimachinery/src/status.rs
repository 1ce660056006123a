//! `metav1.Status`: how the API says that something failed, in Kubernetes' words.

use serde_json::{Map, Value, json};

use crate::{kinds::ResourceKind, validation::FieldError};

/// An answer that is not an object: a failure, or the success of a deletion.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason; empty for a success.
    pub reason: &'static str,
    /// What a person reads.
    pub message: String,
    /// What it is about.
    pub details: Option<Details>,
}

/// What a [`Status`] is about.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Details {
    /// Object name.
    pub name: String,
    /// API group.
    pub group: String,
    /// Resource (plural) or kind, as upstream chooses for the reason.
    pub kind: String,
    /// Unique id of the object.
    pub uid: String,
    /// Single findings.
    pub causes: Vec<Cause>,
    /// When to try again; 0 is absent.
    pub retry_after_seconds: u32,
}

/// One finding of a [`Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cause {
    /// Machine-readable reason, such as `FieldValueInvalid`.
    pub reason: String,
    /// What a person reads.
    pub message: String,
    /// Path of the field.
    pub field: String,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}

/// The resource that a message names: `pods` or `tenants.hypernetes.io`.
fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() {
        resource.to_owned()
    } else {
        format!("{resource}.{group}")
    }
}

impl Status {
    /// A failure with code, reason and message.
    pub fn failure(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    fn about(mut self, group: &str, kind: &str, name: &str) -> Self {
        self.details = Some(Details {
            name: name.to_owned(),
            group: group.to_owned(),
            kind: kind.to_owned(),
            ..Details::default()
        });
        self
    }

    /// The object that was deleted and is gone.
    pub fn deleted(kind: &ResourceKind, name: &str, uid: &str) -> Self {
        let mut status = Self {
            code: 200,
            reason: "",
            message: String::new(),
            details: None,
        }
        .about(kind.group, kind.plural, name);
        if let Some(details) = &mut status.details {
            details.uid = uid.to_owned();
        }
        status
    }

    /// 404: no such object.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Self {
        let message = format!("{} {name:?} not found", qualified(group, resource));
        Self::failure(404, "NotFound", message).about(group, resource, name)
    }

    /// 404: no such path.
    pub fn no_resource() -> Self {
        Self::failure(
            404,
            "NotFound",
            "the server could not find the requested resource",
        )
        .about("", "", "")
    }

    /// 409: the name is taken.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> Self {
        let message = format!("{} {name:?} already exists", qualified(group, resource));
        Self::failure(409, "AlreadyExists", message).about(group, resource, name)
    }

    /// 409: for the cause given.
    pub fn conflict(group: &str, resource: &str, name: &str, cause: &str) -> Self {
        let resource_name = qualified(group, resource);
        let message = format!("Operation cannot be fulfilled on {resource_name} {name:?}: {cause}");
        Self::failure(409, "Conflict", message).about(group, resource, name)
    }

    /// 409: the object's resourceVersion is not the one given.
    pub fn modified(group: &str, resource: &str, name: &str) -> Self {
        Self::conflict(
            group,
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and \
             try again",
        )
    }

    /// 403: for the reason given.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let message = match (resource, name) {
            ("", _) => format!("forbidden: {why}"),
            (_, "") => format!("{} is forbidden: {why}", qualified(group, resource)),
            _ => format!(
                "{} {name:?} is forbidden: {why}",
                qualified(group, resource)
            ),
        };
        Self::failure(403, "Forbidden", message).about(group, resource, name)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::failure(401, "Unauthorized", "Unauthorized")
    }

    /// 400: the request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::failure(400, "BadRequest", message)
    }

    /// 422: the object breaks the rules of its kind.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let text = match texts.as_slice() {
            [] => "<nil>".to_owned(),
            [one] => one.clone(),
            many => {
                // Upstream shows every text once.
                let mut seen: Vec<&String> = Vec::new();
                many.iter().for_each(|text| {
                    if !seen.contains(&text) {
                        seen.push(text);
                    }
                });
                match seen.as_slice() {
                    [one] => (*one).clone(),
                    seen => format!(
                        "[{}]",
                        seen.iter()
                            .map(|s| s.as_str())
                            .collect::<Vec<_>>()
                            .join(", ")
                    ),
                }
            }
        };
        let message = format!("{} {name:?} is invalid: {text}", qualified(group, kind));
        let mut status = Self::failure(422, "Invalid", message).about(group, kind, name);
        if let Some(details) = &mut status.details {
            details.causes = errors
                .iter()
                .map(|error| Cause {
                    reason: error.kind.reason().to_owned(),
                    message: error.body(),
                    field: error.field.clone(),
                })
                .collect();
        }
        status
    }

    /// 405: the resource does not have the verb.
    pub fn method_not_allowed() -> Self {
        Self::failure(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
        .about("", "", "")
    }

    /// 406: none of the accepted media types can be had.
    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let message = format!(
            "only the following media types are accepted: {}",
            accepted.join(", ")
        );
        Self::failure(406, "NotAcceptable", message)
    }

    /// 415: the body's media type is not understood.
    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::failure(415, "UnsupportedMediaType", message)
    }

    /// 413: the body is larger than `limit` bytes.
    pub fn too_large(limit: usize) -> Self {
        Self::failure(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit}"),
        )
    }

    /// 410: the revision or continue token is too old.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::failure(410, "Expired", message)
    }

    /// 429: too many requests.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        let mut status = Self::failure(429, "TooManyRequests", message).about("", "", "");
        if let Some(details) = &mut status.details {
            details.retry_after_seconds = retry_after_seconds;
        }
        status
    }

    /// 504: the revision asked for is in the future.
    pub fn too_large_resource_version(asked: u64, current: u64, retry_after_seconds: u32) -> Self {
        let message = format!("Timeout: Too large resource version: {asked}, current: {current}");
        let mut status = Self::failure(504, "Timeout", message).about("", "", "");
        if let Some(details) = &mut status.details {
            details.retry_after_seconds = retry_after_seconds;
            details.causes.push(Cause {
                reason: "ResourceVersionTooLarge".into(),
                message: "Too large resource version".into(),
                field: String::new(),
            });
        }
        status
    }

    /// 500: our fault. The message goes to the client: nothing secret in it.
    pub fn internal(message: &str) -> Self {
        let mut status = Self::failure(
            500,
            "InternalError",
            format!("Internal error occurred: {message}"),
        )
        .about("", "", "");
        if let Some(details) = &mut status.details {
            details.causes.push(Cause {
                message: message.into(),
                ..Cause::default()
            });
        }
        status
    }

    /// 503: try again later.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::failure(503, "ServiceUnavailable", message)
    }

    /// 507: the state directory is full. Upstream has no word for it.
    pub fn insufficient_storage(message: impl Into<String>) -> Self {
        Self::failure(507, "InsufficientStorage", message)
    }

    /// Adds a finding.
    #[must_use]
    pub fn with_cause(mut self, reason: &str, message: &str, field: &str) -> Self {
        self.details.get_or_insert_default().causes.push(Cause {
            reason: reason.to_owned(),
            message: message.to_owned(),
            field: field.to_owned(),
        });
        self
    }

    /// The JSON object.
    pub fn to_value(&self) -> Value {
        let mut out = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}});
        let success = self.code < 300;
        out["status"] = if success { "Success" } else { "Failure" }.into();
        if !self.message.is_empty() {
            out["message"] = self.message.as_str().into();
        }
        if !self.reason.is_empty() {
            out["reason"] = self.reason.into();
        }
        if let Some(details) = &self.details {
            out["details"] = details.to_value();
        }
        if !success {
            out["code"] = self.code.into();
        }
        out
    }
}

impl Details {
    fn to_value(&self) -> Value {
        let mut out = Map::new();
        let mut text = |key: &str, value: &str| {
            if !value.is_empty() {
                out.insert(key.to_owned(), value.into());
            }
        };
        text("name", &self.name);
        text("group", &self.group);
        text("kind", &self.kind);
        text("uid", &self.uid);
        if !self.causes.is_empty() {
            out.insert(
                "causes".into(),
                self.causes.iter().map(Cause::to_value).collect(),
            );
        }
        if self.retry_after_seconds > 0 {
            out.insert("retryAfterSeconds".into(), self.retry_after_seconds.into());
        }
        Value::Object(out)
    }
}

impl Cause {
    fn to_value(&self) -> Value {
        let mut out = Map::new();
        for (key, value) in [
            ("reason", &self.reason),
            ("message", &self.message),
            ("field", &self.field),
        ] {
            if !value.is_empty() {
                out.insert(key.to_owned(), value.as_str().into());
            }
        }
        Value::Object(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validation::ErrorKind;

    #[test]
    fn messages_are_upstreams() {
        for (status, code, message) in [
            (
                Status::not_found("", "pods", "x"),
                404,
                "pods \"x\" not found",
            ),
            (
                Status::already_exists("hypernetes.io", "tenants", "x"),
                409,
                "tenants.hypernetes.io \"x\" already exists",
            ),
            (
                Status::modified("", "pods", "x"),
                409,
                "Operation cannot be fulfilled on pods \"x\": the object has been modified; please \
                 apply your changes to the latest version and try again",
            ),
            (
                Status::forbidden("", "pods", "x", "no"),
                403,
                "pods \"x\" is forbidden: no",
            ),
            (
                Status::forbidden("", "pods", "", "no"),
                403,
                "pods is forbidden: no",
            ),
            (
                Status::too_large_resource_version(9, 5, 1),
                504,
                "Timeout: Too large resource version: 9, current: 5",
            ),
            (Status::internal("x"), 500, "Internal error occurred: x"),
        ] {
            assert_eq!((status.code, status.message.as_str()), (code, message));
        }
    }

    fn finding(field: &str, value: Value) -> FieldError {
        FieldError {
            kind: ErrorKind::Invalid,
            field: field.into(),
            value,
            detail: "no".into(),
        }
    }

    #[test]
    fn invalid_objects_list_their_causes() {
        let one = Status::invalid("", "Pod", "x", &[finding("spec.a", json!("b"))]);
        assert_eq!(
            one.to_value(),
            json!({
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Failure",
                "message": "Pod \"x\" is invalid: spec.a: Invalid value: \"b\": no",
                "reason": "Invalid",
                "details": {
                    "name": "x",
                    "kind": "Pod",
                    "causes": [{
                        "reason": "FieldValueInvalid",
                        "message": "Invalid value: \"b\": no",
                        "field": "spec.a",
                    }],
                },
                "code": 422,
            })
        );
        let errors = [
            finding("a", json!(1)),
            finding("b", json!(2)),
            finding("a", json!(1)),
        ];
        let many = Status::invalid("hypernetes.io", "Tenant", "x", &errors);
        assert_eq!(
            many.message,
            "Tenant.hypernetes.io \"x\" is invalid: [a: Invalid value: 1: no, b: Invalid value: 2: no]"
        );
    }

    #[test]
    fn a_success_has_no_code() {
        let kind = crate::kinds::by_resource("", "v1", "pods").expect("pods are served");
        assert_eq!(
            Status::deleted(kind, "x", "u").to_value(),
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                "details": {"name": "x", "kind": "pods", "uid": "u"}})
        );
    }
}
