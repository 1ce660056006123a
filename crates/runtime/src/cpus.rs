//! CPUs and memory nodes of the host that containers may name.

use std::path::Path;

use hypernetes_types::CpuSet;

use crate::{api::ResourceConfig, error::RuntimeError};

const ONLINE: &str = "/sys/devices/system/cpu/online";
/// Not there on a kernel without NUMA, which has node 0.
const MEMORY_NODES: &str = "/sys/devices/system/node/has_memory";

fn read(path: &str) -> Option<CpuSet> {
    let text = std::fs::read_to_string(Path::new(path)).ok()?;
    text.trim().parse().ok()
}

/// Refuses sets that this host cannot give a VM.
pub(crate) fn check(resources: &ResourceConfig) -> Result<(), RuntimeError> {
    let (cpus, nodes) = (&resources.cpuset_cpus, &resources.cpuset_mems);
    if !cpus.is_empty() {
        check_cpus(cpus, &read(ONLINE).unwrap_or_default())?;
    }
    if !nodes.is_empty() {
        let all = read(MEMORY_NODES).unwrap_or_else(|| CpuSet::from_iter([0]));
        check_nodes(nodes, &all)?;
    }
    Ok(())
}

fn invalid(field: &str, rule: String) -> RuntimeError {
    RuntimeError::Invalid {
        field: field.to_owned(),
        rule,
    }
}

fn check_cpus(cpus: &CpuSet, online: &CpuSet) -> Result<(), RuntimeError> {
    let missing = cpus.without(online);
    if missing.is_empty() {
        return Ok(());
    }
    let rule = format!("must be CPUs of this node that are online ({online}), not {missing}");
    Err(invalid("cpuset_cpus", rule))
}

/// The memory of a VM cannot be bound to a node from outside: all of them is what it has.
fn check_nodes(nodes: &CpuSet, all: &CpuSet) -> Result<(), RuntimeError> {
    if nodes == all {
        return Ok(());
    }
    let rule =
        format!("must be all memory nodes of this node ({all}): a VM's memory is on any of them");
    Err(invalid("cpuset_mems", rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    #[test]
    fn only_what_the_host_has_can_be_named() {
        check_cpus(&set("1-2"), &set("0-3")).unwrap();
        let error = check_cpus(&set("2-5"), &set("0-3")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid cpuset_cpus: must be CPUs of this node that are online (0-3), not 4-5"
        );
        check_nodes(&set("0-1"), &set("0-1")).unwrap();
        for bad in ["0", "0-2"] {
            let error = check_nodes(&set(bad), &set("0-1")).unwrap_err();
            assert!(
                error.to_string().starts_with("invalid cpuset_mems: "),
                "{error}"
            );
        }
        // Every host has these.
        let resources = ResourceConfig {
            cpuset_cpus: set("0"),
            ..ResourceConfig::default()
        };
        check(&resources).unwrap();
        assert!(
            check(&ResourceConfig {
                cpuset_cpus: set("8000"),
                ..resources
            })
            .is_err()
        );
    }
}
