//! Calls as spans of their clients' traces: a kubelet sends the context of its own (KEP-2832).

use std::task::{Context, Poll};

use http::Request;
use hypernetes_telemetry::traces;
use tower::{Layer, Service};
use tracing::{Instrument, info_span, instrument::Instrumented};

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TracedLayer;

impl<S> Layer<S> for TracedLayer {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced(inner)
    }
}

/// A service whose calls are spans.
#[derive(Debug, Clone)]
pub(crate) struct Traced<S>(S);

impl<S: Service<Request<A>>, A> Service<Request<A>> for Traced<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = Instrumented<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let span = info_span!("cri", rpc.method = method);
        traces::adopt(&span, |name| request.headers().get(name)?.to_str().ok());
        let call = span.in_scope(|| self.0.call(request));
        call.instrument(span)
    }
}
