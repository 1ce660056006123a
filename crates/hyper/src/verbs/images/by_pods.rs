//! `pull` and `images` on a cluster that has no API for images: a node fetches one when a pod needs it.
//! `pull` makes a pod that needs the image and whose program is not in it, waits until the node says that it
//! has the image, and removes the pod.

use std::collections::BTreeMap;

use super::{
    super::{
        launch,
        watch::{self, Started},
    },
    list::{ROWS, WITH_DIGESTS},
};
use crate::{
    cli::{Create, Images, Pull},
    cluster::Cluster,
    error::{Failure, Result},
    format::{Filters, Row},
    names, terminal,
};

/// A program that no image has.
const NOTHING: &str = "/.hyper-pull";

/// Repository and tag or digest of a reference.
pub(crate) fn split(reference: &str) -> (String, String) {
    if let Some((repository, digest)) = reference.split_once('@') {
        return (repository.to_owned(), digest.to_owned());
    }
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository.to_owned(), tag.to_owned()),
        _ => (reference.to_owned(), "latest".to_owned()),
    }
}

/// `pull`.
pub(crate) async fn pull(cluster: &Cluster, options: &Pull) -> Result<()> {
    let (repository, tag) = split(&options.image);
    if !options.quiet {
        if !options.image.contains('@') && !options.image.ends_with(&format!(":{tag}")) {
            terminal::line("Using default tag: latest");
        }
        terminal::line(&format!("{tag}: Pulling from {repository}"));
    }
    let said = fetch(
        cluster,
        &options.image,
        options.platform.as_deref(),
        options.quiet,
    )
    .await?;
    if !options.quiet {
        if let Some((_, digest)) = said.digest.split_once('@') {
            terminal::line(&format!("Digest: {digest}"));
        }
        terminal::line(&format!(
            "Status: {} for {repository}:{tag}",
            if said.new {
                "Downloaded newer image"
            } else {
                "Image is up to date"
            }
        ));
    }
    terminal::line(&options.image);
    Ok(())
}

/// What a pull came to.
pub(crate) struct Pulled {
    new: bool,
    digest: String,
}

/// Has a node fetch an image.
pub(crate) async fn fetch(
    cluster: &Cluster,
    image: &str,
    platform: Option<&str>,
    quiet: bool,
) -> Result<Pulled> {
    let create = Create {
        restart: "no".to_owned(),
        pull: "always".to_owned(),
        entrypoint: Some(NOTHING.to_owned()),
        platform: platform.map(str::to_owned),
        name: Some(format!("hyper-pull-{}", names::suffix())),
        image_and_command: vec![image.to_owned()],
        rm: true,
        ..Create::default()
    };
    let begun = launch::Launch {
        detached: true,
        ..launch::Launch::default()
    };
    let spinner = (!quiet && std::io::IsTerminal::is_terminal(&std::io::stderr())).then(|| {
        let spinner =
            indicatif::ProgressBar::new_spinner().with_message("the node fetches the image");
        spinner.enable_steady_tick(std::time::Duration::from_millis(100));
        spinner
    });
    let container = launch::create(cluster, &create, &begun)
        .await
        .map_err(|error| error.with_code(1))?;
    let started = watch::started(cluster, &container).await;
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    let events = super::super::events::of_pod(cluster, &container).await;
    let now = cluster.pods().get_opt(container.pod_name()).await;
    cluster.remove(&container, Some(0)).await?;
    match started? {
        Started::No(reason, message)
            if matches!(
                reason.as_str(),
                "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull"
            ) =>
        {
            Err(Failure::daemon(if message.is_empty() {
                reason
            } else {
                message
            }))
        }
        // The image is there: only the program is not, as it should be.
        Started::No(reason, message)
            if !matches!(
                reason.as_str(),
                "RunContainerError" | "CreateContainerError" | "StartError"
            ) =>
        {
            Err(Failure::daemon(format_args!("{reason}: {message}")))
        }
        _ => {
            let new = events?.iter().any(|event| {
                event.reason == "Pulled" && event.message.starts_with("Successfully pulled")
            });
            let status = now?
                .and_then(|pod| pod.status)
                .and_then(|status| status.container_statuses)
                .unwrap_or_default();
            Ok(Pulled {
                new,
                digest: status
                    .first()
                    .map(|status| status.image_id.clone())
                    .unwrap_or_default(),
            })
        }
    }
}

/// `images`: those that containers of the namespace use.
pub(crate) async fn list(cluster: &Cluster, options: &Images) -> Result<()> {
    let filters = Filters::parse(&options.list.filter, &["reference"])?;
    let mut seen: BTreeMap<(String, String), (String, usize)> = BTreeMap::new();
    for container in cluster.containers().await? {
        let (repository, tag) = split(&container.image());
        let id = container
            .status()
            .map(|status| status.image_id.clone())
            .unwrap_or_default();
        let entry = seen.entry((repository, tag)).or_default();
        if entry.0.is_empty() {
            entry.0 = id;
        }
        entry.1 += 1;
    }
    let wanted = options.repository.as_deref();
    let rows: Vec<Row> = seen
        .into_iter()
        .filter(|((repository, tag), _)| {
            let whole = format!("{repository}:{tag}");
            wanted.is_none_or(|wanted| wanted == repository || wanted == whole)
                && filters.any("reference", |reference| {
                    reference == repository || reference == whole
                })
        })
        .map(|((repository, tag), (id, count))| {
            let digest = id
                .split_once('@')
                .map_or("<none>", |(_, digest)| digest)
                .to_owned();
            let hex = id.rsplit("sha256:").next().unwrap_or_default().to_owned();
            let short = if options.list.no_trunc {
                format!("sha256:{hex}")
            } else {
                hex.chars().take(12).collect()
            };
            Row::from([
                ("Repository", repository),
                (
                    "Tag",
                    if tag.starts_with("sha256:") {
                        "<none>".to_owned()
                    } else {
                        tag
                    },
                ),
                ("Digest", digest),
                ("ID", short),
                ("CreatedSince", "N/A".to_owned()),
                ("CreatedAt", "N/A".to_owned()),
                ("Size", "N/A".to_owned()),
                ("Containers", count.to_string()),
            ])
        })
        .collect();
    let list = if options.digests {
        &WITH_DIGESTS
    } else {
        &ROWS
    };
    terminal::out(&list.print(&rows, options.list.format.as_deref(), options.list.quiet)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn references_have_a_tag_or_a_digest() {
        for (reference, repository, tag) in [
            ("busybox", "busybox", "latest"),
            ("busybox:1", "busybox", "1"),
            ("127.0.0.1:5000/web", "127.0.0.1:5000/web", "latest"),
            ("127.0.0.1:5000/web:2", "127.0.0.1:5000/web", "2"),
            ("a/b@sha256:00", "a/b", "sha256:00"),
        ] {
            assert_eq!(split(reference), (repository.to_owned(), tag.to_owned()));
        }
    }
}
