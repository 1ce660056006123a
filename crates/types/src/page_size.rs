//! Sizes of huge pages, by the kernel's names and by Kubernetes'.

use std::{fmt, str::FromStr};

use crate::Quantity;

/// A size of huge pages: a power of two of at least 1 KiB.
///
/// Displayed and parsed as in the names of the kernel's cgroup files: `2MB`, `1GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize {
    shift: u32,
}

/// A text or number that is no size of huge pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no size of huge pages: it must be as {1}")]
pub struct PageSizeError(String, &'static str);

impl PageSizeError {
    fn new(text: &str, example: &'static str) -> Self {
        Self(text.chars().take(64).collect(), example)
    }
}

impl PageSize {
    /// The size of so many bytes, if there can be such pages.
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        let possible = bytes.is_power_of_two() && bytes >= 1 << 10;
        possible.then(|| Self {
            shift: bytes.trailing_zeros(),
        })
    }

    /// The size in a name of Kubernetes': the `2Mi` of the resource `hugepages-2Mi` and of the medium
    /// `HugePages-2Mi`.
    ///
    /// # Errors
    /// If it is no quantity, or none that a page can have.
    pub fn from_quantity(text: &str) -> Result<Self, PageSizeError> {
        let bytes = text.parse::<Quantity>().ok();
        bytes
            .and_then(|bytes| u64::try_from(bytes.value()).ok())
            .and_then(Self::from_bytes)
            .ok_or_else(|| PageSizeError::new(text, "2Mi"))
    }

    /// Bytes of a page.
    pub fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// KiB of a page.
    pub fn kib(self) -> u64 {
        self.bytes() >> 10
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shift, unit) = match self.shift {
            30.. => (30, "GB"),
            20.. => (20, "MB"),
            _ => (10, "KB"),
        };
        write!(f, "{}{unit}", self.bytes() >> shift)
    }
}

impl FromStr for PageSize {
    type Err = PageSizeError;

    fn from_str(text: &str) -> Result<Self, PageSizeError> {
        let units = [("KB", 10), ("MB", 20), ("GB", 30)];
        let found = units.iter().find_map(|(unit, shift)| {
            let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
            Self::from_bytes(number.checked_mul(1 << *shift)?)
        });
        // Each size has one name.
        found
            .filter(|size| size.to_string() == text)
            .ok_or_else(|| PageSizeError::new(text, "2MB"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_kernel_s_names() {
        for (name, bytes) in [("64KB", 64 << 10), ("2MB", 2 << 20), ("1GB", 1 << 30)] {
            let size: PageSize = name.parse().unwrap();
            assert_eq!((size.bytes(), size.kib()), (bytes, bytes >> 10));
            assert_eq!(PageSize::from_bytes(bytes), Some(size));
            assert_eq!(size.to_string(), name);
        }
        for bad in [
            "",
            "MB",
            "2",
            "2M",
            "2Mi",
            "+2MB",
            "-2MB",
            "02MB",
            "1024KB",
            "0KB",
            "3MB",
            "2 MB",
            "18446744073709551615GB",
        ] {
            assert!(bad.parse::<PageSize>().is_err(), "{bad:?}");
        }
        assert_eq!(PageSize::from_bytes(0), None);
        assert_eq!(PageSize::from_bytes(512), None);
    }

    #[test]
    fn and_quantities_in_kubernetes() {
        for (name, size) in [
            ("2Mi", "2MB"),
            ("1Gi", "1GB"),
            ("64Ki", "64KB"),
            ("2048Ki", "2MB"),
        ] {
            assert_eq!(PageSize::from_quantity(name).unwrap().to_string(), size);
        }
        for bad in ["", "2MB", "3Mi", "0", "-2Mi", "1m"] {
            assert!(PageSize::from_quantity(bad).is_err(), "{bad:?}");
        }
    }
}
