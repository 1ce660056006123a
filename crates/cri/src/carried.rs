//! What each guest's volumes of files were last made of, so that only what has changed travels again.
//!
//! A sandbox's ledger is locked from reading the host's files to having written them, by whoever
//! does so: an older version never replaces a newer one.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use hypernetes_runtime::{PodRuntime, RuntimeError, VolumeConfig, VolumeKind};
use hypernetes_types::SandboxId;

/// The ledgers of all sandboxes that anything was carried into.
#[derive(Debug, Default)]
pub(crate) struct Carried(Mutex<HashMap<SandboxId, Arc<tokio::sync::Mutex<Ledger>>>>);

impl Carried {
    pub(crate) fn of(&self, sandbox: &SandboxId) -> Arc<tokio::sync::Mutex<Ledger>> {
        let mut ledgers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(ledgers.entry(sandbox.clone()).or_default())
    }

    /// Forgets all sandboxes but these.
    pub(crate) fn retain(&self, sandboxes: &HashSet<SandboxId>) {
        let mut ledgers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ledgers.retain(|sandbox, _| sandboxes.contains(sandbox));
    }
}

/// Fingerprints of one sandbox's volumes of files, by name. Their contents may be secrets.
#[derive(Debug, Default)]
pub(crate) struct Ledger(HashMap<String, u64>);

impl Ledger {
    /// Whether the guest is known to have just this.
    pub(crate) fn has(&self, volume: &VolumeConfig) -> bool {
        let fingerprint = fingerprint(volume);
        fingerprint.is_some() && self.0.get(&volume.name).copied() == fingerprint
    }

    /// Writes a volume into the guest. If that fails or is cut short, it is not known what the guest
    /// has.
    pub(crate) async fn write(
        &mut self,
        runtime: &dyn PodRuntime,
        sandbox: &SandboxId,
        volume: VolumeConfig,
    ) -> Result<(), RuntimeError> {
        let (name, fingerprint) = (volume.name.clone(), fingerprint(&volume));
        self.0.remove(&name);
        runtime.write_volume(sandbox, volume).await?;
        self.0.extend(fingerprint.map(|sum| (name, sum)));
        Ok(())
    }
}

fn fingerprint(volume: &VolumeConfig) -> Option<u64> {
    let VolumeKind::Files { files } = &volume.kind else {
        return None;
    };
    let mut sum = DefaultHasher::new();
    volume.gid.hash(&mut sum);
    for (path, file) in files {
        (path, &file.content, file.mode, file.uid).hash(&mut sum);
    }
    Some(sum.finish())
}

#[cfg(test)]
mod tests {
    use hypernetes_runtime::{VolumeFile, fake::FakeRuntime};

    use super::*;

    fn volume(content: &'static str, mode: u32) -> VolumeConfig {
        let file = VolumeFile {
            content: content.into(),
            mode,
            uid: 0,
        };
        VolumeConfig {
            name: "v".into(),
            kind: VolumeKind::Files {
                files: [("key".to_owned(), file)].into(),
            },
            gid: None,
        }
    }

    #[tokio::test]
    async fn only_what_was_written_is_there() {
        let (runtime, carried, id) = (FakeRuntime::new(), Carried::default(), SandboxId::random());
        let ledger = carried.of(&id);
        let mut ledger = ledger.lock().await;
        // There is no such sandbox.
        let failed = ledger.write(&runtime, &id, volume("a", 0o644)).await;
        assert!(failed.is_err() && !ledger.has(&volume("a", 0o644)));
        ledger
            .0
            .extend(fingerprint(&volume("a", 0o644)).map(|sum| ("v".to_owned(), sum)));
        assert!(ledger.has(&volume("a", 0o644)));
        assert!(!ledger.has(&volume("a", 0o600)) && !ledger.has(&volume("b", 0o644)));
        let failed = ledger.write(&runtime, &id, volume("b", 0o644)).await;
        assert!(
            failed.is_err() && !ledger.has(&volume("a", 0o644)),
            "it may be b"
        );
    }
}
