//! Which protocol a client asked for, and the `101 Switching Protocols` that answers it.

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// Header in which SPDY clients offer subprotocols.
pub(crate) const STREAM_PROTOCOL: &str = "x-stream-protocol-version";

/// Subprotocols of exec and attach, best first.
const PROCESS_WEBSOCKET: &[&str] = &["v5.channel.k8s.io", "v4.channel.k8s.io"];
const PROCESS_SPDY: &[&str] = &["v5.channel.k8s.io", "v4.channel.k8s.io"];
/// SPDY frames inside binary WebSocket messages (KEP-4006).
pub(crate) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const FORWARD_WEBSOCKET: &[&str] = &[TUNNEL, "v4.channel.k8s.io"];
const FORWARD_SPDY: &[&str] = &["portforward.k8s.io"];

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wire {
    /// RFC 6455 with a subprotocol.
    WebSocket {
        /// The subprotocol.
        protocol: &'static str,
        /// `Sec-WebSocket-Accept`.
        accept: String,
    },
    /// SPDY/3.1 with a stream protocol.
    Spdy {
        /// The stream protocol.
        protocol: &'static str,
    },
}

/// The client asked for nothing that is spoken here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// The request is no upgrade at all.
    #[error("you must specify at least 1 of the upgrade protocols: websocket, SPDY/3.1")]
    NoUpgrade,
    /// None of the offered subprotocols is known.
    #[error(
        "unable to negotiate protocol: client supports [{offered}], server accepts [{accepted}]"
    )]
    NoCommonProtocol {
        /// The client's list.
        offered: String,
        /// Ours.
        accepted: String,
    },
    /// The WebSocket handshake lacks its key or version.
    #[error(
        "bad WebSocket handshake: Sec-WebSocket-Key and Sec-WebSocket-Version: 13 are required"
    )]
    BadHandshake,
}

/// Chooses the protocol of an exec or attach.
pub fn negotiate_process(headers: &HeaderMap) -> Result<Wire, Rejected> {
    negotiate(headers, PROCESS_WEBSOCKET, PROCESS_SPDY)
}

/// Chooses the protocol of a port-forward.
pub fn negotiate_port_forward(headers: &HeaderMap) -> Result<Wire, Rejected> {
    negotiate(headers, FORWARD_WEBSOCKET, FORWARD_SPDY)
}

fn negotiate(
    headers: &HeaderMap,
    websocket: &'static [&'static str],
    spdy: &'static [&'static str],
) -> Result<Wire, Rejected> {
    let upgrade = list(headers, header::UPGRADE.as_str());
    let asks = |name: &str| upgrade.iter().any(|word| word.eq_ignore_ascii_case(name));
    if asks("websocket") {
        let offered = list(headers, header::SEC_WEBSOCKET_PROTOCOL.as_str());
        let key = headers
            .get(header::SEC_WEBSOCKET_KEY)
            .ok_or(Rejected::BadHandshake)?;
        let version = headers.get(header::SEC_WEBSOCKET_VERSION);
        if version.is_none_or(|version| version.as_bytes() != b"13") {
            return Err(Rejected::BadHandshake);
        }
        let accept = derive_accept_key(key.as_bytes());
        return Ok(Wire::WebSocket {
            protocol: choose(&offered, websocket)?,
            accept,
        });
    }
    if asks("SPDY/3.1") {
        let offered = list(headers, STREAM_PROTOCOL);
        return Ok(Wire::Spdy {
            protocol: choose(&offered, spdy)?,
        });
    }
    Err(Rejected::NoUpgrade)
}

fn list(headers: &HeaderMap, name: &str) -> Vec<String> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|word| word.trim().to_owned())
        .filter(|word| !word.is_empty())
        .take(32)
        .collect()
}

fn choose(offered: &[String], accepted: &'static [&'static str]) -> Result<&'static str, Rejected> {
    accepted
        .iter()
        .find(|name| offered.iter().any(|offer| offer.eq_ignore_ascii_case(name)))
        .copied()
        .ok_or_else(|| Rejected::NoCommonProtocol {
            offered: offered.join(", "),
            accepted: accepted.join(", "),
        })
}

impl Wire {
    /// The answer that switches the connection over.
    pub fn response(&self) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        match self {
            Self::WebSocket { protocol, accept } => {
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(
                    header::SEC_WEBSOCKET_ACCEPT,
                    HeaderValue::from_str(accept).expect("base64 is a valid header value"),
                );
                headers.insert(
                    header::SEC_WEBSOCKET_PROTOCOL,
                    HeaderValue::from_static(protocol),
                );
            }
            Self::Spdy { protocol } => {
                headers.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
                headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap()))
            .collect()
    }

    #[test]
    fn the_best_common_protocol_is_taken() {
        let wire = negotiate_process(&headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-version", "13"),
            (
                "sec-websocket-protocol",
                "v4.channel.k8s.io, v5.channel.k8s.io",
            ),
        ]))
        .unwrap();
        assert_eq!(
            wire,
            Wire::WebSocket {
                protocol: "v5.channel.k8s.io",
                accept: "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".into(),
            }
        );
        assert_eq!(
            wire.response().headers()["sec-websocket-protocol"],
            "v5.channel.k8s.io"
        );
    }

    #[test]
    fn spdy_clients_offer_in_a_header_of_their_own() {
        let wire = negotiate_port_forward(&headers(&[
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "portforward.k8s.io"),
        ]));
        assert_eq!(
            wire,
            Ok(Wire::Spdy {
                protocol: "portforward.k8s.io"
            })
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            negotiate_process(&HeaderMap::new()),
            Err(Rejected::NoUpgrade)
        );
        let error = negotiate_process(&headers(&[
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v9.channel.k8s.io"),
        ]))
        .unwrap_err()
        .to_string();
        assert!(error.contains("[v9.channel.k8s.io]") && error.contains("v4.channel.k8s.io"));
    }
}
