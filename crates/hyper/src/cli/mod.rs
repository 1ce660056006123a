//! The command line: docker's verbs and flags.

mod compose;
mod container;
mod groups;
mod images;
mod run;

use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand};

pub(crate) use compose::{Compose, ComposeCommand, ComposeFiles, Down, Services, Up};
pub(crate) use container::{
    Attach, CloneOptions, Copy, Events, Exec, Inspect, Kill, Logs, Names, Port, Ps, Remove, Rename,
    Restart, Start, Stats, Stop, Top, Wait,
};
pub(crate) use groups::{
    ContextCommand, Format, ListOptions, Login, Logout, NetworkCommand, SnapshotCommand,
    SystemCommand, VolumeCommand,
};
pub(crate) use images::{
    History, ImageCommand, ImageGroup, Images, InspectImages, Load, PruneImages, Pull, Push,
    RemoveImages, Save, Search, Tag,
};
pub(crate) use run::{Create, Run};

/// Containers in microVMs of their own, with docker's commands over the Kubernetes API.
#[derive(Debug, Parser)]
#[command(
    name = "hyper",
    version,
    disable_version_flag = true,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    subcommand_value_name = "COMMAND",
    subcommand_help_heading = "Commands",
    help_template = "{about}\n\nUsage: hyper [OPTIONS] COMMAND\n\nCommands:\n{subcommands}\n\nOptions:\n{options}\n\nhyper COMMAND --help says more about a command.\n"
)]
pub(crate) struct Cli {
    /// Cluster to talk to: a context of the kubeconfig
    #[arg(short = 'c', long, env = "HYPER_CONTEXT", value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// Kubeconfig file [default: kubectl's]
    #[arg(long, env = "HYPER_KUBECONFIG", value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Namespace [default: the context's]
    #[arg(short, long, env = "HYPER_NAMESPACE", value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// Print version
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// All verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Container(Box<ContainerCommand>),
    /// Commands on containers: `hyper container ls` is `hyper ps`
    #[command(name = "container", hide = true)]
    ContainerGroup {
        #[command(subcommand)]
        command: ContainerGroup,
    },
    #[command(flatten)]
    Image(ImageCommand),
    /// More on images: save, load, history, search, inspect, prune
    #[command(name = "image")]
    ImageGroup {
        #[command(subcommand)]
        command: ImageGroup,
    },
    /// Multi-container applications from a compose file
    Compose(Compose),
    /// The same as compose up; down is the same as compose down
    Up(TopUp),
    /// The same as compose down
    #[command(hide = true)]
    Down(TopDown),
    /// Volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Networks
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Containers that are kept as they were
    #[command(subcommand, hide = true)]
    Snapshot(SnapshotCommand),
    /// Clusters: contexts of the kubeconfig
    #[command(subcommand)]
    Context(ContextCommand),
    /// Keep credentials of a registry in the namespace; logout forgets them
    Login(Login),
    /// Forget credentials of a registry
    #[command(hide = true)]
    Logout(Logout),
    /// Versions of client and server
    Version(Format),
    /// What the cluster is and how many containers there are
    Info(Format),
    /// Commands on the whole: info, df, events, prune
    #[command(subcommand, hide = true)]
    System(SystemCommand),
    /// Print a completion script: source <(hyper completion bash)
    Completion {
        /// Shell
        shell: Shell,
    },
    /// Write man pages into a directory
    #[command(hide = true)]
    Man {
        /// Directory, made if it is not there
        directory: PathBuf,
    },
}

/// `hyper up`: `hyper compose up` without the word compose.
#[derive(Debug, clap::Args)]
pub(crate) struct TopUp {
    #[command(flatten)]
    pub(crate) files: ComposeFiles,
    #[command(flatten)]
    pub(crate) up: Up,
}

/// `hyper down`.
#[derive(Debug, clap::Args)]
pub(crate) struct TopDown {
    #[command(flatten)]
    pub(crate) files: ComposeFiles,
    #[command(flatten)]
    pub(crate) down: compose::Down,
}

/// Shells that completion scripts are made for.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// `hyper container …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ContainerGroup {
    /// List containers
    #[command(aliases = ["list"])]
    Ls(Ps),
    /// Remove all stopped containers
    Prune(Prune),
    #[command(flatten)]
    Other(Box<ContainerCommand>),
}

/// Verbs on containers.
#[derive(Debug, Subcommand)]
pub(crate) enum ContainerCommand {
    /// Create and start a container
    #[command(disable_help_flag = true)]
    Run(Box<Run>),
    /// Create a container without starting it
    #[command(disable_help_flag = true)]
    Create(Box<Create>),
    /// List containers
    Ps(Ps),
    /// Show a container's output
    Logs(Logs),
    /// Run a command in a running container
    Exec(Exec),
    /// Join a running container's input and output
    Attach(Attach),
    /// Start stopped containers
    Start(Start),
    /// Stop running containers
    Stop(Stop),
    /// Stop and start containers
    Restart(Restart),
    /// Send a signal to running containers
    Kill(Kill),
    /// Remove containers
    #[command(aliases = ["remove"])]
    Rm(Remove),
    /// Wait until containers stop, and print their exit codes
    Wait(Wait),
    /// Give a container another name
    Rename(Rename),
    /// Details of containers as JSON
    Inspect(Inspect),
    /// Copy files between a container and here
    Cp(Copy),
    /// Published ports of a container
    Port(Port),
    /// Processes of a container
    Top(Top),
    /// CPU and memory in use
    Stats(Stats),
    /// What happens, as it happens
    Events(Events),
    /// Have all processes of containers stand still; unpause has them go on
    Pause(Names),
    /// Have paused containers go on
    #[command(hide = true)]
    Unpause(Names),
    /// Put the memory of containers onto the disk; resume brings it back
    Suspend(Names),
    /// Have suspended containers go on where they were
    #[command(hide = true)]
    Resume(Names),
    /// A second container that goes on from where another one is, memory and files included
    #[command(hide = true)]
    Clone(CloneOptions),
    /// Not supported: cp what has changed
    #[command(hide = true)]
    Diff(Names),
    /// Not supported: build images elsewhere
    #[command(hide = true)]
    Commit(Names),
    /// Not supported: exec tar
    #[command(hide = true)]
    Export(Names),
    /// Not supported: resize comes with the API's resize subresource
    #[command(hide = true)]
    Update(Names),
}

/// `container prune`, `image prune` and so on.
#[derive(Debug, clap::Args)]
pub(crate) struct Prune {
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Only those with a label, or older than a time (until=24h)
    #[arg(long, value_name = "FILTER", action = ArgAction::Append, value_parser = crate::format::well_formed)]
    pub(crate) filter: Vec<String>,
}
