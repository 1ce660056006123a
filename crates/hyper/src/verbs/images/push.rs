//! `push`, `tag` and `search`.

use kube::client::Body;
use serde_json::json;

use super::{
    check_platform,
    library::{self, familiar, parse, repository},
    progress::{Layers, PUSH},
    pull::{self, has_tag},
    wire,
};
use crate::{
    cli::{Push, Search, Tag},
    cluster::Cluster,
    error::{Failure, Result},
    format::{Row, Rows},
    terminal,
    verbs::launch,
};

/// `push`.
pub(super) async fn run(cluster: &Cluster, options: &Push) -> Result<()> {
    check_platform(options.platform.as_deref())?;
    let library = library::needed(cluster, "push").await?;
    let name = parse(&options.image)?;
    if name.digest().is_some() {
        return Err(Failure::plain("cannot push a digest reference"));
    }
    let wanted: Vec<_> = if options.all_tags {
        if has_tag(&options.image) {
            return Err(Failure::plain("tag can't be used with --all-tags/-a"));
        }
        let names = library.0.iter().filter_map(|own| own.name.clone());
        names
            .filter(|own| {
                own.registry() == name.registry()
                    && own.repository() == name.repository()
                    && own.tag().is_some()
            })
            .collect()
    } else {
        if !options.quiet && !has_tag(&options.image) {
            terminal::line("Using default tag: latest");
        }
        vec![name.clone()]
    };
    let full = format!("{}/{}", name.registry(), name.repository());
    if wanted.is_empty() {
        return Err(Failure::daemon(format_args!(
            "An image does not exist locally with the tag: {}",
            repository(&name)
        )));
    }
    if !options.quiet {
        terminal::line(&format!("The push refers to repository [{full}]"));
    }
    for name in wanted {
        let Ok(own) = pull::own(cluster, &library, &familiar(&name)).await else {
            return Err(Failure::daemon(format_args!(
                "An image does not exist locally with the tag: {}",
                repository(&name)
            )));
        };
        let body = json!({
            "image": name.to_string(),
            "secrets": launch::pull_secret_names(cluster).await?,
        });
        let path = wire::path(cluster, &format!("/{}/push", own.object));
        let mut layers = Layers::new(PUSH, options.quiet);
        let done = wire::operate(cluster, &path, body, |event| {
            layers.show(event);
        })
        .await?;
        if options.quiet {
            terminal::line(&name.to_string());
            continue;
        }
        for event in done {
            terminal::line(&format!(
                "{}: digest: {} size: {}",
                name.tag().unwrap_or_default(),
                event["digest"].as_str().unwrap_or_default(),
                event["size"]
            ));
        }
    }
    Ok(())
}

/// `tag`.
pub(super) async fn tag(cluster: &Cluster, options: &Tag) -> Result<()> {
    let library = library::needed(cluster, "tag").await?;
    let target = parse(&options.target)?;
    if target.digest().is_some() {
        return Err(Failure::plain(
            "refusing to create a tag with a digest reference",
        ));
    }
    let own = pull::own(cluster, &library, &options.source).await?;
    let path = wire::path(cluster, &format!("/{}/tag", own.object));
    let body = json!({"image": target.to_string()}).to_string();
    wire::send(
        cluster,
        http::Method::POST,
        &path,
        Body::from(body.into_bytes()),
    )
    .await??;
    Ok(())
}

const ROWS: Rows<'_> = Rows {
    default: &["Name", "Tag"],
    headers: &[("Name", "NAME"), ("Tag", "TAG")],
    quiet: "Name",
};

/// `search`: the tags of a repository, which is what a registry can be asked for.
pub(super) async fn search(cluster: &Cluster, options: &Search) -> Result<()> {
    library::needed(cluster, "search").await?;
    let name = parse(&options.repository)?;
    if !(1..=10_000).contains(&options.limit) {
        return Err(Failure::daemon(format_args!(
            "invalid limit {}: must be between 1 and 10000",
            options.limit
        )));
    }
    let rows: Vec<Row> = pull::tags(cluster, &name)
        .await?
        .into_iter()
        .take(options.limit)
        .map(|tag| {
            Row::from([
                ("Name", format!("{}:{tag}", repository(&name))),
                ("Tag", tag),
            ])
        })
        .collect();
    terminal::out(&ROWS.print(&rows, options.format.as_deref(), false)?);
    Ok(())
}
