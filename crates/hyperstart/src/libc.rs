//! What the C library need not bring along.
#![allow(unsafe_code, reason = "see below")]

use std::ffi::{c_int, c_void};

/// Stands in for the C library's, which reads a stack's bounds out of /proc with scanf, and so has all kinds of
/// numbers read: a twentieth of the program. The standard library asks only to tell an overflow of a stack from
/// other faults in its last words, and takes no for an answer.
// SAFETY: pthread_getattr_np(3) may fail, and has written nothing then.
#[unsafe(no_mangle)]
extern "C" fn pthread_getattr_np(_thread: usize, _attributes: *mut c_void) -> c_int {
    rustix::io::Errno::NOSYS.raw_os_error()
}
