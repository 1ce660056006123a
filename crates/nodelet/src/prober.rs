//! Probes of one running container: a startup probe first, then readiness and liveness beside each
//! other, each with its own delay, period and thresholds, by the rules of a kubelet.
//!
//! A prober never acts: it notes what it found and rings the pod's bell.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use hypernetes_types::{ContainerId, NetworkId};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio_util::sync::CancellationToken;

use crate::{
    events::Level,
    handler::{Subject, Verdict},
    steps::Node,
    worker::{Bell, lock},
};

/// How often something that could not be found out is asked at once.
const ATTEMPTS: u32 = 3;

/// A kind of probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeKind {
    Startup,
    Readiness,
    Liveness,
}

impl ProbeKind {
    fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }

    /// As it is in the reason for a kill.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Readiness => "readiness",
            Self::Liveness => "liveness",
        }
    }

    pub(crate) fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
        }
    }
}

/// What probes have found of one running container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Health {
    /// The startup probe has succeeded, or there is none.
    pub(crate) started: bool,
    /// The readiness probe succeeds, or there is none.
    pub(crate) ready: bool,
    /// The probe that wants the container ended.
    pub(crate) failed: Option<ProbeKind>,
}

/// Health by container; shared by a pod's task and its probers.
pub(crate) type Board = Arc<Mutex<BTreeMap<ContainerId, Health>>>;

/// Whether there is anything to probe.
pub(crate) fn is_probed(container: &Container) -> bool {
    [
        ProbeKind::Startup,
        ProbeKind::Readiness,
        ProbeKind::Liveness,
    ]
    .iter()
    .any(|kind| kind.of(container).is_some())
}

/// Health of a container before its first probe.
pub(crate) fn at_first(container: &Container) -> Health {
    let started = container.startup_probe.is_none();
    Health {
        started,
        ready: started && container.readiness_probe.is_none(),
        failed: None,
    }
}

/// Counts equal results until they are as many as the probe wants.
#[derive(Debug, Default)]
struct Run {
    last: Option<bool>,
    length: i32,
}

impl Run {
    /// The result that holds from here on, if this one settles it.
    fn settle(&mut self, probe: &Probe, success: bool) -> Option<bool> {
        if self.last == Some(success) {
            self.length = self.length.saturating_add(1);
        } else {
            *self = Self {
                last: Some(success),
                length: 1,
            };
        }
        let wanted = if success {
            probe.success_threshold.unwrap_or(1)
        } else {
            probe.failure_threshold.unwrap_or(3)
        };
        (self.length >= wanted.max(1)).then_some(success)
    }
}

/// Looks after one running container until it is dropped.
pub(crate) struct Prober {
    pub(crate) node: Arc<Node>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Container,
    pub(crate) id: ContainerId,
    pub(crate) place: Option<(NetworkId, std::net::IpAddr)>,
    pub(crate) started_at: Timestamp,
    pub(crate) board: Board,
    pub(crate) bell: Arc<Bell>,
    /// The pod is being ended: only readiness is still asked.
    pub(crate) ending: CancellationToken,
}

impl Prober {
    pub(crate) async fn run(self) {
        if self.health().failed.is_some() {
            return;
        }
        if self.container.startup_probe.is_some() && !self.health().started {
            let settled = tokio::select! {
                settled = self.follow(ProbeKind::Startup, true) => settled,
                () = self.ending.cancelled() => return,
            };
            match settled {
                Some(true) => self.note(|health, container| {
                    health.started = true;
                    health.ready = container.readiness_probe.is_none();
                }),
                Some(false) => {
                    self.note(|health, _| health.failed = Some(ProbeKind::Startup));
                    return;
                }
                None => return,
            }
        }
        let liveness = async {
            let ended = tokio::select! {
                ended = self.follow(ProbeKind::Liveness, false) => ended,
                () = self.ending.cancelled() => None,
            };
            if ended == Some(false) {
                self.note(|health, _| health.failed = Some(ProbeKind::Liveness));
            }
        };
        tokio::join!(self.follow(ProbeKind::Readiness, false), liveness);
    }

    fn health(&self) -> Health {
        let board = lock(&self.board);
        board
            .get(&self.id)
            .copied()
            .unwrap_or_else(|| at_first(&self.container))
    }

    fn note(&self, change: impl FnOnce(&mut Health, &Container)) {
        let mut board = lock(&self.board);
        let health = board
            .entry(self.id.clone())
            .or_insert_with(|| at_first(&self.container));
        let before = *health;
        change(health, &self.container);
        let changed = *health != before;
        drop(board);
        if changed {
            self.bell.ring();
        }
    }

    /// Asks again and again. Returns what was settled: of a startup probe the first result, of a
    /// liveness probe the failure; a readiness probe only notes. `None`: there is no such probe.
    async fn follow(&self, kind: ProbeKind, first: bool) -> Option<bool> {
        let probe = kind.of(&self.container)?;
        let seconds = |value: Option<i32>, least: i32| {
            Duration::from_secs(u64::try_from(value.unwrap_or(0).max(least)).unwrap_or(0))
        };
        let delay = seconds(probe.initial_delay_seconds, 0);
        let due = SignedDuration::try_from(delay)
            .ok()
            .and_then(|delay| self.started_at.checked_add(delay).ok())
            .unwrap_or(self.started_at);
        let wait = due.duration_since(Timestamp::now());
        tokio::time::sleep(Duration::try_from(wait).unwrap_or(Duration::ZERO)).await;
        let period = match probe.period_seconds {
            None | Some(0) => Duration::from_secs(10),
            period => seconds(period, 1),
        };
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut run = Run::default();
        loop {
            ticks.tick().await;
            let Some(success) = self.ask(kind, probe).await else {
                continue;
            };
            let Some(settled) = run.settle(probe, success) else {
                continue;
            };
            match kind {
                ProbeKind::Readiness => self.note(|health, _| health.ready = settled),
                ProbeKind::Startup if first => return Some(settled),
                ProbeKind::Startup | ProbeKind::Liveness if !settled => return Some(false),
                ProbeKind::Startup | ProbeKind::Liveness => {}
            }
        }
    }

    /// One probe, with what is to be said about it. `None`: it could not be found out.
    async fn ask(&self, kind: ProbeKind, probe: &Probe) -> Option<bool> {
        let subject = Subject {
            node: &self.node,
            container: &self.container,
            id: &self.id,
            place: self.place.clone(),
        };
        let mut verdict = subject.probe(probe).await;
        for _again in 1..ATTEMPTS {
            if !matches!(verdict, Verdict::Error(_)) {
                break;
            }
            verdict = subject.probe(probe).await;
        }
        let title = kind.title();
        let (success, said) = match verdict {
            Verdict::Success => (Some(true), None),
            Verdict::Warning(text) => (
                Some(true),
                Some(("ProbeWarning", format!("{title} probe warning: {text}"))),
            ),
            Verdict::Failure(text) => (
                Some(false),
                Some(("Unhealthy", format!("{title} probe failed: {text}"))),
            ),
            Verdict::Error(text) => (
                None,
                Some((
                    "Unhealthy",
                    format!("{title} probe errored and resulted in unknown state: {text}"),
                )),
            ),
        };
        if let Some((reason, message)) = said {
            self.node.events.pod(
                &self.pod,
                Some(&self.container.name),
                Level::Warning,
                reason,
                message,
            );
        }
        success
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn results_hold_when_there_are_enough_of_them() {
        let probe: Probe =
            serde_json::from_value(json!({"successThreshold": 2, "failureThreshold": 3})).unwrap();
        let mut run = Run::default();
        let results = [true, true, false, false, true, false, false, false, false];
        let settled: Vec<_> = results.iter().map(|ok| run.settle(&probe, *ok)).collect();
        assert_eq!(
            settled,
            [
                None,
                Some(true),
                None,
                None,
                None,
                None,
                None,
                Some(false),
                Some(false)
            ]
        );
    }

    #[test]
    fn a_container_is_what_its_probes_have_not_denied() {
        let of = |probes: serde_json::Value| {
            let container: Container = serde_json::from_value(probes).unwrap();
            at_first(&container)
        };
        let all = of(json!({"name": "c"}));
        assert!(all.started && all.ready);
        let ready = of(json!({"name": "c", "readinessProbe": {}}));
        assert!(ready.started && !ready.ready);
        let startup = of(json!({"name": "c", "startupProbe": {}}));
        assert!(!startup.started && !startup.ready);
    }
}
