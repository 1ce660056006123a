//! The default system call filter: what container engines deny, with EPERM; `clone3`, whose flags a
//! filter cannot see, does not exist (ENOSYS), so that C libraries fall back to `clone`.

use caps::{Capability, CapsHashSet};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompRule,
};

use crate::filter::{self, Table};

/// Denied to everybody.
const DENIED: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    // create_module, get_kernel_syms, query_module: gone from the kernel, and from libc's list.
    174,
    177,
    178,
    libc::SYS_nfsservctl,
    libc::SYS__sysctl,
    libc::SYS_sysfs,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_userfaultfd,
    libc::SYS_lookup_dcookie,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_move_pages,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// Denied without a capability.
const GUARDED: &[(Capability, &[i64])] = &[
    (
        Capability::CAP_SYS_ADMIN,
        &[
            libc::SYS_fanotify_init,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fsopen,
            libc::SYS_fspick,
            libc::SYS_mount,
            libc::SYS_mount_setattr,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_pivot_root,
            libc::SYS_quotactl,
            libc::SYS_quotactl_fd,
            libc::SYS_setdomainname,
            libc::SYS_sethostname,
            libc::SYS_setns,
            libc::SYS_umount2,
            libc::SYS_unshare,
        ],
    ),
    (
        Capability::CAP_SYS_BOOT,
        &[
            libc::SYS_reboot,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
        ],
    ),
    (Capability::CAP_SYS_CHROOT, &[libc::SYS_chroot]),
    (
        Capability::CAP_SYS_MODULE,
        &[
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_delete_module,
        ],
    ),
    (Capability::CAP_SYS_PACCT, &[libc::SYS_acct]),
    (
        Capability::CAP_SYS_PTRACE,
        &[
            libc::SYS_kcmp,
            libc::SYS_pidfd_getfd,
            libc::SYS_process_madvise,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
        ],
    ),
    (
        Capability::CAP_SYS_RAWIO,
        &[libc::SYS_iopl, libc::SYS_ioperm],
    ),
    (
        Capability::CAP_SYS_TIME,
        &[libc::SYS_settimeofday, libc::SYS_clock_settime],
    ),
    (Capability::CAP_SYS_TTY_CONFIG, &[libc::SYS_vhangup]),
    (
        Capability::CAP_SYS_NICE,
        &[
            libc::SYS_get_mempolicy,
            libc::SYS_mbind,
            libc::SYS_set_mempolicy,
        ],
    ),
    (Capability::CAP_SYSLOG, &[libc::SYS_syslog]),
    (
        Capability::CAP_DAC_READ_SEARCH,
        &[libc::SYS_open_by_handle_at],
    ),
    (Capability::CAP_BPF, &[libc::SYS_bpf]),
    (Capability::CAP_PERFMON, &[libc::SYS_perf_event_open]),
];

/// Flags of clone(2) that make namespaces.
const NAMESPACE_FLAGS: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWCGROUP,
];

/// Execution domains that may be set: Linux, with and without the 32-bit and no-randomization flags, and "ask".
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x20000, 0x20008, 0xffff_ffff];

/// Any of `rules` is denied, with EPERM; a call of none is always.
fn denied(rules: Vec<SeccompRule>) -> (Vec<SeccompRule>, SeccompAction) {
    (rules, SeccompAction::Errno(libc::EPERM.cast_unsigned()))
}

fn when(op: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    let first = SeccompCondition::new(0, SeccompCmpArgLen::Dword, op, value)?;
    SeccompRule::new(vec![first])
}

/// The filter for a process with these capabilities.
pub(crate) fn filter(held: &CapsHashSet) -> Result<BpfProgram, BackendError> {
    let number = |call: i64| u32::try_from(call).unwrap_or(u32::MAX);
    let may = |capability: &Capability| {
        held.contains(capability) || held.contains(&Capability::CAP_SYS_ADMIN)
    };
    let guarded = GUARDED.iter().filter(|(capability, _)| !may(capability));
    let calls = guarded.flat_map(|(_, calls)| *calls).chain(DENIED);
    let mut table: Table = calls
        .map(|call| (number(*call), denied(Vec::new())))
        .collect();
    // AF_ALG and AF_VSOCK: kernel attack surface, and a way past the pod's network.
    let families = [38, 40].map(|family| when(SeccompCmpOp::Eq, family));
    let families = families.into_iter().collect::<Result<_, _>>()?;
    table.insert(number(libc::SYS_socket), denied(families));
    let foreign = PERSONALITIES
        .map(|value| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value));
    let foreign = SeccompRule::new(foreign.into_iter().collect::<Result<_, _>>()?)?;
    table.insert(number(libc::SYS_personality), denied(vec![foreign]));

    if !held.contains(&Capability::CAP_SYS_ADMIN) {
        let namespaces = NAMESPACE_FLAGS.iter().map(|flag| {
            let flag = u64::from(flag.cast_unsigned());
            when(SeccompCmpOp::MaskedEq(flag), flag)
        });
        let namespaces = namespaces.collect::<Result<_, _>>()?;
        table.insert(number(libc::SYS_clone), denied(namespaces));
        let missing = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        table.insert(number(libc::SYS_clone3), (Vec::new(), missing));
    }
    filter::compile(table, &SeccompAction::Allow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::tests::{ALLOW, ERRNO, run};

    #[test]
    fn a_process_without_capabilities_is_denied_what_engines_deny() {
        let filter = filter(&CapsHashSet::new()).unwrap();
        let of = |call, first: u64| run(&filter, call, &[first, 0, 0, 0, 0, 0]);
        let guarded = GUARDED.iter().flat_map(|(_, calls)| *calls);
        for call in DENIED.iter().chain(guarded) {
            assert_eq!(of(*call, 0), ERRNO | 1, "{call}");
        }
        assert_eq!(of(libc::SYS_openat, 0), ALLOW);
        assert_eq!(of(libc::SYS_clone3, 0), ERRNO | 38);
        for (flags, allowed) in [(libc::CLONE_VM, true), (libc::CLONE_NEWUSER, false)] {
            let flags = u64::from(flags.cast_unsigned()) | 17;
            assert_eq!(of(libc::SYS_clone, flags) == ALLOW, allowed);
        }
        for (family, allowed) in [(libc::AF_INET, true), (38, false), (40, false)] {
            let family = u64::from(family.cast_unsigned());
            assert_eq!(of(libc::SYS_socket, family) == ALLOW, allowed, "{family}");
        }
        for (personality, allowed) in [(0, true), (0x20008, true), (0x40000, false)] {
            let got = of(libc::SYS_personality, personality);
            assert_eq!(got == ALLOW, allowed, "{personality:#x}");
        }
    }

    #[test]
    fn a_capability_opens_its_calls() {
        let all = filter(&caps::all()).unwrap();
        let of = |call| run(&all, call, &[0; 6]);
        for call in GUARDED.iter().flat_map(|(_, calls)| *calls) {
            assert_eq!(of(*call), ALLOW, "{call}");
        }
        assert_eq!(of(libc::SYS_clone3), ALLOW);
        assert_eq!(of(libc::SYS_keyctl), ERRNO | 1);
        let chroot = filter(&[Capability::CAP_SYS_CHROOT].into()).unwrap();
        assert_eq!(run(&chroot, libc::SYS_chroot, &[0; 6]), ALLOW);
        assert_eq!(run(&chroot, libc::SYS_mount, &[0; 6]), ERRNO | 1);
    }
}
