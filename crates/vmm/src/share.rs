//! What of the host a guest may see.

use std::os::fd::OwnedFd;

/// A directory or a regular file of the host.
#[derive(Debug)]
pub struct HostShare {
    /// Opened as a path (`O_PATH`): what was looked at is what is shared, whoever renames it.
    pub source: OwnedFd,
    /// Not even the process that serves it can write; file systems mounted below are left as they
    /// are, unless `recursive`.
    pub read_only: bool,
    /// `read_only` holds for what is mounted below too.
    pub recursive: bool,
    /// Whether file systems appear that the host mounts below it from now on.
    pub follow_mounts: bool,
}
