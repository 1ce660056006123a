//! Sends container logs on to a collector, beside their files.
//!
//! Each container's file is followed from a cursor that moves on only when the collector has accepted
//! what was sent: lines arrive at least once and in the order of their file, whatever becomes of the
//! collector, the file (rotation) or this process. A batch is one `POST` of JSON lines, with the
//! names that collectors know from Kubernetes:
//!
//! ```text
//! {"time":"2026-01-02T03:04:05.000000006Z","stream":"stdout","logtag":"F","log":"hello",
//!  "kubernetes":{"namespace_name":"default","pod_name":"web","pod_id":"…","container_name":"main",
//!  "container_id":"…","container_image":"…"}}
//! ```
//!
//! What is lost: lines whose file was removed while this process did not run.

mod tail;

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use hypernetes_types::ContainerId;
use reqwest::{StatusCode, Url, header};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use self::tail::Tail;
use crate::{
    api::{ContainerState, ContainerStatus, PodRuntime},
    backoff::Backoff,
};

/// How often files are looked at for more.
const LOOK: Duration = Duration::from_millis(500);
/// One answer of the collector.
const ANSWER: Duration = Duration::from_secs(30);
/// Batches on their way at the same time, of all containers.
const AT_ONCE: usize = 8;

/// Where logs are sent to.
#[derive(Debug, Clone)]
pub struct LogShipping {
    /// Asks the collector. It should follow no redirects: they would lose what was sent.
    pub client: reqwest::Client,
    /// `http` or `https`.
    pub endpoint: Url,
    /// For `Authorization: Bearer`.
    pub token: Option<String>,
    /// Directory for cursors; made if it is missing.
    pub state: PathBuf,
}

/// What the tasks share.
struct Shipper {
    config: LogShipping,
    turns: Semaphore,
}

/// Sends logs of all containers of a node until it is stopped.
pub async fn ship_logs(
    runtime: Arc<dyn PodRuntime>,
    config: LogShipping,
    stop: CancellationToken,
) -> std::io::Result<()> {
    tokio::fs::create_dir_all(&config.state).await?;
    let shipper = Arc::new(Shipper {
        config,
        turns: Semaphore::new(AT_ONCE),
    });
    let mut followed: HashMap<ContainerId, CancellationToken> = HashMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let containers = runtime.list_containers(None).await;
        let known: HashSet<&ContainerId> = containers.iter().map(|status| &status.id).collect();
        followed.retain(|id, gone| {
            let stays = known.contains(id);
            if !stays {
                gone.cancel();
            }
            stays
        });
        for status in containers
            .iter()
            .filter(|status| status.log_path.is_absolute())
        {
            if followed.contains_key(&status.id) {
                continue;
            }
            let gone = CancellationToken::new();
            followed.insert(status.id.clone(), gone.clone());
            let (shipper, runtime) = (Arc::clone(&shipper), Arc::clone(&runtime));
            let status = status.clone();
            tasks.spawn(async move { shipper.follow(runtime.as_ref(), status, gone).await });
        }
        while tasks.try_join_next().is_some() {}
        tokio::select! {
            () = sleep(LOOK) => {}
            () = stop.cancelled() => break,
        }
    }
    // A batch that is cut short is sent again by the next process.
    tasks.shutdown().await;
    Ok(())
}

impl Shipper {
    /// Follows one container's log until the container is gone and its last line has arrived.
    async fn follow(
        &self,
        runtime: &dyn PodRuntime,
        status: ContainerStatus,
        gone: CancellationToken,
    ) {
        let cursor = self.config.state.join(format!("{}.json", status.id));
        let labels = self.labels(runtime, &status).await;
        let mut tail = Tail::new(status.log_path.clone(), cursor);
        let mut ended = false;
        loop {
            // Before the look: what is written until then is seen by it.
            let last_look = gone.is_cancelled();
            let over = ended;
            let batch = match tail.next().await {
                Ok(batch) => batch,
                Err(error) => {
                    tracing::warn!(container = %status.id, error = %error, "cannot read a log to send it on");
                    None
                }
            };
            match batch {
                Some(lines) => {
                    self.send(&lines, &labels).await;
                    if let Err(error) = tail.accept().await {
                        tracing::warn!(container = %status.id, error = %error, "cannot note what was sent");
                    }
                }
                None if last_look => break,
                // Nothing is added to it any more.
                None if over => gone.cancelled().await,
                None => {
                    let state = runtime.container(&status.id).await;
                    ended = state.is_some_and(|status| status.state == ContainerState::Exited);
                    tokio::select! {
                        () = sleep(LOOK) => {}
                        () = gone.cancelled() => {}
                    }
                }
            }
        }
        tail.forget().await;
    }

    async fn labels(&self, runtime: &dyn PodRuntime, status: &ContainerStatus) -> Value {
        let sandbox = runtime.sandbox(&status.sandbox).await;
        let pod = sandbox.map(|sandbox| sandbox.config.metadata);
        json!({
            "namespace_name": pod.as_ref().map(|pod| &pod.namespace),
            "pod_name": pod.as_ref().map(|pod| &pod.name),
            "pod_id": pod.as_ref().map(|pod| &pod.uid),
            "container_name": status.config.name,
            "container_id": status.id,
            "container_image": status.config.image,
        })
    }

    /// Has the collector accept a batch, however long that takes.
    async fn send(&self, lines: &[u8], labels: &Value) {
        let body = bytes::Bytes::from(json_lines(lines, labels));
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
        let mut refused = 0u32;
        loop {
            let why = match self.post(body.clone()).await {
                Ok(status) if status.is_success() => return,
                Ok(status) => status.to_string(),
                Err(error) => hypernetes_telemetry::chain(&error).to_string(),
            };
            refused = refused.saturating_add(1);
            if refused.is_power_of_two() {
                let endpoint = self.config.endpoint.host_str().unwrap_or_default();
                tracing::warn!(
                    endpoint,
                    why,
                    refused,
                    "the collector does not take logs; they wait"
                );
            }
            backoff.wait().await;
        }
    }

    async fn post(&self, body: bytes::Bytes) -> Result<StatusCode, reqwest::Error> {
        // Semaphores that nobody closes do not fail.
        let _turn = self.turns.acquire().await.ok();
        let request = self
            .config
            .client
            .post(self.config.endpoint.clone())
            .timeout(ANSWER)
            .header(header::CONTENT_TYPE, "application/x-ndjson")
            .body(body);
        let request = match &self.config.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        Ok(request
            .send()
            .await
            .map_err(reqwest::Error::without_url)?
            .status())
    }
}

/// Log lines as the collector gets them. A line that is none of ours is sent as it is.
fn json_lines(lines: &[u8], labels: &Value) -> Vec<u8> {
    let mut body = Vec::with_capacity(lines.len() * 2);
    for line in lines
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let text = String::from_utf8_lossy(line);
        let mut parts = text.splitn(4, ' ');
        let record = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (
                Some(time),
                Some(stream @ ("stdout" | "stderr")),
                Some(tag @ ("F" | "P")),
                Some(log),
            ) => {
                json!({"time": time, "stream": stream, "logtag": tag, "log": log, "kubernetes": labels})
            }
            _ => json!({"log": text, "kubernetes": labels}),
        };
        body.extend_from_slice(record.to_string().as_bytes());
        body.push(b'\n');
    }
    body
}

#[cfg(test)]
mod tests;
