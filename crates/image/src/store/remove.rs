//! Taking images, and what only they needed, out of the store.

use std::collections::HashSet;

use hypernetes_types::{Digest, ImageReference};

use super::{ImageStore, Inner, References, disk};
use crate::{Image, ImageError, tarball::shown};

/// What a removal did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that no longer point to the image.
    pub untagged: Vec<ImageReference>,
    /// The image, if nothing names it any more.
    pub deleted: Option<Digest>,
    /// Diff ids of layers that went with it. Layers are left for a later collection while a pull is
    /// under way.
    pub layers: Vec<Digest>,
}

impl ImageStore {
    /// Takes a name from an image, and the image with it if that was the last; given an id, all of
    /// its names. An image of `in_use` may lose names, but not its last.
    pub async fn remove(
        &self,
        name: &str,
        in_use: &HashSet<Digest>,
    ) -> Result<Removed, ImageError> {
        let (name, in_use) = (name.to_owned(), in_use.clone());
        self.blocking(move |inner| inner.remove(&name, &in_use))
            .await
    }
}

impl Inner {
    fn remove(&self, name: &str, in_use: &HashSet<Digest>) -> Result<Removed, ImageError> {
        let _changes = self.lock()?;
        let image = self.find(name)?;
        let mut references = self.references()?;
        let untagged = names_to_take(&references, &image, name);
        for name in &untagged {
            references.remove(name);
        }
        let kept = self.is_kept(&image.id)?;
        if kept && untagged.is_empty() {
            return Err(ImageError::InUse(shown(name.as_bytes())));
        }
        let is_last = !kept && !references.values().any(|id| *id == image.id);
        if is_last && in_use.contains(&image.id) {
            return Err(ImageError::InUse(shown(name.as_bytes())));
        }
        let mut removed = Removed {
            untagged,
            ..Removed::default()
        };
        // The record goes last but one: a name never points to nothing.
        self.write_references(&references)?;
        if is_last {
            disk::remove(&self.record_path(&image.id))?;
            removed.deleted = Some(image.id);
            removed.layers = self.collect()?;
        }
        Ok(removed)
    }

    /// Deletes layers and blobs that no record needs, unless a pull is under way. Call with the lock.
    pub(super) fn collect(&self) -> Result<Vec<Digest>, ImageError> {
        match disk::try_lock(&self.root.join("pulls.lock"))? {
            Some(_alone) => self.collect_alone(),
            None => Ok(Vec::new()),
        }
    }

    /// The same for who holds both locks.
    pub(super) fn collect_alone(&self) -> Result<Vec<Digest>, ImageError> {
        let (documents, contents) = self.kept_blobs()?;
        let images = self.images()?;
        let layers: HashSet<&str> = images
            .iter()
            .flat_map(|i| i.layers.iter().map(|l| l.diff_id.hex()))
            .collect();
        let blobs: HashSet<&str> = images
            .iter()
            .flat_map(|i| [i.id.hex(), i.manifest.hex()])
            .collect();
        let mut gone = Vec::new();
        for name in disk::names(&self.root.join("layers"))? {
            let hex = name.strip_suffix(".erofs").unwrap_or(&name);
            if !layers.contains(hex) && disk::remove(&self.root.join("layers").join(&name))? {
                gone.extend(format!("sha256:{hex}").parse::<Digest>());
            }
        }
        for name in disk::names(&self.root.join("origins"))? {
            if !layers.contains(name.as_str()) {
                disk::remove(&self.root.join("origins").join(&name))?;
            }
        }
        for name in disk::names(&self.root.join("blobs"))? {
            if !blobs.contains(name.as_str()) && !documents.contains(&name) {
                disk::remove(&self.root.join("blobs").join(&name))?;
            }
        }
        for name in disk::names(&self.root.join("content"))? {
            if !contents.contains(&name) {
                disk::remove(&self.root.join("content").join(&name))?;
            }
        }
        gone.sort();
        Ok(gone)
    }
}

/// By id: all names. By tag: that one, and the repository's digests if no tag of it is left.
fn names_to_take(references: &References, image: &Image, name: &str) -> Vec<ImageReference> {
    let all = image.tags.iter().chain(&image.digests);
    let named = name
        .parse::<ImageReference>()
        .ok()
        .map(|name| match name.digest() {
            Some(digest) => name.with_digest(digest.clone()),
            None => name,
        });
    let Some(named) = named.filter(|name| references.get(name) == Some(&image.id)) else {
        return all.cloned().collect();
    };
    let same = |other: &ImageReference| {
        other.registry() == named.registry() && other.repository() == named.repository()
    };
    let other_tags = image.tags.iter().any(|tag| *tag != named && same(tag));
    let mut taken = vec![named.clone()];
    if named.digest().is_none() && !other_tags {
        taken.extend(image.digests.iter().filter(|digest| same(digest)).cloned());
    }
    taken
}
