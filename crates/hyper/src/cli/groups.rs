//! Images, volumes, networks, contexts, registries, the system.

use clap::{ArgAction, Args, Subcommand};
use clap_complete::ArgValueCandidates;

use super::Prune;
use crate::completion;

#[derive(Debug, Args)]
pub(crate) struct Format {
    /// json or a Go template
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ListOptions {
    /// table, json or a Go template
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// Keep those of which a condition holds
    #[arg(short, long, value_name = "FILTER", action = ArgAction::Append, value_parser = crate::format::well_formed)]
    pub(crate) filter: Vec<String>,
    /// Only names or ids
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Whole ids
    #[arg(long)]
    pub(crate) no_trunc: bool,
}

/// Whatever is said to a verb that is not supported.
#[derive(Debug, Default, Args)]
pub(crate) struct AnyArguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _arguments: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Login {
    /// User
    #[arg(short, long)]
    pub(crate) username: Option<String>,
    /// Password (seen by others in the list of processes)
    #[arg(short, long)]
    pub(crate) password: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    pub(crate) password_stdin: bool,
    /// Registry
    #[arg(default_value = "docker.io")]
    pub(crate) server: String,
}

#[derive(Debug, Args)]
pub(crate) struct Logout {
    /// Registry
    #[arg(default_value = "docker.io")]
    pub(crate) server: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List volumes
    #[command(aliases = ["list"])]
    Ls(ListOptions),
    /// Create a volume
    Create {
        /// Options: size=10Gi, class=NAME
        #[arg(short, long, value_name = "KEY=VALUE")]
        opt: Vec<String>,
        /// Labels
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        /// Name
        #[arg(value_name = "VOLUME")]
        name: Option<String>,
    },
    /// Details of volumes as JSON
    Inspect {
        /// json or a Go template
        #[arg(short, long)]
        format: Option<String>,
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        names: Vec<String>,
    },
    /// Remove volumes
    #[command(aliases = ["remove"])]
    Rm {
        /// Do not mind those that are not there
        #[arg(short, long)]
        force: bool,
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// List networks
    #[command(aliases = ["list"])]
    Ls(ListOptions),
    /// Create a network
    Create {
        /// Addresses, such as 10.5.0.0/16
        #[arg(long, value_name = "CIDR")]
        subnet: Option<String>,
        /// Only bridge, which is what there is
        #[arg(short, long)]
        driver: Option<String>,
        /// Labels
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        /// Name
        #[arg(value_name = "NETWORK")]
        name: String,
    },
    /// Details of networks as JSON
    Inspect {
        /// json or a Go template
        #[arg(short, long)]
        format: Option<String>,
        /// Names
        #[arg(required = true, value_name = "NETWORK")]
        names: Vec<String>,
    },
    /// Remove networks
    #[command(aliases = ["remove"])]
    Rm {
        /// Do not mind those that are not there
        #[arg(short, long)]
        force: bool,
        /// Names
        #[arg(required = true, value_name = "NETWORK")]
        names: Vec<String>,
    },
    /// Not supported: a container's network is chosen when it is created
    #[command(hide = true)]
    Connect(AnyArguments),
    /// Not supported
    #[command(hide = true)]
    Disconnect(AnyArguments),
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// List snapshots
    #[command(aliases = ["list"])]
    Ls(ListOptions),
    /// Keep a container as it is, with its memory and files; `clone --snapshot` goes on from there
    Create {
        /// How much it may take on the node's disk, such as 512Mi [default: 1Gi]
        #[arg(long, value_name = "SIZE")]
        size_limit: Option<String>,
        /// Running or suspended container, or pod
        #[arg(add = ArgValueCandidates::new(completion::containers))]
        container: String,
        /// Name of the snapshot [default: made of the container's]
        #[arg(value_name = "SNAPSHOT")]
        name: Option<String>,
    },
    /// Details of snapshots as JSON
    Inspect {
        /// json or a Go template
        #[arg(short, long)]
        format: Option<String>,
        /// Names
        #[arg(required = true, value_name = "SNAPSHOT", add = ArgValueCandidates::new(completion::snapshots))]
        names: Vec<String>,
    },
    /// Remove snapshots
    #[command(aliases = ["remove"])]
    Rm {
        /// Do not mind those that are not there
        #[arg(short, long)]
        force: bool,
        /// Names
        #[arg(required = true, value_name = "SNAPSHOT", add = ArgValueCandidates::new(completion::snapshots))]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List contexts
    #[command(aliases = ["list"])]
    Ls(ListOptions),
    /// Print the current context
    Show,
    /// Make a context the current one
    Use {
        /// Context
        #[arg(value_name = "CONTEXT")]
        name: String,
    },
    /// Details of contexts as JSON
    Inspect {
        /// json or a Go template
        #[arg(short, long)]
        format: Option<String>,
        /// Contexts; the current one by default
        #[arg(value_name = "CONTEXT")]
        names: Vec<String>,
    },
    /// Make a context from another: its cluster and user, another namespace
    Create {
        /// Context to take cluster and user of
        #[arg(long, value_name = "CONTEXT")]
        from: Option<String>,
        /// Namespace
        #[arg(long, value_name = "NAME")]
        namespace: Option<String>,
        /// host=https://… of a cluster that is in the kubeconfig
        #[arg(long, value_name = "KEY=VALUE")]
        docker: Option<String>,
        /// Context
        #[arg(value_name = "CONTEXT")]
        name: String,
    },
    /// Remove contexts
    #[command(aliases = ["remove"])]
    Rm {
        /// The current one too
        #[arg(short, long)]
        force: bool,
        /// Contexts
        #[arg(required = true, value_name = "CONTEXT")]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SystemCommand {
    /// The same as info
    Info(Format),
    /// The same as events
    Events(super::Events),
    /// The same as container prune
    Prune(Prune),
    /// Not supported: disks are the node's
    #[command(hide = true)]
    Df(AnyArguments),
}
