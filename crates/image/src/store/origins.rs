//! Where layers have come from, so that who names a layer gets it only from where it can be had.
//!
//! A manifest names layers by digest, and whoever knows a digest can write such a manifest at a registry of
//! their own. A layer that is here is therefore used without being fetched only if the same repository has
//! served its bytes before, or if somebody without an account has had them. Otherwise it is fetched and
//! checked again; its disk stays one.

use std::{collections::BTreeSet, fs, io, path::PathBuf};

use hypernetes_types::Digest;

use super::{Inner, disk};
use crate::{Credentials, ImageError, registry::Repository};

/// Stands for everybody.
const ANYBODY: &str = "*";
/// Origins that are remembered for one layer; what comes from others is fetched each time.
const MAX_ORIGINS: usize = 1000;

/// Whoever asks for a layer, and where.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    source: String,
    anonymous: bool,
}

impl Asked {
    pub(super) fn new(repository: &Repository, credentials: &Credentials) -> Self {
        Self {
            source: repository.source(),
            anonymous: matches!(credentials, Credentials::Anonymous),
        }
    }
}

impl Inner {
    fn origins_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("origins").join(diff_id.hex())
    }

    fn origins(&self, diff_id: &Digest) -> Result<BTreeSet<String>, ImageError> {
        let path = self.origins_path(diff_id);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
            Err(error) => Err(disk::failed("read", &path)(error)),
        }
    }

    /// Whether a layer that is here may be had without fetching it.
    pub(super) fn may_have(&self, diff_id: &Digest, asked: &Asked) -> Result<bool, ImageError> {
        let origins = self.origins(diff_id)?;
        Ok(origins.contains(ANYBODY) || origins.contains(&asked.source))
    }

    /// Notes that a layer's bytes were had there.
    pub(super) fn note_origin(&self, diff_id: &Digest, asked: &Asked) -> Result<(), ImageError> {
        let mut origins = self.origins(diff_id)?;
        let new = match asked.anonymous {
            true => ANYBODY.to_owned(),
            false => asked.source.clone(),
        };
        if origins.len() >= MAX_ORIGINS || !origins.insert(new) {
            return Ok(());
        }
        let text: String = origins.iter().map(|origin| format!("{origin}\n")).collect();
        disk::write(&self.tmp(), &self.origins_path(diff_id), text.as_bytes())
    }
}
