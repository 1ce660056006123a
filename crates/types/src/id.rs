//! Identifiers. Each is a newtype that cannot hold an invalid value.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A text that is not a valid identifier of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {kind} {value:?}: {rule}")]
pub struct IdError {
    kind: &'static str,
    value: String,
    rule: &'static str,
}

const HEX_RULE: &str = "must be 32 lower-case hexadecimal digits";
const LABEL_RULE: &str = "must be 1 to 63 characters of a-z, 0-9 and '-', starting and ending \
                          with a letter or digit (RFC 1123 label)";
const NAME_RULE: &str = "must be 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-', starting with a letter or digit";

fn is_hex(value: &str) -> bool {
    value.len() == 32
        && value
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_label(value: &str) -> bool {
    let bytes = value.as_bytes();
    let edge = |b: Option<&u8>| matches!(b, Some(b'a'..=b'z' | b'0'..=b'9'));
    (1..=63).contains(&bytes.len())
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes
            .iter()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

fn is_name(value: &str) -> bool {
    (1..=64).contains(&value.len())
        && value.as_bytes()[0].is_ascii_alphanumeric()
        && value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $check:ident, $rule:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(value: &str) -> Result<Self, IdError> {
                Self::try_from(value.to_owned())
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(value: String) -> Result<Self, IdError> {
                if $check(&value) {
                    Ok(Self(value))
                } else {
                    Err(IdError { kind: $kind, value, rule: $rule })
                }
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

id!(
    /// One pod sandbox on this node: 32 hexadecimal digits, made by the runtime.
    SandboxId, "sandbox id", is_hex, HEX_RULE
);
id!(
    /// One container of a sandbox: 32 hexadecimal digits, made by the runtime.
    ContainerId, "container id", is_hex, HEX_RULE
);
id!(
    /// One snapshot of a pod on this node: 32 hexadecimal digits, those of the uid of who owns it.
    SnapshotId, "snapshot id", is_hex, HEX_RULE
);
id!(
    /// One process started in a running container beside its first one.
    ExecId, "exec id", is_hex, HEX_RULE
);
id!(
    /// A tenant: an RFC 1123 label, as it becomes a namespace's name.
    TenantName, "tenant name", is_label, LABEL_RULE
);
id!(
    /// A tenant network on this node: `<namespace>.<name>` or any other name of 1 to 64 characters.
    NetworkId, "network id", is_name, NAME_RULE
);
id!(
    /// The name under which a guest kernel is imported.
    KernelName, "kernel name", is_name, NAME_RULE
);

macro_rules! random {
    ($($name:ident),*) => {$(
        impl $name {
            /// A new, random identifier (122 bits).
            pub fn random() -> Self {
                Self(uuid::Uuid::new_v4().simple().to_string())
            }
        }
    )*};
}
random!(SandboxId, ContainerId, SnapshotId, ExecId);

impl SandboxId {
    /// The first 10 digits, for names that the kernel limits to 15 bytes (links).
    pub fn short(&self) -> &str {
        &self.0[..10]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_are_valid_and_distinct() {
        let (a, b) = (SandboxId::random(), SandboxId::random());
        assert_ne!(a, b);
        assert_eq!(a.as_str().parse::<SandboxId>(), Ok(a));
    }

    #[test]
    fn tenant_names_are_labels() {
        for good in ["a", "acme", "a-1", &"x".repeat(63)] {
            assert!(good.parse::<TenantName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "../x", &"x".repeat(64)] {
            assert!(bad.parse::<TenantName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn error_names_kind_value_and_rule() {
        let error = "Acme".parse::<TenantName>().unwrap_err().to_string();
        assert!(
            error.starts_with("invalid tenant name \"Acme\": must be 1 to 63"),
            "{error}"
        );
    }
}
