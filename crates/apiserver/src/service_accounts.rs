//! Service account tokens: issued by `serviceaccounts/token`, accepted as bearer tokens while the
//! account and what the token is bound to exist.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Response, header, request::Parts};
use hypernetes_apimachinery::{
    Status, meta,
    validation::{ErrorKind, FieldError},
};
use hypernetes_identity::{
    AuthenticationError, Authenticator, BoundObject, KubernetesClaims, PeerCertificate,
    SERVICE_ACCOUNT_ISSUER, TokenClaims, TokenError, TokenKey, User,
};
use hypernetes_store::Store;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    codec,
    config::Clock,
    engine::{Call, Engine, Expected, decode_body},
    keys,
    status::Result,
};

const AUTHN: &str = "authentication.k8s.io";
const LEAST_LIFE: i64 = 10 * 60;
const MOST_LIFE: i64 = 1 << 32;
const USUAL_LIFE: i64 = 60 * 60;
/// For how long a token serves a pod that should have ended.
const LEEWAY: SignedDuration = SignedDuration::from_secs(60);

/// Beginning of the accounts' user names.
const PREFIX: &str = "system:serviceaccount:";

/// Issues and accepts tokens.
#[derive(Clone)]
pub(crate) struct ServiceAccounts {
    key: TokenKey,
    store: Store,
    clock: Clock,
}

impl fmt::Debug for ServiceAccounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceAccounts").finish_non_exhaustive()
    }
}

/// The bearer token of a request.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer")).then(|| token.trim())
}

impl ServiceAccounts {
    pub(crate) fn new(key: TokenKey, store: Store, clock: Clock) -> Self {
        Self { key, store, clock }
    }

    /// The account that a token names, and for which of the audiences it is good. `None`: it is
    /// not a token of this cluster.
    pub(crate) fn verify(
        &self,
        token: &str,
        audiences: &[String],
    ) -> std::result::Result<Option<(User, Vec<String>)>, AuthenticationError> {
        let now = (self.clock)();
        let claims = match self.key.verify(token, now.as_second()) {
            Ok(claims) => claims,
            Err(TokenError::Foreign) => return Ok(None),
            Err(error) => {
                tracing::debug!(%error, "a service account token is refused");
                return Err(AuthenticationError::Invalid);
            }
        };
        let good: Vec<String> = audiences
            .iter()
            .filter(|audience| claims.aud.contains(audience))
            .cloned()
            .collect();
        if good.is_empty() {
            return Err(AuthenticationError::Invalid);
        }
        let user = self
            .user(&claims, now)
            .ok_or(AuthenticationError::Invalid)?;
        Ok(Some((user, good)))
    }

    /// The user of good claims; `None` if the account or what the token is bound to is gone.
    fn user(&self, claims: &TokenClaims, now: Timestamp) -> Option<User> {
        let bound = &claims.kubernetes;
        let namespace = bound.namespace.as_str();
        let account = &bound.serviceaccount;
        self.living("serviceaccounts", namespace, account, now)?;
        if claims.sub != format!("{PREFIX}{namespace}:{}", account.name) {
            return None;
        }
        if let Some(pod) = &bound.pod {
            self.living("pods", namespace, pod, now)?;
        }
        if let Some(secret) = &bound.secret {
            self.living("secrets", namespace, secret, now)?;
        }
        // A pod's token names the node only to tell; alone it is what the token is bound to.
        if let (Some(node), None) = (&bound.node, &bound.pod) {
            self.living("nodes", "", node, now)?;
        }
        let mut user = User::authenticated(
            claims.sub.clone(),
            [
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
            ],
        );
        user.uid.clone_from(&account.uid);
        let mut extra = |key: &str, value: String| {
            user.extra
                .insert(format!("authentication.kubernetes.io/{key}"), vec![value]);
        };
        extra("credential-id", format!("JTI={}", claims.jti));
        for (what, object) in [("pod", &bound.pod), ("node", &bound.node)] {
            if let Some(object) = object {
                extra(&format!("{what}-name"), object.name.clone());
                if !object.uid.is_empty() {
                    extra(&format!("{what}-uid"), object.uid.clone());
                }
            }
        }
        Some(user)
    }

    /// The object, if it is the same one and is not ending for long.
    fn living(
        &self,
        storage: &str,
        namespace: &str,
        wanted: &BoundObject,
        now: Timestamp,
    ) -> Option<Value> {
        let between = if namespace.is_empty() { "" } else { "/" };
        let root = keys::ROOT;
        let entry = self.store.get(&format!(
            "{root}{storage}/{namespace}{between}{}",
            wanted.name
        ))?;
        let object = codec::decode(&entry.value);
        if meta::uid(&object) != Some(wanted.uid.as_str()) {
            return None;
        }
        match meta::deletion_timestamp(&object) {
            Some(end) if now.duration_since(end) > LEEWAY => None,
            _ => Some(object),
        }
    }

    /// `serviceaccounts/NAME/token`.
    pub(crate) fn issue(
        &self,
        engine: &Engine,
        call: &Call,
        bytes: &Bytes,
    ) -> Result<Response<ApiBody>> {
        let expected = Expected {
            group: AUTHN,
            version: "v1",
            kind: "TokenRequest",
        };
        let (mut request, warnings) = decode_body(bytes, &call.headers, &call.query, expected)?;
        let (namespace, name) = (call.info.namespace.as_str(), call.info.name.as_str());
        let (_, account) = engine.find(call.kind, namespace, name)?;
        for (field, is) in [("name", name), ("namespace", namespace)] {
            let given = request["metadata"][field].as_str().unwrap_or_default();
            if !given.is_empty() && given != is {
                return Err(Status::bad_request(format!(
                    "must have metadata.{field} of {is:?}, not {given:?}"
                )));
            }
        }
        let now = (self.clock)();
        let spec = &mut request["spec"];
        if !spec.is_object() {
            *spec = json!({});
        }
        if spec["expirationSeconds"].is_null() {
            spec["expirationSeconds"] = USUAL_LIFE.into();
        }
        if spec["audiences"].as_array().is_none_or(Vec::is_empty) {
            spec["audiences"] = json!([SERVICE_ACCOUNT_ISSUER]);
        }
        let life = life(&spec["expirationSeconds"], name)?;
        let end = now
            .checked_add(SignedDuration::from_secs(life))
            .map_err(|_overflow| Status::internal("the time of expiration is out of range"))?;
        let audiences = spec["audiences"].as_array().into_iter().flatten();
        let claims = TokenClaims {
            aud: audiences
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            exp: end.as_second(),
            iat: now.as_second(),
            nbf: now.as_second(),
            iss: SERVICE_ACCOUNT_ISSUER.into(),
            jti: uuid::Uuid::new_v4().to_string(),
            sub: format!("{PREFIX}{namespace}:{name}"),
            kubernetes: bind(engine, &account, namespace, &spec["boundObjectRef"])?,
        };
        let token = self
            .key
            .sign(&claims)
            .map_err(|error| Status::internal(&error.to_string()))?;
        if !call.is_dry_run()? {
            request["status"] = json!({
                "token": token,
                "expirationTimestamp": meta::format_time(end),
            });
        }
        meta::set(&mut request, "name", name);
        meta::set(&mut request, "namespace", namespace);
        meta::set(&mut request, "creationTimestamp", meta::format_time(now));
        let mut response = body::json_value(201, &request);
        body::warn(&mut response, &warnings);
        Ok(response)
    }
}

fn life(value: &Value, name: &str) -> Result<i64> {
    let refuse = |detail: &str| {
        let error = FieldError {
            kind: ErrorKind::Invalid,
            field: "spec.expirationSeconds".into(),
            value: value.clone(),
            detail: detail.into(),
        };
        Err(Status::invalid(AUTHN, "TokenRequest", name, &[error]))
    };
    match value.as_i64().unwrap_or_default() {
        ..LEAST_LIFE => refuse("may not specify a duration less than 10 minutes"),
        life if life > MOST_LIFE => refuse("may not specify a duration larger than 2^32 seconds"),
        life => Ok(life),
    }
}

/// What the token is bound to, which must exist.
fn bind(
    engine: &Engine,
    account: &Value,
    namespace: &str,
    reference: &Value,
) -> Result<KubernetesClaims> {
    let of = |object: &Value| BoundObject {
        name: meta::name(object).unwrap_or_default().to_owned(),
        uid: meta::uid(object).unwrap_or_default().to_owned(),
    };
    let mut claims = KubernetesClaims {
        namespace: namespace.to_owned(),
        serviceaccount: of(account),
        ..KubernetesClaims::default()
    };
    if !reference.is_object() {
        return Ok(claims);
    }
    let text = |field: &str| reference[field].as_str().unwrap_or_default();
    let (api_version, kind, name) = (text("apiVersion"), text("kind"), text("name"));
    let plural = match (api_version, kind) {
        ("v1" | "", "Pod") => "pods",
        ("v1" | "", "Secret") => "secrets",
        ("v1" | "", "Node") => "nodes",
        _ => {
            return Err(Status::bad_request(format!(
                "cannot bind token to object of type {api_version}, Kind={kind}"
            )));
        }
    };
    let found = hypernetes_apimachinery::kinds::by_resource("", "v1", plural)
        .ok_or_else(Status::no_resource)?;
    let (_, object) = engine.find(found, namespace, name)?;
    let uid = text("uid");
    if !uid.is_empty() && Some(uid) != meta::uid(&object) {
        return Err(Status::conflict(
            "",
            kind,
            name,
            &format!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. \
                 The object might have been deleted and then recreated"
            ),
        ));
    }
    let bound = of(&object);
    match kind {
        "Pod" => {
            let own = object["spec"]["serviceAccountName"].as_str();
            let own = own.filter(|own| !own.is_empty()).unwrap_or("default");
            if own != claims.serviceaccount.name {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {:?} to pod running with different \
                     serviceaccount name.",
                    claims.serviceaccount.name
                )));
            }
            claims.pod = Some(bound);
            claims.node = node_of(engine, &object);
        }
        "Secret" => claims.secret = Some(bound),
        _ => claims.node = Some(bound),
    }
    Ok(claims)
}

fn node_of(engine: &Engine, pod: &Value) -> Option<BoundObject> {
    let name = pod["spec"]["nodeName"]
        .as_str()
        .filter(|name| !name.is_empty())?;
    let kind = hypernetes_apimachinery::kinds::by_resource("", "v1", "nodes")?;
    let uid = engine
        .find(kind, "", name)
        .ok()
        .and_then(|(_, node)| meta::uid(&node).map(str::to_owned));
    Some(BoundObject {
        name: name.to_owned(),
        uid: uid.unwrap_or_default(),
    })
}

#[async_trait]
impl Authenticator for ServiceAccounts {
    async fn authenticate(
        &self,
        parts: &Parts,
        _peer: Option<&PeerCertificate>,
    ) -> std::result::Result<Option<User>, AuthenticationError> {
        let Some(token) = bearer(&parts.headers) else {
            return Ok(None);
        };
        let own = [SERVICE_ACCOUNT_ISSUER.to_owned()];
        Ok(self.verify(token, &own)?.map(|(user, _)| user))
    }
}
