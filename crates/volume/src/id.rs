//! Names of volumes.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::VolumeError;

const RULE: &str = "must be 1 to 63 characters of a-z, 0-9 and '-', starting and ending with a \
                    letter or digit (RFC 1123 label)";

/// Name of a volume: an RFC 1123 label. It is a file name too, and never one of a driver's own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

impl VolumeId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VolumeId {
    type Error = VolumeError;

    fn try_from(value: String) -> Result<Self, VolumeError> {
        let plain = |c: u8| matches!(c, b'a'..=b'z' | b'0'..=b'9');
        let bytes = value.as_bytes();
        let edges = [bytes.first(), bytes.last()];
        if bytes.len() <= 63
            && edges.iter().all(|edge| edge.is_some_and(|c| plain(*c)))
            && bytes.iter().all(|c| plain(*c) || *c == b'-')
        {
            return Ok(Self(value));
        }
        Err(VolumeError::Invalid {
            field: "volume name",
            rule: format!("{RULE}, not {value:?}"),
        })
    }
}

impl FromStr for VolumeId {
    type Err = VolumeError;

    fn from_str(value: &str) -> Result<Self, VolumeError> {
        Self::try_from(value.to_owned())
    }
}

impl From<VolumeId> for String {
    fn from(id: VolumeId) -> Self {
        id.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels() {
        for good in ["a", "pvc-0123-abcd", &"x".repeat(63)] {
            assert_eq!(good.parse::<VolumeId>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "-a",
            "a-",
            ".new-a",
            "..",
            "a/b",
            "A",
            "a.b",
            "a\0",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad:?}");
        }
    }
}
