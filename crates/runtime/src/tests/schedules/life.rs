//! Carries a schedule out.

use std::{
    cell::Cell,
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock, Mutex, Once,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hypernetes_agent_api::{fake::Behaviour, v1};
use hypernetes_store::{Durability, Op as Write, Value};
use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_vmm::VmExit;
use hypernetes_volume::{VolumeDriver, VolumeMode};

use super::{
    check,
    client::{Client, name, volume},
    model::Model,
    plan::{Answer, End, Fault, Life, METHODS, PODS},
};
use crate::{
    records::Records,
    testing::{Gate, Trouble, World},
    *,
};

/// Panics of schedules, by schedule.
static PANICS: LazyLock<Mutex<HashMap<u64, Vec<String>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(1);
thread_local! {
    static SCHEDULE: Cell<u64> = const { Cell::new(0) };
}
const THREADS: &str = "schedule-";
/// Longest time until what was left half done is put right.
const SETTLED: Duration = Duration::from_secs(20);

/// From now on a panic in any task of a schedule is a failure of it.
pub(super) fn watch_for_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let former = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let thread = std::thread::current();
            let worker = thread.name().and_then(|name| name.strip_prefix(THREADS));
            let schedule = worker
                .and_then(|number| number.parse().ok())
                .unwrap_or_else(|| SCHEDULE.get());
            let mut panics = PANICS.lock().unwrap();
            panics.entry(schedule).or_default().push(panic.to_string());
            drop(panics);
            former(panic);
        }));
    });
}

/// What outlives a runtime, and what callers know.
struct Bed {
    number: u64,
    world: Arc<World>,
    model: Arc<Mutex<Model>>,
}

pub(super) fn run(lives: &[Life]) -> Result<(), String> {
    let number = NEXT.fetch_add(1, Ordering::SeqCst);
    SCHEDULE.set(number);
    let result = schedule(number, lives);
    let panics = PANICS.lock().unwrap().remove(&number);
    match panics {
        Some(panics) => Err(format!("panics: {panics:?}; {result:?}")),
        None => result,
    }
}

fn schedule(number: u64, lives: &[Life]) -> Result<(), String> {
    let bed = Bed::new(number);
    for (index, life) in lives.iter().enumerate() {
        let at = |error| format!("life {index}: {error}");
        bed.live(life).map_err(at)?;
        if life.look {
            bed.look(false)
                .map_err(|error| format!("after {}", at(error)))?;
        }
    }
    bed.look(true)
        .map_err(|error| format!("at the end: {error}"))
}

/// The process that a runtime lives in: dropping it ends every task at once, as a kill does, and waits
/// for file work that a kill would not see half done.
fn process(number: u64) -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name(format!("{THREADS}{number}"))
        .build()
        .unwrap()
}

impl Bed {
    fn new(number: u64) -> Self {
        let world = process(number).block_on(async {
            let world = World::new().await;
            for pod in 0..PODS {
                let id = volume(pod).parse().unwrap();
                let mode = VolumeMode::Filesystem;
                world.volumes.create(&id, 1 << 20, mode).await.unwrap();
            }
            world
        });
        Self {
            number,
            world: Arc::new(world),
            model: Arc::default(),
        }
    }

    fn gate(&self) -> &Gate {
        &self.world.gate
    }

    /// As long as it takes, or so short that much is late.
    fn config(&self, patient: bool) -> RuntimeConfig {
        let short = |ms| match patient {
            true => Duration::from_secs(10),
            false => Duration::from_millis(ms),
        };
        // What is waited for when something ends; a guest that stands still takes all of it.
        let ending = |ms| match patient {
            true => Duration::from_secs(2),
            false => Duration::from_millis(ms),
        };
        RuntimeConfig {
            deadlines: Deadlines {
                boot: short(1500),
                call: short(250),
                kill: ending(300),
                drain: ending(150),
                shutdown: ending(200),
                flush: ending(200),
                beat: Duration::from_secs(5),
                silent: short(500),
                readopt: short(250),
            },
            ..self.world.config()
        }
    }

    fn live(&self, life: &Life) -> Result<(), String> {
        let limit = match life.end {
            End::Orderly | End::After(_) => u64::MAX,
            End::AtEffect(effect) | End::PowerFailure(effect, _) => effect.into(),
        };
        self.gate().close_after(limit);
        for (effect, fault) in &life.faults {
            let (world, model) = (Arc::clone(&self.world), Arc::clone(&self.model));
            let fault = fault.clone();
            let apply = move || apply(&world, &model, &fault);
            self.gate().at((*effect).into(), apply);
        }
        let process = process(self.number);
        process.block_on(async {
            let moment = match life.end {
                End::After(ms) => Duration::from_millis(ms.into()),
                _ => Duration::from_secs(60),
            };
            tokio::select! {
                () = self.serve(life) => {}
                () = self.gate().hit() => {}
                () = tokio::time::sleep(moment) => {}
            }
        });
        drop(process);
        self.calm();
        if let End::PowerFailure(_, seed) = life.end {
            self.power_failure(seed);
        }
        let broken = std::mem::take(&mut self.model.lock().unwrap().broken);
        match broken.is_empty() {
            true => Ok(()),
            false => Err(broken.join("; ")),
        }
    }

    /// All callers at a time.
    async fn serve(&self, life: &Life) {
        // One that cannot be opened ends, and the next one tries again.
        let Ok(runtime) = NodeRuntime::open(self.config(false)).await else {
            return;
        };
        let pods = (0..PODS).map(|pod| {
            let client = Client {
                world: &self.world,
                runtime: &runtime,
                model: &self.model,
                pod,
            };
            async move {
                for (_, op) in life.ops.iter().filter(|(of, _)| *of == pod) {
                    client.ask(op).await;
                }
            }
        });
        futures::future::join_all(pods).await;
    }

    /// Nothing goes wrong any more, and what was written when the process ended is found.
    fn calm(&self) {
        self.gate().open();
        self.gate().calm();
        self.world.calm_agents(&METHODS);
        for file in files(&self.world.temp.path().join("state")) {
            if file.extension().is_some_and(|end| end == "full") {
                std::fs::remove_file(file).unwrap();
            }
        }
        let left = self.gate().take_limbo();
        let store = self.world.store.clone();
        process(self.number).block_on(async move {
            // Behind whatever the process has given to the store.
            let barrier = Write::Put("/barrier".into(), Value::Bytes("".into()));
            for ops in [left, vec![barrier]] {
                store.txn(Vec::new(), ops, Durability::Sync).await.unwrap();
            }
        });
    }

    /// Every VM ends; of files that nobody has synced anything may be left.
    fn power_failure(&self, mut seed: u64) {
        let mut draw = |below: u64| {
            // xorshift64*
            seed |= 1;
            seed ^= seed >> 12;
            seed ^= seed << 25;
            seed ^= seed >> 27;
            (seed.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % below
        };
        self.world.end_vms();
        let root = self.world.temp.path();
        if draw(2) == 0 {
            // Often in memory.
            drop(std::fs::remove_dir_all(root.join("run")));
        }
        for file in [
            files(&root.join("state/sandboxes")),
            files(&root.join("logs")),
        ]
        .concat()
        {
            if file.ends_with("memory.vm") {
                // Synced before it has this name.
                continue;
            }
            let length = std::fs::metadata(&file).unwrap().len();
            let open = || std::fs::File::options().write(true).open(&file).unwrap();
            match draw(4) {
                0 => {}
                1 => open().set_len(draw(length + 1)).unwrap(),
                2 => {
                    // The length came to the disk, the last blocks did not.
                    let kept = draw(length + 1);
                    open().set_len(kept).unwrap();
                    open().set_len(length).unwrap();
                }
                _ => std::fs::remove_file(&file).unwrap(),
            }
        }
        for directory in directories(&root.join("state/sandboxes")) {
            if draw(6) == 0 && !directory.join("memory.vm").exists() {
                std::fs::remove_dir_all(directory).unwrap();
            }
        }
        let mut model = self.model.lock().unwrap();
        for pod in model.pods.values_mut() {
            pod.lost |= pod.run_asked;
            for container in pod.containers.values_mut() {
                (container.end_asked, container.torn) = (true, true);
            }
        }
    }

    /// A runtime without faults agrees with what callers know; with `last`, everything is removed.
    fn look(&self, last: bool) -> Result<(), String> {
        let process = process(self.number);
        process.block_on(async {
            let runtime = NodeRuntime::open(self.config(true)).await;
            let runtime = runtime.map_err(|error| {
                let error = hypernetes_telemetry::chain(&error).to_string();
                format!("the runtime cannot be opened: {error}")
            })?;
            let report = runtime.recovery_report().clone();
            if !report.failures.is_empty() {
                return Err(format!("recovery: {report:?}"));
            }
            let agrees = || check::agreement(&self.world, &runtime, &self.model);
            settled(agrees).await?;
            check::note(&runtime, &self.model).await;
            if last {
                self.remove_all(&runtime).await?;
            }
            Ok(())
        })
    }

    async fn remove_all(&self, runtime: &NodeRuntime) -> Result<(), String> {
        for pod in self.model.lock().unwrap().pods.values() {
            for container in pod.containers.values() {
                for file in &container.rotated {
                    drop(std::fs::remove_file(file));
                }
            }
        }
        for status in runtime.list_sandboxes().await {
            let removed = runtime.remove_sandbox(&status.id).await;
            removed.map_err(|error| {
                let error = hypernetes_telemetry::chain(&error).to_string();
                format!("{} cannot be removed: {error}", status.id)
            })?;
        }
        check::nothing_left(&self.world).await?;
        // Nor is a user id held by nobody.
        let free = runtime.free_uids();
        match free {
            8 => Ok(()),
            free => Err(format!("{free} of 8 user ids are free")),
        }
    }
}

/// Waits until it holds, and tells why it does not.
async fn settled<F>(holds: impl Fn() -> F) -> Result<(), String>
where
    F: Future<Output = Result<(), String>>,
{
    let until = tokio::time::Instant::now() + SETTLED;
    loop {
        match holds().await {
            Ok(()) => return Ok(()),
            Err(why) if tokio::time::Instant::now() > until => return Err(why),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Sandboxes of a pod that are recorded, whether its caller knows of them or not.
fn sandboxes_of(world: &World, pod: u8) -> Vec<SandboxId> {
    let records = Records::new(world.store.clone()).sandboxes();
    let records = records.unwrap_or_default().into_iter();
    let uid = format!("uid-{}", name(pod));
    records
        .filter(|record| record.config.metadata.uid == uid)
        .map(|record| record.id)
        .collect()
}

fn apply(world: &World, model: &Mutex<Model>, fault: &Fault) {
    match *fault {
        Fault::VmEnds { pod, panic } => {
            for sandbox in sandboxes_of(world, pod) {
                let text = String::from("on purpose");
                let exit = match panic {
                    true => VmExit::Panic { console_tail: text },
                    false => VmExit::VmmDied { status: text },
                };
                world.vmm.end(&sandbox, exit);
                model.lock().unwrap().lose(pod);
            }
        }
        Fault::AgentForgets { pod } => {
            for sandbox in sandboxes_of(world, pod) {
                world.replace_agent(&sandbox);
                model.lock().unwrap().lose(pod);
            }
        }
        Fault::Disconnects { pod } => {
            for sandbox in sandboxes_of(world, pod) {
                world.agent(&sandbox).disconnect();
            }
        }
        Fault::Agent { pod, method, how } => {
            let behaviour = match how {
                Answer::Fails => Behaviour::Fail(tonic::Code::Internal, "on purpose".into()),
                Answer::Stalls => Behaviour::Stall,
                Answer::Oversized => Behaviour::Oversize,
            };
            for sandbox in sandboxes_of(world, pod) {
                world
                    .agent(&sandbox)
                    .set_behaviour(method, behaviour.clone());
            }
        }
        Fault::Lies {
            pod,
            container,
            known,
        } => {
            let Some((sandbox, id)) = model.lock().unwrap().ids(pod, container) else {
                return;
            };
            let (id, phase) = match known {
                true => (id, v1::ContainerPhase::Running),
                false => (ContainerId::random(), v1::ContainerPhase::Exited),
            };
            world.agent(&sandbox).emit(v1::ContainerState {
                id: id.to_string(),
                phase: phase.into(),
                ..Default::default()
            });
        }
        Fault::Fails {
            place,
            count,
            done,
            kind,
        } => {
            let trouble = match done {
                true => Trouble::After(kind),
                false => Trouble::Before(kind),
            };
            let trouble = std::iter::repeat_n(trouble, count.into());
            world.gate.make_trouble(place, trouble);
        }
        Fault::Slow { place, count, ms } => {
            let trouble = Trouble::Slow(Duration::from_millis(ms.into()));
            let trouble = std::iter::repeat_n(trouble, count.into());
            world.gate.make_trouble(place, trouble);
        }
        Fault::LogIsFull { pod, container } => {
            if let Some((sandbox, id)) = model.lock().unwrap().ids(pod, container) {
                let path = format!("state/sandboxes/{sandbox}/logs/{id}.full");
                // Without its directory there is no log either.
                drop(std::fs::write(world.temp.path().join(path), ""));
            }
        }
        Fault::ClockJumps(seconds) => {
            let nanos = i64::from(seconds) * 1_000_000_000;
            world.gate.set_clock_ahead(nanos);
        }
    }
}

/// All files beneath, in the order of their names.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(root).into_iter().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

fn directories(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).into_iter().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.is_dir());
    paths.sort();
    paths
}
