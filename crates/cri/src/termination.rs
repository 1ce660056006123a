//! What a container says of its end, where the kubelet looks for it.
//!
//! The kubelet mounts a file of its own for the message, and reads it once it has heard of the end:
//! from the status. The guest has a file of the container's instead, and tells its content with the
//! end. So the message is written to the kubelet's file before the status is told, and left out of
//! the status: the kubelet would show it twice, or the log's last lines behind it.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use hypernetes_runtime::{ContainerState, ContainerStatus};
use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::{memo, mounts};

/// Reasons of ends that the container brought about by itself: then the message is its own.
const OWN: [&str; 3] = ["Completed", "Error", "OOMKilled"];

/// The kubelet's file for a container that has ended with words of its own.
pub(crate) fn file_of(status: &ContainerStatus, pod_uid: &str, kubelet: &Path) -> Option<PathBuf> {
    let own = status.state == ContainerState::Exited
        && !status.message.is_empty()
        && OWN.contains(&status.reason.as_str());
    if !own {
        return None;
    }
    let asked = memo::container(&status.config.memo);
    let mount = asked
        .mounts
        .iter()
        .find(|mount| mounts::is_termination_log(mount, pod_uid, kubelet))?;
    Some(PathBuf::from(&mount.host_path))
}

/// Makes the file, which must be there, hold the message. Blocks.
pub(crate) fn write(path: &Path, message: &str) -> io::Result<()> {
    // A link or a fifo in the file's place must not lead elsewhere or block the node.
    let flags =
        OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut file = File::from(openat(CWD, path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut there = Vec::new();
    let most = u64::try_from(message.len()).unwrap_or(u64::MAX);
    Read::take(&file, most.saturating_add(1)).read_to_end(&mut there)?;
    if there == message.as_bytes() {
        return Ok(());
    }
    file.set_len(0)?;
    io::Seek::rewind(&mut file)?;
    file.write_all(message.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn only_the_kubelet_s_own_file_is_written() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("0a1b");
        assert!(write(&path, "bye").is_err(), "not made by us");
        fs::write(&path, "something longer").unwrap();
        for _ in 0..2 {
            write(&path, "bye").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "bye");
        }
        let link = temp.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(write(&link, "elsewhere").is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "bye");
    }
}
