//! Flags of the verbs on containers that exist.

use clap::{ArgAction, Args};
use clap_complete::engine::ArgValueCandidates;

use crate::completion;

/// Names or ids, and nothing else.
#[derive(Debug, Args)]
pub(crate) struct Names {
    /// Containers
    #[arg(required = true, value_name = "CONTAINER", add = ArgValueCandidates::new(completion::containers))]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Stopped containers too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Keep those of which a condition holds: status=exited, name=web, label=a=b, …
    #[arg(short, long, value_name = "FILTER", action = ArgAction::Append, value_parser = crate::format::well_formed)]
    pub(crate) filter: Vec<String>,
    /// table, json or a Go template
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// The N newest, in any state
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) last: Option<i64>,
    /// The newest, in any state
    #[arg(short, long)]
    pub(crate) latest: bool,
    /// Whole ids and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Only ids
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Sizes too (they are not known: printed as N/A)
    #[arg(short, long)]
    pub(crate) size: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Go on with what comes
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// From a time on: 2026-01-02T13:23:37Z, 42m
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Until a time
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<String>,
    /// The last N lines
    #[arg(short = 'n', long, default_value = "all", value_name = "N")]
    pub(crate) tail: String,
    /// With times
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// With the container's labels and environment given to the log
    #[arg(long)]
    pub(crate) details: bool,
    /// Container
    #[arg(add = ArgValueCandidates::new(completion::containers))]
    pub(crate) container: String,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Leave it running in the background
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Keys that leave the process running
    #[arg(
        long,
        value_name = "KEYS",
        env = "HYPER_DETACH_KEYS",
        default_value = "ctrl-p,ctrl-q"
    )]
    pub(crate) detach_keys: String,
    /// Set an environment variable
    #[arg(short, long, value_name = "KEY[=VALUE]", action = ArgAction::Append)]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE", action = ArgAction::Append)]
    pub(crate) env_file: Vec<std::path::PathBuf>,
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// More privileges: not supported
    #[arg(long, hide = true)]
    pub(crate) privileged: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// User: not supported, exec runs as the container's user
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Container, command and its arguments
    #[arg(required = true, trailing_var_arg = true, num_args = 2.., value_name = "CONTAINER COMMAND [ARG...]", add = ArgValueCandidates::new(completion::containers))]
    pub(crate) container_and_command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// Keys that leave the container running
    #[arg(
        long,
        value_name = "KEYS",
        env = "HYPER_DETACH_KEYS",
        default_value = "ctrl-p,ctrl-q"
    )]
    pub(crate) detach_keys: String,
    /// Do not send standard input
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Pass signals to the process
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) sig_proxy: bool,
    /// Container
    #[arg(add = ArgValueCandidates::new(completion::containers))]
    pub(crate) container: String,
}

#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Join output and end with the container's exit code
    #[arg(short, long)]
    pub(crate) attach: bool,
    /// Join standard input too
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Keys that leave the container running
    #[arg(
        long,
        value_name = "KEYS",
        env = "HYPER_DETACH_KEYS",
        default_value = "ctrl-p,ctrl-q"
    )]
    pub(crate) detach_keys: String,
    #[command(flatten)]
    pub(crate) names: Names,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Seconds until it is killed
    #[arg(
        short = 't',
        long,
        visible_alias = "time",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    pub(crate) timeout: Option<i64>,
    /// Signal: not supported, set it with run --stop-signal
    #[arg(short, long)]
    pub(crate) signal: Option<String>,
    #[command(flatten)]
    pub(crate) names: Names,
}

#[derive(Debug, Args)]
pub(crate) struct Restart {
    /// Seconds until it is killed
    #[arg(
        short = 't',
        long,
        visible_alias = "time",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    pub(crate) timeout: Option<i64>,
    #[command(flatten)]
    pub(crate) names: Names,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Signal
    #[arg(short, long, default_value = "KILL")]
    pub(crate) signal: String,
    #[command(flatten)]
    pub(crate) names: Names,
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Running containers too
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Anonymous volumes too (they always go with the container)
    #[arg(short, long)]
    pub(crate) volumes: bool,
    #[command(flatten)]
    pub(crate) names: Names,
}

#[derive(Debug, Args)]
pub(crate) struct Wait {
    #[command(flatten)]
    pub(crate) names: Names,
}

#[derive(Debug, Args)]
pub(crate) struct Rename {
    /// Container
    #[arg(add = ArgValueCandidates::new(completion::containers))]
    pub(crate) container: String,
    /// Its new name
    pub(crate) new_name: String,
}

#[derive(Debug, Args)]
pub(crate) struct CloneOptions {
    /// Go on from a snapshot; then the name of the new one is the only argument
    #[arg(long, value_name = "SNAPSHOT", add = ArgValueCandidates::new(completion::snapshots))]
    pub(crate) snapshot: Option<String>,
    /// Running or suspended container, or pod
    #[arg(required_unless_present = "snapshot", add = ArgValueCandidates::new(completion::containers))]
    pub(crate) container: Option<String>,
    /// Name of the new one [default: made of the other's]
    #[arg(conflicts_with = "snapshot")]
    pub(crate) new_name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// json or a Go template
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// Sizes too (they are not known)
    #[arg(short, long)]
    pub(crate) size: bool,
    /// container, network or volume
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: Option<String>,
    /// Names or ids
    #[arg(required = true, value_name = "NAME|ID", add = ArgValueCandidates::new(completion::containers))]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// Keep owners and groups
    #[arg(short, long)]
    pub(crate) archive: bool,
    /// Follow a symbolic link at the source
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,
    /// Say nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// CONTAINER:PATH, a path here, or - for a tar stream
    #[arg(value_name = "CONTAINER:SRC_PATH")]
    pub(crate) source: String,
    /// CONTAINER:PATH, a path here, or - for a tar stream
    #[arg(value_name = "DEST_PATH|-")]
    pub(crate) destination: String,
}

#[derive(Debug, Args)]
pub(crate) struct Port {
    /// Container
    #[arg(add = ArgValueCandidates::new(completion::containers))]
    pub(crate) container: String,
    /// Port in the container: 80 or 80/tcp
    #[arg(value_name = "PRIVATE_PORT[/PROTO]")]
    pub(crate) port: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Container
    #[arg(add = ArgValueCandidates::new(completion::containers))]
    pub(crate) container: String,
    /// Options of ps in the container
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ps OPTIONS"
    )]
    pub(crate) options: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Stats {
    /// Stopped containers too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// table, json or a Go template
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// Once, and not again and again
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Whole ids
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Containers; all running ones by default
    #[arg(value_name = "CONTAINER", add = ArgValueCandidates::new(completion::containers))]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Keep those of which a condition holds: container=web, event=start, type=container
    #[arg(short, long, value_name = "FILTER", action = ArgAction::Append, value_parser = crate::format::well_formed)]
    pub(crate) filter: Vec<String>,
    /// json or a Go template
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// From a time on
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Until a time
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<String>,
}
