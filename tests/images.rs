//! Tenants' own images: docker's verbs against a real registry, real pods, another tenant, and a daemon that
//! is killed while an archive arrives.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(clippy::unwrap_used, reason = "helpers of a test fail by panic")]

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use hypernetes_testkit::{
    Daemon, DaemonOptions, KUBECTL_VERSIONS, Registry, Scenario, can_run_pods, eventually, kubectl,
    release_dir, workspace_root,
};

/// Files in a directory of the node's image store.
fn files(daemon: &Daemon, part: &str) -> Vec<String> {
    let dir = daemon.state_dir().join("images").join(part);
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn a_tenant_has_images_of_its_own() {
    if !can_run_pods() {
        return;
    }
    let scenario = Scenario::read(&workspace_root().join("tests/scenarios/images.txt"));
    assert!(scenario.len() >= 40, "{} commands", scenario.len());
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions::default());
    let acme = daemon.tenant("acme", "10.98.0.0/24");
    let globex = daemon.tenant("globex", "10.98.1.0/24");
    let tools = daemon.dir().join("bin");
    fs::create_dir(&tools).unwrap();
    symlink(kubectl(KUBECTL_VERSIONS[0]), tools.join("kubectl")).unwrap();
    symlink(release_dir().join("hyper"), tools.join("hyper")).unwrap();
    let work = daemon.dir().join("work");
    fs::create_dir(&work).unwrap();
    let path = std::env::var("PATH").unwrap();
    let environment = BTreeMap::from([
        ("KUBECONFIG".to_owned(), acme.display().to_string()),
        ("OTHER".to_owned(), globex.display().to_string()),
        ("PATH".to_owned(), format!("{}:{path}", tools.display())),
        ("HOME".to_owned(), daemon.dir().display().to_string()),
        ("WORK".to_owned(), work.display().to_string()),
        ("REGISTRY".to_owned(), registry.address().to_owned()),
        ("NO_COLOR".to_owned(), "1".to_owned()),
    ]);
    let report = scenario.run(&environment);
    assert!(
        report.failures.is_empty(),
        "{}",
        report.failures.join("\n\n")
    );

    // What nobody names is dropped, all of it.
    let hyper = |args: &[&str]| {
        let mut command = Command::new(tools.join("hyper"));
        command.args(args).env("KUBECONFIG", &acme);
        command
    };
    let run = |args: &[&str]| hyper(args).output().unwrap();
    eventually(
        "unnamed contents are dropped",
        Duration::from_secs(30),
        || {
            let kept = files(&daemon, "kept");
            kept.is_empty().then_some(()).ok_or(format!("{kept:?}"))
        },
    );
    assert_eq!(files(&daemon, "content"), [""; 0]);

    let archive = fs::read(work.join("app.tar")).unwrap();
    killed_while_it_arrives(&mut daemon, &hyper, &archive);
    daemon.spawn();
    daemon.wait_ready();
    assert_eq!(
        text(&run(&["images", "-q"])),
        "",
        "nothing was acknowledged"
    );
    assert_eq!(files(&daemon, "tmp"), [""; 0], "no half of it is left");

    // Acknowledged is acknowledged: the daemon is killed the moment after.
    let input = work.join("app.tar");
    let loaded = run(&["load", "-i", input.to_str().unwrap()]);
    daemon.kill();
    assert!(loaded.status.success(), "{}", text(&loaded));
    daemon.spawn();
    daemon.wait_ready();
    let said = run(&[
        "run",
        "--rm",
        "--pull",
        "never",
        "local/app:v1",
        "echo",
        "still here",
    ]);
    assert_eq!(text(&said), "still here\n");
    let removed = run(&["rmi", "local/app:v1"]);
    assert!(removed.status.success(), "{}", text(&removed));
    eventually("its content is dropped", Duration::from_secs(30), || {
        let left = [files(&daemon, "kept"), files(&daemon, "content")].concat();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

/// Sends half of an archive, and kills the daemon when it has some of it on its disk.
fn killed_while_it_arrives(
    daemon: &mut Daemon,
    hyper: &dyn Fn(&[&str]) -> Command,
    archive: &[u8],
) {
    let mut load = hyper(&["load"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = load.stdin.take().unwrap();
    input.write_all(&archive[..archive.len() / 2]).unwrap();
    input.flush().unwrap();
    eventually("some of it has arrived", Duration::from_secs(30), || {
        let part = |name: &String| size(&daemon.state_dir().join("images/tmp").join(name));
        let sizes: Vec<u64> = files(daemon, "tmp").iter().map(part).collect();
        let some = sizes.iter().any(|size| *size > 0);
        some.then_some(()).ok_or(format!("{sizes:?}"))
    });
    daemon.kill();
    drop(input);
    let output = load.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}
