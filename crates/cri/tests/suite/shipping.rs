//! Logs on their way to a collector.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};

use hypernetes_testkit::{Node, Registry, can_run_pods, eventually};

use crate::client::{Client, PATIENCE, end, sandbox, shell};

/// Lines that the container writes.
const LINES: usize = 20_000;

/// Accepts what it is sent, one request a connection. While it is shut it refuses.
#[derive(Clone, Default)]
struct Collector {
    logs: Arc<Mutex<Vec<String>>>,
    shut: Arc<std::sync::atomic::AtomicBool>,
}

impl Collector {
    fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/in", listener.local_addr().unwrap());
        let collector = Self::default();
        let serving = collector.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A node that was killed in the middle sends it again.
                serving.serve(&stream).ok();
            }
        });
        (collector, url)
    }

    fn serve(&self, stream: &TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let shut = self.shut.load(std::sync::atomic::Ordering::SeqCst);
        if !shut {
            let text = String::from_utf8(body).unwrap();
            let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
            for line in text.lines() {
                let record: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!(record["kubernetes"]["pod_name"], "talker");
                assert_eq!(record["kubernetes"]["container_name"], "main");
                logs.push(record["log"].as_str().unwrap().to_owned());
            }
        }
        let status = if shut { "503 Shut" } else { "204 Taken" };
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        let mut stream = stream;
        stream.write_all(answer.as_bytes())
    }

    fn count(&self) -> usize {
        self.logs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    fn shut(&self, shut: bool) {
        self.shut.store(shut, std::sync::atomic::Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_every_line_in_order() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let (collector, url) = Collector::start();
    let mut node = Node::start("10.89.15.0/24", &format!("logs: {{forward: \"{url}\"}}\n"));
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "talker");
    let pod = client.run(&config).await;
    let script =
        format!("i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done; sleep 1000");
    let id = client
        .create(&pod, &config, &shell("main", &image, &script))
        .await;
    client.start(&id).await;
    let some = |least: usize| {
        let collector = collector.clone();
        eventually("lines arrive", PATIENCE, move || match collector.count() {
            count if count > least => Ok(()),
            count => Err(format!("{count} lines")),
        });
    };
    some(0);
    // Neither is there for a while.
    collector.shut(true);
    node.kill();
    node.spawn();
    collector.shut(false);
    some(collector.count());
    some(LINES - 1);
    let expected: Vec<String> = (0..LINES).map(|number| format!("line {number}")).collect();
    eventually("the last line", PATIENCE, || {
        let logs = collector
            .logs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match logs.last() {
            last if last == expected.last() => Ok(()),
            last => Err(format!("{last:?}")),
        }
    });
    // A batch whose answer was lost comes twice, as a whole.
    let logs = collector
        .logs
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let mut next = 0;
    for line in &logs {
        let number: usize = line.strip_prefix("line ").unwrap().parse().unwrap();
        assert!(number <= next, "{line} came before line {next}");
        next = next.max(number + 1);
    }
    assert_eq!(next, LINES);
    let client = Client::of(&node).await;
    end(&mut node, client, &pod).await;
}
