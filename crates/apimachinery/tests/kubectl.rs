//! The real kubectl against the discovery, OpenAPI and Table documents, and its bodies through the
//! decoders. Needs `kubectl` on the path, or its path in `HYPERNETES_TEST_KUBECTL`.
#![allow(
    clippy::print_stderr,
    clippy::tests_outside_test_module,
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::let_underscore_must_use,
    reason = "a test"
)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::{Arc, Mutex},
};

use hypernetes_apimachinery::{
    crd::{self, PublishedKind},
    defaults, definitions, discovery, kinds, openapi, protobuf,
    strict::{self, FieldValidation},
    table::{self, IncludeObject},
    validation,
};
use serde_json::{Value, json};

type Bodies = Arc<Mutex<Vec<(String, Value)>>>;

/// Answers one connection after the other's requests, each in a thread that ends with it.
fn serve(listener: &TcpListener, bodies: &Bodies) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { return };
        let bodies = Arc::clone(bodies);
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while let Some(()) = answer(&mut reader, &stream, &bodies) {}
        });
    }
}

fn answer(
    reader: &mut BufReader<TcpStream>,
    mut stream: &TcpStream,
    bodies: &Bodies,
) -> Option<()> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let (mut length, mut accept) = (0, String::new());
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim().split_once(':') else {
            break;
        };
        match name.to_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "accept" => value.trim().clone_into(&mut accept),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let (status, media, out) = route(&method, &target, &accept, &body, bodies);
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: {media}\r\nContent-Length: {}\r\n\r\n",
        out.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(&out).ok()
}

fn route(
    method: &str,
    target: &str,
    accept: &str,
    body: &[u8],
    bodies: &Bodies,
) -> (u16, String, Vec<u8>) {
    let json = |value: Value| {
        (
            200,
            "application/json".to_owned(),
            value.to_string().into_bytes(),
        )
    };
    let path = target.split('?').next().unwrap();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let aggregated = accept.contains("v=v2;");
    let document =
        |document: &openapi::Document| (200, "application/json".to_owned(), document.body.to_vec());
    let own: Vec<_> = crd::own_kinds().iter().map(|custom| custom.kind).collect();
    let published = || {
        let kinds: Vec<PublishedKind> = crd::own_kinds()
            .iter()
            .map(|custom| PublishedKind {
                kind: custom.kind,
                schema: std::sync::Arc::clone(&custom.source),
            })
            .collect();
        crd::document(&kinds)
    };
    let found = match parts.as_slice() {
        ["api"] | ["apis"] if aggregated => {
            return (
                200,
                discovery::AGGREGATED_MEDIA_TYPE.to_owned(),
                discovery::aggregated(parts == ["api"], if parts == ["api"] { &[] } else { &own })
                    .to_string()
                    .into_bytes(),
            );
        }
        ["version"] => Some(json!({"major": "1", "minor": "36", "gitVersion": "v1.36.2"})),
        ["openapi", "v3"] => {
            let own = [(
                "apis/hypernetes.io/v1alpha1".to_owned(),
                std::sync::Arc::new(published()),
            )];
            return document(&openapi::index(&own));
        }
        ["openapi", "v3", "apis", "hypernetes.io", "v1alpha1"] => return document(&published()),
        ["openapi", "v3", "api", version] => {
            return document(openapi::document("", version).unwrap());
        }
        ["openapi", "v3", "apis", group, version] => {
            return document(openapi::document(group, version).unwrap());
        }
        ["api", "v1", "namespaces", _, "pods"] if method == "GET" => {
            let kind = kinds::by_resource("", "v1", "pods").unwrap();
            let pod = json!({"metadata": {"name": "web"}, "spec": {"containers": [{}]},
                "status": {"phase": "Running"}});
            let now = jiff::Timestamp::UNIX_EPOCH;
            Some(table::table(
                kind,
                &[&pod],
                IncludeObject::Metadata,
                &json!({}),
                true,
                now,
            ))
        }
        _ if method == "POST" => {
            let value = if protobuf::is_protobuf(body) {
                protobuf::decode(body).unwrap()
            } else {
                strict::parse_json(body).unwrap().value
            };
            bodies
                .lock()
                .unwrap()
                .push((target.to_owned(), value.clone()));
            Some(value)
        }
        _ => None,
    };
    match found {
        Some(value) => json(value),
        None => {
            let status = hypernetes_apimachinery::Status::no_resource();
            (
                404,
                "application/json".to_owned(),
                status.to_value().to_string().into_bytes(),
            )
        }
    }
}

#[test]
fn kubectl_is_content_with_the_documents_and_its_bodies_are_understood() {
    let kubectl = std::env::var("HYPERNETES_TEST_KUBECTL").unwrap_or_else(|_| "kubectl".into());
    if !Command::new(&kubectl)
        .args(["version", "--client"])
        .output()
        .is_ok_and(|o| o.status.success())
    {
        eprintln!("SKIP: no kubectl");
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let bodies: Bodies = Arc::default();
    let kept = Arc::clone(&bodies);
    std::thread::spawn(move || serve(&listener, &kept));
    let home = tempfile::tempdir().unwrap();
    let run = |arguments: &str, manifest: Option<&str>| -> (bool, String) {
        let mut command = Command::new(&kubectl);
        command
            .args(arguments.split(' '))
            .arg(format!("--server=http://{address}"))
            .env("HOME", home.path())
            .env("KUBECONFIG", "/dev/null");
        if let Some(text) = manifest {
            let file = home.path().join("manifest.yaml");
            std::fs::write(&file, text).unwrap();
            command.arg("-f").arg(file);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    };
    let posted = || bodies.lock().unwrap().pop().unwrap();

    let (ok, out) = run("api-resources --no-headers", None);
    assert!(
        ok && out.contains("tenants") && out.contains("hypernetes.io/v1alpha1"),
        "{out}"
    );
    let (ok, out) = run("explain pod.spec.containers.image", None);
    assert!(ok && out.contains("FIELD: image <string>"), "{out}");
    let (ok, out) = run("explain networks.spec.subnets", None);
    assert!(ok && out.contains("cidr"), "{out}");
    let (ok, out) = run("get pods", None);
    assert!(
        ok && out.starts_with("NAME") && out.contains("0/1"),
        "{out}"
    );

    // Each is a body that kubectl writes itself; all must be valid after defaulting.
    for (arguments, api_version, kind) in [
        ("create namespace x", "v1", "Namespace"),
        ("create secret generic s --from-literal=a=b", "v1", "Secret"),
        ("create configmap c --from-literal=a=b", "v1", "ConfigMap"),
        ("create serviceaccount s", "v1", "ServiceAccount"),
        (
            "create role r --verb=get --resource=pods",
            "rbac.authorization.k8s.io/v1",
            "Role",
        ),
        (
            "create clusterrole r --verb=get --resource=nodes",
            "rbac.authorization.k8s.io/v1",
            "ClusterRole",
        ),
        (
            "create rolebinding b --role=r --user=u",
            "rbac.authorization.k8s.io/v1",
            "RoleBinding",
        ),
        (
            "create clusterrolebinding b --clusterrole=r --group=g",
            "rbac.authorization.k8s.io/v1",
            "ClusterRoleBinding",
        ),
        ("run web --image=nginx", "v1", "Pod"),
    ] {
        let (ok, out) = run(arguments, None);
        assert!(ok, "{arguments}: {out}");
        let (target, mut object) = posted();
        assert_eq!(
            (&object["apiVersion"], &object["kind"]),
            (&json!(api_version), &json!(kind))
        );
        let kind = kinds::by_api_version(api_version, kind).unwrap();
        assert!(target.contains(kind.plural), "{target}");
        defaults::apply(kind, &mut object);
        if kind.namespaced {
            hypernetes_apimachinery::meta::set(&mut object, "namespace", "default");
        }
        let schema = definitions().of(kind).unwrap();
        let (object, warnings) =
            strict::check(object.into(), schema, FieldValidation::Strict).unwrap();
        assert!(warnings.is_empty());
        let found = validation::validate_create(kind, &object);
        assert!(found.is_empty(), "{arguments}: {found:?}");
    }
    run("auth can-i list pods", None);
    assert_eq!(posted().1["spec"]["resourceAttributes"]["verb"], "list");
    run("auth whoami", None);
    assert_eq!(posted().1["kind"], "SelfSubjectReview");
    run("create token s --duration=10m", None);
    let (target, request) = posted();
    assert!(target.ends_with("/serviceaccounts/s/token"), "{target}");
    assert_eq!(request["spec"]["expirationSeconds"], 600);

    let network = "apiVersion: hypernetes.io/v1alpha1\nkind: Network\nmetadata: {name: net}\n\
                   spec: {subnets: [{cidr: 10.0.0.0/16}]}\n";
    let (ok, out) = run("create", Some(network));
    assert!(ok, "{out}");
    let (target, object) = posted();
    assert!(target.contains("fieldValidation=Strict"), "{target}");
    assert_eq!(object["spec"]["subnets"][0]["cidr"], "10.0.0.0/16");
}
