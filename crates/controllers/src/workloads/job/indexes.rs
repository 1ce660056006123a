//! Sets of indexes, as a status writes them: `0-2,5`.

use std::collections::BTreeSet;

/// Some of a job's indexes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Indexes(BTreeSet<u64>);

impl Indexes {
    /// Reads `0-2,5`; what is no index below `end` is left out.
    pub(super) fn parse(text: &str, end: u64) -> Self {
        let mut out = BTreeSet::new();
        for part in text.split(',') {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(from), Ok(to)) = (from.parse::<u64>(), to.parse::<u64>()) {
                out.extend(from..=to.min(end.saturating_sub(1)));
            }
        }
        out.retain(|index| *index < end);
        Self(out)
    }

    pub(super) fn insert(&mut self, index: u64) {
        self.0.insert(index);
    }

    pub(super) fn contains(&self, index: u64) -> bool {
        self.0.contains(&index)
    }

    /// How many are in both.
    pub(super) fn common(&self, other: &Self) -> usize {
        self.0.intersection(&other.0).count()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl std::fmt::Display for Indexes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for index in &self.0 {
            match ranges.last_mut() {
                Some((_, end)) if *end + 1 == *index => *end = *index,
                _ => ranges.push((*index, *index)),
            }
        }
        let texts: Vec<String> = ranges
            .into_iter()
            .map(|(from, to)| match to - from {
                0 => from.to_string(),
                1 => format!("{from},{to}"),
                _ => format!("{from}-{to}"),
            })
            .collect();
        f.write_str(&texts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_written_in_ranges() {
        for text in ["", "0", "0,1", "0-2,5", "3-7"] {
            assert_eq!(Indexes::parse(text, 10).to_string(), text);
        }
        assert_eq!(Indexes::parse("0-99999999999,x,-", 3).to_string(), "0-2");
    }
}
