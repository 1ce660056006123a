//! Huge pages: the kernel's pools hold what the containers were promised, and no more.
//!
//! A pool grows before a container is made and shrinks when it is gone; pages still in use then
//! leave the pool with their last user. The pages are the VM's memory: what a pool holds no
//! program gets otherwise.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::PathBuf,
};

use hypernetes_agent_api::v1;
use hypernetes_types::PageSize;

use crate::{
    disks::blocking,
    error::{Attempt, GuestError},
};

const POOLS: &str = "/sys/kernel/mm/hugepages";
/// Most sizes that one container may name.
const MAX_SIZES: usize = 8;

/// Pages by their size in KiB.
type Pages = BTreeMap<u64, u64>;

/// What each container was promised.
#[derive(Debug, Default)]
pub(crate) struct HugePages(tokio::sync::Mutex<HashMap<String, Pages>>);

/// Limits in bytes by the size's name. A size that is named twice, or is none, is refused.
pub(crate) fn limits(asked: &[v1::HugePageLimit]) -> Result<BTreeMap<String, u64>, GuestError> {
    if asked.len() > MAX_SIZES {
        return Err(GuestError::Invalid(format!(
            "more than {MAX_SIZES} sizes of huge pages"
        )));
    }
    let mut limits = BTreeMap::new();
    for v1::HugePageLimit { page_size, limit } in asked {
        let size = page_size.parse::<PageSize>();
        let size = size.map_err(|error| GuestError::Invalid(error.to_string()))?;
        if limit % size.bytes() != 0 {
            return Err(GuestError::Invalid(format!(
                "{limit} bytes are no whole number of pages of {page_size}"
            )));
        }
        if limits.insert(page_size.clone(), *limit).is_some() {
            return Err(GuestError::Invalid(format!(
                "huge pages of {page_size} are limited twice"
            )));
        }
    }
    Ok(limits)
}

impl HugePages {
    /// Has the pools hold what a container is promised, instead of what it was before. On an error
    /// they are as they were.
    pub(crate) async fn promise(
        &self,
        container: &str,
        limits: &BTreeMap<String, u64>,
    ) -> Result<(), GuestError> {
        let wanted: Pages = limits
            .iter()
            .filter(|(_, bytes)| **bytes > 0)
            .filter_map(|(name, bytes)| {
                let size: PageSize = name.parse().ok()?;
                Some((size.kib(), bytes / size.bytes()))
            })
            .collect();
        let mut promised = self.0.lock().await;
        if wanted == promised.get(container).cloned().unwrap_or_default() {
            return Ok(());
        }
        let before = total(&promised);
        let old = promised.insert(container.to_owned(), wanted);
        let after = total(&promised);
        let result = blocking(move || Ok(fill(&before, &after))).await;
        let result = result.attempt("change a pool of huge pages").flatten();
        if result.is_err() {
            match old {
                Some(old) => promised.insert(container.to_owned(), old),
                None => promised.remove(container),
            };
        }
        result
    }

    /// Takes back what a container was promised.
    pub(crate) async fn release(&self, container: &str) {
        drop(self.promise(container, &BTreeMap::new()).await);
        self.0.lock().await.remove(container);
    }
}

fn total(promised: &HashMap<String, Pages>) -> Pages {
    let mut sum = Pages::new();
    for (kib, pages) in promised.values().flatten() {
        let all: &mut u64 = sum.entry(*kib).or_default();
        *all = all.saturating_add(*pages);
    }
    sum
}

fn pool(kib: u64) -> PathBuf {
    PathBuf::from(format!("{POOLS}/hugepages-{kib}kB/nr_hugepages"))
}

/// Sets every pool that changes, or none.
fn fill(before: &Pages, after: &Pages) -> Result<(), GuestError> {
    let sizes: BTreeSet<u64> = before.keys().chain(after.keys()).copied().collect();
    let of = |pages: &Pages, kib: u64| pages.get(&kib).copied().unwrap_or_default();
    for kib in &sizes {
        if let Err(error) = set(*kib, of(after, *kib)) {
            for kib in sizes.range(..=*kib) {
                // It was so a moment ago, and less is always to be had.
                drop(set(*kib, of(before, *kib)));
            }
            return Err(error);
        }
    }
    Ok(())
}

fn set(kib: u64, wanted: u64) -> Result<(), GuestError> {
    let pool = pool(kib);
    let attempt = "change a pool of huge pages";
    match fs::write(&pool, wanted.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(GuestError::Invalid(format!(
                "this guest's kernel has no huge pages of {kib} KiB"
            )));
        }
        other => other.attempt(attempt)?,
    }
    let text = fs::read_to_string(&pool).attempt(attempt)?;
    let there: u64 = text.trim().parse().unwrap_or(0);
    // More is what is still in use.
    if there < wanted {
        return Err(GuestError::Exhausted(format!(
            "the VM's memory has room for {there} huge pages of {kib} KiB, not for the {wanted} that \
             the pod's containers ask for"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_whole_pages_of_sizes_named_once() {
        let asked = |page_size: &str, limit| v1::HugePageLimit {
            page_size: page_size.into(),
            limit,
        };
        let good = limits(&[asked("2MB", 4 << 20), asked("1GB", 0)]).unwrap();
        assert_eq!(
            good,
            [("2MB".to_owned(), 4 << 20), ("1GB".to_owned(), 0)].into()
        );
        for bad in [
            vec![asked("2MB", 1)],
            vec![asked("2Mi", 2 << 20)],
            vec![asked("2MB", 0), asked("2MB", 0)],
            vec![asked("2MB", 0); 9],
        ] {
            assert!(
                matches!(limits(&bad), Err(GuestError::Invalid(_))),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn promises_add_up() {
        let promised = HashMap::from([
            ("a".to_owned(), Pages::from([(2048, 3)])),
            ("b".to_owned(), Pages::from([(2048, 1), (1 << 20, 1)])),
        ]);
        assert_eq!(total(&promised), Pages::from([(2048, 4), (1 << 20, 1)]));
    }
}
