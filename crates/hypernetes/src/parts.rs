//! What every daemon is made of below its interface: store, images, kernels, networks, VMs, and the
//! runtime that joins them.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use hypernetes_hostpods::{
    HostConfig, HostRuntime, JointRuntime, Programs, has_pods, known_sandboxes,
};
use hypernetes_image::{ImageStore, RegistryConfig, StoreConfig as ImageStoreConfig};
use hypernetes_kernel::KernelCatalog;
use hypernetes_network::{
    ApiConnection, BuiltinConfig, BuiltinDriver, NetworkDriver, RoutedDriver,
    cni::{CniConfig, CniDriver},
};
use hypernetes_runtime::{
    Deadlines, Defaults, NodeRuntime, PodRuntime, RuntimeConfig, TemplateConfig, UidRange,
};
use hypernetes_store::{Store, StoreConfig};
use hypernetes_vmm::{
    VmExtras, Vmm,
    qemu::{QemuConfig, QemuDriver},
};
use hypernetes_volume::{LocalVolumes, VolumeDriver};
use serde::Deserialize;
use tokio::sync::mpsc;
use tracing::info;

use crate::{kernel, paths, paths::Paths};

/// Where run-time files of VMs are unless told otherwise.
pub(crate) const RUN_DIR: &str = "/run/hypernetes";

/// What an operator may choose.
#[derive(Debug, Clone)]
pub(crate) struct PartsOptions {
    pub(crate) insecure_registries: Vec<String>,
    /// Per registry: places to ask before it.
    pub(crate) mirrors: BTreeMap<String, Vec<String>>,
    pub(crate) upstream_dns: Vec<SocketAddr>,
    /// Ports of the node that services can have.
    pub(crate) node_ports: RangeInclusive<u16>,
    /// The cluster's network, if pods are to join it.
    pub(crate) cni: Option<CniOptions>,
    pub(crate) hyperstart: Option<PathBuf>,
    pub(crate) kernel_dir: Option<PathBuf>,
    pub(crate) run_dir: Option<PathBuf>,
    pub(crate) uid_base: u32,
    /// Most VM templates.
    pub(crate) templates: usize,
    /// VMs that wait for a pod, for each template.
    pub(crate) pool: usize,
    /// Pods on the node's own kernel.
    pub(crate) host_pods: HostPodsOptions,
    /// Virtual CPUs and memory in MiB of most pods' VMs: a template of them is made at once.
    pub(crate) usual_vm: (u32, u32, VmExtras),
    /// Whether there are volumes that outlive pods. With a kubelet they are its CSI drivers'.
    pub(crate) volumes: bool,
    /// The program that serves host directories to guests, if not QEMU's.
    pub(crate) virtiofsd: Option<PathBuf>,
}

/// Name of the network by CNI plugins.
pub(crate) const CNI_NETWORK: &str = "cni";

/// The network by CNI plugins, as it is configured.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct CniOptions {
    pub(crate) conf_dir: PathBuf,
    pub(crate) bin_dirs: Vec<PathBuf>,
    pub(crate) anti_spoofing: bool,
    pub(crate) collect_garbage: bool,
}

impl Default for CniOptions {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            anti_spoofing: true,
            collect_garbage: false,
        }
    }
}

/// Pods on the node's own kernel.
#[derive(Debug, Clone)]
pub(crate) struct HostPodsOptions {
    /// Whether there may be new ones.
    pub(crate) on: bool,
    /// Name or path of the OCI runtime.
    pub(crate) runtime: PathBuf,
    /// Name or path of the monitor.
    pub(crate) conmon: PathBuf,
}

impl Default for HostPodsOptions {
    fn default() -> Self {
        Self {
            on: false,
            runtime: "runc".into(),
            conmon: "conmon".into(),
        }
    }
}

/// The command of this program that [`hypernetes_hostpods::pause`] is.
pub(crate) const PAUSE: &str = "pause-pod";
/// How long an OCI runtime may take for one thing.
const HOST_PATIENCE: Duration = Duration::from_secs(60);

/// The parts below the interface.
pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) networks: Arc<dyn NetworkDriver>,
    /// Connections of pods to the API server.
    pub(crate) api_connections: mpsc::Receiver<ApiConnection>,
    pub(crate) runtime: Arc<dyn PodRuntime>,
    /// Volumes that outlive pods.
    pub(crate) volumes: Option<Arc<dyn VolumeDriver>>,
    /// The runtime's images.
    pub(crate) images: ImageStore,
    /// Prefix of what this daemon makes on the host.
    pub(crate) instance: String,
}

impl Parts {
    /// Builds them from the bottom up and finds the pods of an earlier daemon.
    pub(crate) async fn open(paths: &Paths, options: &PartsOptions) -> Result<Self> {
        let store = Store::open(&paths.database(), StoreConfig::default())?;
        let registry = RegistryConfig {
            insecure_registries: options.insecure_registries.clone(),
            mirrors: options.mirrors.clone(),
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
            .context("the guest's program is not beside this binary; give its path")?;

        let mut network = BuiltinConfig::new(paths.network());
        if !options.upstream_dns.is_empty() {
            network.upstream_dns.clone_from(&options.upstream_dns);
        }
        network.node_ports.clone_from(&options.node_ports);
        let instance = network.instance.clone();
        fs::write(paths.instance(), &instance).context("cannot write the instance name")?;
        let own = BuiltinDriver::open(network)?;
        let api_connections = own.api_connections();
        let own: Arc<dyn NetworkDriver> = Arc::new(own);
        // A node that no longer uses CNI still has its pods of before to look after.
        let networks = match &options.cni {
            None if !paths.cni().exists() => own,
            cni => Arc::new(RoutedDriver::new(
                CniDriver::open(cni_config(paths, &instance, cni.as_ref())?)?,
                own,
            )),
        };

        let mut qemu = QemuConfig::new(paths.state().to_owned());
        if let Some(program) = &options.virtiofsd {
            qemu.virtiofsd.clone_from(program);
        }
        let (server, (_, memory_mib, extras)) = (qemu.virtiofsd.clone(), options.usual_vm);
        let vmm = QemuDriver::detect(qemu).await?;
        let probe = vmm.probe();
        // Better now than with the first pod.
        anyhow::ensure!(
            !extras.shares || server.is_file(),
            "hostPaths.shared and hostPaths.volumes need {}, which is not there",
            server.display()
        );
        anyhow::ensure!(
            probe.q35.is_some() || !(extras.shares || extras.max_memory_mib > memory_mib),
            "hostPaths.shared, hostPaths.volumes and vm.resizeMemoryMiB need qemu-system-x86_64, which is \
             not installed"
        );
        info!(qemu = probe.version, accelerator = %probe.accelerator, why = probe.why, "virtual machines");
        let vmm: Arc<dyn Vmm> = Arc::new(vmm);
        let run_dir = match &options.run_dir {
            Some(dir) => std::path::absolute(dir)?,
            None => PathBuf::from(RUN_DIR),
        };
        let volumes: Option<Arc<dyn VolumeDriver>> = match options.volumes {
            true => Some(Arc::new(LocalVolumes::open(paths.volumes(), None).await?)),
            false => None,
        };
        let own_images = images.clone();
        let images = Arc::new(images);
        let runtime = NodeRuntime::open(RuntimeConfig {
            state_dir: paths.runtime(),
            run_dir: run_dir.join("vm"),
            store: store.clone(),
            images: images.clone(),
            network: networks.clone(),
            vmm,
            volumes: volumes.clone(),
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
                pool: options.pool,
            },
            others: known_sandboxes(&store)?,
        })
        .await
        .context("cannot open the runtime")?;
        let (vcpus, memory_mib, extras) = options.usual_vm;
        runtime.make_template(vcpus, memory_mib, extras).await?;
        info!(report = ?runtime.recovery_report(), "pods found again");
        let vms: Arc<dyn PodRuntime> = Arc::new(runtime);
        // A node that has them no longer still has those of before to look after.
        let runtime = match options.host_pods.on || has_pods(&store)? {
            false => vms,
            true => {
                let host = host_pods(paths, options, &run_dir, &store, images, networks.clone());
                Arc::new(JointRuntime::new(vms, Arc::new(host.await?)))
            }
        };
        Ok(Self {
            store,
            networks,
            api_connections,
            runtime,
            volumes,
            images: own_images,
            instance,
        })
    }
}

/// Opens the runtime of pods on the node's own kernel.
async fn host_pods(
    paths: &Paths,
    options: &PartsOptions,
    run_dir: &Path,
    store: &Store,
    images: Arc<ImageStore>,
    network: Arc<dyn NetworkDriver>,
) -> Result<HostRuntime> {
    let programs = Programs::find(&options.host_pods.runtime, &options.host_pods.conmon)
        .context("pods on the node's own kernel (hostHandler)")?;
    info!(runtime = %programs.oci.display(), conmon = %programs.conmon.display(), "pods on the node's own kernel");
    let this = std::env::current_exe().context("cannot find this program")?;
    let host = HostRuntime::open(HostConfig {
        state_dir: paths.host_pods(),
        run_dir: run_dir.join("host"),
        store: store.clone(),
        images,
        network,
        programs,
        pause: vec![this.into(), PAUSE.into()],
        patience: HOST_PATIENCE,
    });
    host.await.context("cannot open the runtime of host pods")
}

fn cni_config(paths: &Paths, instance: &str, options: Option<&CniOptions>) -> Result<CniConfig> {
    let usual = CniOptions::default();
    let options = options.unwrap_or(&usual);
    Ok(CniConfig {
        state_dir: paths.cni(),
        instance: instance.to_owned(),
        network: CNI_NETWORK.parse()?,
        conf_dir: options.conf_dir.clone(),
        bin_dirs: options.bin_dirs.clone(),
        anti_spoofing: options.anti_spoofing,
        collect_garbage: options.collect_garbage,
    })
}
