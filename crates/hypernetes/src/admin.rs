//! The operator's socket: what the running daemon does for the command line.
//!
//! One JSON request a connection, then JSON events a line each, the last of them `done` or `failed`.
//! The socket is in the state directory and belongs to the daemon's user alone. Without a daemon the
//! command line does the same work itself, under the state directory's lock.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use hypernetes_image::{Credentials, ImageStore, PullEvent, PullOptions};
use hypernetes_store::Store;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Longest request.
const MAX_REQUEST: u64 = 64 << 10;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Fetch an image; `credentials` is `user:password`.
    ImagePull { reference: String, credentials: Option<String>, insecure: Vec<String> },
    /// Load images from a file or directory of this machine.
    ImageLoad { path: PathBuf },
    /// All images.
    ImageList,
    /// Some images.
    ImageInspect { images: Vec<String> },
    /// Remove images.
    ImageRemove { images: Vec<String> },
    /// Copy the API's state into a new file.
    Backup { path: PathBuf },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Event {
    /// A pull goes on.
    Progress(PullEvent),
    /// The result.
    Done(Value),
    /// Why there is none.
    Failed(String),
}

/// What requests are done with.
#[derive(Clone)]
pub(crate) struct Backend {
    pub(crate) images: Arc<ImageStore>,
    /// Absent when the command line works without a daemon.
    pub(crate) store: Option<Store>,
    /// Image ids that pods use.
    pub(crate) in_use: Arc<dyn Fn() -> Vec<String> + Send + Sync>,
}

impl Backend {
    /// Does one request; progress goes to `events`.
    pub(crate) async fn handle(
        &self,
        request: Request,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<Value> {
        match request {
            Request::ImagePull { reference, credentials, insecure } => {
                let reference = reference.parse()?;
                let credentials = match credentials {
                    None => Credentials::Anonymous,
                    Some(text) => {
                        let (username, password) =
                            text.split_once(':').context("credentials must be user:password")?;
                        Credentials::Basic { username: username.into(), password: password.into() }
                    }
                };
                let options = PullOptions {
                    credentials,
                    insecure_registries: insecure,
                    progress: Some(Arc::new(move |event| {
                        // A client that has gone does not stop the pull.
                        drop(events.send(Event::Progress(event)));
                    })),
                    ..PullOptions::default()
                };
                let image = self.images.pull(&reference, &options).await?;
                Ok(serde_json::to_value(image)?)
            }
            Request::ImageLoad { path } => Ok(serde_json::to_value(self.images.load(&path).await?)?),
            Request::ImageList => Ok(serde_json::to_value(self.images.list())?),
            Request::ImageInspect { images } => {
                let found: Result<Vec<_>> = images
                    .iter()
                    .map(|name| {
                        self.images.get(name).with_context(|| format!("image {name} not found"))
                    })
                    .collect();
                Ok(serde_json::to_value(found?)?)
            }
            Request::ImageRemove { images } => {
                let in_use = (self.in_use)();
                let mut removed = Vec::new();
                for name in images {
                    removed.push(self.images.remove(&name, &in_use).await?);
                }
                Ok(serde_json::to_value(removed)?)
            }
            Request::Backup { path } => {
                let Some(store) = self.store.clone() else {
                    bail!("a backup needs the running daemon");
                };
                if path.exists() {
                    bail!("{} exists already", path.display());
                }
                let revision =
                    tokio::task::spawn_blocking(move || store.backup(&path)).await??;
                Ok(serde_json::json!({"revision": revision}))
            }
        }
    }
}

/// Serves the socket until `stop`.
pub(crate) async fn serve(path: &Path, backend: Backend, stop: CancellationToken) -> Result<()> {
    drop(std::fs::remove_file(path));
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
                    if let Err(error) = answer(stream, backend).await {
                        debug!(%error, "operator's connection ended");
                    }
                });
            }
            Err(error) => warn!(%error, "cannot accept on the operator's socket"),
        }
    }
    connections.shutdown().await;
    drop(std::fs::remove_file(path));
    Ok(())
}

async fn answer(stream: UnixStream, backend: Backend) -> Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(MAX_REQUEST)).read_line(&mut line).await?;
    let (events, mut queue) = mpsc::unbounded_channel();
    let work = async {
        match serde_json::from_str(&line) {
            Ok(request) => match backend.handle(request, events.clone()).await {
                Ok(value) => Event::Done(value),
                Err(error) => Event::Failed(format!("{error:#}")),
            },
            Err(error) => Event::Failed(format!("bad request: {error}")),
        }
    };
    tokio::pin!(work);
    loop {
        let (event, last) = tokio::select! {
            biased;
            Some(event) = queue.recv() => (event, false),
            event = &mut work => (event, true),
        };
        let mut text = serde_json::to_vec(&event)?;
        text.push(b'\n');
        write.write_all(&text).await?;
        if last {
            return Ok(());
        }
    }
}

/// Asks the daemon; `None` if none is running.
pub(crate) async fn ask(
    path: &Path,
    request: &Request,
    mut progress: impl FnMut(PullEvent),
) -> Result<Option<Value>> {
    let Ok(stream) = UnixStream::connect(path).await else { return Ok(None) };
    let (read, mut write) = stream.into_split();
    let mut text = serde_json::to_vec(request)?;
    text.push(b'\n');
    write.write_all(&text).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str(&line)? {
            Event::Progress(event) => progress(event),
            Event::Done(value) => return Ok(Some(value)),
            Event::Failed(message) => bail!(message),
        }
    }
    bail!("the daemon ended before it answered")
}
