//! Pulls from the real docker-registry on loopback, with the project's test images.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code")]

mod support;

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, OnceLock},
};

use hypernetes_image::{
    Credentials, Image, ImageError, ImageStore, PullEvent, PullOptions, RegistryConfig, StoreConfig,
};
use hypernetes_types::ImageReference;
use support::{Mounted, look};
use tempfile::TempDir;

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/images")
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The images, built once per test process.
fn images() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<TempDir>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        for tool in [
            "/usr/bin/docker-registry",
            "/usr/sbin/lighttpd",
            "/usr/bin/htpasswd",
        ] {
            if !Path::new(tool).exists() {
                eprintln!("SKIP: {tool} is not installed");
                return None;
            }
        }
        let dir = TempDir::new().unwrap();
        run(Command::new(scripts().join("build_images.py"))
            .args(["build", "--out"])
            .arg(dir.path()));
        Some(dir)
    });
    built.as_ref().map(TempDir::path)
}

struct Registry {
    dir: TempDir,
    address: String,
}

impl Registry {
    fn start(options: &[&str]) -> Option<Self> {
        let images = images()?;
        let dir = TempDir::new().unwrap();
        run(Command::new(scripts().join("registry"))
            .args(["up", "--dir"])
            .arg(dir.path())
            .args(options));
        let address = fs::read_to_string(dir.path().join("address"))
            .unwrap()
            .trim()
            .to_owned();
        let scheme = if options.contains(&"--tls") {
            "https"
        } else {
            "http"
        };
        let mut push = Command::new(scripts().join("build_images.py"));
        push.args(["push", "--out"])
            .arg(images)
            .args(["--registry", &format!("{scheme}://{address}")]);
        if options.contains(&"--auth") {
            push.args(["--user", "ann:secret"]);
        }
        if options.contains(&"--tls") {
            push.arg("--ca").arg(dir.path().join("ca.pem"));
        }
        let registry = Self { dir, address };
        run(&mut push);
        Some(registry)
    }

    fn name(&self, image: &str) -> ImageReference {
        format!("{}/{image}", self.address).parse().unwrap()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        run(Command::new(scripts().join("registry"))
            .args(["down", "--dir"])
            .arg(self.dir.path()));
    }
}

fn digest_of(name: &str) -> String {
    let images = images().unwrap();
    let mut command = Command::new(scripts().join("build_images.py"));
    run(command.args(["digest", name, "--out"]).arg(images))
        .trim()
        .to_owned()
}

fn store(dir: &TempDir) -> ImageStore {
    ImageStore::open(dir.path().join("store"), StoreConfig::default()).unwrap()
}

async fn pull(store: &ImageStore, name: &ImageReference) -> Result<Image, ImageError> {
    store.pull(name, &PullOptions::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn by_tag_by_digest_and_through_the_index() {
    let Some(registry) = Registry::start(&[]) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let options = PullOptions {
        progress: Some(Box::new(move |event| sink.lock().unwrap().push(event))),
        ..PullOptions::default()
    };
    let web = store.pull(&registry.name("web:1"), &options).await.unwrap();
    assert_eq!(web.layers.len(), 4);
    assert_eq!(web.config.user, "www-data");
    assert_eq!(web.config.exposed_ports, ["8080/tcp"]);
    assert_eq!(web.architecture, "amd64");
    assert_eq!(web.tags, [registry.name("web:1")]);
    let pinned = registry.name(&format!("web@{}", digest_of("web:1")));
    assert_eq!(web.digests, std::slice::from_ref(&pinned));
    let events = std::mem::take(&mut *events.lock().unwrap());
    assert!(matches!(&events[0], PullEvent::Resolved { layers, .. } if layers.len() == 4));
    let done = events
        .iter()
        .filter(|e| matches!(e, PullEvent::LayerDone { cached: false, .. }))
        .count();
    assert_eq!(done, 4);
    for layer in &web.layers {
        let last = events.iter().rev().find_map(|event| match event {
            PullEvent::Progress { layer: blob, bytes } if *blob == layer.blob => Some(*bytes),
            _ => None,
        });
        assert!(last.is_some(), "no progress of {}", layer.blob);
    }

    // By digest: here already, so no registry is needed; in an empty store it is fetched.
    assert_eq!(pull(&store, &pinned).await.unwrap().id, web.id);
    let other = TempDir::new().unwrap();
    let second = self::store(&other);
    assert_eq!(pull(&second, &pinned).await.unwrap().id, web.id);
    assert_eq!(second.get(&pinned.to_string()).await.unwrap().tags, []);

    for name in ["busybox:1", "busybox:docker", "busybox:plain"] {
        let image = pull(&store, &registry.name(name)).await.unwrap();
        assert_eq!(image.layers.len(), 2, "{name}");
        assert_eq!(image.layers[0].diff_id, web.layers[0].diff_id, "{name}");
        assert_eq!(image.layers[1].disk, web.layers[1].disk, "{name}");
    }
    assert_eq!(
        store.usage().await.unwrap().layers,
        4,
        "the shared layers are stored once"
    );
    let missing = pull(&store, &registry.name("web:none")).await.unwrap_err();
    assert!(
        matches!(missing, ImageError::NoSuchImage { .. }),
        "{missing:?}"
    );
    let missing = pull(&store, &registry.name("nothing:1")).await.unwrap_err();
    assert!(
        matches!(missing, ImageError::NoSuchImage { .. }),
        "{missing:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disks_hold_the_image() {
    let Some(registry) = Registry::start(&[]) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let image = pull(&store, &registry.name("web:1")).await.unwrap();
    let disks: Vec<_> = image.layers.iter().map(|l| Mounted::new(&l.disk)).collect();
    let Some(disks) = disks.into_iter().collect::<Option<Vec<_>>>() else {
        return;
    };
    let seen: Vec<_> = disks.iter().map(|disk| look(disk.path())).collect();
    assert_eq!(seen[0]["etc/motd"].content, b"the lower layer's message\n");
    assert_eq!(
        (
            seen[1]["etc/motd"].mode & 0o170_000,
            seen[1]["etc/motd"].device
        ),
        (0o020_000, (0, 0))
    );
    assert_eq!(
        seen[1]["bin/busybox"].content,
        fs::read("/usr/bin/busybox").unwrap()
    );
    assert!(seen[1]["bin/sh"].links > 100, "applets are hard links");
    assert_eq!(
        seen[2]["usr/sbin/lighttpd"].content,
        fs::read("/usr/sbin/lighttpd").unwrap()
    );
    assert_eq!(seen[3]["var/www/html/index.html"].uid, 33);
    let whole = Mounted::overlay(&disks);
    let seen = look(whole.path());
    assert!(
        !seen.contains_key("etc/motd"),
        "the second layer takes it away"
    );
    assert!(seen.contains_key("etc/passwd") && seen.contains_key("bin/sh"));
    assert_eq!(seen["tmp"].mode, 0o041_777);
    drop(whole);
    let opened = store.open_layers(&image).await.unwrap();
    assert_eq!(opened.len(), 4);
    for file in opened {
        use std::io::Write as _;
        assert!((&file).write(b"x").is_err(), "opened for reading only");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_authentication_over_tls() {
    let Some(registry) = Registry::start(&["--tls", "--auth", "ann:secret"]) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let name = registry.name("busybox:1");
    let stranger = store(&dir);
    let error = pull(&stranger, &name).await.unwrap_err();
    assert!(
        matches!(&error, ImageError::Unavailable { message, .. } if message.contains("certificate")),
        "{error:?}"
    );

    let other = TempDir::new().unwrap();
    let registry_config = RegistryConfig {
        extra_ca: vec![fs::read(registry.dir.path().join("ca.pem")).unwrap()],
        ..RegistryConfig::default()
    };
    let config = StoreConfig {
        registry: registry_config,
        ..StoreConfig::default()
    };
    let store = ImageStore::open(other.path().join("store"), config).unwrap();
    let with = |password: &str| PullOptions {
        credentials: Credentials::Basic {
            username: "ann".to_owned(),
            password: password.to_owned(),
        },
        ..PullOptions::default()
    };
    let error = pull(&store, &name).await.unwrap_err();
    assert!(
        matches!(error, ImageError::Unauthorized { .. }),
        "{error:?}"
    );
    let error = store.pull(&name, &with("wrong")).await.unwrap_err();
    assert!(
        matches!(error, ImageError::Unauthorized { .. }),
        "{error:?}"
    );
    assert!(!format!("{error:?} {error}").contains("wrong"), "{error:?}");
    assert_eq!(
        store
            .pull(&name, &with("secret"))
            .await
            .unwrap()
            .layers
            .len(),
        2
    );
}

/// Takes the layers of an image out of a registry that still has its manifest.
fn forget_layers(registry: &Registry, image: &Image) {
    for layer in &image.layers {
        let hex = layer.blob.hex();
        let found = run(Command::new("find").arg(registry.dir.path()).args([
            "-type",
            "d",
            "-path",
            "*/blobs/sha256/*",
            "-name",
            hex,
        ]));
        for dir in found.lines() {
            fs::remove_file(Path::new(dir).join("data")).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn naming_a_layer_that_is_here_is_not_having_it() {
    let (Some(private), Some(mine)) = (
        Registry::start(&["--auth", "ann:secret"]),
        Registry::start(&[]),
    ) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let account = || PullOptions {
        credentials: Credentials::Basic {
            username: "ann".into(),
            password: "secret".into(),
        },
        ..PullOptions::default()
    };
    let image = store
        .pull(&private.name("busybox:1"), &account())
        .await
        .unwrap();
    // A registry of somebody else's with the same manifest, and nothing behind it.
    forget_layers(&mine, &image);
    let failure = pull(&store, &mine.name("busybox:1")).await.unwrap_err();
    assert!(
        matches!(&failure, ImageError::NoSuchImage { .. }),
        "{failure:?}"
    );
    // Where it came from it may be had again, without being fetched.
    forget_layers(&private, &image);
    let again = store
        .pull(&private.name("busybox:1"), &account())
        .await
        .unwrap();
    assert_eq!(again.id, image.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_anybody_can_have_is_fetched_once() {
    let (Some(open), Some(other)) = (Registry::start(&[]), Registry::start(&[])) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let image = pull(&store, &open.name("busybox:1")).await.unwrap();
    forget_layers(&other, &image);
    let again = pull(&store, &other.name("busybox:1")).await.unwrap();
    assert_eq!(again.id, image.id);
    let removed = store
        .remove(image.id.as_str(), &HashSet::new())
        .await
        .unwrap();
    assert_eq!(removed.layers.len(), image.layers.len());
    let origins = fs::read_dir(dir.path().join("store/origins")).unwrap();
    assert_eq!(origins.count(), 0, "origins go with their layers");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_share_the_work() {
    let Some(registry) = Registry::start(&[]) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let fetched = Arc::new(Mutex::new(0));
    let pulls = ["web:1", "web:1", "web:2", "busybox:1", "busybox:1"].map(|name| {
        let (store, name, fetched) = (store.clone(), registry.name(name), fetched.clone());
        tokio::spawn(async move {
            let progress = move |event| {
                if matches!(event, PullEvent::LayerDone { cached: false, .. }) {
                    *fetched.lock().unwrap() += 1;
                }
            };
            let options = PullOptions {
                progress: Some(Box::new(progress)),
                ..PullOptions::default()
            };
            store.pull(&name, &options).await.unwrap()
        })
    });
    for pull in pulls {
        pull.await.unwrap();
    }
    // base, busybox, lighttpd, two sites.
    assert_eq!(*fetched.lock().unwrap(), 5);
    let usage = store.usage().await.unwrap();
    assert_eq!((usage.images, usage.layers), (3, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_collects_what_nobody_needs() {
    let Some(registry) = Registry::start(&[]) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let none = HashSet::new();
    let web = pull(&store, &registry.name("web:1")).await.unwrap();
    let latest = pull(&store, &registry.name("web:latest")).await.unwrap();
    let second = pull(&store, &registry.name("web:2")).await.unwrap();
    assert_eq!(web.id, latest.id);
    assert_eq!(latest.tags.len(), 2);
    let short = &web.id.hex()[..12];
    assert_eq!(store.get(short).await.unwrap().id, web.id);
    assert!(matches!(
        store.get(&web.id.hex()[..11]).await,
        Err(ImageError::NotFound(_))
    ));
    let inspection = store.inspect(short).await.unwrap();
    assert_eq!(inspection.config["config"]["User"], "www-data");
    assert_eq!(inspection.manifest["layers"].as_array().unwrap().len(), 4);

    let removed = store
        .remove(&registry.name("web:latest").to_string(), &none)
        .await
        .unwrap();
    assert_eq!(
        (removed.untagged, removed.deleted),
        (vec![registry.name("web:latest")], None)
    );
    let used = HashSet::from([web.id.clone()]);
    let refused = store
        .remove(&registry.name("web:1").to_string(), &used)
        .await
        .unwrap_err();
    assert!(matches!(refused, ImageError::InUse(_)), "{refused:?}");
    assert!(matches!(
        store.remove(short, &used).await,
        Err(ImageError::InUse(_))
    ));
    assert_eq!(
        store.get(short).await.unwrap().tags,
        [registry.name("web:1")],
        "nothing was taken"
    );

    let open = store.open_layers(&web).await.unwrap();
    let removed = store
        .remove(&registry.name("web:1").to_string(), &none)
        .await
        .unwrap();
    assert_eq!(removed.deleted, Some(web.id.clone()));
    assert_eq!(
        removed.untagged.len(),
        2,
        "the tag, and the digest that came with it"
    );
    assert_eq!(
        removed.layers,
        [web.layers[3].diff_id.clone()],
        "the others belong to web:2 as well"
    );
    assert!(open[3].metadata().unwrap().len() > 0);
    assert!(matches!(
        store.get(short).await,
        Err(ImageError::NotFound(_))
    ));
    assert!(second.layers.iter().all(|layer| layer.disk.exists()));
    store.remove(second.id.as_str(), &none).await.unwrap();
    let usage = store.usage().await.unwrap();
    assert_eq!((usage.images, usage.layers, usage.blob_bytes), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_can_be_closed_killed_and_opened() {
    let Some(registry) = Registry::start(&[]) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("store");
    let image = {
        let store = store(&dir);
        pull(&store, &registry.name("busybox:1")).await.unwrap()
    };
    // What a crash can leave: half a file, a layer and a blob without record, a name without image.
    fs::write(root.join("tmp/half"), b"half").unwrap();
    let orphan = root.join(format!("layers/{}.erofs", "ab".repeat(32)));
    fs::write(&orphan, b"whole but nobody's").unwrap();
    fs::write(root.join("blobs").join("cd".repeat(32)), b"{}").unwrap();
    let names = root.join("references.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&names).unwrap()).unwrap();
    json["lost.example/image:1"] = format!("sha256:{}", "ef".repeat(32)).into();
    fs::remove_file(&names).unwrap();
    fs::write(&names, json.to_string()).unwrap();

    let store = store(&dir);
    assert!(!root.join("tmp/half").exists());
    assert!(!orphan.exists());
    assert_eq!(fs::read_dir(root.join("blobs")).unwrap().count(), 2);
    assert!(matches!(
        store.get("lost.example/image:1").await,
        Err(ImageError::NotFound(_))
    ));
    assert_eq!(store.list().await.unwrap(), std::slice::from_ref(&image));
    assert_eq!(
        store
            .get(&registry.name("busybox:1").to_string())
            .await
            .unwrap(),
        image
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_script_s_layouts_load() {
    let Some(images) = images() else { return };
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let loaded = store.load(&images.join("web_1.tar")).await.unwrap();
    assert_eq!(loaded.len(), 1);
    let names: Vec<String> = loaded[0].tags.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["test.local/web:1", "test.local/web:latest"]);
    let unpacked = dir.path().join("layout");
    fs::create_dir(&unpacked).unwrap();
    run(Command::new("tar")
        .arg("-xf")
        .arg(images.join("busybox_1.tar"))
        .arg("-C")
        .arg(&unpacked));
    let loaded = store.load(&unpacked).await.unwrap();
    assert_eq!(loaded[0].layers.len(), 2);
    assert_eq!(store.usage().await.unwrap().layers, 4);
}
