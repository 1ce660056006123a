//! A VM that grows and shrinks while it runs.
//!
//! All the CPUs that it may have are there from the start, and off; which are on is said by the node.
//! Memory is plugged and taken back by the VMM: the kernel need only put it to use at once, in a way
//! that lets it go again.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use hypernetes_agent_api::v1;
use tokio::time::{Instant, sleep};

use crate::{
    console::log,
    disks::blocking,
    error::{Attempt, GuestError},
    stats,
};

const CPUS: &str = "/sys/devices/system/cpu";
/// What is done with memory that is plugged.
const ONLINE: &str = "/sys/devices/system/memory/auto_online_blocks";
/// A CPU that is busy elsewhere refuses to go down for a moment.
const PATIENCE: Duration = Duration::from_secs(5);

/// The kernel parameter that says how many CPUs stay up.
const PARAMETER: &str = "hyperstart.cpus=";

/// Has memory that is plugged later put to use, for pages that can be moved away again, and takes
/// down CPUs that are there for later.
pub(crate) fn prepare() {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let mut words = line.split_whitespace();
    let wanted = words.find_map(|word| word.strip_prefix(PARAMETER)?.parse::<u32>().ok());
    if let Some(wanted) = wanted.filter(|wanted| *wanted > 0) {
        let spare = switches()
            .into_iter()
            .filter(|(number, _)| *number >= wanted);
        for (number, switch) in spare {
            if let Err(error) = fs::write(switch, "0") {
                log!("cannot take CPU {number} down: {error}");
            }
        }
    }
    // Kernels without it exist: their memory does not grow.
    if Path::new(ONLINE).exists()
        && let Err(error) = fs::write(ONLINE, "online_movable")
    {
        log!("cannot prepare for more memory: {error}");
    }
}

/// CPUs that can be switched, by number. The first one often cannot.
fn switches() -> Vec<(u32, PathBuf)> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(CPUS)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix("cpu")?.parse().ok()?;
            let switch = entry.path().join("online");
            switch.exists().then_some((number, switch))
        })
        .collect();
    found.sort_unstable();
    found
}

/// Numbers in a list such as `0-3,5`.
fn count(list: &str) -> u32 {
    let part = |part: &str| match part.split_once('-') {
        Some((first, last)) => {
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        }
        None => part.parse::<u32>().ok().map(|_| 1),
    };
    list.trim().split(',').filter_map(part).sum()
}

fn online() -> u32 {
    count(&fs::read_to_string(Path::new(CPUS).join("online")).unwrap_or_default())
}

/// Brings up as many CPUs as are asked for, and takes the others down.
pub(crate) async fn apply(vcpus: u32) -> Result<v1::ResizeResponse, GuestError> {
    if vcpus == 0 {
        return Err(GuestError::invalid("a VM has at least one CPU"));
    }
    for (number, switch) in switches() {
        let wanted = if number < vcpus { "1" } else { "0" };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let path = switch.clone();
            let switched = blocking(move || match fs::read_to_string(&path)?.trim() == wanted {
                true => Ok(()),
                false => fs::write(&path, wanted),
            });
            match switched.await {
                Err(error)
                    if error.kind() == std::io::ErrorKind::ResourceBusy
                        && Instant::now() < deadline =>
                {
                    sleep(Duration::from_millis(20)).await;
                }
                result => break result.attempt(format!("switch CPU {number}"))?,
            }
        }
    }
    Ok(v1::ResizeResponse {
        vcpus: online(),
        memory_total: stats::memory_total(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_counted() {
        for (list, number) in [
            ("0", 1),
            ("0-3\n", 4),
            ("0-1,3,5-6", 5),
            ("", 0),
            ("x-y,4", 1),
        ] {
            assert_eq!(count(list), number, "{list:?}");
        }
    }
}
