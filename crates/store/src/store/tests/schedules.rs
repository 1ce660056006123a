//! Random schedules of writes, crashes, power failures and full disks.
//!
//! A model knows what each writer was told. A write that was acknowledged as synced is there after any
//! end; one that failed is never seen while the process lives, and not after a later one has succeeded;
//! one without an answer is there as a whole or not at all; revisions never go back; and what the past
//! in the file tells leads from what was there to what is there.

use std::{collections::BTreeSet, time::Duration};

use hypernetes_testkit::Seeded;
use proptest::collection::vec;

use super::{platter::Platter, *};

const WRITERS: u8 = 3;
const KEYS: u8 = 4;

#[derive(Debug, Clone)]
struct Txn {
    writer: u8,
    /// Which of the writer's keys, and whether it is deleted.
    keys: Vec<(u8, bool)>,
    relaxed: bool,
    /// On the first key: that it is as the writer knows it.
    guarded: bool,
    size: u16,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Orderly,
    Killed,
    PowerFailure,
}

#[derive(Debug, Clone)]
struct Life {
    txns: Vec<Txn>,
    /// The disk operation in which it ends; after all writes if there are fewer.
    operation: u16,
    end: End,
    /// First operation with a full disk, and how many.
    full: (u16, u8),
    seed: u64,
}

fn schedule() -> impl Strategy<Value = Vec<Life>> {
    let keys = vec((0..KEYS, prop::bool::weighted(0.25)), 1..3);
    let txn = (
        0..WRITERS,
        keys,
        prop::bool::weighted(0.3),
        any::<bool>(),
        1u16..9000,
    );
    let txn = txn.prop_map(|(writer, keys, relaxed, guarded, size)| Txn {
        writer,
        keys,
        relaxed,
        guarded,
        size,
    });
    let end = prop_oneof![
        1 => Just(End::Orderly),
        2 => Just(End::Killed),
        4 => Just(End::PowerFailure),
    ];
    let full = prop_oneof![2 => Just((0, 0)), 1 => (0u16..120, 1u8..40)];
    let life = (vec(txn, 1..30), 0u16..150, end, full, any::<u64>());
    let life = life.prop_map(|(txns, operation, end, full, seed)| Life {
        txns,
        operation,
        end,
        full,
        seed,
    });
    vec(life, 1..6)
}

/// What a key may be: values by the text in them, `None` = absent.
type Text = Option<String>;

#[derive(Debug, Clone)]
struct Version {
    text: Text,
    /// When it was answered, and how.
    answered: Option<(u64, bool)>,
    relaxed: bool,
}

#[derive(Debug, Default)]
struct KeyModel {
    /// Known to be on disk, if no later one is.
    base: Text,
    later: Vec<Version>,
}

impl KeyModel {
    /// What a reader sees while the process lives.
    fn visible(&self) -> &Text {
        let acknowledged = |it: &&Version| matches!(it.answered, Some((_, true)));
        let last = self.later.iter().rfind(acknowledged);
        last.map_or(&self.base, |version| &version.text)
    }

    /// A synced write that was sent at this time is on disk, and so is what was acknowledged before; what
    /// had failed before can never be.
    fn synced(&mut self, sent: u64) {
        let before = |it: &Version| it.answered.is_some_and(|(at, _)| at < sent);
        let durable = |it: &Version| before(it) && matches!(it.answered, Some((_, true)));
        if let Some(last) = self.later.iter().rposition(durable) {
            self.base = self.later[last].text.clone();
            self.later.drain(..=last);
        }
        self.later.retain(|it| !before(it));
    }
}

#[derive(Debug, Default)]
struct Model {
    keys: BTreeMap<String, KeyModel>,
    /// Counts questions and answers.
    clock: u64,
    highest: Revision,
    broken: Vec<String>,
    /// Whole states, by revision.
    states: Vec<(Revision, super::Model)>,
    /// Per writer, keys and text of the write without an answer.
    open: BTreeMap<u8, Vec<(String, Text)>>,
}

fn claim(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

struct Bed {
    platter: Platter,
    model: Arc<std::sync::Mutex<Model>>,
}

impl Bed {
    fn open(&self) -> Result<Store, String> {
        let platter = self.platter.clone();
        let open = move |_: &Path| {
            let builder = &mut Database::builder();
            builder
                .set_cache_size(1 << 20)
                .create_with_backend(platter.clone())
        };
        let opened = Store::open_with(Path::new("platter"), StoreConfig::default(), open);
        opened.map_err(|error| error.to_string())
    }

    async fn live(&self, store: &Store, number: usize, life: &Life) {
        let writer = |writer| async move {
            let own = life.txns.iter().enumerate();
            for (index, txn) in own.filter(|(_, txn)| txn.writer == writer) {
                if self.platter.is_dead() {
                    return;
                }
                self.write(store, txn, &format!("{number}.{index}")).await;
            }
        };
        tokio::join!(writer(0), writer(1), writer(2));
    }

    async fn write(&self, store: &Store, txn: &Txn, name: &str) {
        let mut changes: BTreeMap<String, Text> = BTreeMap::new();
        for (key, delete) in &txn.keys {
            let text = (!delete).then(|| name.to_owned());
            changes.insert(format!("w{}/{key}", txn.writer), text);
        }
        let first = changes.keys().next().unwrap().clone();
        let mut compares = Vec::new();
        if txn.guarded {
            compares.push(match store.get(&first) {
                Some(entry) => Compare::ModRevision(first, entry.mod_revision),
                None => Compare::Absent(first),
            });
        }
        let padding = "x".repeat(txn.size.into());
        let op = |(key, text): (&String, &Text)| match text {
            Some(text) => put(key, &format!("{text} {padding}")),
            None => Op::Delete(key.clone()),
        };
        let ops = changes.iter().map(op).collect();
        // Deleting what is not there is no write, and makes none durable.
        let nothing = changes
            .iter()
            .all(|(key, text)| text.is_none() && store.get(key).is_none());
        let sent = self.ask(txn, &changes, txn.relaxed || nothing);
        let durability = match txn.relaxed {
            true => Durability::Relaxed,
            false => Durability::Sync,
        };
        let answer = store.txn(compares, ops, durability).await;
        let mut model = self.model.lock().unwrap();
        let model = &mut *model;
        if self.platter.is_dead() && answer.is_err() {
            return;
        }
        model.clock += 1;
        model.open.remove(&txn.writer);
        let at = model.clock;
        for key in changes.keys() {
            let version = model.keys.get_mut(key).unwrap().later.last_mut().unwrap();
            version.answered = Some((at, answer.is_ok()));
        }
        match answer {
            Ok(revision) => {
                model.highest = model.highest.max(revision);
                if !txn.relaxed && !nothing {
                    // Its own change is as durable as what came before.
                    for (key, model) in &mut model.keys {
                        let until = if changes.contains_key(key) {
                            at + 1
                        } else {
                            sent
                        };
                        model.synced(until);
                    }
                }
            }
            Err(StoreError::Write { .. }) => {}
            Err(error) => model.broken.push(format!("{name}: {error}")),
        }
        for key in changes.keys() {
            let seen = text_of(store.get(key));
            let told = model.keys[key].visible();
            if seen != *told {
                model
                    .broken
                    .push(format!("{key} is {seen:?}, not {told:?}"));
            }
        }
    }

    fn ask(&self, txn: &Txn, changes: &BTreeMap<String, Text>, relaxed: bool) -> u64 {
        let mut model = self.model.lock().unwrap();
        model.clock += 1;
        for (key, text) in changes {
            let version = Version {
                text: text.clone(),
                answered: None,
                relaxed,
            };
            model
                .keys
                .entry(key.clone())
                .or_default()
                .later
                .push(version);
        }
        let open = changes
            .iter()
            .map(|(key, text)| (key.clone(), text.clone()));
        model.open.insert(txn.writer, open.collect());
        model.clock
    }

    /// What was told before the end is true of what is found after it.
    async fn look(&self, orderly: bool) -> Result<Store, String> {
        let store = self.open()?;
        let mut model = self.model.lock().unwrap();
        let broken = std::mem::take(&mut model.broken);
        claim(broken.is_empty(), || broken.join("; "))?;
        let revision = store.revision();
        claim(revision >= model.highest, || {
            format!("revision {revision} is behind {}", model.highest)
        })?;
        let open = std::mem::take(&mut model.open);
        for changes in open.values() {
            let found = changes
                .iter()
                .map(|(key, text)| text_of(store.get(key)) == *text);
            let found: BTreeSet<bool> = found.collect();
            // Keys that were so before anyway say nothing.
            let telling = changes.iter().all(|(key, text)| {
                let known = &model.keys[key];
                let same = known.later.iter().filter(|it| it.text == *text);
                known.base != *text && same.count() == 1
            });
            claim(found.len() == 1 || !telling, || {
                format!("half of {changes:?} is there")
            })?;
        }
        for (key, known) in &mut model.keys {
            let found = text_of(store.get(key));
            let failed = |it: &&Version| matches!(it.answered, Some((_, false)));
            let may = match orderly {
                true => known.visible() == &found,
                false => known.base == found || known.later.iter().any(|it| it.text == found),
            };
            claim(may, || format!("{key} is {found:?}, not of {known:?}"))?;
            let lost = known
                .later
                .iter()
                .filter(|it| !failed(it) && it.answered.is_some());
            let lost = lost.filter(|it| !it.relaxed).count();
            claim(lost == 0, || {
                format!("{key}: {lost} synced writes are not counted")
            })?;
            known.base = found;
            known.later.clear();
        }
        past(&store, &model.states)?;
        model.highest = revision;
        model.states.push((revision, state_of(&store, None)));
        drop(model);
        Ok(store)
    }
}

/// What the past tells leads from each earlier state to the present one.
fn past(store: &Store, states: &[(Revision, super::Model)]) -> Result<(), String> {
    let present = state_of(store, None);
    for (revision, state) in states {
        match store.list("", Some(*revision), None, None) {
            Err(StoreError::Compacted { .. }) => continue,
            Err(error) => return Err(format!("the state at {revision}: {error}")),
            Ok(_) => {
                let now = state_of(store, Some(*revision));
                claim(now == *state, || {
                    format!("at {revision}: {now:?}, it was {state:?}")
                })?;
            }
        }
        let mut watch = store
            .watch("", Some(*revision))
            .map_err(|error| error.to_string())?;
        let mut values: BTreeMap<String, String> = state
            .iter()
            .map(|(key, (.., value))| (key.clone(), value.clone()))
            .collect();
        while let Some(change) = watch.try_next().map_err(|error| error.to_string())? {
            let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            let before = match &change.value {
                Some(value) => values.insert(change.key.clone(), text(value)),
                None => values.remove(&change.key),
            };
            let told = change.previous.as_ref().map(text);
            claim(before == told, || {
                format!("{} before {}", change.key, change.revision)
            })?;
        }
        let now = present
            .iter()
            .map(|(key, (.., value))| (key.clone(), value.clone()));
        claim(now.eq(values), || {
            format!("the changes since {revision} lead elsewhere")
        })?;
    }
    Ok(())
}

fn text_of(entry: Option<crate::Entry>) -> Text {
    let text = String::from_utf8(entry?.value.to_vec()).unwrap();
    Some(text.split(' ').next().unwrap().to_owned())
}

fn run(lives: &[Life]) -> Result<(), String> {
    let bed = Bed {
        platter: Platter::default(),
        model: Arc::default(),
    };
    let process = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    process.unwrap().block_on(async {
        let mut store = bed.open()?;
        for (number, life) in lives.iter().enumerate() {
            let orderly = matches!(life.end, End::Orderly);
            let last = (!orderly).then_some(u64::from(life.operation));
            let (from, count) = (u64::from(life.full.0), u64::from(life.full.1));
            bed.platter.begin(last, from..from + count);
            bed.live(&store, number, life).await;
            if orderly {
                bed.platter.begin(None, 0..0);
            } else {
                bed.platter.die();
            }
            drop(store);
            let mut seed = life.seed | 1;
            let draw = |below: u64| {
                // xorshift64*
                seed ^= seed >> 12;
                seed ^= seed << 25;
                seed ^= seed >> 27;
                (seed.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % below
            };
            let power = matches!(life.end, End::PowerFailure);
            bed.platter.restart(power, draw);
            store = bed
                .look(orderly)
                .await
                .map_err(|error| format!("after life {number}: {error}"))?;
        }
        Ok(())
    })
}

#[test]
fn no_crash_power_failure_or_full_disk_makes_an_acknowledged_write_untrue() {
    let seeded = Seeded {
        name: "schedules of the store",
        least: 100,
        most: Duration::from_secs(8),
        threads: 2,
        shrink: Duration::from_secs(30),
    };
    seeded.check(schedule, |lives| run(lives));
}
