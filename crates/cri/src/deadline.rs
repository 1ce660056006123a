//! Deadlines of clients, answered by their own code.
//!
//! A client that waits for an expired call sees either its own clock or the server's answer, whichever
//! comes first. The transport would answer with `Cancelled`; clients look for `DeadlineExceeded`. So
//! the deadline is kept here too, a moment before the transport's.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, Request, Response};
use tonic::Status;
use tower::{Layer, Service};

/// How much earlier than the transport, whose timer is as coarse.
const MOMENT: Duration = Duration::from_millis(2);
const HEADER: &str = "grpc-timeout";

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadlines<S>;

    fn layer(&self, inner: S) -> Deadlines<S> {
        Deadlines(inner)
    }
}

/// A service that keeps its clients' deadlines.
#[derive(Debug, Clone)]
pub(crate) struct Deadlines<S>(S);

type Answer<B, E> = Pin<Box<dyn Future<Output = Result<Response<B>, E>> + Send>>;

impl<S, A, B> Service<Request<A>> for Deadlines<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: Default + Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Answer<B, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let limit = limit(request.headers());
        let call = self.0.call(request);
        Box::pin(async move {
            let Some(limit) = limit else {
                return call.await;
            };
            match tokio::time::timeout(limit.saturating_sub(MOMENT), call).await {
                Ok(answer) => answer,
                // Dropping the call is what the client's own end of it would do.
                Err(_late) => {
                    Ok(Status::deadline_exceeded("the client's deadline has passed").into_http())
                }
            }
        })
    }
}

/// The time that a client gives, by the gRPC protocol: at most 8 digits and a unit.
fn limit(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_s_units_are_understood() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(HEADER, text.parse().unwrap());
            limit(&headers)
        };
        assert_eq!(of("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(of("999u"), Some(Duration::from_micros(999)));
        for bad in ["", "S", "1", "1s", "-1S", "123456789S", "1.5S"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_late_says_so_itself() {
        let slow = tower::service_fn(|_: Request<()>| async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            Ok::<_, std::convert::Infallible>(Response::new(String::new()))
        });
        let mut service = DeadlineLayer.layer(slow);
        let request = |limit: &str| Request::builder().header(HEADER, limit).body(()).unwrap();
        let late = service.call(request("1S")).await.unwrap();
        assert_eq!(late.headers()["grpc-status"], "4");
        let early = service.call(request("20S")).await.unwrap();
        assert!(!early.headers().contains_key("grpc-status"));
    }
}
