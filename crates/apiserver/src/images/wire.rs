//! Operations that take long: they run in a task, and what they tell goes out as lines of JSON.
//!
//! Each line is like an event of a watch: `{"type": …}` of `RESOLVED`, `PROGRESS`, `LAYER`, `DONE`, or
//! `ERROR` with a Status.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use http::Response;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hypernetes_apimachinery::Status;
use hypernetes_streaming::{ImageEvent, ImageEvents, ImageFailure};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Images;
use crate::{
    body::{self, ApiBody, BoxError},
    engine::Call,
    request_info::RequestInfo,
    server::Inner,
    service::Slot,
    status::Result,
};

/// Lines that wait for a slow client; then the work waits too.
const LINES: usize = 64;

/// What an operation works with.
pub(super) struct Work {
    pub(super) inner: Arc<Inner>,
    pub(super) call: Call,
    pub(super) events: ImageEvents,
}

impl Work {
    pub(super) fn images(&self) -> Images<'_> {
        Images {
            inner: &self.inner,
            call: &self.call,
        }
    }
}

impl Images<'_> {
    /// Answers with the lines of an operation. It ends with its client.
    pub(super) fn work<F, Fut>(&self, slot: Slot, operation: F) -> Response<ApiBody>
    where
        F: FnOnce(Work) -> Fut + Send + 'static,
        Fut: Future<Output = Result<Vec<Value>>> + Send + 'static,
    {
        let (events, mut told) = mpsc::unbounded_channel();
        let (lines, mut out) = mpsc::channel::<Bytes>(LINES);
        let info = &self.call.info;
        let inner = Arc::clone(self.inner);
        let call = Call {
            kind: self.call.kind,
            custom: None,
            info: RequestInfo {
                verb: "create",
                is_resource: true,
                group: info.group.clone(),
                version: info.version.clone(),
                namespace: info.namespace.clone(),
                resource: info.resource.clone(),
                ..RequestInfo::default()
            },
            query: crate::query::Query::default(),
            headers: http::HeaderMap::new(),
            user: self.call.user.clone(),
        };
        let shutdown = self.inner.engine.shutdown.clone();
        self.inner.engine.tasks.spawn(async move {
            let _open = slot;
            let work = async {
                let _turn = inner.turns.take(&call.info.namespace).await;
                operation(Work {
                    inner: Arc::clone(&inner),
                    call,
                    events,
                })
                .await
            };
            tokio::pin!(work);
            let mut result = None;
            loop {
                tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    () = lines.closed() => return,
                    event = told.recv() => match event {
                        Some(event) => {
                            if lines.send(line(&of_event(event))).await.is_err() {
                                return;
                            }
                        }
                        None => break,
                    },
                    done = &mut work, if result.is_none() => result = Some(done),
                }
            }
            let last = match result {
                Some(result) => result,
                None => work.await,
            };
            let last = last.unwrap_or_else(|status| {
                vec![json!({"type": "ERROR", "object": status.to_value()})]
            });
            for value in last {
                if lines.send(line(&value)).await.is_err() {
                    return;
                }
            }
        });
        let frames = futures::stream::poll_fn(move |context| out.poll_recv(context))
            .map(|line| Ok::<_, BoxError>(Frame::data(line)));
        body::with_type(
            200,
            "application/json",
            StreamBody::new(frames).boxed_unsync(),
        )
    }
}

fn line(value: &Value) -> Bytes {
    let mut text = value.to_string();
    text.push('\n');
    text.into()
}

fn of_event(event: ImageEvent) -> Value {
    match event {
        ImageEvent::Resolved { layers } => {
            let layers: Vec<Value> = layers
                .into_iter()
                .map(|(digest, size)| json!({"digest": digest, "size": size}))
                .collect();
            json!({"type": "RESOLVED", "layers": layers})
        }
        ImageEvent::Progress { layer, bytes } => {
            json!({"type": "PROGRESS", "layer": layer, "bytes": bytes})
        }
        ImageEvent::LayerDone { layer, existed } => {
            json!({"type": "LAYER", "layer": layer, "existed": existed})
        }
    }
}

/// The Status of a failure.
pub(super) fn of_failure(failure: &ImageFailure) -> Status {
    let text = failure.to_string();
    match failure {
        ImageFailure::NotFound(_) => Status::failure(404, "NotFound", text),
        ImageFailure::Invalid(_) => Status::bad_request(text),
        ImageFailure::Denied(_) | ImageFailure::TooLarge(_) => {
            Status::failure(403, "Forbidden", text)
        }
        ImageFailure::Unavailable(_) => Status::unavailable(text),
        _ => {
            tracing::warn!(error = %text, "an operation on images failed");
            Status::internal(&text)
        }
    }
}
