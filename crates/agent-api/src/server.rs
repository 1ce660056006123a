//! The guest's end of the protocol: one HTTP/2 connection on one stream.

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    CONNECTION_WINDOW, MAX_HEADER_LIST_SIZE, MAX_MESSAGE_SIZE, STREAM_WINDOW,
    v1::agent_server::{Agent, AgentServer},
};

/// Calls that one connection may have open. More than all containers' streams and execs together.
const MAX_STREAMS: u32 = 2048;

/// Serves a session until its stream ends. Handlers of open calls are dropped with it.
pub async fn serve<S, A>(stream: S, agent: A) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    A: Agent,
{
    // What is sent is not limited here: the client has its own limit, and the fake lies on purpose.
    let service = AgentServer::new(agent).max_decoding_message_size(MAX_MESSAGE_SIZE);
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_LIST_SIZE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .await
}
