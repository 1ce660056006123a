//! docker's flags that have no meaning here, and what to use instead.

use clap::error::{ContextKind, ContextValue};

const OWN_KERNEL: &str = "a container has a microVM and a kernel of its own";

/// Flag and advice.
const FLAGS: &[(&str, &str)] = &[
    (
        "--privileged",
        "a container has a kernel of its own, and --cap-add gives it what it needs there",
    ),
    (
        "--ulimit",
        "Kubernetes has no field for it; set it in the command: sh -c 'ulimit -n 4096; exec PROGRAM'",
    ),
    ("--device", "no device of any host is seen in a container"),
    ("--gpus", "no device of any host is seen in a container"),
    ("--pid", OWN_KERNEL),
    ("--ipc", OWN_KERNEL),
    ("--uts", OWN_KERNEL),
    ("--userns", OWN_KERNEL),
    ("--cgroupns", OWN_KERNEL),
    ("--cgroup-parent", OWN_KERNEL),
    (
        "--runtime",
        "every container has a microVM; --kernel chooses its kernel",
    ),
    ("--isolation", "every container has a microVM"),
    (
        "--link",
        "containers of one network find each other by name; --network chooses it",
    ),
    (
        "--network-alias",
        "use a compose file: its services find each other by name",
    ),
    ("--ip", "addresses are given by the network"),
    ("--ip6", "addresses are given by the network"),
    ("--mac-address", "addresses are given by the network"),
    ("--publish-all", "name the ports: -p HOST:CONTAINER"),
    ("-P", "name the ports: -p HOST:CONTAINER"),
    ("--volumes-from", "name the volumes: -v NAME:PATH"),
    (
        "--volume-driver",
        "volumes are made with `hyper volume create`",
    ),
    ("--storage-opt", "--tmpfs and volumes have sizes"),
    (
        "--log-driver",
        "the node keeps logs; `hyper logs` reads them",
    ),
    ("--log-opt", "the node keeps logs; `hyper logs` reads them"),
    ("--oom-kill-disable", "a memory limit is a limit"),
    ("--oom-score-adj", OWN_KERNEL),
    ("--memory-swap", "there is no swap in a container's VM"),
    (
        "--memory-swappiness",
        "there is no swap in a container's VM",
    ),
    ("--kernel-memory", "--memory limits the whole"),
    ("--cpu-shares", "--cpus limits CPUs"),
    ("--cpu-period", "--cpus limits CPUs"),
    ("--cpu-quota", "--cpus limits CPUs"),
    ("--cpuset-cpus", "--cpus limits CPUs"),
    ("--cpuset-mems", "--memory limits memory"),
    ("--blkio-weight", "Kubernetes has no field for it"),
    (
        "--pids-limit",
        "a container has a kernel of its own; --memory limits what processes can take",
    ),
    ("--domainname", "--hostname names the container"),
    (
        "--disable-content-trust",
        "images are named by digest where content matters",
    ),
    (
        "--device-cgroup-rule",
        "no device of any host is seen in a container",
    ),
    (
        "--health-start-interval",
        "--health-interval is used from the start",
    ),
];

/// A sentence for a command line that clap refused because of one of docker's flags or verbs.
pub(crate) fn explain(error: &clap::Error) -> Option<String> {
    use clap::error::ErrorKind;
    let text = |kind: ContextKind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::UnknownArgument => {
            let given = text(ContextKind::InvalidArg)?;
            let flag = given.split('=').next().unwrap_or(given);
            match FLAGS.iter().find(|(name, _)| *name == flag) {
                Some((name, advice)) => Some(format!("hyper: {name} is not supported: {advice}")),
                None if flag.starts_with("--") => Some(format!(
                    "unknown flag: {flag}\n\nRun 'hyper --help' for more information"
                )),
                None if flag.starts_with('-') => {
                    let letter: String = flag.chars().skip(1).take(1).collect();
                    Some(format!(
                        "unknown shorthand flag: '{letter}' in {flag}\n\nRun 'hyper --help' for more information"
                    ))
                }
                None => None,
            }
        }
        ErrorKind::MissingRequiredArgument | ErrorKind::TooFewValues => too_few(error),
        ErrorKind::InvalidSubcommand => {
            let verb = text(ContextKind::InvalidSubcommand)?;
            Some(match verb {
                "swarm" | "service" | "stack" | "node" | "secret" | "config" => {
                    format!(
                        "hyper: {verb} is not supported: the cluster is a Kubernetes; use kubectl"
                    )
                }
                "buildx" | "builder" => format!(
                    "hyper: {verb} is not supported: build with another tool, push into a registry, then run"
                ),
                "plugin" | "trust" | "manifest" => format!(
                    "hyper: {verb} is not supported: it is the registry's or the operator's"
                ),
                _ => format!(
                    "hyper: unknown command: hyper {verb}\n\nRun 'hyper --help' for more information"
                ),
            })
        }
        _ => None,
    }
}

/// docker's words for arguments that are missing.
fn too_few(error: &clap::Error) -> Option<String> {
    let count = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::Strings(missing)) => missing.len(),
        _ => 1,
    };
    let rendered = error.render().to_string();
    let usage = rendered
        .lines()
        .find_map(|line| line.strip_prefix("Usage: "))?;
    let verb: Vec<&str> = usage
        .split(' ')
        .take_while(|word| word.chars().all(|c| c.is_ascii_lowercase()))
        .collect();
    let verb = verb.join(" ");
    let arguments = if count == 1 { "argument" } else { "arguments" };
    Some(format!(
        "hyper: '{verb}' requires at least {count} {arguments}\n\nUsage:  {usage}\n\nRun '{verb} --help' for more information"
    ))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn flags_and_verbs_of_docker_are_refused_with_advice() {
        for (args, said) in [
            (
                &["run", "--privileged", "busybox"][..],
                "hyper: --privileged is not supported: a container has a kernel of its own",
            ),
            (
                &["run", "--ulimit", "nofile=1", "busybox"],
                "hyper: --ulimit is not supported: Kubernetes has no field for it",
            ),
            (
                &["run", "--gpus=all", "busybox"],
                "hyper: --gpus is not supported",
            ),
            (
                &["run", "-P", "busybox"],
                "hyper: -P is not supported: name the ports",
            ),
            (&["run", "--bogus", "busybox"], "unknown flag: --bogus"),
            (&["ps", "-x"], "unknown shorthand flag: 'x' in -x"),
            (
                &["swarm", "init"],
                "hyper: swarm is not supported: the cluster is a Kubernetes",
            ),
            (&["dance"], "hyper: unknown command: hyper dance"),
            (
                &["rm"],
                "hyper: 'hyper rm' requires at least 1 argument\n\nUsage:  hyper rm",
            ),
            (
                &["rename", "a"],
                "hyper: 'hyper rename' requires at least 1 argument",
            ),
            (
                &["compose", "exec", "web"],
                "hyper: 'hyper compose exec' requires at least 1 argument",
            ),
        ] {
            let error = Cli::try_parse_from(["hyper"].iter().chain(args)).unwrap_err();
            let text = explain(&error).unwrap_or_else(|| panic!("{args:?}: {error}"));
            assert!(text.starts_with(said), "{args:?}: {text}");
        }
    }

    #[test]
    fn no_flag_is_both_served_and_refused() {
        use clap::CommandFactory as _;
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        for (flag, _) in FLAGS {
            let served = run.get_arguments().any(|arg| {
                arg.get_long()
                    .is_some_and(|long| format!("--{long}") == *flag)
            });
            assert!(!served, "{flag}");
        }
    }
}
