//! Where things are on this machine.

use std::{
    env,
    path::{Path, PathBuf},
};

/// Layout of the state directory.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    state: PathBuf,
}

impl Paths {
    pub(crate) fn new(state: PathBuf) -> Self {
        Self { state }
    }

    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    /// Held by the daemon for as long as it runs.
    pub(crate) fn lock(&self) -> PathBuf {
        self.state.join("lock")
    }

    /// Short name that prefixes what this daemon makes on the host.
    pub(crate) fn instance(&self) -> PathBuf {
        self.state.join("instance")
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.state.join("state.redb")
    }

    pub(crate) fn pki(&self) -> PathBuf {
        self.state.join("pki")
    }

    pub(crate) fn admin_kubeconfig(&self) -> PathBuf {
        self.state.join("admin.kubeconfig")
    }

    /// The operator's socket to the running daemon.
    /// How far containers' logs were sent on.
    pub(crate) fn log_cursors(&self) -> PathBuf {
        self.state.join("log-cursors")
    }

    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.state.join("admin.sock")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    pub(crate) fn network(&self) -> PathBuf {
        self.state.join("network")
    }

    /// Pods on the node's own kernel.
    pub(crate) fn host_pods(&self) -> PathBuf {
        self.state.join("host")
    }

    /// Pods on the cluster's network.
    pub(crate) fn cni(&self) -> PathBuf {
        self.state.join("cni")
    }

    /// Volumes that outlive pods.
    pub(crate) fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// Scratch disks and what else the runtime keeps in files.
    pub(crate) fn runtime(&self) -> PathBuf {
        self.state.join("runtime")
    }
}

/// A file that is shipped beside this binary.
pub(crate) fn beside_binary(name: &str) -> Option<PathBuf> {
    let path = env::current_exe().ok()?.parent()?.join(name);
    path.exists().then_some(path)
}

/// The guest's program: as told, else beside this binary, else where packages put it.
pub(crate) fn hyperstart(told: Option<PathBuf>) -> Option<PathBuf> {
    let packaged = PathBuf::from("/usr/lib/hypernetes/hyperstart");
    told.or_else(|| beside_binary("hyperstart"))
        .or_else(|| packaged.exists().then_some(packaged))
}

/// Directory of the built kernel: as told, else as `make build` noted it, else where packages put it.
pub(crate) fn kernel_dir(told: Option<PathBuf>) -> Option<PathBuf> {
    let noted = || {
        let text = std::fs::read_to_string(beside_binary("kernel-path")?).ok()?;
        let path = PathBuf::from(text.trim());
        path.exists().then_some(path)
    };
    let packaged = PathBuf::from("/usr/lib/hypernetes/kernel");
    told.or_else(noted)
        .or_else(|| packaged.exists().then_some(packaged))
}
