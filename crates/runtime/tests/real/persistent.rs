//! Volumes outlive pods, crashes and each other's faults.

use std::{
    fs,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use hypernetes_runtime::{
    ContainerConfig, DeviceConfig, GroupChange, NodeRuntime, PodRuntime, RuntimeError,
    SandboxConfig, VolumeConfig, VolumeKind,
};
use hypernetes_types::{ContainerId, SandboxId};
use hypernetes_volume::{LocalConfig, LocalVolumes, VolumeDriver, VolumeId, VolumeMode};

use super::{Bed, container, eventually, exec, mount_of, start};

const MIB: u64 = 1 << 20;

fn disk(volume: &str, read_only: bool) -> VolumeConfig {
    VolumeConfig {
        name: volume.into(),
        kind: VolumeKind::Disk {
            volume: volume.into(),
            read_only,
            group_change: GroupChange::OnRootMismatch,
        },
        gid: (!read_only).then_some(2000),
    }
}

fn with_data(name: &str, block: bool) -> ContainerConfig {
    let devices = block.then(|| DeviceConfig {
        volume: "raw".into(),
        destination: "/dev/raw".into(),
        ..DeviceConfig::default()
    });
    ContainerConfig {
        mounts: vec![mount_of("data", "/data", "")],
        devices: devices.into_iter().collect(),
        ..container(name, "exec sleep 1000")
    }
}

struct Pod<'a> {
    runtime: &'a NodeRuntime,
    sandbox: SandboxId,
    container: ContainerId,
}

impl<'a> Pod<'a> {
    async fn start(bed: &Bed, runtime: &'a NodeRuntime, name: &str) -> Self {
        let sandbox = runtime.run_sandbox(sandbox(bed, name)).await.unwrap();
        let volume = disk("data", false);
        runtime.write_volume(&sandbox, volume).await.unwrap();
        let config = with_data(name, true);
        let container = start(runtime, &sandbox, config).await;
        Self {
            runtime,
            sandbox,
            container,
        }
    }

    async fn sh(&self, script: &str) -> (String, i32) {
        exec(self.runtime, &self.container, &["sh", "-c", script], None).await
    }

    /// What a script that succeeds prints.
    async fn says(&self, script: &str) -> String {
        let (text, code) = self.sh(script).await;
        assert_eq!(code, 0, "{script}: {text}");
        text.trim().to_owned()
    }
}

/// With logs of its own: they go with each.
fn sandbox(bed: &Bed, name: &str) -> SandboxConfig {
    SandboxConfig {
        log_directory: bed.temp.path().join("logs").join(name),
        ..bed.sandbox(name)
    }
}

fn id(name: &str) -> VolumeId {
    name.parse().unwrap()
}

/// Whether the file system's journal is to be replayed, by its superblock.
fn needs_recovery(dir: &Path) -> bool {
    const RECOVER: u8 = 4;
    let mut byte = [0];
    let disk = fs::File::open(dir.join("data/disk")).unwrap();
    disk.read_exact_at(&mut byte, 1024 + 96).unwrap();
    byte[0] & RECOVER != 0
}

async fn in_use(runtime: &NodeRuntime, sandbox: &SandboxId, read_only: bool, by: &str) {
    let refused = runtime.write_volume(sandbox, disk("data", read_only)).await;
    match refused {
        Err(RuntimeError::VolumeInUse { by: who, .. }) => assert_eq!(who, [by]),
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn volumes_outlive_pods() {
    let mut bed = Bed::new().await;
    let dir = bed.temp.path().join("state/volumes");
    let volumes = LocalVolumes::open_with(LocalConfig {
        dir: dir.clone(),
        limit_bytes: Some(1024 * MIB),
        mkfs: "/usr/sbin/mkfs.ext4".into(),
    });
    let volumes: Arc<dyn VolumeDriver> = Arc::new(volumes.await.unwrap());
    bed.config.volumes = Some(Arc::clone(&volumes));
    let (file_system, block) = (VolumeMode::Filesystem, VolumeMode::Block);
    for (name, mib, mode) in [
        ("data", 64, file_system),
        ("bad", 16, file_system),
        ("raw", 16, block),
    ] {
        volumes.create(&id(name), mib * MIB, mode).await.unwrap();
    }
    let runtime = bed.open().await;

    let a = Pod::start(&bed, &runtime, "a").await;
    assert_eq!(a.says("ls -A /data").await, "lost+found");
    assert_eq!(a.says("stat -c '%a %u %g' /data").await, "2775 0 2000");
    let options = a.says("grep ' /data ' /proc/mounts").await;
    assert!(
        options.contains("rw,") && options.contains("nodev"),
        "{options}"
    );
    assert!(!options.contains("nosuid"), "{options}");
    a.says("echo one > /data/one; mkdir /data/d; echo two > /data/d/two")
        .await;
    assert_eq!(a.says("stat -c %g /data/d /data/d/two").await, "2000\n2000");
    a.says("printf block > /dev/raw").await;

    // What is deleted goes back to the node.
    let used = || fs::metadata(dir.join("data/disk")).unwrap().blocks() * 512;
    a.says("dd if=/dev/zero of=/data/big bs=1M count=24 2>&1; sync")
        .await;
    assert!(used() > 24 * MIB);
    a.says("rm /data/big; sync").await;
    eventually("the node's file shrinks", async || used() < 16 * MIB).await;

    // It grows while it is in use.
    let room = async || {
        let text = a.says("df -Pm /data | tail -n 1").await;
        text.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let before = room().await;
    volumes.expand(&id("data"), 192 * MIB).await.unwrap();
    volumes.expand(&id("raw"), 32 * MIB).await.unwrap();
    for name in ["data", "raw"] {
        runtime.grow_volume(&a.sandbox, name).await.unwrap();
    }
    let after = room().await;
    println!("{before} MiB became {after} MiB");
    assert!(before < 64 && after > 160, "{before} {after}");
    assert_eq!(a.says("wc -c < /dev/raw").await, (32 * MIB).to_string());

    // Nobody else gets it, until the first pod is gone.
    let b = runtime.run_sandbox(sandbox(&bed, "b")).await.unwrap();
    for read_only in [false, true] {
        in_use(&runtime, &b, read_only, "test/a").await;
    }
    let begun = tokio::time::Instant::now();
    runtime.remove_sandbox(&a.sandbox).await.unwrap();
    println!("a pod with volumes went in {:?}", begun.elapsed());
    assert!(
        begun.elapsed() < Duration::from_secs(60),
        "the guest did not let go"
    );
    let b = Pod::start(&bed, &runtime, "b").await;
    // As it was, though nobody had asked for it to be written.
    assert_eq!(b.says("cat /data/one /data/d/two").await, "one\ntwo");
    assert_eq!(
        b.says("dd if=/dev/raw bs=5 count=1 2>/dev/null").await,
        "block"
    );
    b.says("echo three > /data/three; sync; printf other > /dev/raw; sync")
        .await;
    b.says("(while :; do echo x > /data/loop; mv /data/loop /data/loop2; done) >/dev/null 2>&1 &")
        .await;

    // The VMM dies in the middle of it.
    let pid = bed.vmm_pids()[0];
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    eventually("the sandbox has failed", async || {
        let status = runtime.sandbox(&b.sandbox).await.unwrap();
        status.failure.is_some()
    })
    .await;
    runtime.remove_sandbox(&b.sandbox).await.unwrap();
    assert!(needs_recovery(&dir), "no journal to replay");
    let c = Pod::start(&bed, &runtime, "c").await;
    assert_eq!(c.says("cat /data/one /data/three").await, "one\nthree");
    assert_eq!(
        c.says("dd if=/dev/raw bs=5 count=1 2>/dev/null").await,
        "other"
    );

    // One that is broken fails its own use, by name, and nothing else.
    let mut broken = fs::File::options()
        .write(true)
        .open(dir.join("bad/disk"))
        .unwrap();
    broken.seek(SeekFrom::Start(4096)).unwrap();
    broken.write_all(&vec![0xa5; 1 << 20]).unwrap();
    let error = runtime.write_volume(&c.sandbox, disk("bad", false)).await;
    let error = error.unwrap_err().to_string();
    println!("{error}");
    assert!(error.contains("mount volume bad as ext4"), "{error}");
    assert_eq!(
        c.says("echo four > /data/four; cat /data/four").await,
        "four"
    );
    // Suspended it keeps them, and what it has of them in memory is not lost with it.
    c.says("echo five > /data/five").await;
    runtime.suspend_sandbox(&c.sandbox).await.unwrap();
    assert!(bed.vmm_pids().is_empty(), "there is a VM");
    runtime.resume_sandbox(&c.sandbox).await.unwrap();
    let script = "cat /data/five /data/four; echo six > /data/six";
    assert_eq!(c.says(script).await, "five\nfour");
    runtime.suspend_sandbox(&c.sandbox).await.unwrap();
    runtime.remove_sandbox(&c.sandbox).await.unwrap();

    // Nothing but readers, of what the last pod has unmounted.
    assert!(!needs_recovery(&dir), "not unmounted");
    let d = runtime.run_sandbox(sandbox(&bed, "d")).await.unwrap();
    volumes.attach(&id("data"), "another", true).await.unwrap();
    let writes = runtime.write_volume(&d, disk("data", false)).await;
    assert!(matches!(writes, Err(RuntimeError::VolumeInUse { .. })));
    runtime.write_volume(&d, disk("data", true)).await.unwrap();
    let reader = start(&runtime, &d, with_data("d", false)).await;
    let files = "cat /data/four /data/five /data/six; echo x > /data/x";
    let script = ["sh", "-c", files];
    let (text, code) = exec(&runtime, &reader, &script, None).await;
    assert!(code != 0 && text.starts_with("four\nfive\nsix\n"), "{text}");
    assert!(text.contains("Read-only file system"), "{text}");
    runtime.remove_sandbox(&d).await.unwrap();
    volumes.detach(&id("data"), "another").await.unwrap();
    for volume in volumes.list().await.unwrap() {
        assert!(volume.attached_to.is_empty(), "{volume:?}");
        volumes.delete(&volume.id).await.unwrap();
    }
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}
