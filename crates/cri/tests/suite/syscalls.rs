//! The daemon dies, or is refused something, at one of its system calls while a pod comes and goes.
//!
//! strace counts the calls of each thread. A few are drawn for every run, from a seed that is
//! printed; `HYPERNETES_SYSCALLS=all` takes one after the other, until a pod's life has fewer.

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::{BuildHasher, Hasher},
    process::{Child, Command, Stdio},
    time::Duration,
};

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods, eventually};

use crate::client::{Client, PATIENCE, sandbox, shell};

/// Calls that change the host, or tell somebody that it has changed.
const CHANGING: &str = "openat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,linkat,symlinkat,\
    fchmod,fchmodat,chown,fchown,fchownat,ftruncate,fallocate,fsync,fdatasync,mount,umount2,move_mount,setns,\
    unshare,clone,clone3,vfork,ioctl,socket,bind,sendto,sendmsg,write,pwrite64,kill,pidfd_send_signal";
/// Calls that a host may refuse when its disk is broken or something is at a limit.
const REFUSABLE: &str = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,fchmod,fchmodat,chown,fchown,\
    fchownat,ftruncate,fallocate,fsync,fdatasync,mount,umount2,setns,unshare";
/// How many calls are drawn.
const DRAWN: usize = 5;
/// How long the kernel may take to end namespaces and processes.
const SOON: Duration = Duration::from_secs(5);
/// A sweep that gets here does not end by itself.
const MOST: u64 = 5000;

/// What becomes of a thread's call of the given number.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Death,
    Refusal,
}

impl Fault {
    /// What calls are drawn from: about as many as a thread makes during a pod's life.
    fn range(self) -> u64 {
        match self {
            Self::Death => 120,
            Self::Refusal => 20,
        }
    }
}

/// strace at all threads of a process. What it starts is not struck: a helper that dies is another
/// test's fault.
struct Tracer(Child);

impl Tracer {
    fn attach(pid: u32, fault: Fault, number: u64) -> Self {
        let (calls, what) = match fault {
            Fault::Death => (CHANGING, "signal=KILL"),
            Fault::Refusal => (REFUSABLE, "error=EIO"),
        };
        let inject = format!("inject={calls}:{what}:when={number}");
        let trace = format!("trace={calls}");
        let mut strace = Command::new("strace");
        strace.args(["-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            strace.arg("-p").arg(task.file_name());
        }
        let child = strace
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut tracer = Self(child);
        eventually("every thread is traced", PATIENCE, || {
            let ended = tracer.0.try_wait().unwrap();
            assert!(ended.is_none(), "strace ended: {ended:?}");
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| e.to_string())?;
            let traced = tasks.flatten().all(|task| {
                // It may have ended meanwhile.
                fs::read_to_string(task.path().join("status"))
                    .map_or(true, |status| !status.contains("TracerPid:\t0\n"))
            });
            traced.then_some(()).ok_or("some are not".to_owned())
        });
        tracer
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        // Asked to end, it lets go of what it traces; when all that is dead it may not hear it.
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
        let patience = std::time::Instant::now() + SOON;
        while matches!(self.0.try_wait(), Ok(None)) && std::time::Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A pod comes and goes, as far as the daemon can be asked.
async fn life(
    client: &mut Client,
    config: &v1::PodSandboxConfig,
    image: &str,
) -> Result<(), tonic::Status> {
    let pod = client.try_run(config).await?;
    let container = shell("main", image, "sleep 100000");
    let container_id = client.try_create(&pod, config, &container).await?;
    let start = v1::StartContainerRequest { container_id };
    client.runtime.start_container(start).await?;
    let pod_sandbox_id = pod.clone();
    let stop = v1::StopPodSandboxRequest { pod_sandbox_id };
    client.runtime.stop_pod_sandbox(stop).await?;
    let remove = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    client.runtime.remove_pod_sandbox(remove).await?;
    Ok(())
}

/// Every pod that the daemon knows goes, and with it everything on the host, at the latest with the
/// daemon's next start.
async fn clean(node: &mut Node, client: &mut Client, what: &str) {
    let all = v1::ListPodSandboxRequest::default();
    let list = client.runtime.list_pod_sandbox(all).await.unwrap();
    for pod in list.into_inner().items {
        client.stop(&pod.id).await;
        client.remove(&pod.id).await;
    }
    let soon = std::time::Instant::now() + SOON;
    while !node.host_picture().is_clean() {
        if std::time::Instant::now() > soon {
            eprintln!("{what}: the next start cleans up {:?}", node.host_picture());
            restart(node, client).await;
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    eventually(&format!("nothing is left after {what}"), PATIENCE, || {
        let picture = node.host_picture();
        let clean = picture.is_clean();
        clean.then_some(()).ok_or(format!("{picture:?}"))
    });
}

async fn restart(node: &mut Node, client: &mut Client) {
    node.kill();
    node.spawn();
    *client = Client::of(node).await;
}

/// Numbers of the calls to try; all of them are without an end of their own.
fn numbers(range: u64) -> Box<dyn Iterator<Item = u64>> {
    if std::env::var("HYPERNETES_SYSCALLS").is_ok_and(|wanted| wanted == "all") {
        return Box::new(1..MOST);
    }
    let seed = std::env::var("HYPERNETES_SEED").map_or_else(
        |_| RandomState::new().build_hasher().finish(),
        |seed| seed.parse().expect("HYPERNETES_SEED is a number"),
    );
    eprintln!("HYPERNETES_SEED={seed}");
    let mut state = seed | 1;
    Box::new(
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            1 + state % range
        })
        .take(DRAWN),
    )
}

async fn sweep(cidr: &str, fault: Fault) {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start(cidr, "templates: 1\n");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let (mut struck, mut tried) = (0, 0);
    let all = std::env::var("HYPERNETES_SYSCALLS").is_ok();
    for number in numbers(fault.range()) {
        let what = format!("{fault:?} at call {number}");
        let config = sandbox(&node, &format!("pod-{tried}"));
        // The threads that will do the work are there after some.
        let warm = sandbox(&node, &format!("warm-{tried}"));
        life(&mut client, &warm, &image).await.unwrap();
        let tracer = Tracer::attach(node.pid(), fault, number);
        let lived = life(&mut client, &config, &image).await;
        drop(tracer);
        tried += 1;
        eprintln!("{what}: {lived:?}");
        if matches!(fault, Fault::Death) && lived.is_err() {
            // Its sockets are closed before it can be waited for.
            eventually("the daemon has ended", SOON, || {
                node.has_ended().then_some(()).ok_or("it runs".to_owned())
            });
        }
        if node.has_ended() {
            assert!(matches!(fault, Fault::Death), "the daemon died of {what}");
            restart(&mut node, &mut client).await;
        }
        match lived {
            Ok(()) if all && number > fault.range() => break,
            Ok(()) => {}
            Err(_) => struck += 1,
        }
        clean(&mut node, &mut client, &what).await;
    }
    eprintln!("{struck} of {tried} lives were cut short");
    // It works as ever.
    let config = sandbox(&node, "after");
    life(&mut client, &config, &image).await.unwrap();
    clean(&mut node, &mut client, "a whole life").await;
    node.stop();
    let left: Vec<_> = fs::read_dir(node.state().join("runtime/scratch"))
        .into_iter()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn death_at_a_system_call_leaves_nothing() {
    Box::pin(sweep("10.89.20.0/24", Fault::Death)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_system_call_leaves_nothing() {
    Box::pin(sweep("10.89.21.0/24", Fault::Refusal)).await;
}
