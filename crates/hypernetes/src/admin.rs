//! The operator's socket: what only the running daemon knows or can do.
//!
//! One JSON request a connection, one JSON answer. The socket is in the state directory and belongs
//! to the daemon's user alone.

use std::{
    collections::HashSet,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, bail};
use hypernetes_runtime::{PodRuntime, SandboxStatus};
use hypernetes_store::{Revision, Store};
use hypernetes_types::{Digest, SandboxId};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::debug;

/// Longest request and answer.
const MAX_MESSAGE: u64 = 4 << 20;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// Ids of images that containers use.
    ImagesInUse,
    /// Copy the API's state into a new file.
    Backup { path: PathBuf },
    /// What is on a pod's console.
    Console { pod: String },
    /// A program in a pod's VM. The answer is [`Answer::Started`], and frames follow both ways.
    GuestExec(GuestExec),
}

/// A program to run in a pod's VM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct GuestExec {
    pub(crate) pod: String,
    pub(crate) container: Option<String>,
    pub(crate) command: Vec<String>,
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    ImagesInUse(HashSet<Digest>),
    Backup(Revision),
    Console(String),
    Started,
    Failed(String),
}

/// What requests are done with.
#[derive(Clone)]
pub(crate) struct Backend {
    pub(crate) runtime: Arc<dyn PodRuntime>,
    pub(crate) store: Store,
    /// Whether programs may be run in pods' VMs.
    pub(crate) guest_exec: bool,
}

impl Backend {
    async fn handle(&self, request: Request) -> Result<Answer> {
        match request {
            Request::ImagesInUse => {
                let containers = self.runtime.list_containers(None).await;
                let ids = containers
                    .iter()
                    .filter_map(|container| container.image_id.parse().ok());
                Ok(Answer::ImagesInUse(ids.collect()))
            }
            Request::Console { pod } => {
                let sandbox = find(&self.runtime.list_sandboxes().await, &pod)?;
                Ok(Answer::Console(self.runtime.console(&sandbox).await?))
            }
            Request::GuestExec(_) => bail!("a program in a VM needs a connection of its own"),
            Request::Backup { path } => {
                if path.exists() {
                    bail!("{} exists already", path.display());
                }
                let store = self.store.clone();
                Ok(Answer::Backup(
                    tokio::task::spawn_blocking(move || store.backup(&path)).await??,
                ))
            }
        }
    }
}

/// The sandbox that is meant by the beginning of its id, or by NAMESPACE/NAME.
pub(crate) fn find(all: &[SandboxStatus], pod: &str) -> Result<SandboxId> {
    let matches = |status: &&SandboxStatus| match pod.split_once('/') {
        Some((namespace, name)) => {
            let metadata = &status.config.metadata;
            metadata.namespace == namespace && metadata.name == name
        }
        None => !pod.is_empty() && status.id.as_str().starts_with(pod),
    };
    let mut found: Vec<_> = all.iter().filter(matches).collect();
    // Of a pod that was made anew the latest one is meant.
    found.sort_by_key(|status| status.created_unix_nanos);
    match found.as_slice() {
        [] => bail!("no pod {pod:?} is on this node"),
        [.., last] if pod.contains('/') || found.len() == 1 => Ok(last.id.clone()),
        several => bail!("{pod:?} is the beginning of {} ids", several.len()),
    }
}

/// Serves the socket until `stop`.
pub(crate) async fn serve(path: &Path, backend: Backend, stop: CancellationToken) -> Result<()> {
    remove(path);
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let backend = backend.clone();
                connections.spawn(async move {
                    if let Err(error) = answer(stream, &backend).await {
                        tracing::debug!(%error, "operator's connection ended");
                    }
                });
            }
            Err(error) => warn!(%error, "cannot accept on the operator's socket"),
        }
    }
    connections.shutdown().await;
    remove(path);
    Ok(())
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        warn!(%error, path = %path.display(), "cannot remove the operator's socket");
    }
}

async fn answer(mut stream: UnixStream, backend: &Backend) -> Result<()> {
    let request = read(&mut stream).await?;
    let answer = match serde_json::from_str(&request) {
        Ok(Request::GuestExec(wanted)) => {
            let peer = stream.peer_cred()?;
            match debug::start(backend, &wanted, &peer).await {
                Ok(session) => {
                    write(&mut stream, &Answer::Started).await?;
                    return debug::carry(stream, session).await;
                }
                Err(error) => Answer::Failed(format!("{error:#}")),
            }
        }
        Ok(request) => match backend.handle(request).await {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(format!("{error:#}")),
        },
        Err(error) => Answer::Failed(format!("bad request: {error}")),
    };
    write(&mut stream, &answer).await
}

/// One line and not a byte more: frames may follow it.
async fn read(stream: &mut UnixStream) -> Result<String> {
    let mut line = Vec::new();
    let mut stream = BufReader::with_capacity(1, stream.take(MAX_MESSAGE));
    stream.read_until(b'\n', &mut line).await?;
    Ok(String::from_utf8(line)?)
}

async fn write(stream: &mut UnixStream, message: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec(message)?;
    text.push(b'\n');
    Ok(stream.write_all(&text).await?)
}

/// Asks the daemon; `None` if none is running.
async fn ask(path: &Path, request: &Request) -> Result<Option<Answer>> {
    let Ok(mut stream) = UnixStream::connect(path).await else {
        return Ok(None);
    };
    write(&mut stream, request).await?;
    let text = read(&mut stream).await?;
    match serde_json::from_str(&text).context("the daemon ended before it answered")? {
        Answer::Failed(message) => Err(anyhow!(message)),
        answer => Ok(Some(answer)),
    }
}

/// Has a program run in a pod's VM; the connection that its frames go over.
pub(crate) async fn guest_exec(path: &Path, wanted: GuestExec) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(path)
        .await
        .with_context(|| format!("no daemon answers on {}", path.display()))?;
    write(&mut stream, &Request::GuestExec(wanted)).await?;
    let text = read(&mut stream).await?;
    match serde_json::from_str(&text).context("the daemon ended before it answered")? {
        Answer::Started => Ok(stream),
        Answer::Failed(message) => Err(anyhow!(message)),
        other => bail!("the daemon answered something else: {other:?}"),
    }
}

/// Images that containers use; none if no daemon runs.
pub(crate) async fn images_in_use(path: &Path) -> Result<HashSet<Digest>> {
    match ask(path, &Request::ImagesInUse).await? {
        Some(Answer::ImagesInUse(ids)) => Ok(ids),
        Some(other) => bail!("the daemon answered something else: {other:?}"),
        None => Ok(HashSet::new()),
    }
}

/// What is on a pod's console.
pub(crate) async fn console(path: &Path, pod: String) -> Result<String> {
    match ask(path, &Request::Console { pod }).await? {
        Some(Answer::Console(text)) => Ok(text),
        Some(other) => bail!("the daemon answered something else: {other:?}"),
        None => bail!("no daemon answers on {}", path.display()),
    }
}

/// Has the daemon copy its state; the revision of the copy.
pub(crate) async fn backup(path: &Path, file: PathBuf) -> Result<Revision> {
    match ask(path, &Request::Backup { path: file }).await? {
        Some(Answer::Backup(revision)) => Ok(revision),
        Some(other) => bail!("the daemon answered something else: {other:?}"),
        None => bail!("no daemon answers on {}", path.display()),
    }
}
