//! `image inspect` and `history`.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    check_platform,
    library::{self, Library, familiar, repository},
    pull, wire,
};
use crate::{
    cli::{History, InspectImages},
    cluster::Cluster,
    error::{Failure, Result},
    format::{Row, Rows, render},
    terminal, units,
};

async fn documents(cluster: &Cluster, object: &str) -> Result<(Value, Value)> {
    let path = wire::path(cluster, &format!("/{object}/config"));
    let mut both = wire::get(cluster, &path).await??;
    Ok((both["manifest"].take(), both["config"].take()))
}

/// `image inspect`.
pub(super) async fn run(cluster: &Cluster, options: &InspectImages) -> Result<()> {
    check_platform(options.platform.as_deref())?;
    let library = library::needed(cluster, "image inspect").await?;
    let (mut found, mut failed) = (Vec::new(), None);
    for text in &options.images {
        match one(cluster, &library, text).await {
            Ok(details) => found.push(details),
            Err(error) => {
                failed = Some(error.code);
                terminal::note(&error.message);
            }
        }
    }
    match &options.format {
        None => {
            let text = serde_json::to_string_pretty(&found).map_err(Failure::plain)?;
            terminal::line(&text);
        }
        Some(format) => {
            for details in &found {
                terminal::line(&render(format, details)?);
            }
        }
    }
    failed.map_or(Ok(()), |code| Err(Failure::exit(code)))
}

/// Details of an image in docker's form.
pub(super) async fn one(cluster: &Cluster, library: &Library, text: &str) -> Result<Value> {
    let own = pull::own(cluster, library, text).await?;
    let (_, config) = documents(cluster, &own.object).await?;
    let all = library.of_id(&own.id);
    let names = all
        .iter()
        .copied()
        .chain([&own])
        .filter_map(|own| own.name.as_ref());
    let mut tags: Vec<String> = names.filter(|n| n.tag().is_some()).map(familiar).collect();
    tags.sort();
    tags.dedup();
    let mut digests: Vec<String> = all
        .iter()
        .filter_map(|own| {
            Some(format!(
                "{}@{}",
                repository(own.name.as_ref()?),
                own.digest.as_ref()?
            ))
        })
        .collect();
    digests.sort();
    digests.dedup();
    let history = config["history"].as_array();
    let comment = history
        .and_then(|steps| steps.last())
        .and_then(|step| step["comment"].as_str())
        .unwrap_or_default();
    Ok(json!({
        "Id": own.id,
        "RepoTags": tags,
        "RepoDigests": digests,
        "Comment": comment,
        "Created": config["created"].as_str().unwrap_or_default(),
        "Author": config["author"].as_str().unwrap_or_default(),
        "Config": config["config"],
        "Architecture": config["architecture"],
        "Os": config["os"],
        "Size": own.size,
        "RootFS": {"Type": "layers", "Layers": config["rootfs"]["diff_ids"]},
        "Metadata": {},
    }))
}

const ROWS: Rows<'_> = Rows {
    default: &["ID", "CreatedSince", "CreatedBy", "Size", "Comment"],
    headers: &[
        ("ID", "IMAGE"),
        ("CreatedSince", "CREATED"),
        ("CreatedAt", "CREATED AT"),
        ("CreatedBy", "CREATED BY"),
        ("Size", "SIZE"),
        ("Comment", "COMMENT"),
    ],
    quiet: "ID",
};
const MACHINE: Rows<'_> = Rows {
    default: &["ID", "CreatedAt", "CreatedBy", "Size", "Comment"],
    ..ROWS
};

/// `history`.
pub(super) async fn history(cluster: &Cluster, options: &History) -> Result<()> {
    check_platform(options.platform.as_deref())?;
    let library = library::needed(cluster, "history").await?;
    let own = pull::own(cluster, &library, &options.image).await?;
    let (manifest, config) = documents(cluster, &own.object).await?;
    let id = if options.no_trunc {
        own.id.clone()
    } else {
        own.short_id()
    };
    let rows = steps(&id, &manifest, &config, options, Timestamp::now());
    let list = if options.human { &ROWS } else { &MACHINE };
    terminal::out(&list.print(&rows, options.format.as_deref(), options.quiet)?);
    Ok(())
}

/// The steps, newest first. Sizes are those of layers' blobs.
fn steps(
    id: &str,
    manifest: &Value,
    config: &Value,
    options: &History,
    now: Timestamp,
) -> Vec<Row> {
    let none = Vec::new();
    let mut sizes = manifest["layers"]
        .as_array()
        .unwrap_or(&none)
        .iter()
        .map(|layer| layer["size"].as_u64().unwrap_or_default());
    let history = config["history"].as_array().unwrap_or(&none);
    let mut rows: Vec<Row> = history
        .iter()
        .map(|step| {
            let size = match step["empty_layer"].as_bool() {
                Some(true) => 0,
                _ => sizes.next().unwrap_or_default(),
            };
            row(step, size, options, now)
        })
        .collect();
    // Layers that the history does not tell of.
    rows.extend(sizes.map(|size| row(&Value::Null, size, options, now)));
    rows.reverse();
    for (at, row) in rows.iter_mut().enumerate() {
        let text = if at == 0 { id } else { "<missing>" };
        row.insert("ID", text.to_owned());
    }
    rows
}

fn row(step: &Value, size: u64, options: &History, now: Timestamp) -> Row {
    let text = |field: &str| step[field].as_str().unwrap_or_default().to_owned();
    let created: Option<Timestamp> = step["created"].as_str().and_then(|t| t.parse().ok());
    let mut by = text("created_by").replace('\t', " ");
    if !options.no_trunc && by.chars().count() > 45 {
        by = by.chars().take(44).collect::<String>() + "…";
    }
    Row::from([
        (
            "CreatedSince",
            created.map_or_else(|| "N/A".to_owned(), |at| units::human_ago(at, now)),
        ),
        (
            "CreatedAt",
            step["created"].as_str().unwrap_or("N/A").to_owned(),
        ),
        ("CreatedBy", by),
        (
            "Size",
            if options.human {
                units::decimal_bytes(size)
            } else {
                size.to_string()
            },
        ),
        ("Comment", text("comment")),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_have_the_sizes_of_their_layers() {
        let manifest = json!({"layers": [{"size": 10}, {"size": 2000}]});
        let config = json!({"history": [
            {"created": "2026-01-01T00:00:00Z", "created_by": "ADD a"},
            {"created_by": "CMD x", "empty_layer": true},
            {"created_by": "y".repeat(60), "comment": "c"}]});
        let options = History {
            human: true,
            no_trunc: false,
            quiet: false,
            format: None,
            platform: None,
            image: String::new(),
        };
        let rows = steps("abc", &manifest, &config, &options, Timestamp::UNIX_EPOCH);
        let field = |name: &'static str| -> Vec<String> {
            rows.iter().map(|row| row[name].clone()).collect()
        };
        assert_eq!(field("ID"), ["abc", "<missing>", "<missing>"]);
        assert_eq!(field("Size"), ["2kB", "0B", "10B"]);
        assert!(field("CreatedBy")[0].ends_with('…'));
        assert_eq!(field("CreatedBy")[0].chars().count(), 45);
    }
}
