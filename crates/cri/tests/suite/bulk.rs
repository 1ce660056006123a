//! Much of everything: bytes through exec, execs at once, logs.

use bytes::Bytes;
use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods};
use sha2::{Digest, Sha256};

use crate::client::{Client, PATIENCE, end, log_content, log_dir, pump, sandbox, shell};

const PIECE: usize = 256 << 10;
/// What the daemon may take on top of what it had, in KiB, whatever passes through it.
const FLAT: u64 = 48 << 10;

/// Bytes that are not all the same and need no memory.
fn piece(number: usize) -> Bytes {
    let mut state = number as u64 | 1;
    let mut bytes = Vec::with_capacity(PIECE);
    while bytes.len() < PIECE {
        // xorshift64* (Vigna 2016).
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_passes_through_exec_both_ways() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.1.0/24", "");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "bulk");
    let pod = client.run(&config).await;
    let id = client
        .create(&pod, &config, &shell("main", &image, "sleep 100000"))
        .await;
    client.start(&id).await;

    // Once in small, so that what is made once does not count.
    let socket = client.stream(&id, &["cat"]).await;
    let mut once = Some(piece(0));
    pump(socket, || once.take(), |_| {}).await;
    let before = node.proc_status("VmRSS");
    node.reset_peak();
    let pieces = (1 << 30) / PIECE;
    let (mut sent, mut received) = (Sha256::new(), Sha256::new());
    let (mut next, mut bytes) = (0, 0);
    let socket = client.stream(&id, &["cat"]).await;
    let status = pump(
        socket,
        || {
            let piece = (next < pieces).then(|| piece(next))?;
            next += 1;
            sent.update(&piece);
            Some(piece)
        },
        |data| {
            bytes += data.len();
            received.update(data);
        },
    )
    .await;
    assert!(status.contains("Success"), "{status}");
    assert_eq!(bytes, 1 << 30);
    assert_eq!(sent.finalize(), received.finalize());
    let peak = node.proc_status("VmHWM");
    assert!(peak < before + FLAT, "{before} KiB grew to {peak}");
    end(&mut node, client, &pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_execs_at_once() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.2.0/24", "");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "many");
    let pod = client.run(&config).await;
    let id = client
        .create(&pod, &config, &shell("main", &image, "sleep 100000"))
        .await;
    client.start(&id).await;
    let before = node.open_files();
    // Half of them with streams.
    let execs = (0..200).map(|number| {
        let (mut client, id) = (client.clone(), id.clone());
        tokio::spawn(async move {
            if number % 2 == 0 {
                let (text, code) = client
                    .exec(&id, &format!("echo {number}; exit {}", number % 7))
                    .await;
                assert_eq!((text, code), (format!("{number}\n"), number % 7));
            } else {
                let socket = client.stream(&id, &["cat"]).await;
                let mut once = Some(Bytes::from(number.to_string()));
                let mut text = Vec::new();
                let status =
                    pump(socket, || once.take(), |data| text.extend_from_slice(data)).await;
                assert!(status.contains("Success"), "{status}");
                assert_eq!(text, number.to_string().as_bytes());
            }
        })
    });
    for exec in futures::future::join_all(execs).await {
        exec.unwrap();
    }
    // None of them is left behind.
    hypernetes_testkit::eventually("descriptors are closed", PATIENCE, || {
        let now = node.open_files();
        (now <= before + 8)
            .then_some(())
            .ok_or(format!("{before} before, {now} now"))
    });
    let (processes, _) = client.exec(&id, "ls /proc | grep -c '^[0-9]'").await;
    let processes: u32 = processes.trim().parse().unwrap();
    assert!(processes < 10, "{processes} processes in the container");
    end(&mut node, client, &pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_logs_a_gigabyte() {
    if !can_run_pods() {
        return;
    }
    const LINE: &str = "0123456789abcdefghijklmnopqrstuvwxyz 0123456789abcdefghijklmnopqrstuvwxyz 0123456789abcdefghijklmno";
    /// Lines of the file that is written over and over again, and how often: a gigabyte.
    const LINES: usize = 10_000;
    const TIMES: usize = 991;
    const SIZE: usize = (LINE.len() + 1) * LINES * TIMES;
    let registry = Registry::start();
    let mut node = Node::start("10.89.3.0/24", "");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "loud");
    let pod = client.run(&config).await;
    // One program that copies, because a guest may be emulated.
    let script = format!(
        "cd /dev/shm && yes '{LINE}' | head -n {LINES} > lines && cat $(yes lines | head -n {TIMES})"
    );
    let id = client
        .create(&pod, &config, &shell("main", &image, &script))
        .await;
    let before = node.proc_status("VmRSS");
    node.reset_peak();
    client.start(&id).await;

    // The kubelet rotates meanwhile.
    let log = log_dir(&node, "loud").join("main.log");
    let mut files = Vec::new();
    for number in 1..=3_usize {
        hypernetes_testkit::eventually("the log grows", PATIENCE, || {
            let length = std::fs::metadata(&log).map_or(0, |metadata| metadata.len());
            (length > 50 << 20)
                .then_some(())
                .ok_or(format!("{length} bytes"))
        });
        let rotated = log.with_extension(number.to_string());
        std::fs::rename(&log, &rotated).unwrap();
        let container_id = id.clone();
        let request = v1::ReopenContainerLogRequest { container_id };
        client.runtime.reopen_container_log(request).await.unwrap();
        files.push(rotated);
    }
    files.push(log);
    let status = client.ended(&id, PATIENCE * 3).await;
    assert_eq!(status.exit_code, 0);
    let peak = node.proc_status("VmHWM");
    assert!(peak < before + FLAT, "{before} KiB grew to {peak}");

    let mut wanted = Sha256::new();
    let whole = format!("{LINE}\n").repeat(LINES);
    for _ in 0..TIMES {
        wanted.update(&whole);
    }
    let mut found = Sha256::new();
    let mut bytes = 0;
    for file in &files {
        log_content(file, |content| {
            bytes += content.len();
            found.update(content);
        });
    }
    assert_eq!(bytes, SIZE);
    assert_eq!(found.finalize(), wanted.finalize());
    end(&mut node, client, &pod).await;
}
