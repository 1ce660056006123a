//! A sandbox that does not boot, but goes on from the copy of another one, or of a snapshot.
//!
//! ```text
//! record Starting ─ have the source or the snapshot copied ─ take the copy ─ record the containers ─ start a VM, record it
//!     ─ remove memory.vm ─ let the VM go on ─ make the guest a pod of its own ─ record Ready
//!     ─ with the session: let the containers go on
//! ```
//! Until it is `Ready` a restart undoes it, as any start.

use std::{collections::BTreeMap, fs::File, sync::Arc};

use hypernetes_agent_api::{AgentClient, FEATURE_CLONE, v1};
use hypernetes_network::Lease;
use hypernetes_types::{ContainerId, SnapshotId};
use hypernetes_vmm::{Origin, Suspended};
use tracing::{Instrument, info_span};

use super::{
    Actor, Handle, Member, Request,
    containers::unknown_to_guest,
    copy::{Copied, CopyDirectory, CopyPlan},
};
use crate::{
    api::{CloneConfig, ContainerConfig, VolumeKind},
    container::Phase,
    error::RuntimeError,
    guest::clean,
    identity::{configure_request, random},
    link::Link,
    logs::{file::LogFile, format::now_nanos},
    records::{ContainerRecord, SandboxRecord},
    scratch::blocking,
    timing::Stopwatch,
};

/// Where a sandbox goes on from.
#[derive(Debug)]
pub(crate) struct ClonePlan {
    pub(crate) from: CloneFrom,
    pub(crate) config: CloneConfig,
}

/// Who has what is copied.
#[derive(Debug)]
pub(crate) enum CloneFrom {
    Sandbox(Handle),
    Snapshot(SnapshotId),
}

/// A container of the source, and what it is in the clone.
struct Renamed {
    from: ContainerId,
    record: ContainerRecord,
}

impl Actor {
    pub(super) async fn bring_up_clone(&mut self, plan: ClonePlan) -> Result<(), RuntimeError> {
        let ClonePlan { from, config } = plan;
        let watch = Stopwatch::start();
        let copied = self.copy_from(&from).instrument(info_span!("copy")).await?;
        self.timing.phases.push(("copy", watch.elapsed()));

        let watch = Stopwatch::start();
        let (renamed, frozen, lease) = self.take_copy(copied, &config.containers).await?;
        let vm = self.launch_copy().instrument(info_span!("vmm")).await?;
        super::let_go_on(vm.as_ref()).await?;
        self.timing.phases.push(("vmm", watch.elapsed()));

        let watch = Stopwatch::start();
        let client = self.wait_for_agent(&vm).await?;
        if !client.has(FEATURE_CLONE) {
            return Err(unknown_to_guest("clone"));
        }
        self.personalize(&client, renamed, lease.as_ref()).await?;
        let deadline = self.shared.config.deadlines.call;
        for volume in config.volumes {
            // All others are in the guest, with what was in them.
            if !matches!(volume.kind, VolumeKind::Files { .. }) {
                continue;
            }
            let written = client.write_volume(super::volumes::request(volume, 0)?, deadline);
            written
                .await
                .map_err(|error| crate::guest::error(&self.record.id, "write a volume", &error))?;
        }
        self.record.kernel_release = Some(clean(&client.hello().kernel_release));
        self.record.set_suspension(None);
        // They go on with the session that begins when the sandbox is ready.
        self.record.set_frozen(Some(frozen));
        self.timing.phases.push(("personalize", watch.elapsed()));
        let deadlines = &self.shared.config.deadlines;
        self.link = Some(Link::spawn(&self.record.id, vm, Some(client), deadlines));
        self.begin_logs().await
    }

    async fn copy_from(&self, from: &CloneFrom) -> Result<Copied, RuntimeError> {
        let SandboxRecord { id, config, .. } = &self.record;
        match from {
            CloneFrom::Sandbox(source) => {
                let plan = CopyPlan {
                    target: id.to_string(),
                    wanted: Some(Box::new(config.clone())),
                    limit: None,
                };
                source.ask(|reply| Request::CopyFor(plan, reply)).await
            }
            CloneFrom::Snapshot(snapshot) => {
                let directory = CopyDirectory(self.shared.copies(id).join(snapshot.as_str()));
                let snapshots = &self.shared.snapshots;
                snapshots.copy_for(snapshot, config, directory).await
            }
        }
    }

    /// Makes the copy this sandbox's own, and its containers.
    async fn take_copy(
        &mut self,
        copied: Copied,
        configs: &[ContainerConfig],
    ) -> Result<
        (
            Vec<(ContainerId, ContainerId)>,
            Vec<ContainerId>,
            Option<Lease>,
        ),
        RuntimeError,
    > {
        let (from, to) = (
            copied.directory.0.clone(),
            self.shared.scratch.directory(&self.record.id),
        );
        blocking(format!("take {}", from.display()), move || {
            for entry in std::fs::read_dir(&from)? {
                let entry = entry?;
                std::fs::rename(entry.path(), to.join(entry.file_name()))?;
            }
            std::fs::remove_dir(&from)
        })
        .await?;
        let copied = copied.state;
        self.record.size = copied.size;
        self.record.set_disks(copied.disks);
        self.record.set_suspension(Some(copied.suspension));
        self.save().await?;
        let made = self.rename(copied.containers, configs);
        let records: Vec<_> = made.iter().map(|made| made.record.clone()).collect();
        let names: Vec<_> = made
            .iter()
            .map(|made| (made.from.clone(), made.record.id.clone()))
            .collect();
        // In memory first: what is stored is removed with the sandbox only if it is known.
        for record in records.iter().cloned() {
            self.shared.add_container(&record.id, &self.record.id);
            self.members.insert(record.id.clone(), Member::new(record));
        }
        self.shared.records.put_containers(&records).await?;
        let frozen = copied.frozen.iter();
        let frozen = frozen.filter_map(|id| names.iter().find(|(from, _)| from == id));
        let frozen = frozen.map(|(_, to)| to.clone()).collect();
        Ok((names, frozen, copied.lease))
    }

    /// The newest container of each name goes on by the new pod's configuration. Others are removed with the
    /// first session: the guest has them too.
    fn rename(
        &self,
        containers: Vec<ContainerRecord>,
        configs: &[ContainerConfig],
    ) -> Vec<Renamed> {
        let mut newest: BTreeMap<&str, (u32, &ContainerId)> = BTreeMap::new();
        for record in &containers {
            let this = (record.config.attempt, &record.id);
            let slot = newest.entry(&record.config.name).or_insert(this);
            *slot = this.max(*slot);
        }
        let kept: Vec<ContainerId> = newest.values().map(|(_, id)| (*id).clone()).collect();
        let hostname = &self.record.config.hostname;
        containers
            .into_iter()
            .map(|old| {
                let config = configs.iter().find(|config| config.name == old.config.name);
                let (from, id) = (old.id.clone(), ContainerId::random());
                let mut record = ContainerRecord {
                    id,
                    sandbox: self.record.id.clone(),
                    ..old
                };
                match config {
                    Some(config) if kept.contains(&from) => {
                        inherit(&mut record, config, hostname);
                    }
                    _ => {
                        record.phase = Phase::Removing;
                        // Nobody is to take it, or its log, for the one that is kept.
                        record.config.name = record.id.to_string();
                        record.config.log_path = format!("{}.removed", record.id).into();
                    }
                }
                Renamed { from, record }
            })
            .collect()
    }

    /// Starts a VM from the copy. It stands still.
    async fn launch_copy(&mut self) -> Result<Arc<dyn hypernetes_vmm::Vm>, RuntimeError> {
        let path = self.shared.suspended_file(&self.record.id);
        let action = format!("open the cloned VM {}", path.display());
        let open = path.clone();
        let suspended = blocking(action, move || Suspended::open(File::open(open)?)).await?;
        let run_dir = self.shared.run_dir(&self.record.id);
        blocking(format!("make {}", run_dir.display()), move || {
            use std::os::unix::fs::DirBuilderExt;
            let mut builder = std::fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(run_dir)
        })
        .await?;
        let parts = self.suspended_parts().await?;
        let vm = self
            .launch(parts, Origin::Suspended(Arc::new(suspended)))
            .await?;
        super::suspend::remove_durably(path).await?;
        Ok(vm)
    }

    async fn personalize(
        &self,
        client: &AgentClient,
        containers: Vec<(ContainerId, ContainerId)>,
        source: Option<&Lease>,
    ) -> Result<(), RuntimeError> {
        let own = self.record.lease.as_ref();
        // The device has the source's address still: it is part of what was copied.
        let device = source.map(|lease| lease.mac.as_str());
        let sandbox = configure_request(&self.record.config, own, device)?;
        let machine_id: [u8; 16] = random()?;
        let request = v1::PersonalizeRequest {
            sandbox: Some(sandbox),
            containers: containers
                .iter()
                .map(|(from, to)| v1::Renamed {
                    from: from.to_string(),
                    to: to.to_string(),
                })
                .collect(),
            machine_id: machine_id
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        };
        let deadline = self.shared.config.deadlines.call;
        let answered = client.personalize(request, deadline);
        let answered = answered.instrument(info_span!("personalize")).await;
        answered.map(drop).map_err(|error| {
            crate::guest::error(&self.record.id, "make the clone a pod of its own", &error)
        })
    }

    /// Opens the logs of the containers, which begin where the source was copied.
    async fn begin_logs(&mut self) -> Result<(), RuntimeError> {
        let shown = |member: &&Member| member.record.phase != Phase::Removing;
        let members = self.members.values().filter(shown);
        let members: Vec<_> = members
            .map(|member| (member.record.id.clone(), member.record.phase))
            .collect();
        for (id, phase) in members {
            let log = self.open_log(&id, LogFile::create).await?;
            if phase == Phase::Running {
                self.start_pump(&id, Some(log));
            }
        }
        Ok(())
    }

    /// Takes back the containers of a clone that did not come up: nobody has seen them.
    pub(super) async fn forget_clone(&mut self) {
        let ids: Vec<_> = self.members.keys().cloned().collect();
        for id in ids {
            let forgotten = async {
                self.remove_log(&id).await?;
                self.shared.records.delete_container(&id).await
            };
            if let Err(error) = forgotten.await {
                // It goes with the sandbox.
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::error!(container = %id, error, "cannot forget a container of a clone");
                continue;
            }
            self.members.remove(&id);
            self.shared.forget_container(&id);
        }
    }
}

/// Makes the record of the source's container one of the clone's.
fn inherit(record: &mut ContainerRecord, config: &ContainerConfig, hostname: &str) {
    record.config = config.clone();
    record.drained = record.phase == Phase::Exited;
    let now = now_nanos();
    if record.phase == Phase::Running {
        record.created_unix_nanos = now;
        record.started_unix_nanos = now;
    }
    // For processes that come later. Those that run have what they were started with.
    let own = [("HOSTNAME".to_owned(), hostname.to_owned())];
    for (name, value) in own.iter().chain(&config.env) {
        let prefix = format!("{name}=");
        let env = &mut record.process.env;
        if let Some(entry) = env.iter_mut().find(|entry| entry.starts_with(&prefix)) {
            *entry = format!("{prefix}{value}");
        }
    }
}
