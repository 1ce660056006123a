//! `events`: what the cluster says of pods, in docker's words where it has some.

use futures::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::{
    api::ListParams,
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::{Value, json};

use crate::{
    cli::Events,
    cluster::Cluster,
    error::Result,
    format::{Filters, render},
    model::{self, Container},
    terminal, units,
};

/// An event of a pod.
#[derive(Debug, Clone)]
pub(crate) struct PodEvent {
    pub(crate) time: Timestamp,
    pub(crate) reason: String,
    pub(crate) message: String,
}

fn time_of(event: &Event) -> Timestamp {
    event
        .event_time
        .as_ref()
        .map(|time| time.0)
        .or_else(|| event.last_timestamp.as_ref().map(|time| time.0))
        .or_else(|| {
            event
                .metadata
                .creation_timestamp
                .as_ref()
                .map(|time| time.0)
        })
        .unwrap_or_default()
}

/// Events of a container's present pod, oldest first.
pub(crate) async fn of_pod(cluster: &Cluster, container: &Container) -> Result<Vec<PodEvent>> {
    let uid = container.pod.metadata.uid.as_deref().unwrap_or_default();
    let mine = ListParams::default().fields(&format!("involvedObject.uid={uid}"));
    let list = cluster.api::<Event>().list(&mine).await?;
    let mut events: Vec<PodEvent> = list
        .items
        .iter()
        .map(|event| PodEvent {
            time: time_of(event),
            reason: event.reason.clone().unwrap_or_default(),
            message: event.message.clone().unwrap_or_default(),
        })
        .collect();
    events.sort_by_key(|event| event.time);
    Ok(events)
}

/// docker's word for a reason.
fn action(reason: &str) -> String {
    match reason {
        "Scheduled" => "create",
        "Pulled" => "pull",
        "Started" => "start",
        "Killing" => "kill",
        "BackOff" => "restart",
        "OOMKilling" => "oom",
        "Unhealthy" => "health_status: unhealthy",
        other => return other.to_ascii_lowercase(),
    }
    .to_owned()
}

fn object(event: &Event, containers: &[Container]) -> Value {
    let uid = event.involved_object.uid.as_deref().unwrap_or_default();
    let container = containers.iter().find(|container| {
        container
            .pods()
            .any(|pod| pod.metadata.uid.as_deref() == Some(uid))
    });
    let name = container.map_or_else(
        || event.involved_object.name.clone().unwrap_or_default(),
        |container| container.name.clone(),
    );
    let id = container.map_or_else(|| uid.replace('-', ""), |container| container.id.clone());
    let image = container.map(Container::image).unwrap_or_default();
    let time = time_of(event);
    json!({
        "Type": "container",
        "Action": action(event.reason.as_deref().unwrap_or_default()),
        "Actor": {"ID": id, "Attributes": {"name": name, "image": image, "message": event.message}},
        "status": action(event.reason.as_deref().unwrap_or_default()),
        "id": id,
        "from": image,
        "scope": "local",
        "time": time.as_second(),
        "timeNano": i64::try_from(time.as_nanosecond()).unwrap_or_default(),
        "Reason": event.reason,
    })
}

fn line(object: &Value, time: Timestamp) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let attributes = &object["Actor"]["Attributes"];
    format!(
        "{} container {} {} (image={}, name={}, message={})",
        time.strftime("%Y-%m-%dT%H:%M:%S%.9fZ"),
        text(&object["Action"]),
        text(&object["id"]),
        text(&attributes["image"]),
        text(&attributes["name"]),
        text(&attributes["message"]),
    )
}

struct Wanted<'a> {
    filters: Filters,
    format: Option<&'a str>,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
}

impl Wanted<'_> {
    fn print(&self, event: &Event, containers: &[Container]) -> Result<()> {
        if event.involved_object.kind.as_deref() != Some("Pod") {
            return Ok(());
        }
        let time = time_of(event);
        if self.since.is_some_and(|since| time < since)
            || self.until.is_some_and(|until| time > until)
        {
            return Ok(());
        }
        let object = object(event, containers);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (id, name, image, what) = (
            text(&object["id"]),
            text(&object["Actor"]["Attributes"]["name"]),
            text(&object["from"]),
            text(&object["Action"]),
        );
        let kept = self.filters.any("container", |wanted| {
            wanted == name || id.starts_with(wanted)
        }) && self.filters.any("event", |wanted| wanted == what)
            && self.filters.any("image", |wanted| wanted == image)
            && self.filters.any("type", |wanted| wanted == "container");
        if kept {
            terminal::line(&match self.format {
                Some(format) => render(format, &object)?,
                None => line(&object, time),
            });
        }
        Ok(())
    }
}

/// `events`.
pub(crate) async fn run(cluster: &Cluster, options: &Events) -> Result<()> {
    let begun = Timestamp::now();
    let time = |text: &Option<String>| {
        text.as_deref()
            .map(|text| units::parse_time(text, begun))
            .transpose()
    };
    let wanted = Wanted {
        filters: Filters::parse(&options.filter, &["container", "event", "image", "type"])?,
        format: options.format.as_deref(),
        since: time(&options.since)?.or(Some(begun)),
        until: time(&options.until)?,
    };
    if wanted.until.is_some_and(|until| until <= begun) {
        let containers = cluster.containers().await?;
        let mut events = cluster
            .api::<Event>()
            .list(&ListParams::default())
            .await?
            .items;
        events.sort_by_key(time_of);
        for event in &events {
            wanted.print(event, &containers)?;
        }
        return Ok(());
    }
    let mut changes = watcher(cluster.api::<Event>(), watcher::Config::default())
        .default_backoff()
        .applied_objects()
        .boxed();
    loop {
        let left = wanted
            .until
            .map(|until| until.as_millisecond() - Timestamp::now().as_millisecond());
        let end = async {
            match left {
                Some(millis) => {
                    tokio::time::sleep(std::time::Duration::from_millis(
                        u64::try_from(millis).unwrap_or(0),
                    ))
                    .await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = changes.try_next() => match event {
                Ok(Some(event)) => {
                    let pods = cluster.pods().list(&ListParams::default()).await?;
                    wanted.print(&event, &model::containers(pods.items))?;
                }
                Ok(None) => return Ok(()),
                Err(_) => {}
            },
            () = end => return Ok(()),
        }
    }
}
