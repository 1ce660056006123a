//! What needs no cluster: flags, refusals, contexts, compose files, completion. The expected texts are in
//! `golden/offline.txt`.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(clippy::unwrap_used, reason = "helpers of a test fail by panic")]

use std::{collections::BTreeMap, path::Path};

use hypernetes_testkit::Scenario;

#[test]
fn the_command_line_answers_without_a_cluster() {
    let scenario =
        Scenario::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/offline.txt"));
    assert!(scenario.len() >= 40, "{} commands", scenario.len());
    let work = tempfile::tempdir().unwrap();
    let directory = Path::new(env!("CARGO_BIN_EXE_hyper")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let report = scenario.run(&BTreeMap::from([
        ("PATH".to_owned(), format!("{}:{path}", directory.display())),
        ("HOME".to_owned(), work.path().display().to_string()),
        ("WORK".to_owned(), work.path().display().to_string()),
        (
            "KUBECONFIG".to_owned(),
            work.path().join("config").display().to_string(),
        ),
        ("NO_COLOR".to_owned(), "1".to_owned()),
    ]));
    assert!(
        report.failures.is_empty(),
        "{}",
        report.failures.join("\n\n")
    );
}
