//! EndpointSlices of Services, from their pods, and Endpoints for who does not know slices; for services that
//! select no pods, EndpointSlices from the Endpoints that somebody has written.
//!
//! Watches services, pods and slices, and brings the slices of each service that something has
//! happened to up to date, one after the other. What the slices shall be is planned in
//! [`plan`]; a service that is gone has none.

mod mirrored;
mod plan;

use std::{collections::BTreeSet, time::Duration};

use futures::{StreamExt, stream::BoxStream};
use hypernetes_telemetry::chain;
use hypernetes_types::kinds::NETWORK_LABEL;
use k8s_openapi::api::{
    core::v1::{Container, Endpoints as Mirrored, Namespace, Pod, PodSpec, PodStatus, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    error::{ReconcileError, code},
    mirror::{Key, Mirror},
    seen::watching,
};
use plan::{MANAGED_BY, MANAGER, MIRRORING, SERVICE_NAME, Step};

/// How long after a change others may come that are dealt with together.
const GATHER: Duration = Duration::from_millis(20);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);

type Watch<K> = BoxStream<'static, Result<Event<K>, watcher::Error>>;

struct Endpoints {
    client: Client,
    services: Mirror<Service>,
    pods: Mirror<Pod>,
    slices: Mirror<EndpointSlice>,
    mirrored: Mirror<Mirrored>,
    dirty: BTreeSet<Key>,
    due: Option<Instant>,
}

/// Keeps the slices of all services until `stop`.
pub(crate) async fn run(client: Client, stop: &CancellationToken) {
    let any = watching();
    let mut services: Watch<Service> = watcher(Api::all(client.clone()), any.clone())
        .default_backoff()
        .boxed();
    let mut pods: Watch<Pod> = watcher(Api::all(client.clone()), any.clone())
        .default_backoff()
        .boxed();
    let mut mirror: Watch<Mirrored> = watcher(Api::all(client.clone()), any.clone())
        .default_backoff()
        .boxed();
    let ours = any.labels(&format!("{MANAGED_BY} in ({MANAGER},{MIRRORING})"));
    let mut slices: Watch<EndpointSlice> = watcher(Api::all(client.clone()), ours)
        .default_backoff()
        .boxed();
    let mut this = Endpoints {
        client,
        services: Mirror::default(),
        pods: Mirror::default(),
        slices: Mirror::default(),
        mirrored: Mirror::default(),
        dirty: BTreeSet::new(),
        due: None,
    };
    loop {
        let due = this.due.filter(|_due| this.is_complete());
        tokio::select! {
            () = stop.cancelled() => return,
            Some(event) = services.next() => match event {
                Ok(event) => this.service_event(event),
                Err(error) => warn!(error = %chain(&error), "cannot watch services"),
            },
            Some(event) = pods.next() => match event {
                Ok(event) => this.pod_event(event),
                Err(error) => warn!(error = %chain(&error), "cannot watch pods"),
            },
            Some(event) = slices.next() => match event {
                Ok(event) => this.slice_event(event),
                Err(error) => warn!(error = %chain(&error), "cannot watch endpoint slices"),
            },
            Some(event) = mirror.next() => match event {
                Ok(event) => this.mirrored_event(event),
                Err(error) => warn!(error = %chain(&error), "cannot watch endpoints"),
            },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                this.due = None;
                this.work().await;
            }
        }
    }
}

/// What an event means if pods without an address, and those that have ended, are none at all: they are endpoints of
/// nothing, and need not be kept.
fn addressed(event: Event<Pod>) -> Option<Event<Pod>> {
    let is_endpoint = |pod: &Pod| {
        pod.status.as_ref().is_some_and(|status| {
            let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            !ended && status.pod_ip.as_ref().is_some_and(|ip| !ip.is_empty())
        })
    };
    match event {
        Event::Apply(pod) if !is_endpoint(&pod) => Some(Event::Delete(pod)),
        Event::InitApply(pod) if !is_endpoint(&pod) => None,
        event => Some(event),
    }
}

/// Takes from a pod what is of no use here.
fn slim(pod: &mut Pod) {
    if let Some(spec) = pod.spec.take() {
        let ports = |container: Container| Container {
            name: container.name,
            ports: container.ports,
            restart_policy: container.restart_policy,
            ..Container::default()
        };
        pod.spec = Some(PodSpec {
            containers: spec.containers.into_iter().map(ports).collect(),
            init_containers: (spec.init_containers)
                .map(|containers| containers.into_iter().map(ports).collect()),
            hostname: spec.hostname,
            subdomain: spec.subdomain,
            node_name: spec.node_name,
            ..PodSpec::default()
        });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(PodStatus {
            phase: status.phase,
            pod_ip: status.pod_ip,
            conditions: status.conditions,
            ..PodStatus::default()
        });
    }
}

fn matches(service: &Service, pod: &Pod) -> bool {
    let selector = service
        .spec
        .as_ref()
        .and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| {
        !selector.is_empty()
            && selector.iter().all(|(key, value)| {
                pod.metadata
                    .labels
                    .as_ref()
                    .is_some_and(|labels| labels.get(key) == Some(value))
            })
    })
}

impl Endpoints {
    fn is_complete(&self) -> bool {
        self.services.is_complete()
            && self.pods.is_complete()
            && self.slices.is_complete()
            && self.mirrored.is_complete()
    }

    fn mark(&mut self, keys: impl IntoIterator<Item = Key>, within: Duration) {
        let before = self.dirty.len();
        self.dirty.extend(keys);
        if self.dirty.len() > before {
            let at = Instant::now() + within;
            self.due = Some(self.due.map_or(at, |due| due.min(at)));
        }
    }

    fn service_event(&mut self, event: Event<Service>) {
        let changes = self.services.apply(event);
        self.mark(changes.into_iter().map(|change| change.0), GATHER);
    }

    fn pod_event(&mut self, event: Event<Pod>) {
        let Some(event) = addressed(event) else {
            return;
        };
        let event = event.modify(slim);
        for (key, old, new) in self.pods.apply(event) {
            let (services, versions) = (&self.services, [old, new]);
            let touched: Vec<Key> = services
                .of(&key.0)
                .filter(|(_key, service)| {
                    (versions.iter().flatten()).any(|pod| matches(service, pod))
                })
                .map(|(key, _service)| key.clone())
                .collect();
            self.mark(touched, GATHER);
        }
    }

    fn slice_event(&mut self, event: Event<EndpointSlice>) {
        for (key, old, new) in self.slices.apply(event) {
            let owners: Vec<Key> = [old, new]
                .iter()
                .flatten()
                .filter_map(|slice| service_of(slice))
                .map(|name| (key.0.clone(), name))
                .collect();
            self.mark(owners, GATHER);
        }
    }

    fn mirrored_event(&mut self, event: Event<Mirrored>) {
        let changes = self.mirrored.apply(event);
        self.mark(changes.into_iter().map(|change| change.0), GATHER);
    }

    async fn work(&mut self) {
        for key in std::mem::take(&mut self.dirty) {
            if let Err(error) = self.reconcile(&key).await {
                let (namespace, service) = &key;
                if error.is_conflict() {
                    debug!(namespace, service, error = %chain(&error), "endpoints were changed meanwhile");
                } else {
                    warn!(namespace, service, error = %chain(&error), "cannot write endpoints; again");
                }
                self.mark([key], AGAIN);
            }
        }
    }

    async fn reconcile(&mut self, key: &Key) -> Result<(), ReconcileError> {
        let (namespace, name) = key;
        let existing: Vec<_> = self
            .slices
            .of(namespace)
            .map(|(_key, slice)| slice.clone())
            .filter(|slice| service_of(slice).as_ref() == Some(name))
            .collect();
        let mut mirror = None;
        let steps = match self.services.get(key).cloned() {
            None => existing.iter().map(|slice| Step::delete(slice)).collect(),
            Some(service) if service.metadata.deletion_timestamp.is_some() => return Ok(()),
            Some(service) if !plan::selects(&service) => {
                let of_written: Vec<_> = existing
                    .into_iter()
                    .filter(|slice| manager_of(slice) == Some(MIRRORING))
                    .collect();
                let object = self.mirrored.get(key);
                match object.and_then(|object| mirrored::written(object)) {
                    Some(groups) if !plan::is_external(&service) => {
                        plan::steps(&service, &groups, &of_written)
                    }
                    _ => of_written.iter().map(|slice| Step::delete(slice)).collect(),
                }
            }
            Some(service) => {
                let network = self.network(namespace).await?;
                let pods: Vec<_> = self
                    .pods
                    .of(namespace)
                    .map(|(_key, pod)| pod.clone())
                    .filter(|pod| matches(&service, pod) && is_on(pod, &network))
                    .collect();
                match plan::endpoints(&service, &pods) {
                    None => Vec::new(),
                    Some(groups) => {
                        mirror = Some(mirrored::wanted(&service, &groups));
                        plan::steps(&service, &groups, &existing)
                    }
                }
            }
        };
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), namespace);
        for step in steps {
            self.take(&api, namespace, step).await?;
        }
        self.show(key, mirror).await
    }

    /// Brings the Endpoints of a service to what they shall be; `None`: there are none of ours.
    async fn show(&mut self, key: &Key, wanted: Option<Mirrored>) -> Result<(), ReconcileError> {
        let (namespace, name) = key;
        let api: Api<Mirrored> = Api::namespaced(self.client.clone(), namespace);
        let failed = |action: &str| {
            ReconcileError::api(format!(
                "{action} endpoints {name} of namespace {namespace}"
            ))
        };
        let params = PostParams::default();
        match (self.mirrored.get(key).cloned(), wanted) {
            (None, None) => {}
            // Somebody's own, which stays.
            (Some(old), _) if !mirrored::is_ours(&old) => {}
            (Some(_), None) => match api.delete(name, &DeleteParams::default()).await {
                Ok(_) => {
                    self.mirrored.remove(key.clone());
                }
                Err(error) if code(&error) == Some(404) => {
                    self.mirrored.remove(key.clone());
                }
                Err(error) => return Err(failed("delete")(error)),
            },
            (Some(old), Some(new)) if mirrored::is_same(&old, &new) => {}
            (Some(old), Some(mut new)) => {
                new.metadata.resource_version = old.metadata.resource_version.clone();
                match api.replace(name, &params, &new).await {
                    Ok(made) => {
                        self.mirrored.put(made);
                    }
                    Err(error) => return Err(failed("write")(error)),
                }
            }
            (None, Some(new)) => match api.create(&params, &new).await {
                Ok(made) => {
                    self.mirrored.put(made);
                }
                // It has come meanwhile, or the namespace ends.
                Err(error) if matches!(code(&error), Some(403 | 404 | 409)) => {}
                Err(error) => return Err(failed("create")(error)),
            },
        }
        Ok(())
    }

    async fn take(
        &mut self,
        api: &Api<EndpointSlice>,
        namespace: &str,
        step: Step,
    ) -> Result<(), ReconcileError> {
        let failed = |action: &str| {
            ReconcileError::api(format!(
                "{action} an endpoint slice of namespace {namespace}"
            ))
        };
        let params = PostParams::default();
        match step {
            Step::Create(slice) => match api.create(&params, &slice).await {
                Ok(made) => {
                    self.slices.put(made);
                }
                // The namespace ends: its services do as well.
                Err(error) if matches!(code(&error), Some(403 | 404)) => {}
                Err(error) => return Err(failed("create")(error)),
            },
            Step::Replace(name, slice) => match api.replace(&name, &params, &slice).await {
                Ok(made) => {
                    self.slices.put(made);
                }
                Err(error) => return Err(failed("write")(error)),
            },
            Step::Delete(name) => match api.delete(&name, &DeleteParams::default()).await {
                Ok(_) => {
                    self.slices.remove((namespace.to_owned(), name));
                }
                Err(error) if code(&error) == Some(404) => {
                    self.slices.remove((namespace.to_owned(), name));
                }
                Err(error) => return Err(failed("delete")(error)),
            },
        }
        Ok(())
    }

    /// Name of the network of a namespace's services.
    async fn network(&self, namespace: &str) -> Result<String, ReconcileError> {
        let found = Api::<Namespace>::all(self.client.clone())
            .get_opt(namespace)
            .await
            .map_err(ReconcileError::api(format!("read namespace {namespace}")))?;
        let label = found
            .and_then(|object| object.metadata.labels)
            .and_then(|labels| labels.get(NETWORK_LABEL).cloned());
        Ok(label.unwrap_or_else(|| "default".to_owned()))
    }
}

/// Whether the pod is on the network of its namespace's services.
fn is_on(pod: &Pod, network: &str) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations
        .and_then(|map| map.get(plan::POD_NETWORK))
        .is_none_or(|name| name == network)
}

fn manager_of(slice: &EndpointSlice) -> Option<&str> {
    let labels = slice.metadata.labels.as_ref()?;
    labels.get(MANAGED_BY).map(String::as_str)
}

fn service_of(slice: &EndpointSlice) -> Option<String> {
    slice.metadata.labels.as_ref()?.get(SERVICE_NAME).cloned()
}
