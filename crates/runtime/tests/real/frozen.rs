//! Containers of a real VM that stand still, and capabilities that are ambient.

use std::time::Duration;

use hypernetes_runtime::{
    ContainerConfig, ContainerState, ExecConfig, NodeRuntime, PodRuntime, RuntimeError,
    SecurityConfig,
};
use hypernetes_types::{ContainerId, SandboxId};

use super::{Bed, container, eventually, exec, exited, start};

/// Nothing moves: what was on its way to the log has come, and nothing more does.
async fn assert_still(
    bed: &Bed,
    runtime: &NodeRuntime,
    sandbox: &SandboxId,
    counter: &ContainerId,
) {
    let cpu = async || {
        let stats = runtime.stats(sandbox).await.unwrap();
        let own = stats.containers.into_iter().find(|one| one.id == *counter);
        own.unwrap().cpu_usage_nanos
    };
    let seen = std::sync::Mutex::new((0, 0));
    // Five looks in a row, some hundred milliseconds apart, in which a counter would count ten times.
    eventually("the counter stands still", async || {
        let now = (bed.log("still").len(), cpu().await);
        let before = std::mem::replace(&mut *seen.lock().unwrap(), now);
        if before != now {
            return false;
        }
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if (bed.log("still").len(), cpu().await) != now {
                return false;
            }
        }
        true
    })
    .await;
}

/// A counter is paused, over a restart of the runtime, goes on, and ends although it is paused.
pub(crate) async fn containers_stand_still(
    bed: &Bed,
    runtime: NodeRuntime,
    sandbox: &SandboxId,
) -> NodeRuntime {
    let count = "trap 'exit 7' TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done";
    let config = ContainerConfig {
        stop_signal: Some(15),
        ..container("still", count)
    };
    let counter = start(&runtime, sandbox, config.clone()).await;
    let counts = async |least: usize| {
        eventually("it counts", async || bed.log("still").len() > least).await;
    };
    counts(3).await;
    runtime.set_paused(&counter, true).await.unwrap();
    runtime.set_paused(&counter, true).await.unwrap();
    let status = runtime.container(&counter).await.unwrap();
    assert_eq!(
        (status.state, status.paused),
        (ContainerState::Running, true)
    );
    assert_still(bed, &runtime, sandbox, &counter).await;
    let config_of = |word: &str| ExecConfig {
        command: vec!["echo".into(), word.into()],
        ..ExecConfig::default()
    };
    let refused = runtime.exec(&counter, config_of("no")).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!("container {counter} is paused, unpause the container before exec")
    );

    drop(runtime);
    let runtime = bed.open().await;
    assert!(runtime.container(&counter).await.unwrap().paused);
    assert_still(bed, &runtime, sandbox, &counter).await;
    let lines = bed.log("still").len();
    runtime.set_paused(&counter, false).await.unwrap();
    assert!(!runtime.container(&counter).await.unwrap().paused);
    counts(lines + 3).await;
    super::assert_counts_up(&bed.log("still"));
    let (said, code) = exec(&runtime, &counter, &["echo", "yes"], None).await;
    assert_eq!((said.as_str(), code), ("yes\n", 0));

    // A stop signal is taken, a kill comes as it is.
    runtime.set_paused(&counter, true).await.unwrap();
    let grace = Duration::from_secs(60);
    runtime.stop_container(&counter, grace).await.unwrap();
    assert_eq!(exited(&runtime, &counter).await.exit_code, 7);
    let error = runtime.set_paused(&counter, true).await.unwrap_err();
    assert!(matches!(error, RuntimeError::State { .. }), "{error}");
    runtime.remove_container(&counter).await.unwrap();
    let counter = start(&runtime, sandbox, config).await;
    counts(3).await;
    runtime.set_paused(&counter, true).await.unwrap();
    let none = Duration::ZERO;
    runtime.stop_container(&counter, none).await.unwrap();
    let status = exited(&runtime, &counter).await;
    assert_eq!((status.exit_code, status.paused), (137, false));
    runtime.remove_container(&counter).await.unwrap();
    runtime
}

/// capabilities(7): what is ambient is in every set of a program without file capabilities.
pub(crate) async fn capabilities_are_ambient(
    bed: &Bed,
    runtime: &NodeRuntime,
    sandbox: &SandboxId,
) {
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    for (name, user, add, ambient, sets) in [
        // CAP_NET_BIND_SERVICE is bit 10, CAP_CHOWN bit 0.
        (
            "root",
            0,
            &["CHOWN"][..],
            "NET_BIND_SERVICE",
            ["0401", "0400"],
        ),
        ("user", 33, &[], "NET_BIND_SERVICE", ["0400", "0400"]),
    ] {
        let config = ContainerConfig {
            security: SecurityConfig {
                run_as_user: Some(user),
                drop_capabilities: names(&["ALL"]),
                add_capabilities: names(&[&["NET_BIND_SERVICE"], add].concat()),
                ambient_capabilities: names(&[ambient]),
                ..SecurityConfig::default()
            },
            ..container(name, "grep -e CapEff -e CapAmb /proc/self/status")
        };
        let id = start(runtime, sandbox, config).await;
        assert_eq!(exited(runtime, &id).await.exit_code, 0);
        let zeros = "000000000000";
        let [effective, ambient] = sets;
        let wanted = [
            format!("CapEff:\t{zeros}{effective}"),
            format!("CapAmb:\t{zeros}{ambient}"),
        ];
        assert_eq!(bed.log(name), wanted, "{name}");
        runtime.remove_container(&id).await.unwrap();
    }
    let config = ContainerConfig {
        security: SecurityConfig {
            ambient_capabilities: names(&["SYS_TIME"]),
            ..SecurityConfig::default()
        },
        ..container("none", "true")
    };
    let error = runtime.create_container(sandbox, config).await.unwrap_err();
    assert!(
        error.to_string().contains("ambient_capabilities"),
        "{error}"
    );
}
