//! Who a container runs as, and what it may do inside its VM.

use std::path::Path;

use hypernetes_runtime::SecurityConfig;

use crate::{seccomp, status::CriError, v1};

/// Why the host's namespaces cannot be had.
const NO_HOST_NAMESPACE: &str = "NODE is the host's own namespace, which a pod in a microVM (runtime handler \"hyper\") \
     cannot join; hostNetwork, hostPID and hostIPC need a RuntimeClass of handler \"host\", which the \
     node's setting hostHandler.namespaces allows to the namespaces that it names";

fn invalid(base: &str, field: &str, rule: impl Into<String>) -> CriError {
    CriError::invalid(format!("{base}.{field}"), rule)
}

/// A user or group id.
fn id(base: &str, field: &str, value: i64) -> Result<u32, CriError> {
    // 2^32-1 means "no change" to the kernel.
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| invalid(base, field, format!("{value} is no user or group id")))
}

/// Refuses namespaces that a microVM does not have.
pub(crate) fn check_namespaces(
    base: &str,
    options: Option<&v1::NamespaceOption>,
) -> Result<(), CriError> {
    let Some(options) = options else {
        return Ok(());
    };
    let base = &format!("{base}.namespace_options");
    for (field, mode) in [
        ("network", options.network()),
        ("pid", options.pid()),
        ("ipc", options.ipc()),
    ] {
        match (field, mode) {
            (_, v1::NamespaceMode::Node) => return Err(invalid(base, field, NO_HOST_NAMESPACE)),
            (_, v1::NamespaceMode::Pod)
            | ("pid", v1::NamespaceMode::Container | v1::NamespaceMode::Target) => {}
            _ => {
                let rule = "the containers of a pod share this namespace: only POD can be had";
                return Err(invalid(base, field, rule));
            }
        }
    }
    Ok(())
}

/// Refuses labels of SELinux and profiles of AppArmor: the guest's kernel has neither.
fn check_modules(
    base: &str,
    selinux: Option<&v1::SeLinuxOption>,
    apparmor: Option<&v1::SecurityProfile>,
    apparmor_profile: &str,
) -> Result<(), CriError> {
    if selinux.is_some_and(|labels| *labels != v1::SeLinuxOption::default()) {
        let rule = "the guest's kernel has no SELinux";
        return Err(invalid(base, "selinux_options", rule));
    }
    let rule = "the guest's kernel has no AppArmor: only Unconfined can be had";
    let unconfined = v1::security_profile::ProfileType::Unconfined;
    match apparmor {
        Some(profile) if profile.profile_type() != unconfined => {
            Err(invalid(base, "apparmor", rule))
        }
        None if !matches!(apparmor_profile, "" | "unconfined") => {
            Err(invalid(base, "apparmor_profile", rule))
        }
        _ => Ok(()),
    }
}

/// Whether the engines' default filter is wanted. A profile of the node's is none of this.
fn seccomp(
    base: &str,
    profile: Option<&v1::SecurityProfile>,
    path: &str,
) -> Result<bool, CriError> {
    use v1::security_profile::ProfileType;
    if seccomp::localhost(base, profile, path)?.is_some() {
        return Ok(false);
    }
    match (profile.map(v1::SecurityProfile::profile_type), path) {
        (Some(ProfileType::RuntimeDefault), _) | (None, "runtime/default" | "docker/default") => {
            Ok(true)
        }
        (Some(ProfileType::Unconfined | ProfileType::Localhost), _) | (None, "" | "unconfined") => {
            Ok(false)
        }
        (None, _) => Err(invalid(
            base,
            "seccomp_profile_path",
            "must be runtime/default, unconfined or localhost/ and an absolute path",
        )),
    }
}

/// The file of the system call filter that a container asks for, with the field that names it. A
/// privileged container has none, whatever it asks for.
pub(crate) fn seccomp_file<'a>(
    base: &str,
    context: &'a v1::LinuxContainerSecurityContext,
) -> Result<Option<(String, &'a Path)>, CriError> {
    if context.privileged {
        return Ok(None);
    }
    #[allow(deprecated, reason = "older clients send it")]
    let path = &context.seccomp_profile_path;
    seccomp::localhost(base, context.seccomp.as_ref(), path)
}

fn check_groups(base: &str, user: bool, group: Option<&v1::Int64Value>) -> Result<(), CriError> {
    if group.is_some() && !user {
        return Err(invalid(base, "run_as_group", "needs a user beside it"));
    }
    Ok(())
}

/// Refuses what a sandbox cannot be. Nothing runs in a sandbox but its containers, so its own user
/// and root file system mean nothing.
pub(crate) fn check_sandbox(
    base: &str,
    context: &v1::LinuxSandboxSecurityContext,
) -> Result<(), CriError> {
    let options = context.namespace_options.as_ref();
    check_namespaces(base, options)?;
    if options.is_some_and(|options| options.pid() == v1::NamespaceMode::Target) {
        let rule = "TARGET is a container's; a sandbox has POD or CONTAINER";
        return Err(invalid(base, "namespace_options.pid", rule));
    }
    check_modules(
        base,
        context.selinux_options.as_ref(),
        context.apparmor.as_ref(),
        "",
    )?;
    #[allow(deprecated, reason = "older clients send it")]
    let path = &context.seccomp_profile_path;
    seccomp(base, context.seccomp.as_ref(), path)?;
    check_groups(
        base,
        context.run_as_user.is_some(),
        context.run_as_group.as_ref(),
    )
}

/// What a container may do, but for a system call filter of the node's.
pub(crate) fn of_container(
    base: &str,
    context: &v1::LinuxContainerSecurityContext,
) -> Result<SecurityConfig, CriError> {
    #[allow(deprecated, reason = "older clients send them")]
    let (apparmor, seccomp_path) = (&context.apparmor_profile, &context.seccomp_profile_path);
    // A privileged container is confined by nothing but its VM.
    if !context.privileged {
        check_modules(
            base,
            context.selinux_options.as_ref(),
            context.apparmor.as_ref(),
            apparmor,
        )?;
    }
    let seccomp_default =
        !context.privileged && seccomp(base, context.seccomp.as_ref(), seccomp_path)?;
    let named = context.run_as_user.is_some() || !context.run_as_username.is_empty();
    check_groups(base, named, context.run_as_group.as_ref())?;
    let capabilities = context.capabilities.clone().unwrap_or_default();
    let number = |field, value: Option<&v1::Int64Value>| {
        value.map(|value| id(base, field, value.value)).transpose()
    };
    Ok(SecurityConfig {
        run_as_user: number("run_as_user", context.run_as_user.as_ref())?,
        run_as_username: context.run_as_username.clone(),
        run_as_group: number("run_as_group", context.run_as_group.as_ref())?,
        // The kubelet checks it against the image before it asks.
        run_as_non_root: false,
        supplemental_groups: context
            .supplemental_groups
            .iter()
            .map(|group| id(base, "supplemental_groups", *group))
            .collect::<Result<_, _>>()?,
        only_supplemental_groups: context.supplemental_groups_policy()
            == v1::SupplementalGroupsPolicy::Strict,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        ambient_capabilities: capabilities.add_ambient_capabilities,
        privileged: context.privileged,
        readonly_rootfs: context.readonly_rootfs,
        no_new_privs: context.no_new_privs,
        seccomp_default,
        seccomp: None,
        masked_paths: Some(context.masked_paths.clone()),
        readonly_paths: Some(context.readonly_paths.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(result: Result<impl std::fmt::Debug, CriError>) -> String {
        match result.unwrap_err() {
            CriError::Invalid { field, .. } => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_host_s_namespaces_are_refused_by_name() {
        use v1::NamespaceMode::{Container, Node, Pod, Target};
        for (network, pid, ipc, refused) in [
            (Pod, Pod, Pod, None),
            (Pod, Container, Pod, None),
            (Node, Pod, Pod, Some("c.namespace_options.network")),
            (Pod, Node, Pod, Some("c.namespace_options.pid")),
            (Pod, Target, Pod, None),
            (Target, Pod, Pod, Some("c.namespace_options.network")),
            (Pod, Pod, Node, Some("c.namespace_options.ipc")),
            (Pod, Pod, Container, Some("c.namespace_options.ipc")),
        ] {
            let options = v1::NamespaceOption {
                network: network.into(),
                pid: pid.into(),
                ipc: ipc.into(),
                ..Default::default()
            };
            let result = check_namespaces("c", Some(&options));
            match refused {
                None => result.unwrap(),
                Some(name) => assert_eq!(field(result), name),
            }
        }
        let sandbox = v1::LinuxSandboxSecurityContext {
            namespace_options: Some(v1::NamespaceOption {
                pid: Target.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let refused = check_sandbox("s", &sandbox);
        assert_eq!(field(refused), "s.namespace_options.pid");
    }

    #[test]
    fn what_the_guest_cannot_enforce_is_refused_by_name() {
        use v1::security_profile::ProfileType;
        let profile = |kind: ProfileType| {
            Some(v1::SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: String::new(),
            })
        };
        let number = |value| Some(v1::Int64Value { value });
        let base = v1::LinuxContainerSecurityContext::default;
        for (context, name) in [
            (
                v1::LinuxContainerSecurityContext {
                    // Without a path.
                    seccomp: profile(ProfileType::Localhost),
                    ..base()
                },
                "s.seccomp.localhost_ref",
            ),
            (
                v1::LinuxContainerSecurityContext {
                    apparmor: profile(ProfileType::RuntimeDefault),
                    ..base()
                },
                "s.apparmor",
            ),
            (
                v1::LinuxContainerSecurityContext {
                    run_as_group: number(1),
                    ..base()
                },
                "s.run_as_group",
            ),
            (
                v1::LinuxContainerSecurityContext {
                    run_as_user: number(-1),
                    ..base()
                },
                "s.run_as_user",
            ),
        ] {
            assert_eq!(field(of_container("s", &context)), name);
        }
    }

    #[test]
    fn lists_of_paths_are_taken_as_they_are() {
        let context = v1::LinuxContainerSecurityContext {
            masked_paths: vec!["/proc/kcore".into()],
            seccomp: Some(v1::SecurityProfile::default()),
            run_as_username: "web".into(),
            supplemental_groups_policy: v1::SupplementalGroupsPolicy::Strict.into(),
            ..Default::default()
        };
        let config = of_container("s", &context).unwrap();
        assert_eq!(config.masked_paths, Some(vec!["/proc/kcore".to_owned()]));
        assert_eq!(config.readonly_paths, Some(Vec::new()));
        assert_eq!(config.run_as_username, "web");
        assert!(config.seccomp_default && config.only_supplemental_groups);
    }
}
