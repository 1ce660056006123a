//! The generic engine: every kind is read, watched and written by the same code.
//!
//! A write goes decode → strict check → defaults → strategy → admission → validation → one store
//! transaction; reads go from the store's bytes to the client without being parsed where nothing
//! asks for it.

mod admission;
mod apply;
mod bounds;
mod clones;
mod create;
mod decode;
mod delete;
mod eviction;
mod managers;
mod options;
mod read;
mod service_account;
mod strategy;
mod update;
mod watch;
mod workloads;

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, Response};
use hypernetes_apimachinery::{
    ResourceKind, Schema, Status,
    crd::CustomKind,
    definitions, kinds, meta,
    table::{self, IncludeObject},
    usage::UsageBoard,
};
use hypernetes_identity::User;
use hypernetes_store::{Durability, Entry, Store, StoreError};
use serde_json::Value;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use decode::{Expected, body as decode_body};
pub(crate) use delete::{DeleteOptions, Deleted};
pub(crate) use options::selectable;
pub(crate) use strategy::Part;

use crate::{
    authorizer::Authorizer,
    body::ApiBody,
    codec,
    config::{Clock, Limits},
    customs::Customs,
    keys,
    query::Query,
    request_info::RequestInfo,
    status::{self, Result},
    views,
};

/// What the generic verbs work with.
pub(crate) struct Engine {
    pub(crate) store: Store,
    pub(crate) authorizer: Authorizer,
    pub(crate) clock: Clock,
    /// The custom resources that are served.
    pub(crate) customs: Customs,
    /// Held while a definition's names are settled and stored.
    pub(crate) naming: tokio::sync::Mutex<()>,
    pub(crate) node_name: Option<String>,
    pub(crate) usage: UsageBoard,
    /// Pods are given the token of their service account.
    pub(crate) mount_tokens: bool,
    pub(crate) limits: Limits,
    /// Addresses of services.
    pub(crate) service_range: ipnet::Ipv4Net,
    /// Ports of the node that services can have.
    pub(crate) node_ports: std::ops::RangeInclusive<u16>,
    /// Ends watches at shutdown.
    pub(crate) shutdown: CancellationToken,
    /// Streams on upgraded connections.
    pub(crate) tasks: TaskTracker,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").finish_non_exhaustive()
    }
}

/// One request for objects of a kind.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) kind: &'static ResourceKind,
    /// Set for custom resources.
    pub(crate) custom: Option<Arc<CustomKind>>,
    pub(crate) info: RequestInfo,
    pub(crate) query: Query,
    pub(crate) headers: HeaderMap,
    pub(crate) user: User,
}

impl Call {
    pub(crate) fn key(&self) -> String {
        keys::object(self.kind, &self.info.namespace, &self.info.name)
    }

    pub(crate) fn not_found(&self) -> Status {
        not_found(self.kind, &self.info.name)
    }

    /// The schema of the kind's objects, in the form in which clients know them.
    pub(crate) fn schema(&self) -> Result<&Schema> {
        if let Some(custom) = &self.custom {
            return Ok(&custom.schema);
        }
        definitions()
            .of(self.kind)
            .ok_or_else(|| Status::internal("there is no schema for the kind"))
    }

    /// The schema of the kind's objects as they are stored.
    pub(crate) fn stored_schema(&self) -> Result<&Schema> {
        if views::is_view(self.kind) {
            return definitions()
                .of(strategy::stored_kind(self.kind))
                .ok_or_else(|| Status::internal("there is no schema for the kind"));
        }
        self.schema()
    }

    /// Whether stored bytes are not what clients see.
    pub(crate) fn is_view(&self) -> bool {
        is_view(self.kind, self.custom.as_deref())
    }

    /// Whether nothing is to be stored.
    pub(crate) fn is_dry_run(&self) -> Result<bool> {
        dry_run(self.query.all("dryRun"))
    }
}

/// Whether the stored bytes of a kind are not what its clients see.
fn is_view(kind: &ResourceKind, custom: Option<&CustomKind>) -> bool {
    views::is_view(kind) || custom.is_some_and(|custom| custom.has_versions)
}

/// The columns of a list.
#[derive(Debug, Clone, Copy)]
struct TableForm<'a> {
    include: IncludeObject,
    /// Metadata of the list.
    metadata: &'a Value,
    headers: bool,
    now: jiff::Timestamp,
}

fn table_of(
    kind: &ResourceKind,
    custom: Option<&CustomKind>,
    objects: &[&Value],
    form: TableForm<'_>,
) -> Value {
    let TableForm {
        include,
        metadata,
        headers,
        now,
    } = form;
    // The columns of our own kinds say more than JSON paths can.
    let ours = kind.group == hypernetes_types::kinds::GROUP;
    match custom.filter(|_| !ours) {
        Some(custom) => custom.table(objects, include, metadata, headers, now),
        None => table::table(kind, objects, include, metadata, headers, now),
    }
}

/// Reads the values of `dryRun`.
pub(crate) fn dry_run<'a>(values: impl Iterator<Item = &'a str>) -> Result<bool> {
    let mut set = false;
    for value in values.filter(|value| !value.is_empty()) {
        if value != "All" {
            return Err(Status::bad_request(format!(
                "invalid dryRun value {value:?}: the only one supported is \"All\""
            )));
        }
        set = true;
    }
    Ok(set)
}

pub(crate) fn not_found(kind: &ResourceKind, name: &str) -> Status {
    Status::not_found(kind.group, kind.plural, name)
}

pub(crate) fn modified(kind: &ResourceKind, name: &str) -> Status {
    Status::modified(kind.group, kind.plural, name)
}

/// The answer of a write, with warnings.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) code: u16,
    pub(crate) object: Value,
    pub(crate) warnings: Vec<String>,
}

impl Engine {
    /// How soon writes of the kind must be on disk.
    pub(crate) fn durability(kind: &ResourceKind) -> Durability {
        match kind.plural {
            "events" | "leases" => Durability::Relaxed,
            _ => Durability::Sync,
        }
    }

    /// The stored object and its entry.
    pub(crate) fn find(
        &self,
        kind: &ResourceKind,
        namespace: &str,
        name: &str,
    ) -> Result<(Entry, Value)> {
        let entry = self
            .store
            .get(&keys::object(kind, namespace, name))
            .ok_or_else(|| not_found(kind, name))?;
        let object = codec::decode(&entry.value);
        Ok((entry, object))
    }

    /// The stored object of a kind in the form in which its clients know it.
    pub(crate) fn present(kind: &ResourceKind, mut object: Value) -> Value {
        if views::is_view(kind) {
            return views::to_view(kind, object);
        }
        if kinds::is_custom(kind) {
            object["apiVersion"] = kind.api_version().into();
        }
        object
    }

    /// Waits a little for a revision that may be on its way.
    pub(crate) async fn reach(&self, revision: u64) -> Result<()> {
        let wait = Duration::from_secs(3);
        match tokio::time::timeout(wait, self.store.reached(revision)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(status::of_store(&error)),
            Err(_elapsed) => Err(Status::too_large_resource_version(
                revision,
                self.store.revision(),
                1,
            )),
        }
    }

    /// Answers a write.
    pub(crate) fn answer(&self, call: &Call, written: Written) -> Result<Response<ApiBody>> {
        let object = Self::present(call.kind, written.object);
        let mut response = self.one(call, written.code, &object)?;
        crate::body::warn(&mut response, &written.warnings);
        Ok(response)
    }
}

/// The conflict of a transaction, told from its other failures.
pub(crate) fn conflict_of(error: StoreError) -> Result<Option<Entry>> {
    match error {
        StoreError::Conflict { current, .. } => Ok(current),
        other => Err(status::of_store(&other)),
    }
}

/// Parses a resource version; empty and `0` are `None`.
pub(crate) fn parse_revision(text: &str) -> Result<Option<u64>> {
    if text.is_empty() || text == "0" {
        return Ok(None);
    }
    match text.parse() {
        Ok(revision) => Ok(Some(revision)),
        Err(_) => Err(Status::bad_request(format!(
            "invalid resource version {text:?}"
        ))),
    }
}

/// The revision that an object carries.
pub(crate) fn revision_of(object: &Value) -> Result<Option<u64>> {
    parse_revision(meta::resource_version(object).unwrap_or_default())
}
