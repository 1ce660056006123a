//! The real kubectl, two releases, against a server on loopback.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;
#[path = "common/served.rs"]
mod served;

use std::{path::Path, process::Stdio, time::Duration};

use hypernetes_identity::{Authority, Kubeconfig};
use served::{Kubectl, Served, release};
use tokio::io::{AsyncBufReadExt, BufReader};

const RELEASES: [&str; 2] = ["1.36.4", "1.37.1"];

async fn everyday(k: &Kubectl) {
    assert_eq!(
        k.ok(&[
            "create",
            "configmap",
            "settings",
            "--from-literal=colour=blue"
        ])
        .await,
        "configmap/settings created"
    );
    assert_eq!(
        k.ok(&[
            "get",
            "configmap",
            "settings",
            "-o",
            "jsonpath={.data.colour}"
        ])
        .await,
        "blue"
    );
    let table = k.ok(&["get", "cm"]).await;
    let line = table
        .lines()
        .find(|line| line.starts_with("settings"))
        .unwrap()
        .to_owned();
    assert!(
        table.starts_with("NAME") && table.contains("DATA"),
        "{table}"
    );
    assert_eq!(line.split_whitespace().nth(1), Some("1"), "{table}");
    k.ok(&["get", "cm", "settings", "-o", "wide"]).await;
    let yaml = k.ok(&["get", "cm", "settings", "-o", "yaml"]).await;
    assert!(
        yaml.contains("kind: ConfigMap") && yaml.contains("colour: blue"),
        "{yaml}"
    );
    let json = k.ok(&["get", "cm", "-o", "json"]).await;
    assert!(json.contains("\"kind\": \"List\""), "{json}");

    let manifest = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: applied\ndata:\n  a: '1'\n";
    assert_eq!(
        k.ok_with(&["apply", "-f", "-"], manifest).await,
        "configmap/applied created"
    );
    assert_eq!(
        k.ok_with(&["apply", "-f", "-"], manifest).await,
        "configmap/applied unchanged"
    );
    let changed = manifest.replace("a: '1'", "b: '2'");
    assert_eq!(
        k.ok_with(&["apply", "-f", "-"], &changed).await,
        "configmap/applied configured"
    );
    assert_eq!(
        k.ok(&["get", "cm", "applied", "-o", "jsonpath={.data}"])
            .await,
        "{\"b\":\"2\"}"
    );
    let diff = k.run_with(&["diff", "-f", "-"], manifest).await;
    assert_eq!(diff.code, 1, "{}{}", diff.out, diff.err);
    assert!(diff.out.contains("+  a: \"1\""), "{}", diff.out);
    assert_eq!(
        k.ok_with(
            &["create", "--dry-run=server", "-f", "-"],
            &manifest.replace("applied", "dry")
        )
        .await,
        "configmap/dry created (server dry run)"
    );
    assert_eq!(k.run(&["get", "cm", "dry"]).await.code, 1);

    assert_eq!(
        k.ok(&["label", "cm", "settings", "tier=front"]).await,
        "configmap/settings labeled"
    );
    assert_eq!(
        k.ok(&["get", "cm", "-l", "tier=front", "-o", "name"]).await,
        "configmap/settings"
    );
    assert_eq!(
        k.ok(&["get", "cm", "-l", "tier in (back)", "-o", "name"])
            .await,
        ""
    );
    assert_eq!(
        k.ok(&[
            "get",
            "cm",
            "--field-selector",
            "metadata.name=applied",
            "-o",
            "name"
        ])
        .await,
        "configmap/applied"
    );
    assert_eq!(
        k.ok(&["annotate", "cm", "settings", "note=hello"]).await,
        "configmap/settings annotated"
    );
    for (form, patch) in [
        ("merge", r#"{"data":{"size":"4"}}"#),
        (
            "json",
            r#"[{"op":"replace","path":"/data/size","value":"5"}]"#,
        ),
        ("strategic", r#"{"data":{"size":"6"}}"#),
    ] {
        assert_eq!(
            k.ok(&["patch", "cm", "settings", "--type", form, "-p", patch])
                .await,
            "configmap/settings patched"
        );
    }
    assert_eq!(
        k.ok(&["get", "cm", "settings", "-o", "jsonpath={.data.size}"])
            .await,
        "6"
    );
    let edited = k
        .ok(&["get", "cm", "settings", "-o", "yaml"])
        .await
        .replace("size: \"6\"", "size: \"7\"");
    assert_eq!(
        k.ok_with(&["replace", "-f", "-"], &edited).await,
        "configmap/settings replaced"
    );
    let stale = k.run_with(&["replace", "-f", "-"], &edited).await;
    assert!(
        stale.err.contains("Error from server (Conflict)"),
        "{}",
        stale.err
    );
    let described = k.ok(&["describe", "cm", "settings"]).await;
    assert!(
        described.contains("Name:         settings") && described.contains("tier=front"),
        "{described}"
    );

    let taken = k.run(&["create", "configmap", "settings"]).await;
    assert_eq!(taken.code, 1);
    assert_eq!(
        taken.err.trim(),
        "error: failed to create configmap: configmaps \"settings\" already exists"
    );
    let missing = k.run(&["get", "configmap", "nothing"]).await;
    assert_eq!(
        missing.err.trim(),
        "Error from server (NotFound): configmaps \"nothing\" not found"
    );
    let strict = k
        .run_with(
            &["apply", "-f", "-"],
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: odd}\ndate: {}\n",
        )
        .await;
    assert!(
        strict.err.contains("unknown field \"date\""),
        "{}",
        strict.err
    );

    assert_eq!(
        k.ok(&["delete", "cm", "applied"]).await,
        "configmap \"applied\" deleted from default namespace"
    );
    assert_eq!(
        k.ok(&["wait", "--for=delete", "cm/applied", "--timeout=20s"])
            .await,
        ""
    );
    k.ok(&["delete", "cm", "--all"]).await;
    assert_eq!(k.ok(&["get", "cm", "-o", "name"]).await, "");
}

async fn other_kinds(k: &Kubectl) {
    k.ok(&[
        "create",
        "secret",
        "generic",
        "token",
        "--from-literal=password=hunter2",
    ])
    .await;
    let table = k.ok(&["get", "secret", "token"]).await;
    assert!(table.contains("Opaque"), "{table}");
    assert_eq!(
        k.ok(&["get", "secret", "token", "-o", "jsonpath={.data.password}"])
            .await,
        "aHVudGVyMg=="
    );
    assert_eq!(
        k.ok(&["create", "namespace", "work"]).await,
        "namespace/work created"
    );
    assert_eq!(
        k.ok(&[
            "wait",
            "ns/work",
            "--for=jsonpath={.status.phase}=Active",
            "--timeout=20s"
        ])
        .await,
        "namespace/work condition met"
    );
    let namespaces = k.ok(&["get", "namespaces"]).await;
    assert!(
        namespaces.contains("STATUS") && namespaces.contains("Active"),
        "{namespaces}"
    );
    k.ok(&[
        "create",
        "role",
        "reader",
        "--verb=get,list",
        "--resource=pods,pods/log",
        "-n",
        "work",
    ])
    .await;
    k.ok(&[
        "create",
        "rolebinding",
        "reader",
        "--role=reader",
        "--user=dev",
        "-n",
        "work",
    ])
    .await;
    let described = k.ok(&["describe", "role", "reader", "-n", "work"]).await;
    assert!(described.contains("pods/log"), "{described}");
    for (args, answer) in [
        (
            ["auth", "can-i", "list", "pods", "-n", "work", "--as=dev"],
            "yes",
        ),
        (
            ["auth", "can-i", "list", "pods", "-n", "default", "--as=dev"],
            "no",
        ),
        (
            ["auth", "can-i", "delete", "pods", "-n", "work", "--as=dev"],
            "no",
        ),
    ] {
        let said = k.run(&args).await;
        assert_eq!(said.out.trim(), answer, "{args:?}: {}", said.err);
        assert_eq!(said.code == 0, answer == "yes");
    }
    let list = k
        .ok(&["auth", "can-i", "--list", "-n", "work", "--as=dev"])
        .await;
    assert!(list.contains("pods/log"), "{list}");
    let me = k.ok(&["auth", "whoami"]).await;
    assert!(me.contains("root") && me.contains("system:masters"), "{me}");
    assert_eq!(
        k.ok(&["delete", "role,rolebinding", "reader", "-n", "work"])
            .await
            .lines()
            .count(),
        2
    );
}

async fn discovery(k: &Kubectl) {
    let version = k.ok(&["version"]).await;
    assert!(
        version.contains("Server Version: v1.36.2+hypernetes."),
        "{version}"
    );
    let resources = k.ok(&["api-resources"]).await;
    for word in [
        "configmaps",
        "clusterroles",
        "networks",
        "hypernetes.io/v1alpha1",
    ] {
        assert!(resources.contains(word), "{resources}");
    }
    let versions = k.ok(&["api-versions"]).await;
    assert!(versions.lines().any(|line| line == "v1"), "{versions}");
    let explained = k.ok(&["explain", "pod.spec.containers.image"]).await;
    assert!(
        explained.contains("KIND:       Pod") && explained.contains("<string>"),
        "{explained}"
    );
    let explained = k.ok(&["explain", "configmap", "--recursive"]).await;
    assert!(explained.contains("binaryData"), "{explained}");
    assert_eq!(k.ok(&["get", "--raw", "/readyz"]).await, "ok");
    assert!(
        k.ok(&["get", "--raw", "/metrics"])
            .await
            .contains("hypernetes_apiserver_requests_total")
    );
}

async fn watching(k: &Kubectl) {
    let mut child = k
        .command(&["get", "cm", "--watch", "-o", "name"])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut table = k
        .command(&["get", "cm", "--watch-only"])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut rows = BufReader::new(table.stdout.take().unwrap()).lines();
    // Both watches are open once an event has come through: write until one does.
    let mut count = 0;
    let (mut named, mut row) = (None, None);
    while named.is_none() || row.is_none() {
        assert!(count < 60, "the watches show nothing");
        k.ok(&["create", "cm", &format!("seen-{count}")]).await;
        count += 1;
        if let Ok(line) = tokio::time::timeout(Duration::from_millis(500), lines.next_line()).await
        {
            named = named.or(line.unwrap());
        }
        if let Ok(line) = tokio::time::timeout(Duration::from_millis(500), rows.next_line()).await {
            row = row.or(line.unwrap());
        }
    }
    assert!(named.unwrap().starts_with("configmap/seen-"));
    assert!(row.unwrap().starts_with("NAME"));
    child.kill().await.unwrap();
    table.kill().await.unwrap();
    k.ok(&["delete", "cm", "--all"]).await;
}

async fn tenants(served: &Served, binary: &Path, release: &str) {
    let (acme, globex) = (format!("acme-{release}"), format!("globex-{release}"));
    for name in [&acme, &globex] {
        served.cluster.tenant(name).await;
    }
    let user = format!("alice-{release}");
    let group = format!("hypernetes:tenant:{acme}:admin");
    let k = served.kubectl(binary, &user, &group, &acme);
    k.ok(&["create", "configmap", "mine"]).await;
    assert_eq!(k.ok(&["get", "cm", "-o", "name"]).await, "configmap/mine");
    let foreign = k.run(&["get", "pods", "-n", &globex]).await;
    assert_eq!(
        foreign.err.trim(),
        format!(
            "Error from server (Forbidden): pods is forbidden: User {user:?} cannot list resource \
             \"pods\" in API group \"\" in the namespace {globex:?}"
        )
    );
    for args in [
        vec!["get", "namespaces"],
        vec!["get", "cm", "-A"],
        vec!["get", "secret", "x", "-n", globex.as_str()],
        vec!["delete", "cm", "--all", "-n", globex.as_str()],
        vec![
            "create",
            "clusterrolebinding",
            "x",
            "--clusterrole=cluster-admin",
            "--user=x",
        ],
    ] {
        let said = k.run(&args).await;
        assert_eq!(said.code, 1, "{args:?}: {}", said.out);
        assert!(said.err.contains("orbidden"), "{args:?}: {}", said.err);
    }
    let escalating = k
        .run(&[
            "create",
            "rolebinding",
            "x",
            "--clusterrole=cluster-admin",
            "--group",
            &group,
        ])
        .await;
    assert_eq!(escalating.code, 1, "{}", escalating.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_is_at_home() {
    let served = Served::start(|_| {}).await;
    for version in RELEASES {
        let Some(binary) = release(version).await else {
            continue;
        };
        let k = served.kubectl(&binary, "root", "system:masters", "default");
        everyday(&k).await;
        other_kinds(&k).await;
        discovery(&k).await;
        watching(&k).await;
        tenants(&served, &binary, &version.replace('.', "-")).await;
        k.ok(&["delete", "secret", "token"]).await;
        // Nobody ends namespaces here: there are no controllers.
        k.ok(&["delete", "ns", "work", "--wait=false"]).await;
        let closed = k.run(&["create", "cm", "late", "-n", "work"]).await;
        assert!(
            closed.err.contains("because it is being terminated"),
            "{}",
            closed.err
        );
        let admin = served.cluster.admin();
        let mut namespace = admin.get("/api/v1/namespaces/work").await.expect(200);
        namespace["spec"]["finalizers"] = serde_json::json!([]);
        admin
            .put("/api/v1/namespaces/work/finalize", &namespace)
            .await
            .expect(200);
        assert_eq!(k.run(&["get", "ns", "work"]).await.code, 1);
    }
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_another_authority_are_refused() {
    let served = Served::start(|_| {}).await;
    let Some(binary) = release(RELEASES[0]).await else {
        return;
    };
    let other = tempfile::tempdir().unwrap();
    let stranger = Authority::load_or_create(other.path()).unwrap();
    let credentials = stranger
        .client(
            "root",
            &["system:masters".into()],
            Duration::from_secs(3600),
        )
        .unwrap();
    let config = other.path().join("config");
    Kubeconfig {
        server: &format!("https://{}", served.address),
        context: "test",
        user: "root",
        namespace: "default",
        authority: &served.authority,
        credentials: &credentials,
    }
    .write(&config)
    .unwrap();
    let k = Kubectl {
        binary,
        home: tempfile::tempdir().unwrap(),
        config,
    };
    let said = k.run(&["get", "cm"]).await;
    assert_eq!(said.code, 1, "{}", said.out);
    assert!(
        said.err.contains("tls:") || said.err.contains("certificate"),
        "{}",
        said.err
    );
    // TLS does not need a certificate; a token that nobody knows is refused above it.
    let text = std::fs::read_to_string(&k.config).unwrap();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains("client-"))
        .collect();
    let text = lines.join("\n");
    let text = text.replace("  user:\ncontexts", "  user: {token: guess}\ncontexts");
    std::fs::write(&k.config, text).unwrap();
    let said = k.run(&["get", "--raw", "/version"]).await;
    assert_eq!(said.code, 1, "{}", said.out);
    assert!(
        said.err.contains("You must be logged in to the server"),
        "{}",
        said.err
    );
    served.stop().await;
}

const GADGETS: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gadgets.example.org}
spec:
  group: example.org
  scope: Namespaced
  names: {plural: gadgets, kind: Gadget, shortNames: [gd]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources:
      status: {}
      scale: {specReplicasPath: .spec.replicas, statusReplicasPath: .status.replicas}
    selectableFields: [{jsonPath: .spec.colour}]
    additionalPrinterColumns:
    - {name: Colour, type: string, jsonPath: .spec.colour}
    - {name: Replicas, type: integer, jsonPath: .spec.replicas}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            description: What the gadget shall be.
            type: object
            x-kubernetes-validations:
            - {rule: 'self.replicas <= 5 || self.colour == "red"', message: only red gadgets are many}
            properties:
              colour: {type: string, description: Its colour., enum: [red, blue], default: blue}
              replicas: {type: integer, minimum: 0, default: 1}
          status:
            type: object
            properties: {replicas: {type: integer}}
"#;

async fn server_side_apply(k: &Kubectl) {
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: shared}\ndata: {a: '1', b: '1'}\n";
    let applied = ["apply", "--server-side", "-f", "-"];
    assert_eq!(
        k.ok_with(&applied, map).await,
        "configmap/shared serverside-applied"
    );
    let as_other = ["apply", "--server-side", "--field-manager=other", "-f", "-"];
    let changed = map.replace("b: '1'", "b: '2', c: '3'");
    let refused = k.run_with(&as_other, &changed).await;
    assert_eq!(refused.code, 1);
    assert!(
        refused
            .err
            .contains("Apply failed with 1 conflict: conflict with \"kubectl\": .data.b"),
        "{}",
        refused.err
    );
    let difference = k
        .run_with(
            &["diff", "--server-side", "--force-conflicts", "-f", "-"],
            &changed,
        )
        .await;
    assert_eq!(difference.code, 1, "{}", difference.err);
    assert!(difference.out.contains("+  c: \"3\""), "{}", difference.out);
    let forced = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager=other",
        "-f",
        "-",
    ];
    k.ok_with(&forced, &changed).await;
    assert_eq!(
        k.ok(&["get", "cm", "shared", "-o", "jsonpath={.data}"])
            .await,
        r#"{"a":"1","b":"2","c":"3"}"#
    );
    // What kubectl no longer applies goes, what the other has stays.
    let less = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: shared}\ndata: {}\n";
    k.ok_with(&["apply", "--server-side", "-f", "-"], less)
        .await;
    assert_eq!(
        k.ok(&["get", "cm", "shared", "-o", "jsonpath={.data}"])
            .await,
        r#"{"a":"1","b":"2","c":"3"}"#,
        "the other has applied a too"
    );
    let managers = k
        .ok(&[
            "get",
            "cm",
            "shared",
            "--show-managed-fields",
            "-o",
            "jsonpath={.metadata.managedFields[*].manager}",
        ])
        .await;
    assert!(managers.contains("other"), "{managers}");

    // From client-side to server-side: kubectl takes over its own fields.
    let before = map.replace("shared", "moved");
    k.ok_with(&["apply", "-f", "-"], &before).await;
    let after = before.replace("b: '1'", "b: '9'");
    assert_eq!(
        k.ok_with(&["apply", "--server-side", "-f", "-"], &after)
            .await,
        "configmap/moved serverside-applied"
    );
    let without = after.replace(", b: '9'", "");
    k.ok_with(&["apply", "--server-side", "-f", "-"], &without)
        .await;
    assert_eq!(
        k.ok(&["get", "cm", "moved", "-o", "jsonpath={.data}"])
            .await,
        r#"{"a":"1"}"#
    );
}

async fn custom_resources(k: &Kubectl) {
    k.ok_with(&["apply", "-f", "-"], GADGETS).await;
    k.ok(&[
        "wait",
        "--for=condition=Established",
        "crd/gadgets.example.org",
        "--timeout=20s",
    ])
    .await;
    let gadget =
        "apiVersion: example.org/v1\nkind: Gadget\nmetadata: {name: one}\nspec: {replicas: 2}\n";
    k.ok_with(&["apply", "-f", "-"], gadget).await;
    k.ok_with(
        &["apply", "--server-side", "-f", "-"],
        &gadget
            .replace("one", "two")
            .replace("replicas: 2", "colour: red"),
    )
    .await;
    let table = k.ok(&["get", "gd"]).await;
    assert!(table.starts_with("NAME   COLOUR   REPLICAS"), "{table}");
    assert!(table.contains("one    blue     2"), "{table}");
    let red = k
        .ok(&[
            "get",
            "gadgets",
            "--field-selector",
            "spec.colour=red",
            "-o",
            "name",
        ])
        .await;
    assert_eq!(red, "gadget.example.org/two");
    let refused = k
        .run_with(
            &["apply", "-f", "-"],
            &gadget.replace("replicas: 2", "replicas: 7"),
        )
        .await;
    assert!(
        refused.err.contains("only red gadgets are many"),
        "{}",
        refused.err
    );
    let refused = k
        .run_with(
            &["apply", "-f", "-"],
            &gadget.replace("replicas: 2", "sizes: 7"),
        )
        .await;
    assert!(
        refused.err.contains("unknown field \"spec.sizes\""),
        "{}",
        refused.err
    );
    k.ok(&["scale", "gadget/one", "--replicas=4"]).await;
    assert_eq!(
        k.ok(&["get", "gadget", "one", "-o", "jsonpath={.spec.replicas}"])
            .await,
        "4"
    );
    let explained = k.ok(&["explain", "gadget.spec.colour"]).await;
    assert!(explained.contains("Its colour."), "{explained}");
    k.ok(&[
        "patch",
        "gadget",
        "one",
        "--type=merge",
        "-p",
        r#"{"spec":{"colour":"red"}}"#,
    ])
    .await;
    k.ok(&["label", "gadget", "one", "a=b"]).await;
    k.ok(&["delete", "crd", "gadgets.example.org"]).await;
    assert_eq!(k.run(&["get", "gadgets"]).await.code, 1);
    let ours = k.ok(&["get", "crd", "-o", "name"]).await;
    assert!(ours.contains("tenants.hypernetes.io"), "{ours}");
}

async fn deletion_policies(k: &Kubectl) {
    for (policy, finalizer) in [("foreground", "foregroundDeletion"), ("orphan", "orphan")] {
        k.ok(&["create", "cm", policy]).await;
        k.ok(&[
            "delete",
            "cm",
            policy,
            &format!("--cascade={policy}"),
            "--wait=false",
        ])
        .await;
        // The garbage collector takes these off; here there is none.
        assert_eq!(
            k.ok(&[
                "get",
                "cm",
                policy,
                "-o",
                "jsonpath={.metadata.finalizers[0]}"
            ])
            .await,
            finalizer
        );
        k.ok(&[
            "patch",
            "cm",
            policy,
            "--type=merge",
            "-p",
            r#"{"metadata":{"finalizers":null}}"#,
        ])
        .await;
        assert_eq!(k.run(&["get", "cm", policy]).await.code, 1);
    }
    k.ok(&["create", "cm", "background"]).await;
    k.ok(&["delete", "cm", "background", "--cascade=background"])
        .await;
    assert_eq!(k.run(&["get", "cm", "background"]).await.code, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_custom_resources_and_the_audit_log() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("audit.log");
    let path = log.clone();
    let served = Served::start(move |config| {
        config.audit = Some(hypernetes_apiserver::AuditOptions {
            path,
            max_size: 0,
            max_backups: 0,
            max_age: 0,
        });
    })
    .await;
    let Some(binary) = release(RELEASES[1]).await else {
        return;
    };
    let k = served.kubectl(&binary, "root", "system:masters", "default");
    server_side_apply(&k).await;
    custom_resources(&k).await;
    deletion_policies(&k).await;

    let who = k
        .ok(&[
            "auth",
            "whoami",
            "--as=alice",
            "--as-group=staff",
            "-o",
            "json",
        ])
        .await;
    assert!(who.contains("alice") && who.contains("staff"), "{who}");
    let refused = k.run(&["get", "secrets", "--as=alice"]).await;
    assert!(
        refused
            .err
            .contains("secrets is forbidden: User \"alice\" cannot list resource \"secrets\""),
        "{}",
        refused.err
    );
    let alice = served.kubectl(&binary, "alice", "staff", "default");
    let refused = alice.run(&["get", "cm", "--as=root"]).await;
    assert_eq!(refused.code, 1);
    assert!(
        refused.err.contains("Error from server (Forbidden)"),
        "{}",
        refused.err
    );

    // A line is on disk soon after its answer.
    let found = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            let text = tokio::fs::read_to_string(&log).await.unwrap();
            let events: Vec<serde_json::Value> = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect();
            let event = events.into_iter().find(|event| {
                event["impersonatedUser"]["username"] == "alice"
                    && event["objectRef"]["resource"] == "secrets"
            });
            if let Some(event) = event {
                return event;
            }
            tokio::task::yield_now().await;
        }
    });
    let event = found.await.expect("the audit log has the request");
    assert_eq!(event["user"]["username"], "root");
    assert_eq!(event["verb"], "list");
    assert_eq!(event["responseStatus"]["code"], 403);
    assert_eq!(event["level"], "Metadata");
    assert_eq!(event["sourceIPs"][0], "127.0.0.1");
    served.stop().await;
}
