//! Kubernetes Events about pods: what a user must see, said once and counted afterwards.

use std::collections::{BTreeMap, HashMap};

use hypernetes_telemetry::chain;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::status::seconds;

/// Events that wait to be written; more are dropped, which is what upstream does too.
const QUEUE: usize = 1024;
/// Repeated events that are remembered.
const REMEMBERED: usize = 4096;
/// Bytes of a message; the API takes 1024.
const MESSAGE_LIMIT: usize = 1024;

/// Whether an event tells of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Normal,
    Warning,
}

#[derive(Debug)]
struct Note {
    object: ObjectReference,
    level: Level,
    reason: &'static str,
    message: String,
    at: Timestamp,
    component: &'static str,
}

/// Takes events and writes them in the background.
#[derive(Debug, Clone)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Note>,
}

impl Recorder {
    /// A recorder and the task that writes for it.
    pub(crate) fn new(
        client: Client,
        host: String,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, notes) = mpsc::channel(QUEUE);
        (Self { queue }, write_all(client, host, notes, stop))
    }

    /// Says something about a pod, or about one of its containers.
    pub(crate) fn pod(
        &self,
        pod: &Pod,
        container: Option<&str>,
        level: Level,
        reason: &'static str,
        message: String,
    ) {
        let list = |name: &str| {
            let init = pod
                .spec
                .iter()
                .flat_map(|spec| spec.init_containers.iter().flatten());
            let ephemeral = pod
                .spec
                .iter()
                .flat_map(|spec| spec.ephemeral_containers.iter().flatten());
            if init.into_iter().any(|c| c.name == name) {
                "initContainers"
            } else if ephemeral.into_iter().any(|c| c.name == name) {
                "ephemeralContainers"
            } else {
                "containers"
            }
        };
        let field_path = container.map(|name| format!("spec.{}{{{name}}}", list(name)));
        self.note(pod, field_path, level, reason, message, "kubelet");
    }

    /// Says something about where a pod goes.
    pub(crate) fn scheduler(&self, pod: &Pod, level: Level, reason: &'static str, message: String) {
        self.note(pod, None, level, reason, message, "default-scheduler");
    }

    fn note(
        &self,
        pod: &Pod,
        field_path: Option<String>,
        level: Level,
        reason: &'static str,
        message: String,
        component: &'static str,
    ) {
        let object = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            resource_version: pod.metadata.resource_version.clone(),
            field_path,
        };
        let mut message = message;
        if message.len() > MESSAGE_LIMIT {
            let end = (0..=MESSAGE_LIMIT)
                .rev()
                .find(|at| message.is_char_boundary(*at));
            message.truncate(end.unwrap_or(0));
        }
        let note = Note {
            object,
            level,
            reason,
            message,
            at: Timestamp::now(),
            component,
        };
        if self.queue.try_send(note).is_err() {
            tracing::debug!(reason, "an event was dropped: too many wait to be written");
        }
    }
}

/// Event name and count, by what it says about what.
type Seen = HashMap<(String, String, &'static str, String), (String, i32)>;

async fn write_all(
    client: Client,
    host: String,
    mut notes: mpsc::Receiver<Note>,
    stop: CancellationToken,
) {
    let mut seen = Seen::new();
    loop {
        let note = tokio::select! {
            note = notes.recv() => note,
            () = stop.cancelled() => None,
        };
        let Some(note) = note else { return };
        if seen.len() >= REMEMBERED {
            seen.clear();
        }
        if let Err(error) = write(&client, &host, note, &mut seen).await {
            tracing::debug!(error = %chain(&error), "cannot write an event");
        }
    }
}

async fn write(
    client: &Client,
    host: &str,
    note: Note,
    seen: &mut Seen,
) -> Result<(), kube::Error> {
    let namespace = note
        .object
        .namespace
        .clone()
        .unwrap_or_else(|| "default".to_owned());
    let api = Api::<Event>::namespaced(client.clone(), &namespace);
    let key = (
        note.object.uid.clone().unwrap_or_default(),
        note.object.field_path.clone().unwrap_or_default(),
        note.reason,
        note.message.clone(),
    );
    if let Some((name, count)) = seen.get_mut(&key) {
        *count += 1;
        let patch = json!({"count": *count, "lastTimestamp": seconds(note.at)});
        match api
            .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            // It has outlived its hour in the API: say it anew.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            result => return result.map(|_event| ()),
        }
    }
    let owner = note.object.name.clone().unwrap_or_default();
    let name = format!("{owner}.{:x}", note.at.as_nanosecond());
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(namespace),
            labels: None::<BTreeMap<String, String>>,
            ..ObjectMeta::default()
        },
        involved_object: note.object,
        reason: Some(note.reason.to_owned()),
        message: Some(note.message),
        type_: Some(
            if note.level == Level::Normal {
                "Normal"
            } else {
                "Warning"
            }
            .to_owned(),
        ),
        count: Some(1),
        first_timestamp: Some(seconds(note.at)),
        last_timestamp: Some(seconds(note.at)),
        source: Some(EventSource {
            component: Some(note.component.to_owned()),
            host: Some(host.to_owned()),
        }),
        reporting_component: Some(note.component.to_owned()),
        reporting_instance: Some(host.to_owned()),
        ..Event::default()
    };
    api.create(&PostParams::default(), &event).await?;
    seen.insert(key, (name, 1));
    Ok(())
}
