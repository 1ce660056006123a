//! Images of namespaces: who may, what names do, what is bounded. The node is a fake.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use common::{Client, Cluster};
use futures::{StreamExt as _, stream};
use hypernetes_streaming::{
    ArchiveBytes, ImageAllowance, ImageContent, ImageEvent, ImageEvents, ImageFailure, ImageFound,
    ImageHold, NodeImages,
};
use hypernetes_types::ImageReference;
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

/// A node whose registry has every name; the content follows from the tag.
struct Fake;

fn found(tag: &str, names: Vec<String>) -> ImageFound {
    let digest = |part: &str| format!("sha256:{part}-{tag}");
    ImageFound {
        content: ImageContent {
            id: digest("id"),
            manifest: digest("manifest"),
        },
        names,
        digest: Some(digest("index")),
        size: GIB,
        content_size: 0,
        created: None,
        platform: "linux/amd64".to_owned(),
    }
}

#[async_trait]
impl NodeImages for Fake {
    async fn hold(&self) -> Result<ImageHold, ImageFailure> {
        Ok(Box::new(()))
    }

    async fn has(&self, _content: &ImageContent) -> bool {
        true
    }

    async fn pull(
        &self,
        image: &str,
        accounts: Vec<Bytes>,
        allowance: ImageAllowance,
        events: ImageEvents,
    ) -> Result<ImageFound, ImageFailure> {
        let account = accounts
            .first()
            .map(|a| String::from_utf8_lossy(a).into_owned());
        if image.contains("private") && account.as_deref() != Some("{}") {
            return Err(ImageFailure::Denied("no account".to_owned()));
        }
        if allowance.limit < GIB {
            return Err(ImageFailure::TooLarge("too large".to_owned()));
        }
        let layers = vec![("sha256:l".to_owned(), 7)];
        events.send(ImageEvent::Resolved { layers }).unwrap();
        let tag = image.rsplit(':').next().unwrap();
        Ok(found(tag, Vec::new()))
    }

    async fn push(
        &self,
        content: &ImageContent,
        _target: &str,
        _accounts: Vec<Bytes>,
        _events: ImageEvents,
    ) -> Result<(String, u64), ImageFailure> {
        Ok((content.manifest.clone(), 3))
    }

    async fn load(
        &self,
        archive: ArchiveBytes,
        _allowance: ImageAllowance,
    ) -> Result<Vec<ImageFound>, ImageFailure> {
        let pieces: Vec<Bytes> = archive.map(Result::unwrap).collect().await;
        let names = String::from_utf8(pieces.concat()).unwrap();
        let mut loaded = found(
            "loaded",
            names.split_whitespace().map(str::to_owned).collect(),
        );
        loaded.digest = None;
        Ok(vec![loaded])
    }

    async fn save(
        &self,
        images: Vec<(ImageContent, Vec<String>)>,
    ) -> Result<ArchiveBytes, ImageFailure> {
        Ok(stream::iter([Ok(Bytes::from(format!("{images:?}")))]).boxed())
    }

    async fn documents(&self, content: &ImageContent) -> Result<(String, String), ImageFailure> {
        Ok(("{}".to_owned(), json!({"id": content.id}).to_string()))
    }

    async fn tags(&self, _image: &str, _accounts: Vec<Bytes>) -> Result<Vec<String>, ImageFailure> {
        Ok(vec!["v1".to_owned()])
    }
}

async fn cluster() -> Cluster {
    let cluster = Cluster::start_with(|config| {
        config.images = Some(Arc::new(Fake));
        config.limits.image_bytes = 3 * GIB;
    })
    .await;
    for tenant in ["acme", "globex"] {
        cluster.tenant(tenant).await;
    }
    cluster
}

fn path(rest: &str) -> String {
    format!("/apis/images.hypernetes.io/v1alpha1/namespaces/acme/images{rest}")
}

fn object_name(image: &str) -> String {
    image.parse::<ImageReference>().unwrap().object_name()
}

/// Posts, and returns the code and the last line.
async fn post(client: &Client, rest: &str, body: impl Into<Bytes>) -> (u16, Value) {
    let answer = client.ask("POST", &path(rest), &[], body).await;
    let last = answer.text.lines().last().unwrap_or_default().to_owned();
    (answer.code, serde_json::from_str(&last).unwrap_or_default())
}

async fn pull(client: &Client, image: &str) -> Value {
    let rest = format!("/{}/pull", object_name(image));
    let (code, last) = post(client, &rest, json!({"image": image}).to_string()).await;
    assert_eq!(code, 200, "{last}");
    last
}

async fn names(client: &Client) -> Vec<String> {
    let list = client.ask("GET", &path(""), &[], "").await.expect(200);
    let items = list["items"].as_array().unwrap();
    let mut names: Vec<String> = items
        .iter()
        .map(|item| {
            let id = item["status"]["id"].as_str().unwrap();
            format!("{} {}", item["spec"]["name"].as_str().unwrap(), &id[7..])
        })
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn names_move_and_content_stays() {
    let cluster = cluster().await;
    let edit = cluster.member("acme", "edit");
    let done = pull(&edit, "web:1").await;
    assert_eq!(
        (&done["type"], &done["changed"]),
        (&json!("DONE"), &json!(true))
    );
    assert_eq!(pull(&edit, "web:1").await["changed"], false);
    pull(&edit, "web:2").await;
    let tag = format!("/{}/tag", object_name("web:2"));
    let (code, object) = post(&edit, &tag, json!({"image": "web:1"}).to_string()).await;
    assert_eq!((code, &object["kind"]), (201, &json!("Image")));
    // What had the name has none now, and gets one again.
    assert_eq!(
        names(&edit).await,
        [
            " id-1",
            "docker.io/library/web:1 id-2",
            "docker.io/library/web:2 id-2"
        ]
    );
    let (code, _) = post(
        &edit,
        "/sha256-id-1/tag",
        json!({"image": "old"}).to_string(),
    )
    .await;
    assert_eq!(code, 201);
    assert_eq!(names(&edit).await[0], "docker.io/library/old:latest id-1");
    // An archive brings names, or none.
    let (code, last) = post(&edit, "/-/archive", "a:1 b:1").await;
    assert_eq!(
        (code, &last["object"]["spec"]["name"]),
        (200, &json!("docker.io/library/b:1"))
    );
    let saved = edit
        .ask(
            "GET",
            &path(&format!("/-/archive?image={}", object_name("a:1"))),
            &[],
            "",
        )
        .await;
    assert!(
        saved.text.contains("docker.io/library/a:1"),
        "{}",
        saved.text
    );
    let push = format!("/{}/push", object_name("a:1"));
    let (_, last) = post(&edit, &push, "").await;
    assert_eq!(last["digest"], "sha256:manifest-loaded");
    let a = edit
        .ask("GET", &path(&format!("/{}", object_name("a:1"))), &[], "")
        .await;
    assert_eq!(a.expect(200)["status"]["digest"], "sha256:manifest-loaded");
}

#[tokio::test]
async fn only_members_and_only_with_proof() {
    let cluster = cluster().await;
    let edit = cluster.member("acme", "edit");
    let view = cluster.member("acme", "view");
    let other = cluster.member("globex", "admin");
    pull(&edit, "web:1").await;
    let web = object_name("web:1");
    let body = json!({"image": "web:1"}).to_string();
    for who in [&view, &other] {
        for rest in [
            format!("/{web}/pull"),
            format!("/{web}/push"),
            format!("/{web}/tag"),
            "/-/archive".to_owned(),
        ] {
            assert_eq!(post(who, &rest, body.clone()).await.0, 403, "{rest}");
        }
        for rest in [
            "/-/tags?image=web".to_owned(),
            format!("/-/archive?image={web}"),
        ] {
            assert_eq!(
                who.ask("GET", &path(&rest), &[], "").await.code,
                403,
                "{rest}"
            );
        }
        let deleted = who.ask("DELETE", &path(&format!("/{web}")), &[], "").await;
        assert_eq!(deleted.code, 403);
    }
    let config = path(&format!("/{web}/config"));
    assert_eq!(view.ask("GET", &config, &[], "").await.code, 200);
    assert_eq!(other.ask("GET", &config, &[], "").await.code, 403);
    assert_eq!(other.ask("GET", &path(""), &[], "").await.code, 403);
    // Not even an operator makes an object by itself.
    let object = edit
        .ask("GET", &path(&format!("/{web}")), &[], "")
        .await
        .expect(200);
    for (method, rest) in [
        ("POST", String::new()),
        ("PUT", format!("/{web}")),
        ("PATCH", format!("/{web}")),
    ] {
        let answer = cluster
            .admin()
            .ask(method, &path(&rest), &[], object.to_string())
            .await;
        assert_eq!(answer.code, 405, "{method}: {}", answer.text);
    }
}

#[tokio::test]
async fn requests_are_checked_and_bounded() {
    let cluster = cluster().await;
    let edit = cluster.member("acme", "edit");
    let wrong = format!("/{}/pull", object_name("web:2"));
    for (rest, body, says) in [
        (
            wrong.as_str(),
            json!({"image": "web:1"}),
            "metadata.name: the Image of",
        ),
        (
            "/x/pull",
            json!({"image": "UPPER"}),
            "image: invalid image reference",
        ),
        (
            "/x/pull",
            json!({"picture": "web:1"}),
            "the body is not understood",
        ),
        ("/x/archive", json!({}), "send it to images/-/archive"),
    ] {
        let (code, answer) = post(&edit, rest, body.to_string()).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(
            code == 400 && message.contains(says),
            "{rest}: {code} {answer}"
        );
    }
    // Accounts come from the namespace's Secrets.
    let private = json!({"image": "private:9", "secrets": ["registry", "nothing"]});
    let rest = format!("/{}/pull", object_name("private:9"));
    let (_, last) = post(&edit, &rest, private.to_string()).await;
    assert_eq!(
        (&last["type"], &last["object"]["code"]),
        (&json!("ERROR"), &json!(403))
    );
    let secret = json!({"metadata": {"name": "registry"}, "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": "e30="}});
    edit.create("/api/v1/namespaces/acme/secrets", &secret)
        .await
        .expect(201);
    assert_eq!(
        post(&edit, &rest, private.to_string()).await.1["type"],
        "DONE"
    );
    pull(&edit, "web:1").await;
    pull(&edit, "web:2").await;
    // Three are as much as a namespace may have.
    assert_eq!(pull(&edit, "web:3").await["type"], "ERROR");
    let (code, answer) = post(&edit, "/-/archive", "c:1").await;
    let message = answer["message"].as_str().unwrap_or_default();
    assert!(
        code == 403 && message.contains("remove some first"),
        "{answer}"
    );
    let gone = edit
        .ask(
            "DELETE",
            &path(&format!("/{}", object_name("web:2"))),
            &[],
            "",
        )
        .await;
    assert_eq!(gone.code, 200);
    assert_eq!(pull(&edit, "web:3").await["type"], "DONE");
}
