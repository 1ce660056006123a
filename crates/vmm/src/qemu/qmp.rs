//! A QMP session: commands with deadlines, descriptors passed along, events fanned out.
//!
//! Written against QEMU's `docs/interop/qmp-spec`: one JSON object per line, an answer carries the
//! command's `id`, events come in between. The peer is the VMM, which a hostile guest may have
//! taken over: lines are bounded, unknown answers ignored, silence ends in a time-out.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot, watch},
    task::JoinSet,
    time::timeout,
};

/// The longest line that is read: answers to our few commands are some kilobytes.
const MAX_LINE: usize = 1 << 20;

/// An event of the VMM.
#[derive(Debug, Clone)]
pub(crate) struct QmpEvent {
    pub(crate) name: String,
    pub(crate) data: Value,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("{desc}")]
    Refused { class: String, desc: String },
    #[error("the control connection is closed")]
    Closed,
    #[error("no answer")]
    Timeout(Duration),
    #[error("unexpected answer: {0}")]
    Protocol(String),
}

impl QmpError {
    /// Whether the command named something that is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        match self {
            Self::Refused { class, desc } => {
                class == "DeviceNotFound"
                    || desc.starts_with("Failed to find node")
                    || desc.contains("not found")
            }
            _ => false,
        }
    }
}

#[derive(Debug, Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
    id: Option<u64>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

type Answer = Result<Value, QmpError>;

#[derive(Debug)]
struct Request {
    line: Vec<u8>,
    fd: Option<OwnedFd>,
}

#[derive(Debug, Default)]
struct Shared {
    /// `None` once the connection is closed: nobody may wait any more.
    pending: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
}

impl Shared {
    fn with<T>(
        &self,
        f: impl FnOnce(&mut Option<HashMap<u64, oneshot::Sender<Answer>>>) -> T,
    ) -> T {
        f(&mut self.pending.lock().expect("no holder of this lock panics"))
    }
}

/// An open session. Dropping it closes the connection; the VM runs on.
#[derive(Debug)]
pub(crate) struct Qmp {
    requests: mpsc::Sender<Request>,
    shared: Arc<Shared>,
    events: broadcast::Sender<QmpEvent>,
    closed: watch::Receiver<bool>,
    next: AtomicU64,
    deadline: Duration,
    _tasks: JoinSet<()>,
}

impl Qmp {
    /// Negotiates on a fresh connection; whoever calls bounds the time until the VMM greets.
    /// `deadline` is for each command. `on_event` sees every event, in order, before anybody who
    /// subscribed.
    pub(crate) async fn start(
        stream: UnixStream,
        deadline: Duration,
        on_event: impl Fn(&QmpEvent) + Send + 'static,
    ) -> Result<Self, QmpError> {
        let stream = Arc::new(stream);
        let shared = Arc::new(Shared {
            pending: Mutex::new(Some(HashMap::new())),
        });
        let (events, _) = broadcast::channel(64);
        let (requests, queue) = mpsc::channel(16);
        let (greeted, greeting) = oneshot::channel();
        let (close, closed) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let reader = Reader {
            stream: Arc::clone(&stream),
            shared: Arc::clone(&shared),
            events: events.clone(),
            greeted: Some(greeted),
            on_event: Box::new(on_event),
        };
        tasks.spawn(async move {
            reader.run().await;
            close.send_replace(true);
        });
        tasks.spawn(write(stream, queue));
        let next = AtomicU64::new(1);
        let qmp = Self {
            requests,
            shared,
            events,
            closed,
            next,
            deadline,
            _tasks: tasks,
        };
        greeting.await.map_err(|_gone| QmpError::Closed)?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command.
    pub(crate) async fn execute(&self, command: &str, arguments: Value) -> Answer {
        self.send(command, arguments, None).await
    }

    /// Runs a command that a descriptor goes with.
    pub(crate) async fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: OwnedFd,
    ) -> Answer {
        self.send(command, arguments, Some(fd)).await
    }

    async fn send(&self, command: &str, arguments: Value, fd: Option<OwnedFd>) -> Answer {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let (answer, answered) = oneshot::channel();
        let registered = self.shared.with(|pending| {
            pending
                .as_mut()
                .map(|pending| pending.insert(id, answer))
                .is_some()
        });
        if !registered {
            return Err(QmpError::Closed);
        }
        let work = async {
            let request = Request {
                line: line.into_bytes(),
                fd,
            };
            self.requests
                .send(request)
                .await
                .map_err(|_cause| QmpError::Closed)?;
            answered.await.unwrap_or(Err(QmpError::Closed))
        };
        let result = timeout(self.deadline, work).await;
        self.shared
            .with(|pending| pending.as_mut().map(|pending| pending.remove(&id)));
        result.unwrap_or(Err(QmpError::Timeout(self.deadline)))
    }

    /// Events from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }

    /// Waits until the VMM has closed the connection and everything it sent is read.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut closed = self.closed.clone();
        async move {
            // An error means that the reader is gone, which is the same.
            drop(closed.wait_for(|closed| *closed).await);
        }
    }
}

async fn write(stream: Arc<UnixStream>, mut queue: mpsc::Receiver<Request>) {
    while let Some(Request { line, fd }) = queue.recv().await {
        let mut rest = line.as_slice();
        let mut fd = fd;
        while !rest.is_empty() {
            let sent = stream
                .async_io(Interest::WRITABLE, || send_some(&stream, rest, fd.as_ref()))
                .await;
            match sent {
                Ok(count) => rest = &rest[count..],
                // The reader sees the same and reports it.
                Err(_) => return,
            }
            fd = None;
        }
    }
}

fn send_some(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    Ok(sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

struct Reader {
    stream: Arc<UnixStream>,
    shared: Arc<Shared>,
    events: broadcast::Sender<QmpEvent>,
    greeted: Option<oneshot::Sender<()>>,
    on_event: Box<dyn Fn(&QmpEvent) + Send>,
}

impl Reader {
    async fn run(mut self) {
        if let Err(e) = self.read().await {
            tracing::debug!(error = %e, "control connection ended");
        }
        // Drops the senders: every waiting command learns that there will be no answer.
        self.shared.with(Option::take);
    }

    async fn read(&mut self) -> io::Result<()> {
        let mut buffer = Vec::new();
        let mut chunk = vec![0; 16 * 1024];
        loop {
            self.stream.readable().await?;
            let count = match self.stream.try_read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e),
            };
            let seen = buffer.len();
            buffer.extend_from_slice(&chunk[..count]);
            let mut done = 0;
            while let Some(end) = buffer[done.max(seen)..].iter().position(|b| *b == b'\n') {
                let end = done.max(seen) + end;
                self.line(&buffer[done..end]);
                done = end + 1;
            }
            buffer.drain(..done);
            if buffer.len() > MAX_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
            }
        }
    }

    fn line(&mut self, text: &[u8]) {
        let Ok(line) = serde_json::from_slice::<Line>(text) else {
            tracing::debug!("unreadable line on the control connection");
            return;
        };
        if let Some(name) = line.event {
            let event = QmpEvent {
                name,
                data: line.data,
            };
            (self.on_event)(&event);
            // No subscriber is no error.
            drop(self.events.send(event));
        } else if line.greeting.is_some() {
            if let Some(greeted) = self.greeted.take() {
                greeted.send(()).ok();
            }
        } else if let Some(id) = line.id {
            let answer = match line.error {
                Some(Refusal { class, desc }) => Err(QmpError::Refused { class, desc }),
                None => line
                    .returned
                    .ok_or_else(|| QmpError::Protocol("empty".to_owned())),
            };
            let waiting = self.shared.with(|pending| pending.as_mut()?.remove(&id));
            if let Some(waiting) = waiting {
                // The command may have given up a moment ago.
                drop(waiting.send(answer));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

    async fn session(
        script: impl AsyncFnOnce(&mut BufReader<UnixStream>),
        deadline: Duration,
    ) -> (Result<Qmp, QmpError>, BufReader<UnixStream>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut peer = BufReader::new(theirs);
        let (qmp, ()) = tokio::join!(Qmp::start(ours, deadline, |_| {}), script(&mut peer));
        (qmp, peer)
    }

    async fn say(peer: &mut BufReader<UnixStream>, text: &str) {
        peer.get_mut().write_all(text.as_bytes()).await.unwrap();
    }

    async fn hear(peer: &mut BufReader<UnixStream>) -> Value {
        let mut line = String::new();
        peer.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn open() -> (Qmp, BufReader<UnixStream>) {
        let greet = async |peer: &mut BufReader<UnixStream>| {
            say(peer, GREETING).await;
            let asked = hear(peer).await;
            assert_eq!(asked["execute"], "qmp_capabilities");
            say(
                peer,
                &format!("{{\"return\": {{}}, \"id\": {}}}\n", asked["id"]),
            )
            .await;
        };
        let (qmp, peer) = session(greet, Duration::from_secs(5)).await;
        (qmp.unwrap(), peer)
    }

    #[tokio::test]
    async fn answers_find_their_command_and_events_their_reader() {
        let (qmp, mut peer) = open().await;
        let mut events = qmp.subscribe();
        let script = async {
            let first = hear(&mut peer).await;
            let second = hear(&mut peer).await;
            let text = format!(
                "{{\"event\": \"STOP\", \"data\": {{\"x\": 1}}, \"timestamp\": {{}}}}\nnonsense\n\
                 {{\"id\": 999, \"return\": 0}}\n\
                 {{\"id\": {}, \"error\": {{\"class\": \"GenericError\", \"desc\": \"no\"}}}}\n\
                 {{\"id\": {}, \"return\": 7}}\n",
                second["id"], first["id"]
            );
            // In two pieces, cut inside a line.
            say(&mut peer, &text[..20]).await;
            tokio::task::yield_now().await;
            say(&mut peer, &text[20..]).await;
        };
        let (one, two, ()) = tokio::join!(
            qmp.execute("one", json!({})),
            qmp.execute("two", json!({})),
            script
        );
        assert_eq!(one.unwrap(), 7);
        assert!(matches!(two, Err(QmpError::Refused { desc, .. }) if desc == "no"));
        let event = events.recv().await.unwrap();
        assert_eq!((event.name.as_str(), &event.data["x"]), ("STOP", &json!(1)));
    }

    #[tokio::test]
    async fn a_closed_connection_ends_waiting_commands() {
        let (qmp, mut peer) = open().await;
        let script = async move {
            hear(&mut peer).await;
            drop(peer);
        };
        let (answer, ()) = tokio::join!(qmp.execute("x", json!({})), script);
        assert!(matches!(answer, Err(QmpError::Closed)));
        qmp.closed().await;
        assert!(matches!(
            qmp.execute("y", json!({})).await,
            Err(QmpError::Closed)
        ));
    }

    #[tokio::test]
    async fn an_endless_line_is_cut_off() {
        let (qmp, mut peer) = open().await;
        let flood = async {
            while peer.get_mut().write_all(&[b'x'; 65536]).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = qmp.closed() => {}
            () = flood => {}
        }
        qmp.closed().await;
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_timeout() {
        let greet = async |peer: &mut BufReader<UnixStream>| say(peer, GREETING).await;
        let (qmp, _peer) = session(greet, Duration::from_secs(3)).await;
        assert!(matches!(qmp, Err(QmpError::Timeout(_))));
    }

    #[tokio::test]
    async fn descriptors_travel() {
        let (qmp, peer) = open().await;
        let (read, write) = rustix::pipe::pipe().unwrap();
        let script = async {
            let stream = peer.get_ref();
            stream.readable().await.unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 4096];
            let mut iov = [io::IoSliceMut::new(&mut bytes)];
            rustix::net::recvmsg(
                stream,
                &mut iov,
                &mut control,
                rustix::net::RecvFlags::empty(),
            )
            .unwrap();
            let fds: Vec<OwnedFd> = control
                .drain()
                .flat_map(|message| match message {
                    rustix::net::RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
                    _ => Vec::new(),
                })
                .collect();
            assert_eq!(fds.len(), 1);
            rustix::io::write(&fds[0], b"!").unwrap();
        };
        tokio::select! {
            _ = qmp.execute_with_fd("add-fd", json!({}), write) => {}
            () = script => {}
        }
        let mut byte = [0; 1];
        rustix::io::read(&read, &mut byte).unwrap();
        assert_eq!(&byte, b"!");
    }
}
