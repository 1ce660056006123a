//! Devices of the host in a container.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use hypernetes_runtime::{HostPodDevice, RuntimeError};
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};
use rustix::fs::{major, minor};

use crate::records::{invalid, storage};

/// Most devices of one container.
const MAX_DEVICES: usize = 4096;
/// Deepest directory of devices.
const MAX_DEPTH: u32 = 8;
/// Made for each container anew.
const OWN: [&str; 6] = ["pts", "shm", "fd", "mqueue", "console", "ptmx"];

/// The device at a path, under another path; `None` if it is something else.
fn device(host: &Path, container: &Path) -> io::Result<Option<LinuxDevice>> {
    let metadata = fs::symlink_metadata(host)?;
    let kind = metadata.file_type();
    let typ = if kind.is_char_device() {
        LinuxDeviceType::C
    } else if kind.is_block_device() {
        LinuxDeviceType::B
    } else {
        return Ok(None);
    };
    let device = LinuxDeviceBuilder::default()
        .path(container)
        .typ(typ)
        .major(major(metadata.rdev()))
        .minor(minor(metadata.rdev()))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build();
    device.map(Some).map_err(io::Error::other)
}

fn walk(host: &Path, container: &Path, depth: u32, found: &mut Vec<LinuxDevice>) -> io::Result<()> {
    for entry in fs::read_dir(host)? {
        let entry = entry?;
        let name = entry.file_name();
        if OWN.iter().any(|own| name == *own) || found.len() >= MAX_DEVICES {
            continue;
        }
        let (host, container) = (entry.path(), container.join(&name));
        let looked = match entry.file_type()?.is_dir() {
            true if depth > 0 => walk(&host, &container, depth - 1, found),
            true => Ok(()),
            false => device(&host, &container).map(|device| found.extend(device)),
        };
        match looked {
            // Unplugged meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

/// All devices of the host, for a privileged container. Blocks.
pub(crate) fn all() -> Result<Vec<LinuxDevice>, RuntimeError> {
    let mut found = Vec::new();
    let dev = Path::new("/dev");
    walk(dev, dev, MAX_DEPTH, &mut found).map_err(|e| storage("list the host's devices", e))?;
    Ok(found)
}

/// The devices that were asked for, and what may be done with them. Blocks.
pub(crate) fn asked(
    wanted: &[HostPodDevice],
) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>), RuntimeError> {
    let (mut devices, mut rules) = (Vec::new(), Vec::new());
    for wanted in wanted {
        let field = || format!("devices {}", wanted.host.display());
        let letters = |c: char| "rwm".contains(c);
        if wanted.permissions.is_empty() || !wanted.permissions.chars().all(letters) {
            return Err(invalid(field(), "permissions must be of r, w and m"));
        }
        let unusable = |error: io::Error| invalid(field(), error.to_string());
        let host = fs::canonicalize(&wanted.host).map_err(unusable)?;
        let mut found = Vec::new();
        if host.is_dir() {
            walk(&host, &wanted.container, MAX_DEPTH, &mut found).map_err(unusable)?;
        } else {
            found.extend(device(&host, &wanted.container).map_err(unusable)?);
        }
        if found.is_empty() {
            return Err(invalid(field(), "is no device and has none in it"));
        }
        for device in &found {
            let rule = LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .typ(device.typ())
                .major(device.major())
                .minor(device.minor())
                .access(wanted.permissions.clone())
                .build();
            rules.push(rule.map_err(|e| storage("build a device rule", e))?);
        }
        devices.extend(found);
    }
    Ok((devices, rules))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(host: &str, permissions: &str) -> HostPodDevice {
        HostPodDevice {
            host: host.into(),
            container: "/dev/mine".into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn a_device_keeps_its_numbers_under_its_new_name() {
        let (devices, rules) = asked(&[wanted("/dev/null", "rw")]).unwrap();
        let device = &devices[0];
        assert_eq!(
            (
                device.path().as_path(),
                device.typ(),
                device.major(),
                device.minor()
            ),
            (Path::new("/dev/mine"), LinuxDeviceType::C, 1, 3)
        );
        assert_eq!(rules[0].access().as_deref(), Some("rw"));
        assert!(
            all()
                .unwrap()
                .iter()
                .any(|d| d.path() == Path::new("/dev/null"))
        );
    }

    #[test]
    fn what_is_no_device_is_refused_by_its_path() {
        for bad in [
            wanted("/etc/hostname", "r"),
            wanted("/dev/no-such-device", "r"),
            wanted("/dev/null", "x"),
            wanted("/dev/null", ""),
        ] {
            let error = asked(std::slice::from_ref(&bad)).unwrap_err().to_string();
            assert!(error.contains(bad.host.to_str().unwrap()), "{error}");
        }
    }
}
