//! The embedded mode's stand-in for the kubelet.
//!
//! Watches this node's pods through a [`kube::Client`], drives the node's [`PodRuntime`], reports
//! statuses and events, and serves the streaming subresources. Every pod has one task
//! (`worker`), which asks a pure planner (`plan`) what to do next. Nothing is kept here that
//! cannot be found again in the API and in the runtime: after a restart pods go on as they are.
//!
//! It does not talk to registries, VMs or the kernel itself. As the cluster has one node, it also decides which
//! pods fit it (`scheduler`).
#![forbid(unsafe_code)]

mod access;
mod backoff;
mod claims;
mod clone;
mod config;
mod container;
mod env;
mod events;
mod fields;
mod handler;
mod images;
mod logs;
mod network;
mod node;
mod pause;
mod plan;
mod pods;
mod prober;
mod pull;
mod resize;
mod resources;
mod roles;
mod sandbox;
mod scheduler;
mod services;
mod snapshots;
mod sources;
mod stall;
mod status;
mod steps;
mod stop;
mod streams;
mod suspend;
mod timing;
mod tokens;
mod turns;
mod usage;
mod volumes;
mod wishes;
mod worker;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use hypernetes_apimachinery::usage::UsageBoard;
use hypernetes_image::ImageStore;
use hypernetes_network::NetworkDriver;
use hypernetes_runtime::PodRuntime;
use hypernetes_streaming::{NodeImages, PodStreams};
use hypernetes_telemetry::chain;
use jiff::Timestamp;
use kube::Client;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use config::{NodeletConfig, USUAL_VM};

/// Failure of the node as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeletError {
    /// The API did not take what the node is.
    #[error("cannot register {what}")]
    Register {
        /// Which object.
        what: String,
        /// Cause.
        #[source]
        source: Box<kube::Error>,
    },
    /// An object of the node's own making is not of its kind.
    #[error("cannot build object {name}")]
    Object {
        /// Which object.
        name: String,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// What the node has to remember cannot be read.
    #[error("cannot read {path}")]
    State {
        /// Which file.
        path: std::path::PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// A part of the node ended that should not have.
    #[error("the node's {0} ended")]
    Ended(&'static str),
}

/// How long the API may take to be there.
const REGISTER_TRIES: u32 = 30;

/// One node.
pub struct Nodelet {
    config: NodeletConfig,
    client: Client,
    runtime: Arc<dyn PodRuntime>,
    networks: Arc<dyn NetworkDriver>,
    images: Option<ImageStore>,
    board: worker::Board,
    usage: UsageBoard,
}

impl fmt::Debug for Nodelet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodelet")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Nodelet {
    /// A node that does nothing until [`Nodelet::run`].
    pub fn new(
        config: NodeletConfig,
        client: Client,
        runtime: Arc<dyn PodRuntime>,
        networks: Arc<dyn NetworkDriver>,
    ) -> Self {
        Self {
            config,
            client,
            runtime,
            networks,
            images: None,
            board: Arc::new(Mutex::new(HashMap::new())),
            usage: UsageBoard::default(),
        }
    }

    /// Notes what the node and its pods use on this board.
    #[must_use]
    pub fn with_usage(mut self, board: UsageBoard) -> Self {
        self.usage = board;
        self
    }

    /// Lets namespaces have images of their own, with their contents in this store, which is the
    /// runtime's.
    #[must_use]
    pub fn with_images(mut self, store: ImageStore) -> Self {
        self.images = Some(store);
        self
    }

    /// Contents of namespaces' images, for the API server.
    pub fn images_of(store: ImageStore) -> Arc<dyn NodeImages> {
        Arc::new(images::Contents(store))
    }

    /// Exec, attach, port-forward and logs of this node's pods. Works as long as the runtime does.
    pub fn streams(&self) -> Arc<dyn PodStreams> {
        Arc::new(streams::Streams {
            runtime: self.runtime.clone(),
            board: self.board.clone(),
        })
    }

    /// Streaming alone, for an API server that has to exist before a client of it does. It does not
    /// know why a container waits, and says `ContainerCreating` of each that does.
    pub fn streams_of(runtime: Arc<dyn PodRuntime>) -> Arc<dyn PodStreams> {
        Arc::new(streams::Streams {
            runtime,
            board: Arc::default(),
        })
    }

    /// Registers the node and runs its pods until `stop`. Pods run on when it returns.
    pub async fn run(self, stop: CancellationToken) -> Result<(), NodeletError> {
        let capacity = node::capacity(&self.config.state_dir);
        let since = Timestamp::now();
        for remaining in (0..REGISTER_TRIES).rev() {
            match node::register(&self.client, &self.config, capacity, since).await {
                Ok(()) => break,
                Err(error) if remaining == 0 => return Err(error),
                Err(error) => {
                    tracing::debug!(error = %chain(&error), "cannot register the node yet");
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        () = stop.cancelled() => return Ok(()),
                    }
                }
            }
        }
        let path = self.config.state_dir.join("image-access.json");
        let access = access::ImageAccess::open(path.clone())
            .map_err(|source| NodeletError::State { path, source })?;
        let host = self.config.node_name.clone();
        let (events, write_events) = events::Recorder::new(self.client.clone(), host, stop.clone());
        let (names, publish_names) = network::Names::new(self.networks.clone(), stop.clone());
        let settings = services::Settings {
            range: self.config.service_cidr,
            domain: self.config.cluster_domain.clone(),
        };
        let (services, tell_services) =
            services::Services::new(settings, &self.client, self.networks.clone(), stop.clone());
        let scheduler = scheduler::run(
            self.client.clone(),
            self.config.node_name.clone(),
            events.clone(),
            stop.clone(),
        );
        let images = self.images.clone().map(|store| {
            images::run(
                self.client.clone(),
                store,
                self.runtime.clone(),
                stop.clone(),
            )
        });
        let usage = usage::run(
            self.runtime.clone(),
            self.config.node_name.clone(),
            self.usage,
            stop.clone(),
        );
        let node = Arc::new(steps::Node {
            host_ip: self.config.address.to_string(),
            capacity,
            client: self.client.clone(),
            runtime: self.runtime,
            networks: self.networks,
            sources: sources::Sources::new(self.client.clone()),
            tokens: tokens::Tokens::new(self.client.clone()),
            access,
            images: self.images.clone(),
            events,
            names,
            services,
            gates: network::Gates::default(),
            boots: turns::Turns::new(capacity.cpus),
            starts: turns::Turns::new(capacity.cpus),
            hooks: stop::Hooks::default(),
            config: self.config.clone(),
        });
        let mut parts = JoinSet::new();
        let named = |name: &'static str, part: futures::future::BoxFuture<'static, ()>| async move {
            part.await;
            name
        };
        parts.spawn(named("event writer", Box::pin(write_events)));
        parts.spawn(named("scheduler", Box::pin(scheduler)));
        parts.spawn(named("usage meter", Box::pin(usage)));
        if let Some(images) = images {
            parts.spawn(named("keeper of images", Box::pin(images)));
        }
        parts.spawn(named("name publisher", Box::pin(publish_names)));
        parts.spawn(named("services", Box::pin(tell_services)));
        let keep_alive = node::keep_alive(self.client, self.config, capacity, since, stop.clone());
        parts.spawn(named("heartbeat", Box::pin(keep_alive)));
        let snapshots = snapshots::run(node.clone(), stop.clone());
        parts.spawn(named("keeper of snapshots", Box::pin(snapshots)));
        let grow = claims::grow(node.clone(), stop.clone());
        parts.spawn(named("keeper of volumes", Box::pin(grow)));
        parts.spawn(named(
            "pod manager",
            Box::pin(pods::run(node, self.board, stop.clone())),
        ));
        let mut failed = None;
        while let Some(ended) = parts.join_next().await {
            if !stop.is_cancelled() {
                let name = ended.unwrap_or("task");
                failed = Some(NodeletError::Ended(name));
                stop.cancel();
            }
        }
        failed.map_or(Ok(()), Err)
    }
}
