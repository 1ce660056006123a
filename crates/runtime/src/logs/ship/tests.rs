use std::sync::{Arc, Mutex, PoisonError};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::testing::{STDOUT, World, eventually, exited, running};

/// A collector that refuses every third batch, and keeps the rest.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Value>>>);

impl Collector {
    async fn start() -> (Self, Url) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/logs", listener.local_addr().unwrap());
        let collector = Self::default();
        let serving = collector.clone();
        tokio::spawn(async move {
            let mut count = 0;
            while let Ok((stream, _)) = listener.accept().await {
                count += 1;
                let serving = serving.clone();
                tokio::spawn(async move { Box::pin(serving.serve(stream, count % 3 == 0)).await });
            }
        });
        (collector, url.parse().unwrap())
    }

    /// One request a connection.
    async fn serve(&self, mut stream: TcpStream, refuse: bool) {
        let mut request = Vec::new();
        let body = loop {
            let text = String::from_utf8_lossy(&request).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let head = head.to_ascii_lowercase();
                assert!(
                    head.starts_with("post /logs ") && head.contains("bearer secret"),
                    "{head}"
                );
                let length = head.split("content-length: ").nth(1).unwrap();
                let length: usize = length.lines().next().unwrap().parse().unwrap();
                if body.len() >= length {
                    break body.to_owned();
                }
            }
            let mut buffer = [0; 16384];
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(read) => request.extend_from_slice(&buffer[..read]),
            }
        };
        let status = if refuse { "503 Busy" } else { "200 OK" };
        if !refuse {
            let records = body.lines().map(|line| serde_json::from_str(line).unwrap());
            self.lock().extend(records);
        }
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.ok();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Value>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a container wrote, without what came again.
    fn words(&self, container: &ContainerId) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        for record in self.lock().iter() {
            if record["kubernetes"]["container_id"] == container.as_str() {
                let word = record["log"].as_str().unwrap().to_owned();
                if !words.contains(&word) {
                    words.push(word);
                }
            }
        }
        words
    }
}

#[tokio::test]
async fn every_line_arrives_in_order_whatever_fails() {
    // Plain http too asks for one.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let world = World::new().await;
    let runtime = Arc::new(world.open().await);
    let (collector, endpoint) = Collector::start().await;
    let state = tempfile::tempdir().unwrap();
    let config = LogShipping {
        client: reqwest::Client::builder().no_proxy().build().unwrap(),
        endpoint,
        token: Some("secret".into()),
        state: state.path().join("cursors"),
    };
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let shared: Arc<dyn PodRuntime> = runtime.clone();
    let mut expected = Vec::new();
    for round in 0..4 {
        let stop = CancellationToken::new();
        let task = tokio::spawn(ship_logs(Arc::clone(&shared), config.clone(), stop.clone()));
        for number in 0..50 {
            let word = format!("{round}-{number}");
            agent.output(container.as_str(), STDOUT, format!("{word}\n").as_bytes());
            expected.push(word);
        }
        if round % 2 == 0 {
            // Stopped before it has sent all of it.
            stop.cancel();
            task.await.unwrap().unwrap();
            continue;
        }
        eventually("all lines", async || {
            collector.words(&container).len() == expected.len()
        })
        .await;
        let log = runtime.container(&container).await.unwrap().log_path;
        std::fs::rename(&log, log.with_extension(format!("log.{round}"))).unwrap();
        runtime.reopen_log(&container).await.unwrap();
        stop.cancel();
        task.await.unwrap().unwrap();
    }
    assert_eq!(collector.words(&container), expected);
    let records = collector.lock().clone();
    assert!(
        records
            .iter()
            .all(|record| record["kubernetes"]["pod_name"] == "a"
                && record["stream"] == "stdout"
                && record["logtag"] == "F"
                && record["time"].as_str().unwrap().ends_with('Z'))
    );

    // The last words of a container arrive, and nothing is kept of it afterwards.
    let stop = CancellationToken::new();
    let task = tokio::spawn(ship_logs(Arc::clone(&shared), config.clone(), stop.clone()));
    agent.output(container.as_str(), STDOUT, b"bye\n");
    agent.exit(container.as_str(), 0);
    exited(&runtime, &container).await;
    eventually("the last word", async || {
        collector
            .words(&container)
            .last()
            .is_some_and(|word| word == "bye")
    })
    .await;
    runtime.remove_container(&container).await.unwrap();
    eventually("no cursors", async || {
        std::fs::read_dir(&config.state).unwrap().next().is_none()
    })
    .await;
    stop.cancel();
    task.await.unwrap().unwrap();
}

#[test]
fn lines_keep_their_fields() {
    let lines = b"2026-01-02T03:04:05.000000006Z stderr P a  b\nsomething else\n\n";
    let body = String::from_utf8(json_lines(lines, &json!({"pod_name": "p"}))).unwrap();
    let records: Vec<Value> = body
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(records[0]["log"], "a  b");
    assert_eq!(
        (&records[0]["stream"], &records[0]["logtag"]),
        (&json!("stderr"), &json!("P"))
    );
    assert_eq!(records[0]["time"], "2026-01-02T03:04:05.000000006Z");
    assert_eq!(
        (&records[1]["log"], records.len()),
        (&json!("something else"), 2)
    );
}
