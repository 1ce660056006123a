//! Which namespaces may use an image that is in the node's store.
//!
//! The store is shared by all tenants. An image that was pulled with somebody's account is for the
//! namespaces that have shown an account for it; others are made to pull it themselves, which asks
//! the registry. Images pulled without an account, or put into the store by the operator, are for
//! everyone.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::PathBuf,
    sync::Mutex,
};

use serde::{Deserialize, Serialize};

use crate::worker::lock;

/// Namespaces that are remembered for one image.
const MAX_NAMESPACES: usize = 10_000;

/// Images that are not for everyone, by image id, with the namespaces that may use them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Restricted(BTreeMap<String, BTreeSet<String>>);

/// The register, kept in a file.
#[derive(Debug)]
pub(crate) struct ImageAccess {
    file: PathBuf,
    restricted: Mutex<Restricted>,
}

impl ImageAccess {
    /// Reads the register. One that cannot be read is an error: an empty one would open what is
    /// restricted.
    pub(crate) fn open(file: PathBuf) -> std::io::Result<Self> {
        let restricted = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Restricted::default(),
            Err(error) => return Err(error),
        };
        Ok(Self {
            file,
            restricted: Mutex::new(restricted),
        })
    }

    /// Whether the namespace may use the image without asking the registry.
    pub(crate) fn allows(&self, image: &str, namespace: &str) -> bool {
        let restricted = lock(&self.restricted);
        restricted
            .0
            .get(image)
            .is_none_or(|namespaces| namespaces.contains(namespace))
    }

    /// Notes a pull that the registry has allowed. `was_there` says that everyone could use the
    /// image before. Blocks for the time of a small write.
    pub(crate) fn pulled(
        &self,
        image: &str,
        namespace: &str,
        with_account: bool,
        was_there: bool,
    ) -> std::io::Result<()> {
        let mut restricted = lock(&self.restricted);
        let mut next = restricted.clone();
        if !with_account {
            next.0.remove(image);
        } else if !was_there || next.0.contains_key(image) {
            let namespaces = next.0.entry(image.to_owned()).or_default();
            if namespaces.len() < MAX_NAMESPACES {
                namespaces.insert(namespace.to_owned());
            }
        }
        if next.0 != restricted.0 {
            self.write(&next)?;
            *restricted = next;
        }
        Ok(())
    }

    fn write(&self, restricted: &Restricted) -> std::io::Result<()> {
        let temporary = self.file.with_extension("new");
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(restricted)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_of_one_tenant_is_not_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("access.json");
        let access = ImageAccess::open(file.clone()).unwrap();
        assert!(
            access.allows("sha256:1", "acme"),
            "what the operator loaded is for everyone"
        );
        access.pulled("sha256:1", "acme", true, false).unwrap();
        assert!(access.allows("sha256:1", "acme"));
        assert!(!access.allows("sha256:1", "globex"));
        // It is known after a restart as well.
        let access = ImageAccess::open(file).unwrap();
        assert!(!access.allows("sha256:1", "globex"));
        access.pulled("sha256:1", "globex", true, true).unwrap();
        assert!(access.allows("sha256:1", "globex") && access.allows("sha256:1", "acme"));
        access.pulled("sha256:1", "initech", false, true).unwrap();
        assert!(
            access.allows("sha256:1", "umbrella"),
            "the registry gives it to anybody"
        );
    }

    #[test]
    fn an_open_image_stays_open() {
        let dir = tempfile::tempdir().unwrap();
        let access = ImageAccess::open(dir.path().join("a.json")).unwrap();
        access.pulled("sha256:1", "acme", true, true).unwrap();
        assert!(access.allows("sha256:1", "globex"));
    }

    #[test]
    fn a_broken_register_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        std::fs::write(&file, "{").unwrap();
        assert!(ImageAccess::open(file).is_err());
    }
}
