//! Who a container runs as, by the image's own files.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use hypernetes_container::{UserSpec, user};
use hypernetes_runtime::{ContainerUser, RuntimeError, SecurityConfig};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::records::{invalid, storage};

/// Largest passwd or group file that is read.
const MAX_FILE: u64 = 4 << 20;

/// Reads a file of a root file system, whose links lead nowhere outside of it. Empty if there is
/// none.
fn read(rootfs: &Path, name: &str) -> io::Result<String> {
    let directory = openat(
        CWD,
        rootfs,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(&directory, name, flags, Mode::empty(), how) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Finds out who is meant. Blocks.
pub(crate) fn resolve(
    security: &SecurityConfig,
    image_user: &str,
    rootfs: &Path,
) -> Result<ContainerUser, RuntimeError> {
    let unreadable = |error| storage("read the image's users", error);
    // A number too goes as text, so that its groups in the image are found as for a name.
    let username = match security.run_as_user {
        Some(uid) => uid.to_string(),
        None if !security.run_as_username.is_empty() => security.run_as_username.clone(),
        None => image_user.to_owned(),
    };
    let spec = UserSpec {
        username: Some(username).filter(|name| !name.is_empty()),
        run_as_group: security.run_as_group,
        additional_gids: security.supplemental_groups.clone(),
        only_additional_gids: security.only_supplemental_groups,
        ..UserSpec::default()
    };
    let passwd = read(rootfs, "etc/passwd").map_err(unreadable)?;
    let group = read(rootfs, "etc/group").map_err(unreadable)?;
    let found = user::resolve(&spec, &passwd, &group)
        .map_err(|error| invalid("run_as_user", error.to_string()))?;
    if security.run_as_non_root && found.uid == 0 {
        return Err(invalid("run_as_user", "must not be 0 with run_as_non_root"));
    }
    Ok(ContainerUser {
        uid: found.uid,
        gid: found.gid,
        groups: found.groups,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn links_of_the_image_lead_nowhere_outside() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(temp.path().join("secret"), "evil:x:7:7::/:\n").unwrap();
        symlink("../../secret", root.join("etc/passwd")).unwrap();
        assert_eq!(read(&root, "etc/passwd").unwrap(), "");
        fs::remove_file(root.join("etc/passwd")).unwrap();
        fs::write(root.join("etc/passwd"), "web:x:33:34::/:\n").unwrap();
        let security = SecurityConfig {
            run_as_username: "web".into(),
            ..Default::default()
        };
        let user = resolve(&security, "", &root).unwrap();
        assert_eq!((user.uid, user.gid), (33, 34));
        let unknown = SecurityConfig::default();
        assert!(resolve(&unknown, "nobody", &root).is_err());
    }
}
