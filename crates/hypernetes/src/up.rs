//! `hypernetes up`: everything on one machine, in one process.
//!
//! Builds the parts from the bottom up, says when the API is there, and runs until a signal. Pods run
//! on when it ends; the next start finds them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use futures::{FutureExt, stream};
use hypernetes_apiserver::{ApiServer, ApiServerConfig, AuditOptions, NodeMetrics, tls_config};
use hypernetes_controllers::ControllersConfig;
use hypernetes_identity::{Authority, Kubeconfig, MASTERS, User, WORKLOAD_CONTROLLERS};
use hypernetes_nodelet::{Nodelet, NodeletConfig};
use hypernetes_runtime::{PodRuntime, ship_logs};
use hypernetes_telemetry::{VERSION, chain};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admin,
    cli::Up,
    lock::StateLock,
    logs::LogOptions,
    parts::{HostPodsOptions, Parts, PartsOptions},
    paths::Paths,
    terminal,
};

/// Validity of the operator's certificate; a new one is written at each start.
const ADMIN_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long parts may take to end after a signal.
const DRAIN: Duration = Duration::from_secs(20);

/// Runs until SIGTERM or SIGINT, or until a part fails for good.
pub(crate) async fn run(paths: &Paths, options: Up) -> Result<()> {
    info!(version = VERSION, state = %paths.state().display(), "hypernetes starts");
    let _lock = StateLock::take(paths)?;
    let node = Node::prepare(paths, &options).await?;
    let listener = TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = listener.local_addr()?;
    node.serve(paths, &options, listener, address).await
}

/// The parts below the API.
struct Node {
    authority: Authority,
    parts: Parts,
}

impl Node {
    async fn prepare(paths: &Paths, options: &Up) -> Result<Self> {
        let authority = Authority::load_or_create(&paths.pki())
            .context("cannot open the certificate authority")?;
        ensure!(
            options.pool == 0 || options.templates > 0,
            "--pool: its VMs come from templates: --templates must not be 0"
        );
        let parts = PartsOptions {
            insecure_registries: options.insecure_registries.clone(),
            mirrors: BTreeMap::new(),
            upstream_dns: options.upstream_dns.clone(),
            node_ports: options.service_node_port_range.clone(),
            cni: None,
            hyperstart: options.hyperstart.clone(),
            kernel_dir: options.kernel_dir.clone(),
            run_dir: options.run_dir.clone(),
            uid_base: options.uid_base,
            templates: options.templates,
            pool: options.pool,
            host_pods: HostPodsOptions::default(),
            usual_vm: {
                let (vcpus, memory_mib) = hypernetes_nodelet::USUAL_VM;
                (vcpus, memory_mib, hypernetes_vmm::VmExtras::default())
            },
            virtiofsd: None,
            volumes: true,
        };
        let parts = Parts::open(paths, &parts).await?;
        if let Some(volumes) = &parts.volumes {
            let capacity = volumes.capacity().await?;
            info!(
                total = capacity.total,
                promised = capacity.allocated,
                "bytes for volumes"
            );
        }
        Ok(Self { authority, parts })
    }

    async fn serve(
        self,
        paths: &Paths,
        options: &Up,
        listener: TcpListener,
        address: SocketAddr,
    ) -> Result<()> {
        let node_name = match &options.node_name {
            Some(name) => name.clone(),
            None => host_name(),
        };
        let mut config = ApiServerConfig::new(self.parts.store.clone());
        config.streams = Some(Nodelet::streams_of(self.parts.runtime.clone()));
        config.images = Some(Nodelet::images_of(self.parts.images.clone()));
        config.limits.image_bytes = options.image_quota;
        let usage = config.usage.clone();
        config.node_metrics = Some(node_metrics(&node_name, &self.parts.runtime));
        config.mount_tokens = true;
        config.server_address = address.to_string();
        config.service_account_key = Some(
            self.authority
                .service_account_key()
                .context("cannot open the key of service account tokens")?,
        );
        config.audit = options.audit_log_path.clone().map(|path| AuditOptions {
            path,
            max_size: options.audit_log_maxsize,
            max_backups: options.audit_log_maxbackup,
            max_age: options.audit_log_maxage,
        });
        config.service_cidr = options.service_cidr;
        config
            .node_ports
            .clone_from(&options.service_node_port_range);
        let server = ApiServer::new(config)
            .await
            .context("cannot start the API server")?;
        let mut sans = options.tls_sans.clone();
        sans.push(address.ip().to_string());
        sans.extend(names_in_networks(options.service_cidr));
        let tls = Arc::new(tls_config(
            &self.authority,
            &self.authority.serving(&sans)?,
        )?);
        let client = |user: &str| {
            let user = User::authenticated(user, [MASTERS.to_owned()]);
            kube::Client::new(server.service_as(user), "default")
        };

        let stop = CancellationToken::new();
        let mut parts: JoinSet<Result<&'static str>> = JoinSet::new();
        {
            let (server, tls, stop) = (server.clone(), tls.clone(), stop.clone());
            parts.spawn(async move {
                server.serve_tls(listener, tls, stop).await?;
                Ok("API server")
            });
        }
        {
            let (server, stop) = (server.clone(), stop.clone());
            let connections = stream::unfold(self.parts.api_connections, |mut next| async {
                let connection = next.recv().await?;
                Some(((connection.stream, connection.place), next))
            });
            parts.spawn(async move {
                server.serve_streams(connections, tls, stop).await;
                Ok("API server in networks")
            });
        }
        let controllers = ControllersConfig {
            client: client("system:hypernetes-controllers"),
            networks: Some(self.parts.networks.clone()),
            workloads: Some(kube::Client::new(
                server.service_as(User::authenticated(
                    "system:hypernetes-workload-controllers",
                    [WORKLOAD_CONTROLLERS.to_owned()],
                )),
                "default",
            )),
            volumes: self.parts.volumes.clone(),
            ca_pem: self.authority.certificate_pem().to_owned(),
        };
        let token = stop.clone();
        parts.spawn(async move {
            hypernetes_controllers::run(controllers, token).await;
            Ok("controllers")
        });
        let mut config = NodeletConfig::new(
            node_name.clone(),
            node_address(address),
            paths.state().to_owned(),
            ipnet::IpNet::V4(options.pod_cidr),
        );
        config.service_cidr = options.service_cidr;
        config
            .seccomp_profiles
            .clone_from(&options.seccomp_profiles);
        // Named like everything else that this daemon makes on the host.
        config.cgroup_root = format!("hypernetes-{}", self.parts.instance);
        let nodelet = Nodelet::new(
            config,
            client(&format!("system:node:{node_name}")),
            self.parts.runtime.clone(),
            self.parts.networks.clone(),
        )
        .with_usage(usage)
        .with_images(self.parts.images.clone());
        let token = stop.clone();
        parts.spawn(async move {
            nodelet.run(token).await?;
            Ok("node")
        });
        let backend = admin::Backend {
            runtime: self.parts.runtime.clone(),
            store: self.parts.store.clone(),
            guest_exec: options.allow_guest_exec,
        };
        let (socket, token) = (paths.admin_socket(), stop.clone());
        parts.spawn(async move {
            admin::serve(&socket, backend, token).await?;
            Ok("operator's socket")
        });

        let logs = LogOptions {
            forward: options.log_forward.clone(),
            token_file: options.log_forward_token.clone(),
        };
        if let Some(shipping) = logs.shipping(paths)? {
            let (runtime, token) = (self.parts.runtime.clone(), stop.clone());
            parts.spawn(async move {
                ship_logs(runtime, shipping, token).await?;
                Ok("logs' way to the collector")
            });
        }

        write_admin_kubeconfig(&self.authority, &paths.admin_kubeconfig(), address)?;
        info!(%address, node = node_name, "the API server listens");
        terminal::line(&format!(
            "hypernetes is up: https://{address}, kubeconfig {}",
            paths.admin_kubeconfig().display()
        ));
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
            warn!(%error, "cannot tell the service manager");
        }

        let outcome = tokio::select! {
            result = interrupted() => result,
            Some(ended) = parts.join_next() => Err(unexpected(ended)),
        };
        info!("stopping; pods run on");
        stop.cancel();
        server.shut_down().await;
        let drained = tokio::time::timeout(DRAIN, async {
            while let Some(ended) = parts.join_next().await {
                if let Ok(Err(error)) = ended {
                    error!(error = format!("{error:#}"), "a part did not end well");
                }
            }
        });
        if drained.await.is_err() {
            warn!("not everything ended within {DRAIN:?}");
        }
        self.parts.runtime.drain().await;
        if let Err(error) = self.parts.store.flush().await {
            error!(error = %chain(&error), "the last writes may not be on disk");
        }
        outcome
    }
}

/// What the node tells of itself to whoever may read the API server's metrics.
fn node_metrics(node: &str, runtime: &Arc<dyn PodRuntime>) -> NodeMetrics {
    let runtime = Arc::clone(runtime);
    let read = move || {
        let runtime = Arc::clone(&runtime);
        let text = async move { hypernetes_runtime::node_metrics(runtime.as_ref(), |_| {}).await };
        text.boxed()
    };
    NodeMetrics {
        node: node.to_owned(),
        read: Arc::new(read),
    }
}

fn write_admin_kubeconfig(authority: &Authority, path: &Path, address: SocketAddr) -> Result<()> {
    let credentials = authority.client("hypernetes-admin", &[MASTERS.to_owned()], ADMIN_LIFE)?;
    // Bound to all addresses: this machine reaches it by loopback.
    let host = if address.ip().is_unspecified() {
        SocketAddr::from(([127, 0, 0, 1], address.port()))
    } else {
        address
    };
    let kubeconfig = Kubeconfig {
        server: &format!("https://{host}"),
        context: "hypernetes",
        user: "hypernetes-admin",
        namespace: "default",
        authority,
        credentials: &credentials,
    };
    Ok(kubeconfig.write(path)?)
}

/// How pods call the API server.
fn names_in_networks(services: ipnet::Ipv4Net) -> Vec<String> {
    let mut names: Vec<String> = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ]
    .map(str::to_owned)
    .into();
    names.extend(services.hosts().next().map(|address| address.to_string()));
    names
}

/// The node's address for pods' `hostIP`.
fn node_address(address: SocketAddr) -> IpAddr {
    if address.ip().is_unspecified() {
        IpAddr::from([127, 0, 0, 1])
    } else {
        address.ip()
    }
}

fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase();
    // A node's name is a DNS subdomain.
    let valid: String = name
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'))
        .collect();
    if valid.is_empty() {
        "node".to_owned()
    } else {
        valid
    }
}

/// Returns when somebody wants the daemon to end.
pub(crate) async fn interrupted() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn unexpected(ended: Result<Result<&'static str>, tokio::task::JoinError>) -> anyhow::Error {
    match ended {
        Ok(Ok(part)) => anyhow!("the {part} ended"),
        Ok(Err(error)) => error,
        Err(panic) => anyhow!("a part failed: {panic}"),
    }
}
