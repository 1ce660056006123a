//! The state directory belongs to one process at a time.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::paths::Paths;

/// Held for as long as the value lives; the kernel releases it when the process dies.
#[derive(Debug)]
pub(crate) struct StateLock {
    _file: File,
}

impl StateLock {
    /// Makes the state directory (mode 0700) and takes its lock, or says who has it.
    pub(crate) fn take(paths: &Paths) -> Result<Self> {
        let state = paths.state();
        fs::create_dir_all(state)
            .and_then(|()| fs::set_permissions(state, fs::Permissions::from_mode(0o711)))
            .with_context(|| format!("cannot make the state directory {}", state.display()))?;
        let path = paths.lock();
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!(
                "the state directory {} is in use by a running daemon or another command",
                state.display()
            );
        }
        Ok(Self { _file: file })
    }
}
