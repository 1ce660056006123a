//! Logs, exec, attach and port-forward through the real kubectl, with a node that is a stand-in.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "test code: an integration test is one module, and failures panic"
)]

mod common;
#[path = "common/served.rs"]
mod served;

use std::{process::Stdio, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use common::{Cluster, pod};
use futures::{StreamExt, stream};
use hypernetes_streaming::{
    Duplex, LogRequest, LogStream, Output, PodStreams, ProcessRequest, ProcessSession, StreamError,
    Target,
};
use serde_json::json;
use served::{Served, release};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    sync::{mpsc, oneshot},
};

/// Runs nothing: says what it was asked, and gives input back.
#[derive(Debug)]
struct Echo;

fn session(target: &Target, request: &ProcessRequest, word: &str) -> ProcessSession {
    let (output_tx, output) = mpsc::channel(8);
    let (exit_tx, exit) = oneshot::channel();
    let (stdin, mut input) = mpsc::channel::<Bytes>(8);
    let greeting = format!(
        "{word} {}/{} {:?}\n",
        target.pod, target.container, request.command
    );
    let (wants_stdin, code) = (request.stdin, i32::from(request.command == ["fail"]) * 7);
    tokio::spawn(async move {
        if output_tx
            .send(Output::Stdout(greeting.into()))
            .await
            .is_err()
        {
            return;
        }
        loop {
            if !wants_stdin {
                break;
            }
            let Some(bytes) = input.recv().await else {
                break;
            };
            if output_tx.send(Output::Stdout(bytes)).await.is_err() {
                return;
            }
        }
        let _gone = output_tx.send(Output::Stderr("to stderr\n".into())).await;
        drop(output_tx);
        let _gone = exit_tx.send(Ok(code));
    });
    ProcessSession {
        stdin: request.stdin.then_some(stdin),
        output,
        resize: None,
        exit,
    }
}

#[async_trait]
impl PodStreams for Echo {
    async fn exec(
        &self,
        target: &Target,
        request: ProcessRequest,
    ) -> Result<ProcessSession, StreamError> {
        assert!(!target.uid.is_empty());
        Ok(session(target, &request, "exec"))
    }

    async fn attach(
        &self,
        target: &Target,
        request: ProcessRequest,
    ) -> Result<ProcessSession, StreamError> {
        Ok(session(target, &request, "attach"))
    }

    async fn port_forward(
        &self,
        _target: &Target,
        port: u16,
    ) -> Result<Box<dyn Duplex>, StreamError> {
        let (ours, theirs) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(theirs);
            if write
                .write_all(format!("port {port}\n").as_bytes())
                .await
                .is_ok()
            {
                let _gone = tokio::io::copy(&mut read, &mut write).await;
            }
        });
        Ok(Box::new(ours))
    }

    async fn logs(&self, target: &Target, request: LogRequest) -> Result<LogStream, StreamError> {
        assert!(
            request.limit_bytes != Some(666),
            "the node's code has a bug"
        );
        if request.previous {
            return Err(StreamError::Invalid(format!(
                "previous terminated container {:?} in pod {:?} not found",
                target.container, target.pod
            )));
        }
        let lines = request.tail_lines.unwrap_or(3);
        let lines = (0..lines).map(|i| Ok(Bytes::from(format!("line {i}\n"))));
        let lines = stream::iter(lines.collect::<Vec<_>>());
        // A log that is followed goes on until the client leaves.
        Ok(if request.follow {
            lines.chain(stream::pending()).boxed()
        } else {
            lines.boxed()
        })
    }
}

async fn prepare(cluster: &Cluster) {
    let admin = cluster.admin();
    let mut two = pod("two");
    two["spec"]["containers"] =
        json!([{"name": "a", "image": "example.org/a"}, {"name": "b", "image": "example.org/b"}]);
    for object in [pod("one"), two] {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let path = "/api/v1/namespaces/default/pods";
        admin.create(path, &object).await.expect(201);
        let running = json!({"status": {"phase": "Running"}});
        admin
            .patch(&format!("{path}/{name}/status"), "merge", &running)
            .await
            .expect(200);
    }
}

async fn drive(served: &Served, version: &str) {
    let Some(binary) = release(version).await else {
        return;
    };
    let k = served.kubectl(&binary, "root", "system:masters", "default");
    assert_eq!(k.ok(&["logs", "one"]).await, "line 0\nline 1\nline 2");
    assert_eq!(k.ok(&["logs", "one", "--tail=1"]).await, "line 0");
    assert_eq!(
        k.ok(&["logs", "two", "-c", "b"]).await,
        "line 0\nline 1\nline 2"
    );
    let previous = k.run(&["logs", "one", "-p"]).await;
    assert_eq!(
        previous.err.trim(),
        "Error from server (BadRequest): previous terminated container \"a\" in pod \"one\" not found"
    );
    let wrong = k.run(&["logs", "one", "-c", "x"]).await;
    assert!(
        wrong.err.contains("container x is not valid for pod one"),
        "{}",
        wrong.err
    );
    let mut follow = k
        .command(&["logs", "-f", "one"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    for i in 0..3 {
        let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await;
        assert_eq!(line.unwrap().unwrap().unwrap(), format!("line {i}"));
    }
    follow.kill().await.unwrap();

    let said = k.run(&["exec", "one", "--", "ls", "-l"]).await;
    assert_eq!(
        (said.code, said.out.as_str()),
        (0, "exec one/a [\"ls\", \"-l\"]\n"),
        "{}",
        said.err
    );
    assert_eq!(said.err, "to stderr\n");
    let said = k.run(&["exec", "two", "-c", "b", "--", "fail"]).await;
    assert_eq!(said.code, 7, "{}{}", said.out, said.err);
    let said = k
        .run_with(&["exec", "-i", "one", "--", "cat"], "through\n")
        .await;
    assert_eq!(said.out, "exec one/a [\"cat\"]\nthrough\n", "{}", said.err);
    let said = k.run(&["exec", "one", "-c", "nothing", "--", "true"]).await;
    assert!(
        said.err
            .contains("container nothing is not valid for pod one"),
        "{}",
        said.err
    );
    let said = k.run(&["attach", "one"]).await;
    assert!(
        said.out.contains("attach one/a []"),
        "{}{}",
        said.out,
        said.err
    );

    let mut forward = k
        .command(&["port-forward", "pod/one", ":8080"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(forward.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await;
    let line = line.expect("kubectl listens").unwrap().unwrap();
    let port: u16 = line
        .strip_prefix("Forwarding from 127.0.0.1:")
        .and_then(|rest| rest.split(' ').next())
        .and_then(|port| port.parse().ok())
        .unwrap_or_else(|| panic!("{line}"));
    for _ in 0..2 {
        let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        let mut greeting = String::new();
        stream.read_line(&mut greeting).await.unwrap();
        assert_eq!(greeting, "port 8080\n");
        stream.write_all(b"ping").await.unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"ping");
    }
    forward.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_streams_to_and_from_pods() {
    let served = Served::start(|config| {
        config.node_name = Some("node-1".into());
        config.streams = Some(Arc::new(Echo));
    })
    .await;
    prepare(&served.cluster).await;
    drive(&served, "1.36.4").await;
    drive(&served, "1.37.1").await;
    served.stop().await;
}

#[tokio::test]
async fn streams_that_cannot_be_had_are_refused_with_a_reason() {
    let cluster = Cluster::start_with(|config| config.streams = Some(Arc::new(Echo))).await;
    let admin = cluster.admin();
    let path = "/api/v1/namespaces/default/pods";
    admin.create(path, &pod("idle")).await.expect(201);
    let exec = format!("{path}/idle/exec?command=id&stdout=true");
    admin.ask("POST", &exec, &[], "").await.refused(
        400,
        "BadRequest",
        "pod idle does not have a host assigned",
    );
    assert_eq!(admin.get(&format!("{path}/idle/log")).await.text, "");
    admin.get(&format!("{path}/none/log")).await.refused(
        404,
        "NotFound",
        "pods \"none\" not found",
    );
    let binding = json!({"metadata": {"name": "idle"}, "target": {"name": "n"}});
    admin
        .create(&format!("{path}/idle/binding"), &binding)
        .await
        .expect(201);
    let plain = admin.ask("POST", &exec, &[], "").await;
    assert_eq!(
        (plain.code, plain.value["reason"].as_str()),
        (400, Some("BadRequest")),
        "{}",
        plain.text
    );
    let nothing = admin
        .ask("POST", &format!("{path}/idle/exec?stdout=true"), &[], "")
        .await;
    assert_eq!(nothing.code, 422, "{}", nothing.text);
}

#[tokio::test]
async fn a_panic_ends_one_request_only() {
    let cluster = Cluster::start_with(|config| {
        config.node_name = Some("node-1".into());
        config.streams = Some(Arc::new(Echo));
    })
    .await;
    prepare(&cluster).await;
    let admin = cluster.admin();
    let log = "/api/v1/namespaces/default/pods/one/log";
    admin.get(&format!("{log}?limitBytes=666")).await.refused(
        500,
        "InternalError",
        "Internal error occurred: the request could not be served",
    );
    assert_eq!(admin.get(log).await.text, "line 0\nline 1\nline 2\n");
}
