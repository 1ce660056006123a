//! Snapshots: copies of sandboxes that outlive them.
//!
//! ```text
//! take:   record without content ─ have the source copied ─ write back ─ move to snapshots/<id> ─ record the content
//! remove: record without content ─ wait for who copies it ─ remove the directory ─ remove the record
//! ```
//! A record without content is half of something, whatever is in the directory: a restart removes both, and who asked
//! asks again. A snapshot's files never change. A clone has its memory by a link and a copy of its disks.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hypernetes_types::SnapshotId;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, RwLock};

use crate::{
    actor::{
        Copied, CopyDirectory, CopyPlan, Handle, MEMORY, Request, check_same, not_found,
        sync_parent,
    },
    api::{SandboxConfig, SnapshotConfig, SnapshotStatus},
    error::RuntimeError,
    logs::format::now_nanos,
    records::{ContainerRecord, Records, SnapshotContent, SnapshotRecord},
    room::{Need, Room},
    scratch::{blocking, copy_sparse, remove_directory},
    usage,
};

/// The snapshots of a node.
#[derive(Debug)]
pub(crate) struct Snapshots {
    root: PathBuf,
    records: Records,
    room: Room,
    entries: Mutex<BTreeMap<SnapshotId, Entry>>,
    /// One each, held while it is made or removed.
    changing: Mutex<HashMap<SnapshotId, Arc<AsyncMutex<()>>>>,
}

#[derive(Debug, Clone)]
struct Entry {
    record: Arc<SnapshotRecord>,
    /// Shared by who copies it.
    readers: Arc<RwLock<()>>,
}

impl Snapshots {
    pub(crate) fn new(state_dir: &Path, records: Records, room: Room) -> Self {
        Self {
            root: state_dir.join("snapshots"),
            records,
            room,
            entries: Mutex::default(),
            changing: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, id: &SnapshotId) -> Option<Entry> {
        self.lock().get(id).cloned()
    }

    fn directory(&self, id: &SnapshotId) -> PathBuf {
        self.root.join(id.as_str())
    }

    /// Waits until nobody makes or removes this one. Others are not waited for: a guest can take its time with its own.
    async fn alone(&self, id: &SnapshotId) -> OwnedMutexGuard<()> {
        let own = {
            let all = self.changing.lock();
            let mut all = all.unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(all.entry(id.clone()).or_default())
        };
        own.lock_owned().await
    }

    /// The directory of all snapshots' files.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Whether there is anything of this snapshot.
    pub(crate) fn knows(&self, id: &SnapshotId) -> bool {
        self.lock().contains_key(id)
    }

    /// All of them as they are.
    pub(crate) fn list(&self) -> Vec<SnapshotStatus> {
        let entries = self.lock();
        entries.values().map(|it| status(&it.record)).collect()
    }

    /// See [`PodRuntime::take_snapshot`](crate::PodRuntime::take_snapshot).
    pub(crate) async fn take(
        &self,
        source: &Handle,
        config: &SnapshotConfig,
    ) -> Result<SnapshotStatus, RuntimeError> {
        let id = &config.id;
        let _alone = self.alone(id).await;
        match self.entry(id) {
            Some(entry) if entry.record.content.is_some() => return Ok(status(&entry.record)),
            // Of an attempt that was cut short.
            Some(_) => self.discard(id).await?,
            None => {}
        }
        let copied = source.snapshot.borrow().record.config.clone();
        let record = SnapshotRecord::new(id.clone(), copied);
        self.put(&record);
        let made = async {
            self.records.put_snapshot(&record).await?;
            self.fill(source, config, record.clone()).await
        };
        match made.await {
            Ok(record) => Ok(status(&record)),
            Err(error) => {
                if let Err(undo) = self.discard(id).await {
                    let undo = hypernetes_telemetry::chain(&undo).to_string();
                    tracing::error!(snapshot = %id, error = undo, "cannot undo a snapshot");
                }
                Err(error)
            }
        }
    }

    async fn fill(
        &self,
        source: &Handle,
        config: &SnapshotConfig,
        mut record: SnapshotRecord,
    ) -> Result<SnapshotRecord, RuntimeError> {
        let plan = CopyPlan {
            target: config.id.to_string(),
            wanted: None,
            limit: Some(config.size_limit),
        };
        let copied = source.ask(|reply| Request::CopyFor(plan, reply)).await?;
        let taken_unix_nanos = now_nanos();
        let directory = self.directory(&config.id);
        // Whole after a power failure too, before anybody is told.
        let (from, to) = (copied.directory.0.clone(), directory.clone());
        blocking(format!("keep {}", from.display()), move || keep(&from, &to)).await?;
        record.content = Some(SnapshotContent {
            state: copied.state,
            size_bytes: usage::of_tree(directory).await?.used_bytes,
            taken_unix_nanos,
        });
        self.records.put_snapshot(&record).await?;
        self.put(&record);
        Ok(record)
    }

    /// Copies a snapshot into a directory for a sandbox that is to be so.
    pub(crate) async fn copy_for(
        &self,
        id: &SnapshotId,
        wanted: &SandboxConfig,
        to: CopyDirectory,
    ) -> Result<Copied, RuntimeError> {
        let missing = || not_found("snapshot", id);
        let readers = self.entry(id).ok_or_else(missing)?.readers;
        let _stays = readers.read().await;
        // It may have gone before it was ours.
        let record = self.entry(id).ok_or_else(missing)?.record;
        let content = record.content.as_ref().ok_or_else(missing)?;
        check_same(&record.config, wanted)?;
        let (from, target) = (self.directory(id), to.0.clone());
        remove_directory(target.clone()).await?;
        let action = format!("link {}", from.display());
        let (source, links) = (from.clone(), target.clone());
        let files = blocking(action, move || link_memory(&source, &links)).await?;
        let bytes = files.iter().map(|file| file.bytes).sum();
        let need = Need {
            what: "the copy",
            least: bytes,
            most: bytes,
        };
        let _room = self.room.promise(need).await?;
        let action = format!("copy {}", from.display());
        let copy = move || files.iter().try_for_each(|file| file.copy(&from, &target));
        blocking(action, copy).await?;
        Ok(Copied {
            directory: to,
            state: content.state.clone(),
        })
    }

    /// See [`PodRuntime::remove_snapshot`](crate::PodRuntime::remove_snapshot).
    pub(crate) async fn remove(&self, id: &SnapshotId) -> Result<(), RuntimeError> {
        let _alone = self.alone(id).await;
        self.discard(id).await
    }

    /// Removes what there is of a snapshot. Idempotent; repeated after a failure it goes on where it failed.
    async fn discard(&self, id: &SnapshotId) -> Result<(), RuntimeError> {
        let Some(entry) = self.entry(id) else {
            return Ok(());
        };
        if entry.record.content.is_some() {
            let going = SnapshotRecord::new(id.clone(), entry.record.config.clone());
            self.records.put_snapshot(&going).await?;
            self.put(&going);
        }
        let _nobody_reads = entry.readers.write().await;
        remove_directory(self.directory(id)).await?;
        self.records.delete_snapshot(id).await?;
        self.lock().remove(id);
        Ok(())
    }

    /// Takes up what an earlier runtime kept, and removes what it had half of. Returns what could not be removed.
    pub(crate) async fn recover(&self) -> Result<Vec<String>, RuntimeError> {
        let records = self.records.snapshots()?;
        for record in &records {
            self.put(record);
        }
        let mut failures = Vec::new();
        for record in &records {
            let removed = match self.is_there(record).await {
                Ok(true) => continue,
                Ok(false) => self.remove(&record.id).await,
                Err(error) => Err(error),
            };
            if let Err(error) = removed {
                let error = hypernetes_telemetry::chain(&error).to_string();
                failures.push(format!("snapshot {}: {error}", record.id));
            }
        }
        Ok(failures)
    }

    /// Whether it was made, and nobody has taken its files away.
    async fn is_there(&self, record: &SnapshotRecord) -> Result<bool, RuntimeError> {
        if record.content.is_none() {
            return Ok(false);
        }
        let memory = self.directory(&record.id).join(MEMORY);
        let action = format!("look for {}", memory.display());
        let there = blocking(action, move || memory.try_exists()).await?;
        if !there {
            tracing::error!(snapshot = %record.id, "the files of a snapshot are gone");
        }
        Ok(there)
    }

    fn put(&self, record: &SnapshotRecord) {
        let mut entries = self.lock();
        let known = entries.get(&record.id);
        let readers = known.map_or_else(Arc::default, |entry| Arc::clone(&entry.readers));
        let record = Arc::new(record.clone());
        entries.insert(record.id.clone(), Entry { record, readers });
    }
}

fn status(record: &SnapshotRecord) -> SnapshotStatus {
    let content = record.content.as_ref();
    let containers = content.map_or(&[][..], |content| &content.state.containers);
    SnapshotStatus {
        id: record.id.clone(),
        source: record.config.metadata.clone(),
        ready: content.is_some(),
        size_bytes: content.map_or(0, |content| content.size_bytes),
        taken_unix_nanos: content.map_or(0, |content| content.taken_unix_nanos),
        containers: containers.iter().map(|it| it.config.clone()).collect(),
        image_ids: {
            let ids = containers.iter().flat_map(ContainerRecord::image_ids);
            ids.map(str::to_owned).collect()
        },
    }
}

/// Moves a directory of files for good. Blocks.
fn keep(from: &Path, to: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(from)?.sync_all()?;
    let root = to.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(root)?;
    std::fs::rename(from, to)?;
    // The root is as new as the first that it has.
    to.ancestors().take(2).try_for_each(sync_parent)
}

/// A file that is to be copied.
struct Whole {
    name: OsString,
    /// What it takes on the disk.
    bytes: u64,
}

impl Whole {
    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        copy_sparse(&from.join(&self.name), &to.join(&self.name)).map(drop)
    }
}

/// Gives a snapshot's memory, which nobody writes, a second name. Returns the files that have to be copied. Blocks.
fn link_memory(from: &Path, to: &Path) -> io::Result<Vec<Whole>> {
    std::fs::create_dir_all(to)?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        // Not everything that keeps files knows links.
        if name == MEMORY && std::fs::hard_link(entry.path(), to.join(&name)).is_ok() {
            continue;
        }
        let bytes = entry.metadata()?.blocks() * 512;
        files.push(Whole { name, bytes });
    }
    Ok(files)
}
