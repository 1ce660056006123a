//! The versions of one key. The newest value is there as it is; superseded ones, which are rarely asked for, are
//! kept compressed.

use bytes::Bytes;

use crate::{Entry, Revision};

/// Shorter values are kept as they are.
const SMALL: usize = 512;
/// The fastest: superseded values are compressed on the way of every write.
const LEVEL: i32 = 1;

/// A value in memory.
#[derive(Debug, Clone)]
pub(crate) enum Held {
    Plain(Bytes),
    Packed { bytes: Box<[u8]>, length: usize },
}

impl Held {
    pub(crate) fn get(&self) -> Bytes {
        match self {
            Self::Plain(bytes) => bytes.clone(),
            Self::Packed { bytes, length } => zstd::bulk::decompress(bytes, *length)
                .expect("what was compressed in this process can be decompressed")
                .into(),
        }
    }

    /// The value compressed, if that makes it smaller.
    pub(crate) fn pack(value: &Bytes, compressor: &mut Compressor) -> Option<Self> {
        if value.len() < SMALL {
            return None;
        }
        let packed = compressor.0.as_mut()?.compress(value).ok()?;
        (packed.len() < value.len() / 4 * 3).then(|| Self::Packed {
            bytes: packed.into_boxed_slice(),
            length: value.len(),
        })
    }
}

/// Compresses values one after the other; without memory for its tables it leaves them as they are.
pub(crate) struct Compressor(Option<zstd::bulk::Compressor<'static>>);

impl Compressor {
    pub(crate) fn new() -> Self {
        Self(zstd::bulk::Compressor::new(LEVEL).ok())
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

/// One value of a key; no value is a deletion.
#[derive(Debug, Clone)]
pub(crate) struct Version {
    pub(crate) create: Revision,
    pub(crate) revision: Revision,
    pub(crate) value: Option<Held>,
}

impl Version {
    pub(crate) fn new(create: Revision, revision: Revision, value: Option<Bytes>) -> Self {
        Self {
            create,
            revision,
            value: value.map(Held::Plain),
        }
    }

    pub(crate) fn value(&self) -> Option<Bytes> {
        self.value.as_ref().map(Held::get)
    }

    pub(crate) fn entry(&self, key: &str) -> Option<Entry> {
        Some(Entry {
            key: key.to_owned(),
            value: self.value()?,
            create_revision: self.create,
            mod_revision: self.revision,
        })
    }
}

/// Versions of one key, oldest first. Nearly all keys have one.
#[derive(Debug)]
pub(crate) enum Versions {
    One(Version),
    Many(Vec<Version>),
}

impl Versions {
    /// Of at least one version; all but the newest are compressed.
    pub(crate) fn packed(mut versions: Vec<Version>, compressor: &mut Compressor) -> Self {
        if versions.len() == 1 {
            return Self::One(versions.remove(0));
        }
        let superseded = versions.len().saturating_sub(1);
        for version in versions.iter_mut().take(superseded) {
            if let Some(Held::Plain(value)) = &version.value
                && let Some(packed) = Held::pack(value, compressor)
            {
                version.value = Some(packed);
            }
        }
        Self::Many(versions)
    }

    pub(crate) fn as_slice(&self) -> &[Version] {
        match self {
            Self::One(version) => std::slice::from_ref(version),
            Self::Many(versions) => versions,
        }
    }

    pub(crate) fn newest(&self) -> &Version {
        self.as_slice()
            .last()
            .expect("a key has at least one version")
    }

    pub(crate) fn at(&self, revision: Revision) -> Option<&Version> {
        self.as_slice()
            .iter()
            .rev()
            .find(|version| version.revision <= revision)
    }

    /// The version that was written at the revision, and the one before.
    pub(crate) fn change(&self, revision: Revision) -> Option<(&Version, Option<&Version>)> {
        let versions = self.as_slice();
        let at = versions
            .binary_search_by_key(&revision, |version| version.revision)
            .ok()?;
        let before = at.checked_sub(1).and_then(|before| versions.get(before));
        Some((versions.get(at)?, before))
    }

    /// Adds the newest version; `superseded` is the one before in compressed form, if it has one.
    pub(crate) fn push(&mut self, version: Version, superseded: Option<Held>) {
        let versions = match self {
            Self::Many(versions) => versions,
            Self::One(first) => {
                let mut versions = Vec::with_capacity(2);
                versions.push(first.clone());
                *self = Self::Many(versions);
                match self {
                    Self::Many(versions) => versions,
                    Self::One(_) => return,
                }
            }
        };
        if let (Some(last), Some(packed)) = (versions.last_mut(), superseded)
            && last.value.is_some()
        {
            last.value = Some(packed);
        }
        versions.push(version);
    }

    /// Drops what nobody can ask for when `floor` is the oldest readable revision. Returns whether
    /// anything is left.
    pub(crate) fn trim(&mut self, floor: Revision) -> bool {
        if let Self::Many(versions) = self {
            let superseded = versions
                .iter()
                .skip(1)
                .take_while(|v| v.revision <= floor)
                .count();
            versions.drain(..superseded);
            if let [only] = versions.as_slice() {
                *self = Self::One(only.clone());
            }
        }
        !matches!(self, Self::One(only) if only.value.is_none() && only.revision <= floor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superseded_value_is_kept_smaller_and_read_as_it_was() {
        let mut compressor = Compressor::new();
        let text = Bytes::from("{\"f:spec\":{\"f:containers\":{}}}".repeat(64));
        let packed = Held::pack(&text, &mut compressor).unwrap();
        assert!(matches!(&packed, Held::Packed { bytes, .. } if bytes.len() < text.len() / 4));
        assert_eq!(packed.get(), text);
        let mut versions = Versions::One(Version::new(1, 1, Some(text.clone())));
        versions.push(Version::new(1, 5, Some("new".into())), Some(packed));
        let (now, before) = versions.change(5).unwrap();
        assert_eq!(now.value().unwrap(), "new");
        assert_eq!(before.unwrap().value().unwrap(), text);
        assert_eq!(versions.at(4).unwrap().value().unwrap(), text);
        assert!(versions.change(4).is_none());
    }

    #[test]
    fn what_compression_does_not_help_stays_as_it_is() {
        let mut compressor = Compressor::new();
        assert!(Held::pack(&"{}".into(), &mut compressor).is_none());
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        assert!(Held::pack(&noise.into(), &mut compressor).is_none());
    }
}
