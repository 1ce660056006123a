use std::{fs, os::unix::fs::MetadataExt, path::Path};

use super::*;

const MIB: u64 = 1 << 20;

fn id(name: &str) -> VolumeId {
    name.parse().unwrap()
}

async fn open(dir: &Path, limit_mib: u64) -> LocalVolumes {
    let config = LocalConfig {
        dir: dir.join("volumes"),
        limit_bytes: Some(limit_mib * MIB),
        // Formats nothing, successfully.
        mkfs: "true".into(),
    };
    LocalVolumes::open_with(config).await.unwrap()
}

/// Everything in a directory, by relative path.
fn tree(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_string_lossy();
            found.push(name.into_owned());
            if path.is_dir() {
                left.push(path);
            }
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn a_volume_is_made_once_and_goes_whole() {
    let temp = tempfile::tempdir().unwrap();
    let volumes = open(temp.path(), 16).await;
    let a = id("a");
    assert_eq!(volumes.get(&a).await.unwrap(), None);
    for _ in 0..2 {
        let made = volumes.create(&a, MIB + 1, VolumeMode::Block).await;
        let made = made.unwrap();
        assert_eq!((made.bytes, made.mode), (2 * MIB, VolumeMode::Block));
        assert!(made.attached_to.is_empty());
    }
    let disk = temp.path().join("volumes/a/disk").metadata().unwrap();
    assert_eq!((disk.len(), disk.mode() & 0o777), (2 * MIB, 0o600));
    assert!(disk.blocks() * 512 < MIB, "not sparse");
    for (bytes, mode) in [(MIB, VolumeMode::Block), (2 * MIB, VolumeMode::Filesystem)] {
        let other = volumes.create(&a, bytes, mode).await;
        assert!(
            matches!(other, Err(VolumeError::Conflict { .. })),
            "{other:?}"
        );
    }
    for bytes in [0, MOST + 1] {
        let wrong = volumes.create(&id("b"), bytes, VolumeMode::Block).await;
        assert!(matches!(
            wrong,
            Err(VolumeError::Invalid { field: "size", .. })
        ));
    }
    assert_eq!(volumes.list().await.unwrap().len(), 1);
    for _ in 0..2 {
        volumes.delete(&a).await.unwrap();
    }
    assert_eq!(tree(temp.path()), ["volumes"]);
}

#[tokio::test]
async fn no_more_is_promised_than_there_may_be() {
    let temp = tempfile::tempdir().unwrap();
    let volumes = open(temp.path(), 4).await;
    let (a, b) = (id("a"), id("b"));
    volumes
        .create(&a, 3 * MIB, VolumeMode::Block)
        .await
        .unwrap();
    let capacity = volumes.capacity().await.unwrap();
    assert_eq!((capacity.total, capacity.allocated), (4 * MIB, 3 * MIB));
    let refused = volumes.create(&b, 2 * MIB, VolumeMode::Block).await;
    assert!(
        matches!(refused, Err(VolumeError::NoSpace { bytes, free }) if (bytes, free) == (2 * MIB, MIB))
    );
    assert_eq!(
        tree(&temp.path().join("volumes")),
        ["a", "a/disk", "a/volume.json"]
    );
    let refused = volumes.expand(&a, 5 * MIB).await;
    assert!(matches!(refused, Err(VolumeError::NoSpace { bytes, .. }) if bytes == 2 * MIB));
    assert_eq!(volumes.expand(&a, 4 * MIB).await.unwrap().bytes, 4 * MIB);
    // What is there takes no room again, and smaller is no wish.
    assert_eq!(volumes.expand(&a, MIB).await.unwrap().bytes, 4 * MIB);
    let disk = temp.path().join("volumes/a/disk");
    assert_eq!(disk.metadata().unwrap().len(), 4 * MIB);
    let unknown = volumes.expand(&b, MIB).await;
    assert!(matches!(unknown, Err(VolumeError::NotFound { .. })));
    drop(volumes);

    // Without a limit it is what the file system has, and what volumes have of it.
    let volumes = LocalVolumes::open(temp.path().join("volumes"), None)
        .await
        .unwrap();
    let capacity = volumes.capacity().await.unwrap();
    assert_eq!(capacity.allocated, 4 * MIB);
    assert!(capacity.total > 0 && capacity.free() == capacity.total - 4 * MIB);
}

#[tokio::test]
async fn one_writes_or_many_read() {
    let temp = tempfile::tempdir().unwrap();
    let volumes = open(temp.path(), 16).await;
    let a = id("a");
    volumes.create(&a, MIB, VolumeMode::Block).await.unwrap();
    let in_use = |result: Result<BlockDevice, VolumeError>, by: &[&str]| match result {
        Err(VolumeError::InUse { by: who, .. }) => assert_eq!(who, by),
        other => panic!("{other:?}"),
    };
    for _ in 0..2 {
        let device = volumes.attach(&a, "one", false).await.unwrap();
        assert_eq!((device.bytes, device.read_only), (MIB, false));
        std::os::unix::fs::FileExt::write_all_at(&device.file, b"x", 7).unwrap();
    }
    in_use(volumes.attach(&a, "two", false).await, &["one"]);
    in_use(volumes.attach(&a, "two", true).await, &["one"]);
    // A writer that asks for less may write still.
    let device = volumes.attach(&a, "one", true).await.unwrap();
    std::os::unix::fs::FileExt::write_all_at(&device.file, b"x", 7).unwrap_err();
    in_use(volumes.attach(&a, "two", true).await, &["one"]);
    assert!(matches!(
        volumes.delete(&a).await,
        Err(VolumeError::InUse { .. })
    ));

    // Also after a restart.
    drop(volumes);
    let volumes = open(temp.path(), 16).await;
    in_use(volumes.attach(&a, "two", true).await, &["one"]);
    for _ in 0..2 {
        volumes.detach(&a, "one").await.unwrap();
    }
    for pod in ["two", "three"] {
        assert!(volumes.attach(&a, pod, true).await.unwrap().read_only);
    }
    in_use(volumes.attach(&a, "two", false).await, &["three"]);
    in_use(volumes.attach(&a, "one", false).await, &["two", "three"]);
    volumes.detach(&a, "three").await.unwrap();
    assert!(!volumes.attach(&a, "two", false).await.unwrap().read_only);
    in_use(volumes.attach(&a, "three", true).await, &["two"]);
    assert_eq!(volumes.get(&a).await.unwrap().unwrap().attached_to, ["two"]);
    assert_eq!(volumes.expand(&a, 2 * MIB).await.unwrap().bytes, 2 * MIB);
    volumes.detach(&id("unknown"), "two").await.unwrap();
    let unknown = volumes.attach(&id("unknown"), "two", true).await;
    assert!(matches!(unknown, Err(VolumeError::NotFound { .. })));
}

#[tokio::test]
async fn what_was_cut_short_is_gone_at_the_next_start() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("volumes");
    drop(open(temp.path(), 16).await);
    for name in [".new-a", ".old-b", ".new-"] {
        fs::create_dir_all(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("disk"), "half").unwrap();
    }
    fs::write(dir.join("README"), "not a volume").unwrap();
    let volumes = open(temp.path(), 16).await;
    assert_eq!(tree(&dir), ["README"]);
    // A record that was being replaced is the old one.
    let a = id("a");
    volumes.create(&a, MIB, VolumeMode::Block).await.unwrap();
    fs::write(dir.join("a/.volume.json.new"), "{").unwrap();
    // A file that was being expanded is larger than what is promised.
    fs::File::options()
        .write(true)
        .open(dir.join("a/disk"))
        .unwrap()
        .set_len(3 * MIB)
        .unwrap();
    drop(volumes);
    let volumes = open(temp.path(), 16).await;
    assert_eq!(volumes.get(&a).await.unwrap().unwrap().bytes, MIB);
    volumes.attach(&a, "one", false).await.unwrap();
    assert_eq!(volumes.expand(&a, 2 * MIB).await.unwrap().bytes, 2 * MIB);
    assert_eq!(dir.join("a/disk").metadata().unwrap().len(), 3 * MIB);
    drop(volumes);

    // What is broken is told, not guessed at.
    fs::File::create(dir.join("a/disk")).unwrap();
    let volumes = open(temp.path(), 16).await;
    let error = volumes.attach(&a, "one", false).await.unwrap_err();
    assert!(matches!(error, VolumeError::Storage { .. }), "{error:?}");
    drop(volumes);
    for wrong in [
        "{",
        r#"{"version":2,"bytes":1,"mode":"block","attached":[]}"#,
    ] {
        fs::write(dir.join("a/volume.json"), wrong).unwrap();
        let error = LocalVolumes::open(&dir, None).await.unwrap_err();
        assert!(error.to_string().contains("volume a"), "{error}");
    }
}

#[tokio::test]
async fn a_format_that_fails_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    for mkfs in ["false", "/nonexistent/mkfs"] {
        let config = LocalConfig {
            dir: temp.path().join("volumes"),
            limit_bytes: None,
            mkfs: mkfs.into(),
        };
        let volumes = LocalVolumes::open_with(config).await.unwrap();
        let made = volumes.create(&id("a"), MIB, VolumeMode::Filesystem).await;
        let error = made.unwrap_err().to_string();
        assert!(error.contains("format volume a"), "{error}");
        assert_eq!(tree(temp.path()), ["volumes"]);
        assert_eq!(volumes.capacity().await.unwrap().allocated, 0);
    }
}

#[tokio::test]
async fn a_file_system_is_empty_sparse_and_has_a_journal() {
    const HAS_JOURNAL: u8 = 4;
    let temp = tempfile::tempdir().unwrap();
    let Some(mkfs) = ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"]
        .into_iter()
        .find(|path| Path::new(path).exists())
    else {
        println!("SKIP: mkfs.ext4 is not installed");
        return;
    };
    let config = LocalConfig {
        dir: temp.path().join("volumes"),
        limit_bytes: Some(64 << 40),
        mkfs: mkfs.into(),
    };
    let volumes = LocalVolumes::open_with(config).await.unwrap();
    for (mib, journal) in [
        (1, false),
        (8, true),
        (16, true),
        (10_240, true),
        (1 << 20, true),
    ] {
        let one = id(&format!("v{mib}"));
        volumes
            .create(&one, mib * MIB, VolumeMode::Filesystem)
            .await
            .unwrap();
        let device = volumes.attach(&one, "pod", false).await.unwrap();
        let mut superblock = [0; 1024];
        std::os::unix::fs::FileExt::read_exact_at(&device.file, &mut superblock, 1024).unwrap();
        assert_eq!(superblock[56..58], [0x53, 0xef], "{mib} MiB");
        assert_eq!(superblock[92] & HAS_JOURNAL != 0, journal, "{mib} MiB");
        let used = device.file.metadata().unwrap().blocks() * 512;
        assert!(used < 160 * MIB, "{mib} MiB take {used} bytes");
    }
}
