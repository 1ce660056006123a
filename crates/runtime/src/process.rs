//! What a container's first process is, out of the image's wishes and the owner's.

use hypernetes_agent_api::v1;
use hypernetes_container::{CapabilitySpec, capabilities};
use hypernetes_image::ImageConfig;

use crate::{
    api::{ContainerConfig, ExecConfig, ResourceConfig, SecurityConfig},
    error::RuntimeError,
    records::ContainerRecord,
};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Microseconds; what the kernel takes as default too.
const CPU_PERIOD: i64 = 100_000;
/// Below this the kernel refuses a quota.
const MIN_CPU_QUOTA: i64 = 1000;

fn invalid(field: &str, rule: impl Into<String>) -> RuntimeError {
    RuntimeError::Invalid {
        field: field.to_owned(),
        rule: rule.into(),
    }
}

/// The program and its arguments: a command replaces the image's entrypoint and its arguments,
/// arguments alone replace the image's arguments.
fn args(image: &ImageConfig, command: &[String], args: &[String]) -> Vec<String> {
    let (program, rest) = match (command, args) {
        ([], []) => (&image.entrypoint[..], &image.cmd[..]),
        ([], args) => (&image.entrypoint[..], args),
        (command, args) => (command, args),
    };
    [program, rest].concat()
}

fn name(variable: &str) -> &str {
    variable.split_once('=').map_or(variable, |(name, _)| name)
}

/// The image's environment with the owner's on top, each name once, at its first place.
fn env(image: &ImageConfig, config: &ContainerConfig, hostname: &str) -> Vec<String> {
    let mut env: Vec<String> = Vec::with_capacity(image.env.len() + config.env.len() + 3);
    let mut set =
        |variable: String| match env.iter_mut().find(|known| name(known) == name(&variable)) {
            Some(known) => *known = variable,
            None => env.push(variable),
        };
    set(DEFAULT_PATH.to_owned());
    set(format!("HOSTNAME={hostname}"));
    if config.tty {
        set("TERM=xterm".to_owned());
    }
    // An image's entry without "=" would unset it; there is nothing to unset.
    image
        .env
        .iter()
        .filter(|entry| entry.contains('='))
        .cloned()
        .for_each(&mut set);
    for (name, value) in &config.env {
        set(format!("{name}={value}"));
    }
    env
}

fn username(image: &ImageConfig, security: &SecurityConfig) -> String {
    // A number too goes as text, so that the guest finds its groups in the image as for a name.
    match security.run_as_user {
        Some(uid) => uid.to_string(),
        None if !security.run_as_username.is_empty() => security.run_as_username.clone(),
        None => image.user.clone(),
    }
}

fn user(security: &SecurityConfig) -> v1::User {
    v1::User {
        additional_gids: security.supplemental_groups.clone(),
        run_as_group: security.run_as_group,
        only_additional_gids: security.only_supplemental_groups,
        ..Default::default()
    }
}

fn check_text(field: &str, text: &str) -> Result<(), RuntimeError> {
    if text.contains('\0') {
        Err(invalid(field, "must not contain NUL"))
    } else {
        Ok(())
    }
}

/// The first process of a container.
pub(crate) fn container_process(
    image: &ImageConfig,
    config: &ContainerConfig,
    hostname: &str,
) -> Result<v1::Process, RuntimeError> {
    let args = args(image, &config.command, &config.args);
    if args.first().is_none_or(String::is_empty) {
        return Err(invalid(
            "command",
            "must be given: the image names no program",
        ));
    }
    if config.host.is_some() {
        return Err(invalid("host", "is not for a container in a VM"));
    }
    for arg in &args {
        check_text("command", arg)?;
    }
    for (name, value) in &config.env {
        if name.is_empty() || name.contains('=') {
            return Err(invalid("env", "names must not be empty or contain '='"));
        }
        check_text("env", name)?;
        check_text("env", value)?;
    }
    let security = &config.security;
    if let Some(profile) = &security.seccomp {
        profile.check().map_err(|rule| invalid("seccomp", rule))?;
    }
    check_ambient(security)?;
    if security.run_as_non_root && security.run_as_user == Some(0) {
        return Err(invalid("run_as_user", "must not be 0 with run_as_non_root"));
    }
    let cwd = [&config.working_dir, &image.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty())
        .map_or("/", String::as_str);
    if !cwd.starts_with('/') {
        return Err(invalid("working_dir", "must be absolute"));
    }
    check_text("working_dir", cwd)?;
    Ok(v1::Process {
        args,
        env: env(image, config, hostname),
        cwd: cwd.to_owned(),
        user: Some(v1::User {
            username: username(image, security),
            ..user(security)
        }),
        tty: config.tty,
        oom_score_adj: config.resources.oom_score_adj,
        ..privileges(security)
    })
}

/// What a container's first process is, without its user and privileges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstProcess {
    /// Program and arguments.
    pub args: Vec<String>,
    /// `NAME=value`, each name once.
    pub env: Vec<String>,
    /// Absolute working directory.
    pub cwd: String,
}

/// Works out a container's first process from what its image and its owner want.
///
/// # Errors
/// If there is no program, or a text cannot be an argument or a variable.
pub fn first_process(
    image: &ImageConfig,
    config: &ContainerConfig,
    hostname: &str,
) -> Result<FirstProcess, RuntimeError> {
    let config = ContainerConfig {
        host: None,
        ..config.clone()
    };
    let process = container_process(image, &config, hostname)?;
    Ok(FirstProcess {
        args: process.args,
        env: process.env,
        cwd: process.cwd,
    })
}

/// One more process in a container: user, environment and privileges of the first one.
pub(crate) fn exec_process(
    container: &ContainerRecord,
    config: &ExecConfig,
) -> Result<v1::Process, RuntimeError> {
    if config.command.first().is_none_or(String::is_empty) {
        return Err(invalid("command", "must name a program"));
    }
    for arg in &config.command {
        check_text("command", arg)?;
    }
    let (first, security) = (&container.process, &container.config.security);
    let mut env = first.env.clone();
    if config.tty && !env.iter().any(|variable| name(variable) == "TERM") {
        env.push("TERM=xterm".to_owned());
    }
    Ok(v1::Process {
        args: config.command.clone(),
        env,
        cwd: first.cwd.clone(),
        user: Some(v1::User {
            username: first.username.clone(),
            ..user(security)
        }),
        tty: config.tty,
        oom_score_adj: container.config.resources.oom_score_adj,
        ..privileges(security)
    })
}

/// A process of the guest itself: root, with the environment of the container whose files it has.
pub(crate) fn guest_process(
    container: &ContainerRecord,
    config: &ExecConfig,
) -> Result<v1::Process, RuntimeError> {
    let process = exec_process(container, config)?;
    Ok(v1::Process {
        args: process.args,
        env: process.env,
        cwd: "/".to_owned(),
        user: Some(v1::User::default()),
        tty: process.tty,
        ..Default::default()
    })
}

pub(crate) fn privileges(security: &SecurityConfig) -> v1::Process {
    v1::Process {
        capabilities: changed_capabilities(security),
        no_new_privs: security.no_new_privs,
        seccomp_default: security.seccomp_default
            && security.seccomp.is_none()
            && !security.privileged,
        seccomp: security
            .seccomp
            .as_ref()
            .filter(|_| !security.privileged)
            .map(Into::into),
        ..Default::default()
    }
}

/// The kernel lets no capability be ambient that is not permitted (capabilities(7)).
fn check_ambient(security: &SecurityConfig) -> Result<(), RuntimeError> {
    if security.ambient_capabilities.is_empty() {
        return Ok(());
    }
    let planned = capabilities::plan(&CapabilitySpec {
        add: security.add_capabilities.clone(),
        drop: security.drop_capabilities.clone(),
        ambient: security.ambient_capabilities.clone(),
        privileged: security.privileged,
    });
    planned
        .map(drop)
        .map_err(|error| invalid("ambient_capabilities", error.to_string()))
}

fn changed_capabilities(security: &SecurityConfig) -> Option<v1::Capabilities> {
    let capabilities = v1::Capabilities {
        add: security.add_capabilities.clone(),
        drop: security.drop_capabilities.clone(),
        ambient: security.ambient_capabilities.clone(),
    };
    (capabilities != v1::Capabilities::default()).then_some(capabilities)
}

/// Limits as the guest's cgroups want them.
pub(crate) fn resources(config: &ResourceConfig) -> v1::Resources {
    let quota = match config.cpu_limit_milli.max(0) {
        0 => 0,
        milli => (milli.saturating_mul(CPU_PERIOD) / 1000).max(MIN_CPU_QUOTA),
    };
    let shares = match config.cpu_request_milli.max(0) {
        0 => 2,
        milli => (milli.saturating_mul(1024) / 1000).clamp(2, 262_144),
    };
    v1::Resources {
        memory_limit: config.memory_limit.max(0),
        cpu_quota: quota,
        cpu_period: CPU_PERIOD.unsigned_abs(),
        cpu_shares: shares.unsigned_abs(),
        pids_limit: config.pids_limit.max(0),
        unified: config.unified.clone().into_iter().collect(),
        huge_pages: config
            .huge_pages
            .iter()
            .map(|(page_size, limit)| v1::HugePageLimit {
                page_size: page_size.clone(),
                limit: *limit,
            })
            .collect(),
    }
}

/// The number of a signal by name (`TERM`, `SIGTERM`, `SIGRTMIN+3`) or number, on x86-64.
pub fn signal_number(text: &str) -> Option<u32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    const RTMIN: u32 = 34;
    const RTMAX: u32 = 64;
    if let Ok(number) = text.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(index) = NAMES.iter().position(|known| *known == name) {
        return u32::try_from(index + 1).ok();
    }
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        let offset = rest
            .strip_prefix('+')
            .map_or_else(|| rest.is_empty().then_some(0), |n| n.parse().ok());
        RTMIN.checked_add(offset?)?
    } else {
        let rest = name.strip_prefix("RTMAX")?;
        let offset = rest
            .strip_prefix('-')
            .map_or_else(|| rest.is_empty().then_some(0), |n| n.parse().ok());
        RTMAX.checked_sub(offset?)?
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::container_config;

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into(), "-e".into()],
            cmd: vec!["default".into()],
            env: vec!["A=1".into(), "PATH=/image".into(), "NOTHING".into()],
            user: "www:www".into(),
            working_dir: "/srv".into(),
            ..Default::default()
        }
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn command_and_arguments_follow_kubernetes_table() {
        for (command, arguments, result) in [
            (&[][..], &[][..], &["/entry", "-e", "default"][..]),
            (&["c"], &[], &["c"]),
            (&[], &["a"], &["/entry", "-e", "a"]),
            (&["c"], &["a"], &["c", "a"]),
        ] {
            let got = args(&image(), &strings(command), &strings(arguments));
            assert_eq!(got, strings(result));
        }
    }

    #[test]
    fn the_owner_wins_over_the_image_and_each_name_is_there_once() {
        let mut config = container_config("a");
        config.env = vec![("A".into(), "2".into()), ("B".into(), "x=y".into())];
        let process = container_process(&image(), &config, "pod").unwrap();
        assert_eq!(
            process.env,
            strings(&["PATH=/image", "HOSTNAME=pod", "A=2", "B=x=y"])
        );
        assert_eq!(process.cwd, "/srv");
        assert_eq!(process.user.unwrap().username, "www:www");
    }

    #[test]
    fn what_cannot_run_is_refused_by_name_of_the_field() {
        let mut config = container_config("a");
        let field = |config: &ContainerConfig, image: &ImageConfig| match container_process(
            image, config, "h",
        )
        .unwrap_err()
        {
            RuntimeError::Invalid { field, .. } => field,
            other => panic!("{other:?}"),
        };
        config.command.clear();
        assert_eq!(field(&config, &ImageConfig::default()), "command");
        config.command = strings(&["a\0b"]);
        assert_eq!(field(&config, &image()), "command");
        config.command = strings(&["a"]);
        config.env = vec![("A=B".into(), String::new())];
        assert_eq!(field(&config, &image()), "env");
        config.env.clear();
        config.working_dir = "relative".into();
        assert_eq!(field(&config, &image()), "working_dir");
        config.working_dir.clear();
        config.security.run_as_non_root = true;
        config.security.run_as_user = Some(0);
        assert_eq!(field(&config, &image()), "run_as_user");
    }

    #[test]
    fn a_numeric_user_goes_through_the_image_s_tables() {
        let mut config = container_config("a");
        config.security.run_as_user = Some(1000);
        config.security.run_as_group = Some(7);
        let user = container_process(&image(), &config, "h")
            .unwrap()
            .user
            .unwrap();
        assert_eq!(
            (user.username.as_str(), user.run_as_group),
            ("1000", Some(7))
        );
        assert!(!user.only_additional_gids);
        config.security.only_supplemental_groups = true;
        let process = container_process(&image(), &config, "h").unwrap();
        assert!(process.user.unwrap().only_additional_gids);
    }

    #[test]
    fn only_capabilities_that_it_has_can_be_ambient() {
        let mut config = container_config("a");
        config.command = strings(&["c"]);
        config.security.ambient_capabilities = strings(&["NET_BIND_SERVICE"]);
        let process = container_process(&image(), &config, "h").unwrap();
        assert_eq!(
            process.capabilities.unwrap().ambient,
            config.security.ambient_capabilities
        );
        config.security.drop_capabilities = strings(&["ALL"]);
        let refused = container_process(&image(), &config, "h").unwrap_err();
        assert_eq!(
            refused.to_string(),
            "invalid ambient_capabilities: capability NET_BIND_SERVICE cannot be ambient: the \
             container does not have it"
        );
    }

    #[test]
    fn cpu_is_translated() {
        let config = ResourceConfig {
            cpu_limit_milli: 1500,
            cpu_request_milli: 500,
            ..Default::default()
        };
        let resources = resources(&config);
        assert_eq!((resources.cpu_quota, resources.cpu_shares), (150_000, 512));
        let least = super::resources(&ResourceConfig {
            cpu_limit_milli: 1,
            ..Default::default()
        });
        assert_eq!((least.cpu_quota, least.cpu_shares), (1000, 2));
    }

    #[test]
    fn signals_by_name_and_number() {
        for (text, number) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGWINCH", Some(28)),
            ("RTMIN+3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGSYS", Some(31)),
            ("0", None),
            ("65", None),
            ("SIGRTMIN+99", None),
            ("NOPE", None),
            ("RTMIN3", None),
        ] {
            assert_eq!(signal_number(text), number, "{text}");
        }
    }
}
