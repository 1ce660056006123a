//! Limits of a pod's network traffic, as Kubernetes' annotations ask for them.

use serde::{Deserialize, Serialize};

use crate::{Quantity, QuantityError};

/// What a pod receives, in bits per second.
pub const INGRESS_BANDWIDTH_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";
/// What a pod sends, in bits per second.
pub const EGRESS_BANDWIDTH_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";

/// Least and most bits per second, as upstream has them.
const LEAST: u64 = 1_000;
const MOST: u64 = 1_000_000_000_000_000;

/// Most that a pod receives and sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bandwidth {
    /// To the pod, in bits per second; `None` = no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress_bps: Option<u64>,
    /// From the pod, in bits per second; `None` = no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_bps: Option<u64>,
}

/// An annotation that is no bandwidth.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct BandwidthError {
    /// Key of the annotation.
    pub annotation: &'static str,
    problem: Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Problem {
    #[error("{0}")]
    Quantity(QuantityError),
    #[error("is unreasonably small (< 1kbit): must be 1k to 1P bits per second")]
    Small,
    #[error("is unreasonably large (> 1Pbit): must be 1k to 1P bits per second")]
    Large,
}

impl Bandwidth {
    /// What a pod's annotations ask for; `annotation` gives the value of a key.
    ///
    /// # Errors
    /// If a value is no quantity of 1k to 1P.
    pub fn read<'a>(annotation: impl Fn(&str) -> Option<&'a str>) -> Result<Self, BandwidthError> {
        let limit = |key| annotation(key).map(|text| parse(key, text)).transpose();
        Ok(Self {
            ingress_bps: limit(INGRESS_BANDWIDTH_ANNOTATION)?,
            egress_bps: limit(EGRESS_BANDWIDTH_ANNOTATION)?,
        })
    }

    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        self.ingress_bps.or(self.egress_bps).is_some()
    }
}

fn parse(annotation: &'static str, text: &str) -> Result<u64, BandwidthError> {
    let invalid = |problem| BandwidthError {
        annotation,
        problem,
    };
    let quantity: Quantity = text
        .parse()
        .map_err(|error| invalid(Problem::Quantity(error)))?;
    match u64::try_from(quantity.value()) {
        Ok(bits) if bits > MOST => Err(invalid(Problem::Large)),
        Ok(bits) if bits >= LEAST => Ok(bits),
        _ => Err(invalid(Problem::Small)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ingress(text: &str) -> Result<Option<u64>, BandwidthError> {
        let only = |key: &str| (key == INGRESS_BANDWIDTH_ANNOTATION).then_some(text);
        let bandwidth = Bandwidth::read(only)?;
        assert_eq!(bandwidth.egress_bps, None);
        Ok(bandwidth.ingress_bps)
    }

    #[test]
    fn bits_per_second_by_kubernetes_suffixes() {
        assert_eq!(ingress("10M"), Ok(Some(10_000_000)));
        assert_eq!(ingress("1Mi"), Ok(Some(1 << 20)));
        assert_eq!(ingress("1k"), Ok(Some(LEAST)));
        assert_eq!(ingress("1P"), Ok(Some(MOST)));
        assert_eq!(Bandwidth::read(|_key| None), Ok(Bandwidth::default()));
        assert!(!Bandwidth::default().is_limited());
        assert!(Bandwidth::read(|_key| Some("1M")).unwrap().is_limited());
    }

    #[test]
    fn what_cannot_be_says_where_and_why() {
        for (text, why) in [
            ("999", "unreasonably small"),
            ("0", "unreasonably small"),
            ("-1M", "unreasonably small"),
            ("2P", "unreasonably large"),
            ("10Mbit", "invalid quantity"),
            ("", "invalid quantity"),
        ] {
            let error = ingress(text).unwrap_err();
            assert_eq!(error.annotation, INGRESS_BANDWIDTH_ANNOTATION);
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }
}
