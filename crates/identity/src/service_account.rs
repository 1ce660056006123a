//! Service account tokens: JSON Web Tokens signed with the cluster's key (ES256).
//!
//! A token says whose it is and to which object it is bound; whether these still exist is for the
//! API server to see. The cryptography is ring's, as everywhere else.

use std::sync::Once;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    errors::{Error, ErrorKind},
};
use ring::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, UnparsedPublicKey,
    },
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use signature::{Signer, Verifier};

use crate::SigningKey;

/// Who signs the tokens of this cluster; also the audience of a token that names none.
pub const SERVICE_ACCOUNT_ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// A longer text is no token of ours.
const MAX_TOKEN: usize = 16 << 10;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenClaims {
    /// For whom it is.
    pub aud: Vec<String>,
    /// End of validity, in seconds since 1970.
    pub exp: i64,
    /// Time of issue.
    pub iat: i64,
    /// Beginning of validity.
    pub nbf: i64,
    /// Who signed it.
    pub iss: String,
    /// Unique id of this token.
    pub jti: String,
    /// User name: `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
    /// The account and what the token is bound to.
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: KubernetesClaims,
}

/// The account and what the token is bound to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesClaims {
    /// Namespace of the account.
    pub namespace: String,
    /// The account.
    pub serviceaccount: BoundObject,
    /// The pod without which the token is worth nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<BoundObject>,
    /// The secret without which the token is worth nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<BoundObject>,
    /// The node that the pod is on, or without which the token is worth nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<BoundObject>,
}

/// One object and no later one of the same name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundObject {
    /// Name.
    pub name: String,
    /// Unique id.
    #[serde(default)]
    pub uid: String,
}

/// A token that cannot be made, or that is not good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The key cannot sign.
    #[error("cannot sign a service account token")]
    Sign,
    /// Somebody else's token, or no token at all.
    #[error("not a token of this cluster")]
    Foreign,
    /// Altered, or unreadable.
    #[error("invalid bearer token")]
    Invalid,
    /// Past its end.
    #[error("service account token has expired")]
    Expired,
    /// Before its beginning.
    #[error("service account token is not valid yet")]
    NotYetValid,
}

/// Signs and verifies tokens.
#[derive(Clone)]
pub struct TokenKey {
    encoding: EncodingKey,
    decoding: DecodingKey,
    id: String,
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl TokenKey {
    /// Signs with this key.
    pub fn new(key: &SigningKey) -> Self {
        use_ring();
        Self {
            encoding: EncodingKey::from_ec_der(&key.pkcs8),
            decoding: DecodingKey::from_ec_der(&key.public),
            id: URL_SAFE_NO_PAD.encode(Sha256::digest(&key.public)),
        }
    }

    /// A token that says this.
    ///
    /// # Errors
    /// [`TokenError::Sign`].
    pub fn sign(&self, claims: &TokenClaims) -> Result<String, TokenError> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.id.clone());
        header.typ = None;
        jsonwebtoken::encode(&header, claims, &self.encoding).map_err(|_error| TokenError::Sign)
    }

    /// What a token says, if this key has signed it and it is valid now (seconds since 1970).
    ///
    /// # Errors
    /// [`TokenError::Foreign`] if it does not even claim to come from this cluster; others if it
    /// does and is not good.
    pub fn verify(&self, token: &str, now: i64) -> Result<TokenClaims, TokenError> {
        if issuer(token).as_deref() != Some(SERVICE_ACCOUNT_ISSUER) {
            return Err(TokenError::Foreign);
        }
        // Times and audiences are compared below and by the caller: with the server's own clock.
        let mut validation = Validation::new(Algorithm::ES256);
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let data = jsonwebtoken::decode::<TokenClaims>(token, &self.decoding, &validation)
            .map_err(|_error| TokenError::Invalid)?;
        let claims = data.claims;
        if claims.iss != SERVICE_ACCOUNT_ISSUER {
            return Err(TokenError::Invalid);
        }
        if now >= claims.exp {
            return Err(TokenError::Expired);
        }
        if now < claims.nbf {
            return Err(TokenError::NotYetValid);
        }
        Ok(claims)
    }
}

/// Who a token says has signed it. Nothing of it is believed yet.
fn issuer(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Issuer {
        iss: String,
    }

    if token.len() > MAX_TOKEN {
        return None;
    }
    let mut parts = token.split('.');
    let (_header, claims, _signature) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let claims = URL_SAFE_NO_PAD.decode(claims).ok()?;
    Some(serde_json::from_slice::<Issuer>(&claims).ok()?.iss)
}

// === ring below jsonwebtoken ===

struct Signing(EcdsaKeyPair);
struct Verifying(Vec<u8>);

impl Signer<Vec<u8>> for Signing {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        let signature = self.0.sign(&SystemRandom::new(), message);
        signature
            .map(|signature| signature.as_ref().to_vec())
            .map_err(|_unspecified| signature::Error::new())
    }
}

impl JwtSigner for Signing {
    fn algorithm(&self) -> Algorithm {
        Algorithm::ES256
    }
}

impl Verifier<Vec<u8>> for Verifying {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.0)
            .verify(message, signature)
            .map_err(|_unspecified| signature::Error::new())
    }
}

impl JwtVerifier for Verifying {
    fn algorithm(&self) -> Algorithm {
        Algorithm::ES256
    }
}

fn only(algorithm: &Algorithm) -> Result<(), Error> {
    match algorithm {
        Algorithm::ES256 => Ok(()),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

static RING: CryptoProvider = CryptoProvider {
    signer_factory: |algorithm, key| {
        only(algorithm)?;
        let pair = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            key.as_bytes(),
            &SystemRandom::new(),
        )
        .map_err(|_rejected| Error::from(ErrorKind::InvalidEcdsaKey))?;
        Ok(Box::new(Signing(pair)))
    },
    verifier_factory: |algorithm, key| {
        only(algorithm)?;
        Ok(Box::new(Verifying(key.try_get_as_bytes()?.to_vec())))
    },
    key_utils: KeyUtils::new_unimplemented(),
};

fn use_ring() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Nobody else in this program uses the crate: there is no other choice to be kept.
        if RING.install_default().is_err() {
            debug_assert!(false, "another provider is installed");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> TokenClaims {
        TokenClaims {
            aud: vec![SERVICE_ACCOUNT_ISSUER.into()],
            exp: 2000,
            iat: 1000,
            nbf: 1000,
            iss: SERVICE_ACCOUNT_ISSUER.into(),
            jti: "1".into(),
            sub: "system:serviceaccount:a:b".into(),
            kubernetes: KubernetesClaims {
                namespace: "a".into(),
                serviceaccount: BoundObject {
                    name: "b".into(),
                    uid: "u".into(),
                },
                ..KubernetesClaims::default()
            },
        }
    }

    #[test]
    fn a_token_is_read_back_while_it_is_valid() {
        let key = TokenKey::new(&SigningKey::ephemeral().unwrap());
        let token = key.sign(&claims()).unwrap();
        assert_eq!(key.verify(&token, 1500).unwrap(), claims());
        assert_eq!(key.verify(&token, 2000).unwrap_err(), TokenError::Expired);
        assert_eq!(
            key.verify(&token, 999).unwrap_err(),
            TokenError::NotYetValid
        );
    }

    #[test]
    fn another_key_or_another_text_is_not_believed() {
        let key = TokenKey::new(&SigningKey::ephemeral().unwrap());
        let other = TokenKey::new(&SigningKey::ephemeral().unwrap());
        let token = other.sign(&claims()).unwrap();
        assert_eq!(key.verify(&token, 1500).unwrap_err(), TokenError::Invalid);

        let token = key.sign(&claims()).unwrap();
        let parts: Vec<&str> = token.split('.').collect();
        let mut more = claims();
        more.sub = "system:serviceaccount:a:admin".into();
        let altered = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&more).unwrap());
        let altered = format!("{}.{altered}.{}", parts[0], parts[2]);
        assert_eq!(key.verify(&altered, 1500).unwrap_err(), TokenError::Invalid);

        let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
        let unsigned = format!("{none}.{}.", parts[1]);
        assert_eq!(
            key.verify(&unsigned, 1500).unwrap_err(),
            TokenError::Invalid
        );
    }

    #[test]
    fn foreign_tokens_are_told_from_bad_ones() {
        let key = TokenKey::new(&SigningKey::ephemeral().unwrap());
        let mut foreign = claims();
        foreign.iss = "https://elsewhere".into();
        let token = key.sign(&foreign).unwrap();
        for token in [token.as_str(), "", "a", "a.b.c", "a.b.c.d"] {
            assert_eq!(key.verify(token, 1500).unwrap_err(), TokenError::Foreign);
        }
    }
}
