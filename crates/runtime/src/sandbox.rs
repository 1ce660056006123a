//! The life of a sandbox, as a pure state machine.
//!
//! ```text
//!              Booted           VmExited
//!  Starting ──────────▶ Ready ──────────▶ Failed
//!     │                   │                 │
//!     │ BootFailed        │ StopAsked       │ StopAsked
//!     │ StopAsked         ▼                 │
//!     └──────────────▶ Stopping ◀───────────┘
//!                         │ Released
//!                         ▼
//!                      Stopped        any state ── RemoveAsked ──▶ Removing
//!
//!            SuspendAsked            SuspendDone            ResumeAsked
//!      Ready ──────────▶ Suspending ──────────▶ Suspended ──────────▶ Resuming
//!        ▲ ▲   SuspendUndone │                      ▲    ResumeUndone   │  │
//!        │ └─────────────────┘                      └───────────────────┘  │ Resumed
//!        └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - `Starting`: the intent is stored; a VM, a lease and files may or may not exist. A node that
//!   restarts here undoes it.
//! - `Ready`: the agent answered. A node that restarts here adopts the VM, or finds it `Failed`.
//! - `Failed`: the VM has ended and nobody asked it to. Its lease is kept until it is stopped, so
//!   that an address is not given away while its owner still believes in it.
//! - `Stopping`: the VM and the lease are being released. A node that restarts here finishes it.
//! - `Suspending`: the VM stands still and is being written to the disk. A node that restarts here
//!   finishes it if all of it is there, else has the VM go on.
//! - `Suspended`: there is no VM; its memory is a file. Lease, disks and volumes stay as they are.
//! - `Resuming`: a VM is given that file. A node that restarts here finds the file, and then no such VM
//!   has run yet and it is undone, or finds it gone, and then adopts the VM.
//!   From the last three a stop or a removal leads where it leads from `Ready`, and so does the VM's end
//!   where there is one.
//! - `Stopped`: nothing runs; logs, scratch disk and statuses stay.
//! - `Removing`: everything goes, the record last. There is no way out but the end.
#![warn(clippy::wildcard_enum_match_arm)]

use serde::{Deserialize, Serialize};

use crate::api::SandboxState;

/// Where a sandbox stands; finer than what is shown of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Starting,
    Ready,
    Suspending,
    Suspended,
    Resuming,
    Failed,
    Stopping,
    Stopped,
    Removing,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The agent answered and took its configuration.
    Booted,
    /// The VM could not be brought up.
    BootFailed,
    /// The VM ended by itself.
    VmExited,
    /// Somebody wants it stopped.
    StopAsked,
    /// Somebody wants its memory freed.
    SuspendAsked,
    /// The VM goes on.
    SuspendUndone,
    /// The VM is a file.
    SuspendDone,
    /// Somebody wants it to go on.
    ResumeAsked,
    /// It is still a file.
    ResumeUndone,
    /// The VM goes on where it was.
    Resumed,
    /// VM and lease are gone.
    Released,
    /// Somebody wants it gone.
    RemoveAsked,
}

/// The event makes no sense in this phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused;

impl Phase {
    pub(crate) fn next(self, event: Event) -> Result<Self, Refused> {
        use Phase::{
            Failed, Ready, Removing, Resuming, Starting, Stopped, Stopping, Suspended, Suspending,
        };
        match (self, event) {
            (Starting, Event::Booted) => Ok(Ready),
            (Starting, Event::BootFailed | Event::StopAsked | Event::VmExited) => Ok(Stopping),
            (Ready | Suspending | Resuming, Event::VmExited) => Ok(Failed),
            (Ready | Failed | Suspending | Suspended | Resuming, Event::StopAsked) => Ok(Stopping),
            (Ready, Event::SuspendAsked) => Ok(Suspending),
            (Suspending, Event::SuspendUndone) | (Resuming, Event::Resumed) => Ok(Ready),
            (Suspending, Event::SuspendDone) | (Resuming, Event::ResumeUndone) => Ok(Suspended),
            (Suspended, Event::ResumeAsked) => Ok(Resuming),
            // Its VM was ended by us.
            (Suspended, Event::VmExited) => Ok(Suspended),
            // What is already so is no mistake.
            (Failed, Event::VmExited) => Ok(Failed),
            (Stopping, Event::StopAsked | Event::VmExited | Event::BootFailed) => Ok(Stopping),
            (Stopping, Event::Released) => Ok(Stopped),
            (Stopped, Event::StopAsked | Event::VmExited | Event::Released) => Ok(Stopped),
            (
                Starting | Ready | Suspending | Suspended | Resuming | Failed | Stopping | Stopped
                | Removing,
                Event::RemoveAsked,
            ) => Ok(Removing),
            (
                Removing,
                Event::VmExited | Event::StopAsked | Event::Released | Event::BootFailed,
            ) => Ok(Removing),
            (
                Starting | Ready | Suspending | Suspended | Resuming | Failed | Stopping | Stopped
                | Removing,
                Event::SuspendAsked
                | Event::SuspendUndone
                | Event::SuspendDone
                | Event::ResumeAsked
                | Event::ResumeUndone
                | Event::Resumed,
            )
            | (Starting, Event::Released)
            | (
                Ready | Suspending | Suspended | Resuming | Failed,
                Event::Booted | Event::BootFailed | Event::Released,
            )
            | (Stopping | Removing, Event::Booted)
            | (Stopped, Event::Booted | Event::BootFailed) => Err(Refused),
        }
    }

    /// What the world sees.
    pub(crate) fn state(self) -> SandboxState {
        match self {
            Self::Starting => SandboxState::Starting,
            // Who looks from outside finds a pod that is there and answers nothing.
            Self::Ready | Self::Suspending | Self::Suspended | Self::Resuming => {
                SandboxState::Ready
            }
            Self::Failed | Self::Stopping | Self::Stopped => SandboxState::NotReady,
            Self::Removing => SandboxState::Removing,
        }
    }

    /// Whether there is no VM, or none that goes on yet.
    pub(crate) fn is_suspended(self) -> bool {
        matches!(self, Self::Suspended | Self::Resuming)
    }

    /// Whether the sandbox may hold a lease that must survive a restart of the node.
    pub(crate) fn keeps_lease(self) -> bool {
        match self {
            Self::Ready | Self::Suspending | Self::Suspended | Self::Resuming | Self::Failed => {
                true
            }
            Self::Starting | Self::Stopping | Self::Stopped | Self::Removing => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENTS: [Event; 12] = [
        Event::Booted,
        Event::BootFailed,
        Event::VmExited,
        Event::StopAsked,
        Event::SuspendAsked,
        Event::SuspendUndone,
        Event::SuspendDone,
        Event::ResumeAsked,
        Event::ResumeUndone,
        Event::Resumed,
        Event::Released,
        Event::RemoveAsked,
    ];
    const PHASES: [Phase; 9] = [
        Phase::Starting,
        Phase::Ready,
        Phase::Suspending,
        Phase::Suspended,
        Phase::Resuming,
        Phase::Failed,
        Phase::Stopping,
        Phase::Stopped,
        Phase::Removing,
    ];

    #[test]
    fn removing_is_terminal() {
        for event in EVENTS {
            assert!(matches!(
                Phase::Removing.next(event),
                Ok(Phase::Removing) | Err(Refused)
            ));
        }
    }

    #[test]
    fn a_request_is_never_refused_and_repeating_it_changes_nothing() {
        for phase in PHASES {
            for event in [Event::StopAsked, Event::RemoveAsked, Event::VmExited] {
                let once = phase.next(event).unwrap();
                assert_eq!(once.next(event), Ok(once), "{phase:?} {event:?}");
            }
        }
    }

    proptest! {
        /// After a sandbox has left `Ready` for good it never comes back, whatever happens.
        #[test]
        fn ready_happens_once(picks in proptest::collection::vec(0usize..EVENTS.len(), 0..40)) {
            let mut phase = Phase::Starting;
            let (mut entered, mut released) = (0, false);
            for pick in picks {
                let Ok(next) = phase.next(EVENTS[pick]) else { continue };
                let began = phase == Phase::Starting || !phase.keeps_lease();
                entered += usize::from(next == Phase::Ready && began);
                released |= next == Phase::Stopped;
                // Only a released sandbox, or one that is removed whole, rests.
                prop_assert!(next != Phase::Stopped || phase == Phase::Stopping || phase == Phase::Stopped);
                prop_assert!(!(released && next.keeps_lease()));
                phase = next;
            }
            prop_assert!(entered <= 1);
        }
    }
}
