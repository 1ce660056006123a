//! The guest's end of the protocol: calls of one connection, each a task of its own.

use std::{marker::PhantomData, sync::Arc};

use bytes::{Buf, BufMut, BytesMut};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::broadcast::{self, error::RecvError},
};

use crate::{
    MAX_MESSAGE_SIZE,
    frames::{ConnectionError, Driver, Received, Shared, Side},
    status::Status,
    v1,
};

/// Calls that one connection may have open. More than all containers' streams and execs together.
const MAX_CALLS: usize = 2048;
/// A message's prefix: a byte that says that it is not compressed, and its length.
const PREFIX: usize = 5;

/// Messages of a call that come from the node.
#[derive(Debug)]
pub struct Requests<T> {
    shared: Shared,
    call: u32,
    buffer: BytesMut,
    kind: PhantomData<fn() -> T>,
}

impl<T: Message + Default> Requests<T> {
    /// The next message, or `None` when the node has no more. Cancelled, nothing is lost.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        loop {
            if let Some(message) = self.decode()? {
                return Ok(Some(message));
            }
            let received = std::future::poll_fn(|cx| self.shared.poll_receive(self.call, cx)).await;
            match received.map_err(|error| Status::cancelled(error.to_string()))? {
                Received::Bytes(bytes) if self.buffer.is_empty() => self.buffer = bytes,
                Received::Bytes(bytes) => self.buffer.extend_from_slice(&bytes),
                Received::End(_) if self.buffer.is_empty() => return Ok(None),
                Received::End(_) => return Err(Status::internal("the last message is cut off")),
            }
        }
    }

    /// The next message, which must be there.
    pub async fn expect(&mut self) -> Result<T, Status> {
        let message = self.message().await?;
        message.ok_or_else(|| Status::invalid_argument("no first message"))
    }

    fn decode(&mut self) -> Result<Option<T>, Status> {
        let Some(mut prefix) = self.buffer.get(..PREFIX) else {
            return Ok(None);
        };
        if prefix.get_u8() != 0 {
            return Err(Status::unimplemented("compressed messages are not taken"));
        }
        let length = usize::try_from(prefix.get_u32()).unwrap_or(usize::MAX);
        if length > MAX_MESSAGE_SIZE {
            return Err(Status::out_of_range(format!(
                "the message has {length} bytes, at most {MAX_MESSAGE_SIZE} are taken"
            )));
        }
        if self.buffer.len() < PREFIX + length {
            self.buffer.reserve(PREFIX + length - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(PREFIX);
        let message = T::decode(self.buffer.split_to(length));
        message
            .map(Some)
            .map_err(|error| Status::internal(format!("a message cannot be decoded: {error}")))
    }
}

/// Messages of a call that go to the node.
#[derive(Debug, Clone)]
pub struct Replies<T> {
    shared: Shared,
    call: u32,
    kind: PhantomData<fn(T)>,
}

impl<T: Message> Replies<T> {
    /// Tells the node that the call has begun, before there is anything to say.
    pub fn accept(&self) {
        self.shared.accept(self.call);
    }

    /// Sends a message when there is room for it. Fails when the call has ended.
    pub async fn send(&self, message: &T) -> Result<(), Status> {
        // What is sent is not limited here: the node has its own limit, and the fake lies on purpose.
        let length = message.encoded_len();
        let mut bytes = BytesMut::with_capacity(PREFIX + length);
        bytes.put_u8(0);
        bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        message.encode_raw(&mut bytes);
        self.shared.send(self.call, bytes.freeze()).await?;
        self.shared.flush();
        Ok(())
    }
}

impl Replies<v1::Event> {
    /// Answers a call of `Events`: accepts it, and passes states on until their source ends.
    pub async fn follow(
        &self,
        mut events: broadcast::Receiver<v1::ContainerState>,
    ) -> Result<(), Status> {
        self.accept();
        loop {
            let event = match events.recv().await {
                Ok(state) => v1::event::Event::Container(state),
                // The caller lists and subscribes again.
                Err(RecvError::Lagged(_)) => return Err(Status::data_loss("events were missed")),
                Err(RecvError::Closed) => return Ok(()),
            };
            self.send(&v1::Event { event: Some(event) }).await?;
        }
    }
}

/// One call, not yet of any type.
struct Call {
    shared: Shared,
    number: u32,
}

impl Call {
    fn requests<T>(&self) -> Requests<T> {
        Requests {
            shared: self.shared.clone(),
            call: self.number,
            buffer: BytesMut::new(),
            kind: PhantomData,
        }
    }

    fn replies<T>(&self) -> Replies<T> {
        Replies {
            shared: self.shared.clone(),
            call: self.number,
            kind: PhantomData,
        }
    }
}

/// The trait of agents and the way from a method's name to it. A call with one message in a direction has
/// that; another has `stream`. A handler is dropped with its call: when the node leaves it, or the connection ends.
macro_rules! agent {
    (@request $call:ident stream $request:ident) => { $call.requests::<v1::$request>() };
    (@request $call:ident one $request:ident) => { $call.requests::<v1::$request>().expect().await? };
    (@type stream $request:ident) => { Requests<v1::$request> };
    (@type one $request:ident) => { v1::$request };
    (
        one { $($unary:ident $name:literal ($kind:ident $request:ident) -> $response:ident;)* }
        stream { $($streaming:ident $title:literal ($input:ident $inputs:ident) -> $outputs:ident;)* }
    ) => {
        /// What an agent does: the service of `proto/agent.proto`.
        #[allow(missing_docs, reason = "the .proto file holds the documentation")]
        pub trait Agent: Send + Sync + 'static {
            /// Hears of a call that is part of a trace, before it begins.
            fn traced(&self, _method: &str, _traceparent: &str) {}

            $(fn $unary(&self, request: agent!(@type $kind $request)) -> impl Future<Output = Result<v1::$response, Status>> + Send;)*
            $(fn $streaming(&self, request: agent!(@type $input $inputs), replies: Replies<v1::$outputs>) -> impl Future<Output = Result<(), Status>> + Send;)*
        }

        async fn dispatch<A: Agent>(agent: &A, method: &str, call: &Call) -> Result<(), Status> {
            let method = match method.split_once(' ') {
                Some((method, traceparent)) => {
                    agent.traced(method, traceparent);
                    method
                }
                None => method,
            };
            match method {
                $($name => {
                    // On the heap: the largest handler would be the size of every call.
                    let work = async {
                        let request = agent!(@request call $kind $request);
                        let reply = agent.$unary(request).await?;
                        call.replies().send(&reply).await
                    };
                    Box::pin(work).await
                })*
                $($title => {
                    let work = async {
                        let request = agent!(@request call $input $inputs);
                        agent.$streaming(request, call.replies()).await
                    };
                    Box::pin(work).await
                })*
                _ => Err(Status::unimplemented(format!("there is no method {}", method.escape_debug()))),
            }
        }
    };
}

agent! {
    one {
        hello "Hello" (one HelloRequest) -> HelloResponse;
        configure_sandbox "ConfigureSandbox" (one ConfigureSandboxRequest) -> ConfigureSandboxResponse;
        forget "Forget" (one ForgetRequest) -> ForgetResponse;
        personalize "Personalize" (one PersonalizeRequest) -> PersonalizeResponse;
        write_volume "WriteVolume" (one WriteVolumeRequest) -> WriteVolumeResponse;
        create_container "CreateContainer" (one CreateContainerRequest) -> CreateContainerResponse;
        start_container "StartContainer" (one StartContainerRequest) -> StartContainerResponse;
        update_container "UpdateContainer" (one UpdateContainerRequest) -> UpdateContainerResponse;
        grow_disk "GrowDisk" (one GrowDiskRequest) -> GrowDiskResponse;
        resize "Resize" (one ResizeRequest) -> ResizeResponse;
        clock "Clock" (one ClockRequest) -> ClockResponse;
        pause "Pause" (one PauseRequest) -> PauseResponse;
        signal "Signal" (one SignalRequest) -> SignalResponse;
        remove_container "RemoveContainer" (one RemoveContainerRequest) -> RemoveContainerResponse;
        list_containers "ListContainers" (one ListContainersRequest) -> ListContainersResponse;
        stdin "Stdin" (stream StdinChunk) -> StdinResponse;
        resize_tty "ResizeTty" (one ResizeTtyRequest) -> ResizeTtyResponse;
        stats "Stats" (one StatsRequest) -> StatsResponse;
        shutdown "Shutdown" (one ShutdownRequest) -> ShutdownResponse;
    }
    stream {
        events "Events" (one EventsRequest) -> Event;
        output "Output" (stream OutputAck) -> OutputChunk;
        exec "Exec" (stream ExecInput) -> ExecOutput;
        forward "Forward" (stream ForwardChunk) -> ForwardChunk;
    }
}

/// Serves a session until its stream ends. Handlers of open calls are dropped with it.
pub async fn serve<S, A>(stream: S, agent: A) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Agent,
{
    let shared = Shared::new(Side::Guest);
    let agent = Arc::new(agent);
    let begin = |number, method: String| {
        let full = shared.open() >= MAX_CALLS;
        shared.enter(number);
        let (agent, shared) = (agent.clone(), shared.clone());
        if full {
            let refusal = Status::resource_exhausted("too many calls are open");
            return shared.conclude(number, &Err(refusal));
        }
        let call = Call {
            shared: shared.clone(),
            number,
        };
        let task = tokio::spawn(async move {
            let result = dispatch(&*agent, &method, &call).await;
            call.shared.conclude(number, &result);
        });
        shared.attend(number, task.abort_handle());
    };
    Driver::new(shared.clone()).run(stream, begin).await
}
