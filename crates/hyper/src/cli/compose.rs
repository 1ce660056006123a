//! `hyper compose`.

use std::path::PathBuf;

use clap::{ArgAction, Args, Subcommand};

/// Which project.
#[derive(Debug, Clone, Args)]
pub(crate) struct ComposeFiles {
    /// Compose file; a later one overrides an earlier one
    #[arg(short, long, value_name = "FILE", env = "COMPOSE_FILE", action = ArgAction::Append)]
    pub(crate) file: Vec<PathBuf>,
    /// Name of the project [default: of its directory]
    #[arg(short, long, value_name = "NAME", env = "COMPOSE_PROJECT_NAME")]
    pub(crate) project_name: Option<String>,
    /// Directory of the project [default: of the first file]
    #[arg(long, value_name = "DIR")]
    pub(crate) project_directory: Option<PathBuf>,
    /// Services of this profile too
    #[arg(long, value_name = "NAME", env = "COMPOSE_PROFILES", value_delimiter = ',', action = ArgAction::Append)]
    pub(crate) profile: Vec<String>,
    /// Variables for the file [default: .env]
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    pub(crate) env_file: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Compose {
    #[command(flatten)]
    pub(crate) files: ComposeFiles,
    #[command(subcommand)]
    pub(crate) command: ComposeCommand,
}

/// `up`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Up {
    /// Do not stay to show output
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Wait until services run or are healthy; implies --detach
    #[arg(long)]
    pub(crate) wait: bool,
    /// Make containers anew though nothing has changed
    #[arg(long)]
    pub(crate) force_recreate: bool,
    /// Do not make a container anew that has changed
    #[arg(long)]
    pub(crate) no_recreate: bool,
    /// Not the services that the named ones depend on
    #[arg(long)]
    pub(crate) no_deps: bool,
    /// Remove containers of services that are no longer in the file
    #[arg(long)]
    pub(crate) remove_orphans: bool,
    /// SERVICE=N containers
    #[arg(long, value_name = "SERVICE=N", action = ArgAction::Append)]
    pub(crate) scale: Vec<String>,
    /// always, missing or never
    #[arg(long, value_name = "POLICY")]
    pub(crate) pull: Option<String>,
    /// Seconds that a stop may take
    #[arg(short, long, value_name = "SECONDS")]
    pub(crate) timeout: Option<i64>,
    /// Services; all by default
    pub(crate) services: Vec<String>,
}

/// `down`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Down {
    /// Remove volumes too
    #[arg(short, long)]
    pub(crate) volumes: bool,
    /// Remove containers of services that are not in the file
    #[arg(long)]
    pub(crate) remove_orphans: bool,
    /// Seconds that a stop may take
    #[arg(short, long, value_name = "SECONDS")]
    pub(crate) timeout: Option<i64>,
    /// Services; all by default
    pub(crate) services: Vec<String>,
}

/// Services and the time that a stop may take.
#[derive(Debug, Clone, Args)]
pub(crate) struct Services {
    /// Seconds that a stop may take
    #[arg(short, long, value_name = "SECONDS")]
    pub(crate) timeout: Option<i64>,
    /// Services; all by default
    pub(crate) services: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ComposeCommand {
    /// Create and start what the file says
    Up(Up),
    /// Stop and remove it
    Down(Down),
    /// Have as many containers of services as is said
    Scale {
        /// Not the services that the named ones depend on
        #[arg(long)]
        no_deps: bool,
        /// SERVICE=N
        #[arg(required = true, value_name = "SERVICE=N")]
        scales: Vec<String>,
    },
    /// List its containers
    Ps {
        /// Stopped containers too
        #[arg(short, long)]
        all: bool,
        /// table, json or a Go template
        #[arg(long)]
        format: Option<String>,
        /// Only ids
        #[arg(short, long)]
        quiet: bool,
        /// Print services
        #[arg(long)]
        services: bool,
        /// Services; all by default
        only: Vec<String>,
    },
    /// Output of its containers
    Logs {
        /// Go on with what comes
        #[arg(short, long)]
        follow: bool,
        /// The last N lines
        #[arg(short = 'n', long, default_value = "all")]
        tail: String,
        /// With times
        #[arg(short, long)]
        timestamps: bool,
        /// From a time on
        #[arg(long)]
        since: Option<String>,
        /// Until a time
        #[arg(long)]
        until: Option<String>,
        /// Without names before lines
        #[arg(long)]
        no_log_prefix: bool,
        /// Services; all by default
        services: Vec<String>,
    },
    /// Print the file as it is understood
    #[command(aliases = ["convert"])]
    Config {
        /// yaml or json
        #[arg(long, default_value = "yaml")]
        format: String,
        /// Only names of services
        #[arg(long)]
        services: bool,
        /// Say only whether it is right
        #[arg(short, long)]
        quiet: bool,
    },
    /// Run a command in a container of a service
    Exec {
        /// Leave it running in the background
        #[arg(short, long)]
        detach: bool,
        /// Set an environment variable
        #[arg(short, long, value_name = "KEY[=VALUE]")]
        env: Vec<String>,
        /// Which container of the service
        #[arg(long, default_value_t = 1)]
        index: u32,
        /// No terminal
        #[arg(short = 'T', long)]
        no_tty: bool,
        /// Working directory
        #[arg(short, long)]
        workdir: Option<String>,
        /// Service, command and its arguments
        #[arg(required = true, trailing_var_arg = true, num_args = 2.., value_name = "SERVICE COMMAND [ARG...]")]
        service_and_command: Vec<String>,
    },
    /// Start stopped containers
    Start(Services),
    /// Stop containers
    Stop(Services),
    /// Stop and start containers
    Restart(Services),
    /// Send SIGKILL or another signal
    Kill {
        /// Signal
        #[arg(short, long, default_value = "KILL")]
        signal: String,
        /// Services; all by default
        services: Vec<String>,
    },
    /// Remove stopped containers
    Rm {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
        /// Stop them first
        #[arg(short, long)]
        stop: bool,
        /// Services; all by default
        services: Vec<String>,
    },
    /// Have the cluster fetch the images
    Pull {
        /// Services; all by default
        services: Vec<String>,
    },
    /// List projects
    Ls {
        /// table, json or a Go template
        #[arg(long)]
        format: Option<String>,
        /// Only names
        #[arg(short, long)]
        quiet: bool,
        /// Stopped ones too
        #[arg(short, long)]
        all: bool,
    },
}
