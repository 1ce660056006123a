//! System call filters of the node (`Localhost`): read from a file of the host's, as the engines write
//! them, and handed to the guest as rules.
//!
//! The path is the kubelet's, which is as much root as this node is: it has joined it from its own
//! directory of profiles and a name that it has checked. So any absolute path is read, as by other
//! runtimes. What is wrong with a file is told without a word of what is in it.

use std::path::{Component, Path};

use hypernetes_runtime::{SeccompProfile, read_seccomp_profile};

use crate::{lookup::shown, status::CriError, v1};

/// The path of a profile of the node's that a context names, with the field that names it.
pub(crate) fn localhost<'a>(
    base: &str,
    profile: Option<&'a v1::SecurityProfile>,
    path: &'a str,
) -> Result<Option<(String, &'a Path)>, CriError> {
    use v1::security_profile::ProfileType;
    let (field, path) = match profile {
        Some(profile) if profile.profile_type() == ProfileType::Localhost => {
            ("seccomp.localhost_ref", profile.localhost_ref.as_str())
        }
        Some(_) => return Ok(None),
        None => match path.strip_prefix("localhost/") {
            Some(path) => ("seccomp_profile_path", path),
            None => return Ok(None),
        },
    };
    let field = format!("{base}.{field}");
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    let absolute = path.starts_with('/') && Path::new(path).components().all(plain);
    if !absolute || path.contains('\0') {
        let rule = format!("{:?} must be an absolute path without ..", shown(path));
        return Err(CriError::invalid(field, rule));
    }
    Ok(Some((field, Path::new(path))))
}

/// Reads a profile for a guest with this kernel. Blocks.
pub(crate) fn read(field: &str, path: &Path, kernel: &str) -> Result<SeccompProfile, CriError> {
    let refused = |rule: String| {
        let path = shown(&path.to_string_lossy());
        CriError::invalid(field, format!("{path}: {rule}"))
    };
    read_seccomp_profile(path, kernel).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_by_its_field_and_path() {
        let error = read("f", Path::new("/none/profile.json"), "6.12").unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("/none/profile.json: cannot read it"),
            "{error}"
        );
    }

    #[test]
    fn the_path_must_be_absolute() {
        use v1::security_profile::ProfileType::{Localhost, RuntimeDefault};
        let profile = |kind: v1::security_profile::ProfileType, path: &str| v1::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: path.into(),
        };
        let path = |profile: Option<v1::SecurityProfile>, old: &str| {
            localhost("s", profile.as_ref(), old)
                .map(|found| found.map(|(_, path)| path.to_owned()))
                .map_err(|error| error.to_string())
        };
        let a = Some(Path::new("/a").to_owned());
        assert_eq!(path(Some(profile(Localhost, "/a")), "").unwrap(), a);
        assert_eq!(
            path(Some(profile(RuntimeDefault, "/a")), "localhost//b"),
            Ok(None)
        );
        assert_eq!(path(None, "localhost//a").unwrap(), a);
        assert_eq!(path(None, "runtime/default"), Ok(None));
        for bad in ["", "a", "/a/../b"] {
            let error = path(Some(profile(Localhost, bad)), "").unwrap_err();
            assert!(error.starts_with("s.seccomp.localhost_ref"), "{error}");
        }
        let error = path(None, "localhost/a").unwrap_err();
        assert!(error.starts_with("s.seccomp_profile_path"), "{error}");
    }
}
