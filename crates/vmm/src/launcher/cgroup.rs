//! The cgroup of a VMM, on whichever hierarchies this host has: version 1 (one per controller),
//! version 2, or both beside each other.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

/// Controllers that make a hierarchy worth joining.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];

/// Puts `pid` into `group` on every hierarchy, making the group and its parents as needed.
pub(crate) fn join(group: &str, pid: u32) -> io::Result<()> {
    let group = checked(group)?;
    let roots = hierarchies()?;
    if roots.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup hierarchy is mounted",
        ));
    }
    for root in roots {
        let leaf = root.join(group);
        make(&root, group)?;
        fs::write(leaf.join("cgroup.procs"), pid.to_string())
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", leaf.display())))?;
    }
    Ok(())
}

/// How the first part of groups begins that nobody else makes or looks after.
const OWN: &str = "hypernetes";

/// Removes `group`, and of our own groups the parents that are empty then: an empty parent of the
/// kubelet's is the kubelet's still. A group that is gone is no error.
pub(crate) fn remove(group: &str) -> io::Result<()> {
    let group = checked(group)?;
    let mut failure = None;
    for root in hierarchies()? {
        match fs::remove_dir(root.join(group)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => failure = Some(e),
            _ => {
                let mut parent = group.parent();
                while let Some(path) = parent.filter(|path| is_own(path)) {
                    match fs::remove_dir(root.join(path)) {
                        Ok(()) => {}
                        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                        Err(_) if has_members(&root.join(path)) => break,
                        // Busy with the end of what was the last in it, too: that passes.
                        Err(e) => {
                            failure = Some(e);
                            break;
                        }
                    }
                    parent = path.parent();
                }
            }
        }
    }
    failure.map_or(Ok(()), Err)
}

/// Whether a group has groups or processes in it.
fn has_members(group: &Path) -> bool {
    let mut entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        || fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|procs| !procs.is_empty())
}

fn is_own(path: &Path) -> bool {
    let first = path.components().next();
    first.is_some_and(|part| part.as_os_str().to_string_lossy().starts_with(OWN))
}

fn checked(group: &str) -> io::Result<&Path> {
    let path = Path::new(group.trim_start_matches('/'));
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.as_os_str().is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a plain cgroup path",
        ));
    }
    Ok(path)
}

fn make(root: &Path, group: &Path) -> io::Result<()> {
    // Somebody may remove an empty parent between two of our steps.
    let mut result = Ok(());
    for _ in 0..3 {
        result = fs::create_dir_all(root.join(group));
        if result.is_ok() {
            break;
        }
    }
    result?;
    if root.join("cgroup.subtree_control").exists() {
        // Version 2 hands controllers down level by level. A controller that is not there, or a
        // level that holds processes itself, leaves the group without that controller.
        let mut level = root.to_owned();
        for part in group.components() {
            for controller in ["memory", "cpu", "pids"] {
                drop(fs::write(
                    level.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                ));
            }
            level.push(part);
        }
    }
    Ok(())
}

fn hierarchies() -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let has_controllers = |root: &Path| {
        fs::read_to_string(root.join("cgroup.controllers"))
            .is_ok_and(|list| list.split_whitespace().any(|c| CONTROLLERS.contains(&c)))
    };
    Ok(parse_mounts(&table, has_controllers))
}

fn parse_mounts(table: &str, has_controllers: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in table.lines() {
        // mountinfo: id parent dev root MOUNTPOINT options … - TYPE source SUPER-OPTIONS
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(point) = left.split(' ').nth(4).map(PathBuf::from) else {
            continue;
        };
        let mut right = right.split(' ');
        let wanted = match (right.next(), right.nth(1)) {
            (Some("cgroup"), Some(options)) => options
                .split(',')
                .any(|option| CONTROLLERS.contains(&option)),
            (Some("cgroup2"), _) => has_controllers(&point),
            _ => false,
        };
        if wanted && !found.contains(&point) {
            found.push(point);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_both_versions() {
        let hybrid = "\
25 30 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro
26 25 0:23 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
27 25 0:24 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
28 25 0:25 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
29 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
garbage";
        let roots = parse_mounts(hybrid, |_| false);
        assert_eq!(
            roots,
            [
                Path::new("/sys/fs/cgroup/memory"),
                Path::new("/sys/fs/cgroup/cpu,cpuacct")
            ]
        );
        let unified = "29 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(
            parse_mounts(unified, |_| true),
            [Path::new("/sys/fs/cgroup")]
        );
    }

    #[test]
    fn only_own_parents_are_taken_away() {
        for (path, own) in [
            ("hypernetes-ab12", true),
            ("hypernetes/pods", true),
            ("kubepods/besteffort", false),
            ("", false),
        ] {
            assert_eq!(is_own(Path::new(path)), own, "{path}");
        }
    }

    #[test]
    fn paths_cannot_climb() {
        for bad in ["", "/", "../x", "a/../../b"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
        assert_eq!(checked("/hypernetes/x").unwrap(), Path::new("hypernetes/x"));
    }
}
