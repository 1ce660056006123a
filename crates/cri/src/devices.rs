//! Block devices of the host that containers may have, by the node's configuration: volumes in block
//! mode. Each becomes a disk of the pod's VM, and a device node in the container.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Component, Path, PathBuf},
};

use hypernetes_runtime::HostDevice;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2},
    io::Errno,
};

use crate::{lookup::shown, status::CriError, v1};

/// Name of the setting that an operator changes for a refused device.
const SETTING: &str = "hostPaths.devices";

/// Opens all devices of a container: each is open when the first is handed over. Blocks.
pub(crate) fn open(
    devices: &[v1::Device],
    allowed: &[PathBuf],
) -> Result<Vec<(HostDevice, String)>, CriError> {
    let one = |(index, device): (usize, &v1::Device)| {
        let field = |name: &str| format!("config.devices[{index}].{name}");
        check(device, field)?;
        let refused = |rule: String| CriError::invalid(field("host_path"), rule);
        let failed = |action: &str, error: io::Error| {
            refused(format!(
                "cannot {action} {}: {error}",
                shown(&device.host_path)
            ))
        };
        let path = Path::new(&device.host_path);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let links = ResolveFlags::NO_MAGICLINKS;
        let place = openat2(CWD, path, flags, Mode::empty(), links)
            .map_err(|errno| failed("open", errno.into()))?;
        let name = format!("/proc/self/fd/{}", place.as_raw_fd());
        let real = std::fs::read_link(&name).map_err(|error| failed("find", error))?;
        let listed = |entry: &PathBuf| {
            let entry = std::fs::canonicalize(entry).unwrap_or_else(|_missing| entry.clone());
            real.starts_with(entry)
        };
        if !allowed.iter().any(listed) {
            return Err(refused(format!(
                "{} is not among the devices that the node's setting {SETTING} names",
                real.display()
            )));
        }
        let stat = rustix::fs::fstat(&place).map_err(|errno| failed("inspect", errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
            return Err(refused(format!("{} is no block device", real.display())));
        }
        let read_only = !device.permissions.contains('w');
        // Alone, if it may be written: neither the host nor another pod has it mounted meanwhile.
        let access = match read_only {
            true => OFlags::RDONLY,
            false => OFlags::RDWR | OFlags::EXCL,
        };
        // What was looked at is opened, whoever renames it.
        let file = openat(CWD, name, access | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(|errno| match errno {
            Errno::BUSY => refused(format!("{} is in use", real.display())),
            errno => failed("open", errno.into()),
        })?;
        let device = HostDevice {
            file: File::from(file),
            read_only,
        };
        Ok((device, devices[index].container_path.clone()))
    };
    devices.iter().enumerate().map(one).collect()
}

fn check(device: &v1::Device, field: impl Fn(&str) -> String) -> Result<(), CriError> {
    let plain = |path: &str| {
        let part = |part| matches!(part, Component::RootDir | Component::Normal(_));
        let path = Path::new(path);
        path.is_absolute() && path.components().all(part) && path.file_name().is_some()
    };
    for (name, path) in [
        ("host_path", &device.host_path),
        ("container_path", &device.container_path),
    ] {
        if !plain(path) || path.contains('\0') {
            return Err(CriError::invalid(
                field(name),
                "must be an absolute path without ..",
            ));
        }
    }
    let permissions = &device.permissions;
    if !permissions.contains('r') || !permissions.chars().all(|c| "rwm".contains(c)) {
        let rule = "must be r, with w, m or both beside it";
        return Err(CriError::invalid(field("permissions"), rule));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &Path, container: &str, permissions: &str) -> v1::Device {
        v1::Device {
            host_path: host.to_str().unwrap().to_owned(),
            container_path: container.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn what_is_no_listed_block_device_is_refused_by_name() {
        let temp = tempfile::tempdir().unwrap();
        let allowed = [temp.path().join("listed")];
        std::fs::create_dir(&allowed[0]).unwrap();
        std::fs::write(allowed[0].join("file"), "").unwrap();
        std::os::unix::fs::symlink("/dev/null", allowed[0].join("link")).unwrap();
        let at = |name: &str| allowed[0].join(name);
        for (device, name) in [
            (device(&at("file"), "/dev/x", "rw"), "no block device"),
            (device(&at("link"), "/dev/x", "rw"), SETTING),
            (device(Path::new("/dev/null"), "/dev/x", "rwm"), SETTING),
            (device(&at("gone"), "/dev/x", "r"), "cannot open"),
            (device(&at("file"), "/dev/../x", "r"), "[0].container_path"),
            (device(&at("file"), "/", "r"), "[0].container_path"),
            (device(Path::new("/dev/a/.."), "/x", "r"), "[0].host_path"),
            (device(&at("file"), "/dev/x", "w"), "[0].permissions"),
            (device(&at("file"), "/dev/x", "rx"), "[0].permissions"),
        ] {
            let error = open(&[device], &allowed).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
        assert!(open(&[], &[]).unwrap().is_empty());
    }
}
