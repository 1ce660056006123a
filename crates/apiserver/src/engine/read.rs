//! Get and list.

use bytes::Bytes;
use http::Response;
use http_body_util::BodyExt;
use hypernetes_apimachinery::{Status, meta, table};
use hypernetes_store::{Entry, ListPage, StoreError};
use serde_json::{Value, json};

use super::{
    Call, Engine, TableForm,
    options::{At, ListOptions, continue_token},
    parse_revision, table_of,
};
use crate::{
    body::{self, ApiBody, ListBody},
    codec, keys,
    negotiate::{self, View},
    status::{self, Result},
};

/// A page of a list whose objects have been selected.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) entries: Vec<Entry>,
    pub(crate) revision: u64,
    /// Where the next page begins, if there is one.
    pub(crate) next: Option<String>,
    pub(crate) remaining: Option<usize>,
}

const TOO_OLD: &str = "The provided continue parameter is too old to display a consistent list \
    result. You can start a new list without the continue parameter, or use the continue token in \
    this response to retrieve the remainder of the results. Continuing with the provided token \
    results in an inconsistent list - objects that were created, modified, or deleted between the \
    time the first chunk was returned and now may show up in the list.";

impl Engine {
    /// Answers with one object in the form that the client asks for.
    pub(crate) fn one(&self, call: &Call, code: u16, object: &Value) -> Result<Response<ApiBody>> {
        let value = match negotiate::view(&call.headers, &call.query)? {
            View::Object => return Ok(body::json_value(code, object)),
            View::Metadata => table::partial_object_metadata(object),
            View::Table(include) => {
                let revision = json!({
                    "resourceVersion": meta::resource_version(object).unwrap_or_default(),
                });
                self.table(call, &[object], include, &revision)
            }
        };
        Ok(body::json_value(code, &value))
    }

    /// A list of objects that are computed and not stored, in the view that was asked for; those that the
    /// request's selectors leave out are not in it.
    pub(crate) fn computed(
        &self,
        call: &Call,
        objects: &[Value],
        metadata: &Value,
    ) -> Result<Response<ApiBody>> {
        let view = negotiate::view(&call.headers, &call.query)?;
        let options = ListOptions::parse(&call.query, call.kind, None)?;
        let objects: Vec<&Value> = objects
            .iter()
            .filter(|object| options.selection.matches(object))
            .collect();
        let value = match view {
            View::Object => json!({
                "kind": call.kind.list_kind(),
                "apiVersion": call.kind.api_version(),
                "metadata": metadata,
                "items": objects,
            }),
            View::Metadata => table::partial_object_metadata_list(&objects, metadata),
            View::Table(include) => self.table(call, &objects, include, metadata),
        };
        Ok(body::json_value(200, &value))
    }

    fn table(
        &self,
        call: &Call,
        objects: &[&Value],
        include: table::IncludeObject,
        metadata: &Value,
    ) -> Value {
        let form = TableForm {
            include,
            metadata,
            headers: true,
            now: (self.clock)(),
        };
        table_of(call.kind, call.custom.as_deref(), objects, form)
    }

    /// `get`.
    pub(crate) async fn get(&self, call: &Call) -> Result<Response<ApiBody>> {
        let view = negotiate::view(&call.headers, &call.query)?;
        if let Some(revision) =
            parse_revision(call.query.get("resourceVersion").unwrap_or_default())?
        {
            self.reach(revision).await?;
        }
        let entry = self
            .store
            .get(&call.key())
            .ok_or_else(|| call.not_found())?;
        if view == View::Object && !call.is_view() {
            return Ok(body::json(200, entry.value));
        }
        let object = Self::present(call.kind, codec::decode(&entry.value));
        self.one(call, 200, &object)
    }

    /// `list`.
    pub(crate) async fn list(&self, call: &Call) -> Result<Response<ApiBody>> {
        let view = negotiate::view(&call.headers, &call.query)?;
        let options = ListOptions::parse(&call.query, call.kind, call.custom.as_deref())?;
        let page = match self.page(call, &options).await {
            Ok(page) => page,
            Err(status) if status.reason == "Expired" && options.continued => {
                // The client may go on with what is newest, and is told how.
                let token = continue_token(-1, options.after.as_deref().unwrap_or_default());
                let mut value = Status::expired(TOO_OLD).to_value();
                value["metadata"] = json!({"continue": token});
                return Ok(body::json_value(410, &value));
            }
            Err(status) => return Err(status),
        };
        let mut metadata = json!({"resourceVersion": page.revision.to_string()});
        if let Some(next) = &page.next {
            let revision = i64::try_from(page.revision).unwrap_or(i64::MAX);
            metadata["continue"] = continue_token(revision, next).into();
            if let Some(remaining) = page.remaining {
                metadata["remainingItemCount"] = remaining.into();
            }
        }
        if view == View::Object && !call.is_view() {
            return Ok(self.list_of_bytes(call, &metadata, page.entries));
        }
        let objects: Vec<Value> = page
            .entries
            .iter()
            .map(|entry| Self::present(call.kind, codec::decode(&entry.value)))
            .collect();
        let objects: Vec<&Value> = objects.iter().collect();
        let value = match view {
            View::Object => json!({
                "kind": call.kind.list_kind(),
                "apiVersion": call.kind.api_version(),
                "metadata": metadata,
                "items": objects,
            }),
            View::Metadata => table::partial_object_metadata_list(&objects, &metadata),
            View::Table(include) => self.table(call, &objects, include, &metadata),
        };
        Ok(body::json_value(200, &value))
    }

    fn list_of_bytes(
        &self,
        call: &Call,
        metadata: &Value,
        entries: Vec<Entry>,
    ) -> Response<ApiBody> {
        let head = format!(
            "{{\"kind\":\"{}\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[",
            call.kind.list_kind(),
            call.kind.api_version(),
        );
        let values: Vec<Bytes> = entries.into_iter().map(|entry| entry.value).collect();
        let list = ListBody::new(head.into(), values.into_iter(), Bytes::from_static(b"]}"));
        body::with_type(200, "application/json", list.boxed_unsync())
    }

    /// The selected objects of a page.
    pub(crate) async fn page(&self, call: &Call, options: &ListOptions) -> Result<Page> {
        let at = match options.at {
            At::Newest => None,
            At::NotOlderThan(revision) => {
                self.reach(revision).await?;
                None
            }
            At::Exactly(revision) => {
                self.reach(revision).await?;
                Some(revision)
            }
        };
        let prefix = keys::prefix(call.kind, &call.info.namespace);
        let after = options
            .after
            .as_ref()
            .map(|start| format!("{prefix}{start}"));
        self.select(call, options, &prefix, at, after)
            .map_err(|error| status::of_store(&error))
    }

    fn select(
        &self,
        call: &Call,
        options: &ListOptions,
        prefix: &str,
        at: Option<u64>,
        after: Option<String>,
    ) -> std::result::Result<Page, StoreError> {
        let selection = &options.selection;
        if let Some(name) = selection.name.as_deref()
            && (!call.kind.namespaced || !call.info.namespace.is_empty())
        {
            return self.select_one(call, options, name, at);
        }
        if selection.is_everything() {
            let ListPage {
                entries,
                revision,
                more,
                remaining,
            } = self
                .store
                .list(prefix, at, after.as_deref(), options.limit)?;
            let next = more.then(|| relative(&entries, prefix)).flatten();
            return Ok(Page {
                entries,
                revision,
                next,
                remaining: Some(remaining),
            });
        }
        let mut after = after;
        let mut at = at;
        let mut selected: Vec<Entry> = Vec::new();
        loop {
            let step = options.limit.map(|limit| limit.max(500));
            let page = self.store.list(prefix, at, after.as_deref(), step)?;
            at = Some(page.revision);
            let last = page.entries.last().map(|entry| entry.key.clone());
            for entry in page.entries {
                if !selection.matches(&codec::decode(&entry.value)) {
                    continue;
                }
                if options.limit.is_some_and(|limit| selected.len() >= limit) {
                    // One more than asked for: there is a next page, and it begins with this one.
                    let next = relative(&selected, prefix);
                    return Ok(Page {
                        entries: selected,
                        revision: page.revision,
                        next,
                        remaining: None,
                    });
                }
                selected.push(entry);
            }
            if !page.more {
                return Ok(Page {
                    entries: selected,
                    revision: page.revision,
                    next: None,
                    remaining: None,
                });
            }
            after = last;
        }
    }

    fn select_one(
        &self,
        call: &Call,
        options: &ListOptions,
        name: &str,
        at: Option<u64>,
    ) -> std::result::Result<Page, StoreError> {
        let key = keys::object(call.kind, &call.info.namespace, name);
        let revision = at.unwrap_or_else(|| self.store.revision());
        let found = self.store.get_at(&key, revision)?;
        let entries = found
            .into_iter()
            .filter(|e| options.selection.matches(&codec::decode(&e.value)));
        let entries = if options.after.is_some() {
            Vec::new()
        } else {
            entries.collect()
        };
        Ok(Page {
            entries,
            revision,
            next: None,
            remaining: None,
        })
    }
}

fn relative(entries: &[Entry], prefix: &str) -> Option<String> {
    entries
        .last()
        .map(|entry| entry.key[prefix.len()..].to_owned())
}
