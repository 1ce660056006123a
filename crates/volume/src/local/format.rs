//! The empty file system of a new volume.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
};

/// From here on a file system has blocks of 4 KiB and room for a journal of such.
const LARGE: u64 = 16 << 20;

/// Makes an empty ext4 in a fresh, sparse file. With a journal, which small ones have no room for, and
/// with room for the descriptors of a file system that has grown.
pub(super) fn make_ext4(mkfs: &Path, file: &Path, bytes: u64) -> io::Result<()> {
    let block = if bytes < LARGE { "1024" } else { "4096" };
    let output = Command::new(mkfs)
        // No reserve: all of it is the pod's. What is a hole is zero, and stays a hole.
        .args(["-q", "-F", "-m", "0", "-I", "256", "-b", block, "-E"])
        .arg("lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0")
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            io::Error::new(error.kind(), format!("run {}: {error}", mkfs.display()))
        })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "{}: {}",
        output.status,
        text.trim()
    )))
}
