//! Reviews: questions about who one is and what one may do, asked as objects that are not kept.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, header};
use hypernetes_apimachinery::Status;
use hypernetes_identity::{Authenticator, SERVICE_ACCOUNT_ISSUER, User};
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    engine::{Call, Engine, Expected, decode_body},
    rbac::{Action, Rule},
    service_accounts::ServiceAccounts,
    status::Result,
};

/// Who knows tokens.
#[derive(Clone, Copy)]
pub(crate) struct Authenticators<'a> {
    pub(crate) all: &'a [Arc<dyn Authenticator>],
    pub(crate) service_accounts: Option<&'a ServiceAccounts>,
}

/// Answers a review.
pub(crate) async fn serve(
    engine: &Engine,
    authenticators: &Authenticators<'_>,
    call: &Call,
    bytes: &Bytes,
) -> Result<Response<ApiBody>> {
    let (mut review, warnings) =
        decode_body(bytes, &call.headers, &call.query, Expected::of(call.kind))?;
    let spec = review["spec"].clone();
    let status = match call.kind.kind {
        "SelfSubjectReview" => json!({"userInfo": user_info(&call.user)}),
        "SelfSubjectAccessReview" => access(engine, &call.user, &spec)?,
        "SubjectAccessReview" => access(engine, &subject(&spec)?, &spec)?,
        "LocalSubjectAccessReview" => {
            let namespace = spec["resourceAttributes"]["namespace"]
                .as_str()
                .unwrap_or_default();
            if namespace != call.info.namespace {
                return Err(Status::bad_request(format!(
                    "spec.resourceAttributes.namespace must match namespace: {}",
                    call.info.namespace
                )));
            }
            access(engine, &subject(&spec)?, &spec)?
        }
        "SelfSubjectRulesReview" => {
            let namespace = spec["namespace"].as_str().unwrap_or_default();
            if namespace.is_empty() {
                return Err(Status::bad_request("no namespace on request"));
            }
            rules(engine, &call.user, namespace)?
        }
        "TokenReview" => token(authenticators, &spec).await?,
        _ => return Err(Status::no_resource()),
    };
    if call.kind.kind == "TokenReview" {
        // What was asked about is a secret: it is not sent back.
        review["spec"] = json!({});
    }
    review["status"] = status;
    if !review["metadata"].is_object() {
        review["metadata"] = json!({});
    }
    let mut response = body::json_value(201, &review);
    body::warn(&mut response, &warnings);
    Ok(response)
}

fn subject(spec: &Value) -> Result<User> {
    let groups = strings(&spec["groups"]);
    let name = spec["user"].as_str().unwrap_or_default();
    if name.is_empty() && groups.is_empty() {
        return Err(Status::bad_request(
            "at least one of user or group must be specified",
        ));
    }
    Ok(User {
        name: name.to_owned(),
        groups,
        ..User::default()
    })
}

fn strings(value: &Value) -> Vec<String> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn access(engine: &Engine, user: &User, spec: &Value) -> Result<Value> {
    let resource = &spec["resourceAttributes"];
    let other = &spec["nonResourceAttributes"];
    let text = |value: &'_ Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let allowed = match (resource.is_object(), other.is_object()) {
        (true, false) => {
            let keys = [
                "verb",
                "namespace",
                "group",
                "resource",
                "subresource",
                "name",
            ];
            let [verb, namespace, group, resource, subresource, name] =
                keys.map(|key| text(resource, key));
            let action = Action {
                verb: &verb,
                namespace: &namespace,
                group: &group,
                resource: &resource,
                subresource: &subresource,
                name: &name,
                path: None,
            };
            engine.authorizer.allows(user, &action)?
        }
        (false, true) => {
            let (verb, path) = (text(other, "verb"), text(other, "path"));
            let action = Action {
                verb: &verb,
                path: Some(&path),
                ..Action::default()
            };
            engine.authorizer.allows(user, &action)?
        }
        _ => {
            return Err(Status::bad_request(
                "exactly one of resourceAttributes or nonResourceAttributes must be specified",
            ));
        }
    };
    Ok(json!({"allowed": allowed}))
}

fn rules(engine: &Engine, user: &User, namespace: &str) -> Result<Value> {
    let rules = engine.authorizer.rules_of(user, namespace)?;
    let (paths, resources): (Vec<&Rule>, Vec<&Rule>) =
        rules.iter().partition(|rule| !rule.paths.is_empty());
    let resources: Vec<Value> = resources
        .into_iter()
        .map(|rule| {
            let mut out =
                json!({"verbs": rule.verbs, "apiGroups": rule.groups, "resources": rule.resources});
            if !rule.names.is_empty() {
                out["resourceNames"] = json!(rule.names);
            }
            out
        })
        .collect();
    let paths: Vec<Value> = paths
        .into_iter()
        .map(|rule| json!({"verbs": rule.verbs, "nonResourceURLs": rule.paths}))
        .collect();
    Ok(json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false}))
}

/// Upstream: without audiences, those of the API server are meant.
async fn token(authenticators: &Authenticators<'_>, spec: &Value) -> Result<Value> {
    let token = spec["token"].as_str().unwrap_or_default();
    let own = [SERVICE_ACCOUNT_ISSUER.to_owned()];
    let asked = strings(&spec["audiences"]);
    let audiences: &[String] = if asked.is_empty() { &own } else { &asked };
    if let Some(accounts) = authenticators.service_accounts {
        match accounts.verify(token, audiences) {
            Ok(Some((user, audiences))) => {
                let mut status = json!({"authenticated": true, "user": user_info(&user)});
                if !asked.is_empty() {
                    status["audiences"] = audiences.into();
                }
                return Ok(status);
            }
            Ok(None) => {}
            Err(error) => return Ok(json!({"authenticated": false, "error": error.to_string()})),
        }
    }
    // Other tokens are for the API server alone.
    if !audiences.contains(&own[0]) {
        return Ok(json!({"authenticated": false, "error": "the token is not known"}));
    }
    let request = Request::builder()
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .body(())
        .map_err(|_error| Status::bad_request("the token has characters that no token has"))?;
    let (parts, ()) = request.into_parts();
    for authenticator in authenticators.all {
        match authenticator.authenticate(&parts, None).await {
            Ok(Some(user)) => {
                return Ok(json!({"authenticated": true, "user": user_info(&user)}));
            }
            Ok(None) => {}
            Err(error) => {
                return Ok(json!({"authenticated": false, "error": error.to_string()}));
            }
        }
    }
    Ok(json!({"authenticated": false, "error": "the token is not known"}))
}

fn user_info(user: &User) -> Value {
    let mut out = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        out["uid"] = user.uid.as_str().into();
    }
    if !user.extra.is_empty() {
        out["extra"] = json!(user.extra);
    }
    out
}
