//! The command line of the operator's binary.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use hypernetes_telemetry::traces::Traces;

/// Multi-tenant containers: every pod in its own microVM, Kubernetes as the interface.
#[derive(Debug, Parser)]
#[command(name = "hypernetes", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    /// Directory of everything durable
    #[arg(
        long,
        global = true,
        env = "HYPERNETES_STATE_DIR",
        default_value = "/var/lib/hypernetes"
    )]
    pub(crate) state_dir: PathBuf,

    /// Log filter, as in RUST_LOG: `info`, `debug`, `warn,hypernetes_runtime=debug`
    #[arg(long, global = true, env = "HYPERNETES_LOG", default_value = "warn")]
    pub(crate) log: String,

    /// Form of log lines
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run everything on this machine: API server, controllers, node
    Up(Box<Up>),
    /// Run this machine's pods for a kubelet: the Container Runtime Interface on a unix socket
    Node(Node),
    /// Tenants: create, list, delete, hand out kubeconfigs
    #[command(subcommand)]
    Tenant(Tenant),
    /// Guest kernels: build, import, list, verify, choose the default
    #[command(subcommand)]
    Kernel(Kernel),
    /// Images in this node's store
    #[command(subcommand)]
    Image(Image),
    /// Say whether this machine can run pods, how, and what is missing
    Doctor(Doctor),
    /// Write a consistent copy of the API's state to a file
    Backup(Backup),
    /// Print what a pod's kernel has written on its console
    Console(Console),
    /// Run a program in a pod's VM itself, outside its containers
    ///
    /// It has the files of a running container of the pod, and is else the guest's own: root with all
    /// privileges, and all processes of the VM in sight; the guest's own files are below /proc/1/root.
    /// Off unless the node's configuration allows it (debug.guestExec, --allow-guest-exec); each use is told
    /// in the daemon's log.
    Debug(Debug),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Hold the shared process namespace of a pod on the host; called by the daemon only
    #[command(name = "pause-pod", hide = true)]
    PausePod {
        /// The pod's sandbox
        sandbox: String,
    },
    /// Start a VMM in its jail; called by the daemon only
    #[command(name = "vmm-launch", hide = true)]
    VmmLaunch {
        /// What the daemon passes
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Debug {
    /// NAMESPACE/NAME, or the beginning of a sandbox's id
    pub(crate) pod: String,

    /// Container whose files the program has; by default the pod's first running one
    #[arg(short, long)]
    pub(crate) container: Option<String>,

    /// Pass standard input to the program
    #[arg(short = 'i', long)]
    pub(crate) stdin: bool,

    /// With a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,

    /// The program and its arguments
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

/// Words and defaults of containerd's and the kubelet's configurations.
#[derive(Debug, Args)]
pub(crate) struct Tracing {
    /// OpenTelemetry collector to send spans of pods' starts to, by gRPC: http://HOST:4317
    #[arg(
        long = "tracing-endpoint",
        env = "HYPERNETES_TRACING_ENDPOINT",
        value_name = "URL",
        value_parser = collector
    )]
    endpoint: Option<String>,

    /// Of a million traces that begin here, how many are kept; whoever began another has decided
    #[arg(
        long = "tracing-sampling-rate-per-million",
        value_name = "NUMBER",
        default_value_t = 1_000_000,
        value_parser = clap::value_parser!(u32).range(0..=1_000_000),
        requires = "endpoint"
    )]
    sampling_rate_per_million: u32,
}

/// A URL that the exporter can use: with another it would drop spans in silence.
fn collector(url: &str) -> Result<String, String> {
    let host = url.strip_prefix("http://").unwrap_or_default();
    match host.trim_end_matches('/').parse::<http::uri::Authority>() {
        Ok(authority) if authority.port_u16().is_some() => Ok(url.to_owned()),
        _ => Err("must be http://HOST:PORT, of gRPC without TLS".to_owned()),
    }
}

impl Tracing {
    pub(crate) fn traces(&self) -> Option<Traces> {
        Some(Traces {
            endpoint: self.endpoint.clone()?,
            sampling_rate_per_million: self.sampling_rate_per_million,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) tracing: Tracing,

    /// Collector to send containers' log lines on to, as JSON lines: http://HOST:PORT/PATH or https
    #[arg(long, value_name = "URL")]
    pub(crate) log_forward: Option<String>,

    /// File with the token that the collector is given
    #[arg(long, value_name = "FILE", requires = "log_forward")]
    pub(crate) log_forward_token: Option<PathBuf>,

    /// Let the operator run programs in pods' VMs: hypernetes debug
    #[arg(long)]
    pub(crate) allow_guest_exec: bool,

    /// Address of the API server
    #[arg(long, env = "HYPERNETES_LISTEN", default_value = "127.0.0.1:6443")]
    pub(crate) listen: SocketAddr,

    /// Name of this node; by default the host name
    #[arg(long)]
    pub(crate) node_name: Option<String>,

    /// Directory of the system call filters that pods can name (seccompProfile of type Localhost)
    #[arg(long, value_name = "DIR")]
    pub(crate) seccomp_profiles: Option<PathBuf>,

    /// More names or addresses in the API server's certificate
    #[arg(long = "tls-san", value_name = "NAME")]
    pub(crate) tls_sans: Vec<String>,

    /// Registry to reach by plain http; loopback registries are reached so anyway
    #[arg(long = "insecure-registry", value_name = "HOST[:PORT]")]
    pub(crate) insecure_registries: Vec<String>,

    /// Address range of the network of namespaces that belong to no tenant
    #[arg(long, default_value = "10.42.0.0/16")]
    pub(crate) pod_cidr: ipnet::Ipv4Net,

    /// Addresses of services; every tenant's network has the whole range for itself. No network of
    /// pods may overlap it
    #[arg(long, default_value = "10.96.0.0/16", value_parser = service_cidr)]
    pub(crate) service_cidr: ipnet::Ipv4Net,

    /// Ports of the node that services of type NodePort can have
    #[arg(long, value_name = "FIRST-LAST", default_value = "30000-32767", value_parser = port_range)]
    pub(crate) service_node_port_range: RangeInclusive<u16>,

    /// DNS server that pods' queries are forwarded to; by default those of /etc/resolv.conf
    #[arg(long = "upstream-dns", value_name = "ADDRESS:PORT")]
    pub(crate) upstream_dns: Vec<SocketAddr>,

    /// The guest's program; by default the one beside this binary
    #[arg(long, env = "HYPERNETES_HYPERSTART", value_name = "FILE")]
    pub(crate) hyperstart: Option<PathBuf>,

    /// Directory of a built kernel to use when none is imported; by default the one beside this binary
    #[arg(long, env = "HYPERNETES_KERNEL", value_name = "DIR")]
    pub(crate) kernel_dir: Option<PathBuf>,

    /// Directory for sockets of running VMs; short, as socket paths are limited to 107 bytes
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,

    /// First of the 65536 user ids that VMMs run under, one for each VM
    #[arg(long, default_value_t = 0x7000_0000)]
    pub(crate) uid_base: u32,

    /// File to log requests to the API in, as JSON lines of audit.k8s.io/v1; "-" is standard output
    #[arg(long, value_name = "FILE")]
    pub(crate) audit_log_path: Option<PathBuf>,

    /// Megabytes after which the audit log is begun anew
    #[arg(long, value_name = "MB", default_value_t = 100)]
    pub(crate) audit_log_maxsize: u64,

    /// How many old audit logs to keep; 0 keeps all
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub(crate) audit_log_maxbackup: usize,

    /// Days to keep old audit logs; 0 keeps them for ever
    #[arg(long, value_name = "DAYS", default_value_t = 0)]
    pub(crate) audit_log_maxage: u64,

    /// Bytes that the images of one namespace may take on the disk, such as 32Gi
    #[arg(long, value_name = "QUANTITY", default_value = "32Gi", value_parser = bytes)]
    pub(crate) image_quota: u64,

    /// How many VM templates to keep, of some 50 MiB each: pods start from them instead of booting
    /// their kernel. 0 boots every pod
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    pub(crate) templates: usize,

    /// How many VMs wait for a pod, for each of the templates: a pod that finds one starts faster
    /// still. Each takes the memory of an idle pod
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = pool)]
    pub(crate) pool: usize,
}

/// VMs that may wait for each template.
pub(crate) const MAX_POOL: usize = 64;

fn pool(text: &str) -> Result<usize, String> {
    let refused = || format!("must be 0 to {MAX_POOL}");
    let count = text.parse().map_err(|_wrong| refused())?;
    if count > MAX_POOL {
        Err(refused())
    } else {
        Ok(count)
    }
}

/// A range with room for the API server's address and others.
fn service_cidr(text: &str) -> Result<ipnet::Ipv4Net, String> {
    let range: ipnet::Ipv4Net = text.parse().map_err(|error| format!("{error}"))?;
    if range.trunc() != range || !(12..=28).contains(&range.prefix_len()) {
        return Err(format!(
            "must be a network of prefix length 12 to 28, such as {}",
            ipnet::Ipv4Net::new_assert(range.addr(), range.prefix_len().clamp(12, 28)).trunc()
        ));
    }
    Ok(range)
}

/// Ports from the first to the last.
fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let parse = || {
        let (first, last) = text.split_once('-')?;
        let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
        (first > 0 && first <= last).then_some(first..=last)
    };
    parse().ok_or_else(|| "must be two ports in order, such as 30000-32767".to_owned())
}

#[derive(Debug, Args)]
pub(crate) struct Node {
    #[command(flatten)]
    pub(crate) tracing: Tracing,

    /// Configuration file, YAML; without it the defaults
    #[arg(long, env = "HYPERNETES_NODE_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Print the default configuration with comments, and end
    #[arg(long)]
    pub(crate) print_default_config: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tenant {
    /// Create a tenant: namespace, network, roles, and a kubeconfig for its administrator
    Create {
        /// An RFC 1123 label; also the name of its first namespace
        name: String,
        /// Where to write the administrator's kubeconfig
        #[arg(long, value_name = "FILE")]
        kubeconfig: Option<PathBuf>,
        /// Address range of its pods; other tenants may have the same
        #[arg(long, default_value = "10.244.0.0/16")]
        cidr: ipnet::Ipv4Net,
        /// Name for people
        #[arg(long)]
        display_name: Option<String>,
        /// Kernel that its pods may name; repeatable. Without it any imported kernel
        #[arg(long = "allow-kernel", value_name = "NAME")]
        kernels: Vec<String>,
        /// How many ports of the node its services may have (type NodePort)
        #[arg(long, value_name = "COUNT")]
        node_ports: Option<u16>,
        /// How much its persistent volume claims may ask for together, or `unlimited`
        #[arg(long, value_name = "SIZE", default_value = "10Gi")]
        storage: String,
    },
    /// List tenants
    #[command(visible_alias = "list")]
    Ls,
    /// Write a new kubeconfig for a member of a tenant
    Kubeconfig {
        /// The tenant
        name: String,
        /// Where to write it; `-` is standard output
        #[arg(long, short = 'o', value_name = "FILE", default_value = "-")]
        output: PathBuf,
        /// Name of the user
        #[arg(long)]
        user: Option<String>,
        /// What the user may do
        #[arg(long, value_enum, default_value_t = Role::Admin)]
        role: Role,
        /// Days until the certificate ends
        #[arg(long, default_value_t = 365)]
        days: u32,
    },
    /// Delete a tenant with all it has
    #[command(visible_alias = "rm")]
    Delete {
        /// The tenant
        name: String,
        /// Return at once instead of waiting until everything is gone
        #[arg(long)]
        no_wait: bool,
        /// Seconds to wait
        #[arg(long, default_value_t = 180)]
        timeout: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Everything in the tenant, role bindings too
    Admin,
    /// Everything but roles
    Edit,
    /// Read only, no secrets
    View,
}

impl Role {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Edit => "edit",
            Self::View => "view",
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Kernel {
    /// Build HyperKernel from a kernel source tarball and import it
    Build {
        /// Name to import it under
        #[arg(long, default_value = "hyperkernel")]
        name: String,
        /// Source tarball; by default Debian's linux-source package
        #[arg(long, value_name = "FILE")]
        source: Option<PathBuf>,
        /// Configuration fragment; by default the one built in
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Import a distribution's kernel: a .deb, a directory made by `kernel build`, or a vmlinuz
    Import {
        /// Name for `hypernetes.io/kernel`
        name: String,
        /// .deb package, directory of a built kernel, vmlinux or vmlinuz
        path: PathBuf,
        /// Its modules (`/lib/modules/RELEASE`), for a vmlinuz
        #[arg(long, value_name = "DIR")]
        modules: Option<PathBuf>,
        /// Its configuration, for a vmlinuz
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// List kernels
    #[command(visible_alias = "list")]
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Boot a kernel and say what a pod would miss
    Verify {
        /// Name of an imported kernel
        name: String,
        /// The guest's program; by default the one beside this binary
        #[arg(long, env = "HYPERNETES_HYPERSTART", value_name = "FILE")]
        hyperstart: Option<PathBuf>,
    },
    /// Show or set the kernel of pods that name none
    Default {
        /// Name of an imported kernel
        name: Option<String>,
    },
    /// Remove a kernel
    #[command(visible_alias = "remove")]
    Rm {
        /// Name of an imported kernel
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Fetch an image from a registry
    Pull {
        /// `[registry/]repository[:tag][@digest]`
        reference: String,
        /// `user:password`; better by HYPERNETES_REGISTRY_CREDENTIALS
        #[arg(long, env = "HYPERNETES_REGISTRY_CREDENTIALS", hide_env_values = true)]
        creds: Option<String>,
        /// Registry to reach by plain http
        #[arg(long = "insecure-registry", value_name = "HOST[:PORT]")]
        insecure_registries: Vec<String>,
        /// Print the image id only
        #[arg(long, short)]
        quiet: bool,
    },
    /// Load images from an OCI layout (directory or tar) or a docker-archive
    Load {
        /// Archive or directory
        #[arg(short, long, value_name = "PATH")]
        input: PathBuf,
    },
    /// List images
    #[command(visible_alias = "list")]
    Ls {
        /// Print ids only
        #[arg(long, short)]
        quiet: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove images
    #[command(visible_alias = "remove")]
    Rm {
        /// References or ids
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Show images as JSON
    Inspect {
        /// References or ids
        #[arg(required = true)]
        images: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Also look for what this configuration of `hypernetes node` needs
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Console {
    /// NAMESPACE/NAME of the pod, or the beginning of its sandbox's id
    pub(crate) pod: String,
}

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// File to write; must not exist
    pub(crate) file: PathBuf,
}

/// A number of bytes, as Kubernetes writes quantities.
fn bytes(text: &str) -> Result<u64, String> {
    let quantity: hypernetes_types::Quantity = text
        .parse()
        .map_err(|_error| "must be a quantity such as 32Gi".to_owned())?;
    u64::try_from(quantity.value()).map_err(|_error| "must not be negative".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::{Cli, collector};

    #[test]
    fn collectors_are_spoken_to_without_tls() {
        for url in [
            "http://127.0.0.1:4317",
            "http://collector:4317/",
            "http://[::1]:4317",
        ] {
            assert_eq!(collector(url).as_deref(), Ok(url));
        }
        for url in [
            "",
            "127.0.0.1:4317",
            "https://collector:4317",
            "http://collector",
            "http://c:4317/v1/traces",
        ] {
            assert!(collector(url).is_err(), "{url}");
        }
    }

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }
}
