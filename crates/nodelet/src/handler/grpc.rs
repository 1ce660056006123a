//! The gRPC health protocol (grpc.health.v1), of which two fields are needed.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::{Subject, USER_AGENT, Verdict};

/// Bytes of an answer: a status is four.
const MAX_ANSWER: usize = 4096;
const UNIMPLEMENTED: u32 = 12;
const STATUSES: [&str; 4] = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"];

/// Asks for the health of a service of the pod.
pub(super) async fn check(
    subject: &Subject<'_>,
    port: u16,
    service: &str,
    limit: Duration,
) -> Verdict {
    let address = subject.shown(port);
    let seconds = limit.as_secs();
    let deadline = tokio::time::Instant::now() + limit;
    let stream = match tokio::time::timeout_at(deadline, subject.dial(port)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(message)) => {
            return Verdict::Failure(format!(
                "error: failed to connect service at {address:?}: {message}"
            ));
        }
        Err(_late) => {
            return Verdict::Failure(format!(
                "timeout: failed to connect service {address:?} within {seconds}s: context deadline exceeded"
            ));
        }
    };
    match tokio::time::timeout_at(deadline, call(stream, &address, service)).await {
        Ok(Ok(1)) => Verdict::Success,
        Ok(Ok(status)) => {
            let name = usize::try_from(status).ok().and_then(|at| STATUSES.get(at));
            let name = name.map_or_else(|| status.to_string(), |name| (*name).to_owned());
            Verdict::Failure(format!("service unhealthy (responded with {name:?})"))
        }
        Ok(Err(Refused::Code(UNIMPLEMENTED, message))) => Verdict::Failure(format!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {message}"
        )),
        Ok(Err(Refused::Code(code, message))) => Verdict::Failure(format!(
            "error: health rpc probe failed: rpc error: code = {code} desc = {message}"
        )),
        Ok(Err(Refused::Transport(message))) => {
            Verdict::Failure(format!("error: health rpc probe failed: {message}"))
        }
        Err(_late) => Verdict::Failure(format!(
            "timeout: health rpc did not complete within {seconds}s"
        )),
    }
}

enum Refused {
    Code(u32, String),
    Transport(String),
}

async fn call(stream: tokio::net::TcpStream, address: &str, service: &str) -> Result<u64, Refused> {
    let transport = |error: String| Refused::Transport(error);
    let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| transport(error.to_string()))?;
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::TE, "trailers")
        .body(Full::new(encode(service)))
        .map_err(|error| transport(error.to_string()))?;
    let exchange = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| transport(error.to_string()))?;
        if !response.status().is_success() {
            let status = response.status();
            return Err(transport(format!("unexpected HTTP status {status}")));
        }
        // An answer without a message has its trailers among its headers.
        refusal(response.headers()).map_or(Ok(()), Err)?;
        let collected = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| transport(error.to_string()))?;
        if let Some(refused) = collected.trailers().and_then(refusal) {
            return Err(refused);
        }
        decode(&collected.to_bytes()).ok_or_else(|| transport("malformed answer".to_owned()))
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    tokio::select! {
        done = &mut exchange => done,
        ended = &mut connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(transport(error.to_string())),
        },
    }
}

fn refusal(headers: &HeaderMap) -> Option<Refused> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let code: u32 = text("grpc-status")?.parse().unwrap_or(2);
    let message = text("grpc-message").unwrap_or_default();
    (code != 0).then(|| Refused::Code(code, message.chars().take(256).collect()))
}

/// `HealthCheckRequest { service = 1 }` in a message frame.
fn encode(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        put_varint(&mut message, service.len() as u64);
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(&message);
    frame.freeze()
}

fn put_varint(to: &mut BytesMut, mut value: u64) {
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or(0);
        value >>= 7;
        if value == 0 {
            to.put_u8(low);
            return;
        }
        to.put_u8(low | 0x80);
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f).checked_shl(shift)?;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// `status = 1` of a `HealthCheckResponse`; absent is 0. Other fields are passed over.
fn decode(frame: &[u8]) -> Option<u64> {
    let (head, message) = frame.split_at_checked(5)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    if head[0] != 0 || usize::try_from(length).ok()? != message.len() {
        return None;
    }
    let (mut rest, mut status) = (message, 0);
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        match (key >> 3, key & 7) {
            (1, 0) => status = varint(&mut rest)?,
            (_, 0) => drop(varint(&mut rest)?),
            (_, 1) => rest = rest.split_at_checked(8)?.1,
            (_, 2) => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                rest = rest.split_at_checked(length)?.1;
            }
            (_, 5) => rest = rest.split_at_checked(4)?.1,
            _ => return None,
        }
    }
    Some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_on_the_wire() {
        assert_eq!(&encode("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&encode("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = "x".repeat(200);
        assert_eq!(&encode(&long)[5..8], [0x0a, 0xc8, 1]);
        for (frame, status) in [
            (&[0, 0, 0, 0, 2, 8, 1][..], Some(1)),
            (&[0, 0, 0, 0, 2, 8, 2], Some(2)),
            (&[0, 0, 0, 0, 0], Some(0)),
            (&[0, 0, 0, 0, 5, 0x12, 1, 9, 8, 1], Some(1)),
            (&[0, 0, 0, 0, 3, 8, 1], None),
            (&[1, 0, 0, 0, 2, 8, 1], None),
            (&[0, 0, 0, 0, 2, 0x12, 9], None),
            (&[0, 0, 0, 0, 1, 8], None),
            (&[0, 0], None),
        ] {
            assert_eq!(decode(frame), status, "{frame:?}");
        }
    }
}
