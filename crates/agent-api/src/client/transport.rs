//! What carries the calls of the generated client: frames, or HTTP/2 to the agents of earlier releases,
//! which go on in pods that run and in snapshots.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body::{Body as _, Frame};
use hyper_util::rt::TokioIo;
use hypernetes_telemetry::traces;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{
    body::Body,
    codegen::{BoxFuture, Service, StdError},
    transport::{Channel, Endpoint},
};
use tracing::{Instrument, Span, info_span};

use crate::{
    CONNECTION_WINDOW, MAX_HEADER_LIST_SIZE, STREAM_WINDOW,
    frames::{ConnectionError, Driver, Received, Shared, Side},
    status::Status,
    sync::Wire,
};

/// Carries calls to one agent, as long as the stream lasts. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Transport {
    /// HTTP/2.
    Http2(Channel),
    /// Our own frames.
    Frames(Frames),
}

impl Transport {
    /// Starts on a stream whose preamble is over.
    pub(crate) async fn start<S>(stream: S, wire: Wire) -> Result<Self, tonic::transport::Error>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        match wire {
            Wire::Http2 => Ok(Self::Http2(single_stream_channel(stream).await?)),
            Wire::Frames => Ok(Self::Frames(Frames::start(stream))),
        }
    }
}

impl Service<Request<Body>> for Transport {
    type Response = Response<Body>;
    type Error = StdError;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match self {
            Self::Http2(channel) => channel.poll_ready(cx).map_err(Into::into),
            Self::Frames(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self {
            Self::Http2(channel) => {
                let answer = channel.call(request);
                Box::pin(async move { Ok(answer.await?) })
            }
            Self::Frames(frames) => {
                let method = request.uri().path().rsplit('/').next();
                let method = method.unwrap_or_default().to_owned();
                // What the node asks by itself, as whether the guest is alive, is no trace of its own.
                let span = match traces::is_traced(&Span::current()) {
                    true => info_span!("agent", rpc.method = method),
                    false => Span::none(),
                };
                let parent = traces::traceparent(&span);
                let begun = match parent {
                    Some(parent) => frames.call(&format!("{method} {parent}"), request),
                    None => frames.call(&method, request),
                };
                Box::pin(async move { Ok(begun?.answer().instrument(span).await?) })
            }
        }
    }
}

/// A channel over a stream that exists once: when it has ended, every call fails.
async fn single_stream_channel<S>(stream: S) -> Result<Channel, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let slot = Mutex::new(Some(stream));
    Endpoint::from_static("http://agent")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(MAX_HEADER_LIST_SIZE)
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            std::future::ready(stream.map(TokioIo::new).ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotConnected, "the agent's stream has ended")
            }))
        }))
        .await
}

/// Calls in frames.
#[derive(Debug, Clone)]
pub struct Frames(Arc<Callers>);

/// Everybody who may still make calls. When all are gone, and their calls, the connection ends.
#[derive(Debug)]
struct Callers(Shared);

impl Drop for Callers {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl Frames {
    fn start<S>(stream: S) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let shared = Shared::new(Side::Node);
        let driver = Driver::new(shared.clone());
        tokio::spawn(async move {
            // How it ended is told to each call. A guest begins none: that is refused before.
            drop(driver.run(stream, |_, _| ()).await);
        });
        Self(Arc::new(Callers(shared)))
    }

    fn call(&self, method: &str, request: Request<Body>) -> Result<Call, ConnectionError> {
        let shared = &self.0.0;
        let number = shared.begin(method)?;
        let call = Call {
            shared: shared.clone(),
            number,
        };
        let work = carry(shared.clone(), number, request.into_body());
        shared.attend(number, tokio::spawn(work).abort_handle());
        Ok(call)
    }
}

/// Sends the messages of a request, and its end.
async fn carry(shared: Shared, call: u32, mut body: Body) {
    let mut next = |cx: &mut Context<'_>| {
        let next = Pin::new(&mut body).poll_frame(cx);
        if next.is_pending() {
            shared.flush();
        }
        next
    };
    while let Some(Ok(frame)) = std::future::poll_fn(&mut next).await {
        if let Ok(data) = frame.into_data()
            && shared.send(call, data).await.is_err()
        {
            return;
        }
    }
    shared.finish(call);
}

/// A call, which is left when this is dropped.
#[derive(Debug)]
struct Call {
    shared: Shared,
    number: u32,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.shared.leave(self.number);
    }
}

impl Call {
    /// Waits for the agent to accept or refuse.
    async fn answer(self) -> Result<Response<Body>, ConnectionError> {
        let ended = self.shared.accepted(self.number).await?;
        if let Some(status) = ended {
            return Ok(tonic_status(&status).into_http());
        }
        let mut response = Response::new(Body::new(Answer(self)));
        let grpc = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(CONTENT_TYPE, grpc);
        Ok(response)
    }
}

/// The agent's messages, and the status as trailers.
#[derive(Debug)]
struct Answer(Call);

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = ConnectionError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ConnectionError>>> {
        let Call { shared, number } = &self.0;
        shared.poll_receive(*number, cx).map(|received| {
            Some(received.map(|received| match received {
                Received::Bytes(bytes) => Frame::data(bytes.freeze()),
                Received::End(status) => {
                    let mut trailers = HeaderMap::new();
                    // Only a text that cannot be a header fails, and it is encoded.
                    drop(tonic_status(&status).add_header(&mut trailers));
                    Frame::trailers(trailers)
                }
            }))
        })
    }
}

fn tonic_status(status: &Status) -> tonic::Status {
    tonic::Status::new(tonic::Code::from(status.code() as i32), status.message())
}
