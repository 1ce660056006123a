//! Kernel parameters below `/proc/sys/net`, which shows those of the reading thread's namespace.

use std::{fs, io, path::Path};

use crate::{netns::Namespace, plan::Sysctl};

const ROOT: &str = "/proc/sys/net";

pub(crate) fn apply(namespace: &Namespace, sysctls: &[Sysctl]) -> io::Result<()> {
    namespace.run(|| {
        for sysctl in sysctls {
            match write(&sysctl.path, sysctl.value) {
                Err(error) if sysctl.optional && error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    })
}

pub(crate) fn get(namespace: &Namespace, path: &str) -> io::Result<String> {
    namespace.run(|| {
        Ok(fs::read_to_string(Path::new(ROOT).join(path))?
            .trim()
            .to_owned())
    })
}

pub(crate) fn set(namespace: &Namespace, path: &str, value: &str) -> io::Result<()> {
    namespace.run(|| write(path, value))
}

fn write(path: &str, value: &str) -> io::Result<()> {
    let full = Path::new(ROOT).join(path);
    // Unchanged values are not written: some containers mount these read-only.
    if fs::read_to_string(&full)?.trim() == value {
        return Ok(());
    }
    fs::write(&full, value)
        .map_err(|error| io::Error::new(error.kind(), format!("set {}: {error}", full.display())))
}
