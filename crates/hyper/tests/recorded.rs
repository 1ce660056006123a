//! docker's output, flag by flag, of recorded API objects: what needs a cluster and no containers. The expected
//! texts are in `golden/recorded.txt`.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of a test fail by panic"
)]

mod support;

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::Path};

use hypernetes_testkit::Scenario;

/// Prints parts of the pod that was posted last: `posted spec.containers.0.image …`, one JSON value a line.
const POSTED: &str = r#"#!/usr/bin/python3
import json, os, sys, urllib.request
pod = json.load(urllib.request.urlopen(os.environ["API"] + "/posted"))
for path in sys.argv[1:]:
    value = pod
    for key in path.replace("..", "\0").split("."):
        key = key.replace("\0", ".")
        value = (value or {}).get(key) if not isinstance(value, list) else value[int(key)]
    print(json.dumps(value, sort_keys=True))
"#;

#[test]
fn recorded_objects_are_printed_as_docker_prints_them() {
    let scenario =
        Scenario::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/recorded.txt"));
    assert!(scenario.len() >= 100, "{} commands", scenario.len());
    let api = support::serve();
    let work = tempfile::tempdir().unwrap();
    let config = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: one\nclusters: [{{name: here, cluster: {{server: \"{api}\"}}}}]\n\
         contexts: [{{name: one, context: {{cluster: here, user: me, namespace: acme}}}}]\nusers: [{{name: me, user: {{}}}}]\n"
    );
    fs::write(work.path().join("config"), config).unwrap();
    fs::create_dir(work.path().join("bin")).unwrap();
    let posted = work.path().join("bin/posted");
    fs::write(&posted, POSTED).unwrap();
    fs::set_permissions(&posted, fs::Permissions::from_mode(0o755)).unwrap();
    let text = |path: &Path| path.display().to_string();
    let hyper = Path::new(env!("CARGO_BIN_EXE_hyper")).parent().unwrap();
    let path = format!(
        "{}:{}:{}",
        text(hyper),
        text(posted.parent().unwrap()),
        std::env::var("PATH").unwrap()
    );
    let report = scenario.run(&BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), text(work.path())),
        ("WORK".to_owned(), text(work.path())),
        ("SCRATCH".to_owned(), text(work.path())),
        ("KUBECONFIG".to_owned(), text(&work.path().join("config"))),
        ("API".to_owned(), api),
        ("NO_PROXY".to_owned(), "127.0.0.1".to_owned()),
        ("NO_COLOR".to_owned(), "1".to_owned()),
    ]));
    assert!(
        report.failures.is_empty(),
        "{} of {}:\n{}",
        report.failures.len(),
        scenario.len(),
        report.failures.join("\n\n")
    );
}
