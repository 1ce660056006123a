//! What callers asked and were told.

use std::collections::{BTreeMap, BTreeSet};

use hypernetes_types::{ContainerId, SandboxId};

/// Of all pods.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) pods: BTreeMap<u8, Pod>,
    /// Their removal was acknowledged.
    pub(super) gone: BTreeSet<SandboxId>,
    pub(super) gone_containers: BTreeSet<ContainerId>,
    /// What was told wrongly, as soon as it was told.
    pub(super) broken: Vec<String>,
}

/// One pod, as its caller knows it.
#[derive(Debug, Default)]
pub(super) struct Pod {
    /// Grows when the pod is removed.
    pub(super) attempt: u32,
    pub(super) run_asked: bool,
    pub(super) sandbox: Option<SandboxId>,
    pub(super) stop_asked: bool,
    pub(super) stopped: bool,
    pub(super) remove_asked: bool,
    /// `None`: not known.
    pub(super) suspended: Option<bool>,
    /// Its VM was ended, or may have been.
    pub(super) lost: bool,
    /// It was told that it has the volume that outlives it.
    pub(super) has_volume: bool,
    pub(super) containers: BTreeMap<u8, Container>,
}

/// One container, as its caller knows it.
#[derive(Debug, Default)]
pub(super) struct Container {
    pub(super) attempt: u32,
    pub(super) create_asked: bool,
    pub(super) id: Option<ContainerId>,
    pub(super) started: bool,
    pub(super) start_asked: bool,
    /// Somebody wants it to end, or a guest that forgets may have ended it.
    pub(super) end_asked: bool,
    /// The program ended by itself with this code, before anybody wanted it to.
    pub(super) exit: Option<i32>,
    /// It was shown as exited: the code and the time.
    pub(super) seen: Option<(i32, i64)>,
    pub(super) remove_asked: bool,
    /// `None`: not known.
    pub(super) paused: Option<bool>,
    pub(super) memo: Memo,
    pub(super) image: String,
    /// What its program has written.
    pub(super) lines: Vec<String>,
    /// Its log was torn by a power failure.
    pub(super) torn: bool,
    /// Names of the files that its log was renamed to, oldest first.
    pub(super) rotated: Vec<String>,
}

/// A note that goes with a change of limits.
#[derive(Debug, Default)]
pub(super) struct Memo {
    pub(super) told: String,
    /// Asked for since; may have come through.
    pub(super) asked: Vec<String>,
}

impl Model {
    pub(super) fn pod(&mut self, pod: u8) -> &mut Pod {
        self.pods.entry(pod).or_default()
    }

    pub(super) fn container(&mut self, pod: u8, container: u8) -> &mut Container {
        self.pod(pod).containers.entry(container).or_default()
    }

    pub(super) fn ids(&mut self, pod: u8, container: u8) -> Option<(SandboxId, ContainerId)> {
        let pod = self.pod(pod);
        let id = pod.containers.get(&container)?.id.clone()?;
        Some((pod.sandbox.clone()?, id))
    }

    /// The pod's removal was acknowledged: the next one of its name is another.
    pub(super) fn removed(&mut self, pod: u8) {
        let former = self.pods.remove(&pod).unwrap_or_default();
        self.pod(pod).attempt = former.attempt + 1;
        self.gone.extend(former.sandbox);
        let containers = former.containers.into_values();
        self.gone_containers
            .extend(containers.filter_map(|it| it.id));
    }

    /// The container's removal was acknowledged.
    pub(super) fn container_removed(&mut self, pod: u8, container: u8) {
        let containers = &mut self.pod(pod).containers;
        let former = containers.remove(&container).unwrap_or_default();
        self.container(pod, container).attempt = former.attempt + 1;
        self.gone_containers.extend(former.id);
    }

    /// Its VM is gone, or may be.
    pub(super) fn lose(&mut self, pod: u8) {
        // Without a sandbox the next one may be the one that is hit.
        self.pod(pod).lost = true;
    }
}
