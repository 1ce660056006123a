//! The few system calls that no safe crate offers. The only unsafe code of the guest.
#![allow(unsafe_code, reason = "see each block")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use seccompiler::sock_filter;

/// `struct sock_fprog` of linux/filter.h.
#[repr(C)]
struct Program {
    len: libc::c_ushort,
    filter: *const sock_filter,
}

/// Installs a system call filter on the calling thread, with `SECCOMP_FILTER_FLAG_…`.
///
/// JUSTIFICATION: `seccompiler::apply_filter` also sets no_new_privs, which would break programs
/// that may gain privileges.
pub(crate) fn install_filter(filter: &[sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let len = libc::c_ushort::try_from(filter.len()).map_err(io::Error::other)?;
    let program = Program {
        len,
        filter: filter.as_ptr(),
    };
    // SAFETY: `program` and the filter it points to live until the call has returned; the kernel
    // copies both, and checks the filter.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    check(result)
}

/// Makes a mounted ext4 as large as so many of its blocks (`EXT4_IOC_RESIZE_FS`).
///
/// JUSTIFICATION: neither rustix nor nix has the call.
pub fn resize_ext4(root: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    const RESIZE_FS: libc::Ioctl = 0x4008_6610;
    // SAFETY: the kernel reads eight bytes at the address, which live until the call has returned.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), RESIZE_FS, &raw const blocks) };
    check(result.into())
}

/// Shows a detached mount's owners through the ids of a user namespace (mount_setattr(2)).
///
/// JUSTIFICATION: neither rustix nor nix has the call.
pub(crate) fn map_owners(mount: BorrowedFd<'_>, users: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: users.as_raw_fd().cast_unsigned().into(),
    };
    // SAFETY: the path is an empty C string and the attributes live until the call has returned;
    // their size is told, and the kernel checks what is in them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result)
}

/// Closes every descriptor from 3 on at the next execve.
///
/// JUSTIFICATION: neither rustix nor nix has close_range(2).
pub(crate) fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: takes three numbers and changes a flag of descriptors; none is closed here.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(result)
}

/// Resets every signal to its default action: ignored ones would stay ignored over execve.
///
/// JUSTIFICATION: safe crates can install handlers only behind an unsafe function too.
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL installs no handler code. Numbers that cannot be changed (SIGKILL,
        // SIGSTOP, those that libc keeps) give an error, which changes nothing.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// `struct rand_pool_info` of linux/random.h with 32 bytes.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; 32],
}

const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Puts a seed into the kernel's pool and has its generator take it up at once.
///
/// JUSTIFICATION: no crate has these ioctls.
pub fn add_entropy(seed: [u8; 32]) -> io::Result<()> {
    let device = std::fs::File::options().write(true).open("/dev/urandom")?;
    let entropy = Entropy {
        bits: 256,
        size: 32,
        bytes: seed,
    };
    // SAFETY: the argument is a rand_pool_info whose size field matches its buffer.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const entropy) };
    check(result.into())?;
    // SAFETY: takes no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    check(result.into())
}

/// Has the wall clock go faster or slower, at 0.5 ms a second, until it has gained this much
/// (adjtimex(2), `ADJ_OFFSET_SINGLESHOT`). Replaces what was left of an earlier call.
///
/// JUSTIFICATION: rustix and nix have no adjtimex.
pub fn slew_clock(microseconds: i64) -> io::Result<()> {
    // SAFETY: a timex is integers only; all zeros is one.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = microseconds;
    // SAFETY: the argument is a timex that lives through the call.
    let result = unsafe { libc::adjtimex(&raw mut change) };
    // The state of the clock is no error: TIME_ERROR only says that nobody claims to have set it.
    check(result.min(0).into())
}

/// Sends a signal, real-time ones included, to a process, or with a negative pid to its group.
/// The caller guarantees that the pid is not yet reaped, else it may be somebody else's.
///
/// JUSTIFICATION: rustix and nix have only the named signals.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: takes two numbers.
    let result = unsafe { libc::kill(pid, signal) };
    check(result.into())
}

fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
