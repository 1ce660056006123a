//! `hypernetes up`: everything on one machine, in one process.
//!
//! Builds the parts from the bottom up, says when the API is there, and runs until a signal. Pods run
//! on when it ends; the next start finds them.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use hypernetes_apiserver::{ApiServer, ApiServerConfig, tls_config};
use hypernetes_controllers::ControllersConfig;
use hypernetes_identity::{Authority, Kubeconfig, MASTERS, User};
use hypernetes_image::{ImageStore, RegistryConfig, StoreConfig as ImageStoreConfig};
use hypernetes_kernel::KernelCatalog;
use hypernetes_network::{BuiltinConfig, BuiltinDriver, NetworkDriver};
use hypernetes_nodelet::{Nodelet, NodeletConfig};
use hypernetes_runtime::{
    Deadlines, Defaults, NodeRuntime, PodRuntime, RuntimeConfig, TemplateConfig, UidRange,
};
use hypernetes_store::{Store, StoreConfig};
use hypernetes_telemetry::{VERSION, chain};
use hypernetes_vmm::{
    Vmm,
    qemu::{QemuConfig, QemuDriver},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{admin, cli::Up, kernel, lock::StateLock, paths, paths::Paths, terminal};

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
    store: Store,
    authority: Authority,
    networks: Arc<dyn NetworkDriver>,
    runtime: Arc<dyn PodRuntime>,
    /// Prefix of what this daemon makes on the host.
    instance: String,
}

impl Node {
    async fn prepare(paths: &Paths, options: &Up) -> Result<Self> {
        let authority = Authority::load_or_create(&paths.pki())
            .context("cannot open the certificate authority")?;
        let store = Store::open(&paths.database(), StoreConfig::default())?;
        let registry = RegistryConfig {
            insecure_registries: options.insecure_registries.clone(),
            ..RegistryConfig::default()
        };
        let images = ImageStore::open(
            paths.images(),
            ImageStoreConfig {
                registry,
                ..ImageStoreConfig::default()
            },
        )
        .context("cannot open the image store")?;
        let kernels =
            KernelCatalog::open(paths.state()).context("cannot open the kernel catalog")?;
        let default = kernel::ensure_default(
            &kernels,
            paths::kernel_dir(options.kernel_dir.clone()).as_deref(),
        )?;
        info!(kernel = %default.name, release = default.release, "default kernel");
        let hyperstart = paths::hyperstart(options.hyperstart.clone())
            .context("the guest's program is not beside this binary; give --hyperstart FILE")?;

        let mut network = BuiltinConfig::new(paths.network());
        if !options.upstream_dns.is_empty() {
            network.upstream_dns.clone_from(&options.upstream_dns);
        }
        let instance = network.instance.clone();
        fs::write(paths.instance(), &instance).context("cannot write the instance name")?;
        let networks: Arc<dyn NetworkDriver> = Arc::new(BuiltinDriver::open(network)?);

        let vmm = QemuDriver::detect(QemuConfig::new(paths.state().to_owned())).await?;
        let probe = vmm.probe();
        info!(qemu = probe.version, accelerator = %probe.accelerator, why = probe.why, "virtual machines");
        let vmm: Arc<dyn Vmm> = Arc::new(vmm);
        let run_dir = match &options.run_dir {
            Some(dir) => std::path::absolute(dir)?,
            None => PathBuf::from("/run/hypernetes"),
        };
        let runtime = NodeRuntime::open(RuntimeConfig {
            state_dir: paths.runtime(),
            run_dir: run_dir.join("vm"),
            store: store.clone(),
            images: Arc::new(images),
            network: networks.clone(),
            vmm,
            kernels: Arc::new(Arc::new(kernels)),
            hyperstart,
            uid_range: UidRange {
                first: options.uid_base,
                ..UidRange::default()
            },
            defaults: Defaults::default(),
            deadlines: Deadlines::default(),
            templates: TemplateConfig {
                most: options.templates,
            },
        })
        .await
        .context("cannot open the runtime")?;
        let (vcpus, memory_mib) = hypernetes_nodelet::USUAL_VM;
        runtime.make_template(vcpus, memory_mib).await?;
        info!(report = ?runtime.recovery_report(), "pods found again");
        Ok(Self {
            store,
            authority,
            networks,
            runtime: Arc::new(runtime),
            instance,
        })
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
        let mut config = ApiServerConfig::new(self.store.clone());
        config.streams = Some(Nodelet::streams_of(self.runtime.clone()));
        config.node_name = Some(node_name.clone());
        config.server_address = address.to_string();
        let server = ApiServer::new(config)
            .await
            .context("cannot start the API server")?;
        let mut sans = options.tls_sans.clone();
        sans.push(address.ip().to_string());
        let tls = tls_config(&self.authority, &self.authority.serving(&sans)?)?;
        let client = |user: &str| {
            let user = User::authenticated(user, [MASTERS.to_owned()]);
            kube::Client::new(server.service_as(user), "default")
        };

        let stop = CancellationToken::new();
        let mut parts: JoinSet<Result<&'static str>> = JoinSet::new();
        {
            let (server, stop) = (server.clone(), stop.clone());
            parts.spawn(async move {
                server.serve_tls(listener, Arc::new(tls), stop).await?;
                Ok("API server")
            });
        }
        let controllers = ControllersConfig {
            client: client("system:hypernetes-controllers"),
            networks: Some(self.networks.clone()),
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
        // Named like everything else that this daemon makes on the host.
        config.cgroup_root = format!("hypernetes-{}", self.instance);
        let nodelet = Nodelet::new(
            config,
            client(&format!("system:node:{node_name}")),
            self.runtime.clone(),
            self.networks.clone(),
        );
        let token = stop.clone();
        parts.spawn(async move {
            nodelet.run(token).await?;
            Ok("node")
        });
        let backend = admin::Backend {
            runtime: self.runtime.clone(),
            store: self.store.clone(),
        };
        let (socket, token) = (paths.admin_socket(), stop.clone());
        parts.spawn(async move {
            admin::serve(&socket, backend, token).await?;
            Ok("operator's socket")
        });

        self.write_admin_kubeconfig(&paths.admin_kubeconfig(), address)?;
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
        if let Err(error) = self.store.flush().await {
            error!(error = %chain(&error), "the last writes may not be on disk");
        }
        outcome
    }

    fn write_admin_kubeconfig(&self, path: &Path, address: SocketAddr) -> Result<()> {
        let credentials =
            self.authority
                .client("hypernetes-admin", &[MASTERS.to_owned()], ADMIN_LIFE)?;
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
            authority: &self.authority,
            credentials: &credentials,
        };
        Ok(kubeconfig.write(path)?)
    }
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

async fn interrupted() -> Result<()> {
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
