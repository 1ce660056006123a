use super::*;
use crate::fake::{Behaviour, FakeAgent, Method, rogue};

const SOON: Duration = Duration::from_secs(5);

fn options() -> ConnectOptions {
    ConnectOptions {
        build: "test".into(),
        deadline: Duration::from_millis(500),
    }
}

async fn configured() -> (FakeAgent, AgentClient) {
    let agent = FakeAgent::new();
    let client = AgentClient::connect(agent.connect(), options())
        .await
        .unwrap();
    client
        .configure_sandbox(v1::ConfigureSandboxRequest::default(), SOON)
        .await
        .unwrap();
    (agent, client)
}

#[tokio::test]
async fn a_session_survives_on_a_new_stream() {
    let (agent, client) = configured().await;
    let request = v1::CreateContainerRequest {
        id: "a".into(),
        ..Default::default()
    };
    client
        .create_container(request.clone(), SOON)
        .await
        .unwrap();
    let twice = client.create_container(request, SOON).await.unwrap_err();
    assert_eq!(twice.code(), Some(tonic::Code::AlreadyExists));
    assert!(!twice.is_transient());

    agent.disconnect();
    let lost = client
        .list_containers(v1::ListContainersRequest {}, SOON)
        .await
        .unwrap_err();
    assert!(lost.is_transient(), "{lost:?}");

    let client = AgentClient::connect(agent.connect(), options())
        .await
        .unwrap();
    assert!(client.hello().configured);
    let list = client
        .list_containers(v1::ListContainersRequest {}, SOON)
        .await
        .unwrap();
    assert_eq!(list.containers.len(), 1);
}

#[tokio::test]
async fn rogue_streams_end_in_time() {
    let (node, held) = rogue::stuck();
    for (name, stream) in [
        ("silent", rogue::silent()),
        ("stuck", node),
        ("flood", rogue::flood()),
        ("garbage", rogue::garbage()),
        ("oversized frames", rogue::oversized_frames()),
        ("mute", rogue::mute()),
    ] {
        let outcome = timeout(SOON, AgentClient::connect(stream, options()))
            .await
            .expect(name);
        let error = outcome.map(drop).expect_err(name);
        assert!(error.is_transient(), "{name}: {error:?}");
    }
    drop(held);
}

#[tokio::test]
async fn lies_and_oversized_answers_are_refused() {
    let agent = FakeAgent::new();
    agent.set_behaviour(Method::Hello, Behaviour::Oversize);
    let error = AgentClient::connect(agent.connect(), options())
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(tonic::Code::OutOfRange), "{error:?}");

    agent.set_behaviour(Method::Hello, Behaviour::Normal);
    agent.set_hello(v1::HelloResponse {
        version: 9,
        ..Default::default()
    });
    let error = AgentClient::connect(agent.connect(), options())
        .await
        .unwrap_err();
    assert!(
        matches!(error, AgentError::Incompatible { theirs: 9 }),
        "{error:?}"
    );

    let lie = v1::HelloResponse {
        version: 1,
        build: format!("a\nb{}", "x".repeat(1 << 20)),
        ..Default::default()
    };
    agent.set_hello(lie);
    let client = AgentClient::connect(agent.connect(), options())
        .await
        .unwrap();
    assert_eq!(client.hello().build.len(), MAX_NAME);
    assert!(client.hello().build.starts_with("abx"));

    agent.set_behaviour(Method::Stats, Behaviour::Stall);
    let error = client
        .stats(v1::StatsRequest::default(), Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(matches!(error, AgentError::Deadline { call: "Stats", .. }));

    let message = "y".repeat(1 << 20);
    agent.set_behaviour(
        Method::ListContainers,
        Behaviour::Fail(tonic::Code::Internal, message),
    );
    let error = client
        .list_containers(v1::ListContainersRequest {}, SOON)
        .await
        .unwrap_err();
    let AgentError::Call { status, .. } = error else {
        panic!("{error:?}")
    };
    assert!(status.message().len() < 64 * 1024);
}

#[tokio::test]
async fn one_stalled_stream_does_not_stop_the_others() {
    let (agent, client) = configured().await;
    let request = v1::CreateContainerRequest {
        id: "a".into(),
        ..Default::default()
    };
    client.create_container(request, SOON).await.unwrap();
    agent.output("a", v1::Stream::Stdout, &vec![b'x'; 16 << 20]);
    let first = tokio_stream::iter([v1::OutputAck {
        id: "a".into(),
        ..Default::default()
    }]);
    let mut stalled = client.client().output(first).await.unwrap().into_inner();
    assert!(stalled.message().await.unwrap().is_some());
    // Nobody reads on: the window of that stream fills up, the connection's does not.
    for _ in 0..20 {
        client
            .stats(v1::StatsRequest::default(), SOON)
            .await
            .unwrap();
    }
    assert!(stalled.message().await.unwrap().is_some());
}

#[tokio::test]
async fn output_and_exec_flow() {
    let (agent, client) = configured().await;
    let request = v1::CreateContainerRequest {
        id: "a".into(),
        ..Default::default()
    };
    client.create_container(request, SOON).await.unwrap();
    client
        .start_container(v1::StartContainerRequest { id: "a".into() }, SOON)
        .await
        .unwrap();
    agent.output("a", v1::Stream::Stderr, b"hello");
    let start = v1::ExecStart {
        container_id: "a".into(),
        stdin: true,
        ..Default::default()
    };
    let input = |input| v1::ExecInput { input: Some(input) };
    let inputs = tokio_stream::iter([
        input(v1::exec_input::Input::Start(start)),
        input(v1::exec_input::Input::Stdin(b"echo".to_vec())),
        input(v1::exec_input::Input::CloseStdin(true)),
    ]);
    let mut outputs = client.client().exec(inputs).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while let Some(output) = outputs.message().await.unwrap() {
        seen.push(output.output.unwrap());
    }
    use v1::exec_output::Output;
    assert!(
        matches!(&seen[..], [Output::Started(true), Output::Stdout(out), Output::Exit(exit)]
        if out == b"echo" && exit.code == 0),
        "{seen:?}"
    );

    agent.exit("a", 3);
    let first = tokio_stream::iter([v1::OutputAck {
        id: "a".into(),
        ..Default::default()
    }]);
    let mut chunks = client.client().output(first).await.unwrap().into_inner();
    let mut text = Vec::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        text.extend(chunk.data);
    }
    assert_eq!(text, b"hello");
}
