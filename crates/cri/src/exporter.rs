//! Metrics of the node itself, for Prometheus: `GET /metrics` at an address of the configuration.
//!
//! What `hypernetes_runtime` tells of its pods, and of the calls:
//!
//! | metric | |
//! | --- | --- |
//! | `hypernetes_node_calls_total{method,code}` | calls of the runtime interface |
//! | `hypernetes_node_call_duration_seconds{method}` | their latencies, of streams to the first answer |
//!
//! What belongs to a pod goes with it. Names of pods are seen by whoever can reach the address.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hypernetes_runtime::{METRICS_TYPE, PodRuntime, node_metrics};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use tokio::{net::TcpListener, sync::Semaphore, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Code;

/// Methods that have series of their own; the API has 45.
const MAX_METHODS: usize = 64;
/// Clients at a time.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: String,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodOf {
    method: String,
}

type Latencies = Family<MethodOf, Histogram, fn() -> Histogram>;

/// What is counted of calls. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Calls {
    calls: Family<Call, Counter>,
    latencies: Latencies,
    methods: Arc<Mutex<BTreeSet<String>>>,
}

impl Default for Calls {
    fn default() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(exponential_buckets(0.0005, 2.5, 14));
        Self {
            calls: Family::default(),
            latencies: Family::new_with_constructor(histogram),
            methods: Arc::default(),
        }
    }
}

impl Calls {
    fn record(&self, path: &str, code: Code, took: Duration) {
        let method = self.method(path.rsplit('/').next().unwrap_or_default());
        let of = MethodOf {
            method: method.clone(),
        };
        self.latencies
            .get_or_create(&of)
            .observe(took.as_secs_f64());
        let call = Call {
            method,
            code: format!("{code:?}"),
        };
        self.calls.get_or_create(&call).inc();
    }

    /// A client may call what it likes; series are not to be made of that without end.
    fn method(&self, name: &str) -> String {
        let mut known = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        let plain = name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric());
        if known.contains(name) || (plain && known.len() < MAX_METHODS) {
            known.insert(name.to_owned());
            return name.to_owned();
        }
        "other".to_owned()
    }
}

/// Counts the calls of a gRPC service.
#[derive(Debug, Clone)]
pub(crate) struct Counted<S> {
    inner: S,
    calls: Calls,
}

impl<S> Counted<S> {
    pub(crate) fn new(inner: S, calls: Calls) -> Self {
        Self { inner, calls }
    }
}

impl<S, B, A> tower::Service<Request<B>> for Counted<S>
where
    S: tower::Service<Request<B>, Response = Response<A>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    A: 'static,
{
    type Response = Response<A>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<A>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (calls, path) = (self.calls.clone(), request.uri().path().to_owned());
        let (begun, answer) = (Instant::now(), self.inner.call(request));
        Box::pin(async move {
            let answer = answer.await?;
            // A call that failed has its status here, one that went well after its message.
            let code = answer.headers().get("grpc-status");
            let code = code.map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
            calls.record(&path, code, begun.elapsed());
            Ok(answer)
        })
    }
}

/// Serves the metrics.
#[derive(Debug)]
pub(crate) struct Exporter {
    pub(crate) runtime: Arc<dyn PodRuntime>,
    pub(crate) calls: Calls,
}

impl Exporter {
    /// Serves until `stop`.
    pub(crate) async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let exporter = Arc::new(self);
        let (room, tasks) = (
            Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            TaskTracker::new(),
        );
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _peer)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a reader of metrics");
                    // Out of descriptors, most likely: others must end first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                continue;
            };
            let (exporter, stop) = (Arc::clone(&exporter), stop.clone());
            tasks.spawn(async move {
                let _permit = permit;
                let answer = service_fn(|request| {
                    let exporter = Arc::clone(&exporter);
                    async move { Ok::<_, Infallible>(exporter.answer(&request).await) }
                });
                let mut http = hyper::server::conn::http1::Builder::new();
                let connection = http
                    .timer(TokioTimer::new())
                    .header_read_timeout(DEADLINE)
                    // Each answer is a connection: nobody sits on a place.
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), answer);
                tokio::select! {
                    // A client that goes away is no news.
                    ended = tokio::time::timeout(2 * DEADLINE, connection) => drop(ended),
                    () = stop.cancelled() => {}
                }
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (code, kind, text) = match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => (StatusCode::OK, METRICS_TYPE, self.text().await),
            (_, "/metrics") => (
                StatusCode::METHOD_NOT_ALLOWED,
                "text/plain",
                "only GET\n".to_owned(),
            ),
            _ => (
                StatusCode::NOT_FOUND,
                "text/plain",
                "metrics are at /metrics\n".to_owned(),
            ),
        };
        let mut answer = Response::new(Full::new(Bytes::from(text)));
        *answer.status_mut() = code;
        let kind = header::HeaderValue::from_static(kind);
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        answer
    }

    pub(crate) async fn text(&self) -> String {
        let calls = self.calls.clone();
        let register = move |registry: &mut Registry| {
            registry.register(
                "calls",
                "Calls of the runtime interface by method and code",
                calls.calls,
            );
            registry.register(
                "call_duration_seconds",
                "Time of calls, of streams to the first answer",
                calls.latencies,
            );
        };
        node_metrics(self.runtime.as_ref(), register).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_series_within_bounds() {
        let calls = Calls::default();
        assert_eq!(calls.method("Version"), "Version");
        for bad in ["a b", "\u{e9}", &"x".repeat(65)] {
            assert_eq!(calls.method(bad), "other");
        }
        for number in 0..200 {
            calls.method(&format!("M{number}"));
        }
        assert_eq!(calls.method("Another"), "other");
        assert_eq!(calls.method("Version"), "Version");
    }
}
