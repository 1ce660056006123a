//! `--filter KEY=VALUE`: values of one key are alternatives, keys must all hold.

use std::collections::BTreeMap;

use crate::error::{Failure, Result};

/// The filters of one command.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filters(BTreeMap<String, Vec<String>>);

/// A filter as the command line takes it.
pub(crate) fn well_formed(text: &str) -> std::result::Result<String, String> {
    match text.split_once('=') {
        Some(_) => Ok(text.to_owned()),
        None => Err("bad format of filter (expected name=value)".to_owned()),
    }
}

impl Filters {
    /// Parses filters; a key that is not one of `known` is refused.
    pub(crate) fn parse(given: &[String], known: &[&str]) -> Result<Self> {
        let mut filters = BTreeMap::<String, Vec<String>>::new();
        for text in given {
            let Some((key, value)) = text.split_once('=') else {
                return Err(Failure::usage(well_formed(text).err().unwrap_or_default()));
            };
            let key = key.trim().to_ascii_lowercase();
            if !known.contains(&key.as_str()) {
                return Err(Failure::daemon(format_args!("invalid filter '{key}'")));
            }
            filters
                .entry(key)
                .or_default()
                .push(value.trim().to_owned());
        }
        Ok(Self(filters))
    }

    /// The values of a key, empty if it was not given.
    pub(crate) fn values(&self, key: &str) -> &[String] {
        self.0.get(key).map(Vec::as_slice).unwrap_or_default()
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// True if the key was not given, or one of its values holds.
    pub(crate) fn any(&self, key: &str, holds: impl Fn(&str) -> bool) -> bool {
        let values = self.values(key);
        values.is_empty() || values.iter().any(|value| holds(value))
    }

    /// `key` or `key=value` among labels; every one that was given must be there.
    pub(crate) fn labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key)
            .iter()
            .all(|wanted| match wanted.split_once('=') {
                Some((name, value)) => labels.get(name).is_some_and(|is| is == value),
                None => labels.contains_key(wanted),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_parsed_and_checked() {
        let given = ["status=running", "status=exited", "label=a=b"].map(str::to_owned);
        let filters = Filters::parse(&given, &["status", "label"]).unwrap();
        assert!(filters.any("status", |value| value == "exited"));
        assert!(!filters.any("status", |value| value == "paused"));
        assert!(filters.any("name", |_| false), "not given");
        assert!(filters.labels("label", &BTreeMap::from([("a".into(), "b".into())])));
        assert!(!filters.labels("label", &BTreeMap::from([("a".into(), "c".into())])));
        let error = Filters::parse(&["x=y".to_owned()], &["status"]).unwrap_err();
        assert_eq!(
            error.message,
            "Error response from daemon: invalid filter 'x'"
        );
        assert_eq!(
            Filters::parse(&["x".to_owned()], &["x"]).unwrap_err().code,
            125
        );
    }
}
