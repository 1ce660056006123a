//! Tokens of service accounts: issued, accepted, and worthless once what they stand for is gone.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use common::{Client, Cluster, pod};
use jiff::Timestamp;
use serde_json::{Value, json};

const ACCOUNTS: &str = "/api/v1/namespaces/default/serviceaccounts";
const PODS: &str = "/api/v1/namespaces/default/pods";

async fn account(admin: &Client, name: &str) {
    let account = json!({"metadata": {"name": name}});
    admin.create(ACCOUNTS, &account).await.expect(201);
}

async fn request(admin: &Client, name: &str, spec: Value) -> Value {
    admin
        .create(&format!("{ACCOUNTS}/{name}/token"), &json!({"spec": spec}))
        .await
        .expect(201)
}

async fn token(admin: &Client, name: &str, spec: Value) -> String {
    let request = request(admin, name, spec).await;
    request["status"]["token"].as_str().unwrap().to_owned()
}

/// Who the server takes the bearer of the token for; `None` if it refuses it.
async fn whoami(cluster: &Cluster, token: &str) -> Option<Value> {
    let bearer = format!("Bearer {token}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    let target = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let answer = cluster.nobody().ask("POST", target, &headers, "{}").await;
    match answer.code {
        201 => Some(answer.value["status"]["userInfo"].clone()),
        401 => None,
        code => panic!("{code}: {}", answer.text),
    }
}

#[tokio::test]
async fn a_token_is_its_account() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    account(&admin, "robot").await;
    let made = request(&admin, "robot", json!({"expirationSeconds": 600})).await;
    assert_eq!(made["kind"], "TokenRequest");
    assert_eq!(
        made["spec"]["audiences"][0],
        "https://kubernetes.default.svc.cluster.local"
    );
    let token = made["status"]["token"].as_str().unwrap();
    let user = whoami(&cluster, token).await.unwrap();
    assert_eq!(user["username"], "system:serviceaccount:default:robot");
    assert_eq!(
        user["groups"],
        json!([
            "system:serviceaccounts",
            "system:serviceaccounts:default",
            "system:authenticated"
        ])
    );
    let id = user["extra"]["authentication.kubernetes.io/credential-id"][0].as_str();
    assert!(id.unwrap().starts_with("JTI="));

    let review = json!({"spec": {"token": token}});
    let target = "/apis/authentication.k8s.io/v1/tokenreviews";
    let told = admin.create(target, &review).await.expect(201);
    assert_eq!(told["status"]["user"]["username"], user["username"]);
    let elsewhere = json!({"spec": {"token": token, "audiences": ["vault"]}});
    let told = admin.create(target, &elsewhere).await.expect(201);
    assert_eq!(told["status"]["authenticated"], false);
}

#[tokio::test]
async fn what_cannot_be_issued_is_refused() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    account(&admin, "robot").await;
    let ask = async |spec: Value| {
        let target = format!("{ACCOUNTS}/robot/token");
        admin.create(&target, &json!({"spec": spec})).await
    };
    ask(json!({"expirationSeconds": 599})).await.refused(
        422,
        "Invalid",
        "TokenRequest.authentication.k8s.io \"robot\" is invalid: spec.expirationSeconds: Invalid \
         value: 599: may not specify a duration less than 10 minutes",
    );
    let bound =
        |kind: &str| json!({"boundObjectRef": {"kind": kind, "apiVersion": "v1", "name": "x"}});
    assert_eq!(ask(bound("ConfigMap")).await.code, 400);
    assert_eq!(ask(bound("Pod")).await.code, 404);
    let mut other = pod("x");
    other["spec"]["serviceAccountName"] = "somebody".into();
    admin.create(PODS, &other).await.expect(201);
    ask(bound("Pod")).await.refused(
        400,
        "BadRequest",
        "cannot bind token for serviceaccount \"robot\" to pod running with different \
         serviceaccount name.",
    );
    let nobody = format!("{ACCOUNTS}/nobody/token");
    assert_eq!(admin.create(&nobody, &json!({})).await.code, 404);
}

#[tokio::test]
async fn a_token_ends_with_what_it_stands_for() {
    let cluster = Cluster::start().await;
    let admin = cluster.admin();
    account(&admin, "robot").await;
    let mut own = pod("x");
    own["spec"]["serviceAccountName"] = "robot".into();
    let uid = admin.create(PODS, &own).await.expect(201)["metadata"]["uid"].clone();
    let spec =
        json!({"boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "x", "uid": uid}});
    let of_pod = token(&admin, "robot", spec).await;
    let free = token(&admin, "robot", json!({})).await;
    let other = token(&admin, "robot", json!({"audiences": ["vault"]})).await;
    let user = whoami(&cluster, &of_pod).await.unwrap();
    assert_eq!(
        user["extra"]["authentication.kubernetes.io/pod-uid"][0],
        uid
    );
    // A token for somebody else is not good here.
    assert!(whoami(&cluster, &other).await.is_none());

    admin
        .delete(&format!("{PODS}/x?gracePeriodSeconds=0"))
        .await
        .expect(200);
    admin.create(PODS, &own).await.expect(201);
    assert!(
        whoami(&cluster, &of_pod).await.is_none(),
        "another pod of that name"
    );
    assert!(whoami(&cluster, &free).await.is_some());
    admin.delete(&format!("{ACCOUNTS}/robot")).await.expect(200);
    account(&admin, "robot").await;
    assert!(
        whoami(&cluster, &free).await.is_none(),
        "another account of that name"
    );
}

#[tokio::test]
async fn a_token_ends_by_the_servers_clock() {
    let now = Arc::new(AtomicI64::new(1_800_000_000));
    let clock = now.clone();
    let cluster = Cluster::start_with(|config| {
        config.clock =
            Arc::new(move || Timestamp::from_second(clock.load(Ordering::SeqCst)).unwrap());
    })
    .await;
    let admin = cluster.admin();
    account(&admin, "robot").await;
    let token = token(&admin, "robot", json!({"expirationSeconds": 600})).await;
    now.fetch_add(599, Ordering::SeqCst);
    assert!(whoami(&cluster, &token).await.is_some());
    now.fetch_add(1, Ordering::SeqCst);
    assert!(whoami(&cluster, &token).await.is_none());
}

#[tokio::test]
async fn an_account_of_one_tenant_is_nobody_to_another() {
    let cluster = Cluster::start().await;
    for tenant in ["acme", "other"] {
        cluster.tenant(tenant).await;
    }
    let member = cluster.member("acme", "edit");
    let accounts = "/api/v1/namespaces/acme/serviceaccounts";
    member
        .create(accounts, &json!({"metadata": {"name": "robot"}}))
        .await
        .expect(201);
    let made = member
        .create(&format!("{accounts}/robot/token"), &json!({}))
        .await
        .expect(201);
    let bearer = format!("Bearer {}", made["status"]["token"].as_str().unwrap());
    let binding = json!({
        "metadata": {"name": "robot"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
            "name": "hypernetes-tenant-view"},
        "subjects": [{"kind": "ServiceAccount", "name": "robot", "namespace": "acme"}],
    });
    let bindings = "/apis/rbac.authorization.k8s.io/v1/namespaces/acme/rolebindings";
    cluster.admin().create(bindings, &binding).await.expect(201);
    let nobody = cluster.nobody();
    for (target, code) in [
        ("/api/v1/namespaces/acme/pods", 200),
        ("/api/v1/namespaces/acme/secrets", 403),
        ("/api/v1/namespaces/other/pods", 403),
        ("/api/v1/namespaces/other/serviceaccounts/robot", 403),
        ("/api/v1/pods", 403),
        ("/api/v1/namespaces", 403),
        ("/api/v1/nodes", 403),
        ("/apis/hypernetes.io/v1alpha1/tenants", 403),
    ] {
        let headers = [("authorization", bearer.as_str())];
        let answer = nobody.ask("GET", target, &headers, "").await;
        assert_eq!(answer.code, code, "{target}: {}", answer.text);
    }
    let target = "/api/v1/namespaces/other/serviceaccounts/default/token";
    assert_eq!(member.create(target, &json!({})).await.code, 403);
    let viewer = cluster.member("acme", "view");
    assert_eq!(
        viewer
            .create(&format!("{accounts}/robot/token"), &json!({}))
            .await
            .code,
        403
    );
}
