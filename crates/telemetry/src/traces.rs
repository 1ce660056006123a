//! Spans for a collector: OpenTelemetry's protocol (OTLP over gRPC), W3C's trace context
//! (<https://www.w3.org/TR/trace-context/>).
//!
//! A span of `tracing` at level `info` in one of our crates is one there. Its trace is the caller's, if the
//! caller has said one ([`adopt`]), or that of a pod ([`adopt_uid`]), so that whoever knows the pod finds it.

use std::sync::OnceLock;

use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator},
    trace::{
        SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider,
    },
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{Sampler, SdkTracerProvider},
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    Layer, filter::filter_fn, layer::SubscriberExt, registry::LookupSpan, util::SubscriberInitExt,
};

use crate::LogFormat;

const MILLION: u32 = 1_000_000;
/// Spans that are there for the log only: tasks that live as long as a pod.
const NOT_EXPORTED: [&str; 3] = ["task", "link", "log"];
/// Of a million traces that nobody else has begun, how many are kept. Not set: there are no traces.
static RATE: OnceLock<u32> = OnceLock::new();

/// Where spans go, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces {
    /// URL of the collector, `http://HOST:4317`.
    pub endpoint: String,
    /// Traces to keep of a million that begin here; of others whoever began them has decided.
    pub sampling_rate_per_million: u32,
}

/// Failure to export spans.
#[derive(Debug, thiserror::Error)]
#[error("cannot send traces to {endpoint}")]
pub struct TracesError {
    endpoint: String,
    #[source]
    source: ExporterBuildError,
}

/// Sends what is left when it is dropped, for five seconds at most.
#[derive(Debug)]
pub struct Exporting(SdkTracerProvider);

impl Drop for Exporting {
    fn drop(&mut self) {
        // A collector that is not there is not waited for, and nobody is left to be told.
        drop(self.0.shutdown());
    }
}

/// Starts logging as [`crate::init`] does, and the export of spans. Needs a runtime, and more than one thread
/// of it when what it returns is dropped.
pub fn init(
    filter: &str,
    format: LogFormat,
    service: &'static str,
    traces: &Traces,
) -> Result<Exporting, TracesError> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&traces.endpoint)
        .build()
        .map_err(|source| TracesError {
            endpoint: traces.endpoint.clone(),
            source,
        })?;
    let rate = traces.sampling_rate_per_million.min(MILLION);
    let ratio = Sampler::TraceIdRatioBased(f64::from(rate) / f64::from(MILLION));
    let resource = Resource::builder().with_service_name(service);
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::ParentBased(Box::new(ratio)))
        .with_resource(resource.build())
        .build();
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("hypernetes"))
        // Not those of the exporter's own libraries: they would be exported for ever.
        .with_filter(filter_fn(|metadata| {
            metadata.is_span()
                && metadata.target().starts_with("hypernetes")
                && !NOT_EXPORTED.contains(&metadata.name())
                && *metadata.level() <= tracing::Level::INFO
        }));
    let installed = tracing_subscriber::registry()
        .with(spans)
        .with(lines(format).with_filter(crate::filter(filter)))
        .try_init();
    if installed.is_ok() {
        RATE.get_or_init(|| rate);
    }
    Ok(Exporting(provider))
}

fn lines<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(crate::colours())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    }
}

/// The headers of a context.
struct Headers<'a> {
    parent: Option<&'a str>,
    state: Option<&'a str>,
}

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.parent,
            "tracestate" => self.state,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

fn adopt_context(span: &Span, context: Context) {
    if context.span().span_context().is_valid() {
        // It fails for a span that is not exported, as all are when none are.
        drop(span.set_parent(context));
    }
}

/// Makes a new span part of the caller's trace, if its headers (`traceparent`, `tracestate`) tell one.
pub fn adopt<'a>(span: &Span, header: impl Fn(&str) -> Option<&'a str>) {
    if RATE.get().is_some() {
        let headers = Headers {
            parent: header("traceparent"),
            state: header("tracestate"),
        };
        adopt_context(span, TraceContextPropagator::new().extract(&headers));
    }
}

/// Makes a new span part of the trace of a pod: its id is the pod's uid without dashes. Another text than a
/// uid leaves the span as it is.
pub fn adopt_uid(span: &Span, uid: &str) {
    let Some(rate) = RATE.get() else { return };
    if let Some(of) = pod_context(uid, *rate) {
        adopt_context(span, Context::new().with_remote_span_context(of));
    }
}

fn pod_context(uid: &str, rate: u32) -> Option<SpanContext> {
    let digits: String = uid.chars().filter(|digit| *digit != '-').collect();
    let trace = TraceId::from_hex(&digits)
        .ok()
        .filter(|_| digits.len() == 32)?;
    let bytes = trace.to_bytes();
    let (head, tail) = bytes.split_at(8);
    let span = SpanId::from_bytes(head.try_into().ok()?);
    let tail = u64::from_be_bytes(tail.try_into().ok()?);
    let flags = match tail % u64::from(MILLION) < u64::from(rate) {
        true => TraceFlags::SAMPLED,
        false => TraceFlags::NOT_SAMPLED,
    };
    Some(SpanContext::new(trace, span, flags, true, TraceState::NONE))
}

/// Whether a span is part of a trace, kept or not.
pub fn is_traced(span: &Span) -> bool {
    RATE.get().is_some() && span.context().span().span_context().is_valid()
}

/// A span as a `traceparent` header, if its trace is kept.
pub fn traceparent(span: &Span) -> Option<String> {
    RATE.get()?;
    let context = span.context();
    let span = context.span();
    let of = span.span_context();
    let kept = of.is_valid() && of.is_sampled();
    kept.then(|| {
        format!(
            "00-{}-{}-{:02x}",
            of.trace_id(),
            of.span_id(),
            of.trace_flags().to_u8()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_s_trace_is_its_uid() {
        let uid = "0af76519-16cd-43dd-8448-eb211c80319c";
        let of = pod_context(uid, MILLION).unwrap();
        assert_eq!(
            of.trace_id().to_string(),
            "0af7651916cd43dd8448eb211c80319c"
        );
        assert!(of.is_valid() && of.is_sampled() && of.is_remote());
        assert!(!pod_context(uid, 0).unwrap().is_sampled());
        for odd in ["", "pod-1", "0af76519-16cd-43dd-8448-eb211c80319", "é"] {
            assert!(pod_context(odd, MILLION).is_none(), "{odd}");
        }
    }

    #[test]
    fn without_export_nothing_is_told() {
        let span = tracing::info_span!("x");
        adopt(&span, |_| {
            Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        });
        assert_eq!(traceparent(&span), None);
    }
}
