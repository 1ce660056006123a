use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::testing::Gate;

const MIB: u64 = 1 << 20;

/// A disk on which so many MiB can be had.
struct Disk {
    temp: tempfile::TempDir,
    room: Room,
}

impl Disk {
    fn new(usable_mib: u64) -> Self {
        let gate = Gate::default();
        gate.enter();
        let temp = tempfile::tempdir().unwrap();
        let directory = temp.path().join("sandboxes");
        std::fs::create_dir(&directory).unwrap();
        gate.set_free(temp.path(), KEPT + usable_mib * MIB);
        let room = Room::new(directory);
        Self { temp, room }
    }

    fn write(&self, name: &str, mib: usize) {
        let file = self.temp.path().join("sandboxes").join(name);
        std::fs::write(file, vec![1; mib << 20]).unwrap();
    }

    fn promised(&self) -> u64 {
        self.room.0.lock().sum() / MIB
    }

    /// A promise that must be given at once.
    async fn promise(&self, least: u64, most: u64) -> Promise {
        self.try_promise(least, most).await.unwrap().unwrap()
    }

    /// None if it waits.
    async fn try_promise(&self, least: u64, most: u64) -> Option<Result<Promise, RuntimeError>> {
        let promise = self.room.promise(need(least, most));
        timeout(Duration::from_millis(200), promise).await.ok()
    }
}

fn need(least: u64, most: u64) -> Need {
    Need {
        what: "the memory",
        least: least * MIB,
        most: most * MIB,
    }
}

fn failed(kind: io::ErrorKind) -> RuntimeError {
    let source = kind.into();
    VmmError::Io {
        action: "move",
        path: "/x".into(),
        source,
    }
    .into()
}

#[tokio::test]
async fn a_part_of_the_disk_stays_free() {
    let disk = Disk::new(5);
    assert_eq!(disk.promise(1, 3).await.bytes(), 3 * MIB);
    let all = disk.promise(1, 300).await;
    assert_eq!((all.bytes() / MIB, disk.promised()), (5, 5));
    drop(all);
    disk.write("a", 5);
    let error = disk.try_promise(1, 300).await.unwrap().unwrap_err();
    let text = error.to_string();
    assert!(text.contains("300 MiB") && text.contains("0 MiB"), "{text}");
    assert_eq!(disk.promised(), 0);
}

#[tokio::test]
async fn nobody_is_promised_what_others_are() {
    let disk = Disk::new(10);
    let first = disk.promise(1, 6).await;
    let second = disk.promise(1, 4).await;
    // It would fit without them, and waits; what would not is refused at once.
    assert!(disk.try_promise(1, 3).await.is_none());
    let refused = disk.try_promise(11, 12).await.unwrap();
    assert!(matches!(refused, Err(RuntimeError::NoRoom { .. })));
    assert_eq!(disk.promised(), 10, "who has given up has nothing");
    let third = disk.room.promise(need(1, 3));
    let give_back = async {
        // What it wrote stays, what it did not is there for others.
        disk.write("first", 2);
        drop(first);
    };
    let (third, ()) = tokio::join!(third, give_back);
    assert_eq!(third.unwrap().bytes(), 3 * MIB);
    // One is alone: there is no use in waiting.
    drop(second);
    let rest = disk.promise(1, 100).await.bytes();
    assert!((7 * MIB..=8 * MIB).contains(&rest), "{rest}");
}

#[tokio::test]
async fn a_large_need_is_not_passed_by_small_ones() {
    let disk = Disk::new(10);
    let small = disk.promise(1, 1).await;
    let large = disk.room.promise(need(1, 10));
    let later = async {
        // As soon as the first waits.
        tokio::task::yield_now().await;
        disk.room.promise(need(1, 1)).await.unwrap().bytes()
    };
    let give_back = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(small);
    };
    let large = async { large.await.unwrap().bytes() };
    let (large, later, ()) = tokio::join!(large, later, give_back);
    assert_eq!((large, later), (10 * MIB, MIB));
    assert_eq!(disk.promised(), 0);
}

#[tokio::test]
async fn a_promise_changes_with_what_is_to_be_written_still() {
    let disk = Disk::new(11);
    let mut promise = disk.promise(1, 8).await;
    disk.write("memory", 6);
    promise.renew(4 * MIB).await.unwrap();
    assert_eq!((promise.bytes(), disk.promised()), (4 * MIB, 4));
    let error = promise.renew(8 * MIB).await.unwrap_err().to_string();
    assert!(error.contains("it may need 8 MiB"), "{error}");
    assert_eq!(disk.promised(), 4, "it has what it had");
    drop(promise);
    assert_eq!(disk.promised(), 0);
}

#[tokio::test]
async fn a_renewal_that_was_given_up_leaves_nothing_promised() {
    let disk = Disk::new(10);
    for _ in 0..20 {
        let mut promise = disk.promise(1, 8).await;
        tokio::select! {
            biased;
            renewed = promise.renew(2 * MIB) => renewed.unwrap(),
            () = tokio::task::yield_now() => {}
        }
        drop(promise);
        // Whatever was begun has ended when the whole of it can be had.
        assert_eq!(disk.promise(10, 10).await.bytes(), 10 * MIB);
        assert_eq!(disk.promised(), 0);
    }
}

#[tokio::test]
async fn a_full_disk_is_named_and_other_failures_are_not() {
    let disk = Disk::new(7);
    let part = disk.promise(1, 300).await;
    let text = part.explain(failed(io::ErrorKind::FileTooLarge));
    let text = text.to_string();
    assert!(text.contains("300 MiB") && text.contains("7 MiB"), "{text}");
    let no_room = |promise: &Promise, kind| {
        let error = promise.explain(failed(kind));
        matches!(error, RuntimeError::NoRoom { .. })
    };
    assert!(no_room(&part, io::ErrorKind::StorageFull));
    assert!(!no_room(&part, io::ErrorKind::PermissionDenied));
    drop(part);
    let all = disk.promise(1, 7).await;
    assert!(!no_room(&all, io::ErrorKind::FileTooLarge));
}

#[tokio::test]
async fn a_file_system_is_looked_at() {
    Gate::default().enter();
    let temp = tempfile::tempdir().unwrap();
    let room = Room::new(temp.path().to_owned());
    room.promise(need(0, 0)).await.unwrap();
    let room = Room::new("/nonexistent/x".into());
    let error = room.promise(need(0, 0)).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Storage { .. }), "{error}");
}
