//! `hypernetes node`: this machine's pods, for a kubelet.
//!
//! The same parts as `hypernetes up`, with the Container Runtime Interface in front of them instead
//! of an API server. Pods run on when it ends; the next start finds them.

use std::time::Duration;

use anyhow::Result;
use hypernetes_cri::{CriServer, NodeNetwork};
use hypernetes_runtime::ship_logs;
use hypernetes_telemetry::{VERSION, chain};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admin, cli, lock::StateLock, node_config, node_config::NodeConfig, parts::Parts, paths::Paths,
    terminal, up,
};

/// How long calls that are under way may take after a signal.
const DRAIN: Duration = Duration::from_secs(20);

/// Runs until SIGTERM or SIGINT, or until a part fails for good.
pub(crate) async fn run(paths: &Paths, options: cli::Node) -> Result<()> {
    if options.print_default_config {
        terminal::line(node_config::DEFAULT.trim_end());
        return Ok(());
    }
    let config = NodeConfig::load(options.config.as_deref())?;
    info!(version = VERSION, state = %paths.state().display(), "hypernetes node starts");
    let _lock = StateLock::take(paths)?;
    let parts = Parts::open(paths, &config.parts()).await?;
    let (usual, tenants) = config.networks()?;
    let network = NodeNetwork::new(parts.networks.clone(), usual, tenants);
    let cri = config.cri(paths.state().to_owned(), &parts.instance);
    let server = CriServer::new(cri, parts.runtime.clone(), network).await?;
    if let Some(address) = server.metrics_address() {
        info!(%address, "metrics are served");
    }
    let shipping = config.logs.shipping(paths)?;
    let socket = CriServer::bind(&config.socket)?;

    let stop = CancellationToken::new();
    let mut tasks: JoinSet<Result<&'static str>> = JoinSet::new();
    let token = stop.clone();
    tasks.spawn(async move {
        server.serve(socket, token).await?;
        Ok("runtime interface")
    });
    let backend = admin::Backend {
        runtime: parts.runtime.clone(),
        store: parts.store.clone(),
        guest_exec: config.guest_exec(),
    };
    let (admin_socket, token) = (paths.admin_socket(), stop.clone());
    tasks.spawn(async move {
        admin::serve(&admin_socket, backend, token).await?;
        Ok("operator's socket")
    });
    if let Some(shipping) = shipping {
        let (runtime, token) = (parts.runtime.clone(), stop.clone());
        tasks.spawn(async move {
            ship_logs(runtime, shipping, token).await?;
            Ok("logs' way to the collector")
        });
    }
    info!(socket = %config.socket.display(), "the runtime interface listens");
    terminal::line(&format!(
        "hypernetes node is up: unix://{}",
        config.socket.display()
    ));
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!(%error, "cannot tell the service manager");
    }

    let outcome = tokio::select! {
        result = up::interrupted() => result,
        Some(ended) = tasks.join_next() => match ended {
            Ok(Ok(part)) => Err(anyhow::anyhow!("the {part} ended")),
            Ok(Err(error)) => Err(error),
            Err(panic) => Err(anyhow::anyhow!("a part failed: {panic}")),
        },
    };
    info!("stopping; pods run on");
    stop.cancel();
    let drained = tokio::time::timeout(DRAIN, async {
        while let Some(ended) = tasks.join_next().await {
            if let Ok(Err(error)) = ended {
                error!(error = format!("{error:#}"), "a part did not end well");
            }
        }
    });
    if drained.await.is_err() {
        warn!("not everything ended within {DRAIN:?}");
    }
    parts.runtime.drain().await;
    if let Err(error) = parts.store.flush().await {
        error!(error = %chain(&error), "the last writes may not be on disk");
    }
    outcome
}
