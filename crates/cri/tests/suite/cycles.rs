//! Pods come and go, and leave nothing.

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods};

use crate::client::{Client, PATIENCE, sandbox, shell};

/// Pods in all, and at the same time.
const CYCLES: u32 = 500;
const AT_ONCE: u32 = 2;
/// What the daemon may have taken after all of them, in KiB, beyond what it had after some.
const FLAT: u64 = 32 << 10;

async fn cycle(mut client: Client, config: v1::PodSandboxConfig, image: String) {
    let pod = client.run(&config).await;
    let id = client
        .create(&pod, &config, &shell("main", &image, "echo hello; exit 3"))
        .await;
    client.start(&id).await;
    assert_eq!(client.ended(&id, PATIENCE).await.exit_code, 3);
    client.stop(&pod).await;
    client.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_pods_leave_nothing() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.6.0/24", "");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let mut after_some = (0, 0);
    for round in 0..CYCLES / AT_ONCE {
        let cycles = (0..AT_ONCE).map(|number| {
            let config = sandbox(&node, &format!("pod-{round}-{number}"));
            tokio::spawn(cycle(client.clone(), config, image.clone()))
        });
        for ended in futures::future::join_all(cycles).await {
            ended.unwrap();
        }
        if round == 24 {
            after_some = (node.proc_status("VmRSS"), node.open_files());
        }
    }
    let (memory, files) = (node.proc_status("VmRSS"), node.open_files());
    assert!(
        memory < after_some.0 + FLAT,
        "{} KiB grew to {memory}",
        after_some.0
    );
    assert!(
        files <= after_some.1 + 8,
        "{} descriptors became {files}",
        after_some.1
    );
    node.stop();
    assert!(node.host_picture().is_clean(), "{:?}", node.host_picture());
    let left: Vec<_> = std::fs::read_dir(node.state().join("runtime/scratch"))
        .into_iter()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
