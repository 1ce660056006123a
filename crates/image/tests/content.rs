//! Contents that are kept: archives in and out, hostile ones, bounds, other keepers' layers, release.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

mod support;

use std::{collections::HashSet, io::Write as _, path::Path};

use axum::{
    Router,
    body::Bytes,
    http::{StatusCode, Uri, header},
    response::IntoResponse,
};
use futures::{StreamExt as _, stream};
use hypernetes_image::{
    Content, ContentId, ImageError, ImageStore, KeepOptions, PullOptions, Saved, StoreConfig,
};
use hypernetes_types::Digest;
use serde_json::{Value, json};
use sha2::Digest as _;
use support::{file, symlink, tarball};
use tempfile::TempDir;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const PLENTY: u64 = 1 << 30;

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(sha2::Sha256::digest(bytes).into())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn config(tars: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<Digest> = tars.iter().map(|tar| digest(tar)).collect();
    json!({"architecture": "amd64", "os": "linux", "created": "2026-01-02T03:04:05Z",
           "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    .to_string()
    .into_bytes()
}

/// What `docker save` writes of one image of one layer.
fn docker_archive(layer: &[u8], tags: &Value) -> Vec<u8> {
    let list = json!([{"Config": "c.json", "RepoTags": tags, "Layers": ["1/layer.tar"]}]);
    tarball(&[
        file("1/layer.tar", layer),
        file("c.json", &config(&[layer])),
        file("manifest.json", list.to_string().as_bytes()),
    ])
}

struct Bench {
    dir: TempDir,
    store: ImageStore,
}

impl Bench {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let store = ImageStore::open(dir.path().to_owned(), StoreConfig::default()).unwrap();
        Self { dir, store }
    }

    async fn load(&self, archive: &[u8], keep: &KeepOptions) -> Result<Vec<Content>, ImageError> {
        let pieces: Vec<_> = archive
            .chunks(1000)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        self.store.load_content(stream::iter(pieces), keep).await
    }

    fn files(&self, part: &str) -> usize {
        count(&self.dir.path().join(part))
    }

    async fn release(&self, named: &[&ContentId], in_use: &[&Digest]) -> (usize, usize) {
        let named: HashSet<ContentId> = named.iter().copied().cloned().collect();
        let in_use = in_use.iter().copied().cloned().collect();
        let quiet = self.store.quiet().await.unwrap().expect("nobody is at it");
        quiet.release(named, in_use).await.unwrap()
    }
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn plenty() -> KeepOptions {
    KeepOptions {
        known: Vec::new(),
        limit: PLENTY,
    }
}

fn layer(text: &str) -> Vec<u8> {
    tarball(&[file("etc/motd", text.as_bytes())])
}

#[tokio::test]
async fn what_is_saved_loads_again_as_the_same() {
    let bench = Bench::new();
    let tar = layer("hello");
    let archive = docker_archive(&tar, &json!(["web:1", "example.org/web:2"]));
    // Packed or not.
    let packed = bench.load(&gzip(&archive), &plenty()).await.unwrap();
    let loaded = bench.load(&archive, &plenty()).await.unwrap();
    assert_eq!(packed[0].content, loaded[0].content);
    let [content] = &loaded[..] else {
        panic!("one image")
    };
    assert_eq!(content.content.id, digest(&config(&[&tar])));
    assert_eq!(content.names.len(), 2);
    assert!(content.image.tags.is_empty(), "it has no name in the store");
    assert!(bench.store.get("web:1").await.is_err());

    let hold = bench.store.hold().await.unwrap();
    assert!(bench.store.quiet().await.unwrap().is_none(), "it is held");
    let saved = Saved {
        content: content.content.clone(),
        names: content.names.clone(),
    };
    let pieces = bench.store.save(vec![saved], hold).await.unwrap();
    let bytes: Vec<Bytes> = pieces.map(Result::unwrap).collect().await;
    let other = Bench::new();
    let again = other.load(&bytes.concat(), &plenty()).await.unwrap();
    assert_eq!(again[0].content, content.content);
    let names = |content: &Content| content.names.iter().cloned().collect::<HashSet<_>>();
    assert_eq!(names(&again[0]), names(content));
    let (manifest, config) = other.store.documents(&content.content).await.unwrap();
    assert_eq!(manifest["layers"][0]["digest"], digest(&tar).as_str());
    assert_eq!(config["architecture"], "amd64");
}

#[tokio::test]
async fn contents_stay_as_long_as_they_are_named_or_used() {
    let bench = Bench::new();
    let archives = [layer("a"), layer("b")].map(|l| docker_archive(&l, &Value::Null));
    let mut ids = Vec::new();
    for archive in &archives {
        let loaded = bench.load(archive, &plenty()).await.unwrap();
        ids.push(loaded[0].content.clone());
    }
    assert_eq!(bench.release(&[&ids[0], &ids[1]], &[]).await, (0, 0));
    // An operator's removal by id is refused, too.
    let error = bench
        .store
        .remove(ids[0].id.as_str(), &HashSet::new())
        .await;
    assert!(matches!(error, Err(ImageError::InUse(_))), "{error:?}");
    // A container still uses it.
    assert_eq!(bench.release(&[&ids[1]], &[&ids[0].id]).await, (0, 1));
    assert!(bench.store.content(&ids[0]).await.is_ok());
    assert_eq!(bench.release(&[&ids[1]], &[]).await, (1, 0));
    assert!(bench.store.content(&ids[0]).await.is_err());
    assert!(bench.store.content(&ids[1]).await.is_ok());
    assert_eq!((bench.files("content"), bench.files("layers")), (1, 1));
    // A store that is opened anew has the rest.
    let root = bench.dir.path().to_owned();
    let store = ImageStore::open(root, StoreConfig::default()).unwrap();
    assert!(store.content(&ids[1]).await.is_ok());
    assert_eq!(bench.release(&[], &[]).await, (1, 0));
    for part in ["blobs", "content", "images", "kept", "layers", "tmp"] {
        assert_eq!(bench.files(part), 0, "{part}");
    }
}

#[tokio::test]
async fn hostile_archives_leave_nothing_behind() {
    let bench = Bench::new();
    let good = layer("x");
    let manifest = |layers: &Value| {
        json!([{"Config": "c.json", "RepoTags": null, "Layers": layers}])
            .to_string()
            .into_bytes()
    };
    let with = |list: &[u8], config: &[u8]| {
        tarball(&[
            file("1/layer.tar", &good),
            symlink("loop", "loop"),
            symlink("away", "../../../etc/passwd"),
            file("c.json", config),
            file("manifest.json", list),
        ])
    };
    let mine = config(&[&good]);
    let many: Vec<_> = (0..50_001).map(|n| file(&format!("{n}"), b"")).collect();
    for (what, archive, says) in [
        (
            "a loop",
            with(&manifest(&json!(["loop"])), &mine),
            "is not in the archive",
        ),
        (
            "a way out",
            with(&manifest(&json!(["away"])), &mine),
            "is not in the archive",
        ),
        (
            "a path",
            with(&manifest(&json!(["../../etc/shadow"])), &mine),
            "is not in the archive",
        ),
        (
            "another digest",
            with(&manifest(&json!(["1/layer.tar"])), &config(&[b"y"])),
            "has digest",
        ),
        (
            "no layers",
            with(&manifest(&json!([])), &mine),
            "an image of 0 layers",
        ),
        ("no tar", b"nonsense".to_vec(), "is not a tar file"),
        ("noise", vec![7; 4096], "invalid image"),
        ("members", tarball(&many), "more than 50000 members"),
        (
            "a cut",
            with(&manifest(&json!(["1/layer.tar"])), &mine)[..1500].to_vec(),
            "invalid image",
        ),
    ] {
        let error = bench.load(&archive, &plenty()).await.unwrap_err();
        assert!(error.to_string().contains(says), "{what}: {error}");
        assert_eq!((bench.files("tmp"), bench.files("kept")), (0, 0), "{what}");
    }
    bench.release(&[], &[]).await;
    assert_eq!((bench.files("content"), bench.files("layers")), (0, 0));
}

#[tokio::test]
async fn bytes_are_bounded_while_they_arrive() {
    let bench = Bench::new();
    let big = tarball(&[file("big", &vec![1; 300 << 10])]);
    let archive = docker_archive(&big, &Value::Null);
    let small = KeepOptions {
        known: Vec::new(),
        limit: 200 << 10,
    };
    let error = bench.load(&archive, &small).await.unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    // Zeros that pack well are counted as they are.
    let bomb = gzip(&docker_archive(
        &tarball(&[file("z", &vec![0; 90 << 20])]),
        &Value::Null,
    ));
    let error = bench.load(&bomb, &small).await.unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    assert_eq!(bench.files("tmp"), 0);
    assert!(bench.load(&archive, &plenty()).await.is_ok());
}

/// A registry that has a manifest and a configuration, and says it has no layer.
async fn lender(manifest: Vec<u8>, config: Vec<u8>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = move |uri: Uri| {
        let (manifest, config) = (manifest.clone(), config.clone());
        async move {
            let path = uri.path();
            if path.contains("/manifests/") {
                ([(header::CONTENT_TYPE, MANIFEST)], manifest).into_response()
            } else if path.ends_with(digest(&config).hex()) {
                config.into_response()
            } else {
                StatusCode::NOT_FOUND.into_response()
            }
        }
    };
    let router = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

#[tokio::test]
async fn a_registry_cannot_lend_what_another_keeper_has() {
    let bench = Bench::new();
    let secret = layer("secret");
    let archive = docker_archive(&secret, &json!(["app:1"]));
    let victim = bench.load(&archive, &plenty()).await.unwrap();
    let config = config(&[&secret]);
    let descriptor = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()});
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config), "layers": [descriptor(LAYER, &secret)]});
    let address = lender(manifest.to_string().into_bytes(), config).await;
    let name = format!("{address}/app:1").parse().unwrap();
    let pull = |known: Vec<ContentId>| {
        let (store, name) = (bench.store.clone(), &name);
        async move {
            let keep = KeepOptions {
                known,
                limit: PLENTY,
            };
            store
                .pull_content(name, &PullOptions::default(), &keep)
                .await
        }
    };
    let error = pull(Vec::new()).await.unwrap_err();
    assert!(matches!(error, ImageError::NoSuchImage { .. }), "{error}");
    // Who has it need not fetch it again.
    let own = pull(vec![victim[0].content.clone()]).await.unwrap();
    assert_eq!(own.image.id, victim[0].content.id);
}
