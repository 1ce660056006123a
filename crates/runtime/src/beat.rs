//! Whether a guest still answers, and whether its clock goes right.
//!
//! The guest's clock is set when it becomes a pod. It goes on by itself from then on, by a counter whose
//! rate the guest's kernel has measured, and not at all while its VM is paused.

use std::time::Duration;

use hypernetes_agent_api::{AgentClient, AgentError, FEATURE_CLOCK, v1};

use crate::logs::format::now_nanos;

/// What a clock may be off, in nanoseconds, beyond what the measurement may be.
const TOLERANCE: i64 = 5_000_000;
/// A change larger than this is told in the log.
const WORTH_TELLING: i64 = 1_000_000_000;

/// Asks the guest for its clock and puts it right. An error says that the guest does not answer.
pub(crate) async fn beat(client: &AgentClient, call: Duration) -> Result<(), AgentError> {
    if !client.has(FEATURE_CLOCK) {
        // A guest of an earlier release: what it can be asked is what its containers do.
        let list = v1::ListContainersRequest {};
        return client.list_containers(list, call).await.map(drop);
    }
    let sent = now_nanos();
    let ask = |adjust_nanos| client.clock(v1::ClockRequest { adjust_nanos }, call);
    let theirs = ask(0).await?.unix_nanos;
    let Some(change) = correction(sent, now_nanos(), theirs) else {
        return Ok(());
    };
    if change.saturating_abs() > WORTH_TELLING {
        tracing::info!(
            change_ms = change / 1_000_000,
            "the guest's clock is put right"
        );
    }
    match ask(change).await {
        // It answers. What it does with its clock is its own affair.
        Err(error @ AgentError::Call { .. }) if !error.is_transient() => {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::debug!(error, "the guest does not change its clock");
            Ok(())
        }
        answer => answer.map(drop),
    }
}

/// What a clock must gain to be right, if it is wrong for sure: it was read at some moment between
/// two of ours.
fn correction(sent: i64, received: i64, theirs: i64) -> Option<i64> {
    let doubt = received.saturating_sub(sent).max(0) / 2;
    let change = sent.saturating_add(doubt).saturating_sub(theirs);
    let wrong = change.saturating_abs() > doubt.saturating_add(TOLERANCE);
    wrong.then_some(change)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    #[test]
    fn a_clock_is_changed_only_if_it_is_wrong_for_sure() {
        // Asked at 100 ms, answered at 120 ms.
        let of = |theirs: i64| correction(100 * MS, 120 * MS, theirs * MS);
        assert_eq!(of(110), None);
        assert_eq!(of(96), None);
        assert_eq!(of(124), None);
        assert_eq!(of(90), Some(20 * MS));
        assert_eq!(of(5110), Some(-5000 * MS));
        // Our own clock was set back meanwhile.
        assert_eq!(correction(100 * MS, 0, 100 * MS), None);
        assert!(correction(0, i64::MAX, i64::MIN).is_some());
    }
}
