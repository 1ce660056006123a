//! Counts and latencies of requests. Labels are bounded: verbs, kinds and codes, no names.

use std::time::Duration;

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
}

impl Metrics {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        match encode(&mut out, &self.registry) {
            Ok(()) => out,
            // Writing into a string does not fail.
            Err(_) => String::new(),
        }
    }
}

/// An open stream.
#[derive(Debug)]
pub(crate) struct StreamGuard(Gauge);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}
