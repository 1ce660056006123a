//! What a guest has of its own: a clock, and disks that come and go.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods};

use crate::client::{Client, PATIENCE, end, sandbox, shell};

/// What a guest's clock may be off.
const DRIFT: f64 = 0.05;

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_secs_f64()
}

/// How far the guest's clock is from ours, at least: it was read at some moment of the call.
async fn off(client: &mut Client, id: &str) -> f64 {
    let sent = now();
    let (text, code) = client.exec(id, "adjtimex").await;
    let received = now();
    assert_eq!(code, 0);
    let field = |name: &str| -> f64 {
        let line = text.lines().find(|line| line.contains(name)).unwrap();
        line.split(':').next_back().unwrap().trim().parse().unwrap()
    };
    let theirs = field("time.tv_sec") + field("time.tv_usec") / 1e6;
    (sent - theirs).max(theirs - received).max(0.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_s_clock_is_the_node_s() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.12.0/24", "");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "clock");
    let pod = client.run(&config).await;
    let mut owner = shell("owner", &image, "sleep 1000");
    owner.linux = Some(v1::LinuxContainerConfig {
        security_context: Some(v1::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        }),
        ..Default::default()
    });
    // Privileged inside its VM only, which must say so too.
    let id = client.create(&pod, &config, &owner).await;
    client.start(&id).await;
    assert!(off(&mut client, &id).await < DRIFT);
    // Whoever is root in a VM can set its clock. It is the node's again soon.
    let (_, code) = client.exec(&id, "date -s 2030-01-01").await;
    assert_eq!(code, 0);
    let begun = std::time::Instant::now();
    while off(&mut client, &id).await > DRIFT {
        assert!(begun.elapsed() < PATIENCE, "the clock stays wrong");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    end(&mut node, client, &pod).await;
}

/// Disks that come and go, one after the other.
const PLUGS: u32 = 50;

#[tokio::test(flavor = "multi_thread")]
async fn disks_come_and_go_fifty_times_beside_one_that_is_written() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.13.0/24", "");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let other = client.pull(&registry.image("web:1")).await;
    let config = sandbox(&node, "disks");
    let pod = client.run(&config).await;
    // Writes, reads back and compares, on and on; ends at the first difference.
    let script = "n=0; while true; do head -c 262144 /dev/urandom > /a; cp /a /b; sync; \
                  echo 3 > /proc/sys/vm/drop_caches 2>/dev/null; cmp /a /b || exit 9; \
                  n=$((n+1)); echo $n > /count; done";
    let id = client
        .create(&pod, &config, &shell("writer", &image, script))
        .await;
    client.start(&id).await;
    let files = |node: &Node| {
        let vmms = node.vmm_processes();
        let open = vmms.iter().map(|pid| {
            std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count()
        });
        open.sum::<usize>()
    };
    let mut after_one = 0;
    for round in 0..PLUGS {
        let mut visitor = shell("visitor", &other, "true");
        visitor.metadata.as_mut().unwrap().attempt = round;
        let visitor = client.create(&pod, &config, &visitor).await;
        let request = v1::RemoveContainerRequest {
            container_id: visitor,
        };
        client.runtime.remove_container(request).await.unwrap();
        if round == 0 {
            after_one = files(&node);
        }
    }
    assert_eq!(files(&node), after_one, "disks stayed in the VM");
    let (count, code) = client.exec(&id, "cat /count").await;
    assert_eq!(code, 0);
    assert!(count.trim().parse::<u32>().unwrap() > 0);
    assert_eq!(
        client.status(&id).await.state(),
        v1::ContainerState::ContainerRunning
    );
    end(&mut node, client, &pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_runs_programs_in_a_vm_only_where_that_is_allowed() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.14.0/24", "debug: {guestExec: true}\n");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "debug");
    let pod = client.run(&config).await;
    let mut owner = shell("owner", &image, "exec sleep 1000");
    // What the container may not do the operator may.
    owner.linux = Some(v1::LinuxContainerConfig {
        security_context: Some(v1::LinuxContainerSecurityContext {
            run_as_user: Some(v1::Int64Value { value: 1000 }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = client.create(&pod, &config, &owner).await;
    client.start(&id).await;

    let debug = |node: &Node, args: &[&str]| {
        let all = [&["debug", "default/debug"], args].concat();
        let mut command = node.hypernetes(&all);
        let output = command.stdin(std::process::Stdio::null()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let code = output.status.code().unwrap();
        (text(&output.stdout), text(&output.stderr), code)
    };
    let script = "id -u; cat /proc/1/comm; ls /proc/1/root/scratch >/dev/null && echo guest; \
                  echo gone >&2; exit 7";
    let (out, err, code) = debug(&node, &["--", "sh", "-c", script]);
    assert_eq!(
        (out.as_str(), err.as_str(), code),
        ("0\ninit\nguest\n", "gone\n", 7)
    );
    // The container's own view is as it was.
    let first = client.exec(&id, "tr '\\0' ' ' < /proc/1/cmdline").await.0;
    assert_eq!(first, "container-init ", "the pod's first process");
    let mut with_input = node.hypernetes(&["debug", "default/debug", "-i", "--", "wc", "-c"]);
    let file = std::fs::File::open("/bin/sh").unwrap();
    let size = file.metadata().unwrap().len();
    let output = with_input.stdin(file).output().unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap().trim(),
        size.to_string()
    );
    let (_, err, code) = debug(&node, &["-c", "nobody", "--", "id"]);
    assert_eq!((err.contains("\"nobody\""), code), (true, 1), "{err}");
    let log = node.log_tail();
    let told = log
        .lines()
        .filter(|line| line.contains("audit") && line.contains("user=0"));
    assert_eq!(told.count(), 3, "{log}");

    // Off unless it is allowed, and that is told too.
    node.kill();
    node.configure("debug: {guestExec: false}\n");
    node.spawn();
    let (_, err, code) = debug(&node, &["--", "id"]);
    assert_eq!((err.contains("debug.guestExec"), code), (true, 1), "{err}");
    assert!(node.log_tail().contains("was not run in a pod's VM"));
    let client = Client::of(&node).await;
    end(&mut node, client, &pod).await;
}
