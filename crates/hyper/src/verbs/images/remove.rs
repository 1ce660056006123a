//! `rmi` and `image prune`.

use http::Method;
use hypernetes_types::ImageReference;
use kube::client::Body;

use super::{
    library::{self, Library, Meant, Own, familiar, repository, uses},
    list::flag,
    wire,
};
use crate::{
    cli::{PruneImages, RemoveImages},
    cluster::Cluster,
    error::{Failure, Result},
    format::Filters,
    model::Container,
    terminal, units,
};

/// `rmi`.
pub(super) async fn run(cluster: &Cluster, options: &RemoveImages) -> Result<()> {
    let containers = cluster.containers().await?;
    let mut failed = None;
    for text in &options.images {
        // Looked up anew: the one before may have been the last name of this one.
        let library = library::needed(cluster, "rmi").await?;
        match remove(cluster, &library, &containers, text, options.force).await {
            Ok(()) => {}
            Err(error) => {
                terminal::note(&error.message);
                failed = Some(error.code.max(1));
            }
        }
    }
    failed.map_or(Ok(()), |code| Err(Failure::exit(code)))
}

async fn remove(
    cluster: &Cluster,
    library: &Library,
    containers: &[Container],
    text: &str,
    force: bool,
) -> Result<()> {
    let Some(meant) = library.find(text)? else {
        if force {
            return Ok(());
        }
        return Err(library::no_such(text));
    };
    let id = meant.first().id.clone();
    let all = library.of_id(&id);
    let names: Vec<&ImageReference> = all.iter().filter_map(|own| own.name.as_ref()).collect();
    let going: Vec<&Own> = match &meant {
        Meant::Name(own) => vec![own],
        Meant::Id(all) => {
            let repositories: std::collections::BTreeSet<String> =
                names.iter().map(|name| repository(name)).collect();
            if repositories.len() > 1 && !force {
                return Err(Failure::daemon(format_args!(
                    "conflict: unable to delete {} (must be forced) - image is referenced in multiple repositories",
                    library::short(&id)
                )));
            }
            all.clone()
        }
    };
    let is_last = going.len() == all.len();
    if is_last && let Some(container) = containers.iter().find(|one| uses(one, &id, &names)) {
        let runs = !container.state().is_over() && !container.is_gated();
        let short = library::short(&id);
        match (&meant, runs) {
            (Meant::Id(_), true) => {
                return Err(Failure::daemon(format_args!(
                    "conflict: unable to delete {short} (cannot be forced) - image is being used by running container {}",
                    container.short_id()
                )));
            }
            (Meant::Id(_), false) if !force => {
                return Err(Failure::daemon(format_args!(
                    "conflict: unable to delete {short} (must be forced) - image is being used by stopped container {}",
                    container.short_id()
                )));
            }
            (Meant::Name(own), _) if !force => {
                let name = own.name.as_ref().map(familiar).unwrap_or_default();
                return Err(Failure::daemon(format_args!(
                    "conflict: unable to remove repository reference \"{name}\" (must force) - container {} is using its referenced image {short}",
                    container.short_id()
                )));
            }
            _ => {}
        }
    }
    for own in &going {
        delete(cluster, own).await?;
        say(own, &all, &going);
    }
    if is_last {
        terminal::line(&format!("Deleted: {id}"));
    }
    Ok(())
}

/// Says that a name is gone, and the digest with the last name of its repository.
fn say(own: &Own, all: &[&Own], going: &[&Own]) {
    let Some(name) = &own.name else {
        return;
    };
    terminal::line(&format!("Untagged: {}", familiar(name)));
    let stays = all.iter().any(|other| {
        !going.contains(other)
            && other
                .name
                .as_ref()
                .is_some_and(|other| repository(other) == repository(name))
    });
    if let (Some(digest), false, true) = (&own.digest, stays, name.digest().is_none()) {
        terminal::line(&format!("Untagged: {}@{digest}", repository(name)));
    }
}

async fn delete(cluster: &Cluster, own: &Own) -> Result<()> {
    let path = wire::path(cluster, &format!("/{}", own.object));
    match wire::send(cluster, Method::DELETE, &path, Body::empty()).await? {
        Ok(_) => Ok(()),
        Err(refused) if refused.code == http::StatusCode::NOT_FOUND => Ok(()),
        Err(refused) => Err(refused.into()),
    }
}

/// `image prune`.
pub(super) async fn prune(cluster: &Cluster, options: &PruneImages) -> Result<()> {
    let library = library::needed(cluster, "image prune").await?;
    let filters = Filters::parse(&options.filter, &["until", "dangling"])?;
    let all = options.all || flag(&filters, "dangling")? == Some(false);
    if !options.force {
        let what = if all {
            "all images without at least one container associated to them"
        } else {
            "all dangling images"
        };
        terminal::out(&format!(
            "WARNING! This will remove {what}.\nAre you sure you want to continue? [y/N] "
        ));
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Err(Failure::plain("image prune has been cancelled"));
        }
    }
    let now = jiff::Timestamp::now();
    let mut until = None;
    for text in filters.values("until") {
        until = Some(units::parse_time(text, now)?);
    }
    let containers = cluster.containers().await?;
    let mut ids: Vec<&String> = library.0.iter().map(|own| &own.id).collect();
    ids.sort();
    ids.dedup();
    let (mut lines, mut freed) = (Vec::new(), 0_u64);
    for id in ids {
        let objects = library.of_id(id);
        let names: Vec<&ImageReference> =
            objects.iter().filter_map(|own| own.name.as_ref()).collect();
        let old = until.is_none_or(|until| objects[0].created.is_none_or(|at| at < until));
        let used = containers.iter().any(|one| uses(one, id, &names));
        if used || !old || !(all || names.is_empty()) {
            continue;
        }
        for own in &objects {
            delete(cluster, own).await?;
            if let Some(name) = &own.name {
                lines.push(format!("untagged: {}", familiar(name)));
            }
        }
        lines.push(format!("deleted: {id}"));
        freed += objects[0].size;
    }
    if !lines.is_empty() {
        terminal::line(&format!("Deleted Images:\n{}\n", lines.join("\n")));
    }
    terminal::line(&format!(
        "Total reclaimed space: {}",
        units::decimal_bytes(freed)
    ));
    Ok(())
}
