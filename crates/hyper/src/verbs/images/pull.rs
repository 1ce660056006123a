//! `pull`.

use hypernetes_types::ImageReference;
use serde_json::{Value, json};

use super::{
    by_pods, check_platform,
    library::{self, Own, familiar, parse},
    progress::{Layers, PULL},
    wire,
};
use crate::{
    cli::Pull,
    cluster::Cluster,
    error::{Failure, Result},
    terminal,
    verbs::launch,
};

/// `pull`.
pub(super) async fn run(cluster: &Cluster, options: &Pull) -> Result<()> {
    check_platform(options.platform.as_deref())?;
    if library::of(cluster).await?.is_none() {
        if options.all_tags {
            return Err(Failure::refused(
                "pull --all-tags",
                "name the tags one by one",
            ));
        }
        return by_pods::pull(cluster, options).await;
    }
    let name = parse(&options.image)?;
    if !options.all_tags {
        if !options.quiet && name.digest().is_none() && !has_tag(&options.image) {
            terminal::line("Using default tag: latest");
        }
        one(cluster, &name, options.quiet).await?;
        terminal::line(&name.to_string());
        return Ok(());
    }
    if has_tag(&options.image) || name.digest().is_some() {
        return Err(Failure::plain("tag can't be used with --all-tags/-a"));
    }
    let repository = format!("{}/{}", name.registry(), name.repository());
    for tag in tags(cluster, &name).await? {
        let tagged = parse(&format!("{repository}:{tag}"))?;
        one(cluster, &tagged, options.quiet).await?;
    }
    terminal::line(&repository);
    Ok(())
}

/// Whether a tag was written.
pub(super) fn has_tag(text: &str) -> bool {
    text.rsplit_once(':')
        .is_some_and(|(_, tag)| !tag.contains('/'))
}

async fn one(cluster: &Cluster, name: &ImageReference, quiet: bool) -> Result<Own> {
    let what = name
        .tag()
        .map(str::to_owned)
        .or_else(|| name.digest().map(ToString::to_string))
        .unwrap_or_default();
    if !quiet {
        terminal::line(&format!("{what}: Pulling from {}", name.repository()));
    }
    let (own, changed) = from_registry(cluster, name, quiet).await?;
    if !quiet {
        if let Some(digest) = &own.digest {
            terminal::line(&format!("Digest: {digest}"));
        }
        let status = if changed {
            "Downloaded newer image"
        } else {
            "Image is up to date"
        };
        terminal::line(&format!("Status: {status} for {}", familiar(name)));
    }
    Ok(own)
}

/// Has the cluster fetch an image; says whether the name points elsewhere now.
pub(super) async fn from_registry(
    cluster: &Cluster,
    name: &ImageReference,
    quiet: bool,
) -> Result<(Own, bool)> {
    let body = json!({
        "image": name.to_string(),
        "secrets": launch::pull_secret_names(cluster).await?,
    });
    let path = wire::path(cluster, &format!("/{}/pull", name.object_name()));
    let mut layers = Layers::new(PULL, quiet);
    let done = wire::operate(cluster, &path, body, |event| {
        layers.show(event);
    })
    .await
    .map_err(|error| Failure {
        message: explained(name, &error.message),
        ..error
    })?;
    let last = done.last().cloned().unwrap_or_default();
    let own = Own::parse(&last["object"])
        .ok_or_else(|| Failure::plain("the server answered without an image"))?;
    Ok((own, last["changed"] == true))
}

/// docker's advice for what a registry does not give.
fn explained(name: &ImageReference, message: &str) -> String {
    if message.contains("refused access") {
        return format!(
            "Error response from daemon: pull access denied for {}, repository does not exist or may require 'hyper login': {}",
            library::repository(name),
            message.trim_start_matches("Error response from daemon: ")
        );
    }
    message.to_owned()
}

/// Tags that the registry lists.
pub(super) async fn tags(cluster: &Cluster, name: &ImageReference) -> Result<Vec<String>> {
    let mut query = format!("?image={}", wire::escaped(&name.to_string()));
    for secret in launch::pull_secret_names(cluster).await? {
        query.push_str(&format!("&secrets={}", wire::escaped(&secret)));
    }
    let path = wire::path(cluster, &format!("/-/tags{query}"));
    let list = wire::get(cluster, &path).await??;
    let tags = list["tags"].as_array().into_iter().flatten();
    Ok(tags.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Has the cluster have an image, whichever way it has.
pub(crate) async fn fetch(
    cluster: &Cluster,
    image: &str,
    platform: Option<&str>,
    quiet: bool,
) -> Result<()> {
    if library::of(cluster).await?.is_none() {
        return by_pods::fetch(cluster, image, platform, quiet)
            .await
            .map(drop);
    }
    check_platform(platform)?;
    one(cluster, &parse(image)?, quiet).await.map(drop)
}

/// An image of the namespace; one that only a container has is fetched first, as docker has it then.
pub(super) async fn own(cluster: &Cluster, library: &library::Library, text: &str) -> Result<Own> {
    if let Some(meant) = library.find(text)? {
        return Ok(meant.first().clone());
    }
    let Ok(name) = text.parse::<ImageReference>() else {
        return Err(library::no_such(text));
    };
    let containers = cluster.containers().await?;
    let used = containers
        .iter()
        .any(|container| container.image().parse() == Ok(name.clone()));
    if !used {
        return Err(library::no_such(text));
    }
    from_registry(cluster, &name, true)
        .await
        .map(|(own, _)| own)
}
