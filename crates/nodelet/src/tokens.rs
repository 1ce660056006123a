//! Service account tokens of pods: asked for when they are needed, renewed when four fifths of their life
//! are over.

use std::{collections::HashMap, sync::Mutex};

use bytes::Bytes;
use hypernetes_telemetry::chain;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{Pod, ServiceAccount, ServiceAccountTokenProjection},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};

use crate::worker::lock;

/// However long a token lives, it is renewed after this.
const MAX_AGE: SignedDuration = SignedDuration::from_hours(24);
/// After a renewal that failed while the old token still holds.
const RETRY: SignedDuration = SignedDuration::from_secs(30);

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("failed to fetch token: {0}")]
    Api(String),
    #[error("failed to fetch token: the server sent none")]
    Empty,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: String,
    account: String,
    audience: String,
    seconds: i64,
}

/// A token, and when it is to be renewed.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) text: Bytes,
    pub(crate) renew_at: Timestamp,
    expires_at: Timestamp,
}

/// The tokens of all pods of the node.
pub(crate) struct Tokens {
    client: Client,
    cache: Mutex<HashMap<Key, Token>>,
}

impl Tokens {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            client,
            cache: Mutex::default(),
        }
    }

    /// Forgets the tokens of a pod that has gone.
    pub(crate) fn forget(&self, uid: &str) {
        lock(&self.cache).retain(|key, _| key.uid != uid);
    }

    /// The token that a volume of the pod wants.
    pub(crate) async fn get(
        &self,
        pod: &Pod,
        wanted: &ServiceAccountTokenProjection,
    ) -> Result<Token, TokenError> {
        let account = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.clone())
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "default".to_owned());
        let key = Key {
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            account,
            audience: wanted.audience.clone().unwrap_or_default(),
            seconds: wanted.expiration_seconds.unwrap_or(3600),
        };
        let now = Timestamp::now();
        let known = lock(&self.cache).get(&key).cloned();
        if let Some(token) = known.clone().filter(|token| token.renew_at > now) {
            return Ok(token);
        }
        match self.request(pod, &key, now).await {
            Ok(token) => {
                lock(&self.cache).insert(key, token.clone());
                Ok(token)
            }
            Err(error) => match known.filter(|token| token.expires_at > now) {
                Some(mut token) => {
                    tracing::warn!(error = %error, "cannot renew a service account token yet");
                    token.renew_at = now.checked_add(RETRY).unwrap_or(now);
                    Ok(token)
                }
                None => Err(error),
            },
        }
    }

    async fn request(&self, pod: &Pod, key: &Key, now: Timestamp) -> Result<Token, TokenError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let audiences = match key.audience.as_str() {
            "" => Vec::new(),
            audience => vec![audience.to_owned()],
        };
        let request = TokenRequest {
            metadata: ObjectMeta::default(),
            spec: Some(TokenRequestSpec {
                audiences: Some(audiences),
                expiration_seconds: Some(key.seconds),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
            }),
            status: None,
        };
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), namespace);
        let answer = accounts
            .create_token_request(&key.account, &PostParams::default(), &request)
            .await
            .map_err(|error| TokenError::Api(chain(&error).to_string()))?;
        let status = answer.status.ok_or(TokenError::Empty)?;
        let text = status.token.filter(|token| !token.is_empty());
        let text = text.ok_or(TokenError::Empty)?;
        let expires_at = status.expiration_timestamp.ok_or(TokenError::Empty)?.0;
        Ok(Token {
            text: Bytes::from(text),
            renew_at: renew_at(now, expires_at),
            expires_at,
        })
    }
}

/// Four fifths of the way, and not later than a day.
fn renew_at(issued: Timestamp, expires: Timestamp) -> Timestamp {
    let life = expires.duration_since(issued).max(SignedDuration::ZERO);
    let wait = (life / 5 * 4).min(MAX_AGE);
    issued.checked_add(wait).unwrap_or(issued)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// A server whose tokens live as long as `lives` says, one after the other, and which then fails.
    fn tokens(lives: Vec<i64>) -> (Tokens, Arc<Mutex<Vec<Value>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, lives) = (asked.clone(), Arc::new(Mutex::new(lives)));
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (seen, lives) = (seen.clone(), lives.clone());
            async move {
                let path = request.uri().path().to_owned();
                let body = request.into_body().collect_bytes().await.unwrap();
                let mut body: Value = serde_json::from_slice(&body).unwrap();
                body["path"] = path.into();
                let number = {
                    let mut seen = lock(&seen);
                    seen.push(body);
                    seen.len()
                };
                let life = lock(&lives).get(number - 1).copied();
                let (code, answer) = match life {
                    None => (
                        500,
                        json!({"kind": "Status", "code": 500, "message": "down"}),
                    ),
                    Some(life) => {
                        let expires = Timestamp::now().as_second() + life;
                        let expires = Timestamp::from_second(expires).unwrap();
                        let status = json!({"token": format!("t{number}"),
                            "expirationTimestamp": expires.to_string()});
                        (201, json!({"spec": {"audiences": []}, "status": status}))
                    }
                };
                let response = http::Response::builder().status(code);
                let response = response.body(Body::from(answer.to_string().into_bytes()));
                Ok::<_, std::convert::Infallible>(response.unwrap())
            }
        });
        (Tokens::new(Client::new(service, "default")), asked)
    }

    #[tokio::test]
    async fn a_token_is_bound_to_its_pod_kept_and_renewed() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "acme", "uid": "u1"},
            "spec": {"serviceAccountName": "robot", "containers": []}}))
        .unwrap();
        let wanted: ServiceAccountTokenProjection = serde_json::from_value(
            json!({"audience": "vault", "expirationSeconds": 600, "path": "t"}),
        )
        .unwrap();
        let (tokens, asked) = tokens(vec![3600]);
        for _again in 0..2 {
            assert_eq!(tokens.get(&pod, &wanted).await.unwrap().text, "t1");
        }
        let requests = lock(&asked).clone();
        assert_eq!(requests.len(), 1, "{requests:?}");
        assert_eq!(
            requests[0]["path"],
            "/api/v1/namespaces/acme/serviceaccounts/robot/token"
        );
        assert_eq!(
            requests[0]["spec"],
            json!({"audiences": ["vault"], "expirationSeconds": 600,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u1"}})
        );
        tokens.forget("u1");
        assert!(
            tokens.get(&pod, &wanted).await.is_err(),
            "the server is down"
        );
        // One that has run out is replaced, and kept for want of a new one while it holds.
        let (tokens, _asked) = self::tokens(vec![0, 2]);
        assert_eq!(tokens.get(&pod, &wanted).await.unwrap().text, "t1");
        assert_eq!(tokens.get(&pod, &wanted).await.unwrap().text, "t2");
        for token in lock(&tokens.cache).values_mut() {
            token.renew_at = Timestamp::UNIX_EPOCH;
        }
        let kept = tokens.get(&pod, &wanted).await.unwrap();
        assert_eq!(kept.text, "t2");
        assert!(kept.renew_at > Timestamp::now());
    }

    #[test]
    fn tokens_are_renewed_in_time() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        for (life, wait) in [(3600, 2880), (600, 480), (0, 0), (7 * 86_400, 86_400)] {
            assert_eq!(renew_at(at(1000), at(1000 + life)), at(1000 + wait));
        }
    }
}
