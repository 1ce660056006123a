//! Exec, attach, port-forward and logs of the node's pods.

use std::sync::Arc;

use async_trait::async_trait;
use futures::FutureExt as _;
use hypernetes_runtime::{
    ContainerState, ContainerStatus, ExecConfig, Output as RuntimeOutput, PodRuntime, RuntimeError,
    SandboxState, Session, TtySize as RuntimeTtySize,
};
use hypernetes_streaming::{
    Duplex, LogRequest, LogStream, Output, PodStreams, ProcessRequest, ProcessSession, StreamError,
    Target, TtySize,
};
use hypernetes_telemetry::chain;
use tokio::sync::{mpsc, oneshot};

use crate::{
    logs::{self, StillRuns},
    worker::{Board, lock},
};

/// Pieces of output that wait for a slow client.
const QUEUE: usize = 16;

pub(crate) struct Streams {
    pub(crate) runtime: Arc<dyn PodRuntime>,
    pub(crate) board: Board,
}

impl Streams {
    /// Records of the container, newest first.
    async fn records(&self, target: &Target) -> Vec<ContainerStatus> {
        let mut found = Vec::new();
        for sandbox in self.runtime.list_sandboxes().await {
            let meta = &sandbox.config.metadata;
            let same = meta.namespace == target.namespace && meta.name == target.pod;
            if !same || meta.uid != target.uid {
                continue;
            }
            for record in self.runtime.list_containers(Some(&sandbox.id)).await {
                if record.config.name == target.container {
                    found.push((meta.attempt, record));
                }
            }
        }
        found.sort_by_key(|(sandbox, record)| std::cmp::Reverse((*sandbox, record.config.attempt)));
        found.into_iter().map(|(_, record)| record).collect()
    }

    async fn running(&self, target: &Target) -> Result<ContainerStatus, StreamError> {
        let newest = self.records(target).await.into_iter().next();
        newest
            .filter(|record| record.state == ContainerState::Running)
            .ok_or_else(|| {
                StreamError::NotFound(format!("container not found (\"{}\")", target.container))
            })
    }

    /// Why the container has no log, in upstream's words.
    fn waits(&self, target: &Target) -> StreamError {
        let board = lock(&self.board);
        let status = board.get(&target.uid);
        let containers = status.iter().flat_map(|status| {
            status
                .container_statuses
                .iter()
                .chain(&status.init_container_statuses)
                .flatten()
        });
        let reason = containers
            .filter(|status| status.name == target.container)
            .find_map(|status| status.state.as_ref()?.waiting.as_ref()?.reason.clone());
        let (container, pod) = (&target.container, &target.pod);
        match reason {
            Some(reason) if reason.contains("Image") => StreamError::Invalid(format!(
                "container \"{container}\" in pod \"{pod}\" is waiting to start: trying and failing to pull image"
            )),
            Some(reason) => StreamError::Invalid(format!(
                "container \"{container}\" in pod \"{pod}\" is waiting to start: {reason}"
            )),
            None => StreamError::Invalid(format!(
                "container \"{container}\" in pod \"{pod}\" is waiting to start: ContainerCreating"
            )),
        }
    }
}

fn stream_error(error: &RuntimeError) -> StreamError {
    let message = chain(error).to_string();
    match error {
        RuntimeError::NotFound { .. } => StreamError::NotFound(message),
        RuntimeError::State { .. } | RuntimeError::Paused(_) | RuntimeError::Invalid { .. } => {
            StreamError::Invalid(message)
        }
        _ => StreamError::Internal(message),
    }
}

/// Joins a runtime's session to a client's. The tasks end with either side.
fn bridge(session: Session, request: &ProcessRequest) -> ProcessSession {
    let Session {
        stdin,
        output: mut from,
        resize,
        exit,
    } = session;
    let (to, output) = mpsc::channel(QUEUE);
    let (want_stdout, want_stderr) = (request.stdout, request.stderr);
    let (exit_to, exit_from) = oneshot::channel();
    tokio::spawn(async move {
        loop {
            let piece = tokio::select! {
                piece = from.recv() => piece,
                // Dropping the session ends an exec: its client has gone.
                () = to.closed() => return,
            };
            let piece = match piece {
                Some(RuntimeOutput::Stdout(bytes)) if want_stdout => Output::Stdout(bytes),
                Some(RuntimeOutput::Stderr(bytes)) if want_stderr => Output::Stderr(bytes),
                Some(_unwanted) => continue,
                None => break,
            };
            if to.send(piece).await.is_err() {
                return;
            }
        }
        drop(to);
        let mut exit_to = exit_to;
        let code = tokio::select! {
            code = exit => code,
            () = exit_to.closed() => return,
        };
        let code = match code {
            Ok(Ok(code)) => Ok(code),
            Ok(Err(error)) => Err(stream_error(&error)),
            Err(_closed) => Err(StreamError::Internal("the process was lost".to_owned())),
        };
        // The client may have gone in this moment; then nobody wants the code.
        drop(exit_to.send(code));
    });
    let resize = resize.map(|to| {
        let (sender, mut sizes) = mpsc::channel::<TtySize>(4);
        tokio::spawn(async move {
            while let Some(size) = sizes.recv().await {
                let size = RuntimeTtySize {
                    width: size.width,
                    height: size.height,
                };
                if to.send(size).await.is_err() {
                    return;
                }
            }
        });
        sender
    });
    ProcessSession {
        stdin,
        output,
        resize,
        exit: exit_from,
    }
}

#[async_trait]
impl PodStreams for Streams {
    async fn exec(
        &self,
        target: &Target,
        request: ProcessRequest,
    ) -> Result<ProcessSession, StreamError> {
        let container = self.running(target).await?;
        let config = ExecConfig {
            command: request.command.clone(),
            tty: request.tty,
            stdin: request.stdin,
        };
        let session = self
            .runtime
            .exec(&container.id, config)
            .await
            .map_err(|error| stream_error(&error))?;
        Ok(bridge(session, &request))
    }

    async fn attach(
        &self,
        target: &Target,
        request: ProcessRequest,
    ) -> Result<ProcessSession, StreamError> {
        let container = self.running(target).await?;
        let stdin = request.stdin && container.config.stdin;
        if request.tty != container.config.tty {
            return Err(StreamError::Invalid(format!(
                "container {} was {} a TTY",
                target.container,
                if container.config.tty {
                    "started with"
                } else {
                    "not started with"
                }
            )));
        }
        let session = self
            .runtime
            .attach_first(&container.id, stdin)
            .await
            .map_err(|error| stream_error(&error))?;
        Ok(bridge(session, &request))
    }

    async fn port_forward(
        &self,
        target: &Target,
        port: u16,
    ) -> Result<Box<dyn Duplex>, StreamError> {
        let sandbox = self
            .runtime
            .list_sandboxes()
            .await
            .into_iter()
            .filter(|sandbox| {
                sandbox.config.metadata.uid == target.uid && sandbox.state == SandboxState::Ready
            })
            .max_by_key(|sandbox| sandbox.config.metadata.attempt)
            .ok_or_else(|| StreamError::NotFound(format!("pod {} is not running", target.pod)))?;
        let connection = self
            .runtime
            .port_forward(&sandbox.id, port)
            .await
            .map_err(|error| stream_error(&error))?;
        Ok(Box::new(connection))
    }

    async fn logs(&self, target: &Target, request: LogRequest) -> Result<LogStream, StreamError> {
        let records = self.records(target).await;
        let record = if request.previous {
            records.get(1)
        } else {
            records.first()
        };
        let record = match record {
            Some(record) if record.state != ContainerState::Created => record,
            _ if request.previous => {
                return Err(StreamError::Invalid(format!(
                    "previous terminated container \"{}\" in pod \"{}\" not found",
                    target.container, target.pod
                )));
            }
            _ => return Err(self.waits(target)),
        };
        let runs = request.follow.then(|| {
            let (runtime, id) = (self.runtime.clone(), record.id.clone());
            Box::new(move || {
                let (runtime, id) = (runtime.clone(), id.clone());
                async move {
                    let state = runtime.container(&id).await.map(|record| record.state);
                    matches!(
                        state,
                        Some(ContainerState::Running | ContainerState::Unknown)
                    )
                }
                .boxed()
            }) as StillRuns
        });
        match logs::open(&record.log_path, &request, runs).await {
            Ok(stream) => Ok(stream),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(StreamError::NotFound(format!(
                    "the log of container \"{}\" is not there",
                    target.container
                )))
            }
            Err(error) => {
                tracing::warn!(path = %record.log_path.display(), %error, "cannot open a log");
                Err(StreamError::Internal(
                    "cannot open the container's log".to_owned(),
                ))
            }
        }
    }
}
