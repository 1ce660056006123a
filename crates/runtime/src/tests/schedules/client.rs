//! The caller of one pod: asks, and notes what it was told.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use hypernetes_image::{Credentials, ImageConfig};
use hypernetes_types::{ContainerId, SandboxId};

use super::{model::Model, plan::Op};
use crate::{
    testing::{STDOUT, World, container_config},
    *,
};

/// How often something was asked, and how often that was done.
static TALLY: Mutex<BTreeMap<&'static str, [u64; 2]>> = Mutex::new(BTreeMap::new());

/// What was asked in all schedules of this process, and done.
pub(super) fn tally() -> BTreeMap<&'static str, [u64; 2]> {
    TALLY.lock().unwrap().clone()
}

/// Counts an answer and passes it on.
pub(super) fn count<T, E>(what: &'static str, answer: Result<T, E>) -> Result<T, E> {
    let mut tally = TALLY.lock().unwrap();
    let [asked, done] = tally.entry(what).or_default();
    *asked += 1;
    *done += u64::from(answer.is_ok());
    answer
}

pub(super) fn name(pod: u8) -> String {
    format!("p{pod}")
}

/// The name of the volume that outlives a pod.
pub(super) fn volume(pod: u8) -> String {
    format!("kept-{pod}")
}

/// Asks on behalf of one pod.
pub(super) struct Client<'a> {
    pub(super) world: &'a World,
    pub(super) runtime: &'a NodeRuntime,
    pub(super) model: &'a Arc<Mutex<Model>>,
    pub(super) pod: u8,
}

impl Client<'_> {
    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }

    fn sandbox(&self) -> Option<SandboxId> {
        self.model().pod(self.pod).sandbox.clone()
    }

    fn broken(&self, what: String) {
        self.model().broken.push(what);
    }

    pub(super) async fn ask(&self, op: &Op) {
        match *op {
            Op::Run => self.run().await,
            Op::Create(c) => self.create(c).await,
            Op::Start(c) => self.start(c).await,
            Op::Exec(c) => self.exec(c).await,
            Op::Attach(c) => self.attach(c).await,
            Op::Write(c, lines) => self.write(c, lines),
            Op::Exit(c, code) => self.exit(c, code.into()),
            Op::Pause(c, paused) => self.pause(c, paused).await,
            Op::Update(c) => self.update(c).await,
            Op::Rotate(c) => self.rotate(c).await,
            Op::Stop(c, politely) => self.stop(c, politely).await,
            Op::Remove(c) => self.remove(c).await,
            Op::Resize(_)
            | Op::LimitedVolume(_)
            | Op::KeptVolume
            | Op::FilesVolume
            | Op::Device
            | Op::Stats => self.change_sandbox(op).await,
            Op::PullImage => self.pull_image().await,
            Op::RemoveImage => self.remove_image().await,
            Op::Suspend => self.suspend(true).await,
            Op::Resume => self.suspend(false).await,
            Op::StopSandbox => self.stop_sandbox().await,
            Op::RemoveSandbox => self.remove_sandbox().await,
        }
    }

    async fn run(&self) {
        let mut config = self.world.sandbox(&name(self.pod));
        config.extras.max_vcpus = 3;
        config.extras.max_memory_mib = config.memory_mib + 256;
        {
            let mut model = self.model();
            let pod = model.pod(self.pod);
            if pod.remove_asked {
                return;
            }
            config.metadata.attempt = pod.attempt;
            pod.run_asked = true;
        }
        let told = count("run", self.runtime.run_sandbox(config).await);
        let mut model = self.model();
        let pod = model.pod(self.pod);
        let Ok(id) = told else { return };
        if let Some(known) = pod.sandbox.replace(id.clone())
            && known != id
        {
            let text = format!("pod {} is {id} and was {known}", self.pod);
            model.broken.push(text);
        }
    }

    async fn create(&self, c: u8) {
        let Some(sandbox) = self.sandbox() else {
            return;
        };
        let mut config = container_config(&format!("c{c}"));
        {
            let mut model = self.model();
            let container = model.container(self.pod, c);
            if container.remove_asked {
                return;
            }
            config.attempt = container.attempt;
            config.log_path = format!("c{c}/{}.log", container.attempt).into();
            config.image = ["web", "box"][usize::from(c) % 2].into();
            container.image.clone_from(&config.image);
            container.create_asked = true;
        }
        if let Ok(id) = count(
            "create",
            self.runtime.create_container(&sandbox, config).await,
        ) {
            let mut model = self.model();
            let known = model.container(self.pod, c).id.replace(id.clone());
            if known.as_ref().is_some_and(|known| *known != id) {
                model.broken.push(format!("{id} was {known:?} before"));
            }
        }
    }

    async fn start(&self, c: u8) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        self.model().container(self.pod, c).start_asked = true;
        if count("start", self.runtime.start_container(&id).await).is_ok() {
            self.model().container(self.pod, c).started = true;
        }
    }

    async fn exec(&self, c: u8) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        let config = ExecConfig {
            command: vec!["true".into()],
            ..ExecConfig::default()
        };
        let session = async {
            let mut session = self.runtime.exec(&id, config).await.ok()?;
            while session.output.recv().await.is_some() {}
            session.exit.await.ok()?.ok()
        };
        // A guest may never tell.
        let told = tokio::time::timeout(Duration::from_millis(300), session).await;
        if let Ok(code) = count("exec", told.ok().flatten().ok_or(()))
            && code != 0
            && code != 137
        {
            self.broken(format!("an exec in {id} returned {code}"));
        }
    }

    async fn attach(&self, c: u8) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        let attached = count("attach", self.runtime.attach(&id, false).await);
        if let Ok(mut session) = attached {
            // It may write, or not.
            let piece = session.output.recv();
            drop(tokio::time::timeout(Duration::from_millis(20), piece).await);
        }
    }

    fn write(&self, c: u8, count: u8) {
        let Some((sandbox, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        let agent = self.world.agent(&sandbox);
        let running = agent.state(id.as_str()).is_some_and(|state| {
            state.exit.is_none()
                && state.phase() == hypernetes_agent_api::v1::ContainerPhase::Running
        });
        if !running || !self.goes_on(&sandbox) {
            return;
        }
        let mut model = self.model();
        let container = model.container(self.pod, c);
        for _ in 0..count {
            let line = format!("{id} {}", container.lines.len());
            agent.output(id.as_str(), STDOUT, format!("{line}\n").as_bytes());
            container.lines.push(line);
        }
    }

    fn exit(&self, c: u8, code: i32) {
        let Some((sandbox, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        let agent = self.world.agent(&sandbox);
        let state = agent.state(id.as_str());
        if state.is_none_or(|state| state.exit.is_some()) || !self.goes_on(&sandbox) {
            return;
        }
        let mut model = self.model();
        let container = model.container(self.pod, c);
        if !container.end_asked {
            container.exit = Some(code);
        }
        container.end_asked = true;
        agent.exit(id.as_str(), code);
    }

    async fn pause(&self, c: u8, paused: bool) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        self.model().container(self.pod, c).paused = None;
        if count("pause", self.runtime.set_paused(&id, paused).await).is_ok() {
            self.model().container(self.pod, c).paused = Some(paused);
        }
    }

    async fn update(&self, c: u8) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        let memo = {
            let mut model = self.model();
            let known = &mut model.container(self.pod, c).memo;
            let memo = format!("{}+", known.asked.last().unwrap_or(&known.told));
            known.asked.push(memo.clone());
            memo
        };
        let update = ContainerUpdate {
            resources: ResourceConfig {
                memory_limit: 64 << 20,
                ..ResourceConfig::default()
            },
            memo: memo.clone(),
            host: None,
        };
        if count("update", self.runtime.update_container(&id, update).await).is_ok() {
            let mut model = self.model();
            let known = &mut model.container(self.pod, c).memo;
            known.told = memo;
            known.asked.clear();
        }
    }

    async fn rotate(&self, c: u8) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        let Some(status) = self.runtime.container(&id).await else {
            return;
        };
        if status.state != ContainerState::Running || !status.log_path.exists() {
            return;
        }
        {
            let mut model = self.model();
            let rotated = &mut model.container(self.pod, c).rotated;
            let suffix = format!("log.20260101-{:06}", rotated.len());
            let target = status.log_path.with_extension(suffix);
            std::fs::rename(&status.log_path, &target).unwrap();
            rotated.push(target.to_string_lossy().into_owned());
        }
        // The kubelet asks again later.
        drop(count("reopen the log", self.runtime.reopen_log(&id).await));
    }

    async fn stop(&self, c: u8, politely: bool) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        self.model().container(self.pod, c).end_asked = true;
        let grace = Duration::from_millis(if politely { 50 } else { 0 });
        if count("stop", self.runtime.stop_container(&id, grace).await).is_ok()
            && let Some(status) = self.runtime.container(&id).await
            && matches!(status.state, ContainerState::Running)
        {
            self.broken(format!("{id} is stopped and {:?}", status.state));
        }
    }

    async fn remove(&self, c: u8) {
        let Some((_, id)) = self.model().ids(self.pod, c) else {
            return;
        };
        {
            let mut model = self.model();
            let container = model.container(self.pod, c);
            container.end_asked = true;
            container.remove_asked = true;
            // The kubelet removes these.
            for file in container.rotated.drain(..) {
                drop(std::fs::remove_file(file));
            }
        }
        if count("remove", self.runtime.remove_container(&id).await).is_ok() {
            self.model().container_removed(self.pod, c);
        }
    }

    async fn change_sandbox(&self, op: &Op) {
        let Some(id) = self.sandbox() else { return };
        match *op {
            Op::Resize(larger) => {
                let update = SandboxUpdate {
                    vcpus: if larger { 3 } else { 1 },
                    memory_mib: if larger { 384 } else { 128 },
                    memo: None,
                };
                drop(count(
                    "resize",
                    self.runtime.resize_sandbox(&id, update).await,
                ));
            }
            Op::LimitedVolume(number) => {
                let kind = VolumeKind::EmptyDir {
                    memory: false,
                    size_limit: 1 << 20,
                };
                drop(self.write_volume(&id, format!("v{number}"), kind).await);
            }
            Op::KeptVolume => {
                let kind = VolumeKind::Disk {
                    volume: volume(self.pod),
                    read_only: false,
                    group_change: GroupChange::OnRootMismatch,
                };
                if self.write_volume(&id, "kept".into(), kind).await.is_ok() {
                    self.model().pod(self.pod).has_volume = true;
                }
            }
            Op::FilesVolume => {
                let files = VolumeKind::Files {
                    files: Default::default(),
                };
                drop(self.write_volume(&id, "files".into(), files).await);
            }
            Op::Device => {
                let device = HostDevice {
                    file: std::fs::File::open("/dev/null").unwrap(),
                    read_only: true,
                };
                drop(count(
                    "attach a device",
                    self.runtime.attach_device(&id, device).await,
                ));
                drop(self.runtime.detach_unused(&id).await);
            }
            _ => drop(count("statistics", self.runtime.stats(&id).await)),
        }
    }

    async fn write_volume(
        &self,
        id: &SandboxId,
        name: String,
        kind: VolumeKind,
    ) -> Result<(), RuntimeError> {
        let volume = VolumeConfig {
            name,
            kind,
            gid: None,
        };
        count(
            "write a volume",
            self.runtime.write_volume(id, volume).await,
        )
    }

    async fn suspend(&self, suspended: bool) {
        let Some(id) = self.sandbox() else { return };
        self.model().pod(self.pod).suspended = None;
        let told = match suspended {
            true => count("suspend", self.runtime.suspend_sandbox(&id).await),
            false => count("resume", self.runtime.resume_sandbox(&id).await),
        };
        if told.is_ok() {
            self.model().pod(self.pod).suspended = Some(suspended);
        }
    }

    /// Whether programs of the sandbox can do anything.
    fn goes_on(&self, id: &SandboxId) -> bool {
        self.world.vmm.stands_still(id) == Some(false)
    }

    async fn pull_image(&self) {
        for (name, own) in [("web", 2), ("box", 3)] {
            if self.runtime.image(name).await.is_none() {
                let config = ImageConfig {
                    entrypoint: vec!["/program".into()],
                    ..ImageConfig::default()
                };
                self.world.images.add(name, &[1, own], config);
            }
            let reference = name.parse().unwrap();
            let none = Credentials::default();
            drop(self.runtime.pull_image(&reference, none, None).await);
        }
    }

    async fn remove_image(&self) {
        let name = ["web", "box"][usize::from(self.pod) % 2];
        let users = || -> Vec<ContainerId> {
            let model = self.model();
            let pods = model.pods.values().filter(|pod| !pod.remove_asked);
            let containers = pods.flat_map(|pod| pod.containers.values());
            let users = containers.filter(|it| !it.remove_asked && it.image == name);
            users.filter_map(|it| it.id.clone()).collect()
        };
        let before = users();
        if count("remove an image", self.runtime.remove_image(name).await).is_err() {
            return;
        }
        if let Some(user) = users().iter().find(|user| before.contains(user)) {
            self.broken(format!("image {name} was removed from under {user}"));
        }
    }

    async fn stop_sandbox(&self) {
        let Some(id) = self.sandbox() else { return };
        {
            let mut model = self.model();
            let pod = model.pod(self.pod);
            pod.stop_asked = true;
            for container in pod.containers.values_mut() {
                container.end_asked = true;
            }
        }
        if count("stop a sandbox", self.runtime.stop_sandbox(&id).await).is_ok() {
            self.model().pod(self.pod).stopped = true;
            self.no_vm(&id, "stopped");
        }
    }

    async fn remove_sandbox(&self) {
        let Some(id) = self.sandbox() else { return };
        {
            let mut model = self.model();
            let pod = model.pod(self.pod);
            (pod.stop_asked, pod.remove_asked) = (true, true);
            for container in pod.containers.values_mut() {
                container.end_asked = true;
                container.remove_asked = true;
                for file in container.rotated.drain(..) {
                    drop(std::fs::remove_file(file));
                }
            }
        }
        if count("remove a sandbox", self.runtime.remove_sandbox(&id).await).is_ok() {
            self.model().removed(self.pod);
            self.no_vm(&id, "removed");
        }
    }

    fn no_vm(&self, id: &SandboxId, what: &str) {
        if self.world.vmm.sandboxes().contains(id) {
            self.broken(format!("sandbox {id} is {what} and has a VM"));
        }
    }
}
