//! What makes a container inside the guest.
//!
//! The agent re-executes itself as a single-threaded child ([`child::main`]) for every container and
//! every exec. Over a socket on its standard input the child gets a [`Job`] and the descriptors that
//! are to be the program's standard streams, makes namespaces, mounts and process attributes, answers
//! [`Reply::Ready`], waits for the gate (for an exec it comes with the job), and executes the program:
//!
//! ```text
//! agent                                        child
//!  | spawn() in the right pid namespace --------> |
//!  | put it into its cgroup                       |
//!  | Job + streams -----------------------------> | mounts, user, capabilities, seccomp
//!  | <----------------- Ready (+ pty) | Refused   |
//!  | gate --------------------------------------> | execve
//!  | <---------------- end of stream | NotRun     |
//! ```
//!
//! The child is spawned by the agent itself into the new pid namespace, so its pid is known to the
//! agent at once and its exit status is the program's.
//!
//! Unsafe code is only in `sys`.

pub mod capabilities;
pub mod cgroup;
pub mod child;
mod control;
mod devices;
mod exec;
mod filter;
mod path;
mod process;
mod profile;
mod rootfs;
mod seccomp;
mod spawn;
mod spec;
pub mod sys;
pub mod usage;
pub mod user;
mod users;

pub use control::{Control, ControlError, Reply};
pub use path::open_beneath;
pub use spawn::{CHILD_NAME, PidNamespace, Spawned, spawn};
pub use spec::{
    CapabilitySpec, DeviceSpec, FileBind, IMAGE_VOLUME_FAILED, IdMap, InitSpec, Job, MountSource,
    MountSpec, ProcessSpec, RlimitSpec, RootfsSpec, SeccompAction, SeccompArg, SeccompOp,
    SeccompProfile, SeccompRule, SeccompSpec, UserMap, UserSpec,
};
