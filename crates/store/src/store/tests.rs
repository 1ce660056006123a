use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use proptest::prelude::*;
use redb::{StorageBackend, backends::FileBackend};

use super::*;
use crate::{Change, Value};

mod platter;
mod schedules;

fn put(key: &str, value: &str) -> Op {
    Op::Put(
        key.into(),
        Value::Bytes(Bytes::copy_from_slice(value.as_bytes())),
    )
}

fn memory() -> Store {
    Store::in_memory(StoreConfig::default()).unwrap()
}

async fn write(store: &Store, key: &str, value: &str) -> Revision {
    store
        .txn(vec![], vec![put(key, value)], Durability::Sync)
        .await
        .unwrap()
}

#[tokio::test]
async fn comparisons_guard_the_whole_transaction() {
    let store = memory();
    let first = write(&store, "a", "1").await;
    let conflict = store
        .txn(
            vec![Compare::Absent("a".into())],
            vec![put("b", "x")],
            Durability::Sync,
        )
        .await
        .unwrap_err();
    let StoreError::Conflict { key, current } = conflict else {
        panic!("{conflict}")
    };
    assert_eq!((key.as_str(), current.unwrap().mod_revision), ("a", first));
    assert_eq!(store.get("b"), None);
    let second = store
        .txn(
            vec![
                Compare::ModRevision("a".into(), first),
                Compare::Absent("b".into()),
            ],
            vec![put("a", "2"), put("b", "2")],
            Durability::Sync,
        )
        .await
        .unwrap();
    assert_eq!(second, first + 1);
    assert_eq!(store.get("a").unwrap().create_revision, first);
    assert_eq!(store.get("b").unwrap().create_revision, second);
    let stale = vec![Compare::ModRevision("a".into(), first)];
    assert!(store.txn(stale, vec![], Durability::Sync).await.is_err());
}

#[tokio::test]
async fn one_of_many_concurrent_creations_wins() {
    let store = memory();
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..64 {
        let store = store.clone();
        tasks.spawn(async move {
            let compares = vec![Compare::Absent("k".into())];
            store
                .txn(
                    compares,
                    vec![put("k", &index.to_string())],
                    Durability::Sync,
                )
                .await
        });
    }
    let results = tasks.join_all().await;
    assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
    assert_eq!(store.revision(), 1);
}

#[tokio::test]
async fn values_may_carry_their_revision() {
    let store = memory();
    write(&store, "x", "").await;
    let value = Value::WithRevision(Arc::new(|revision| Bytes::from(revision.to_string())));
    let revision = store
        .txn(vec![], vec![Op::Put("a".into(), value)], Durability::Sync)
        .await
        .unwrap();
    assert_eq!(store.get("a").unwrap().value, revision.to_string());
}

#[tokio::test]
async fn deleting_nothing_is_no_write() {
    let store = memory();
    let revision = write(&store, "a", "1").await;
    let same = store
        .txn(vec![], vec![Op::Delete("z".into())], Durability::Sync)
        .await
        .unwrap();
    assert_eq!(same, revision);
    assert!(
        store
            .txn(vec![], vec![Op::Delete("a".into())], Durability::Sync)
            .await
            .unwrap()
            > revision
    );
    assert_eq!(store.get("a"), None);
    assert_eq!(store.get_at("a", revision).unwrap().unwrap().value, "1");
}

#[tokio::test]
async fn pages_of_a_list_are_of_one_moment() {
    let store = memory();
    for name in ["p/a", "p/b", "p/c", "q/a"] {
        write(&store, name, "1").await;
    }
    let first = store.list("p/", None, None, Some(2)).unwrap();
    assert_eq!(
        (first.entries.len(), first.more, first.remaining),
        (2, true, 1)
    );
    store
        .txn(
            vec![],
            vec![Op::Delete("p/c".into()), put("p/d", "2")],
            Durability::Sync,
        )
        .await
        .unwrap();
    let rest = store
        .list("p/", Some(first.revision), Some("p/b"), Some(2))
        .unwrap();
    let keys: Vec<&str> = rest.entries.iter().map(|e| e.key.as_str()).collect();
    assert_eq!((keys, rest.more), (vec!["p/c"], false));
    assert!(matches!(
        store.list("p/", Some(99), None, None),
        Err(StoreError::Future { .. })
    ));
}

#[tokio::test]
async fn a_watch_replays_and_goes_on() {
    let store = memory();
    let first = write(&store, "a/1", "x").await;
    write(&store, "a/2", "y").await;
    let mut watch = store.watch("a/", Some(first)).unwrap();
    write(&store, "b/1", "z").await;
    let last = store
        .txn(vec![], vec![Op::Delete("a/1".into())], Durability::Sync)
        .await
        .unwrap();
    assert_eq!(watch.next().await.unwrap().key, "a/2");
    let gone = watch.next().await.unwrap();
    assert_eq!(
        *gone,
        Change {
            revision: last,
            key: "a/1".into(),
            value: None,
            previous: Some("x".into())
        }
    );
    assert_eq!(watch.try_next().unwrap(), None);
    let other = write(&store, "b/2", "z").await;
    store.reached(other).await.unwrap();
    assert_eq!(watch.progress(), other);
}

#[tokio::test]
async fn a_long_past_is_replayed_in_parts_whole_and_in_order() {
    let store = memory();
    let value = |number: usize| format!("{number:04}").repeat(400);
    for number in 0..600 {
        write(&store, &format!("a/{}", number % 7), &value(number)).await;
        write(&store, "b", &value(number)).await;
    }
    let mut watch = store.watch("a/", Some(0)).unwrap();
    write(&store, "a/x", "live").await;
    for number in 0..600_usize {
        let change = watch.next().await.unwrap();
        assert_eq!(change.revision, 2 * number as u64 + 1);
        assert_eq!(change.value.as_ref().unwrap(), value(number).as_bytes());
        let previous = number
            .checked_sub(7)
            .map(|before| Bytes::from(value(before)));
        assert_eq!(change.previous, previous, "of change {number}");
        if number < 500 {
            assert_eq!(watch.progress(), change.revision - 1);
        }
    }
    assert_eq!(watch.next().await.unwrap().key, "a/x");
    assert_eq!(watch.try_next().unwrap(), None);
    // Superseded values are read as they were by lists, too.
    let page = store.list("a/", Some(99), None, None).unwrap();
    assert_eq!(page.entries[0].value, value(49).as_bytes());
}

#[tokio::test]
async fn a_watcher_that_the_window_leaves_behind_in_its_past_is_told() {
    let store = Store::in_memory(StoreConfig {
        history_changes: 200,
        ..Default::default()
    })
    .unwrap();
    for _ in 0..200 {
        write(&store, "a", "x").await;
    }
    let mut watch = store.watch("", Some(0)).unwrap();
    for _ in 0..200 {
        write(&store, "a", "y").await;
    }
    let mut heard = 0;
    let error = loop {
        match watch.next().await {
            Ok(change) => {
                heard += 1;
                assert_eq!(change.revision, heard);
            }
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, StoreError::Lagged { delivered } if delivered == heard),
        "{error}"
    );
    assert!((100..200).contains(&heard), "{heard}");
}

#[tokio::test]
async fn a_slow_watcher_is_ended_after_what_it_had() {
    let store = Store::in_memory(StoreConfig {
        watch_queue: 2,
        ..Default::default()
    })
    .unwrap();
    let mut watch = store.watch("", None).unwrap();
    for index in 0..5 {
        write(&store, &index.to_string(), "").await;
    }
    assert_eq!(watch.next().await.unwrap().revision, 1);
    assert_eq!(watch.next().await.unwrap().revision, 2);
    assert!(matches!(
        watch.next().await,
        Err(StoreError::Lagged { delivered: 2 })
    ));
}

#[tokio::test]
async fn what_left_the_window_is_compacted() {
    let store = Store::in_memory(StoreConfig {
        history_changes: 3,
        ..Default::default()
    })
    .unwrap();
    for _ in 0..10 {
        write(&store, "a", "x").await;
    }
    assert_eq!(store.oldest_revision(), 7);
    assert!(matches!(
        store.watch("", Some(6)),
        Err(StoreError::Compacted { oldest: 7, .. })
    ));
    let mut watch = store.watch("", Some(7)).unwrap();
    assert_eq!(watch.next().await.unwrap().revision, 8);
}

#[tokio::test]
async fn closing_ends_everything() {
    let store = memory();
    let mut watch = store.watch("", None).unwrap();
    store.close();
    assert!(matches!(watch.next().await, Err(StoreError::Closed)));
    assert!(matches!(
        store.txn(vec![], vec![], Durability::Sync).await,
        Err(StoreError::Closed)
    ));
}

#[tokio::test]
async fn everything_is_there_after_an_orderly_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let store = Store::open(&path, StoreConfig::default()).unwrap();
    write(&store, "a", "1").await;
    let revision = store
        .txn(vec![], vec![put("b", "2")], Durability::Relaxed)
        .await
        .unwrap();
    drop(store);
    let store = Store::open(&path, StoreConfig::default()).unwrap();
    assert_eq!(store.revision(), revision);
    assert_eq!(store.get("b").unwrap().mod_revision, revision);
    let mut watch = store.watch("", Some(1)).unwrap();
    assert_eq!(watch.next().await.unwrap().key, "b");
    assert_eq!(write(&store, "c", "3").await, revision + 1);
}

/// What a watcher of everything after `from` is told up to `last`.
async fn told(store: &Store, from: Revision, last: Revision) -> Vec<Change> {
    let mut watch = store.watch("", Some(from)).unwrap();
    let mut changes = Vec::new();
    while changes
        .last()
        .is_none_or(|change: &Change| change.revision < last)
    {
        changes.push((*watch.next().await.unwrap()).clone());
    }
    changes
}

#[tokio::test]
async fn the_past_is_there_after_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let store = Store::open(&path, StoreConfig::default()).unwrap();
    for (key, value) in [("a", "1"), ("b", "1"), ("a", "2")] {
        write(&store, key, value).await;
    }
    let delete = |key: &str| vec![Op::Delete(key.to_owned())];
    store
        .txn(vec![], delete("a"), Durability::Sync)
        .await
        .unwrap();
    write(&store, "a", "3").await;
    let last = store
        .txn(vec![], delete("b"), Durability::Relaxed)
        .await
        .unwrap();
    let before = told(&store, 0, last).await;
    let state = |store: &Store, at: Revision| -> Vec<Entry> {
        store.list("", Some(at), None, None).unwrap().entries
    };
    let states: Vec<_> = (0..=last).map(|at| state(&store, at)).collect();
    for _again in 0..2 {
        store.close();
        let store = Store::open(&path, StoreConfig::default()).unwrap();
        assert_eq!(told(&store, 0, last).await, before);
        for at in 0..=last {
            assert_eq!(state(&store, at), states[usize::try_from(at).unwrap()]);
        }
        store.close();
    }
}

#[tokio::test]
async fn the_past_in_the_file_has_an_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let config = StoreConfig {
        durable_changes: 100,
        ..StoreConfig::default()
    };
    let store = Store::open(&path, config.clone()).unwrap();
    let mut last = 0;
    for turn in 0..3000 {
        let durability = match turn % 50 {
            0 => Durability::Sync,
            _ => Durability::Relaxed,
        };
        let ops = vec![put(&format!("k{}", turn % 7), &turn.to_string())];
        last = store.txn(vec![], ops, durability).await.unwrap();
    }
    store.close();
    let store = Store::open(&path, config).unwrap();
    let oldest = store.oldest_revision();
    assert!((100..=1200).contains(&(last - oldest)), "{oldest} {last}");
    assert!(store.watch("", Some(oldest - 1)).is_err());
    let changes = told(&store, oldest, last).await;
    let revisions: Vec<Revision> = changes.iter().map(|change| change.revision).collect();
    assert_eq!(revisions, ((oldest + 1)..=last).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_past_with_a_gap_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let store = Store::open(&path, StoreConfig::default()).unwrap();
    write(&store, "a", "1").await;
    let last = write(&store, "a", "2").await;
    store.close();
    // As a version leaves it that writes without knowing of the past.
    let database = Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    let mut table = transaction.open_table(meta).unwrap();
    table.insert("revision", last + 5).unwrap();
    drop(table);
    transaction.commit().unwrap();
    drop(database);
    let store = Store::open(&path, StoreConfig::default()).unwrap();
    assert!(matches!(
        store.watch("", Some(1)),
        Err(StoreError::Compacted { .. })
    ));
    assert_eq!(store.get("a").unwrap().value, "2");
    let next = write(&store, "b", "1").await;
    assert_eq!(told(&store, last + 5, next).await.len(), 1);
}

#[tokio::test]
async fn a_backup_is_a_store_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("state"), StoreConfig::default()).unwrap();
    write(&store, "a", "1").await;
    store
        .txn(vec![], vec![put("b", "2")], Durability::Relaxed)
        .await
        .unwrap();
    let copy = directory.path().join("copy");
    let revision = store.backup(&copy).unwrap();
    write(&store, "c", "3").await;
    let copy = Store::open(&copy, StoreConfig::default()).unwrap();
    assert_eq!(copy.revision(), revision);
    assert_eq!(copy.list("", None, None, None).unwrap().entries.len(), 2);
    assert!(store.backup(&directory.path().join("none/copy")).is_err());
}

#[test]
fn what_is_no_store_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    std::fs::write(&path, "not a store, but long enough to look like something").unwrap();
    assert!(matches!(
        Store::open(&path, StoreConfig::default()),
        Err(StoreError::Open { .. })
    ));
}

/// A file on a disk that can be made full.
#[derive(Debug)]
struct Disk {
    file: FileBackend,
    full: Arc<AtomicBool>,
}

impl Disk {
    fn check(&self) -> Result<(), std::io::Error> {
        if self.full.load(Ordering::SeqCst) {
            return Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
        }
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, std::io::Error> {
        self.file.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        self.file.read(offset, out)
    }
    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        self.check()?;
        self.file.set_len(len)
    }
    fn sync_data(&self) -> Result<(), std::io::Error> {
        self.check()?;
        self.file.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        self.check()?;
        self.file.write(offset, data)
    }
    fn close(&self) -> Result<(), std::io::Error> {
        self.file.close()
    }
}

fn on_disk(path: &Path, full: &Arc<AtomicBool>) -> Store {
    let full = Arc::clone(full);
    let open = move |path: &Path| {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let disk = Disk {
            file: FileBackend::new(file)?,
            full: Arc::clone(&full),
        };
        Database::builder().create_with_backend(disk)
    };
    Store::open_with(path, StoreConfig::default(), open).unwrap()
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_is_survived() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let full = Arc::new(AtomicBool::new(false));
    let store = on_disk(&path, &full);
    let before = write(&store, "a", "1").await;
    let mut watch = store.watch("", None).unwrap();

    full.store(true, Ordering::SeqCst);
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            let durability = if index % 2 == 0 {
                Durability::Sync
            } else {
                Durability::Relaxed
            };
            // The first failure makes the relaxed ones durable too, so that none is taken in vain.
            let _ = store
                .txn(vec![], vec![put("first", "x")], Durability::Sync)
                .await;
            store
                .txn(vec![], vec![put(&format!("lost/{index}"), "x")], durability)
                .await
        });
    }
    for result in tasks.join_all().await {
        assert!(
            matches!(result, Err(StoreError::Write { .. })),
            "{result:?}"
        );
    }
    assert_eq!(store.revision(), before);
    assert_eq!(store.get("first"), None);
    assert_eq!(watch.try_next().unwrap(), None);

    full.store(false, Ordering::SeqCst);
    let after = write(&store, "b", "2").await;
    assert!(after > before);
    assert_eq!(watch.next().await.unwrap().key, "b");
    drop((store, watch));
    let store = on_disk(&path, &full);
    let keys: Vec<String> = store
        .list("", None, None, None)
        .unwrap()
        .entries
        .into_iter()
        .map(|e| e.key)
        .collect();
    assert_eq!(keys, ["a", "b"]);
}

#[tokio::test]
async fn what_was_refused_is_not_there_after_an_orderly_end() {
    // The write reaches the file, its sync fails.
    let platter = platter::Platter::default();
    let open = || {
        let platter = platter.clone();
        let open = move |_: &Path| Database::builder().create_with_backend(platter.clone());
        Store::open_with(Path::new("platter"), StoreConfig::default(), open).unwrap()
    };
    drop(open());
    for operation in 1..60 {
        let store = open();
        platter.begin(None, operation..operation + 1);
        let put = vec![put("a", "1")];
        let refused = store.txn(vec![], put, Durability::Sync).await.is_err();
        drop(store);
        platter.begin(None, 0..0);
        let store = open();
        assert_eq!(
            store.get("a").is_none(),
            refused,
            "at operation {operation}"
        );
        if !refused {
            assert!(operation > 3, "only {operation} operations");
            return;
        }
    }
    panic!("the write never succeeds");
}

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    Guarded(u8, bool, u8),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u8..6, any::<u8>()).prop_map(|(k, v)| Step::Put(k, v)),
        3 => (0u8..6).prop_map(Step::Delete),
        3 => (0u8..6, any::<bool>(), any::<u8>()).prop_map(|(k, ok, v)| Step::Guarded(k, ok, v)),
        1 => Just(Step::Reopen),
    ]
}

type Model = BTreeMap<String, (Revision, Revision, String)>;

fn state_of(store: &Store, at: Option<Revision>) -> Model {
    store
        .list("", at, None, None)
        .unwrap()
        .entries
        .into_iter()
        .map(|e| {
            let value = String::from_utf8(e.value.to_vec()).unwrap();
            (e.key, (e.create_revision, e.mod_revision, value))
        })
        .collect()
}

async fn against_the_model(steps: Vec<Step>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let mut store = Store::open(&path, StoreConfig::default()).unwrap();
    let mut model = Model::new();
    let mut states: Vec<(Revision, Model)> = vec![(0, Model::new())];
    let mut watch = store.watch("", None).unwrap();
    for (index, step) in steps.into_iter().enumerate() {
        let durability = if index % 3 == 0 {
            Durability::Sync
        } else {
            Durability::Relaxed
        };
        let before = store.revision();
        let (key, compares, op, value) = match step {
            Step::Reopen => {
                drop((store, watch));
                store = Store::open(&path, StoreConfig::default()).unwrap();
                assert!(store.revision() >= before);
                watch = store.watch("", None).unwrap();
                states = vec![(store.revision(), model.clone())];
                assert_eq!(state_of(&store, None), model);
                continue;
            }
            Step::Put(k, v) => {
                let (key, value) = (format!("k{k}"), v.to_string());
                (key.clone(), vec![], put(&key, &value), Some(value))
            }
            Step::Delete(k) => (format!("k{k}"), vec![], Op::Delete(format!("k{k}")), None),
            Step::Guarded(k, ok, v) => {
                let (key, value) = (format!("k{k}"), v.to_string());
                let compare = match (model.get(&key), ok) {
                    (None, true) => Compare::Absent(key.clone()),
                    (Some(_), false) => Compare::Absent(key.clone()),
                    (Some((_, revision, _)), true) => Compare::ModRevision(key.clone(), *revision),
                    (None, false) => Compare::ModRevision(key.clone(), before),
                };
                let result = store
                    .txn(vec![compare.clone()], vec![], Durability::Sync)
                    .await;
                assert_eq!(result.is_ok(), ok);
                if !ok {
                    continue;
                }
                (key.clone(), vec![compare], put(&key, &value), Some(value))
            }
        };
        let revision = store.txn(compares, vec![op], durability).await.unwrap();
        let old = match &value {
            Some(value) => {
                let created = model.get(&key).map_or(revision, |(created, ..)| *created);
                model.insert(key.clone(), (created, revision, value.clone()))
            }
            None => model.remove(&key),
        };
        if old.is_none() && value.is_none() {
            assert_eq!(revision, before);
            continue;
        }
        assert_eq!(revision, before + 1);
        let change = watch.next().await.unwrap();
        assert_eq!(
            (change.revision, change.key.as_str()),
            (revision, key.as_str())
        );
        assert_eq!(change.value.as_deref(), value.as_deref().map(str::as_bytes));
        assert_eq!(
            change.previous.as_deref(),
            old.as_ref().map(|(.., v)| v.as_bytes())
        );
        states.push((revision, model.clone()));
    }
    for (revision, model) in &states {
        assert_eq!(&state_of(&store, Some(*revision)), model, "at {revision}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn behaves_as_the_model(steps in prop::collection::vec(step(), 1..60)) {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(against_the_model(steps));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_watchers_see_every_change_once_in_order() {
    let store = Store::in_memory(StoreConfig {
        watch_queue: 4096,
        ..Default::default()
    })
    .unwrap();
    let mut watchers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        watchers.spawn(async move {
            // Somewhere in the storm: what was before is replayed, what comes after is live.
            tokio::task::yield_now().await;
            let mut watch = store.watch("k/", Some(0)).unwrap();
            let mut seen = Vec::new();
            while seen.len() < 1000 {
                seen.push(watch.next().await.unwrap().revision);
                let progress = watch.progress();
                assert!(progress + 1 >= *seen.last().unwrap());
            }
            seen
        });
    }
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..10 {
        let store = store.clone();
        writers.spawn(async move {
            for index in 0..100 {
                write(&store, &format!("k/{writer}/{index}"), "v").await;
            }
        });
    }
    writers.join_all().await;
    for seen in watchers.join_all().await {
        assert_eq!(seen, (1..=1000).collect::<Vec<_>>());
    }
}
