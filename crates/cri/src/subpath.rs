//! Directories that the kubelet binds for a mount with `subPath`.
//!
//! It binds `volumes/…/VOLUME/SUB` to `volume-subpaths/VOLUME/CONTAINER/INDEX`, so that nobody can
//! swap the directory for a link afterwards. What is behind such a bind is in the mount table.

use std::path::{Path, PathBuf};

/// What is bound to a place, as a path on its own file system: the fourth field of its line in
/// /proc/self/mountinfo (proc(5)). The last line wins, as the last mount does.
pub(crate) fn bound(table: &str, place: &Path) -> Option<PathBuf> {
    let line = |line: &str| {
        let mut fields = line.split(' ').skip(3);
        let root = unescape(fields.next()?);
        let point = unescape(fields.next()?);
        (Path::new(&point) == place).then(|| PathBuf::from(root))
    };
    table.lines().rev().find_map(line)
}

/// The path below an emptyDir of this name that a bind leads to. On a disk the bind shows the whole
/// path of the directory; an emptyDir in memory is a file system of its own.
pub(crate) fn below_empty_dir(bound: &Path, volume: &str) -> Option<String> {
    let text = bound.to_str()?;
    let marker = format!("/volumes/kubernetes.io~empty-dir/{volume}/");
    let sub = match text.split_once(&marker) {
        Some((_, sub)) => sub,
        None if !text.contains("/volumes/kubernetes.io~") => text.trim_start_matches('/'),
        None => return None,
    };
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    sub.split('/').all(plain).then(|| sub.to_owned())
}

/// Octal escapes of blanks and backslashes.
fn unescape(field: &str) -> String {
    let mut text = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        let code = after
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match code {
            Some(code) => {
                text.push(char::from(code));
                rest = &after[3..];
            }
            None => {
                text.push('\\');
                rest = after;
            }
        }
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
36 35 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 36 8:1 /var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/work/a/b /k/pods/u/volume-subpaths/work/c/0 rw - ext4 /dev/sda1 rw
91 36 0:50 /cache /k/pods/u/volume-subpaths/mem/c/1 rw - tmpfs tmpfs rw
92 36 8:1 /with\\040blank /k/x\\040y rw - ext4 /dev/sda1 rw
";

    #[test]
    fn what_is_bound_is_found() {
        let find = |place: &str| bound(TABLE, Path::new(place));
        let disk = find("/k/pods/u/volume-subpaths/work/c/0").unwrap();
        assert_eq!(below_empty_dir(&disk, "work").as_deref(), Some("a/b"));
        assert_eq!(below_empty_dir(&disk, "other"), None);
        let memory = find("/k/pods/u/volume-subpaths/mem/c/1").unwrap();
        assert_eq!(below_empty_dir(&memory, "mem").as_deref(), Some("cache"));
        assert_eq!(find("/k/x y"), Some(PathBuf::from("/with blank")));
        assert_eq!(find("/nowhere"), None);
        assert_eq!(below_empty_dir(Path::new("/a/../b"), "mem"), None);
    }
}
