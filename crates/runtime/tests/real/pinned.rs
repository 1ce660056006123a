//! The virtual CPUs of a real VM on the CPUs that its containers name.

use std::fs;

use hypernetes_runtime::{ContainerConfig, NodeRuntime, PodRuntime, ResourceConfig};
use hypernetes_types::SandboxId;

use super::{Bed, container, start};

/// Where the threads of the VMM may run: the first one, and how many others there.
fn allowed(bed: &Bed, list: &str) -> (String, usize) {
    let pid = bed.vmm_pids()[0].as_raw_nonzero();
    let list_of = |thread: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"));
        let status = status.unwrap_or_default();
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
        line.unwrap_or_default().trim().to_owned()
    };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let there = threads.filter(|thread| list_of(&thread.file_name().to_string_lossy()) == list);
    (list_of(&pid.to_string()), there.count())
}

pub(crate) async fn vcpus_stay_on_named_cpus(
    bed: &Bed,
    runtime: NodeRuntime,
    sandbox: &SandboxId,
) -> NodeRuntime {
    let all = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let all = all.trim();
    let (own, threads) = allowed(bed, all);
    if own != all || all == "0" {
        println!("SKIP: this host's CPUs are too few, or not all ours: {own} of {all}");
        return runtime;
    }
    assert_eq!(allowed(bed, "0").1, 0);
    let config = ContainerConfig {
        resources: ResourceConfig {
            cpuset_cpus: "0".parse().unwrap(),
            ..ResourceConfig::default()
        },
        ..container("pinned", "exec sleep 1000")
    };
    let id = start(&runtime, sandbox, config).await;
    // One virtual CPU, and nothing else of the VMM.
    assert_eq!(allowed(bed, "0"), (all.to_owned(), 1));
    drop(runtime);
    let runtime = bed.open().await;
    assert_eq!(allowed(bed, "0"), (all.to_owned(), 1));
    runtime.remove_container(&id).await.unwrap();
    assert_eq!(allowed(bed, "0").1, 0);
    let (_, now) = allowed(bed, all);
    println!("{threads} threads of the VMM before, {now} after");
    runtime
}
