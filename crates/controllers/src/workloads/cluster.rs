//! The API as the workload controllers use it: objects as JSON, read afresh at every step.
//!
//! A list from the API server is of one moment and newer than every write that it has
//! acknowledged: nothing need be expected that was written before, and a restart loses nothing.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hypernetes_apimachinery::meta;
use kube::Client;
use serde_json::{Value, json};

use super::{autoscaler::Memory, recorder::Recorder};
use crate::error::{ReconcileError, code};

/// A kind, as paths name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) kind: String,
    pub(crate) plural: String,
    pub(crate) namespaced: bool,
}

impl Kind {
    pub(crate) fn new(group: &str, version: &str, kind: &str, plural: &str) -> Self {
        Self {
            group: group.into(),
            version: version.into(),
            kind: kind.into(),
            plural: plural.into(),
            namespaced: true,
        }
    }

    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    pub(crate) fn resource(&self) -> kube::api::ApiResource {
        kube::api::ApiResource {
            group: self.group.clone(),
            version: self.version.clone(),
            api_version: self.api_version(),
            kind: self.kind.clone(),
            plural: self.plural.clone(),
        }
    }

    fn path(&self, namespace: &str, name: &str) -> String {
        let mut path = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        if self.namespaced && !namespace.is_empty() {
            path.push_str(&format!("/namespaces/{namespace}"));
        }
        path.push('/');
        path.push_str(&self.plural);
        if !name.is_empty() {
            path.push('/');
            path.push_str(name);
        }
        path
    }
}

pub(crate) fn pods() -> Kind {
    Kind::new("", "v1", "Pod", "pods")
}
pub(crate) fn replica_sets() -> Kind {
    Kind::new("apps", "v1", "ReplicaSet", "replicasets")
}
pub(crate) fn replication_controllers() -> Kind {
    Kind::new("", "v1", "ReplicationController", "replicationcontrollers")
}
pub(crate) fn deployments() -> Kind {
    Kind::new("apps", "v1", "Deployment", "deployments")
}
pub(crate) fn stateful_sets() -> Kind {
    Kind::new("apps", "v1", "StatefulSet", "statefulsets")
}
pub(crate) fn daemon_sets() -> Kind {
    Kind::new("apps", "v1", "DaemonSet", "daemonsets")
}
pub(crate) fn revisions() -> Kind {
    Kind::new("apps", "v1", "ControllerRevision", "controllerrevisions")
}
pub(crate) fn jobs() -> Kind {
    Kind::new("batch", "v1", "Job", "jobs")
}
pub(crate) fn cron_jobs() -> Kind {
    Kind::new("batch", "v1", "CronJob", "cronjobs")
}
pub(crate) fn budgets() -> Kind {
    Kind::new(
        "policy",
        "v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
    )
}
pub(crate) fn quotas() -> Kind {
    Kind::new("", "v1", "ResourceQuota", "resourcequotas")
}
pub(crate) fn autoscalers() -> Kind {
    Kind::new(
        "autoscaling",
        "v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
    )
}
pub(crate) fn nodes() -> Kind {
    Kind {
        namespaced: false,
        ..Kind::new("", "v1", "Node", "nodes")
    }
}
pub(super) fn events() -> Kind {
    Kind::new("", "v1", "Event", "events")
}

/// Objects that are read at a time.
const PAGE: usize = 100;

type Done<T> = Result<T, ReconcileError>;

/// How dependents are deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    Background,
    Foreground,
}

/// The API server.
pub(crate) struct Cluster {
    client: Client,
    memory: Mutex<Memory>,
    recorder: Recorder,
}

impl Cluster {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            client,
            memory: Mutex::default(),
            recorder: Recorder::default(),
        }
    }

    /// What autoscalers have done lately.
    pub(super) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        media_type: &str,
        body: Option<&Value>,
        action: &str,
    ) -> Done<Value> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", media_type)
            .body(body.into_bytes())
            .map_err(|error| ReconcileError::Invalid {
                field: "path",
                rule: error.to_string(),
            })?;
        self.client
            .request::<Value>(request)
            .await
            .map_err(ReconcileError::api(format!("{action} {path}")))
    }

    /// What a path answers.
    pub(crate) async fn read(&self, path: &str) -> Done<Value> {
        self.send("GET", path, "application/json", None, "read")
            .await
    }

    pub(crate) async fn get(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
    ) -> Done<Option<Value>> {
        match self.read(&kind.path(namespace, name)).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All objects of a kind, in a namespace or (empty) in all.
    pub(crate) async fn list(&self, kind: &Kind, namespace: &str) -> Done<Vec<Value>> {
        self.list_selected(kind, namespace, "").await
    }

    /// The objects of a kind, in a namespace or (empty) in all, that are to be kept. The others are in memory
    /// for a moment, a page at a time: objects as JSON are large, and of a kind there can be many.
    pub(crate) async fn list_kept(
        &self,
        kind: &Kind,
        namespace: &str,
        mut keep: impl FnMut(&Value) -> bool,
    ) -> Done<Vec<Value>> {
        let mut kept = Vec::new();
        let mut query = format!("?limit={PAGE}");
        loop {
            let (page, next) = self.page(kind, namespace, &query).await?;
            kept.extend(page.into_iter().filter(&mut keep));
            match next {
                Some(next) => query = format!("?limit={PAGE}&continue={}", encode(&next)),
                None => return Ok(kept),
            }
        }
    }

    /// The scale of an object.
    pub(crate) async fn get_scale(&self, kind: &Kind, namespace: &str, name: &str) -> Done<Value> {
        self.read(&format!("{}/scale", kind.path(namespace, name)))
            .await
    }

    /// The objects that a query selects.
    pub(crate) async fn list_selected(
        &self,
        kind: &Kind,
        namespace: &str,
        query: &str,
    ) -> Done<Vec<Value>> {
        self.page(kind, namespace, query).await.map(|page| page.0)
    }

    /// What a query lists, and where the list goes on.
    async fn page(
        &self,
        kind: &Kind,
        namespace: &str,
        query: &str,
    ) -> Done<(Vec<Value>, Option<String>)> {
        let path = format!("{}{query}", kind.path(namespace, ""));
        let mut list = self.read(&path).await?;
        let next = list["metadata"]["continue"]
            .as_str()
            .filter(|token| !token.is_empty())
            .map(str::to_owned);
        let Value::Array(mut items) = list["items"].take() else {
            return Ok((Vec::new(), None));
        };
        for item in &mut items {
            // Lists leave out what is the same of all.
            item["apiVersion"] = kind.api_version().into();
            item["kind"] = kind.kind.as_str().into();
            // The larger half of many an object, and of no use here: a write without it leaves it.
            meta::remove(item, "managedFields");
        }
        Ok((items, next))
    }

    pub(crate) async fn create(&self, kind: &Kind, namespace: &str, object: &Value) -> Done<Value> {
        let path = kind.path(namespace, "");
        self.send("POST", &path, "application/json", Some(object), "create in")
            .await
    }

    /// Replaces an object as it was read: a conflict if it has changed since.
    pub(crate) async fn update(&self, kind: &Kind, object: &Value) -> Done<Value> {
        let path = kind.path(namespace(object), name(object));
        self.send("PUT", &path, "application/json", Some(object), "update")
            .await
    }

    /// Replaces an object's status, if it is another one than before. A conflict if the object has
    /// changed since it was read.
    pub(crate) async fn update_status(
        &self,
        kind: &Kind,
        object: &Value,
        status: Value,
    ) -> Done<()> {
        if object["status"] == status {
            return Ok(());
        }
        let mut object = object.clone();
        object["status"] = status;
        let path = format!("{}/status", kind.path(namespace(&object), name(&object)));
        self.send("PUT", &path, "application/json", Some(&object), "update")
            .await
            .map(|_| ())
    }

    /// A merge patch; `None` if the object is not there.
    pub(crate) async fn patch(
        &self,
        kind: &Kind,
        object: (&str, &str),
        subresource: &str,
        patch: &Value,
    ) -> Done<Option<Value>> {
        let mut path = kind.path(object.0, object.1);
        if !subresource.is_empty() {
            path.push('/');
            path.push_str(subresource);
        }
        let media_type = "application/merge-patch+json";
        match self
            .send("PATCH", &path, media_type, Some(patch), "patch")
            .await
        {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes this object and no later one of its name.
    pub(crate) async fn delete(
        &self,
        kind: &Kind,
        object: &Value,
        propagation: Option<Propagation>,
    ) -> Done<()> {
        let mut options = json!({"kind": "DeleteOptions", "apiVersion": "v1",
            "preconditions": {"uid": meta::uid(object)}});
        if let Some(propagation) = propagation {
            options["propagationPolicy"] = format!("{propagation:?}").into();
        }
        let path = kind.path(namespace(object), name(object));
        match self
            .send(
                "DELETE",
                &path,
                "application/json",
                Some(&options),
                "delete",
            )
            .await
        {
            Ok(_) => Ok(()),
            // Gone, or another one by now.
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes this object without waiting for anybody.
    pub(crate) async fn delete_now(&self, kind: &Kind, object: &Value) -> Done<()> {
        let options = json!({"kind": "DeleteOptions", "apiVersion": "v1",
            "gracePeriodSeconds": 0, "preconditions": {"uid": meta::uid(object)}});
        let path = kind.path(namespace(object), name(object));
        match self
            .send(
                "DELETE",
                &path,
                "application/json",
                Some(&options),
                "delete",
            )
            .await
        {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Tells users what happened to an object. That it cannot be told stops nothing.
    pub(crate) async fn event(&self, object: &Value, kind: &str, reason: &str, message: &str) {
        if let Err(error) = self
            .recorder
            .record(self, object, kind, reason, message)
            .await
        {
            tracing::debug!(error = %hypernetes_telemetry::chain(&error), "an event is lost");
        }
    }
}

/// A text as part of a query.
pub(super) fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

pub(crate) fn name(object: &Value) -> &str {
    meta::name(object).unwrap_or_default()
}

pub(crate) fn namespace(object: &Value) -> &str {
    meta::namespace(object).unwrap_or_default()
}

pub(crate) fn uid(object: &Value) -> &str {
    meta::uid(object).unwrap_or_default()
}

impl ReconcileError {
    /// There is no such object.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { source, .. } if code(source) == Some(404))
    }

    /// There is one of that name.
    pub(crate) fn is_already_exists(&self) -> bool {
        matches!(self, Self::Api { source, .. }
            if matches!(source.as_ref(), kube::Error::Api(status) if status.reason == "AlreadyExists"))
    }

    /// What the API server said, or what went wrong before it could.
    pub(crate) fn said(&self) -> String {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => status.message.clone(),
                other => other.to_string(),
            },
            other => other.to_string(),
        }
    }
}
