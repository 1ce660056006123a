//! The life of a container, as a pure state machine.
//!
//! ```text
//!            Prepared          StartAsked           Started
//!  Creating ──────────▶ Created ─────────▶ Starting ───────▶ Running
//!     │                    │                  │                 │
//!     │                    └──────────────────┴──── Ended ──────┤
//!     │ RemoveAsked                                             ▼
//!     └────────────────▶ Removing ◀──────── RemoveAsked ───── Exited
//! ```
//!
//! - `Creating`: the intent and the disk slots are stored; the guest may or may not know it. It is
//!   not shown; whoever finds it without a creator undoes it.
//! - `Created`: prepared in the guest.
//! - `Starting`: the guest was told to run it, its answer is not stored. Shown as created; what the
//!   guest says next decides.
//! - `Running`, `Exited`: as they say. `Exited` is final: no later word of the guest revives it.
//! - `Removing`: the guest forgets it, disks are unplugged, the log goes, the record last.
#![warn(clippy::wildcard_enum_match_arm)]

use serde::{Deserialize, Serialize};

use crate::api::ContainerState;

/// Where a container stands; finer than what is shown of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Creating,
    Created,
    Starting,
    Running,
    Exited,
    Removing,
}

/// What happens to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The guest has prepared it.
    Prepared,
    /// Somebody wants it to run.
    StartAsked,
    /// The guest says that it runs.
    Started,
    /// It ended, or its VM did.
    Ended,
    /// Somebody wants it gone.
    RemoveAsked,
}

/// The event makes no sense in this phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused;

impl Phase {
    pub(crate) fn next(self, event: Event) -> Result<Self, Refused> {
        use Phase::{Created, Creating, Exited, Removing, Running, Starting};
        match (self, event) {
            (Creating, Event::Prepared) => Ok(Created),
            (Created | Starting, Event::StartAsked) => Ok(Starting),
            (Running, Event::StartAsked) => Ok(Running),
            (Starting | Running, Event::Started) => Ok(Running),
            (Created | Starting | Running | Exited, Event::Ended) => Ok(Exited),
            (Creating | Created | Starting | Running | Exited | Removing, Event::RemoveAsked) => {
                Ok(Removing)
            }
            (Creating, Event::StartAsked | Event::Started | Event::Ended)
            // A guest that says "running" of what nobody started is not believed.
            | (Created, Event::Prepared | Event::Started)
            | (Starting | Running, Event::Prepared)
            | (Exited, Event::Prepared | Event::StartAsked | Event::Started)
            | (Removing, Event::Prepared | Event::StartAsked | Event::Started | Event::Ended) => {
                Err(Refused)
            }
        }
    }

    /// What the world sees; `None` = nothing yet, or no more.
    pub(crate) fn state(self) -> Option<ContainerState> {
        match self {
            Self::Creating => None,
            Self::Created | Self::Starting => Some(ContainerState::Created),
            Self::Running => Some(ContainerState::Running),
            Self::Exited | Self::Removing => Some(ContainerState::Exited),
        }
    }

    /// Whether the guest may hold a process or a mount of it.
    pub(crate) fn is_live(self) -> bool {
        match self {
            Self::Created | Self::Starting | Self::Running => true,
            Self::Creating | Self::Exited | Self::Removing => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENTS: [Event; 5] = [
        Event::Prepared,
        Event::StartAsked,
        Event::Started,
        Event::Ended,
        Event::RemoveAsked,
    ];

    fn rank(phase: Phase) -> u8 {
        phase as u8
    }

    proptest! {
        #[test]
        fn life_goes_one_way(picks in proptest::collection::vec(0usize..EVENTS.len(), 0..40)) {
            let mut phase = Phase::Creating;
            let mut asked = false;
            for pick in picks {
                let event = EVENTS[pick];
                let Ok(next) = phase.next(event) else { continue };
                asked |= event == Event::StartAsked;
                prop_assert!(rank(next) >= rank(phase));
                // Nothing runs that nobody started.
                prop_assert!(next != Phase::Running || asked);
                prop_assert!(phase != Phase::Exited || matches!(next, Phase::Exited | Phase::Removing));
                phase = next;
            }
        }
    }

    #[test]
    fn asking_twice_is_asking_once() {
        for phase in [Phase::Created, Phase::Starting, Phase::Running] {
            let once = phase.next(Event::StartAsked).unwrap();
            assert_eq!(once.next(Event::StartAsked), Ok(once));
        }
    }
}
