//! Watches: one JSON object a line, for as long as the client stays.

mod alarms;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use http::Response;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hypernetes_apimachinery::{ResourceKind, Status, crd::CustomKind, table};
use hypernetes_store::{Change, Entry, StoreError, Watch};
use serde_json::{Value, json};

use self::alarms::{Alarm, Alarms};
use super::{
    Call, Engine, TableForm, is_view,
    options::{Begin, Selection, WatchOptions},
    table_of,
};
use crate::{
    body::{self, ApiBody, BoxError},
    codec,
    config::Clock,
    keys,
    negotiate::{self, View},
    status::{self, Result},
};

/// Events are sent together while they are there, up to this many bytes.
const PIECE: usize = 32 * 1024;
/// Watches without a timeout of their own end between this and twice this.
const LIFE: Duration = Duration::from_secs(30 * 60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Added,
    Modified,
    Deleted,
}

impl Kind {
    fn head(self) -> &'static [u8] {
        match self {
            Self::Added => b"{\"type\":\"ADDED\",\"object\":",
            Self::Modified => b"{\"type\":\"MODIFIED\",\"object\":",
            Self::Deleted => b"{\"type\":\"DELETED\",\"object\":",
        }
    }
}

struct Watcher {
    kind: &'static ResourceKind,
    custom: Option<Arc<CustomKind>>,
    view: View,
    clock: Clock,
    selection: Selection,
    /// Every object is meant, or every one with the key: none is decoded to be looked at.
    all: bool,
    watch: Watch,
    initial: VecDeque<Entry>,
    /// Revision of the initial list, if its end is to be marked.
    mark: Option<u64>,
    alarms: Alarms,
    /// The columns of a table are sent once.
    headers_sent: bool,
    finished: bool,
}

impl Engine {
    /// `watch`.
    pub(crate) async fn watch(&self, call: &Call) -> Result<Response<ApiBody>> {
        let view = negotiate::view(&call.headers, &call.query)?;
        let options = WatchOptions::parse(
            &call.query,
            call.kind,
            call.custom.as_deref(),
            &call.info.name,
        )?;
        let prefix = keys::prefix(call.kind, &call.info.namespace);
        let key = match &options.selection.name {
            Some(name) if !call.kind.namespaced || !call.info.namespace.is_empty() => {
                Some(keys::object(call.kind, &call.info.namespace, name))
            }
            _ => None,
        };
        if let Some(revision) = options.not_older {
            self.reach(revision).await?;
        }
        let begun = match options.begin {
            Begin::Everything | Begin::EverythingMarked => self.everything(&prefix, key.as_deref()),
            Begin::Now => self
                .changes(&prefix, key.as_deref(), None)
                .map(|watch| (watch, Vec::new(), 0)),
            Begin::After(revision) => {
                self.reach(revision).await?;
                self.changes(&prefix, key.as_deref(), Some(revision))
                    .map(|watch| (watch, Vec::new(), revision))
            }
        };
        let (watch, initial, revision) = match begun {
            Ok(begun) => begun,
            Err(error @ StoreError::Compacted { .. }) => {
                return Ok(ended(&status::of_store(&error)));
            }
            Err(error) => return Err(status::of_store(&error)),
        };
        let life = options
            .timeout
            .map_or_else(random_life, Duration::from_secs);
        let bookmarks = (options.bookmarks).then_some(self.limits.bookmark_interval);
        let watcher = Watcher {
            kind: call.kind,
            custom: call.custom.clone(),
            view,
            clock: self.clock.clone(),
            all: options.selection.is_everything()
                || key.is_some() && options.selection.is_of_name(),
            selection: options.selection,
            watch,
            initial: initial.into(),
            mark: (options.begin == Begin::EverythingMarked).then_some(revision),
            alarms: Alarms::new(&self.shutdown, life, bookmarks),
            headers_sent: false,
            finished: false,
        };
        let pieces = stream::unfold(watcher, |mut watcher| async move {
            let piece = watcher.piece().await?;
            Some((Ok::<_, BoxError>(Frame::data(piece)), watcher))
        });
        Ok(body::with_type(
            200,
            "application/json",
            StreamBody::new(pieces).boxed_unsync(),
        ))
    }

    fn changes(
        &self,
        prefix: &str,
        key: Option<&str>,
        from: Option<u64>,
    ) -> std::result::Result<Watch, StoreError> {
        match key {
            Some(key) => self.store.watch_key(key, from),
            None => self.store.watch(prefix, from),
        }
    }

    fn everything(
        &self,
        prefix: &str,
        key: Option<&str>,
    ) -> std::result::Result<(Watch, Vec<Entry>, u64), StoreError> {
        loop {
            let page = match key {
                None => self.store.list(prefix, None, None, None)?,
                Some(key) => {
                    let revision = self.store.revision();
                    hypernetes_store::ListPage {
                        entries: self.store.get_at(key, revision)?.into_iter().collect(),
                        revision,
                        more: false,
                        remaining: 0,
                    }
                }
            };
            match self.changes(prefix, key, Some(page.revision)) {
                Ok(watch) => return Ok((watch, page.entries, page.revision)),
                // The window moved on between the two steps.
                Err(StoreError::Compacted { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn random_life() -> Duration {
    let spread = uuid::Uuid::new_v4().as_u128() % LIFE.as_millis();
    LIFE + Duration::from_millis(u64::try_from(spread).unwrap_or_default())
}

fn error_line(status: &Status) -> Bytes {
    format!(
        "{}\n",
        json!({"type": "ERROR", "object": status.to_value()})
    )
    .into()
}

/// A watch that says why there is none.
fn ended(status: &Status) -> Response<ApiBody> {
    body::json(200, error_line(status))
}

impl Watcher {
    /// The next bytes for the client; `None` is the end.
    async fn piece(&mut self) -> Option<Bytes> {
        let mut out = BytesMut::new();
        if self.finished {
            return None;
        }
        while let Some(entry) = self.initial.pop_front() {
            if self.all || self.selection.matches(&codec::decode(&entry.value)) {
                self.put(&mut out, Kind::Added, &entry.value);
            }
            if out.len() >= PIECE {
                return Some(out.freeze());
            }
        }
        if let Some(revision) = self.mark.take() {
            self.put_bookmark(&mut out, revision, true);
        }
        while out.is_empty() {
            // Changes first: while they come nothing else is waited for, only looked at.
            let alarm = match self.alarms.due() {
                Some(alarm) => Some(alarm),
                None => tokio::select! {
                    biased;
                    change = self.watch.next() => {
                        self.take(&mut out, change.map(Some));
                        None
                    }
                    alarm = self.alarms.next() => Some(alarm),
                },
            };
            match alarm {
                Some(Alarm::End) => return None,
                Some(Alarm::Bookmark) => {
                    let revision = self.watch.progress();
                    self.put_bookmark(&mut out, revision, false);
                    self.alarms.set_bookmark();
                }
                None => {}
            }
            if self.finished && out.is_empty() {
                return None;
            }
        }
        while out.len() < PIECE && !self.finished {
            match self.watch.try_next() {
                Ok(None) => break,
                change => self.take(&mut out, change),
            }
        }
        Some(out.freeze())
    }

    fn take(
        &mut self,
        out: &mut BytesMut,
        change: std::result::Result<Option<std::sync::Arc<Change>>, StoreError>,
    ) {
        match change {
            Ok(Some(change)) => self.put_change(out, &change),
            Ok(None) => {}
            Err(StoreError::Closed) => self.finished = true,
            Err(error) => {
                out.put_slice(&error_line(&status::of_store(&error)));
                self.finished = true;
            }
        }
    }

    fn put_change(&mut self, out: &mut BytesMut, change: &Change) {
        let selected = |bytes: &Option<Bytes>| {
            bytes
                .as_ref()
                .is_some_and(|bytes| self.all || self.selection.matches(&codec::decode(bytes)))
        };
        let (before, after) = (selected(&change.previous), selected(&change.value));
        match (before, after, &change.previous, &change.value) {
            (false, true, _, Some(value)) => self.put(out, Kind::Added, value),
            (true, true, _, Some(value)) => self.put(out, Kind::Modified, value),
            (true, false, Some(previous), _) => {
                self.put(
                    out,
                    Kind::Deleted,
                    &codec::replace_revision(previous, change.revision),
                );
            }
            _ => {}
        }
    }

    fn put(&mut self, out: &mut BytesMut, kind: Kind, bytes: &Bytes) {
        out.put_slice(kind.head());
        if self.view == View::Object && !is_view(self.kind, self.custom.as_deref()) {
            out.put_slice(bytes);
        } else {
            let object = Engine::present(self.kind, codec::decode(bytes));
            let value = self.viewed(object);
            out.put_slice(value.to_string().as_bytes());
        }
        out.put_slice(b"}\n");
    }

    fn viewed(&mut self, object: Value) -> Value {
        match self.view {
            View::Object => object,
            View::Metadata => table::partial_object_metadata(&object),
            View::Table(include) => {
                let revision = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
                let headers = !std::mem::replace(&mut self.headers_sent, true);
                self.table(&[&object], include, &revision, headers)
            }
        }
    }

    fn table(
        &self,
        objects: &[&Value],
        include: table::IncludeObject,
        metadata: &Value,
        headers: bool,
    ) -> Value {
        let form = TableForm {
            include,
            metadata,
            headers,
            now: (self.clock)(),
        };
        table_of(self.kind, self.custom.as_deref(), objects, form)
    }

    fn put_bookmark(&mut self, out: &mut BytesMut, revision: u64, initial_end: bool) {
        let mut metadata =
            json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.view {
            View::Object => json!({
                "kind": self.kind.kind, "apiVersion": self.kind.api_version(), "metadata": metadata,
            }),
            View::Metadata => json!({
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
            }),
            View::Table(include) => {
                let headers = !std::mem::replace(&mut self.headers_sent, true);
                let list = json!({"resourceVersion": revision.to_string()});
                let mut table = self.table(&[], include, &list, headers);
                if initial_end {
                    // Clients of tables look for the mark in the row's object.
                    table["rows"] = json!([{
                        "cells": [],
                        "object": {
                            "kind": "PartialObjectMetadata",
                            "apiVersion": "meta.k8s.io/v1",
                            "metadata": metadata,
                        },
                    }]);
                }
                table
            }
        };
        let line = json!({"type": "BOOKMARK", "object": object}).to_string();
        out.put_slice(line.as_bytes());
        out.put_u8(b'\n');
    }
}
