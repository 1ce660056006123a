//! Amounts: a container's limits, and the size of the VM around them.

use std::collections::BTreeMap;

use hypernetes_runtime::{ResourceConfig, VmExtras};
use hypernetes_types::{CpuSet, PageSize};

use crate::{
    config::{CriConfig, VmSizes},
    lookup,
    status::CriError,
    v1,
};

const MIB: i64 = 1 << 20;
/// What the kernel takes when nothing is said, in microseconds.
const CPU_PERIOD: i64 = 100_000;
/// Shares of one whole CPU.
const SHARES: i64 = 1024;

/// Thousandths of a CPU that a quota stands for; 0 = no limit.
fn cpu_limit_milli(resources: &v1::LinuxContainerResources) -> i64 {
    let period = match resources.cpu_period {
        0 => CPU_PERIOD,
        period => period,
    };
    match resources.cpu_quota {
        // A quota below the least that can be told is still a limit.
        quota if quota > 0 => (quota.saturating_mul(1000) / period.max(1)).max(1),
        _ => 0,
    }
}

/// Refuses what a guest does not have.
fn check(base: &str, resources: &v1::LinuxContainerResources) -> Result<(), CriError> {
    let refused = |field: &str, rule: &str| Err(CriError::invalid(format!("{base}.{field}"), rule));
    if !(-1..=i64::MAX).contains(&resources.cpu_quota) {
        return refused("cpu_quota", "must be -1 or more");
    }
    if resources.cpu_period < 0 || resources.cpu_shares < 0 {
        return refused("cpu_period", "and cpu_shares must not be negative");
    }
    if resources.memory_limit_in_bytes < 0 {
        return refused("memory_limit_in_bytes", "must not be negative");
    }
    if !(-1000..=1000).contains(&resources.oom_score_adj) {
        return refused("oom_score_adj", "must be -1000 to 1000");
    }
    Ok(())
}

/// A container's limits. No swap is in the guest, so a limit of swap holds by itself.
pub(crate) fn of_container(
    base: &str,
    resources: &v1::LinuxContainerResources,
) -> Result<ResourceConfig, CriError> {
    check(base, resources)?;
    let set = |field: &str, text: &str| {
        let set = text.parse::<CpuSet>();
        set.map_err(|error| CriError::invalid(format!("{base}.{field}"), error.to_string()))
    };
    Ok(ResourceConfig {
        cpuset_cpus: set("cpuset_cpus", &resources.cpuset_cpus)?,
        cpuset_mems: set("cpuset_mems", &resources.cpuset_mems)?,
        memory_limit: resources.memory_limit_in_bytes,
        cpu_limit_milli: cpu_limit_milli(resources),
        // Rounded up, so that the way back gives the same shares.
        cpu_request_milli: resources
            .cpu_shares
            .saturating_mul(1000)
            .saturating_add(SHARES - 1)
            / SHARES,
        pids_limit: 0,
        oom_score_adj: i32::try_from(resources.oom_score_adj).ok(),
        unified: resources.unified.clone(),
        huge_pages: huge_pages(base, resources)?,
    })
}

/// Huge pages by size. The kubelet names every size that the host has, most of them with nothing; the
/// guest may have fewer.
fn huge_pages(
    base: &str,
    resources: &v1::LinuxContainerResources,
) -> Result<BTreeMap<String, u64>, CriError> {
    let mut pages = BTreeMap::new();
    let asked = resources.hugepage_limits.iter().enumerate();
    for (index, asked) in asked.filter(|(_, asked)| asked.limit > 0) {
        let refused = |field: &str, rule: String| {
            let field = format!("{base}.hugepage_limits[{index}].{field}");
            Err(CriError::invalid(field, rule))
        };
        let shown = lookup::shown(&asked.page_size);
        let size = match asked.page_size.parse::<PageSize>() {
            Ok(size) => size,
            Err(error) => return refused("page_size", error.to_string()),
        };
        if asked.limit % size.bytes() != 0 {
            let rule = format!(
                "{} bytes are no whole number of pages of {shown}",
                asked.limit
            );
            return refused("limit", rule);
        }
        if pages.insert(asked.page_size.clone(), asked.limit).is_some() {
            return refused("page_size", format!("{shown:?} is limited twice"));
        }
    }
    Ok(pages)
}

/// What is in force after an update: what the update leaves out stays.
pub(crate) fn merged(
    old: &v1::LinuxContainerResources,
    update: &v1::LinuxContainerResources,
) -> v1::LinuxContainerResources {
    let or = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &String, old: &String| if new.is_empty() { old } else { new }.clone();
    let mut unified = old.unified.clone();
    unified.extend(update.unified.clone());
    v1::LinuxContainerResources {
        cpu_period: or(update.cpu_period, old.cpu_period),
        cpu_quota: or(update.cpu_quota, old.cpu_quota),
        cpu_shares: or(update.cpu_shares, old.cpu_shares),
        memory_limit_in_bytes: or(update.memory_limit_in_bytes, old.memory_limit_in_bytes),
        memory_swap_limit_in_bytes: or(
            update.memory_swap_limit_in_bytes,
            old.memory_swap_limit_in_bytes,
        ),
        // Of a process, not of a cgroup: it is set when the process starts.
        oom_score_adj: old.oom_score_adj,
        cpuset_cpus: text(&update.cpuset_cpus, &old.cpuset_cpus),
        cpuset_mems: text(&update.cpuset_mems, &old.cpuset_mems),
        hugepage_limits: match update.hugepage_limits.is_empty() {
            true => old.hugepage_limits.clone(),
            false => update.hugepage_limits.clone(),
        },
        unified,
    }
}

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmSize {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
}

/// The VM around the sum of the containers' limits. Containers without limits have room for the
/// node's least.
pub(crate) fn vm_size(linux: &v1::LinuxPodSandboxConfig, sizes: &VmSizes) -> VmSize {
    let limits = linux.resources.clone().unwrap_or_default();
    let memory = (limits.memory_limit_in_bytes.max(0).saturating_add(MIB - 1)) / MIB;
    let memory = u32::try_from(memory).unwrap_or(u32::MAX);
    let cpus = (cpu_limit_milli(&limits).saturating_add(999)) / 1000;
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
    VmSize {
        vcpus: cpus.max(sizes.vcpus).clamp(1, sizes.max_vcpus.max(1)),
        memory_mib: memory
            .max(sizes.memory_mib)
            .saturating_add(sizes.overhead_mib),
    }
}

/// What a VM of this size can be given later.
pub(crate) fn vm_extras(size: VmSize, node: &CriConfig) -> VmExtras {
    let vm = &node.vm;
    VmExtras {
        max_vcpus: match vm.resize_vcpus {
            0 => size.vcpus,
            most => most.min(vm.max_vcpus).max(size.vcpus),
        },
        max_memory_mib: match vm.resize_memory_mib {
            0 => size.memory_mib,
            most => most.saturating_add(vm.overhead_mib).max(size.memory_mib),
        },
        shares: node.share_volumes || !node.shared_paths.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_translated() {
        let resources = v1::LinuxContainerResources {
            cpu_period: 50_000,
            cpu_quota: 75_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            oom_score_adj: -997,
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let config = of_container("r", &resources).unwrap();
        assert_eq!(
            (config.cpu_limit_milli, config.cpu_request_milli),
            (1500, 500)
        );
        assert_eq!(
            (config.memory_limit, config.oom_score_adj),
            (64 << 20, Some(-997))
        );
        assert_eq!(config.unified["memory.oom.group"], "1");
        let unlimited = v1::LinuxContainerResources {
            cpu_quota: -1,
            ..resources
        };
        assert_eq!(of_container("r", &unlimited).unwrap().cpu_limit_milli, 0);
    }

    #[test]
    fn what_a_guest_has_not_is_refused_by_name() {
        let cases = [
            (
                v1::LinuxContainerResources {
                    cpuset_cpus: "0-".into(),
                    ..Default::default()
                },
                "r.cpuset_cpus",
            ),
            (
                v1::LinuxContainerResources {
                    hugepage_limits: vec![
                        v1::HugepageLimit {
                            page_size: "2MB".into(),
                            limit: 1 << 21,
                        };
                        2
                    ],
                    ..Default::default()
                },
                "r.hugepage_limits[1].page_size",
            ),
            (
                v1::LinuxContainerResources {
                    memory_limit_in_bytes: -1,
                    ..Default::default()
                },
                "r.memory_limit_in_bytes",
            ),
        ];
        for (resources, name) in cases {
            match of_container("r", &resources).unwrap_err() {
                CriError::Invalid { field, .. } => assert_eq!(field, name),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn only_huge_pages_that_are_asked_for_are_promised() {
        let limit = |page_size: &str, limit| v1::HugepageLimit {
            page_size: page_size.into(),
            limit,
        };
        let resources = v1::LinuxContainerResources {
            hugepage_limits: vec![limit("2MB", 4 << 20), limit("1GB", 0)],
            ..Default::default()
        };
        let config = of_container("r", &resources).unwrap();
        assert_eq!(config.huge_pages, [("2MB".to_owned(), 4 << 20)].into());
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let old = v1::LinuxContainerResources {
            cpu_quota: 100_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 26,
            oom_score_adj: 500,
            cpuset_cpus: "2-3".into(),
            ..Default::default()
        };
        let update = v1::LinuxContainerResources {
            cpu_quota: -1,
            memory_limit_in_bytes: 0,
            ..Default::default()
        };
        let merged = merged(&old, &update);
        assert_eq!((merged.cpu_quota, merged.cpu_period), (-1, 100_000));
        assert_eq!(merged.cpuset_cpus, "2-3");
        assert_eq!(
            (merged.memory_limit_in_bytes, merged.oom_score_adj),
            (1 << 26, 500)
        );
    }

    #[test]
    fn a_vm_holds_its_containers_and_the_guest() {
        let sizes = VmSizes {
            memory_mib: 256,
            overhead_mib: 64,
            vcpus: 1,
            max_vcpus: 4,
            resize_vcpus: 0,
            resize_memory_mib: 0,
            scratch_mib: 1,
        };
        let linux = |memory_limit_in_bytes, cpu_quota| v1::LinuxPodSandboxConfig {
            resources: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes,
                cpu_quota,
                cpu_period: 100_000,
                ..Default::default()
            }),
            ..Default::default()
        };
        for (linux, vcpus, memory_mib) in [
            (v1::LinuxPodSandboxConfig::default(), 1, 320),
            (linux(1 << 30, 0), 1, 1088),
            (linux((1 << 30) + 1, 150_000), 2, 1089),
            (linux(1, 6_400_000), 4, 320),
        ] {
            assert_eq!(vm_size(&linux, &sizes), VmSize { vcpus, memory_mib });
        }
    }
}
