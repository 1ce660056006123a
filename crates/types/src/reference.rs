//! Image references, in the grammar of the distribution reference package that Docker users know.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::Digest;

/// A text that is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid image reference {value:?}: {rule}")]
pub struct ReferenceError {
    value: String,
    rule: &'static str,
}

/// `[registry/]repository[:tag][@digest]`, normalized: the registry defaults to `docker.io`, a
/// single-part repository there to `library/…`, the tag to `latest` when there is no digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl ImageReference {
    /// Host and optional port of the registry.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Repository path inside the registry, without leading slash.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; absent only when a digest is there.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest that pins the manifest, if the reference names one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Host of the registry without its port (brackets of an IPv6 literal removed).
    pub fn registry_host(&self) -> &str {
        if let Some(rest) = self.registry.strip_prefix('[') {
            return rest.split(']').next().unwrap_or(rest);
        }
        self.registry.split(':').next().unwrap_or(&self.registry)
    }

    /// Name of the object of kind Image that stands for this reference in a namespace: what is readable
    /// of it, and a sum that tells apart what reads the same.
    pub fn object_name(&self) -> String {
        let text = self.to_string();
        // FNV-1a, 64 bits. Who makes two names collide is told so, and has only its own names.
        let sum = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
            (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut name = String::new();
        for c in text.chars().take(200) {
            if c.is_ascii_alphanumeric() {
                name.push(c.to_ascii_lowercase());
            } else if !name.ends_with('-') && !name.is_empty() {
                name.push('-');
            }
        }
        format!("{}-{sum:016x}", name.trim_end_matches('-'))
    }

    /// The same repository, pinned to `digest` and without a tag.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }
}

fn is_domain(text: &str) -> bool {
    text.contains('.') || text.contains(':') || text == "localhost"
}

fn valid_domain(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']'))
}

fn valid_component(part: &str) -> bool {
    let alnum = |b: Option<&u8>| b.is_some_and(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9'));
    let bytes = part.as_bytes();
    alnum(bytes.first())
        && alnum(bytes.last())
        && bytes
            .iter()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
        && !part.contains("..")
}

fn valid_tag(tag: &str) -> bool {
    (1..=128).contains(&tag.len())
        && !matches!(tag.as_bytes()[0], b'.' | b'-')
        && tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl FromStr for ImageReference {
    type Err = ReferenceError;

    fn from_str(value: &str) -> Result<Self, ReferenceError> {
        let fail = |rule| ReferenceError {
            value: value.chars().take(256).collect(),
            rule,
        };
        if value.len() > 512 {
            return Err(fail("must be at most 512 characters"));
        }
        let (rest, digest) = match value.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|_wrong: crate::DigestError| {
                    fail("the digest must be sha256:<64 hex>")
                })?;
                (rest, Some(digest))
            }
            None => (value, None),
        };
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !valid_tag(tag)) {
            return Err(fail(
                "the tag must be 1 to 128 characters of A-Z, a-z, 0-9, '_', '.', '-'",
            ));
        }
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if is_domain(first) => (first, path.to_owned()),
            _ => ("docker.io", rest.to_owned()),
        };
        if !valid_domain(registry) {
            return Err(fail(
                "the registry must be a host name with an optional port",
            ));
        }
        if !path.split('/').all(valid_component) {
            return Err(fail("the repository must be lower-case path components"));
        }
        let registry = if registry == "index.docker.io" {
            "docker.io"
        } else {
            registry
        };
        let repository = if registry == "docker.io" && !path.contains('/') {
            format!("library/{path}")
        } else {
            path
        };
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            tag,
            digest,
        })
    }
}

impl TryFrom<String> for ImageReference {
    type Error = ReferenceError;

    fn try_from(value: String) -> Result<Self, ReferenceError> {
        value.parse()
    }
}

impl From<ImageReference> for String {
    fn from(reference: ImageReference) -> String {
        reference.to_string()
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_normalized_as_docker_does() {
        for (short, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("acme/web:1", "docker.io/acme/web:1"),
            ("127.0.0.1:5000/web", "127.0.0.1:5000/web:latest"),
            ("localhost/web", "localhost/web:latest"),
            ("[::1]:5000/web:2", "[::1]:5000/web:2"),
        ] {
            assert_eq!(short.parse::<ImageReference>().unwrap().to_string(), full);
        }
    }

    #[test]
    fn names_of_objects_are_subdomains_and_tell_apart() {
        let name = |text: &str| text.parse::<ImageReference>().unwrap().object_name();
        let names: Vec<String> = [
            "busybox",
            "busybox:Latest",
            "127.0.0.1:5000/a-b:v1",
            "127.0.0.1:5000/a.b:v1",
            "[::1]:5000/a_b:_1",
        ]
        .map(name)
        .into();
        assert!(names[0].starts_with("docker-io-library-busybox-latest-"));
        assert_eq!(name("busybox"), name("docker.io/library/busybox:latest"));
        for (at, one) in names.iter().enumerate() {
            assert!(!names[..at].contains(one));
            assert!(one.len() <= 253 && !one.starts_with('-'));
            assert!(one.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'));
        }
    }

    #[test]
    fn a_digest_needs_no_tag() {
        let text = format!("registry.example/a/b@sha256:{}", "0".repeat(64));
        let reference: ImageReference = text.parse().unwrap();
        assert_eq!(reference.tag(), None);
        assert_eq!(reference.to_string(), text);
    }

    #[test]
    fn refuses_paths_and_upper_case() {
        for bad in [
            "",
            "/",
            "a//b",
            "../etc",
            "A/b",
            "a:",
            "a@sha256:12",
            "x.y/../z",
            "a/..",
        ] {
            assert!(bad.parse::<ImageReference>().is_err(), "{bad}");
        }
    }

    #[test]
    fn host_is_told_apart_from_port() {
        let host = |text: &str| {
            text.parse::<ImageReference>()
                .unwrap()
                .registry_host()
                .to_owned()
        };
        assert_eq!(host("127.0.0.1:5000/a"), "127.0.0.1");
        assert_eq!(host("[::1]:5000/a"), "::1");
    }
}
