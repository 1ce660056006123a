//! Answers to a registry's challenge: basic, or a token from the realm it names.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hypernetes_types::ImageReference;
use reqwest::{
    Url,
    header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{
    Transport,
    transport::{self, authority},
};
use crate::{Credentials, ImageError};

const MAX_TOKEN_ANSWER: u64 = 1 << 20;

/// One way in that a registry offers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
    },
}

/// The challenges of an answer; those that are not understood are left out.
pub(super) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let texts = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|v| v.to_str().ok());
    let mut found = Vec::new();
    for text in texts {
        for challenge in http_auth::parse_challenges(text).unwrap_or_default() {
            let parameter = |name: &str| {
                let found = challenge
                    .params
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                found.push(Challenge::Basic);
            } else if challenge.scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = parameter("realm")
            {
                found.push(Challenge::Bearer {
                    realm,
                    service: parameter("service"),
                });
            }
        }
    }
    found
}

pub(super) fn bearer(token: &str) -> Option<HeaderValue> {
    secret(&format!("Bearer {token}"))
}

fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    secret(&format!(
        "Basic {}",
        STANDARD.encode(format!("{username}:{password}"))
    ))
}

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The `Authorization` for the next try, or nothing if there is no way in with these credentials.
pub(super) async fn answer(
    transport: &Transport,
    reference: &ImageReference,
    credentials: &Credentials,
    challenges: &[Challenge],
    actions: &str,
) -> Result<Option<HeaderValue>, ImageError> {
    for challenge in challenges {
        match (challenge, credentials) {
            (
                Challenge::Bearer { realm, service },
                Credentials::Anonymous | Credentials::Basic { .. },
            ) => {
                let service = service.as_deref();
                return token(transport, reference, credentials, realm, service, actions).await;
            }
            (Challenge::Basic, Credentials::Basic { username, password }) => {
                return Ok(basic(username, password));
            }
            _ => {}
        }
    }
    Ok(None)
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// Asks the token server. The scope is always this request's own, whatever the challenge says: a
/// registry cannot make us fetch a token for another repository.
async fn token(
    transport: &Transport,
    reference: &ImageReference,
    credentials: &Credentials,
    realm: &str,
    service: Option<&str>,
    actions: &str,
) -> Result<Option<HeaderValue>, ImageError> {
    let refused = |message: String| ImageError::Unauthorized {
        registry: reference.registry().to_owned(),
        reference: Box::new(reference.clone()),
        message,
    };
    let mut url = Url::parse(realm)
        .map_err(|e| refused(format!("its token server has no valid address: {e}")))?;
    let registry = format!("https://{}/", reference.registry());
    let registry = Url::parse(&registry).map_err(|e| refused(e.to_string()))?;
    if !transport.may_visit(&url, &registry) {
        return Err(refused(format!(
            "its token server {} is not asked over plain http",
            authority(&url)
        )));
    }
    url.query_pairs_mut()
        .extend_pairs(service.map(|service| ("service", service)))
        .append_pair(
            "scope",
            &format!("repository:{}:{actions}", reference.repository()),
        );
    let account = match credentials {
        Credentials::Basic { username, password } => basic(username, password),
        _ => None,
    };
    let exchange = async {
        let response = transport
            .get(&url, None, 0, account.as_ref())
            .await
            .map_err(|failure| failure.error)?;
        if !response.status().is_success() {
            let status = response.status();
            let message = format!("token server: {}", transport::error_message(response).await);
            return Err(if transport::is_transient(status) {
                ImageError::Unavailable {
                    registry: authority(&url),
                    message,
                }
            } else {
                refused(message)
            });
        }
        transport::read_bounded(response, MAX_TOKEN_ANSWER)
            .await
            .map_err(|e| ImageError::Unavailable {
                registry: authority(&url),
                message: transport::chain(&e),
            })
    };
    let body = tokio::time::timeout(Duration::from_secs(30), exchange)
        .await
        .map_err(|_elapsed| ImageError::Unavailable {
            registry: authority(&url),
            message: "the token server did not answer within 30 s".to_owned(),
        })??;
    let answer: Option<TokenAnswer> = body.and_then(|body| serde_json::from_slice(&body).ok());
    let value = answer
        .and_then(|a| a.token.or(a.access_token))
        .and_then(|token| bearer(&token));
    value
        .map(Some)
        .ok_or_else(|| refused("the token server's answer holds no token".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<Challenge> {
        let mut headers = HeaderMap::new();
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_str(text).unwrap());
        challenges(&headers)
    }

    #[test]
    fn challenges_are_understood() {
        let text = r#"Bearer realm="https://auth.example/token",service="registry",scope="repository:a:pull,push""#;
        assert_eq!(
            parse(text),
            [Challenge::Bearer {
                realm: "https://auth.example/token".to_owned(),
                service: Some("registry".to_owned())
            }]
        );
        assert_eq!(parse(r#"Basic realm="x""#), [Challenge::Basic]);
        assert_eq!(parse("Negotiate"), []);
        assert_eq!(parse("\"\"\""), []);
    }

    #[test]
    fn secrets_are_marked() {
        assert!(basic("u", "p").unwrap().is_sensitive());
        assert!(bearer("a\nb").is_none());
    }
}
