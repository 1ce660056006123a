//! User namespaces: one for a pod, with one mapping of users and one of groups.
//!
//! The ids are the guest's, not the host's: which ones a pod gets matters to nobody outside of its VM. A
//! container has its sandbox's namespace, and its mounts are seen through it as a whole.

use hypernetes_runtime::{IdMapping, SandboxStatus, UserNamespace};

use crate::{status::CriError, v1};

fn invalid(base: &str, field: &str, rule: &str) -> CriError {
    CriError::invalid(
        format!("{base}.namespace_options.userns_options{field}"),
        rule,
    )
}

/// The user namespace that is asked for, if one is.
pub(crate) fn of(
    base: &str,
    options: Option<&v1::NamespaceOption>,
) -> Result<Option<UserNamespace>, CriError> {
    let Some(users) = options.and_then(|options| options.userns_options.as_ref()) else {
        return Ok(None);
    };
    match users.mode() {
        v1::NamespaceMode::Pod => Ok(Some(UserNamespace {
            uids: mapping(base, ".uids", &users.uids)?,
            gids: mapping(base, ".gids", &users.gids)?,
        })),
        v1::NamespaceMode::Node if users.uids.is_empty() && users.gids.is_empty() => Ok(None),
        v1::NamespaceMode::Node => Err(invalid(base, "", "NODE has no mappings")),
        v1::NamespaceMode::Container | v1::NamespaceMode::Target => {
            Err(invalid(base, ".mode", "must be POD or NODE"))
        }
    }
}

fn mapping(base: &str, field: &str, asked: &[v1::IdMapping]) -> Result<IdMapping, CriError> {
    let [one] = asked else {
        return Err(invalid(base, field, "must be exactly one mapping with POD"));
    };
    if one.container_id != 0 {
        return Err(invalid(base, field, "must map container_id 0"));
    }
    // The last number stands for "no id".
    let fits = one.host_id.checked_add(one.length);
    if one.length == 0 || fits.is_none() {
        return Err(invalid(
            base,
            field,
            "must have a length, and ids below 2^32",
        ));
    }
    Ok(IdMapping {
        first: one.host_id,
        count: one.length,
    })
}

/// Checks that a container and its mounts ask for what the sandbox has.
pub(crate) fn check_container(
    base: &str,
    config: &v1::ContainerConfig,
    sandbox: &SandboxStatus,
) -> Result<(), CriError> {
    let has = sandbox.config.user_namespace;
    let context = config.linux.as_ref();
    let context = context.and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    if of(base, options)? != has {
        return Err(invalid(base, "", "must be the sandbox's"));
    }
    for (index, mount) in config.mounts.iter().enumerate() {
        for (name, asked, ids) in [
            ("uidMappings", &mount.uid_mappings, has.map(|has| has.uids)),
            ("gidMappings", &mount.gid_mappings, has.map(|has| has.gids)),
        ] {
            if !asked.is_empty() && mapping(base, "", asked).ok() != ids {
                let field = format!("config.mounts[{index}].{name}");
                let rule = "must be the mapping of the sandbox's user namespace";
                return Err(CriError::invalid(field, rule));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(container_id: u32, host_id: u32, length: u32) -> v1::IdMapping {
        v1::IdMapping {
            host_id,
            container_id,
            length,
        }
    }

    fn asks(
        mode: v1::NamespaceMode,
        uids: &[v1::IdMapping],
    ) -> Result<Option<UserNamespace>, String> {
        let options = v1::NamespaceOption {
            userns_options: Some(v1::UserNamespace {
                mode: mode.into(),
                uids: uids.to_vec(),
                gids: match uids.is_empty() {
                    true => Vec::new(),
                    false => vec![map(0, 7, 8)],
                },
            }),
            ..Default::default()
        };
        of("s", Some(&options)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_pod_has_one_mapping_of_each() {
        use v1::NamespaceMode::{Container, Node, Pod, Target};
        let got = asks(Pod, &[map(0, 1000, 65_536)]).unwrap().unwrap();
        assert_eq!((got.uids.first, got.uids.count), (1000, 65_536));
        assert_eq!((got.gids.first, got.gids.count), (7, 8));
        assert_eq!(asks(Node, &[]), Ok(None));
        assert_eq!(of("s", None).unwrap(), None);
        for (mode, uids, field) in [
            (Pod, &[][..], "s.namespace_options.userns_options.uids"),
            (
                Pod,
                &[map(0, 1, 1), map(1, 2, 1)],
                "userns_options.uids: must be exactly one",
            ),
            (
                Pod,
                &[map(1, 1000, 1)],
                "userns_options.uids: must map container_id 0",
            ),
            (
                Pod,
                &[map(0, 1000, 0)],
                "userns_options.uids: must have a length",
            ),
            (
                Pod,
                &[map(0, 1000, u32::MAX)],
                "userns_options.uids: must have a length",
            ),
            (Node, &[map(0, 1000, 1)], "userns_options: NODE has no"),
            (Container, &[], "userns_options.mode"),
            (Target, &[], "userns_options.mode"),
        ] {
            let error = asks(mode, uids).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
    }
}
