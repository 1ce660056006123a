//! Values of single flags.

use std::path::Path;

use serde_json::{Value, json};

use crate::{
    cli::Create,
    error::{Failure, Result},
    model::PublishedPort,
    units,
};

/// A text that Kubernetes leaves as it is: it would expand `$(NAME)` and take `$$` for `$`.
pub(super) fn literal(text: &str) -> String {
    if text.contains("$(") || text.contains("$$") {
        return text.replace('$', "$$");
    }
    text.to_owned()
}

/// Lines of a file of variables or labels, without comments.
pub(crate) fn lines_of(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::usage(format_args!("open {}: {error}", path.display())))?;
    Ok(text
        .lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect())
}

/// Variables of files, then of flags; a later one wins. A name alone is passed on from here.
pub(crate) fn environment(
    files: &[std::path::PathBuf],
    flags: &[String],
) -> Result<Vec<(String, String)>> {
    let mut given = Vec::new();
    for file in files {
        given.extend(lines_of(file)?);
    }
    given.extend(flags.iter().cloned());
    let mut variables: Vec<(String, String)> = Vec::new();
    for text in given {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => {
                let value = std::env::var(&text).ok();
                (text.clone(), value)
            }
        };
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(Failure::usage(format_args!(
                "invalid environment variable: {text}"
            )));
        }
        variables.retain(|(name, _)| *name != key);
        if let Some(value) = value {
            variables.push((key, value));
        }
    }
    Ok(variables)
}

/// `KEY=VALUE` of every text.
pub(crate) fn key_values(texts: &[String], flag: &str) -> Result<Vec<(String, String)>> {
    texts
        .iter()
        .map(|text| {
            text.split_once('=')
                .filter(|(key, _)| !key.is_empty())
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .ok_or_else(|| {
                    Failure::usage(format_args!(
                        "invalid argument \"{text}\" for \"--{flag}\" flag: KEY=VALUE is expected"
                    ))
                })
        })
        .collect()
}

/// Whether Kubernetes takes it as a label, and it is not one of a system's own.
pub(super) fn is_kubernetes_label(key: &str, value: &str) -> bool {
    let part = |text: &str| {
        text.len() <= 63
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && text
                .chars()
                .next()
                .is_none_or(|c| c.is_ascii_alphanumeric())
            && text
                .chars()
                .last()
                .is_none_or(|c| c.is_ascii_alphanumeric())
    };
    let (prefix, name) = key.split_once('/').unwrap_or(("", key));
    let own = ["kubernetes.io", "k8s.io", "hypernetes.io"]
        .iter()
        .any(|domain| prefix == *domain || prefix.ends_with(&format!(".{domain}")));
    !name.is_empty()
        && part(name)
        && part(value)
        && !own
        && (prefix.is_empty()
            || (prefix.len() <= 253
                && prefix == prefix.to_ascii_lowercase()
                && prefix
                    .split('.')
                    .all(|label| !label.is_empty() && part(label) && !label.contains('_'))))
}

/// Ports that the container says it listens on.
pub(super) fn exposed(flags: &[String], published: &[PublishedPort]) -> Result<Vec<Value>> {
    let mut ports: Vec<(u16, String)> = published
        .iter()
        .map(|port| (port.container, port.protocol.clone()))
        .collect();
    for flag in flags {
        let (range, protocol) = flag.split_once('/').unwrap_or((flag, "tcp"));
        let invalid = || Failure::usage(format_args!("invalid port format for --expose: {flag}"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: u16 = first.parse().map_err(|_bad| invalid())?;
        let last: u16 = last.parse().map_err(|_bad| invalid())?;
        if first == 0 || last < first || !matches!(protocol, "tcp" | "udp") {
            return Err(invalid());
        }
        ports.extend((first..=last).map(|port| (port, protocol.to_owned())));
    }
    ports.sort();
    ports.dedup();
    Ok(ports
        .into_iter()
        .map(|(port, protocol)| json!({"containerPort": port, "protocol": protocol.to_ascii_uppercase()}))
        .collect())
}

/// A user or group as a number: names are the image's, which the API does not read.
pub(super) fn numeric_id(flag: &str, text: &str) -> Result<i64> {
    text.parse::<u32>().map(i64::from).map_err(|_bad| {
        Failure::refused(
            format_args!("{flag} {text}"),
            "Kubernetes takes numbers only, such as 1000 or 1000:1000; `hyper run --rm IMAGE id NAME` says which",
        )
    })
}

/// A capability without its prefix.
fn capability(name: &str) -> String {
    let name = name.to_ascii_uppercase();
    name.strip_prefix("CAP_").unwrap_or(&name).to_owned()
}

/// The container's security context.
pub(super) fn security(create: &Create) -> Result<Option<Value>> {
    let mut context = json!({});
    if let Some(user) = &create.user {
        let (user, group) = user
            .split_once(':')
            .map_or((user.as_str(), None), |(user, group)| (user, Some(group)));
        context["runAsUser"] = numeric_id("--user", user)?.into();
        if let Some(group) = group {
            context["runAsGroup"] = numeric_id("--user", group)?.into();
        }
    }
    if create.read_only {
        context["readOnlyRootFilesystem"] = true.into();
    }
    for (flag, list) in [("add", &create.cap_add), ("drop", &create.cap_drop)] {
        if !list.is_empty() {
            context["capabilities"][flag] = list.iter().map(|name| capability(name)).collect();
        }
    }
    for option in &create.security_opt {
        let (key, value) = option
            .split_once('=')
            .or_else(|| option.split_once(':'))
            .unwrap_or((option, ""));
        match (key, value) {
            ("no-new-privileges", "" | "true") => {
                context["allowPrivilegeEscalation"] = false.into();
            }
            ("seccomp", "unconfined") => context["seccompProfile"] = json!({"type": "Unconfined"}),
            ("seccomp", "builtin") => context["seccompProfile"] = json!({"type": "RuntimeDefault"}),
            ("no-new-privileges", "false") | ("apparmor", "unconfined") | ("label", "disable") => {}
            ("seccomp", _) => {
                return Err(Failure::refused(
                    format_args!("--security-opt {option}"),
                    "the profiles are `builtin` and `unconfined`; a container has a kernel of its own",
                ));
            }
            ("apparmor" | "label", _) => {
                return Err(Failure::refused(
                    format_args!("--security-opt {option}"),
                    "a container has a kernel of its own, without AppArmor and SELinux",
                ));
            }
            _ => {
                return Err(Failure::usage(format_args!(
                    "invalid --security-opt: \"{option}\""
                )));
            }
        }
    }
    Ok(context
        .as_object()
        .is_some_and(|map| !map.is_empty())
        .then_some(context))
}

/// docker's health check is a readiness probe: it says how the container is, and restarts nothing.
pub(super) fn health(create: &Create) -> Result<Option<Value>> {
    let Some(command) = &create.health_cmd else {
        return Ok(None);
    };
    if create.no_healthcheck {
        return Err(Failure::usage(
            "--no-healthcheck conflicts with --health-* options",
        ));
    }
    let seconds = |text: &Option<String>, usual: u64| -> Result<u64> {
        match text {
            None => Ok(usual),
            Some(text) => {
                let time = units::parse_duration(text)?;
                Ok(time.as_secs() + u64::from(time.subsec_nanos() > 0))
            }
        }
    };
    Ok(Some(json!({
        "exec": {"command": ["/bin/sh", "-c", command]},
        "periodSeconds": seconds(&create.health_interval, 30)?.max(1),
        "timeoutSeconds": seconds(&create.health_timeout, 30)?.max(1),
        "initialDelaySeconds": seconds(&create.health_start_period, 0)?,
        "failureThreshold": create.health_retries.unwrap_or(3).max(1),
    })))
}

/// Numbers of signals that are the same on all Linux machines.
const SIGNALS: [(&str, u8); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// A signal by name or number, as `SIGTERM`.
pub(crate) fn signal(text: &str) -> Result<String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS
        .iter()
        .find(|(known, number)| *known == name || number.to_string() == name)
        .map(|(known, _)| format!("SIG{known}"))
        .ok_or_else(|| Failure::daemon(format_args!("invalid signal: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_are_left_alone() {
        // Kubernetes turns `$$` into `$`, and `$(X)` into a variable's value.
        assert_eq!(literal("echo $HOME"), "echo $HOME");
        assert_eq!(literal("echo $(date) $HOME"), "echo $$(date) $$HOME");
        assert_eq!(literal("$$"), "$$$$");
    }

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(signal("term").unwrap(), "SIGTERM");
        assert_eq!(signal("SIGHUP").unwrap(), "SIGHUP");
        assert_eq!(signal("9").unwrap(), "SIGKILL");
        assert_eq!(
            signal("nope").unwrap_err().message,
            "Error response from daemon: invalid signal: nope"
        );
    }

    #[test]
    fn labels_that_kubernetes_takes() {
        for (key, value, takes) in [
            ("app", "web", true),
            ("com.example/app", "1.0", true),
            ("app", "two words", false),
            ("kubernetes.io/x", "y", false),
            ("hyper.hypernetes.io/name", "y", false),
            ("", "x", false),
            ("com.example.vendor", "ACME", true),
        ] {
            assert_eq!(is_kubernetes_label(key, value), takes, "{key}={value}");
        }
    }

    #[test]
    fn a_later_variable_wins_and_an_unset_one_is_dropped() {
        let flags = ["A=1", "B=x=y", "A=2", "HYPER_TEST_NOT_SET"].map(str::to_owned);
        assert_eq!(
            environment(&[], &flags).unwrap(),
            [
                ("B".to_owned(), "x=y".to_owned()),
                ("A".to_owned(), "2".to_owned())
            ]
        );
        assert!(environment(&[], &["=x".to_owned()]).is_err());
    }
}
