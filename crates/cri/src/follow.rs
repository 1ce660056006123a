//! Keeps files that the kubelet updates up to date in running containers.
//!
//! The kubelet changes a volume of a ConfigMap, Secret, projected or downwardAPI source by switching
//! the link `..data` to a new version. While a running container mounts such a volume, its directory
//! is watched; a version that the guest does not have is carried there, where it replaces the old
//! one in the same way. What cannot be watched, and what a watch has missed, is found by a look once
//! a minute. Nothing of this is stored: a node that starts finds the volumes by its containers'
//! requests.
//!
//! A directory that is gone, or has no version, leaves the guest what it has. A volume that changes
//! all the time is carried once in [`REST`]; one that cannot be carried is tried ever more rarely.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use hypernetes_runtime::{ContainerState, PodRuntime, RuntimeEvent, VolumeConfig, VolumeKind};
use hypernetes_types::SandboxId;
use tokio::{
    sync::broadcast::{
        Receiver,
        error::{RecvError, TryRecvError},
    },
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    carried::Carried,
    files, memo, mounts,
    watch::{Change, Watches},
};

/// Between two looks at everything.
const ROUND: Duration = Duration::from_secs(60);
/// Least time between two looks at a volume.
const REST: Duration = Duration::from_secs(1);
/// Least time between two reads of what has changed.
const CALM: Duration = Duration::from_millis(100);
/// After a failure; doubled with each one, up to [`ROUND`].
const RETRY: Duration = Duration::from_secs(2);

/// What the task works with.
#[derive(Debug, Clone)]
pub(crate) struct Follower {
    pub(crate) runtime: Arc<dyn PodRuntime>,
    pub(crate) kubelet_dir: PathBuf,
    pub(crate) carried: Arc<Carried>,
}

impl Follower {
    /// Follows all volumes until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let watches = Watches::new()
            .inspect_err(|error| {
                tracing::warn!(%error, "cannot watch volumes: changes are found once a minute");
            })
            .ok();
        stop.run_until_cancelled(self.follow(watches)).await;
    }

    async fn follow(self, watches: Option<Watches>) {
        // Before the first look, so that no container slips between the two.
        let mut events = self.runtime.events();
        let mut followed = Followed::new(watches);
        let mut looks = JoinSet::new();
        let mut round = interval(ROUND);
        round.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut calm = Instant::now();
        loop {
            for (sandbox, volumes) in followed.take_due(Instant::now()) {
                let follower = self.clone();
                looks.spawn(async move { follower.look(sandbox, volumes).await });
            }
            let next = followed.next_due();
            tokio::select! {
                // The first one is at once.
                _ = round.tick() => {
                    self.find_all(&mut followed).await;
                    followed.touch_all(Instant::now());
                }
                concerned = concerned(&mut events) => match concerned {
                    Concerned::Some(sandboxes) => {
                        for sandbox in sandboxes {
                            self.find(&mut followed, &sandbox).await;
                        }
                    }
                    Concerned::All => self.find_all(&mut followed).await,
                    Concerned::End => return,
                },
                changes = followed.changes(calm) => {
                    calm = Instant::now() + CALM;
                    followed.changed(changes, calm);
                }
                Some(looked) = looks.join_next(), if !looks.is_empty() => match looked {
                    Ok((sandbox, found)) => followed.looked(&sandbox, found, Instant::now()),
                    Err(panic) => {
                        tracing::error!(%panic, "a look at volumes was lost");
                        followed.lost(Instant::now());
                    }
                },
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }

    async fn find_all(&self, followed: &mut Followed) {
        let all = self.runtime.list_sandboxes().await;
        let ids: HashSet<SandboxId> = all.into_iter().map(|status| status.id).collect();
        self.carried.retain(&ids);
        for sandbox in ids.into_iter().chain(followed.sandboxes()) {
            self.find(followed, &sandbox).await;
        }
    }

    /// Finds which volumes of a sandbox are to be followed.
    async fn find(&self, followed: &mut Followed, sandbox: &SandboxId) {
        let mut wanted = BTreeMap::new();
        // A container on the host mounts the kubelet's own files.
        let status = self.runtime.sandbox(sandbox).await;
        if let Some(status) = status.filter(|status| status.config.host.is_none()) {
            for container in self.runtime.list_containers(Some(sandbox)).await {
                // A guest that does not answer just now may still run it.
                let runs = [ContainerState::Running, ContainerState::Unknown];
                if !runs.contains(&container.state) {
                    continue;
                }
                let uid = &status.config.metadata.uid;
                let asked = memo::container(&container.config.memo);
                let volumes = asked
                    .mounts
                    .iter()
                    .filter_map(|mount| mounts::versioned(mount, uid, &self.kubelet_dir));
                wanted.extend(volumes);
            }
        }
        followed.set(sandbox, wanted, Instant::now());
    }

    /// Carries what the guest does not have.
    async fn look(
        self,
        sandbox: SandboxId,
        volumes: Vec<(String, PathBuf)>,
    ) -> (SandboxId, Vec<(String, Found)>) {
        let ledger = self.carried.of(&sandbox);
        let mut ledger = ledger.lock().await;
        let mut found = Vec::new();
        for (name, path) in volumes {
            let read = tokio::task::spawn_blocking(move || files::read_version(&path)).await;
            let what = match read {
                Ok(Ok(None)) => Found::Settled,
                Ok(Ok(Some(content))) => {
                    let volume = VolumeConfig {
                        name: name.clone(),
                        kind: VolumeKind::Files {
                            files: content.files,
                        },
                        gid: content.gid,
                    };
                    if ledger.has(&volume) {
                        Found::Settled
                    } else {
                        let runtime = self.runtime.as_ref();
                        match ledger.write(runtime, &sandbox, volume).await {
                            Ok(()) => Found::Settled,
                            Err(error) => Found::failed(&error),
                        }
                    }
                }
                Ok(Err(error)) => Found::failed(&error),
                Err(panic) => Found::Failed(panic.to_string()),
            };
            found.push((name, what));
        }
        (sandbox, found)
    }
}

/// What a look came to.
#[derive(Debug)]
enum Found {
    /// The guest has what it should have.
    Settled,
    Failed(String),
}

impl Found {
    fn failed(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Failed(hypernetes_telemetry::chain(error).to_string())
    }
}

/// Whom events are about.
enum Concerned {
    Some(BTreeSet<SandboxId>),
    All,
    /// There will be no more.
    End,
}

/// Waits for an event, and takes those that are there with it. Cancel-safe.
async fn concerned(events: &mut Receiver<RuntimeEvent>) -> Concerned {
    let mut sandboxes = BTreeSet::new();
    let mut add = |event| match event {
        RuntimeEvent::Sandbox(id) | RuntimeEvent::Container(id, _) => sandboxes.insert(id),
    };
    match events.recv().await {
        Ok(event) => add(event),
        Err(RecvError::Lagged(_)) => return Concerned::All,
        Err(RecvError::Closed) => return Concerned::End,
    };
    loop {
        match events.try_recv() {
            Ok(event) => add(event),
            Err(TryRecvError::Lagged(_)) => return Concerned::All,
            Err(TryRecvError::Empty | TryRecvError::Closed) => return Concerned::Some(sandboxes),
        };
    }
}

/// One volume in one sandbox.
#[derive(Debug)]
struct Volume {
    path: PathBuf,
    watch: Option<i32>,
    /// When to look.
    due: Option<Instant>,
    /// Not to be looked at before.
    rest: Instant,
    /// Being looked at.
    busy: bool,
    failures: u32,
    /// What was last said of it.
    told: String,
}

/// The volumes that are followed, and when to look at which.
#[derive(Debug)]
struct Followed {
    watches: Option<Watches>,
    volumes: BTreeMap<SandboxId, BTreeMap<String, Volume>>,
    /// It was said that a directory cannot be watched.
    told: bool,
}

impl Followed {
    fn new(watches: Option<Watches>) -> Self {
        Self {
            watches,
            volumes: BTreeMap::new(),
            told: false,
        }
    }

    fn sandboxes(&self) -> Vec<SandboxId> {
        self.volumes.keys().cloned().collect()
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Volume> {
        self.volumes.values_mut().flat_map(BTreeMap::values_mut)
    }

    /// Follows these volumes of a sandbox and no others. A new one is due.
    fn set(&mut self, sandbox: &SandboxId, wanted: BTreeMap<String, PathBuf>, now: Instant) {
        let mut known = self.volumes.remove(sandbox).unwrap_or_default();
        let mut kept = BTreeMap::new();
        for (name, path) in wanted {
            let same = known.get(&name).is_some_and(|known| known.path == path);
            let volume = match same.then(|| known.remove(&name)).flatten() {
                Some(volume) => volume,
                None => Volume {
                    watch: self.watch(&path),
                    path,
                    due: Some(now),
                    rest: now,
                    busy: false,
                    failures: 0,
                    told: String::new(),
                },
            };
            kept.insert(name, volume);
        }
        if !kept.is_empty() {
            self.volumes.insert(sandbox.clone(), kept);
        }
        for volume in known.into_values() {
            self.unwatch(volume.watch);
        }
    }

    /// Ends a watch that no volume has any more: another sandbox of the same pod may.
    fn unwatch(&mut self, watch: Option<i32>) {
        let used = self.all().any(|volume| volume.watch == watch);
        if let (Some(watch), Some(watches), false) = (watch, &self.watches, used) {
            watches.remove(watch);
        }
    }

    fn watch(&mut self, path: &std::path::Path) -> Option<i32> {
        match self.watches.as_ref()?.add(path) {
            Ok(watch) => Some(watch),
            Err(error) => {
                let gone = error.kind() == std::io::ErrorKind::NotFound;
                if !gone && !std::mem::replace(&mut self.told, true) {
                    tracing::warn!(%error, "cannot watch a volume: changes are found once a minute");
                }
                None
            }
        }
    }

    /// What has changed, but not before `calm`. Without watches: never.
    async fn changes(&self, calm: Instant) -> Vec<Change> {
        let Some(watches) = &self.watches else {
            return std::future::pending().await;
        };
        sleep_until(calm).await;
        match watches.changes().await {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(%error, "cannot read what has changed in volumes");
                vec![Change::Anywhere]
            }
        }
    }

    fn changed(&mut self, changes: Vec<Change>, now: Instant) {
        for change in changes {
            match change {
                Change::Anywhere => self.all().for_each(|volume| volume.touch(now)),
                Change::In(watch) | Change::Gone(watch) => {
                    for volume in self.all().filter(|volume| volume.watch == Some(watch)) {
                        volume.touch(now);
                        if change == Change::Gone(watch) {
                            volume.watch = None;
                        }
                    }
                }
            }
        }
    }

    /// Looks at everything, and watches what is at the paths now.
    fn touch_all(&mut self, now: Instant) {
        let mut volumes = std::mem::take(&mut self.volumes);
        let mut former = Vec::new();
        for volume in volumes.values_mut().flat_map(BTreeMap::values_mut) {
            former.push(volume.watch);
            volume.watch = self.watch(&volume.path);
            volume.touch(now);
        }
        self.volumes = volumes;
        for watch in former {
            self.unwatch(watch);
        }
    }

    /// Whoever was looking will not tell.
    fn lost(&mut self, now: Instant) {
        for volume in self.all() {
            volume.busy = false;
            volume.touch(now + ROUND);
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let idle = |volumes: &&BTreeMap<String, Volume>| !volumes.values().any(|it| it.busy);
        let volumes = self.volumes.values().filter(idle);
        volumes
            .flat_map(BTreeMap::values)
            .filter_map(|volume| volume.due)
            .min()
    }

    /// What to look at now; one look at a time in each sandbox.
    fn take_due(&mut self, now: Instant) -> Vec<(SandboxId, Vec<(String, PathBuf)>)> {
        let mut due = Vec::new();
        for (sandbox, volumes) in &mut self.volumes {
            if volumes.values().any(|volume| volume.busy) {
                continue;
            }
            let mut these = Vec::new();
            for (name, volume) in volumes {
                if volume.due.is_some_and(|due| due <= now) {
                    (volume.busy, volume.due) = (true, None);
                    these.push((name.clone(), volume.path.clone()));
                }
            }
            if !these.is_empty() {
                due.push((sandbox.clone(), these));
            }
        }
        due
    }

    fn looked(&mut self, sandbox: &SandboxId, found: Vec<(String, Found)>, now: Instant) {
        for (name, found) in found {
            let volumes = self.volumes.get_mut(sandbox);
            let Some(volume) = volumes.and_then(|volumes| volumes.get_mut(&name)) else {
                continue;
            };
            volume.looked(found, now, |message| {
                tracing::warn!(%sandbox, volume = name, error = message, "cannot update a volume yet");
            });
        }
    }
}

impl Volume {
    fn touch(&mut self, now: Instant) {
        let due = now.max(self.rest);
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
    }

    fn looked(&mut self, found: Found, now: Instant, tell: impl FnOnce(&str)) {
        self.busy = false;
        match found {
            Found::Settled => {
                self.failures = 0;
                self.told.clear();
                self.rest = now + REST;
            }
            Found::Failed(message) => {
                let wait = RETRY.saturating_mul(1 << self.failures.min(16)).min(ROUND);
                self.failures = self.failures.saturating_add(1);
                self.rest = now + wait;
                self.due = Some(self.rest);
                if self.told != message {
                    tell(&message);
                    self.told = message;
                }
            }
        }
        self.due = self.due.map(|due| due.max(self.rest));
    }
}

#[cfg(test)]
mod tests;
