//! A pod's start as one trace, from the caller to the guest.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods, eventually, stdout};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::client::{Client, PATIENCE, sandbox, shell};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// A collector of OpenTelemetry's protocol that keeps what it gets.
#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans;
        let scopes = resources.into_iter().flat_map(|of| of.scope_spans);
        self.0
            .lock()
            .unwrap()
            .extend(scopes.flat_map(|of| of.spans));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn serve() -> (Self, String) {
        let collector = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let service = TraceServiceServer::new(collector.clone());
        let server = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        (collector, endpoint)
    }

    /// The spans of the caller's trace, by their ids.
    fn spans(&self) -> BTreeMap<Vec<u8>, Span> {
        let spans = self.0.lock().unwrap();
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        spans
            .iter()
            .filter(|span| hex(&span.trace_id) == TRACE)
            .map(|span| (span.span_id.clone(), span.clone()))
            .collect()
    }
}

fn method(span: &Span) -> Option<String> {
    use opentelemetry_proto::tonic::common::v1::any_value::Value;
    let of = span.attributes.iter().find(|of| of.key == "rpc.method")?;
    match of.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

/// A request as a kubelet sends it whose own trace is kept.
fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    request
        .metadata_mut()
        .insert("traceparent", parent.parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_goes_from_the_caller_to_the_guest() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let (collector, endpoint) = Collector::serve().await;
    let mut node = Node::prepare(None, "10.77.0.0/24");
    node.configure("templates: 0\n");
    // Of its own traces none is kept; of the caller's the caller has decided.
    node.arguments(&[
        "--tracing-endpoint",
        &endpoint,
        "--tracing-sampling-rate-per-million",
        "0",
    ]);
    node.spawn();
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "one");
    let run = v1::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    };
    let run = client.runtime.run_pod_sandbox(traced(run)).await.unwrap();
    let pod = run.into_inner().pod_sandbox_id;
    let create = v1::CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(shell("main", &image, "sleep 100000")),
        sandbox_config: Some(config),
    };
    let create = client
        .runtime
        .create_container(traced(create))
        .await
        .unwrap();
    let container_id = create.into_inner().container_id;
    let start = v1::StartContainerRequest { container_id };
    client.runtime.start_container(traced(start)).await.unwrap();

    let console = stdout(&mut node.hypernetes(&["console", &pod]));
    for method in ["ConfigureSandbox", "CreateContainer", "StartContainer"] {
        let line = format!("{method} of trace 00-{TRACE}-");
        assert!(console.contains(&line), "{line}: {console}");
    }
    client.stop(&pod).await;
    client.remove(&pod).await;
    // What was kept back is sent at the end at the latest.
    node.stop();
    eventually("the spans have arrived", PATIENCE, || {
        let spans = collector.spans();
        let has = |name: &str, rpc: Option<&str>| {
            let is = |span: &&Span| span.name == name && method(span).as_deref() == rpc;
            spans.values().any(|span| is(&span))
        };
        let wanted = [
            ("cri", Some("RunPodSandbox")),
            ("cri", Some("CreateContainer")),
            ("cri", Some("StartContainer")),
            ("vmm", None),
            ("network", None),
            ("scratch", None),
            ("boot", None),
            ("agent", Some("ConfigureSandbox")),
            ("agent", Some("CreateContainer")),
            ("agent", Some("StartContainer")),
        ];
        let missing: Vec<_> = wanted
            .iter()
            .filter(|(name, rpc)| !has(name, *rpc))
            .collect();
        missing
            .is_empty()
            .then_some(())
            .ok_or(format!("{missing:?}"))
    });
    // The pull told no trace, and of those that begin here none is kept.
    let all = collector.0.lock().unwrap().len();
    let spans = collector.spans();
    assert_eq!(spans.len(), all);
    // Each is below another of them, up to the caller's.
    for span in spans.values() {
        let mut at = span;
        while let Some(parent) = spans.get(&at.parent_span_id) {
            at = parent;
        }
        assert_eq!(
            at.parent_span_id,
            0x00f0_67aa_0ba9_02b7_u64.to_be_bytes(),
            "{span:?}"
        );
    }
}
