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

/// What an agent of an earlier release does with the stream: gRPC over HTTP/2, of which it answers `Hello`.
async fn serve_http2(mut stream: tokio::io::DuplexStream) {
    use http_body_util::{BodyExt, StreamBody};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let mut line = vec![0; 51];
    stream.read_exact(&mut line).await.unwrap();
    line[1..8].copy_from_slice(b"HNECHO1");
    stream.write_all(&line).await.unwrap();
    let answer = |request: http::Request<hyper::body::Incoming>| async move {
        let code = match request.uri().path() {
            "/hypernetes.agent.v1.Agent/Hello" => "0",
            _ => "12",
        };
        let hello = v1::HelloResponse {
            version: 3,
            build: "earlier".into(),
            ..Default::default()
        };
        let hello = prost::Message::encode_to_vec(&hello);
        let mut message = vec![0, 0, 0, 0, u8::try_from(hello.len()).unwrap()];
        message.extend(hello);
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", http::HeaderValue::from_static(code));
        drop(request.into_body().collect().await);
        let data = http_body::Frame::data(bytes::Bytes::from(message));
        let frames = [Ok(data), Ok(http_body::Frame::trailers(trailers))];
        let frames = match code {
            "0" => frames
                .into_iter()
                .collect::<Vec<Result<_, std::convert::Infallible>>>(),
            _ => frames.into_iter().skip(1).collect(),
        };
        let body = StreamBody::new(tokio_stream::iter(frames));
        Ok::<_, std::convert::Infallible>(http::Response::new(body))
    };
    let executor = hyper_util::rt::TokioExecutor::new();
    let connection = hyper::server::conn::http2::Builder::new(executor).serve_connection(
        hyper_util::rt::TokioIo::new(stream),
        hyper::service::service_fn(answer),
    );
    drop(connection.await);
}

#[tokio::test]
async fn an_agent_of_an_earlier_release_is_spoken_to() {
    let (node, guest) = tokio::io::duplex(64 * 1024);
    tokio::spawn(serve_http2(guest));
    let client = AgentClient::connect(node, options()).await.unwrap();
    assert_eq!(client.hello().build, "earlier");
    let error = client
        .stats(v1::StatsRequest::default(), SOON)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(tonic::Code::Unimplemented), "{error:?}");
    assert!(!error.is_transient());
}

#[tokio::test]
async fn a_call_that_is_left_ends_in_the_guest() {
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
    let alive = std::sync::Arc::new(());
    let held = alive.clone();
    agent.on_exec(move |_, stdin| {
        let _held = &held;
        (stdin.to_vec(), Vec::new(), 0)
    });
    // Waits for the end of its input, which never comes.
    let start = v1::ExecStart {
        container_id: "a".into(),
        stdin: true,
        ..Default::default()
    };
    let start = v1::ExecInput {
        input: Some(v1::exec_input::Input::Start(start)),
    };
    let inputs =
        tokio_stream::StreamExt::chain(tokio_stream::iter([start]), tokio_stream::pending());
    let mut outputs = client.client().exec(inputs).await.unwrap().into_inner();
    assert!(outputs.message().await.unwrap().is_some());
    // What the hook holds is held by its call too, once another hook is set.
    agent.on_exec(|_, stdin| (stdin.to_vec(), Vec::new(), 0));
    assert_eq!(std::sync::Arc::strong_count(&alive), 2);
    drop(outputs);
    let ended = async {
        while std::sync::Arc::strong_count(&alive) > 1 {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, ended).await.unwrap();
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
