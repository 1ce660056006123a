//! Delete and deletecollection.

use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use hypernetes_apimachinery::{ResourceKind, Status, meta};
use hypernetes_store::{Compare, Entry, Op};
use jiff::SignedDuration;
use serde_json::{Value, json};

use super::{
    Call, Engine, conflict_of,
    decode::{self, Expected},
    dry_run, modified,
    options::ListOptions,
    strategy,
};
use crate::{
    body::{self, ApiBody},
    codec::{self, Encoded},
    definitions, keys, negotiate,
    query::Query,
    status::Result,
};

const ATTEMPTS: usize = 100;
/// Finalizers that the garbage collector takes off when it has done what they stand for.
const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";
/// A pod's grace period if its spec does not say.
const POD_GRACE: i64 = 30;

/// How to delete.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeleteOptions {
    pub(crate) grace_seconds: Option<i64>,
    pub(crate) uid: Option<String>,
    pub(crate) revision: Option<String>,
    pub(crate) dry_run: bool,
    /// What is to become of dependents; `None`: what the finalizers and the kind say.
    pub(crate) propagation: Option<Propagation>,
}

/// What is to become of an object's dependents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// The garbage collector deletes them afterwards.
    Background,
    /// They are deleted first.
    Foreground,
    /// They lose their owner and stay.
    Orphan,
}

/// What became of an object.
#[derive(Debug)]
pub(crate) enum Deleted {
    /// It is gone; this is what it was.
    Gone(Value),
    /// It goes on until its holders let go.
    Lives(Value),
}

impl DeleteOptions {
    /// From the body, or from the query if there is no body.
    pub(crate) fn parse(bytes: &Bytes, call: &Call) -> Result<Self> {
        if bytes.is_empty() {
            return Self::of_query(&call.query);
        }
        let expected = Expected {
            group: "",
            version: "v1",
            kind: "DeleteOptions",
        };
        let mut parsed = decode::parsed(bytes, &call.headers, expected)?;
        // Clients name the version of the object's group, of the meta group or of the core group.
        if let Some(fields) = parsed.value.as_object_mut() {
            fields.insert("apiVersion".into(), "v1".into());
        }
        if meta::kind(&parsed.value).is_some_and(|kind| !kind.is_empty() && kind != "DeleteOptions")
        {
            return Err(Status::bad_request(
                "the body of a deletion is not DeleteOptions",
            ));
        }
        Self::of_value(&parsed.value)
    }

    /// From a decoded `DeleteOptions`.
    pub(crate) fn of_value(value: &Value) -> Result<Self> {
        let text = |value: &Value| value.as_str().filter(|t| !t.is_empty()).map(str::to_owned);
        let dry = value["dryRun"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        let options = Self {
            grace_seconds: value["gracePeriodSeconds"].as_i64(),
            uid: text(&value["preconditions"]["uid"]),
            revision: text(&value["preconditions"]["resourceVersion"]),
            dry_run: dry_run(dry)?,
            propagation: None,
        };
        let orphan = value["orphanDependents"].as_bool();
        options.checked(value["propagationPolicy"].as_str(), orphan)
    }

    fn of_query(query: &Query) -> Result<Self> {
        let options = Self {
            grace_seconds: query
                .number("gracePeriodSeconds")
                .map_err(Status::bad_request)?,
            dry_run: dry_run(query.all("dryRun"))?,
            ..Self::default()
        };
        let orphan = query
            .text("orphanDependents")
            .map(|_| query.flag("orphanDependents"));
        options.checked(query.text("propagationPolicy"), orphan)
    }

    fn checked(mut self, policy: Option<&str>, orphan: Option<bool>) -> Result<Self> {
        if self.grace_seconds.is_some_and(|grace| grace < 0) {
            return Err(Status::bad_request(
                "gracePeriodSeconds must not be negative",
            ));
        }
        self.propagation = match (policy, orphan) {
            (None | Some(""), None) => None,
            (None | Some(""), Some(true)) => Some(Propagation::Orphan),
            (None | Some(""), Some(false)) | (Some("Background"), None) => {
                Some(Propagation::Background)
            }
            (Some("Foreground"), None) => Some(Propagation::Foreground),
            (Some("Orphan"), None) => Some(Propagation::Orphan),
            (Some(_), Some(_)) => {
                return Err(Status::bad_request(
                    "orphanDependents and deletionPropagation cannot be both set",
                ));
            }
            (Some(other), None) => {
                return Err(Status::bad_request(format!(
                    "invalid propagationPolicy {other:?}"
                )));
            }
        };
        Ok(self)
    }
}

impl Engine {
    /// `delete`.
    pub(crate) async fn delete(&self, call: &Call, bytes: &Bytes) -> Result<Response<ApiBody>> {
        negotiate::view(&call.headers, &call.query)?;
        let options = DeleteOptions::parse(bytes, call)?;
        let deleted = self
            .delete_object(call, &call.info.namespace, &call.info.name, &options)
            .await?;
        match deleted {
            Deleted::Lives(object) => self.one(call, 200, &Self::present(call.kind, object)),
            // Upstream shows the last state of these kinds.
            Deleted::Gone(object) if matches!(call.kind.kind, "Pod" | "ServiceAccount") => {
                self.one(call, 200, &object)
            }
            Deleted::Gone(object) => {
                let uid = meta::uid(&object).unwrap_or_default();
                Ok(body::status(&Status::deleted(
                    call.kind,
                    &call.info.name,
                    uid,
                )))
            }
        }
    }

    /// `deletecollection`: deletes what is selected, one after the other.
    pub(crate) async fn delete_collection(
        &self,
        call: &Call,
        bytes: &Bytes,
    ) -> Result<Response<ApiBody>> {
        negotiate::view(&call.headers, &call.query)?;
        let options = DeleteOptions::parse(bytes, call)?;
        let list = ListOptions::parse(&call.query, call.kind, call.custom.as_deref())?;
        let page = self.page(call, &list).await?;
        let mut items = Vec::new();
        for entry in page.entries {
            let name = keys::name_of(&entry.key);
            let object = codec::decode(&entry.value);
            let namespace = meta::namespace(&object).unwrap_or_default();
            match self.delete_object(call, namespace, name, &options).await {
                Ok(Deleted::Gone(object) | Deleted::Lives(object)) => {
                    items.push(Self::present(call.kind, object));
                }
                Err(status) if status.reason == "NotFound" => {}
                Err(status) => return Err(status),
            }
        }
        let value = json!({
            "kind": call.kind.list_kind(),
            "apiVersion": call.kind.api_version(),
            "metadata": {"resourceVersion": self.store.revision().to_string()},
            "items": items,
        });
        Ok(body::json_value(200, &value))
    }

    /// Deletes one object, or begins to.
    pub(crate) async fn delete_object(
        &self,
        call: &Call,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted> {
        self.check_deletable(call, name)?;
        for _ in 0..ATTEMPTS {
            let (entry, object) = self.find(call.kind, namespace, name)?;
            check_preconditions(call.kind, name, &entry, &object, options)?;
            self.admit_delete(call, &object)?;
            let Some(next) = self.next_of_deletion(call.kind, &object, options) else {
                return Ok(Deleted::Lives(object));
            };
            let gone = strategy::is_finished(call.kind, &next);
            if options.dry_run {
                return Ok(if gone {
                    Deleted::Gone(next)
                } else {
                    Deleted::Lives(next)
                });
            }
            let encoded = Arc::new(Encoded::new(&next));
            let mut ops = Vec::new();
            if gone {
                ops.push(Op::Delete(entry.key.clone()));
                ops.extend(self.release(call.kind, &object));
            } else {
                ops.push(Op::Put(entry.key.clone(), encoded.to_store_value()));
            }
            let compares = vec![Compare::ModRevision(entry.key, entry.mod_revision)];
            match self
                .store
                .txn(compares, ops, Self::durability(call.kind))
                .await
            {
                Ok(_) if gone => return Ok(Deleted::Gone(next)),
                Ok(revision) => {
                    return Ok(Deleted::Lives(codec::decode(
                        &encoded.with_revision(revision),
                    )));
                }
                Err(error) => {
                    conflict_of(error)?;
                }
            }
        }
        Err(modified(call.kind, name))
    }

    /// The object as the deletion leaves it; `None` if it is as it should be already.
    fn next_of_deletion(
        &self,
        kind: &ResourceKind,
        object: &Value,
        options: &DeleteOptions,
    ) -> Option<Value> {
        let grace = if kind.kind == "Pod" {
            pod_grace(object, options)
        } else {
            0
        };
        let mut next = object.clone();
        let propagation = options
            .propagation
            .or_else(|| default_propagation(kind, object));
        match propagation {
            None => {}
            Some(policy) => {
                for (finalizer, own) in [
                    (FOREGROUND, Propagation::Foreground),
                    (ORPHAN, Propagation::Orphan),
                ] {
                    if policy == own {
                        meta::add_finalizer(&mut next, finalizer);
                    } else {
                        meta::remove_finalizer(&mut next, finalizer);
                    }
                }
            }
        }
        if let Some(since) = meta::deletion_timestamp(object) {
            let current = meta::deletion_grace_seconds(object).unwrap_or(0);
            if strategy::is_finished(kind, &next) {
                return Some(next);
            }
            // A period can only be shortened, and only if the caller asks for it.
            if options.grace_seconds.is_none() || grace >= current {
                return (next != *object).then_some(next);
            }
            let end = since - SignedDuration::from_secs(current - grace);
            meta::set(&mut next, "deletionTimestamp", meta::format_time(end));
            meta::set(&mut next, "deletionGracePeriodSeconds", grace);
            return Some(next);
        }
        if definitions::is_definition(kind) {
            self.end_definition(&mut next);
        }
        let end = (self.clock)() + SignedDuration::from_secs(grace);
        meta::set(&mut next, "deletionTimestamp", meta::format_time(end));
        if kind.kind == "Namespace" {
            next["status"]["phase"] = "Terminating".into();
        } else {
            meta::set(&mut next, "deletionGracePeriodSeconds", grace);
        }
        if meta::generation(&next) > 0 {
            let generation = meta::generation(&next) + 1;
            meta::set(&mut next, "generation", generation);
        }
        Some(next)
    }
}

/// How long a pod may take to end: no time if it never began or has ended.
fn pod_grace(pod: &Value, options: &DeleteOptions) -> i64 {
    let spec = &pod["spec"];
    let unscheduled = spec["nodeName"].as_str().unwrap_or_default().is_empty();
    let finished = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    );
    if unscheduled || finished {
        return 0;
    }
    options
        .grace_seconds
        .or_else(|| spec["terminationGracePeriodSeconds"].as_i64())
        .unwrap_or(POD_GRACE)
        .max(0)
}

fn check_preconditions(
    kind: &ResourceKind,
    name: &str,
    entry: &Entry,
    object: &Value,
    options: &DeleteOptions,
) -> Result<()> {
    let refuse = |what: &str, wanted: &str, found: &str| {
        let cause = format!(
            "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}"
        );
        Err(Status::conflict(kind.group, kind.plural, name, &cause))
    };
    let uid = meta::uid(object).unwrap_or_default();
    if let Some(wanted) = &options.uid
        && wanted != uid
    {
        return refuse("UID", wanted, uid);
    }
    let revision = entry.mod_revision.to_string();
    if let Some(wanted) = &options.revision
        && *wanted != revision
    {
        return refuse("ResourceVersion", wanted, &revision);
    }
    Ok(())
}
/// What becomes of dependents if nobody says: of kinds that are older than the garbage collector they
/// stay, as upstream does.
fn default_propagation(kind: &ResourceKind, object: &Value) -> Option<Propagation> {
    let told = meta::finalizers(object).any(|name| matches!(name, FOREGROUND | ORPHAN));
    let old = matches!(
        (kind.group, kind.kind),
        ("", "ReplicationController") | ("batch", "Job")
    );
    (old && !told).then_some(Propagation::Orphan)
}
