//! What a kernel must be able to do, and whether its configuration says that it can.

use std::{collections::HashMap, fmt};

use serde::{Deserialize, Serialize};

use crate::Machine;

/// How much depends on an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Without it pods work less well.
    Recommended,
    /// Without it no pod runs.
    Essential,
}

/// One thing that a kernel should be able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirement {
    /// Configuration option, without `CONFIG_`.
    pub option: &'static str,
    /// The module that the option makes, if it can be one.
    pub module: Option<&'static str>,
    /// What depends on it.
    pub severity: Severity,
    /// What it is for.
    pub why: &'static str,
}

const fn needs(option: &'static str, module: &'static str, why: &'static str) -> Requirement {
    Requirement {
        option,
        module: Some(module),
        severity: Severity::Essential,
        why,
    }
}

const fn builtin(option: &'static str, why: &'static str) -> Requirement {
    Requirement {
        option,
        module: None,
        severity: Severity::Essential,
        why,
    }
}

const fn wish(
    option: &'static str,
    module: Option<&'static str>,
    why: &'static str,
) -> Requirement {
    Requirement {
        option,
        module,
        severity: Severity::Recommended,
        why,
    }
}

/// Everything a kernel should be able to do, in the order in which its modules are loaded: the
/// transport before the devices on it.
const REQUIREMENTS: &[Requirement] = &[
    builtin("BLK_DEV_INITRD", "HyperStart is in the initramfs"),
    builtin(
        "SERIAL_8250_CONSOLE",
        "the console tells of boot failures and panics",
    ),
    builtin("DEVTMPFS", "HyperStart finds its devices in /dev"),
    builtin("PROC_FS", "containers need /proc"),
    builtin("SYSFS", "containers need /sys"),
    builtin(
        "TMPFS",
        "HyperStart's root and memory-backed volumes are tmpfs",
    ),
    builtin("UNIX98_PTYS", "terminals of containers need ptys"),
    builtin("NAMESPACES", "containers are made of namespaces"),
    builtin("UTS_NS", "containers are made of namespaces"),
    builtin("IPC_NS", "containers are made of namespaces"),
    builtin("PID_NS", "containers are made of namespaces"),
    builtin("NET_NS", "containers are made of namespaces"),
    builtin("CGROUPS", "limits of containers are cgroups"),
    builtin("MEMCG", "memory limits of containers need it"),
    builtin("CGROUP_PIDS", "process limits of containers need it"),
    builtin(
        "SECCOMP_FILTER",
        "the default profile of containers is a seccomp filter",
    ),
    builtin("INET", "pods speak IP"),
    needs(
        "VIRTIO_CONSOLE",
        "virtio_console",
        "the channel to HyperStart is a virtio port",
    ),
    needs(
        "SCSI_VIRTIO",
        "virtio_scsi",
        "image layers and volumes are virtio-scsi disks",
    ),
    needs(
        "BLK_DEV_SD",
        "sd_mod",
        "image layers and volumes are SCSI disks",
    ),
    needs("VIRTIO_NET", "virtio_net", "the network device of a pod"),
    needs(
        "OVERLAY_FS",
        "overlay",
        "container root file systems need it",
    ),
    needs("EROFS_FS", "erofs", "image layers are erofs"),
    needs(
        "EXT4_FS",
        "ext4",
        "the writable layers of containers are on ext4",
    ),
    wish(
        "EROFS_FS_XATTR",
        None,
        "file capabilities and opaque directories in images need it",
    ),
    wish("TMPFS_XATTR", None, "writable layers in memory need it"),
    wish(
        "HW_RANDOM_VIRTIO",
        Some("virtio_rng"),
        "entropy from the host at boot",
    ),
    wish(
        "VIRTIO_BALLOON",
        Some("virtio_balloon"),
        "memory that a pod frees goes back to the host",
    ),
    wish(
        "PAGE_REPORTING",
        None,
        "memory that a pod frees goes back to the host by itself",
    ),
    wish(
        "PACKET",
        Some("af_packet"),
        "DHCP clients and packet captures in pods need it",
    ),
    wish("CFS_BANDWIDTH", None, "CPU limits of containers need it"),
    wish("CGROUP_BPF", None, "device rules of containers need it"),
    wish("USER_NS", None, "containers in user namespaces need it"),
    wish("POSIX_MQUEUE", None, "/dev/mqueue of containers needs it"),
    wish(
        "KVM_GUEST",
        None,
        "an exact clock and cheap scheduling under KVM",
    ),
];

/// One of the two transports, by machine.
const PCI: Requirement = needs(
    "VIRTIO_PCI",
    "virtio_pci",
    "all devices of the q35 machine are on PCI",
);
const MMIO: Requirement = needs(
    "VIRTIO_MMIO",
    "virtio_mmio",
    "all devices of the microvm machine are memory-mapped",
);

/// What a kernel on `machine` should be able to do.
pub fn requirements(machine: Machine) -> Vec<Requirement> {
    let transport = match machine {
        Machine::Microvm => MMIO,
        Machine::Q35 => PCI,
    };
    [transport]
        .into_iter()
        .chain(REQUIREMENTS.iter().copied())
        .collect()
}

/// Something that a kernel lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Configuration option, with `CONFIG_`.
    pub option: String,
    /// What depends on it.
    pub severity: Severity,
    /// What it is for.
    pub why: String,
}

impl Finding {
    pub(crate) fn of(requirement: &Requirement) -> Self {
        Self {
            option: format!("CONFIG_{}", requirement.option),
            severity: requirement.severity,
            why: requirement.why.to_owned(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lacks {}: {}", self.option, self.why)
    }
}

/// A kernel's configuration (`.config`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config(HashMap<String, String>);

impl Config {
    /// Reads the options that are set. Lines that are none are skipped.
    pub fn parse(text: &str) -> Self {
        let option = |line: &str| {
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            Some((name.to_owned(), value.trim().to_owned()))
        };
        Self(text.lines().filter_map(option).collect())
    }

    /// Whether the option is built in.
    pub fn is_builtin(&self, option: &str) -> bool {
        self.0.get(option).is_some_and(|value| value == "y")
    }

    /// Whether the option is a module.
    pub fn is_module(&self, option: &str) -> bool {
        self.0.get(option).is_some_and(|value| value == "m")
    }

    /// The machine that a kernel of this configuration drives best.
    ///
    /// microvm has no ACPI here: its devices are announced on the kernel command line, which the
    /// kernel must have been built to read. PVH is how an uncompressed kernel is started.
    pub fn machine(&self) -> Machine {
        let all = ["VIRTIO_MMIO_CMDLINE_DEVICES", "VIRTIO_MMIO", "PVH"];
        if all.iter().all(|option| self.is_builtin(option)) {
            Machine::Microvm
        } else {
            Machine::Q35
        }
    }
}

/// What a kernel of this configuration lacks on the machine that it is used with. An option that is
/// a module counts as there if it can be one.
pub fn check_config(config: &Config) -> Vec<Finding> {
    let missing = |requirement: &Requirement| {
        let module = requirement.module.is_some() && config.is_module(requirement.option);
        !config.is_builtin(requirement.option) && !module
    };
    requirements(config.machine())
        .iter()
        .filter(|r| missing(r))
        .map(Finding::of)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> String {
        requirements(Machine::Q35)
            .iter()
            .map(|r| format!("CONFIG_{}=y\n", r.option))
            .collect()
    }

    #[test]
    fn a_full_configuration_lacks_nothing() {
        assert_eq!(check_config(&Config::parse(&full())), []);
    }

    #[test]
    fn our_own_fragment_is_a_microvm_kernel() {
        let config = Config::parse(include_str!("../../../kernel/hyperkernel.config"));
        assert_eq!(config.machine(), Machine::Microvm);
    }

    #[test]
    fn what_is_missing_is_told_by_name_and_purpose() {
        let text = full().replace("CONFIG_OVERLAY_FS=y", "# CONFIG_OVERLAY_FS is not set");
        let findings = check_config(&Config::parse(&text));
        assert_eq!(
            findings.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["lacks CONFIG_OVERLAY_FS: container root file systems need it"]
        );
    }

    #[test]
    fn modules_count_only_where_they_can_be_loaded() {
        let text = full().replace("CONFIG_EROFS_FS=y", "CONFIG_EROFS_FS=m");
        assert_eq!(check_config(&Config::parse(&text)), []);
        let text = full().replace("CONFIG_DEVTMPFS=y", "CONFIG_DEVTMPFS=m");
        assert_eq!(check_config(&Config::parse(&text)).len(), 1);
    }
}
