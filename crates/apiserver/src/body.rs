//! Bodies of requests and answers.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, stream::BoxStream};
use http::{HeaderValue, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hypernetes_apimachinery::Status;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{service::Slot, status::Result};

/// An error of whatever carries a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// Body of requests and answers.
pub type ApiBody = UnsyncBoxBody<Bytes, BoxError>;

/// How large a request body may be (upstream's limit).
pub(crate) const BODY_LIMIT: usize = 3 * 1024 * 1024;
/// Size of the pieces in which lists are sent.
const PIECE: usize = 32 * 1024;

/// A body that is there already.
pub(crate) fn full(bytes: impl Into<Bytes>) -> ApiBody {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// Reads a request's body.
pub(crate) async fn read(mut body: ApiBody) -> Result<Bytes> {
    if body.size_hint().lower() > BODY_LIMIT as u64 {
        return Err(Status::too_large(BODY_LIMIT));
    }
    let mut out = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            return Err(Status::bad_request("the request body ended too early"));
        };
        if let Ok(data) = frame.into_data() {
            if out.len() + data.len() > BODY_LIMIT {
                return Err(Status::too_large(BODY_LIMIT));
            }
            out.extend_from_slice(&data);
        }
    }
    Ok(out.freeze())
}

/// An answer of JSON.
pub(crate) fn json(code: u16, bytes: impl Into<Bytes>) -> Response<ApiBody> {
    with_type(code, "application/json", full(bytes))
}

/// An answer of JSON.
pub(crate) fn json_value(code: u16, value: &Value) -> Response<ApiBody> {
    json(code, value.to_string())
}

/// An answer of text.
pub(crate) fn text(code: u16, text: impl Into<Bytes>) -> Response<ApiBody> {
    with_type(code, "text/plain; charset=utf-8", full(text))
}

pub(crate) fn with_type(code: u16, media_type: &'static str, body: ApiBody) -> Response<ApiBody> {
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, private"),
    );
    response
}

/// An answer that is sent as it comes, until the server ends. It keeps the slot as long as it goes on.
pub(crate) fn stream(
    media_type: &'static str,
    pieces: BoxStream<'static, io::Result<Bytes>>,
    shutdown: CancellationToken,
    slot: Slot,
) -> Response<ApiBody> {
    let frames = pieces
        .map(move |piece| {
            let _open = &slot;
            piece
                .map(Frame::data)
                .map_err(|error| Box::new(error) as BoxError)
        })
        .take_until(shutdown.cancelled_owned());
    with_type(200, media_type, StreamBody::new(frames).boxed_unsync())
}

/// The answer that a Status is.
pub(crate) fn status(status: &Status) -> Response<ApiBody> {
    let mut response = json_value(status.code, &status.to_value());
    let seconds = status
        .details
        .as_ref()
        .map_or(0, |details| details.retry_after_seconds);
    if seconds > 0 {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// Adds `Warning` headers.
pub(crate) fn warn(response: &mut Response<ApiBody>, warnings: &[String]) {
    for warning in warnings {
        let clean: String = warning.chars().filter(|c| !c.is_control()).collect();
        let quoted = clean.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
}

/// A JSON list made of parts that are shared with the store: nothing is assembled but the piece
/// that is being sent.
#[derive(Debug)]
pub(crate) struct ListBody<I> {
    head: Option<Bytes>,
    items: I,
    tail: Option<Bytes>,
    first: bool,
    left: u64,
}

impl<I: Iterator<Item = Bytes> + Clone> ListBody<I> {
    /// `head` ends with `[`, `tail` begins with `]`.
    pub(crate) fn new(head: Bytes, items: I, tail: Bytes) -> Self {
        let (count, bytes) = items.clone().fold((0_u64, 0_u64), |(count, sum), item| {
            (count + 1, sum + item.len() as u64)
        });
        let left = head.len() as u64 + tail.len() as u64 + bytes + count.saturating_sub(1);
        Self {
            head: Some(head),
            items,
            tail: Some(tail),
            first: true,
            left,
        }
    }
}

impl<I: Iterator<Item = Bytes> + Unpin> Body for ListBody<I> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.tail.is_none() {
            return Poll::Ready(None);
        }
        let mut piece =
            BytesMut::with_capacity(PIECE.min(usize::try_from(this.left).unwrap_or(PIECE)));
        if let Some(head) = this.head.take() {
            piece.put_slice(&head);
        }
        while piece.len() < PIECE {
            match this.items.next() {
                Some(item) => {
                    if !std::mem::take(&mut this.first) {
                        piece.put_u8(b',');
                    }
                    piece.put_slice(&item);
                }
                None => {
                    if let Some(tail) = this.tail.take() {
                        piece.put_slice(&tail);
                    }
                    break;
                }
            }
        }
        this.left = this.left.saturating_sub(piece.len() as u64);
        Poll::Ready(Some(Ok(Frame::data(piece.freeze()))))
    }

    fn is_end_stream(&self) -> bool {
        self.tail.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_list_is_sent_in_pieces_of_the_announced_length() {
        for count in [0, 1, 2, 5000] {
            let items: Vec<Bytes> = (0..count)
                .map(|i| Bytes::from(format!("{{\"i\":{i}}}")))
                .collect();
            let body = ListBody::new("{\"items\":[".into(), items.into_iter(), "]}".into());
            let announced = body.size_hint().exact().unwrap();
            let bytes = body.collect().await.unwrap().to_bytes();
            assert_eq!(bytes.len() as u64, announced);
            let value: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(value["items"].as_array().unwrap().len(), count);
        }
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused() {
        let error = read(full(vec![b' '; BODY_LIMIT + 1])).await.unwrap_err();
        assert_eq!(error.code, 413);
        assert_eq!(
            read(full(vec![b' '; BODY_LIMIT])).await.unwrap().len(),
            BODY_LIMIT
        );
    }
}
