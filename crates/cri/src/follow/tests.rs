use std::{fs, os::unix::fs::symlink, path::Path};

use super::*;

fn volume<'a>(followed: &'a Followed, sandbox: &SandboxId, name: &str) -> &'a Volume {
    &followed.volumes[sandbox][name]
}

fn wanted(names: &[&str], root: &Path) -> BTreeMap<String, PathBuf> {
    let entry = |name: &&str| ((*name).to_owned(), root.join(name));
    names.iter().map(entry).collect()
}

fn settled(names: &[&str]) -> Vec<(String, Found)> {
    let entry = |name: &&str| ((*name).to_owned(), Found::Settled);
    names.iter().map(entry).collect()
}

#[test]
fn a_volume_that_changes_all_the_time_is_looked_at_once_in_a_while() {
    let (mut followed, sandbox) = (Followed::new(None), SandboxId::random());
    let begun = Instant::now();
    followed.set(&sandbox, wanted(&["a"], Path::new("/x")), begun);
    let (mut looks, step) = (0, Duration::from_millis(10));
    let mut now = begun;
    while now < begun + 10 * REST {
        followed.touch_all(now);
        let due = followed.take_due(now);
        looks += due.len();
        followed.changed(vec![Change::Anywhere], now);
        if !due.is_empty() {
            followed.looked(&sandbox, settled(&["a"]), now);
        }
        now += step;
    }
    assert_eq!(looks, 10);
    // What came last is not forgotten.
    let next = followed.next_due().unwrap();
    assert!(next <= now + REST);
    assert_eq!(followed.take_due(next).len(), 1);
}

#[test]
fn one_look_at_a_time_in_a_sandbox_and_failures_ever_more_rarely() {
    let (mut followed, a, b) = (
        Followed::new(None),
        SandboxId::random(),
        SandboxId::random(),
    );
    let mut now = Instant::now();
    followed.set(&a, wanted(&["one", "two"], Path::new("/x")), now);
    let due = followed.take_due(now);
    assert_eq!(due[0].1.len(), 2);
    followed.changed(vec![Change::Anywhere], now);
    assert!(followed.take_due(now + ROUND).is_empty() && followed.next_due().is_none());
    followed.set(&b, wanted(&["one"], Path::new("/y")), now);
    assert_eq!(followed.take_due(now)[0].0, b, "another does not wait");

    let mut waits = Vec::new();
    followed.looked(&b, settled(&["one"]), now);
    for _ in 0..8 {
        let failed = |name: &str| (name.to_owned(), Found::Failed("no answer".into()));
        followed.looked(&a, vec![failed("one"), failed("two")], now);
        // What changes does not make it earlier.
        followed.changed(vec![Change::Anywhere], now);
        let next = volume(&followed, &a, "one").due.unwrap();
        waits.push(next - now);
        now = next;
        let due = followed.take_due(now);
        let due = due.iter().find(|(sandbox, _)| *sandbox == a).unwrap();
        assert_eq!(due.1.len(), 2);
        followed.looked(&b, settled(&["one"]), now);
    }
    assert!(
        waits.is_sorted() && waits[0] == RETRY && waits[7] == ROUND,
        "{waits:?}"
    );
    followed.looked(&a, settled(&["one", "two"]), now);
    assert_eq!(volume(&followed, &a, "one").failures, 0);
    followed.set(&a, BTreeMap::new(), now);
    followed.looked(&a, settled(&["one"]), now);
    assert_eq!(followed.sandboxes(), [b]);
}

#[tokio::test]
async fn directories_are_watched_as_long_as_anybody_mounts_them() {
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (SandboxId::random(), SandboxId::random());
    fs::create_dir(temp.path().join("v")).unwrap();
    let mut followed = Followed::new(Some(Watches::new().unwrap()));
    let now = Instant::now();
    for sandbox in [&a, &b] {
        followed.set(sandbox, wanted(&["v"], temp.path()), now);
    }
    drop(followed.take_due(now));
    for sandbox in [&a, &b] {
        followed.looked(sandbox, settled(&["v"]), now);
    }
    followed.set(&a, BTreeMap::new(), now);
    symlink("x", temp.path().join("v/..data")).unwrap();
    let changes = followed.changes(now).await;
    followed.changed(changes, now);
    assert!(volume(&followed, &b, "v").due.is_some());

    // Gone, and there again: a look at everything finds it.
    fs::remove_dir_all(temp.path().join("v")).unwrap();
    while volume(&followed, &b, "v").watch.is_some() {
        let changes = followed.changes(now).await;
        followed.changed(changes, now);
    }
    fs::create_dir(temp.path().join("v")).unwrap();
    followed.touch_all(now);
    assert!(volume(&followed, &b, "v").watch.is_some());
    let watch = volume(&followed, &b, "v").watch;
    followed.set(&b, BTreeMap::new(), now);
    let watches = followed.watches.as_ref().unwrap();
    assert_ne!(
        watches.add(&temp.path().join("v")).ok(),
        watch,
        "it had ended"
    );
}
