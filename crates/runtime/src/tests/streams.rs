//! Exec, attach and port-forward.

use bytes::Bytes;
use hypernetes_agent_api::fake::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    testing::{STDOUT, World, container_config, eventually, exited, running},
    *,
};

async fn collect(session: &mut Session) -> (Vec<u8>, Vec<u8>) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(piece) = session.output.recv().await {
        match piece {
            Output::Stdout(data) => stdout.extend_from_slice(&data),
            Output::Stderr(data) => stderr.extend_from_slice(&data),
        }
    }
    (stdout, stderr)
}

#[tokio::test]
async fn exec_passes_everything_and_half_closes() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    world.agent(&sandbox).on_exec(|start, stdin| {
        let process = start.process.as_ref().unwrap();
        assert_eq!(process.args, ["cat", "-n"]);
        assert!(process.env.contains(&"HOSTNAME=a".to_owned()));
        (stdin.to_vec(), b"done".to_vec(), 42)
    });
    let config = ExecConfig {
        command: vec!["cat".into(), "-n".into()],
        stdin: true,
        tty: false,
    };
    let mut session = runtime.exec(&container, config).await.unwrap();
    assert!(session.resize.is_none());
    let big = Bytes::from(vec![b'x'; 300_000]);
    let stdin = session.stdin.take().unwrap();
    stdin.send(big.clone()).await.unwrap();
    drop(stdin);
    let (stdout, stderr) = collect(&mut session).await;
    assert_eq!((stdout, stderr), (big.to_vec(), b"done".to_vec()));
    assert_eq!(session.exit.await.unwrap().unwrap(), 42);
}

#[tokio::test]
async fn exec_needs_a_running_container_and_a_program() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let program = |command: &[&str]| ExecConfig {
        command: command.iter().map(|&part| part.to_owned()).collect(),
        ..Default::default()
    };
    assert!(matches!(
        runtime.exec(&container, program(&[])).await,
        Err(RuntimeError::Invalid { .. })
    ));
    world.agent(&sandbox).exit(container.as_str(), 0);
    exited(&runtime, &container).await;
    assert!(matches!(
        runtime.exec(&container, program(&["x"])).await,
        Err(RuntimeError::State { .. })
    ));
    assert!(matches!(
        runtime.attach(&container, false).await,
        Err(RuntimeError::State { .. })
    ));
}

#[tokio::test]
async fn the_end_of_a_vm_ends_its_sessions() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let config = ExecConfig {
        command: vec!["cat".into()],
        stdin: true,
        tty: true,
    };
    let mut exec = runtime.exec(&container, config).await.unwrap();
    exec.resize
        .as_ref()
        .unwrap()
        .send(TtySize {
            width: 80,
            height: 24,
        })
        .await
        .unwrap();
    let mut attach = runtime.attach(&container, false).await.unwrap();
    world.vmm.end(
        &sandbox,
        hypernetes_vmm::VmExit::VmmDied { status: "x".into() },
    );
    assert_eq!(collect(&mut exec).await, (vec![], vec![]));
    assert!(exec.exit.await.unwrap().is_err());
    assert_eq!(collect(&mut attach).await, (vec![], vec![]));
    assert_eq!(attach.exit.await.unwrap().unwrap(), 137);
}

#[tokio::test]
async fn attach_shows_output_at_once_and_tells_the_exit_code() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let mut config = container_config("c");
    (config.stdin, config.stdin_once, config.tty) = (true, true, true);
    let container = runtime.create_container(&sandbox, config).await.unwrap();
    runtime.start_container(&container).await.unwrap();
    let agent = world.agent(&sandbox);
    let mut session = runtime.attach(&container, true).await.unwrap();
    // A prompt has no newline, and must be seen.
    agent.output(container.as_str(), STDOUT, b"login: ");
    assert_eq!(
        session.output.recv().await,
        Some(Output::Stdout("login: ".into()))
    );
    session
        .stdin
        .as_ref()
        .unwrap()
        .send("root\n".into())
        .await
        .unwrap();
    agent
        .wait_until(|agent| agent.stdin(container.as_str()).unwrap().0 == b"root\n")
        .await;
    session
        .resize
        .as_ref()
        .unwrap()
        .send(TtySize {
            width: 1,
            height: 2,
        })
        .await
        .unwrap();
    agent
        .wait_until(|agent| agent.calls().contains(&Method::ResizeTty))
        .await;
    // The session is renewed underneath: what was seen is not seen again.
    agent.disconnect();
    let asked = agent.calls().len();
    agent
        .wait_until(|agent| agent.calls()[asked..].contains(&Method::Output))
        .await;
    agent.output(container.as_str(), STDOUT, b"bye\n");
    agent.exit(container.as_str(), 9);
    let (rest, _) = collect(&mut session).await;
    assert_eq!(rest, b"bye\n");
    assert_eq!(session.exit.await.unwrap().unwrap(), 9);
    assert_eq!(world.log("a", "c", "stdout"), "login: bye\n");
}

#[tokio::test]
async fn leaving_closes_stdin_only_if_it_was_meant_for_one() {
    let world = World::new().await;
    let runtime = world.open().await;
    let sandbox = runtime.run_sandbox(world.sandbox("a")).await.unwrap();
    let agent = world.agent(&sandbox);
    for once in [true, false] {
        let mut config = container_config(if once { "once" } else { "open" });
        (config.stdin, config.stdin_once) = (true, once);
        let container = runtime.create_container(&sandbox, config).await.unwrap();
        runtime.start_container(&container).await.unwrap();
        let session = runtime.attach(&container, true).await.unwrap();
        session
            .stdin
            .as_ref()
            .unwrap()
            .send("x".into())
            .await
            .unwrap();
        agent
            .wait_until(|agent| agent.stdin(container.as_str()).unwrap().0 == b"x")
            .await;
        drop(session);
        if once {
            agent
                .wait_until(|agent| agent.stdin(container.as_str()).unwrap().1)
                .await;
        } else {
            let mut next = runtime.attach(&container, true).await.unwrap();
            next.stdin.take().unwrap().send("y".into()).await.unwrap();
            agent
                .wait_until(|agent| {
                    agent.stdin(container.as_str()).unwrap() == (b"xy".to_vec(), false)
                })
                .await;
        }
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off_and_the_log_is_whole() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let session = runtime.attach(&container, false).await.unwrap();
    let line = format!("{}\n", "x".repeat(16_383));
    let mut sent = 0;
    while sent < 8 << 20 {
        agent.output(container.as_str(), STDOUT, line.as_bytes());
        sent += line.len();
    }
    let error = session.exit.await.unwrap().unwrap_err();
    assert!(
        error.to_string().contains("did not read in time"),
        "{error}"
    );
    eventually("the log", || async {
        world.log("a", "c", "stdout").len() == sent
    })
    .await;
}

#[tokio::test]
async fn ports_are_forwarded_both_ways() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, _) = running(&world, &runtime, "a").await;
    let mut connection = runtime.port_forward(&sandbox, 80).await.unwrap();
    connection.write_all(b"ping").await.unwrap();
    let mut word = [0; 4];
    connection.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"ping");
    connection.shutdown().await.unwrap();
    let mut rest = Vec::new();
    connection.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
    assert!(matches!(
        runtime.port_forward(&sandbox, 0).await,
        Err(RuntimeError::Invalid { .. })
    ));
}

#[tokio::test]
async fn a_full_disk_holds_the_container_and_loses_nothing() {
    let world = World::new().await;
    let runtime = world.open().await;
    let (sandbox, container) = running(&world, &runtime, "a").await;
    let agent = world.agent(&sandbox);
    let checkpoints = world
        .temp
        .path()
        .join("state/sandboxes")
        .join(sandbox.as_str())
        .join("logs");
    let full = checkpoints.join(format!("{container}.full"));
    agent.output(container.as_str(), STDOUT, b"one\n");
    agent
        .wait_until(|agent| agent.acked(container.as_str(), STDOUT) == Some(4))
        .await;
    std::fs::write(&full, "").unwrap();
    agent.output(container.as_str(), STDOUT, b"two\nthree\n");
    // The node has it and has not acknowledged it; what is half written is taken back.
    eventually("an attempt", || async {
        std::fs::read_to_string(&full).unwrap() == "tried"
    })
    .await;
    assert_eq!(agent.acked(container.as_str(), STDOUT), Some(4));
    eventually("the cut", || async {
        world.log("a", "c", "stdout") == "one\n"
    })
    .await;
    // Also a restart in the middle of it neither loses nor doubles.
    drop(runtime);
    let runtime = world.open().await;
    agent.output(container.as_str(), STDOUT, b"four\n");
    std::fs::remove_file(&full).unwrap();
    agent.exit(container.as_str(), 0);
    exited(&runtime, &container).await;
    assert_eq!(world.log("a", "c", "stdout"), "one\ntwo\nthree\nfour\n");
}
