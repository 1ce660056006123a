//! Registries and archives that lie, stall, or send what nobody should unpack.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "test code"
)]

mod support;

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::Write,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::Engine as _;
use futures::{StreamExt, stream};
use hypernetes_image::{
    Credentials, Image, ImageError, ImageStore, Limits, PullOptions, RegistryConfig, StoreConfig,
};
use hypernetes_types::{Digest, ImageReference};
use serde_json::{Value, json};
use sha2::Digest as _;
use support::{file, hard_link, symlink, tarball};
use tempfile::TempDir;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(sha2::Sha256::digest(bytes).into())
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()})
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn config(architecture: &str, tars: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<Digest> = tars.iter().map(|tar| digest(tar)).collect();
    json!({"architecture": architecture, "os": "linux", "config": {"Cmd": ["sh"]},
           "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    .to_string()
    .into_bytes()
}

/// How an answer is given.
#[derive(Clone)]
enum Answer {
    Bytes(&'static str, Vec<u8>),
    /// Says so many bytes, sends these, and hangs up.
    Cut(Vec<u8>, usize),
    /// Hangs up after some bytes, but goes on when asked for a range.
    Resumable(Vec<u8>),
    Redirect(String),
}

#[derive(Default)]
struct Content {
    answers: HashMap<String, Answer>,
    /// Challenge for who comes without this authorization.
    guard: Option<(String, String)>,
    seen: Vec<(String, HeaderMap)>,
}

/// A registry in this process that answers whatever a test wants.
#[derive(Clone)]
struct Fake {
    address: String,
    content: Arc<Mutex<Content>>,
}

impl Fake {
    async fn start() -> Self {
        Self::start_on("127.0.0.1:0").await
    }

    async fn start_on(address: &str) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let content = Arc::new(Mutex::new(Content::default()));
        let router = Router::new().fallback(answer).with_state(content.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, content }
    }

    fn answer(&self, path: &str, answer: Answer) {
        self.content
            .lock()
            .unwrap()
            .answers
            .insert(path.to_owned(), answer);
    }

    fn blob(&self, bytes: &[u8]) {
        let path = format!("/v2/app/blobs/{}", digest(bytes));
        self.answer(
            &path,
            Answer::Bytes("application/octet-stream", bytes.to_vec()),
        );
    }

    fn manifest(&self, reference: &str, kind: &'static str, document: &Value) -> Digest {
        let bytes = document.to_string().into_bytes();
        for name in [reference, digest(&bytes).as_str()] {
            self.answer(
                &format!("/v2/app/manifests/{name}"),
                Answer::Bytes(kind, bytes.clone()),
            );
        }
        digest(&bytes)
    }

    /// An image of one uncompressed layer.
    fn image(&self, tag: &str, tar: &[u8]) -> Digest {
        self.packed_image(tag, tar, LAYER, tar)
    }

    fn packed_image(&self, tag: &str, tar: &[u8], kind: &str, blob: &[u8]) -> Digest {
        let config = config("amd64", &[tar]);
        self.blob(&config);
        self.blob(blob);
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config), "layers": [descriptor(kind, blob)]});
        self.manifest(tag, MANIFEST, &manifest)
    }

    fn name(&self, tag: &str) -> ImageReference {
        let separator = if tag.starts_with("sha256:") { '@' } else { ':' };
        format!("{}/app{separator}{tag}", self.address)
            .parse()
            .unwrap()
    }

    fn seen(&self, path: &str) -> Vec<HeaderMap> {
        let content = self.content.lock().unwrap();
        content
            .seen
            .iter()
            .filter(|(seen, _)| seen.starts_with(path))
            .map(|(_, h)| h.clone())
            .collect()
    }
}

async fn answer(State(content): State<Arc<Mutex<Content>>>, request: Request) -> Response {
    let path = request.uri().to_string();
    let mut content = content.lock().unwrap();
    content.seen.push((path.clone(), request.headers().clone()));
    if let Some((wanted, challenge)) = &content.guard {
        let given = request.headers().get(header::AUTHORIZATION);
        if given.is_none_or(|given| given != wanted.as_str()) {
            let challenge = [(header::WWW_AUTHENTICATE, challenge.clone())];
            return (StatusCode::UNAUTHORIZED, challenge).into_response();
        }
    }
    let hang_up = |bytes: Vec<u8>| {
        // The pause lets the bytes out before the connection breaks.
        let end = async {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            Err(std::io::Error::other("cut"))
        };
        Body::from_stream(stream::iter([Ok(Bytes::from(bytes))]).chain(stream::once(end)))
    };
    match content.answers.get(&path).cloned() {
        None => (
            StatusCode::NOT_FOUND,
            r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such thing"}]}"#,
        )
            .into_response(),
        Some(Answer::Bytes(kind, bytes)) => ([(header::CONTENT_TYPE, kind)], bytes).into_response(),
        Some(Answer::Redirect(to)) => {
            (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response()
        }
        Some(Answer::Cut(bytes, at)) => {
            let length = [(header::CONTENT_LENGTH, bytes.len().to_string())];
            (length, hang_up(bytes[..at].to_vec())).into_response()
        }
        Some(Answer::Resumable(bytes)) => {
            let range = request
                .headers()
                .get(header::RANGE)
                .map(|v| v.to_str().unwrap().to_owned());
            let from: usize = range.map_or(0, |r| {
                r["bytes=".len()..].trim_end_matches('-').parse().unwrap()
            });
            let status = if from == 0 {
                StatusCode::OK
            } else {
                StatusCode::PARTIAL_CONTENT
            };
            let length = [(header::CONTENT_LENGTH, (bytes.len() - from).to_string())];
            let to = bytes.len().min(from + bytes.len() / 3 + 1);
            if to == bytes.len() {
                return (status, length, bytes[from..].to_vec()).into_response();
            }
            (status, length, hang_up(bytes[from..to].to_vec())).into_response()
        }
    }
}

struct Bench {
    dir: TempDir,
    store: ImageStore,
}

impl Bench {
    fn new() -> Self {
        Self::with(StoreConfig::default())
    }

    fn with(config: StoreConfig) -> Self {
        let dir = TempDir::new().unwrap();
        let store = ImageStore::open(dir.path().to_owned(), config).unwrap();
        Self { dir, store }
    }

    async fn pull(&self, name: &ImageReference) -> Result<Image, ImageError> {
        self.store.pull(name, &PullOptions::default()).await
    }

    /// Pulls what must be refused; nothing may stay behind.
    async fn refused(&self, name: &ImageReference) -> ImageError {
        let error = self.pull(name).await.unwrap_err();
        assert!(matches!(
            self.store.get(&name.to_string()).await,
            Err(ImageError::NotFound(_))
        ));
        for part in ["tmp", "layers", "images"] {
            let left = fs::read_dir(self.dir.path().join(part)).unwrap().count();
            assert_eq!(left, 0, "{part} is not empty after: {error}");
        }
        error
    }

    async fn broken_rule(&self, name: &ImageReference) -> String {
        match self.refused(name).await {
            ImageError::Invalid { what, rule } => format!("{what}: {rule}"),
            other => panic!("refused for another reason: {other:?}"),
        }
    }
}

fn plain_tar() -> Vec<u8> {
    let noise: Vec<u8> = (0..100_000_u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    tarball(&[file("bin/sh", b"#!"), file("noise", &noise)])
}

#[tokio::test]
async fn every_packing_is_understood() {
    let fake = Fake::start().await;
    let tar = plain_tar();
    let zstd = zstd::encode_all(tar.as_slice(), 3).unwrap();
    let two_members = [gzip(&tar[..1000]), gzip(&tar[1000..])].concat();
    fake.image("plain", &tar);
    fake.packed_image("gzip", &tar, &format!("{LAYER}+gzip"), &gzip(&tar));
    fake.packed_image("zstd", &tar, &format!("{LAYER}+zstd"), &zstd);
    fake.packed_image("members", &tar, &format!("{LAYER}+gzip"), &two_members);
    fake.packed_image(
        "docker",
        &tar,
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        &gzip(&tar),
    );
    for tag in ["plain", "gzip", "zstd", "members", "docker"] {
        let bench = Bench::new();
        let image = bench.pull(&fake.name(tag)).await.unwrap();
        assert_eq!(image.layers[0].diff_id, digest(&tar), "{tag}");
        assert_eq!(image.config.cmd, ["sh"]);
    }
}

#[tokio::test]
async fn altered_bytes_are_found() {
    let fake = Fake::start().await;
    let tar = plain_tar();
    let other = tarball(&[file("bin/sh", b"!#")]);
    fake.image("blob", &tar);
    let mut altered = tar.clone();
    *altered.last_mut().unwrap() = 1;
    fake.answer(
        &format!("/v2/app/blobs/{}", digest(&tar)),
        Answer::Bytes("x/y", altered),
    );
    let error = Bench::new().refused(&fake.name("blob")).await;
    assert!(
        matches!(&error, ImageError::DigestMismatch { expected, .. } if *expected == digest(&tar)),
        "{error:?}"
    );

    // The blob is what the manifest says, but not what the configuration says.
    let fake = Fake::start().await;
    fake.packed_image("diff-id", &other, LAYER, &tar);
    let error = Bench::new().refused(&fake.name("diff-id")).await;
    assert!(
        matches!(&error, ImageError::DigestMismatch { expected, .. } if *expected == digest(&other)),
        "{error:?}"
    );

    let fake = Fake::start().await;
    fake.image("config", &tar);
    let config = config("amd64", &[&tar]);
    fake.answer(
        &format!("/v2/app/blobs/{}", digest(&config)),
        Answer::Bytes("x/y", vec![b' '; config.len()]),
    );
    assert!(matches!(
        Bench::new().refused(&fake.name("config")).await,
        ImageError::DigestMismatch { .. }
    ));

    // A manifest that was asked for by digest.
    let fake = Fake::start().await;
    let pinned = fake.image("pinned", &tar);
    let another = fake.image("another", &other);
    let lie = fake.content.lock().unwrap().answers[&format!("/v2/app/manifests/{another}")].clone();
    fake.answer(&format!("/v2/app/manifests/{pinned}"), lie);
    let error = Bench::new().refused(&fake.name(pinned.as_str())).await;
    assert!(
        matches!(&error, ImageError::DigestMismatch { expected, .. } if *expected == pinned),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_cut_layer_is_resumed_or_given_up() {
    let fake = Fake::start().await;
    let tar = plain_tar();
    fake.image("a", &tar);
    let path = format!("/v2/app/blobs/{}", digest(&tar));
    fake.answer(&path, Answer::Resumable(tar.clone()));
    Bench::new().pull(&fake.name("a")).await.unwrap();
    let ranges: Vec<bool> = fake
        .seen(&path)
        .iter()
        .map(|h| h.contains_key(header::RANGE))
        .collect();
    assert_eq!(ranges, [false, true, true]);

    fake.answer(&path, Answer::Cut(tar.clone(), 5000));
    let error = Bench::new().refused(&fake.name("a")).await;
    assert!(
        matches!(&error, ImageError::Unavailable { message, .. } if message.contains("ended after 5000 of")),
        "{error:?}"
    );
    let mut longer = tar.clone();
    longer.extend([0; 512]);
    fake.answer(&path, Answer::Bytes("x/y", longer));
    let rule = Bench::new().broken_rule(&fake.name("a")).await;
    assert!(rule.contains("sends more"), "{rule}");
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect() {
    let (fake, elsewhere) = (Fake::start().await, Fake::start().await);
    let tar = plain_tar();
    fake.image("a", &tar);
    elsewhere.blob(&tar);
    let path = format!("/v2/app/blobs/{}", digest(&tar));
    fake.answer(
        &path,
        Answer::Redirect(format!("http://{}{path}", elsewhere.address)),
    );
    let account = base64::engine::general_purpose::STANDARD.encode("ann:secret");
    fake.content.lock().unwrap().guard =
        Some((format!("Basic {account}"), "Basic realm=\"x\"".to_owned()));
    let bench = Bench::new();
    let options = PullOptions {
        credentials: Credentials::Basic {
            username: "ann".to_owned(),
            password: "secret".to_owned(),
        },
        ..PullOptions::default()
    };
    bench.store.pull(&fake.name("a"), &options).await.unwrap();
    assert!(
        fake.seen(&path)
            .iter()
            .any(|headers| headers.contains_key(header::AUTHORIZATION))
    );
    let there = elsewhere.seen(&path);
    assert_eq!(there.len(), 1);
    assert!(
        !there[0].contains_key(header::AUTHORIZATION),
        "the password went to another host"
    );

    fake.answer(
        &path,
        Answer::Redirect("http://169.254.169.254/latest/".to_owned()),
    );
    let other = Bench::new();
    let error = other
        .store
        .pull(&fake.name("a"), &options)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("is not followed"), "{error}");
    fake.answer(&path, Answer::Redirect(path.clone()));
    let error = other
        .store
        .pull(&fake.name("a"), &options)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("redirects"), "{error}");
}

#[tokio::test]
async fn a_token_is_fetched_for_this_pull_only() {
    let (fake, tokens) = (Fake::start().await, Fake::start().await);
    fake.image("a", &plain_tar());
    // The registry asks for more than this pull needs; it gets a token for the pull.
    let challenge = format!(
        "Bearer realm=\"http://{}/token\",service=\"reg\",scope=\"repository:other:pull,push\"",
        tokens.address
    );
    fake.content.lock().unwrap().guard = Some(("Bearer t0ken".to_owned(), challenge));
    let account = base64::engine::general_purpose::STANDARD.encode("ann:secret");
    tokens.content.lock().unwrap().guard =
        Some((format!("Basic {account}"), "Basic realm=\"x\"".to_owned()));
    tokens.answer(
        "/token?service=reg&scope=repository%3Aapp%3Apull",
        Answer::Bytes(
            "application/json",
            br#"{"token":"t0ken","expires_in":60}"#.to_vec(),
        ),
    );
    let bench = Bench::new();
    let error = bench.refused(&fake.name("a")).await;
    assert!(
        matches!(error, ImageError::Unauthorized { .. }),
        "{error:?}"
    );
    let with = |credentials| PullOptions {
        credentials,
        ..PullOptions::default()
    };
    let basic = Credentials::Basic {
        username: "ann".to_owned(),
        password: "secret".to_owned(),
    };
    bench
        .store
        .pull(&fake.name("a"), &with(basic))
        .await
        .unwrap();
    let account_seen = fake.seen("/").iter().any(|headers| {
        headers
            .get(header::AUTHORIZATION)
            .is_some_and(|v| v.to_str().unwrap().starts_with("Basic"))
    });
    assert!(
        !account_seen,
        "the registry saw the password, not only the token"
    );
    let bench = Bench::new();
    bench
        .store
        .pull(
            &fake.name("a"),
            &with(Credentials::Bearer("t0ken".to_owned())),
        )
        .await
        .unwrap();
    let bench = Bench::new();
    let error = bench
        .store
        .pull(
            &fake.name("a"),
            &with(Credentials::Bearer("old".to_owned())),
        )
        .await
        .unwrap_err();
    assert!(
        matches!(error, ImageError::Unauthorized { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn mirrors_come_first_and_get_no_password() {
    let (mirror, fake) = (Fake::start().await, Fake::start().await);
    mirror.image("a", &plain_tar());
    fake.image("b", &plain_tar());
    let mirrors = [(
        fake.address.clone(),
        vec![format!("http://{}", mirror.address)],
    )];
    let registry = RegistryConfig {
        mirrors: mirrors.into(),
        ..RegistryConfig::default()
    };
    let bench = Bench::with(StoreConfig {
        registry,
        ..StoreConfig::default()
    });
    let credentials = Credentials::Bearer("t0ken".to_owned());
    let options = PullOptions {
        credentials,
        ..PullOptions::default()
    };
    let image = bench.store.pull(&fake.name("a"), &options).await.unwrap();
    assert_eq!(
        image.tags,
        [fake.name("a")],
        "the image keeps the name it was asked for"
    );
    assert!(fake.seen("/").is_empty());
    assert!(
        mirror
            .seen("/")
            .iter()
            .all(|headers| !headers.contains_key(header::AUTHORIZATION))
    );
    bench.store.pull(&fake.name("b"), &options).await.unwrap();
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_one_that_lies_is_passed_over() {
    let (lying, second, fake) = (
        Fake::start().await,
        Fake::start().await,
        Fake::start().await,
    );
    let digest = second.image("a", &plain_tar());
    lying.answer(
        &format!("/v2/app/manifests/{digest}"),
        Answer::Bytes(MANIFEST, b"{}".to_vec()),
    );
    let mirrors = [&lying, &second].map(|mirror| format!("http://{}", mirror.address));
    let registry = RegistryConfig {
        mirrors: [(fake.address.clone(), mirrors.to_vec())].into(),
        ..RegistryConfig::default()
    };
    let bench = Bench::with(StoreConfig {
        registry,
        ..StoreConfig::default()
    });
    bench.pull(&fake.name(digest.as_str())).await.unwrap();
    assert!(!lying.seen("/").is_empty(), "the first is asked first");
    assert!(fake.seen("/").is_empty(), "the registry is asked last");
}

#[tokio::test]
async fn plain_http_elsewhere_is_refused() {
    // An address of this machine that is not loopback; nothing is sent to find it out.
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let local = probe
        .connect("192.0.2.1:9")
        .and_then(|()| probe.local_addr());
    let Some(address) = local.ok().map(|a| a.ip()).filter(|ip| !ip.is_loopback()) else {
        eprintln!("SKIP: this machine has no address but loopback");
        return;
    };
    let fake = Fake::start_on(&format!("{address}:0")).await;
    fake.image("a", &plain_tar());
    let error = Bench::new().refused(&fake.name("a")).await;
    assert!(matches!(error, ImageError::PlainHttp { .. }), "{error:?}");
    assert!(fake.seen("/").is_empty(), "something was asked without TLS");

    let insecure_registries = vec![fake.address.clone()];
    let registry = RegistryConfig {
        insecure_registries,
        ..RegistryConfig::default()
    };
    let bench = Bench::with(StoreConfig {
        registry,
        ..StoreConfig::default()
    });
    bench.pull(&fake.name("a")).await.unwrap();
}

#[tokio::test]
async fn manifests_are_one_thing_and_for_this_machine() {
    let fake = Fake::start().await;
    let tar = plain_tar();
    let arm = config("arm64", &[&tar]);
    fake.blob(&arm);
    let manifest = |config: &[u8], layers: Value| json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG, config), "layers": layers});
    let arm_manifest = manifest(&arm, json!([descriptor(LAYER, &tar)]));
    fake.manifest("arm", MANIFEST, &arm_manifest);
    let error = Bench::new().refused(&fake.name("arm")).await;
    assert!(
        matches!(&error, ImageError::NoPlatform { available, .. } if available == "linux/arm64"),
        "{error:?}"
    );

    let mut entry = descriptor(MANIFEST, arm_manifest.to_string().as_bytes());
    entry["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    fake.manifest("index", INDEX, &index);
    let error = Bench::new().refused(&fake.name("index")).await;
    assert!(
        matches!(&error, ImageError::NoPlatform { available, .. } if available == "linux/arm64"),
        "{error:?}"
    );
    // An index entry that claims to be ours but is not.
    let mut lying = index.clone();
    lying["manifests"][0]["platform"]["architecture"] = "amd64".into();
    fake.manifest("lying", INDEX, &lying);
    assert!(matches!(
        Bench::new().refused(&fake.name("lying")).await,
        ImageError::NoPlatform { .. }
    ));

    let mut both = arm_manifest.clone();
    both["manifests"] = json!([]);
    fake.manifest("both", MANIFEST, &both);
    assert!(
        Bench::new()
            .broken_rule(&fake.name("both"))
            .await
            .contains("either")
    );
    let ours = config("amd64", &[&tar]);
    fake.blob(&ours);
    fake.manifest("layerless", MANIFEST, &manifest(&ours, json!([])));
    assert!(
        Bench::new()
            .broken_rule(&fake.name("layerless"))
            .await
            .contains("0 layers")
    );
    let twice = json!([descriptor(LAYER, &tar), descriptor(LAYER, &tar)]);
    fake.manifest("uneven", MANIFEST, &manifest(&ours, twice));
    assert!(
        Bench::new()
            .broken_rule(&fake.name("uneven"))
            .await
            .contains("1 diff ids for 2 layers")
    );
    let strange = json!([descriptor("application/x-executable", &tar)]);
    fake.manifest("strange", MANIFEST, &manifest(&ours, strange));
    assert!(
        Bench::new()
            .broken_rule(&fake.name("strange"))
            .await
            .contains("is not a layer's")
    );
    fake.answer(
        "/v2/app/manifests/huge",
        Answer::Bytes(MANIFEST, vec![b' '; (4 << 20) + 1]),
    );
    assert!(
        Bench::new()
            .broken_rule(&fake.name("huge"))
            .await
            .contains("larger than")
    );
}

#[tokio::test]
async fn hostile_layers_leave_nothing_behind() {
    let fake = Fake::start().await;
    let cases = [
        ("climb", vec![file("../../etc/cron.d/x", b"x")], "'..'"),
        (
            "through-link",
            vec![symlink("etc", "/etc"), file("etc/passwd", b"x")],
            "not a directory",
        ),
        (
            "hard-link-out",
            vec![hard_link("shadow", "/etc/shadow")],
            "etc/shadow is not an earlier file",
        ),
        ("bad-whiteout", vec![file(".wh...", b"")], "whiteout"),
    ];
    for (tag, members, wanted) in cases {
        fake.image(tag, &tarball(&members));
        let rule = Bench::new().broken_rule(&fake.name(tag)).await;
        assert!(rule.contains(wanted), "{tag}: {rule}");
    }
    fake.image(
        "fine",
        &tarball(&[
            file("/abs/olute", b"x"),
            file("twice", b"1"),
            file("twice", b"2"),
        ]),
    );
    Bench::new().pull(&fake.name("fine")).await.unwrap();
    fake.image("garbage", b"this is not an archive");
    Bench::new().broken_rule(&fake.name("garbage")).await;
    let tar = plain_tar();
    fake.packed_image(
        "half-gzip",
        &tar,
        &format!("{LAYER}+gzip"),
        &gzip(&tar)[..1000],
    );
    Bench::new().broken_rule(&fake.name("half-gzip")).await;
}

#[tokio::test]
async fn bombs_are_stopped() {
    let fake = Fake::start().await;
    let zeros = tarball(&[file("zeros", &vec![0; 8 << 20])]);
    let zstd = zstd::encode_all(zeros.as_slice(), 3).unwrap();
    fake.packed_image("gzip", &zeros, &format!("{LAYER}+gzip"), &gzip(&zeros));
    fake.packed_image("zstd", &zeros, &format!("{LAYER}+zstd"), &zstd);
    for tag in ["gzip", "zstd"] {
        let limits = Limits {
            ratio_free_size: 1 << 20,
            ..Limits::default()
        };
        let bench = Bench::with(StoreConfig {
            limits,
            ..StoreConfig::default()
        });
        let rule = bench.broken_rule(&fake.name(tag)).await;
        assert!(rule.contains("200 times"), "{rule}");
    }
    let limits = Limits {
        max_layer_size: 1 << 20,
        max_entries: 100,
        ..Limits::default()
    };
    let bench = Bench::with(StoreConfig {
        limits,
        ..StoreConfig::default()
    });
    fake.packed_image("large", &zeros, &format!("{LAYER}+gzip"), &gzip(&zeros));
    assert!(
        bench
            .broken_rule(&fake.name("large"))
            .await
            .contains("at most 1048576 bytes")
    );
    let many: Vec<_> = (0..101).map(|i| file(&i.to_string(), b"")).collect();
    fake.image("many", &tarball(&many));
    assert!(
        bench
            .broken_rule(&fake.name("many"))
            .await
            .contains("at most 100 entries")
    );
}

#[tokio::test]
async fn a_docker_archive_loads() {
    let dir = TempDir::new().unwrap();
    let (lower, upper) = (plain_tar(), tarball(&[file("etc/motd", b"hello")]));
    let config = config("amd64", &[&lower, &upper, &lower]);
    let list = json!([{"Config": "c.json", "RepoTags": ["web:1", "example.org/web:2"],
        "Layers": ["1/layer.tar", "2/layer.tar", "3/layer.tar"]}]);
    let archive = tarball(&[
        file("1/layer.tar", &lower),
        file("2/layer.tar", &gzip(&upper)),
        symlink("3/layer.tar", "../1/layer.tar"),
        file("c.json", &config),
        file("manifest.json", list.to_string().as_bytes()),
    ]);
    let path = dir.path().join("saved.tar");
    fs::write(&path, &archive).unwrap();
    let bench = Bench::new();
    let images = bench.store.load(&path).await.unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!(images[0].id, digest(&config));
    assert_eq!(images[0].layers.len(), 3);
    assert_eq!(images[0].layers[0], images[0].layers[2]);
    assert_eq!(bench.store.get("web:1").await.unwrap(), images[0]);
    assert_eq!(
        bench.store.get("example.org/web:2").await.unwrap(),
        images[0]
    );
    assert_eq!(bench.store.usage().await.unwrap().layers, 2);

    // Names in the archive's own documents do not leave it.
    let climbing =
        json!([{"Config": "../../../../etc/passwd", "RepoTags": null, "Layers": ["1/layer.tar"]}]);
    let archive = tarball(&[file("manifest.json", climbing.to_string().as_bytes())]);
    fs::write(&path, archive).unwrap();
    let error = bench.store.load(&path).await.unwrap_err();
    assert!(
        error.to_string().contains("is not in the archive"),
        "{error}"
    );
    let unpacked = dir.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    fs::write(unpacked.join("manifest.json"), climbing.to_string()).unwrap();
    let error = bench.store.load(&unpacked).await.unwrap_err();
    assert!(
        error.to_string().contains("is not in the archive"),
        "{error}"
    );
    fs::write(&path, gzip(b"x")).unwrap();
    assert!(
        bench
            .store
            .load(&path)
            .await
            .unwrap_err()
            .to_string()
            .contains("unpack it first")
    );
    fs::write(&path, tarball(&[file("readme", b"")])).unwrap();
    assert!(
        bench
            .store
            .load(&path)
            .await
            .unwrap_err()
            .to_string()
            .contains("neither")
    );
}

#[tokio::test]
async fn a_pull_that_is_dropped_leaves_no_half_layer() {
    let fake = Fake::start().await;
    let tar = plain_tar();
    fake.image("a", &tar);
    // Asks again and again for the rest, with pauses: long enough to be interrupted.
    fake.answer(
        &format!("/v2/app/blobs/{}", digest(&tar)),
        Answer::Cut(tar.clone(), 5000),
    );
    let bench = Bench::new();
    let name = fake.name("a");
    let waited =
        tokio::time::timeout(std::time::Duration::from_millis(300), bench.pull(&name)).await;
    assert!(waited.is_err(), "the pull ended by itself");
    let tmp = bench.dir.path().join("tmp");
    let gone = async {
        while fs::read_dir(&tmp).unwrap().count() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), gone)
        .await
        .expect("the writer ends");
    assert_eq!(
        fs::read_dir(bench.dir.path().join("layers"))
            .unwrap()
            .count(),
        0
    );
    fake.blob(&tar);
    bench.pull(&name).await.unwrap();
}

const CHILD: &str = "HYPERNETES_TEST_PULL";

/// The part of the next test that is killed: pulls and removes for ever.
#[tokio::test]
#[ignore = "run by killed_at_any_moment"]
async fn pulls_until_killed() {
    let Ok(task) = std::env::var(CHILD) else {
        return;
    };
    let (root, names) = task.split_once('|').unwrap();
    let store = ImageStore::open(root.into(), StoreConfig::default()).unwrap();
    loop {
        for name in names.split('|') {
            store
                .pull(&name.parse().unwrap(), &PullOptions::default())
                .await
                .unwrap();
        }
        for name in names.split('|') {
            store.remove(name, &HashSet::new()).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment() {
    let fake = Fake::start().await;
    let tars = [plain_tar(), tarball(&[file("etc/motd", b"hello")])];
    fake.packed_image("a", &tars[0], &format!("{LAYER}+gzip"), &gzip(&tars[0]));
    fake.image("b", &tars[1]);
    let names = [fake.name("a"), fake.name("b")];
    let dir = TempDir::new().unwrap();
    let good: HashMap<String, Vec<u8>> = tars
        .iter()
        .map(|tar| {
            let path = dir.path().join("good");
            support::write_image(tar, &path).unwrap();
            (digest(tar).to_string(), fs::read(path).unwrap())
        })
        .collect();
    let root = dir.path().join("store");
    let mut met = HashSet::new();
    // On a loaded machine the child gets nowhere in that time: then it is given more.
    let mut round = 0_u64;
    while round < 25 || (met.len() < 2 && round < 75) {
        round += 1;
        let longer = round.saturating_sub(25) * 100;
        let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "pulls_until_killed"])
            .env(
                CHILD,
                format!("{}|{}|{}", root.display(), names[0], names[1]),
            )
            .stdout(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        // A moment, not a condition: anywhere in its work.
        tokio::time::sleep(std::time::Duration::from_millis(
            30 + round * 37 % 300 + longer,
        ))
        .await;
        child.kill().await.unwrap();

        let store = ImageStore::open(root.clone(), StoreConfig::default()).unwrap();
        let images = store.list().await.unwrap();
        met.insert(images.len());
        let mut layers = HashSet::new();
        for image in &images {
            for layer in &image.layers {
                assert!(
                    fs::read(&layer.disk).unwrap() == good[layer.diff_id.as_str()],
                    "{round}"
                );
                layers.insert(layer.diff_id.clone());
            }
            store.inspect(image.id.as_str()).await.unwrap();
        }
        assert_eq!(
            fs::read_dir(root.join("tmp")).unwrap().count(),
            0,
            "{round}"
        );
        assert_eq!(
            fs::read_dir(root.join("layers")).unwrap().count(),
            layers.len(),
            "{round}"
        );
    }
    assert!(met.len() > 1, "every kill met the same state: {met:?}");
    let store = ImageStore::open(root, StoreConfig::default()).unwrap();
    for name in &names {
        store.pull(name, &PullOptions::default()).await.unwrap();
    }
}
