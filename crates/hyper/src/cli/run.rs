//! `run` and `create`.

use std::path::PathBuf;

use clap::{ArgAction, Args};

/// Create and start a container.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Run in the background and print the id
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Keys that leave the container running
    #[arg(
        long,
        value_name = "KEYS",
        env = "HYPER_DETACH_KEYS",
        default_value = "ctrl-p,ctrl-q"
    )]
    pub(crate) detach_keys: String,
    /// Pass signals to the process
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) sig_proxy: bool,
    /// Print what the start took, step by step
    #[arg(long)]
    pub(crate) timing: bool,
    #[command(flatten)]
    pub(crate) create: Create,
}

/// What a container is.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Create {
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Attach to STDIN, STDOUT or STDERR
    #[arg(short, long, value_name = "STREAM", action = ArgAction::Append)]
    pub(crate) attach: Vec<String>,
    /// Remove the container when it ends
    #[arg(long)]
    pub(crate) rm: bool,
    /// Name of the container
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Set an environment variable, or pass one on
    #[arg(short, long, value_name = "KEY[=VALUE]", action = ArgAction::Append)]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    pub(crate) env_file: Vec<PathBuf>,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]", action = ArgAction::Append)]
    pub(crate) label: Vec<String>,
    /// Read labels from a file
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    pub(crate) label_file: Vec<PathBuf>,
    /// Set an annotation of the pod
    #[arg(long, value_name = "KEY=VALUE", action = ArgAction::Append)]
    pub(crate) annotation: Vec<String>,
    /// Publish a port: HOST:CONTAINER[/PROTOCOL]
    #[arg(short, long, value_name = "PORTS", action = ArgAction::Append)]
    pub(crate) publish: Vec<String>,
    /// Say that the container listens on a port
    #[arg(long, value_name = "PORT", action = ArgAction::Append)]
    pub(crate) expose: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User and group, as numbers: UID[:GID]
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// More groups, as numbers
    #[arg(long, value_name = "GID", action = ArgAction::Append)]
    pub(crate) group_add: Vec<String>,
    /// Run this instead of the image's entry point
    #[arg(long, value_name = "COMMAND")]
    pub(crate) entrypoint: Option<String>,
    /// no, on-failure[:N], always or unless-stopped
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub(crate) restart: String,
    /// Memory limit, such as 512m
    #[arg(short, long, value_name = "BYTES")]
    pub(crate) memory: Option<String>,
    /// Memory that is asked for at least
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory_reservation: Option<String>,
    /// CPUs, such as 1.5
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<String>,
    /// Host name in the container
    #[arg(short = 'h', long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Root file system is read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Add a capability
    #[arg(long, value_name = "CAP", action = ArgAction::Append)]
    pub(crate) cap_add: Vec<String>,
    /// Drop a capability
    #[arg(long, value_name = "CAP", action = ArgAction::Append)]
    pub(crate) cap_drop: Vec<String>,
    /// no-new-privileges, seccomp=unconfined
    #[arg(long, value_name = "OPTION", action = ArgAction::Append)]
    pub(crate) security_opt: Vec<String>,
    /// Directory in memory: PATH[:size=64m]
    #[arg(long, value_name = "PATH", action = ArgAction::Append)]
    pub(crate) tmpfs: Vec<String>,
    /// Volume: [NAME:]PATH[:ro]
    #[arg(short, long, value_name = "VOLUME", action = ArgAction::Append)]
    pub(crate) volume: Vec<String>,
    /// Volume: type=volume|tmpfs,target=PATH,…
    #[arg(long, value_name = "MOUNT", action = ArgAction::Append)]
    pub(crate) mount: Vec<String>,
    /// Let an init process reap what the container leaves
    #[arg(long)]
    pub(crate) init: bool,
    /// Signal that stops the container
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// Seconds from that signal to the kill
    #[arg(long, value_name = "SECONDS")]
    pub(crate) stop_timeout: Option<i64>,
    /// always, missing or never
    #[arg(long, value_name = "POLICY", default_value = "missing")]
    pub(crate) pull: String,
    /// Platform of the image: linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Network to join
    #[arg(long, visible_alias = "net", value_name = "NAME")]
    pub(crate) network: Option<String>,
    /// DNS server
    #[arg(long, value_name = "ADDRESS", action = ArgAction::Append)]
    pub(crate) dns: Vec<String>,
    /// DNS search domain
    #[arg(long, value_name = "DOMAIN", action = ArgAction::Append)]
    pub(crate) dns_search: Vec<String>,
    /// DNS option
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION", action = ArgAction::Append)]
    pub(crate) dns_option: Vec<String>,
    /// Line of /etc/hosts: NAME:ADDRESS
    #[arg(long, value_name = "NAME:ADDRESS", action = ArgAction::Append)]
    pub(crate) add_host: Vec<String>,
    /// Size of /dev/shm
    #[arg(long, value_name = "BYTES")]
    pub(crate) shm_size: Option<String>,
    /// Kernel parameter of the container's own kernel
    #[arg(long, value_name = "KEY=VALUE", action = ArgAction::Append)]
    pub(crate) sysctl: Vec<String>,
    /// Command that says whether the container is healthy
    #[arg(long, value_name = "COMMAND")]
    pub(crate) health_cmd: Option<String>,
    /// Time between two checks
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_interval: Option<String>,
    /// Time that a check may take
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_timeout: Option<String>,
    /// Time before checks count
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_start_period: Option<String>,
    /// Failures in a row until unhealthy
    #[arg(long, value_name = "NUMBER")]
    pub(crate) health_retries: Option<i32>,
    /// No health check
    #[arg(long)]
    pub(crate) no_healthcheck: bool,
    /// Write the id into a file
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// Kernel to boot, of those that the tenant may use
    #[arg(long, value_name = "NAME")]
    pub(crate) kernel: Option<String>,
    /// Say nothing of a pull
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    pub(crate) help: Option<bool>,
    /// Image, command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE [COMMAND] [ARG...]", num_args = 1.., hide_default_value = true)]
    pub(crate) image_and_command: Vec<String>,
}

impl Create {
    /// The image.
    pub(crate) fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// The command and its arguments; empty for the image's own.
    pub(crate) fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }
}
