//! Counts and latencies of requests. Labels are bounded: verbs, kinds and codes, no names.
//!
//! The node that this server stands for is in the same process, so that its metrics are beside the server's own,
//! and where a kubelet's are read through a cluster's API server: `/api/v1/nodes/NAME/proxy/metrics`.

use std::time::Duration;

use http::Response;
use hypernetes_apimachinery::Status;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::{
    body::{self, ApiBody},
    config::NodeMetrics,
    engine::Call,
    status::Result,
};

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The last line of such a text.
const END: &str = "# EOF\n";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    verb: &'static str,
    resource: &'static str,
    subresource: &'static str,
    code: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verb {
    verb: &'static str,
}

type Latencies = Family<Verb, Histogram, fn() -> Histogram>;

/// What is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Request, Counter>,
    latencies: Latencies,
    long_running: Gauge,
    node: Option<NodeMetrics>,
}

impl Metrics {
    pub(crate) fn new(node: Option<NodeMetrics>) -> Self {
        let mut registry = Registry::default();
        let requests = Family::<Request, Counter>::default();
        let latencies: Latencies =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0005, 2.5, 12)));
        let long_running = Gauge::default();
        registry.register(
            "hypernetes_apiserver_requests",
            "Requests by verb, resource and status code",
            requests.clone(),
        );
        registry.register(
            "hypernetes_apiserver_request_duration_seconds",
            "Time to the headers of the answer, streams excluded",
            latencies.clone(),
        );
        registry.register(
            "hypernetes_apiserver_long_running_requests",
            "Watches, logs, execs and the like that are open",
            long_running.clone(),
        );
        Self {
            registry,
            requests,
            latencies,
            long_running,
            node,
        }
    }

    pub(crate) fn record(
        &self,
        verb: &'static str,
        resource: (&'static str, &'static str),
        code: u16,
        took: Option<Duration>,
    ) {
        let (resource, subresource) = resource;
        self.requests
            .get_or_create(&Request {
                verb,
                resource,
                subresource,
                code,
            })
            .inc();
        if let Some(took) = took {
            self.latencies
                .get_or_create(&Verb { verb })
                .observe(took.as_secs_f64());
        }
    }

    /// Counts a stream for as long as the guard lives.
    pub(crate) fn stream(&self) -> StreamGuard {
        self.long_running.inc();
        StreamGuard(self.long_running.clone())
    }

    /// The server's own, and those of its node.
    pub(crate) async fn all(&self) -> Response<ApiBody> {
        let own = self.text();
        let text = match &self.node {
            Some(node) => {
                let own = own.strip_suffix(END).unwrap_or(&own);
                format!("{own}{}", (node.read)().await)
            }
            None => own,
        };
        answer(text)
    }

    /// Those of a node alone, as through the proxy to a kubelet.
    pub(crate) async fn of_node(&self, call: &Call) -> Result<Response<ApiBody>> {
        let node = self.node.as_ref();
        let node = node.filter(|node| node.node == call.info.name);
        match (node, &*call.info.rest) {
            (Some(node), [path]) if path == "metrics" => Ok(answer((node.read)().await)),
            (Some(_), _) => Err(Status::no_resource()),
            (None, _) => Err(call.not_found()),
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        match encode(&mut out, &self.registry) {
            Ok(()) => out,
            // Writing into a string does not fail.
            Err(_) => String::new(),
        }
    }
}

fn answer(text: String) -> Response<ApiBody> {
    body::with_type(200, CONTENT_TYPE, body::full(text))
}

/// An open stream.
#[derive(Debug)]
pub(crate) struct StreamGuard(Gauge);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}
