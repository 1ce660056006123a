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
    use super::*;

    #[test]
    fn tokens_are_renewed_in_time() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        for (life, wait) in [(3600, 2880), (600, 480), (0, 0), (7 * 86_400, 86_400)] {
            assert_eq!(renew_at(at(1000), at(1000 + life)), at(1000 + wait));
        }
    }
}
