//! A container as docker's users see it: a view of one pod.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod, PodCondition};
use serde::{Deserialize, Serialize};

use crate::{meta, units};

/// A published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PublishedPort {
    /// Port on the host's or the service's address; `0`: any.
    pub(crate) host: u16,
    /// Port in the container.
    pub(crate) container: u16,
    /// `tcp` or `udp`.
    pub(crate) protocol: String,
    /// Address to listen on; empty: all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) address: String,
}

/// Where a container stands, in docker's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    Running,
    Paused,
    Suspended,
    Restarting,
    Removing,
    Exited,
    Dead,
}

impl State {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Restarting => "restarting",
            Self::Removing => "removing",
            Self::Exited => "exited",
            Self::Dead => "dead",
        }
    }

    /// Nothing of it runs or will run by itself.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Exited | Self::Dead)
    }

    /// It has processes, which may stand still, or be on the disk.
    pub(crate) fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Suspended)
    }
}

/// What is said of a pod by a condition.
pub(crate) fn condition<'a>(pod: &'a Pod, name: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|one| one.type_ == name)
}

fn holds(pod: &Pod, name: &str) -> bool {
    condition(pod, name).is_some_and(|condition| condition.status == "True")
}

/// One container.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) name: String,
    /// The container of the pod; pods of other tools can have several.
    pub(crate) index: usize,
    pub(crate) pod: Pod,
    /// Pods of earlier runs, oldest first: their logs are the container's.
    pub(crate) earlier: Vec<Pod>,
}

/// Containers of the pods of a namespace, newest first.
pub(crate) fn containers(pods: Vec<Pod>) -> Vec<Container> {
    let mut by_id: BTreeMap<String, Vec<Pod>> = BTreeMap::new();
    let mut found = Vec::new();
    for pod in pods {
        if let Some(id) = annotation(&pod, meta::ID) {
            by_id.entry(id.to_owned()).or_default().push(pod);
            continue;
        }
        let uid: String = pod
            .metadata
            .uid
            .clone()
            .unwrap_or_default()
            .replace('-', "");
        let names = container_names(&pod);
        let pod_name = pod.metadata.name.clone().unwrap_or_default();
        for (index, container) in names.iter().enumerate() {
            let (id, name) = if names.len() == 1 {
                (uid.clone(), pod_name.clone())
            } else {
                (
                    digest(&format!("{uid}/{container}")),
                    format!("{pod_name}/{container}"),
                )
            };
            found.push(Container {
                id,
                name,
                index,
                pod: pod.clone(),
                earlier: Vec::new(),
            });
        }
    }
    for (id, mut pods) in by_id {
        pods.sort_by_key(run_number);
        let Some(pod) = pods.pop() else { continue };
        let name = pod
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(meta::NAME))
            .or(pod.metadata.name.as_ref())
            .cloned()
            .unwrap_or_default();
        found.push(Container {
            id,
            name,
            index: 0,
            pod,
            earlier: pods,
        });
    }
    found.sort_by(|a, b| {
        b.created()
            .cmp(&a.created())
            .then_with(|| a.name.cmp(&b.name))
    });
    found
}

/// A text as it was given: Kubernetes' `$$` is `$`.
pub(crate) fn unescaped(text: &str) -> String {
    if text.contains("$$") {
        text.replace("$$", "$")
    } else {
        text.to_owned()
    }
}

fn container_names(pod: &Pod) -> Vec<String> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers.map(|container| container.name.clone()).collect()
}

fn digest(text: &str) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(text.as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata
        .annotations
        .as_ref()?
        .get(key)
        .map(String::as_str)
}

pub(crate) fn label<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

/// Which run of its container the pod is.
pub(crate) fn run_number(pod: &Pod) -> u32 {
    annotation(pod, meta::RUN)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

impl Container {
    /// First twelve digits of the id.
    pub(crate) fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }

    pub(crate) fn pod_name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    /// The container as the pod's spec has it.
    pub(crate) fn spec(&self) -> k8s_openapi::api::core::v1::Container {
        self.pod
            .spec
            .as_ref()
            .and_then(|spec| spec.containers.get(self.index).cloned())
            .unwrap_or_default()
    }

    pub(crate) fn status(&self) -> Option<&ContainerStatus> {
        let name = &self.pod.spec.as_ref()?.containers.get(self.index)?.name;
        let list = self.pod.status.as_ref()?.container_statuses.as_ref()?;
        list.iter().find(|status| status.name == *name)
    }

    /// How the container ended last, if it does not run.
    pub(crate) fn ended(&self) -> Option<&ContainerStateTerminated> {
        let status = self.status()?;
        let now = status
            .state
            .as_ref()
            .and_then(|state| state.terminated.as_ref());
        now.or_else(|| {
            status
                .last_state
                .as_ref()
                .and_then(|state| state.terminated.as_ref())
        })
    }

    pub(crate) fn phase(&self) -> &str {
        self.pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref())
            .unwrap_or("Pending")
    }

    /// Why it does not run yet: reason and message.
    pub(crate) fn waiting(&self) -> Option<(String, String)> {
        let waiting = self.status()?.state.as_ref()?.waiting.as_ref()?;
        Some((
            waiting.reason.clone().unwrap_or_default(),
            waiting.message.clone().unwrap_or_default(),
        ))
    }

    pub(crate) fn is_gated(&self) -> bool {
        self.pod
            .spec
            .as_ref()
            .and_then(|spec| spec.scheduling_gates.as_ref())
            .is_some_and(|gates| !gates.is_empty())
    }

    /// What it is if it has processes that do not go on.
    fn still(&self) -> Option<State> {
        let ways = [
            (meta::SUSPENDED_CONDITION, State::Suspended),
            (meta::PAUSED_CONDITION, State::Paused),
        ];
        let mut ways = ways.into_iter();
        ways.find(|(condition, _)| holds(&self.pod, condition))
            .map(|(_, state)| state)
    }

    pub(crate) fn state(&self) -> State {
        if self.pod.metadata.deletion_timestamp.is_some() {
            return State::Removing;
        }
        let over = matches!(self.phase(), "Failed" | "Succeeded");
        let state = self.status().and_then(|status| status.state.as_ref());
        if state.is_some_and(|state| state.running.is_some()) {
            return self.still().unwrap_or(State::Running);
        }
        let now = state.and_then(|state| state.terminated.as_ref());
        if over {
            return match self.ended() {
                Some(_) => State::Exited,
                None => State::Dead,
            };
        }
        match (now, self.ended()) {
            (Some(_), _) if self.kube_restart_policy() == "Never" => State::Exited,
            (Some(_), _) | (None, Some(_)) => State::Restarting,
            (None, None) => State::Created,
        }
    }

    pub(crate) fn exit_code(&self) -> i32 {
        match self.state() {
            State::Running | State::Paused | State::Suspended | State::Created => 0,
            _ => self.ended().map_or(0, |end| end.exit_code),
        }
    }

    pub(crate) fn kube_restart_policy(&self) -> &str {
        self.pod
            .spec
            .as_ref()
            .and_then(|spec| spec.restart_policy.as_deref())
            .unwrap_or("Always")
    }

    /// When the container was created, whatever pods it has had since.
    pub(crate) fn created(&self) -> Timestamp {
        annotation(&self.pod, meta::CREATED)
            .and_then(|text| text.parse().ok())
            .or_else(|| {
                self.pod
                    .metadata
                    .creation_timestamp
                    .as_ref()
                    .map(|time| time.0)
            })
            .unwrap_or_default()
    }

    pub(crate) fn started(&self) -> Option<Timestamp> {
        let state = self.status()?.state.as_ref()?;
        let running = state
            .running
            .as_ref()
            .and_then(|state| state.started_at.as_ref());
        let time = running.or_else(|| self.ended().and_then(|end| end.started_at.as_ref()))?;
        Some(time.0)
    }

    pub(crate) fn finished(&self) -> Option<Timestamp> {
        self.ended()?.finished_at.as_ref().map(|time| time.0)
    }

    /// Whether a check of its health is asked for, and what it says.
    pub(crate) fn health(&self) -> Option<&'static str> {
        self.health_at(Timestamp::now())
    }

    /// Kubernetes says of a readiness probe only whether it holds. As many checks as may fail in a row
    /// have failed when their time is over.
    fn health_at(&self, now: Timestamp) -> Option<&'static str> {
        let probe = self.spec().readiness_probe?;
        let status = self.status()?;
        if status.ready {
            return Some("healthy");
        }
        let Some(started) = self.started() else {
            return Some("starting");
        };
        let seconds = |field: Option<i32>, default: i32| i64::from(field.unwrap_or(default));
        let limit = seconds(probe.initial_delay_seconds, 0)
            + seconds(probe.period_seconds, 10) * seconds(probe.failure_threshold, 3);
        Some(if now.as_second() - started.as_second() > limit {
            "unhealthy"
        } else {
            "starting"
        })
    }

    /// The column STATUS.
    pub(crate) fn status_text(&self, now: Timestamp) -> String {
        let ago = |time: Option<Timestamp>| {
            time.map_or_else(
                || "Less than a second ago".to_owned(),
                |time| units::human_ago(time, now),
            )
        };
        match self.state() {
            state @ (State::Running | State::Paused | State::Suspended) => {
                let started = self.started().unwrap_or(now);
                let up = units::human_duration(now.as_second() - started.as_second());
                match self.health_at(now) {
                    _ if state == State::Paused => format!("Up {up} (Paused)"),
                    _ if state == State::Suspended => format!("Up {up} (Suspended)"),
                    // Docker has no such state, and nobody but the node's disk can end it: it runs, and says so.
                    _ if holds(&self.pod, meta::STALLED_CONDITION) => format!("Up {up} (Stalled)"),
                    Some("starting") => format!("Up {up} (health: starting)"),
                    Some(health) => format!("Up {up} ({health})"),
                    None => format!("Up {up}"),
                }
            }
            State::Exited => format!("Exited ({}) {}", self.exit_code(), ago(self.finished())),
            State::Restarting => {
                format!("Restarting ({}) {}", self.exit_code(), ago(self.finished()))
            }
            State::Removing => "Removal In Progress".to_owned(),
            State::Dead => "Dead".to_owned(),
            State::Created => match self.waiting() {
                Some((reason, _))
                    if !matches!(
                        reason.as_str(),
                        "ContainerCreating" | "PodInitializing" | ""
                    ) =>
                {
                    format!("Created ({reason})")
                }
                _ => "Created".to_owned(),
            },
        }
    }

    pub(crate) fn image(&self) -> String {
        self.spec().image.unwrap_or_default()
    }

    /// Entry point and arguments as they are known: the image's own are not.
    pub(crate) fn command(&self) -> Vec<String> {
        let spec = self.spec();
        let mut command = spec.command.unwrap_or_default();
        command.extend(spec.args.unwrap_or_default());
        for word in &mut command {
            *word = unescaped(word);
        }
        command
    }

    pub(crate) fn ports(&self) -> Vec<PublishedPort> {
        annotation(&self.pod, meta::PORTS)
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default()
    }

    /// The column PORTS.
    pub(crate) fn ports_text(&self) -> String {
        let published = self.ports();
        let mut texts: Vec<String> = published
            .iter()
            .map(|port| {
                let address = if port.address.is_empty() {
                    "0.0.0.0"
                } else {
                    &port.address
                };
                format!(
                    "{address}:{}->{}/{}",
                    port.host, port.container, port.protocol
                )
            })
            .collect();
        for port in self.spec().ports.into_iter().flatten() {
            let number = u16::try_from(port.container_port).unwrap_or_default();
            let protocol = port
                .protocol
                .as_deref()
                .unwrap_or("TCP")
                .to_ascii_lowercase();
            if !published
                .iter()
                .any(|p| p.container == number && p.protocol == protocol)
            {
                texts.push(format!("{number}/{protocol}"));
            }
        }
        texts.join(", ")
    }

    /// docker's labels: those that `--label` gave, and the pod's own.
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        let mut labels: BTreeMap<String, String> = annotation(&self.pod, meta::LABELS)
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        for (key, value) in self.pod.metadata.labels.iter().flatten() {
            match key.as_str() {
                meta::PROJECT => {
                    labels.insert("com.docker.compose.project".to_owned(), value.clone())
                }
                meta::SERVICE => {
                    labels.insert("com.docker.compose.service".to_owned(), value.clone())
                }
                // What hyper keeps for itself is not what somebody labelled.
                key if key.starts_with(meta::PREFIX) => None,
                key => labels.insert(key.to_owned(), value.clone()),
            };
        }
        labels
    }

    /// `no`, `on-failure:3`, `always`, `unless-stopped`.
    pub(crate) fn restart_policy(&self) -> &str {
        annotation(&self.pod, meta::RESTART).unwrap_or_else(|| match self.kube_restart_policy() {
            "Never" => "no",
            "OnFailure" => "on-failure",
            _ => "always",
        })
    }

    pub(crate) fn auto_remove(&self) -> bool {
        annotation(&self.pod, meta::AUTO_REMOVE).is_some()
    }

    pub(crate) fn network(&self) -> &str {
        annotation(&self.pod, meta::NETWORK).unwrap_or("default")
    }

    /// All pods of the container, the present one last.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.earlier.iter().chain(std::iter::once(&self.pod))
    }
}

#[cfg(test)]
#[path = "model/tests.rs"]
pub(crate) mod tests;
