//! Who may do what: other tenants, people without credentials, and the ways to get more than one has.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;

use common::{Client, Cluster, config_map, pod};
use hypernetes_apimachinery::{crd, kinds};
use hypernetes_identity::User;
use serde_json::{Value, json};

/// Stands in everything that belongs to the other tenant.
const MARK: &str = "globex-private-mark";

fn base(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("/api/{version}")
    } else {
        format!("/apis/{group}/{version}")
    }
}

async fn two_tenants() -> Cluster {
    let cluster = Cluster::start_with(|config| config.node_name = Some("node".into())).await;
    cluster.tenant("acme").await;
    cluster.tenant("globex").await;
    let admin = cluster.admin();
    let labels = json!({"mark": MARK});
    let there = [
        (
            "/api/v1/namespaces/globex/configmaps",
            config_map("there", MARK),
        ),
        (
            "/api/v1/namespaces/globex/secrets",
            json!({"stringData": {"k": MARK}}),
        ),
        ("/api/v1/namespaces/globex/pods", pod("there")),
        ("/api/v1/namespaces/globex/serviceaccounts", json!({})),
        (
            "/apis/coordination.k8s.io/v1/namespaces/globex/leases",
            json!({"spec": {"holderIdentity": MARK}}),
        ),
        (
            "/apis/rbac.authorization.k8s.io/v1/namespaces/globex/roles",
            json!({"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]}),
        ),
    ];
    for (path, mut object) in there {
        object["metadata"] = json!({"name": "there", "labels": labels});
        admin.create(path, &object).await.expect(201);
    }
    cluster
}

/// Every request about the other tenant's namespace that the grammar of paths allows.
fn requests() -> Vec<(&'static str, String)> {
    let mut out = Vec::new();
    let own = crd::own_kinds().iter().map(|custom| custom.kind);
    for kind in kinds::all().iter().chain(own) {
        let base = base(kind.group, kind.version);
        let plural = kind.plural;
        let collections = if kind.namespaced {
            vec![
                format!("{base}/namespaces/globex/{plural}"),
                format!("{base}/{plural}"),
            ]
        } else {
            vec![format!("{base}/{plural}")]
        };
        for collection in collections {
            for query in [
                "",
                "?watch=true",
                "?labelSelector=mark",
                "?fieldSelector=metadata.name%3Dthere",
                "?limit=1",
            ] {
                out.push(("GET", format!("{collection}{query}")));
            }
            for method in ["POST", "DELETE", "PUT", "PATCH"] {
                out.push((method, collection.clone()));
            }
            let watched = collection.replacen("/v1", "/v1/watch", 1);
            out.push(("GET", watched));
        }
        let names: &[&str] = if kind.plural == "namespaces" {
            &["globex"]
        } else {
            &["there", "absent"]
        };
        for name in names {
            let object = if kind.namespaced {
                format!("{base}/namespaces/globex/{plural}/{name}")
            } else {
                format!("{base}/{plural}/{name}")
            };
            let subresources = kind
                .subresources
                .iter()
                .map(|sub| format!("{object}/{}", sub.name));
            let targets: Vec<String> = subresources.chain([object.clone()]).collect();
            for target in targets {
                for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"] {
                    out.push((method, target.clone()));
                }
            }
            out.push(("GET", format!("{object}?watch=true")));
            out.push(("DELETE", format!("{object}?gracePeriodSeconds=0")));
        }
    }
    out
}

/// Whether everybody who is known may do it.
fn is_everybodys(target: &str) -> bool {
    [
        "/selfsubject",
        "/runtimeclasses",
        "/priorityclasses",
        "/storageclasses",
    ]
    .iter()
    .any(|part| target.contains(part))
}

async fn nothing_is_shown(client: &Client, known: bool) {
    let mut asked = 0;
    for (method, target) in requests() {
        if known && is_everybodys(&target) {
            continue;
        }
        let headers = [("content-type", "application/merge-patch+json")];
        let answer = client.ask(method, &target, &headers, "{}").await;
        assert_eq!(answer.code, 403, "{method} {target}: {}", answer.text);
        assert!(
            !answer.text.contains(MARK),
            "{method} {target}: {}",
            answer.text
        );
        // What is there is refused in the same words as what is not.
        if target.contains("/there") {
            let other = target.replace("/there", "/absent");
            let absent = client.ask(method, &other, &headers, "{}").await;
            assert_eq!(
                absent.text.replace("absent", "there"),
                answer.text,
                "{method} {target}"
            );
        }
        asked += 1;
    }
    assert!(asked > 500, "only {asked} requests were tried");
}

#[tokio::test]
async fn members_of_another_tenant_get_nothing() {
    let cluster = two_tenants().await;
    for role in ["admin", "edit", "view"] {
        nothing_is_shown(&cluster.member("acme", role), true).await;
    }
}

#[tokio::test]
async fn members_write_claims_and_read_classes_and_no_volumes() {
    let cluster = two_tenants().await;
    let json = [("content-type", "application/json")];
    let claim = r#"{"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}}}}"#;
    let claims = "/api/v1/namespaces/acme/persistentvolumeclaims";
    let classes = "/apis/storage.k8s.io/v1/storageclasses";
    for (role, written) in [("admin", 201), ("edit", 201), ("view", 403)] {
        let member = cluster.member("acme", role);
        let made = member.ask("POST", claims, &json, claim).await;
        assert_eq!(made.code, written, "{role}: {}", made.text);
        assert_eq!(member.get(claims).await.code, 200);
        assert_eq!(member.get(classes).await.code, 200);
        let status = format!("{claims}/c/status");
        for (method, path) in [
            ("POST", classes),
            ("DELETE", classes),
            ("GET", "/api/v1/persistentvolumes"),
            ("POST", "/api/v1/persistentvolumes"),
            ("PUT", status.as_str()),
        ] {
            let answer = member.ask(method, path, &json, "{}").await;
            assert_eq!(answer.code, 403, "{role} {method} {path}: {}", answer.text);
        }
        if written == 201 {
            let gone = member
                .ask("DELETE", &format!("{claims}/c"), &json, "")
                .await;
            assert_eq!(gone.code, 200, "{role}: {}", gone.text);
            // What holds it is the controllers' to take off, but a member may take it off its own.
            let free = r#"{"metadata": {"finalizers": null}}"#;
            let merge = [("content-type", "application/merge-patch+json")];
            let path = format!("{claims}/c");
            assert_eq!(member.ask("PATCH", &path, &merge, free).await.code, 200);
        }
    }
}

#[tokio::test]
async fn people_without_credentials_get_nothing() {
    let cluster = two_tenants().await;
    let nobody = cluster.nobody();
    nothing_is_shown(&nobody, false).await;
    nobody.get("/api/v1/namespaces/globex/pods").await.refused(
        403,
        "Forbidden",
        "pods is forbidden: User \"system:anonymous\" cannot list resource \"pods\" in API group \
         \"\" in the namespace \"globex\"",
    );
    for (path, code) in [
        ("/version", 200),
        ("/readyz", 200),
        ("/api", 403),
        ("/metrics", 403),
        ("/openapi/v3", 403),
    ] {
        assert_eq!(nobody.get(path).await.code, code, "{path}");
    }
    let token = [("authorization", "Bearer guess")];
    nobody
        .ask("GET", "/version", &token, "")
        .await
        .refused(401, "Unauthorized", "Unauthorized");
}

#[tokio::test]
async fn a_user_of_no_tenant_gets_discovery_and_nothing_else() {
    let cluster = two_tenants().await;
    let user = cluster.client(User::authenticated("u", []));
    nothing_is_shown(&user, true).await;
    for path in ["/api", "/apis", "/api/v1", "/openapi/v3", "/version"] {
        assert_eq!(user.get(path).await.code, 200, "{path}");
    }
    assert_eq!(user.get("/metrics").await.code, 403);
}

#[tokio::test]
async fn members_do_what_their_role_says_at_home() {
    let cluster = two_tenants().await;
    let home = "/api/v1/namespaces/acme";
    let (admin, edit, view) = (
        cluster.member("acme", "admin"),
        cluster.member("acme", "edit"),
        cluster.member("acme", "view"),
    );
    admin
        .create(&format!("{home}/configmaps"), &config_map("a", "1"))
        .await
        .expect(201);
    edit.create(&format!("{home}/pods"), &pod("p"))
        .await
        .expect(201);
    assert_eq!(
        view.create(&format!("{home}/configmaps"), &config_map("b", "1"))
            .await
            .code,
        403
    );
    view.get(&format!("{home}/pods")).await.expect(200);
    view.get(&format!("{home}/pods?watch=true&timeoutSeconds=1"))
        .await;
    assert_eq!(view.get(&format!("{home}/secrets")).await.code, 403);
    edit.get(&format!("{home}/secrets")).await.expect(200);
    admin.get(home).await.expect(200);
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/acme";
    assert_eq!(edit.get(&format!("{rbac}/roles")).await.code, 403);
    admin.get(&format!("{rbac}/roles")).await.expect(200);
    // What is the system's stays the system's, at home too.
    for (method, target) in [
        ("PATCH", home.to_owned()),
        ("DELETE", home.to_owned()),
        ("PUT", format!("{home}/finalize")),
        ("PATCH", format!("{home}/pods/p/status")),
        ("POST", format!("{home}/pods/p/binding")),
        ("GET", "/api/v1/namespaces".to_owned()),
        ("GET", "/api/v1/nodes".to_owned()),
        ("GET", "/api/v1/pods".to_owned()),
        (
            "GET",
            "/apis/hypernetes.io/v1alpha1/tenants/acme".to_owned(),
        ),
    ] {
        let answer = admin.ask(method, &target, &[], "{}").await;
        assert_eq!(answer.code, 403, "{method} {target}: {}", answer.text);
    }
    // A WebSocket's GET needs what its POST needs.
    assert_eq!(
        view.get(&format!("{home}/pods/p/exec?command=id&stdout=true"))
            .await
            .code,
        403
    );
}

#[tokio::test]
async fn nobody_gives_themselves_more() {
    let cluster = two_tenants().await;
    let admin = cluster.member("acme", "admin");
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/acme";
    let group = "rbac.authorization.k8s.io";
    let rule = |resource: &str, verb: &str| {
        json!({"metadata": {"name": format!("{resource}-{}", verb.replace('*', "all"))},
            "rules": [{"apiGroups": [""], "resources": [resource], "verbs": [verb]}]})
    };
    admin
        .create(&format!("{rbac}/roles"), &rule("pods", "get"))
        .await
        .expect(201);
    for (resource, verb) in [
        ("nodes", "get"),
        ("pods", "*"),
        ("secrets", "escalate"),
        ("pods", "bind"),
    ] {
        let refused = admin
            .create(&format!("{rbac}/roles"), &rule(resource, verb))
            .await;
        assert_eq!(refused.code, 403, "{resource} {verb}: {}", refused.text);
        let message = refused.value["message"].as_str().unwrap();
        assert!(
            message.contains("is attempting to grant RBAC permissions not currently held"),
            "{message}"
        );
    }
    let grow = json!({"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]});
    assert_eq!(
        admin
            .patch(&format!("{rbac}/roles/pods-get"), "merge", &grow)
            .await
            .code,
        403
    );
    let binding = |name: &str, role: &str, subject: Value| {
        json!({"metadata": {"name": name}, "subjects": [subject],
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role}})
    };
    let me = json!({"kind": "User", "apiGroup": group, "name": "acme-admin"});
    for role in ["cluster-admin", "not-there-yet"] {
        let refused = admin
            .create(
                &format!("{rbac}/rolebindings"),
                &binding("more", role, me.clone()),
            )
            .await;
        assert!(
            matches!(refused.code, 403 | 404),
            "{role}: {}",
            refused.text
        );
    }
    let foreign =
        json!({"kind": "Group", "apiGroup": group, "name": "hypernetes:tenant:globex:admin"});
    let refused = admin
        .create(
            &format!("{rbac}/rolebindings"),
            &binding("theirs", "hypernetes-tenant-view", foreign),
        )
        .await;
    assert_eq!(refused.code, 403, "{}", refused.text);
    for target in ["clusterroles", "clusterrolebindings"] {
        let path = format!("/apis/{group}/v1/{target}");
        assert_eq!(
            admin
                .create(&path, &json!({"metadata": {"name": "x"}}))
                .await
                .code,
            403
        );
    }
}

#[tokio::test]
async fn being_treated_as_another_needs_a_right() {
    let cluster = two_tenants().await;
    let as_globex = [
        ("impersonate-user", "bob"),
        ("impersonate-group", "hypernetes:tenant:globex:admin"),
    ];
    let path = "/api/v1/namespaces/globex/configmaps";
    let member = cluster.member("acme", "admin");
    member.ask("GET", path, &as_globex, "").await.refused(
        403,
        "Forbidden",
        "users \"bob\" is forbidden: User \"acme-admin\" cannot impersonate resource \"users\" in \
         API group \"\" at the cluster scope",
    );
    let group_only = [("impersonate-group", "system:masters")];
    assert!(member.ask("GET", path, &group_only, "").await.code >= 400);
    let admin = cluster.admin();
    admin.ask("GET", path, &as_globex, "").await.expect(200);
    let answer = admin
        .ask("GET", "/api/v1/namespaces/acme/configmaps", &as_globex, "")
        .await;
    assert_eq!(
        answer.code, 403,
        "the administrator's own rights are laid down"
    );
    // Somebody who may impersonate users may not thereby become a master.
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    admin
        .create(
            &format!("{rbac}/clusterroles"),
            &json!({"metadata": {"name": "actor"}, "rules": [{"apiGroups": [""], "resources": ["users"], "verbs": ["impersonate"]}]}),
        )
        .await
        .expect(201);
    admin
        .create(
            &format!("{rbac}/clusterrolebindings"),
            &json!({"metadata": {"name": "actor"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "actor"},
                "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "actor"}]}),
        )
        .await
        .expect(201);
    let actor = cluster.client(User::authenticated("actor", []));
    let master = [
        ("impersonate-user", "x"),
        ("impersonate-group", "system:masters"),
    ];
    let refused = actor.ask("GET", path, &master, "").await;
    assert_eq!(refused.code, 403, "{}", refused.text);
    let account = [("impersonate-user", "system:serviceaccount:globex:default")];
    assert_eq!(actor.ask("GET", path, &account, "").await.code, 403);
}

#[tokio::test]
async fn one_name_granted_is_one_name_shown() {
    let cluster = two_tenants().await;
    let admin = cluster.admin();
    admin
        .create(
            "/api/v1/namespaces/globex/configmaps",
            &config_map("open", "1"),
        )
        .await
        .expect(201);
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/globex";
    admin
        .create(
            &format!("{rbac}/roles"),
            &json!({"metadata": {"name": "one"}, "rules": [{"apiGroups": [""], "resources": ["configmaps"],
                "resourceNames": ["open"], "verbs": ["get", "list", "watch", "deletecollection"]}]}),
        )
        .await
        .expect(201);
    admin
        .create(
            &format!("{rbac}/rolebindings"),
            &json!({"metadata": {"name": "one"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "one"},
                "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "u"}]}),
        )
        .await
        .expect(201);
    let user = cluster.client(User::authenticated("u", []));
    let path = "/api/v1/namespaces/globex/configmaps";
    user.get(&format!("{path}/open")).await.expect(200);
    let list = user
        .get(&format!("{path}?fieldSelector=metadata.name%3Dopen"))
        .await
        .expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    for selector in [
        "",
        "metadata.name!%3Dopen",
        "metadata.namespace!%3Dq%5C,metadata.name%3Dopen",
        "metadata.name%3Dthere",
        "metadata.name%3D",
    ] {
        for verb in ["GET", "DELETE"] {
            let answer = user
                .ask(verb, &format!("{path}?fieldSelector={selector}"), &[], "")
                .await;
            let shown = answer.value["items"].as_array().map_or(0, Vec::len);
            assert!(
                !answer.text.contains(MARK) && shown == 0,
                "{selector}: {}",
                answer.text
            );
            assert!(answer.code >= 400, "{verb} {selector}: {}", answer.text);
        }
    }
    admin.get(&format!("{path}/there")).await.expect(200);
}

#[tokio::test]
async fn a_clone_takes_the_right_to_look_into_its_source() {
    let cluster = two_tenants().await;
    let admin = cluster.admin();
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/globex";
    let own = "hypernetes.io";
    for (name, group, resource) in [
        ("maker", "", "pods"),
        ("looker", "", "pods/exec"),
        ("keeper", own, "podsnapshots"),
    ] {
        let rules =
            json!([{"apiGroups": [group], "resources": [resource], "verbs": ["create", "get"]}]);
        let role = json!({"metadata": {"name": name}, "rules": rules});
        admin
            .create(&format!("{rbac}/roles"), &role)
            .await
            .expect(201);
    }
    let bind = async |role: &str| {
        let binding = json!({"metadata": {"name": role},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role},
            "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "u"}]});
        let path = format!("{rbac}/rolebindings");
        admin.create(&path, &binding).await.expect(201);
    };
    let user = cluster.client(User::authenticated("u", []));
    let path = "/api/v1/namespaces/globex/pods";
    let clone = |name: &str| {
        let mut clone = pod(name);
        clone["metadata"]["annotations"] = json!({"hypernetes.io/clone-of": "there"});
        clone
    };
    bind("maker").await;
    user.create(path, &pod("plain")).await.expect(201);
    let refused = user.create(path, &clone("one")).await;
    assert_eq!(refused.code, 403, "{}", refused.text);
    assert!(refused.text.contains("pods/exec"), "{}", refused.text);
    // Nor by way of a snapshot.
    let snapshots = "/apis/hypernetes.io/v1alpha1/namespaces/globex/podsnapshots";
    let snapshot = |name: &str| json!({"metadata": {"name": name}, "spec": {"podName": "there"}});
    let of_snapshot = |name: &str, snapshot: &str| {
        let mut clone = pod(name);
        clone["metadata"]["annotations"] = json!({"hypernetes.io/clone-of-snapshot": snapshot});
        clone
    };
    admin.create(snapshots, &snapshot("s")).await.expect(201);
    bind("keeper").await;
    for refused in [
        user.create(path, &of_snapshot("two", "s")).await,
        user.create(snapshots, &snapshot("mine")).await,
    ] {
        assert_eq!(refused.code, 403, "{}", refused.text);
        assert!(refused.text.contains("pods/exec"), "{}", refused.text);
    }
    bind("looker").await;
    user.create(snapshots, &snapshot("mine")).await.expect(201);
    user.create(path, &of_snapshot("two", "mine"))
        .await
        .expect(201);
    let missing = user.create(path, &of_snapshot("three", "absent")).await;
    assert_eq!(missing.code, 404, "{}", missing.text);
    user.create(path, &clone("one")).await.expect(201);
    // Not even for one who may: the controllers may everything, for whoever wrote the template.
    let mut owned = clone("two");
    owned["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet",
        "name": "r", "uid": "1", "controller": true}]);
    let refused = admin.create(path, &owned).await;
    assert_eq!(refused.code, 403, "{}", refused.text);
}

#[tokio::test]
async fn encoded_slashes_lead_nowhere() {
    let cluster = two_tenants().await;
    let admin = cluster.member("acme", "admin");
    for target in [
        "/api/v1/namespaces/acme/configmaps/..%2Fglobex%2Fthere",
        "/api/v1/namespaces/acme/configmaps/%2E%2E/globex/there",
        "/api/v1/namespaces/acme%2F..%2Fglobex/configmaps",
        "/api/v1/namespaces/acme/../globex/configmaps",
        "/api/v1/namespaces/acme/configmaps?continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6LTEsInN0YXJ0IjoiLi4vZ2xvYmV4LyJ9",
    ] {
        let answer = admin.get(target).await;
        assert!(!answer.text.contains(MARK), "{target}: {}", answer.text);
        assert!(
            !answer.text.contains("there\""),
            "{target}: {}",
            answer.text
        );
    }
}

#[tokio::test]
async fn reviews_answer_as_the_server_acts() {
    let cluster = two_tenants().await;
    let member = cluster.member("acme", "admin");
    let ask = |attributes: Value| {
        let member = member.clone();
        async move {
            let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
            let review = json!({"spec": {"resourceAttributes": attributes}});
            member.create(path, &review).await.expect(201)["status"]["allowed"]
                .as_bool()
                .unwrap()
        }
    };
    assert!(ask(json!({"verb": "create", "resource": "pods", "namespace": "acme"})).await);
    assert!(!ask(json!({"verb": "create", "resource": "pods", "namespace": "globex"})).await);
    assert!(!ask(json!({"verb": "get", "resource": "nodes"})).await);
    let me = member
        .create(
            "/apis/authentication.k8s.io/v1/selfsubjectreviews",
            &json!({}),
        )
        .await
        .expect(201);
    assert_eq!(me["status"]["userInfo"]["username"], "acme-admin");
    let rules = member
        .create(
            "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
            &json!({"spec": {"namespace": "acme"}}),
        )
        .await
        .expect(201);
    assert!(rules["status"]["resourceRules"].as_array().unwrap().len() > 5);
    let subject = json!({"spec": {"user": "x", "groups": ["hypernetes:tenant:globex:admin"],
        "resourceAttributes": {"verb": "get", "resource": "pods", "namespace": "globex"}}});
    let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
    assert_eq!(member.create(path, &subject).await.code, 403);
    assert_eq!(
        cluster.admin().create(path, &subject).await.expect(201)["status"]["allowed"],
        true
    );
    let token = cluster
        .admin()
        .create(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            &json!({"spec": {"token": "secret-token"}}),
        )
        .await;
    assert!(!token.text.contains("secret-token"), "{}", token.text);
    assert_eq!(token.expect(201)["status"]["authenticated"], false);
}

#[tokio::test]
async fn a_user_with_too_many_requests_is_told_to_wait() {
    let cluster = Cluster::start_with(|config| config.limits.long_running_per_user = 2).await;
    cluster.tenant("acme").await;
    let member = cluster.member("acme", "view");
    let target = "/api/v1/namespaces/acme/pods?watch=true";
    let first = member.watch(target).await;
    let _second = member.watch(target).await;
    let third = member.get(target).await;
    assert_eq!(
        (third.code, third.value["reason"].as_str()),
        (429, Some("TooManyRequests"))
    );
    assert_eq!(third.headers["retry-after"], "1");
    drop(first);
    let _third = member.watch(target).await;
}
