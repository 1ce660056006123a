//! Files that the kubelet changes while containers run.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use hypernetes_cri::v1;
use hypernetes_runtime::{RuntimeError, VolumeKind, fake::FakeRuntime};
use hypernetes_types::SandboxId;

use crate::bed::Bed;

/// Writes a version as the kubelet's atomic writer does.
fn write(directory: &Path, version: &str, value: &str) {
    let data = directory.join("..data");
    let old = fs::read_link(&data);
    fs::create_dir_all(directory.join(version)).unwrap();
    fs::write(directory.join(version).join("key"), value).unwrap();
    symlink(version, directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), &data).unwrap();
    match old {
        Ok(old) => fs::remove_dir_all(directory.join(old)).unwrap(),
        Err(_) => symlink("..data/key", directory.join("key")).unwrap(),
    }
}

fn value(runtime: &FakeRuntime, sandbox: &str, volume: &str) -> Option<String> {
    let id: SandboxId = sandbox.parse().unwrap();
    let volumes = runtime.volumes(&id);
    match &volumes.get(volume)?.kind {
        VolumeKind::Files { files } => {
            let file = files.values().next()?;
            Some(String::from_utf8(file.content.to_vec()).unwrap())
        }
        _other => None,
    }
}

fn writes(runtime: &FakeRuntime, volume: &str) -> usize {
    let call = format!("write_volume {volume}");
    runtime.calls().iter().filter(|it| **it == call).count()
}

async fn until(bed: &Bed, what: &str, condition: impl Fn(&FakeRuntime) -> bool) {
    let wait = bed.runtime.wait_until(condition);
    let waited = tokio::time::timeout(Duration::from_secs(30), wait).await;
    assert!(waited.is_ok(), "{what}: {:?}", bed.runtime.calls());
}

async fn shows(bed: &Bed, sandbox: &str, volume: &str, content: &str) {
    let shown = |runtime: &FakeRuntime| value(runtime, sandbox, volume).as_deref() == Some(content);
    until(bed, &format!("{volume} shows {content}"), shown).await;
}

fn mount(host: &Path, container: &str) -> v1::Mount {
    v1::Mount {
        host_path: host.to_str().unwrap().into(),
        container_path: container.into(),
        readonly: true,
        ..Default::default()
    }
}

fn volume(bed: &Bed, kind: &str, name: &str) -> PathBuf {
    let pod = bed.temp.path().join("kubelet/pods/uid-a");
    let directory = pod.join(format!("volumes/kubernetes.io~{kind}/{name}"));
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// A pod `a` whose running container mounts a projected volume, a Secret and a sub path of it.
async fn mounted(bed: &mut Bed) -> (String, String, PathBuf, PathBuf) {
    let (token, secret) = (
        volume(bed, "projected", "token"),
        volume(bed, "secret", "s"),
    );
    write(&token, "..v1", "token 1");
    write(&secret, "..v1", "secret 1");
    let part = bed
        .temp
        .path()
        .join("kubelet/pods/uid-a/volume-subpaths/s/c/2");
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::hard_link(secret.join("..v1/key"), &part).unwrap();
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut config = Bed::container("c");
    config.mounts = vec![
        mount(&token, "/token"),
        mount(&secret, "/secret"),
        mount(&part, "/part"),
    ];
    let id = bed.create(&sandbox, config).await.unwrap();
    bed.start(&id).await.unwrap();
    (sandbox, id, token, secret)
}

#[tokio::test]
async fn what_the_kubelet_updates_is_carried_again() {
    let mut bed = Bed::new().await;
    let (sandbox, id, token, secret) = Box::pin(mounted(&mut bed)).await;
    for (number, version) in [(2, "..v2"), (3, "..v3")] {
        write(&token, version, &format!("token {number}"));
        shows(
            &bed,
            &sandbox,
            "projected.token",
            &format!("token {number}"),
        )
        .await;
    }
    write(&secret, "..v2", "secret 2");
    shows(&bed, &sandbox, "secret.s", "secret 2").await;
    // A sub path keeps its content.
    assert_eq!(
        value(&bed.runtime, &sandbox, "sub-path.c.2").as_deref(),
        Some("secret 1")
    );
    assert_eq!(writes(&bed.runtime, "sub-path.c.2"), 1);
    // What is the same does not travel, though its version is another.
    write(&secret, "..v3", "secret 2");
    write(&token, "..v4", "token 4");
    shows(&bed, &sandbox, "projected.token", "token 4").await;
    assert_eq!(writes(&bed.runtime, "secret.s"), 2);

    // Without its directory a volume keeps what it has; there again, it goes on with a container
    // that mounts it.
    fs::remove_dir_all(&token).unwrap();
    write(&secret, "..v4", "secret 3");
    shows(&bed, &sandbox, "secret.s", "secret 3").await;
    assert_eq!(
        value(&bed.runtime, &sandbox, "projected.token").as_deref(),
        Some("token 4")
    );
    // The next container has what is there when it is created, and what comes later.
    bed.runtime.exit(&id.parse().unwrap(), 0);
    write(&secret, "..v5", "secret 4");
    let mut config = Bed::container("d");
    config.mounts = vec![mount(&secret, "/secret")];
    let other = bed.create(&sandbox, config).await.unwrap();
    assert_eq!(
        value(&bed.runtime, &sandbox, "secret.s").as_deref(),
        Some("secret 4")
    );
    bed.start(&other).await.unwrap();
    write(&secret, "..v6", "secret 5");
    shows(&bed, &sandbox, "secret.s", "secret 5").await;
}

#[tokio::test]
async fn a_change_between_creation_and_start_is_found() {
    let mut bed = Bed::new().await;
    let directory = volume(&bed, "configmap", "m");
    write(&directory, "..v1", "1");
    let sandbox = bed.run(bed.pod("a")).await.unwrap();
    let mut config = Bed::container("c");
    config.mounts = vec![mount(&directory, "/m")];
    let id = bed.create(&sandbox, config).await.unwrap();
    write(&directory, "..v2", "2");
    bed.start(&id).await.unwrap();
    shows(&bed, &sandbox, "configmap.m", "2").await;
}

#[tokio::test]
async fn a_failed_update_is_tried_again() {
    let mut bed = Bed::new().await;
    let (sandbox, _, token, _) = Box::pin(mounted(&mut bed)).await;
    let silent = RuntimeError::GuestSilent {
        sandbox: sandbox.clone(),
        action: "write a volume",
        waited: Duration::from_secs(1),
    };
    bed.runtime.fail_next("write_volume", silent);
    write(&token, "..v2", "token 2");
    shows(&bed, &sandbox, "projected.token", "token 2").await;
    assert_eq!(writes(&bed.runtime, "projected.token"), 3);
}

#[tokio::test]
async fn a_node_that_starts_again_goes_on() {
    let mut bed = Bed::new().await;
    let (sandbox, _, token, secret) = Box::pin(mounted(&mut bed)).await;
    bed.restart_after(|| write(&token, "..v2", "while nobody looked"))
        .await;
    shows(&bed, &sandbox, "projected.token", "while nobody looked").await;
    write(&secret, "..v2", "secret 2");
    shows(&bed, &sandbox, "secret.s", "secret 2").await;
}
