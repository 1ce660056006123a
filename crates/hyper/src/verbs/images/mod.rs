//! Images.
//!
//! A Hypernetes keeps images for each namespace and names them by objects of kind Image
//! (`images.hypernetes.io`). Another cluster has no such API: there `pull` and `images` go by way of pods,
//! and the other verbs say what they need.

mod archive;
mod by_pods;
mod inspect;
mod library;
mod list;
mod progress;
mod pull;
mod push;
mod remove;
mod wire;

pub(crate) use pull::fetch;

use crate::{
    cli::{ImageCommand, ImageGroup},
    cluster::{Cluster, Target},
    error::{Failure, Result},
};

/// One verb of images.
pub(crate) async fn run(target: &Target, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Import(_) => Err(Failure::refused(
            "import",
            "build an image of the files with another tool, then `hyper load` it",
        )),
        ImageCommand::Build(_) => Err(Failure::refused(
            "build",
            "build with another tool, then push into a registry or `hyper load` what its `save` writes",
        )),
        command => served(&target.connect().await?, command).await,
    }
}

async fn served(cluster: &Cluster, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Pull(options) => pull::run(cluster, &options).await,
        ImageCommand::Push(options) => push::run(cluster, &options).await,
        ImageCommand::Images(options) => list::run(cluster, &options).await,
        ImageCommand::Tag(options) => push::tag(cluster, &options).await,
        ImageCommand::Rmi(options) => remove::run(cluster, &options).await,
        ImageCommand::Save(options) => archive::save(cluster, &options).await,
        ImageCommand::Load(options) => archive::load(cluster, &options).await,
        ImageCommand::History(options) => inspect::history(cluster, &options).await,
        ImageCommand::Search(options) => push::search(cluster, &options).await,
        ImageCommand::Import(_) | ImageCommand::Build(_) => Ok(()),
    }
}

/// `hyper image …`.
pub(crate) async fn group(target: &Target, command: ImageGroup) -> Result<()> {
    match command {
        ImageGroup::Ls(options) => list::run(&target.connect().await?, &options).await,
        ImageGroup::Rm(options) => remove::run(&target.connect().await?, &options).await,
        ImageGroup::Inspect(options) => inspect::run(&target.connect().await?, &options).await,
        ImageGroup::Prune(options) => remove::prune(&target.connect().await?, &options).await,
        ImageGroup::Other(command) => run(target, command).await,
    }
}

/// Only one platform is there.
fn check_platform(platform: Option<&str>) -> Result<()> {
    match platform {
        None | Some("linux/amd64" | "linux/amd64/v1" | "linux/x86_64" | "amd64") => Ok(()),
        Some(other) => Err(Failure::daemon(format_args!(
            "no match for platform {other}: containers run on linux/amd64"
        ))),
    }
}
