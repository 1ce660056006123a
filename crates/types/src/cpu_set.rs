//! Sets of CPUs or memory nodes in the kernel's list format: `0-3,7` (cpuset(7)).

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Numbers are below this: no kernel for x86-64 has more.
const MAX: u32 = 8192;

/// A set of CPUs, or of memory nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSet(BTreeSet<u32>);

/// A text that is no such list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no list of numbers and ranges below {MAX} such as 0-3,7")]
pub struct CpuSetError(String);

impl CpuSet {
    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Its numbers, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// Whether all of it is in the other.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }

    /// What is in it and not in the other.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }

    /// Adds the other.
    pub fn extend(&mut self, other: &Self) {
        self.0.extend(&other.0);
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(numbers: I) -> Self {
        Self(numbers.into_iter().collect())
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    /// The empty text is the empty set.
    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        parse(text).ok_or_else(|| CpuSetError(text.chars().take(64).collect()))
    }
}

fn parse(text: &str) -> Option<CpuSet> {
    let number = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse::<u32>().ok().filter(|_| plain);
        number.filter(|number| *number < MAX)
    };
    let mut set = BTreeSet::new();
    if text.is_empty() {
        return Some(CpuSet(set));
    }
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return None;
        }
        set.extend(first..=last);
    }
    Some(CpuSet(set))
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while let Some(next) = numbers.next_if(|next| *next == last + 1) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

impl TryFrom<String> for CpuSet {
    type Error = CpuSetError;

    fn try_from(text: String) -> Result<Self, CpuSetError> {
        text.parse()
    }
}

impl From<CpuSet> for String {
    fn from(set: CpuSet) -> Self {
        set.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for (text, shown) in [
            ("", ""),
            ("0", "0"),
            ("0-3,7", "0-3,7"),
            ("7,0,2,1", "0-2,7"),
            ("1-1,3-4,4-6", "1,3-6"),
            ("8191", "8191"),
        ] {
            assert_eq!(text.parse::<CpuSet>().unwrap().to_string(), shown, "{text}");
        }
        for bad in [
            ",", "1,", "3-1", "1-", "-1", "a", "1 2", " 1", "1\n", "+1", "0x1", "8192", "1-2-3",
            "0-7:1/2",
        ] {
            assert!(bad.parse::<CpuSet>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sets_are_compared_and_joined() {
        let set = |text: &str| text.parse::<CpuSet>().unwrap();
        assert!(set("1,3").is_subset(&set("0-3")) && !set("1,4").is_subset(&set("0-3")));
        assert_eq!(set("1,4-6").without(&set("0-4")), set("5-6"));
        let mut all = set("0");
        all.extend(&set("2-3"));
        assert_eq!(all, set("0,2-3"));
    }
}
