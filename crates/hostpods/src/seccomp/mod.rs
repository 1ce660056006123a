//! System call filters, in OCI's words: the usual one of container engines, and an operator's.

mod calls;

use std::{
    collections::HashSet,
    fs::{self, File},
    io::Read,
    path::Path,
};

use hypernetes_runtime::RuntimeError;
use nix::libc;
use oci_spec::{
    OciSpecError,
    runtime::{
        Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
        LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
    },
};

use crate::records::{invalid, storage};

/// Largest profile of an operator's.
const MAX_PROFILE: u64 = 1 << 20;
const EPERM: u32 = libc::EPERM.cast_unsigned();
const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();
/// Execution domains that may be set: Linux, with and without the 32-bit and no-randomization
/// flags, and "ask".
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x20000, 0x20008, 0xffff_ffff];
/// AF_ALG and AF_VSOCK: attack surface of the kernel, and a way to other machines' VMs.
const FAMILIES: (u64, u64) = (38, 40);
/// All flags of clone(2) that make namespaces.
const NAMESPACES: u64 = 0x7e02_0000;

fn rule(names: &[&str], action: LinuxSeccompAction) -> LinuxSyscallBuilder {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    LinuxSyscallBuilder::default().names(names).action(action)
}

fn allow(names: &[&str]) -> LinuxSyscallBuilder {
    rule(names, LinuxSeccompAction::ScmpActAllow)
}

fn argument(
    index: usize,
    op: LinuxSeccompOperator,
    value: u64,
) -> Result<LinuxSeccompArg, OciSpecError> {
    LinuxSeccompArgBuilder::default()
        .index(index)
        .value(value)
        .op(op)
        .build()
}

/// The default filter for a process with these capabilities (`CAP_…`). What it does not name is
/// denied: a system call that is newer than it, too.
pub(crate) fn runtime_default(held: &HashSet<String>) -> Result<LinuxSeccomp, RuntimeError> {
    build(held).map_err(|error| storage("build the default system call filter", error))
}

fn build(held: &HashSet<String>) -> Result<LinuxSeccomp, OciSpecError> {
    let has = |name: &str| held.contains(name);
    let admin = has("CAP_SYS_ADMIN");
    let mut rules: Vec<LinuxSyscall> = vec![allow(calls::ALLOWED).build()?];
    for (capability, names) in calls::GUARDED {
        if admin || has(capability) {
            rules.push(allow(names).build()?);
        }
    }
    for value in PERSONALITIES {
        let same = argument(0, LinuxSeccompOperator::ScmpCmpEq, value)?;
        rules.push(allow(&["personality"]).args(vec![same]).build()?);
    }
    // All families but the two: below, between and above.
    let (low, high) = FAMILIES;
    for args in [
        vec![argument(0, LinuxSeccompOperator::ScmpCmpLt, low)?],
        vec![argument(0, LinuxSeccompOperator::ScmpCmpEq, low + 1)?],
        vec![argument(0, LinuxSeccompOperator::ScmpCmpGt, high)?],
    ] {
        rules.push(allow(&["socket"]).args(args).build()?);
    }
    if admin {
        rules.push(allow(&["clone", "clone3"]).build()?);
    } else {
        let no_namespaces = LinuxSeccompArgBuilder::default()
            .index(0usize)
            .value(NAMESPACES)
            .value_two(0u64)
            .op(LinuxSeccompOperator::ScmpCmpMaskedEq)
            .build()?;
        rules.push(allow(&["clone"]).args(vec![no_namespaces]).build()?);
        // A filter cannot see its flags: C libraries fall back to clone.
        let missing = rule(&["clone3"], LinuxSeccompAction::ScmpActErrno);
        rules.push(missing.errno_ret(ENOSYS).build()?);
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(vec![
            Arch::ScmpArchX86_64,
            Arch::ScmpArchX86,
            Arch::ScmpArchX32,
        ])
        .syscalls(rules)
        .build()
}

/// An operator's profile. Blocks.
pub(crate) fn of_file(path: &Path) -> Result<LinuxSeccomp, RuntimeError> {
    let wrong = |rule: String| {
        invalid(
            "seccomp.localhost_ref",
            format!("{}: {rule}", path.display()),
        )
    };
    if !path.is_absolute() {
        return Err(wrong("must be an absolute path".to_owned()));
    }
    let metadata = fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
    if !metadata.is_file() || metadata.len() > MAX_PROFILE {
        return Err(wrong(format!(
            "must be a file of at most {MAX_PROFILE} bytes"
        )));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let read = file.take(MAX_PROFILE).read_to_end(&mut bytes);
    read.map_err(|error| wrong(error.to_string()))?;
    let profile = of_json(&bytes);
    profile.map_err(wrong)
}

fn of_json(bytes: &[u8]) -> Result<LinuxSeccomp, String> {
    let value: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    // Conditions of one engine's own format, which is like OCI's otherwise. Without them the rule
    // would be another.
    let rules = value.get("syscalls").and_then(|rules| rules.as_array());
    for rule in rules.into_iter().flatten() {
        for name in ["includes", "excludes"] {
            let empty = |value: &serde_json::Value| {
                value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
            };
            if rule.get(name).is_some_and(|value| !empty(value)) {
                return Err(format!("{name} is no part of an OCI profile"));
            }
        }
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(profile: &LinuxSeccomp, call: &str) -> bool {
        let rules = profile.syscalls().as_ref().unwrap();
        rules.iter().any(|rule| {
            rule.action() == LinuxSeccompAction::ScmpActAllow
                && rule.args().as_ref().is_none_or(Vec::is_empty)
                && rule.names().iter().any(|name| name == call)
        })
    }

    #[test]
    fn what_endangers_the_host_needs_its_capability() {
        let plain = runtime_default(&HashSet::new()).unwrap();
        for call in [
            "read", "execve", "openat2", "futex", "mmap2", "prctl", "seccomp",
        ] {
            assert!(allowed(&plain, call), "{call}");
        }
        for call in [
            "mount",
            "setns",
            "unshare",
            "bpf",
            "keyctl",
            "reboot",
            "clone",
            "clone3",
            "socket",
            "io_uring_setup",
            "userfaultfd",
            "init_module",
            "open_by_handle_at",
            "kexec_load",
        ] {
            assert!(!allowed(&plain, call), "{call}");
        }
        let time = runtime_default(&["CAP_SYS_TIME".to_owned()].into()).unwrap();
        assert!(allowed(&time, "clock_settime") && !allowed(&time, "mount"));
        let admin = runtime_default(&["CAP_SYS_ADMIN".to_owned()].into()).unwrap();
        assert!(allowed(&admin, "mount") && allowed(&admin, "clone3"));
        assert!(!allowed(&admin, "keyctl"));
    }

    #[test]
    fn an_operator_s_profile_is_oci_s_and_nothing_else() {
        let good = br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}"#;
        let profile = of_json(good).unwrap();
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActAllow);
        for bad in [
            &b"nonsense"[..],
            br#"{"defaultAction":"SCMP_ACT_MAYBE"}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","includes":{"caps":["CAP_SYS_ADMIN"]}}]}"#,
        ] {
            assert!(of_json(bad).is_err());
        }
        let missing = of_file(Path::new("/no/such/profile.json")).unwrap_err();
        assert!(missing.to_string().contains("/no/such/profile.json"));
    }
}
