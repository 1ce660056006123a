//! Options of lists and watches, checked as upstream checks them.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hypernetes_apimachinery::{
    ResourceKind, Status,
    crd::CustomKind,
    selector::{FieldSelector, LabelSelector},
    validation::{ErrorKind, FieldError},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{parse_revision, strategy};
use crate::{query::Query, status::Result, views};

/// Fields of a custom resource that selectors may name.
pub(crate) fn selectable(custom: Option<&CustomKind>) -> &[String] {
    custom.map_or(&[], |custom| &custom.selectable)
}

/// Which objects are meant.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selection {
    labels: LabelSelector,
    fields: FieldSelector,
    /// The selection is of this one name and nothing else of it needs a look at the object.
    pub(crate) name: Option<String>,
}

impl Selection {
    pub(crate) fn parse(
        query: &Query,
        kind: &'static ResourceKind,
        custom: Option<&CustomKind>,
    ) -> Result<Self> {
        let bad = |error: hypernetes_apimachinery::selector::SelectorError| {
            Status::bad_request(error.to_string())
        };
        let labels =
            LabelSelector::parse(query.get("labelSelector").unwrap_or_default()).map_err(bad)?;
        let text = query.get("fieldSelector").unwrap_or_default();
        let fields = if views::is_view(kind) {
            // Objects are selected in the form in which they are stored.
            FieldSelector::parse(
                &views::stored_fields(kind, text),
                strategy::stored_kind(kind),
            )
        } else {
            FieldSelector::parse_with(text, kind, selectable(custom))
        };
        let fields = fields.map_err(bad)?;
        let name = fields.pinned("metadata.name").map(str::to_owned);
        Ok(Self {
            labels,
            fields,
            name,
        })
    }

    /// Whether every object is meant.
    pub(crate) fn is_everything(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether every object of the name that it is of is meant: there is nothing to look at in it.
    pub(crate) fn is_of_name(&self) -> bool {
        self.labels.is_empty() && self.fields.is_only("metadata.name")
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.labels.matches(object) && self.fields.matches(object)
    }
}

/// At which revision a list is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    /// The newest.
    Newest,
    /// The newest, which must not be older than this.
    NotOlderThan(u64),
    /// Exactly this one.
    Exactly(u64),
}

/// Options of a list.
#[derive(Debug, Clone)]
pub(crate) struct ListOptions {
    pub(crate) selection: Selection,
    pub(crate) limit: Option<usize>,
    pub(crate) at: At,
    /// Key, relative to the kind's prefix, after which to begin.
    pub(crate) after: Option<String>,
    /// The revision came from a continue token.
    pub(crate) continued: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Token {
    v: String,
    rv: i64,
    start: String,
}

const TOKEN_VERSION: &str = "meta.k8s.io/v1";

/// A token with which a list goes on after `start`; revision -1 is whatever is newest then.
pub(crate) fn continue_token(revision: i64, start: &str) -> String {
    let token = Token {
        v: TOKEN_VERSION.into(),
        rv: revision,
        start: start.into(),
    };
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
}

fn read_token(text: &str) -> Option<Token> {
    let bytes = URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()?;
    let token: Token = serde_json::from_slice(&bytes).ok()?;
    (token.v == TOKEN_VERSION).then_some(token)
}

fn forbidden(field: &str, detail: &str) -> FieldError {
    FieldError {
        kind: ErrorKind::Forbidden,
        field: field.into(),
        value: Value::Null,
        detail: detail.into(),
    }
}

fn invalid_options(errors: &[FieldError]) -> Status {
    Status::invalid("meta.k8s.io", "ListOptions", "", errors)
}

impl ListOptions {
    pub(crate) fn parse(
        query: &Query,
        kind: &'static ResourceKind,
        custom: Option<&CustomKind>,
    ) -> Result<Self> {
        let selection = Selection::parse(query, kind, custom)?;
        let limit: Option<usize> =
            match query.number::<i64>("limit").map_err(Status::bad_request)? {
                Some(limit) => usize::try_from(limit).ok().filter(|limit| *limit > 0),
                None => None,
            };
        let revision_text = query.get("resourceVersion").unwrap_or_default();
        let revision = parse_revision(revision_text)?;
        let matching = query.text("resourceVersionMatch");
        let token = query.text("continue");
        let mut errors = Vec::new();
        if query.text("sendInitialEvents").is_some() {
            errors.push(forbidden(
                "sendInitialEvents",
                "sendInitialEvents is forbidden for list",
            ));
        }
        match matching {
            None => {}
            Some(_) if token.is_some() => errors.push(forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden when continue is provided",
            )),
            Some(_) if revision_text.is_empty() => errors.push(forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            )),
            Some("NotOlderThan") => {}
            Some("Exact") if revision.is_none() => errors.push(forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            )),
            Some("Exact") => {}
            Some(other) => errors.push(FieldError {
                kind: ErrorKind::NotSupported,
                field: "resourceVersionMatch".into(),
                value: other.into(),
                detail: "supported values: \"Exact\", \"NotOlderThan\", \"\"".into(),
            }),
        }
        if !errors.is_empty() {
            return Err(invalid_options(&errors));
        }
        if let Some(token) = token {
            if revision.is_some() {
                return Err(Status::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let token = read_token(token).ok_or_else(|| {
                Status::bad_request("invalid continue token: continue key is not valid: it was not made by this server")
            })?;
            let at = u64::try_from(token.rv).map_or(At::Newest, At::Exactly);
            let continued = at != At::Newest;
            return Ok(Self {
                selection,
                limit,
                at,
                after: Some(token.start),
                continued,
            });
        }
        let at = match (revision, matching) {
            (None, _) => At::Newest,
            (Some(revision), Some("Exact")) => At::Exactly(revision),
            // A limit without a match means exactly, for clients from before there was a match.
            (Some(revision), None) if limit.is_some() => At::Exactly(revision),
            (Some(revision), _) => At::NotOlderThan(revision),
        };
        Ok(Self {
            selection,
            limit,
            at,
            after: None,
            continued: false,
        })
    }
}

/// Where a watch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    /// With everything there is, then what happens.
    Everything,
    /// With everything there is, a mark that this was all, then what happens.
    EverythingMarked,
    /// With what happens after the revision.
    After(u64),
    /// With what happens from now on.
    Now,
}

/// Options of a watch.
#[derive(Debug, Clone)]
pub(crate) struct WatchOptions {
    pub(crate) selection: Selection,
    pub(crate) begin: Begin,
    /// The newest state must not be older than this.
    pub(crate) not_older: Option<u64>,
    pub(crate) bookmarks: bool,
    pub(crate) timeout: Option<u64>,
}

impl WatchOptions {
    pub(crate) fn parse(
        query: &Query,
        kind: &'static ResourceKind,
        custom: Option<&CustomKind>,
        name: &str,
    ) -> Result<Self> {
        let mut selection = Selection::parse(query, kind, custom)?;
        if !name.is_empty() {
            selection.name = Some(name.to_owned());
        }
        let revision_text = query.get("resourceVersion").unwrap_or_default();
        let revision = parse_revision(revision_text)?;
        let bookmarks = query.flag("allowWatchBookmarks");
        let initial = query
            .text("sendInitialEvents")
            .map(|_| query.flag("sendInitialEvents"));
        let mut errors = Vec::new();
        match (initial, query.text("resourceVersionMatch")) {
            (Some(_), None) => errors.push(forbidden(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            )),
            (Some(true), _) if !bookmarks => errors.push(forbidden(
                "sendInitialEvents",
                "sendInitialEvents requires allowWatchBookmarks",
            )),
            (Some(_), Some("NotOlderThan")) => {}
            (Some(_), Some(other)) => errors.push(FieldError {
                kind: ErrorKind::NotSupported,
                field: "resourceVersionMatch".into(),
                value: other.into(),
                detail: "supported values: \"NotOlderThan\"".into(),
            }),
            (None, Some(_)) => errors.push(forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            )),
            (None, None) => {}
        }
        if !errors.is_empty() {
            return Err(invalid_options(&errors));
        }
        let (begin, not_older) = match (initial, revision) {
            (Some(true), revision) => (Begin::EverythingMarked, revision),
            (Some(false), Some(revision)) | (None, Some(revision)) => {
                (Begin::After(revision), None)
            }
            (Some(false), None) => (Begin::Now, None),
            (None, None) => (Begin::Everything, None),
        };
        let timeout = query
            .number::<u64>("timeoutSeconds")
            .map_err(Status::bad_request)?;
        Ok(Self {
            selection,
            begin,
            not_older,
            bookmarks,
            timeout: timeout.filter(|t| *t > 0),
        })
    }
}

#[cfg(test)]
mod tests {
    use hypernetes_apimachinery::kinds;

    use super::*;

    fn list(query: &str) -> Result<ListOptions> {
        ListOptions::parse(
            &Query::parse(query),
            kinds::by_resource("", "v1", "pods").unwrap(),
            None,
        )
    }

    fn watch(query: &str) -> Result<WatchOptions> {
        let kind = kinds::by_resource("", "v1", "pods").unwrap();
        WatchOptions::parse(&Query::parse(query), kind, None, "")
    }

    #[test]
    fn revisions_of_lists() {
        assert_eq!(list("").unwrap().at, At::Newest);
        assert_eq!(list("resourceVersion=0").unwrap().at, At::Newest);
        assert_eq!(list("resourceVersion=5").unwrap().at, At::NotOlderThan(5));
        assert_eq!(
            list("resourceVersion=5&limit=2").unwrap().at,
            At::Exactly(5)
        );
        assert_eq!(
            list("resourceVersion=5&resourceVersionMatch=Exact")
                .unwrap()
                .at,
            At::Exactly(5)
        );
        for (query, code) in [
            ("resourceVersionMatch=Exact", 422),
            ("resourceVersion=0&resourceVersionMatch=Exact", 422),
            ("resourceVersion=1&resourceVersionMatch=Newer", 422),
            ("resourceVersion=x", 400),
            ("continue=abc", 400),
            ("limit=many", 400),
            ("sendInitialEvents=true", 422),
        ] {
            assert_eq!(list(query).unwrap_err().code, code, "{query}");
        }
    }

    #[test]
    fn a_token_is_read_back() {
        let token = continue_token(7, "a/b");
        let options = list(&format!("continue={token}")).unwrap();
        assert_eq!(
            (options.at, options.after.as_deref()),
            (At::Exactly(7), Some("a/b"))
        );
        let options = list(&format!("continue={}", continue_token(-1, "a/b"))).unwrap();
        assert_eq!(options.at, At::Newest);
        assert_eq!(
            list(&format!("continue={token}&resourceVersion=3"))
                .unwrap_err()
                .code,
            400
        );
    }

    #[test]
    fn beginnings_of_watches() {
        assert_eq!(watch("").unwrap().begin, Begin::Everything);
        assert_eq!(watch("resourceVersion=9").unwrap().begin, Begin::After(9));
        let all = "allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan";
        let options = watch(&format!("sendInitialEvents=true&resourceVersion=4&{all}")).unwrap();
        assert_eq!(
            (options.begin, options.not_older),
            (Begin::EverythingMarked, Some(4))
        );
        assert_eq!(
            watch(&format!("sendInitialEvents=false&{all}"))
                .unwrap()
                .begin,
            Begin::Now
        );
        assert_eq!(watch("sendInitialEvents=true").unwrap_err().code, 422);
        assert_eq!(
            watch("resourceVersionMatch=NotOlderThan").unwrap_err().code,
            422
        );
    }
}
