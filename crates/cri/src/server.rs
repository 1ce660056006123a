//! The server: gRPC on a unix socket, and HTTP for streams.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use hypernetes_network::NetworkError;
use hypernetes_runtime::PodRuntime;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;

use crate::{
    MAX_MESSAGE_SIZE,
    config::CriConfig,
    deadline::DeadlineLayer,
    events::SUBSCRIBERS,
    exporter::{Calls, Counted, Exporter},
    follow::Follower,
    network::NodeNetwork,
    service::{Inner, Service},
    streams::Streams,
    traced::TracedLayer,
    v1::{image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer},
};

/// Root and the group that the operator gave the socket to.
const SOCKET_MODE: u32 = 0o660;

/// Failure of the server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address for streams cannot be had.
    #[error("cannot listen on {address}")]
    Streams {
        /// Of the configuration.
        address: std::net::SocketAddr,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The address for metrics cannot be had.
    #[error("cannot listen on {address} for metrics")]
    Metrics {
        /// Of the configuration.
        address: std::net::SocketAddr,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot {action} {}", path.display())]
    Socket {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The node's network cannot be had.
    #[error("cannot make the node's network")]
    Network(#[from] NetworkError),
    /// The transport failed.
    #[error("cannot serve the socket")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves the Container Runtime Interface.
#[derive(Debug)]
pub struct CriServer {
    service: Service,
    streams: Arc<Streams>,
    listener: TcpListener,
    metrics: Option<TcpListener>,
    tasks: TaskTracker,
}

impl CriServer {
    /// Opens the address for streams and tries the node's networks once, so that a configuration
    /// that cannot work is told at the start.
    ///
    /// # Errors
    /// If the address or the network cannot be had.
    pub async fn new(
        mut config: CriConfig,
        runtime: Arc<dyn PodRuntime>,
        network: NodeNetwork,
    ) -> Result<Self, ServeError> {
        let address = config.stream_address;
        let failed = |source| ServeError::Streams { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        config.stream_address = listener.local_addr().map_err(failed)?;
        network.try_out().await?;
        let metrics = match config.metrics_address {
            Some(address) => {
                let failed = |source| ServeError::Metrics { address, source };
                let listener = TcpListener::bind(address).await.map_err(failed)?;
                config.metrics_address = Some(listener.local_addr().map_err(failed)?);
                Some(listener)
            }
            None => None,
        };
        let streams = Streams::new(Arc::clone(&runtime), config.stream_address);
        let tasks = TaskTracker::new();
        let service = Service::new(Inner {
            config,
            runtime,
            network: Arc::new(network),
            streams: Arc::clone(&streams),
            carried: Arc::default(),
            tasks: tasks.clone(),
            subscribers: Arc::new(Semaphore::new(SUBSCRIBERS)),
            closing: CancellationToken::new(),
        });
        Ok(Self {
            service,
            streams,
            listener,
            metrics,
            tasks,
        })
    }

    /// Where the metrics are to be had, with the port that was taken.
    pub fn metrics_address(&self) -> Option<std::net::SocketAddr> {
        self.service.config.metrics_address
    }

    /// Makes the socket, for root and the socket's group only. One that a dead server has left is
    /// replaced; anything else in its place is an error.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(path: &Path) -> Result<UnixListener, ServeError> {
        let failed = |action| {
            move |source| ServeError::Socket {
                action,
                path: path.to_owned(),
                source,
            }
        };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed("make the directory of"))?;
        }
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    let source = io::Error::from(io::ErrorKind::AddrInUse);
                    return Err(failed("take over")(source));
                }
                fs::remove_file(path).map_err(failed("replace"))?;
            }
            Ok(_) => {
                let source = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(failed("replace")(source));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at")(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))
            .map_err(failed("protect"))?;
        Ok(listener)
    }

    /// Serves until `stop`, then lets calls that are under way finish and ends all streams.
    ///
    /// # Errors
    /// If the transport fails.
    pub async fn serve(
        self,
        socket: UnixListener,
        stop: CancellationToken,
    ) -> Result<(), ServeError> {
        let runtime = RuntimeServiceServer::new(self.service.clone())
            .max_decoding_message_size(MAX_MESSAGE_SIZE)
            .max_encoding_message_size(MAX_MESSAGE_SIZE);
        let follower = Follower {
            runtime: Arc::clone(&self.service.runtime),
            kubelet_dir: self.service.config.kubelet_dir.clone(),
            carried: Arc::clone(&self.service.carried),
        };
        let closing = self.service.closing.clone();
        let runtime_of = Arc::clone(&self.service.runtime);
        let images = ImageServiceServer::new(self.service)
            .max_decoding_message_size(MAX_MESSAGE_SIZE)
            .max_encoding_message_size(MAX_MESSAGE_SIZE);
        let counted = Calls::default();
        let exporter = Exporter {
            runtime: Arc::clone(&runtime_of),
            calls: counted.clone(),
        };
        let layer = tower::layer::layer_fn(move |inner| Counted::new(inner, counted.clone()));
        let calls = Server::builder()
            .layer(layer)
            .layer(DeadlineLayer)
            .layer(TracedLayer)
            .add_service(runtime)
            .add_service(images)
            .serve_with_incoming_shutdown(
                UnixListenerStream::new(socket),
                stop.clone().cancelled_owned(),
            );
        // A transport that fails takes the streams with it.
        let _ended = stop.clone().drop_guard();
        let metrics = async {
            if let Some(listener) = self.metrics {
                exporter.serve(listener, stop.clone()).await;
            }
        };
        let (served, (), (), (), ()) = tokio::join!(
            async {
                let served = calls.await;
                stop.cancel();
                served
            },
            self.streams.serve(self.listener, stop.clone()),
            follower.run(stop.clone()),
            metrics,
            async {
                stop.cancelled().await;
                closing.cancel();
            },
        );
        self.tasks.close();
        self.tasks.wait().await;
        Ok(served?)
    }
}
