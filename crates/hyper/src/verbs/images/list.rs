//! `images`.

use std::collections::BTreeMap;

use hypernetes_types::ImageReference;
use jiff::Timestamp;
use regex::Regex;
use serde_json::Value;

use super::{
    by_pods,
    library::{self, Library, Own, familiar, repository},
    wire,
};
use crate::{
    cli::Images,
    cluster::Cluster,
    error::{Failure, Result},
    format::{Filters, Row, Rows},
    model::Container,
    terminal, units,
};

pub(super) const ROWS: Rows<'_> = Rows {
    default: &["Repository", "Tag", "ID", "CreatedSince", "Size"],
    headers: &[
        ("Repository", "REPOSITORY"),
        ("Tag", "TAG"),
        ("Digest", "DIGEST"),
        ("ID", "IMAGE ID"),
        ("CreatedSince", "CREATED"),
        ("CreatedAt", "CREATED AT"),
        ("Size", "SIZE"),
        ("Containers", "CONTAINERS"),
    ],
    quiet: "ID",
};
pub(super) const WITH_DIGESTS: Rows<'_> = Rows {
    default: &["Repository", "Tag", "Digest", "ID", "CreatedSince", "Size"],
    ..ROWS
};

/// `images`.
pub(super) async fn run(cluster: &Cluster, options: &Images) -> Result<()> {
    let Some(mut library) = library::of(cluster).await? else {
        return by_pods::list(cluster, options).await;
    };
    let keys = ["reference", "dangling", "label", "before", "since", "until"];
    let filters = Filters::parse(&options.list.filter, &keys)?;
    let dangling = flag(&filters, "dangling")?;
    let containers = cluster.containers().await?;
    let bounds = Bounds::of(&library, &filters)?;
    adopt(&mut library, &containers);
    library.0.sort_by(|a, b| {
        let key = |own: &Own| (own.created, own.name.clone());
        key(b).0.cmp(&key(a).0).then(key(a).1.cmp(&key(b).1))
    });
    let wanted = options.repository.as_deref();
    let mut configs = BTreeMap::new();
    let mut rows = Vec::new();
    let now = Timestamp::now();
    for own in &library.0 {
        if wanted.is_some_and(|wanted| !is_wanted(own, wanted))
            || dangling.is_some_and(|dangling| dangling != own.name.is_none())
            || !filters.any("reference", |pattern| matches_pattern(own, pattern))
            || !bounds.hold(own)
            || (filters.has("label")
                && !filters.labels("label", &labels(cluster, own, &mut configs).await?))
        {
            continue;
        }
        rows.push(row(own, options.list.no_trunc, now, &containers));
    }
    if options.list.quiet && options.list.format.is_none() {
        rows.dedup_by(|a, b| a.get("ID") == b.get("ID"));
    }
    let list = if options.digests {
        &WITH_DIGESTS
    } else {
        &ROWS
    };
    terminal::out(&list.print(&rows, options.list.format.as_deref(), options.list.quiet)?);
    Ok(())
}

/// A filter that is true or false.
pub(super) fn flag(filters: &Filters, key: &str) -> Result<Option<bool>> {
    match filters.values(key).first().map(String::as_str) {
        None => Ok(None),
        Some("true" | "1") => Ok(Some(true)),
        Some("false" | "0") => Ok(Some(false)),
        Some(other) => Err(Failure::daemon(format_args!(
            "invalid filter '{key}={other}'"
        ))),
    }
}

/// `before`, `since` and `until`.
struct Bounds {
    before: Option<Timestamp>,
    since: Option<Timestamp>,
}

impl Bounds {
    fn of(library: &Library, filters: &Filters) -> Result<Self> {
        let time = |key: &str| match filters.values(key).last() {
            None => Ok(None),
            Some(image) => library.get(image).map(|meant| meant.first().created),
        };
        let mut bounds = Self {
            before: time("before")?,
            since: time("since")?,
        };
        for until in filters.values("until") {
            bounds.before = Some(units::parse_time(until, Timestamp::now())?);
        }
        Ok(bounds)
    }

    fn hold(&self, own: &Own) -> bool {
        let created = own.created.unwrap_or(Timestamp::UNIX_EPOCH);
        self.before.is_none_or(|before| created < before)
            && self.since.is_none_or(|since| created > since)
    }
}

/// Adds images that the node has fetched for containers alone, as docker has them then.
fn adopt(library: &mut Library, containers: &[Container]) {
    for container in containers {
        let Ok(name) = container.image().parse::<ImageReference>() else {
            continue;
        };
        if library.0.iter().any(|own| own.name.as_ref() == Some(&name)) {
            continue;
        }
        let Some(status) = container
            .status()
            .filter(|status| !status.image_id.is_empty())
        else {
            continue;
        };
        let digest = status.image_id.rsplit('@').next().unwrap_or_default();
        library.0.push(Own {
            object: String::new(),
            name: Some(name),
            // Kubernetes tells the digest of the manifest.
            id: digest.to_owned(),
            digest: status.image_id.contains('@').then(|| digest.to_owned()),
            size: 0,
            created: None,
        });
    }
}

fn is_wanted(own: &Own, wanted: &str) -> bool {
    own.name.as_ref().is_some_and(|name| {
        wanted == repository(name)
            || wanted == format!("{}/{}", name.registry(), name.repository())
            || wanted == familiar(name)
            || wanted == name.to_string()
            || matches_pattern(own, wanted)
    })
}

/// A pattern of shells against the name, with and without its tag.
fn matches_pattern(own: &Own, pattern: &str) -> bool {
    let Some(name) = &own.name else {
        return false;
    };
    let mut expression = String::from("^");
    for c in pattern.chars() {
        match c {
            '*' => expression.push_str("[^/]*"),
            '?' => expression.push_str("[^/]"),
            c => expression.push_str(&regex::escape(&c.to_string())),
        }
    }
    expression.push('$');
    Regex::new(&expression).is_ok_and(|pattern| {
        [repository(name), familiar(name), name.to_string()]
            .iter()
            .any(|text| pattern.is_match(text))
    })
}

/// Labels of an image, from its configuration.
async fn labels(
    cluster: &Cluster,
    own: &Own,
    known: &mut BTreeMap<String, BTreeMap<String, String>>,
) -> Result<BTreeMap<String, String>> {
    if own.object.is_empty() {
        return Ok(BTreeMap::new());
    }
    if let Some(labels) = known.get(&own.id) {
        return Ok(labels.clone());
    }
    let path = wire::path(cluster, &format!("/{}/config", own.object));
    let document = wire::get(cluster, &path).await??;
    let labels: BTreeMap<String, String> = document["config"]["config"]["Labels"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value): (&String, &Value)| {
            Some((key.clone(), value.as_str()?.to_owned()))
        })
        .collect();
    known.insert(own.id.clone(), labels.clone());
    Ok(labels)
}

fn row(own: &Own, no_trunc: bool, now: Timestamp, containers: &[Container]) -> Row {
    let (repository, tag) = own.columns();
    let names: Vec<&ImageReference> = own.name.iter().collect();
    let used = containers
        .iter()
        .filter(|container| library::uses(container, &own.id, &names))
        .count();
    let unknown = || "N/A".to_owned();
    Row::from([
        ("Repository", repository),
        ("Tag", tag),
        (
            "Digest",
            own.digest.clone().unwrap_or_else(|| "<none>".to_owned()),
        ),
        (
            "ID",
            if no_trunc {
                own.id.clone()
            } else {
                own.short_id()
            },
        ),
        (
            "CreatedSince",
            own.created
                .map_or_else(unknown, |created| units::human_ago(created, now)),
        ),
        (
            "CreatedAt",
            own.created.map_or_else(unknown, units::created_at),
        ),
        (
            "Size",
            if own.object.is_empty() {
                unknown()
            } else {
                units::decimal_bytes(own.size)
            },
        ),
        ("Containers", used.to_string()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_shells() {
        let own = Own {
            object: "o".into(),
            name: "x.example/team/web:1".parse().ok(),
            id: "sha256:0".into(),
            digest: None,
            size: 0,
            created: None,
        };
        for yes in [
            "x.example/team/web",
            "x.example/*/web:1",
            "x.example/team/web:?",
            "*/*/*:*",
        ] {
            assert!(matches_pattern(&own, yes), "{yes}");
        }
        for no in ["web", "x.example/team/web:2", "*", "x.example/team/webs"] {
            assert!(!matches_pattern(&own, no), "{no}");
        }
    }
}
