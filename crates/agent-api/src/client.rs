//! The node's end of the protocol.

use std::{future::Future, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout, timeout_at},
};

use crate::{
    MAX_MESSAGE_SIZE, MIN_PROTOCOL_VERSION, PROTOCOL_VERSION,
    sync::{SyncError, host_sync},
    v1,
};

mod transport;

pub use transport::{Frames, Transport};

/// Most features that are taken from an agent.
const MAX_FEATURES: usize = 64;
/// Longest build name or kernel release that is taken from a guest.
const MAX_NAME: usize = 256;

/// Failure of a conversation with an agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The preamble failed.
    #[error("cannot start a session with the agent")]
    Sync(#[source] SyncError),
    /// HTTP/2 could not be set up on the stream.
    #[error("cannot start HTTP/2 with the agent")]
    Connect(#[source] tonic::transport::Error),
    /// The agent did not answer in time.
    #[error("the agent did not answer {call} within {waited:?}")]
    Deadline {
        /// What was asked.
        call: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// Agent and node share no protocol version, or the agent claims nonsense.
    #[error(
        "the agent speaks protocol {theirs}, this node speaks {MIN_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
    )]
    Incompatible {
        /// The version that the agent answered with.
        theirs: u32,
    },
    /// The agent refused, or the connection ended during the call.
    #[error("{call} failed in the guest")]
    Call {
        /// What was asked.
        call: &'static str,
        /// The answer. Its message is the guest's text.
        #[source]
        status: Box<tonic::Status>,
    },
}

impl AgentError {
    /// The status code that the agent answered with, if it answered.
    pub fn code(&self) -> Option<tonic::Code> {
        match self {
            Self::Call { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// Whether a new connection may help: the stream broke, or the agent was silent.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Sync(_) | Self::Connect(_) | Self::Deadline { .. } => true,
            Self::Incompatible { .. } => false,
            // Errors of the transport arrive as statuses made on this side, with a source.
            Self::Call { status, .. } => std::error::Error::source(status.as_ref()).is_some(),
        }
    }
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// This node's build, for the guest's log.
    pub build: String,
    /// For the preamble, the transport and `Hello` together.
    pub deadline: Duration,
}

/// A session with one agent. Cheap to clone; ends when the stream ends, and is not renewed.
#[derive(Debug, Clone)]
pub struct AgentClient {
    client: v1::agent_client::AgentClient<Transport>,
    hello: v1::HelloResponse,
}

impl AgentClient {
    /// Starts a session on a stream to an agent: preamble, transport, `Hello`.
    ///
    /// A guest that is silent, floods or lies gives an error within the deadline. Cancelled, it
    /// drops the stream.
    pub async fn connect<S>(stream: S, options: ConnectOptions) -> Result<Self, AgentError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let ConnectOptions {
            build,
            deadline: waited,
        } = options;
        let deadline = Instant::now() + waited;
        let late = |call| move |_| AgentError::Deadline { call, waited };

        let (stream, wire) = timeout_at(deadline, host_sync(stream))
            .await
            .map_err(late("the session preamble"))?
            .map_err(AgentError::Sync)?;
        let transport = timeout_at(deadline, Transport::start(stream, wire))
            .await
            .map_err(late("HTTP/2"))?
            .map_err(AgentError::Connect)?;
        let mut client = v1::agent_client::AgentClient::new(transport)
            .max_decoding_message_size(MAX_MESSAGE_SIZE)
            .max_encoding_message_size(MAX_MESSAGE_SIZE);

        let request = v1::HelloRequest {
            min_version: MIN_PROTOCOL_VERSION,
            max_version: PROTOCOL_VERSION,
            build,
        };
        let hello = timeout_at(deadline, client.hello(request))
            .await
            .map_err(late("Hello"))?
            .map_err(|status| AgentError::Call {
                call: "Hello",
                status: Box::new(status),
            })?;
        let mut hello = hello.into_inner();
        if !(MIN_PROTOCOL_VERSION..=PROTOCOL_VERSION).contains(&hello.version) {
            return Err(AgentError::Incompatible {
                theirs: hello.version,
            });
        }
        bound_text(&mut hello.build);
        bound_text(&mut hello.kernel_release);
        hello.features.truncate(MAX_FEATURES);
        hello.features.iter_mut().for_each(bound_text);
        Ok(Self { client, hello })
    }

    /// What the agent said of itself. Texts are the guest's, bounded and without control characters.
    pub fn hello(&self) -> &v1::HelloResponse {
        &self.hello
    }

    /// Whether the agent does what a `FEATURE_…` of this crate names.
    pub fn has(&self, feature: &str) -> bool {
        self.hello.features.iter().any(|known| known == feature)
    }

    /// The generated client, for the streaming calls. It has size limits and no deadlines.
    pub fn client(&self) -> v1::agent_client::AgentClient<Transport> {
        self.client.clone()
    }
}

/// One line of text from a guest, fit for a log or a status field.
fn bound_text(text: &mut String) {
    *text = text
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_NAME)
        .collect();
}

async fn call<T>(
    call: &'static str,
    deadline: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, AgentError> {
    match timeout(deadline, answer).await {
        Err(_) => Err(AgentError::Deadline {
            call,
            waited: deadline,
        }),
        Ok(Err(status)) => Err(AgentError::Call {
            call,
            status: Box::new(status),
        }),
        Ok(Ok(response)) => Ok(response.into_inner()),
    }
}

macro_rules! unary {
    ($($name:ident: $title:literal, $request:ident -> $response:ident;)*) => {
        impl AgentClient {
            $(
                #[doc = concat!("Calls `", $title, "` with a deadline. Cancelled, the guest may still do it.")]
                pub async fn $name(&self, request: v1::$request, deadline: Duration) -> Result<v1::$response, AgentError> {
                    let mut client = self.client.clone();
                    call($title, deadline, client.$name(request)).await
                }
            )*
        }
    };
}

unary! {
    configure_sandbox: "ConfigureSandbox", ConfigureSandboxRequest -> ConfigureSandboxResponse;
    forget: "Forget", ForgetRequest -> ForgetResponse;
    personalize: "Personalize", PersonalizeRequest -> PersonalizeResponse;
    write_volume: "WriteVolume", WriteVolumeRequest -> WriteVolumeResponse;
    create_container: "CreateContainer", CreateContainerRequest -> CreateContainerResponse;
    start_container: "StartContainer", StartContainerRequest -> StartContainerResponse;
    update_container: "UpdateContainer", UpdateContainerRequest -> UpdateContainerResponse;
    resize: "Resize", ResizeRequest -> ResizeResponse;
    grow_disk: "GrowDisk", GrowDiskRequest -> GrowDiskResponse;
    clock: "Clock", ClockRequest -> ClockResponse;
    pause: "Pause", PauseRequest -> PauseResponse;
    signal: "Signal", SignalRequest -> SignalResponse;
    remove_container: "RemoveContainer", RemoveContainerRequest -> RemoveContainerResponse;
    list_containers: "ListContainers", ListContainersRequest -> ListContainersResponse;
    resize_tty: "ResizeTty", ResizeTtyRequest -> ResizeTtyResponse;
    stats: "Stats", StatsRequest -> StatsResponse;
    shutdown: "Shutdown", ShutdownRequest -> ShutdownResponse;
}

#[cfg(test)]
mod tests;
