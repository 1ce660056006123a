//! Verbs on images.

use clap::{ArgAction, Args, Subcommand};

use super::groups::{AnyArguments, ListOptions};

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// Say nothing but the image
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Platform: linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// All tags of the repository
    #[arg(short, long)]
    pub(crate) all_tags: bool,
    /// Image
    #[arg(value_name = "NAME[:TAG|@DIGEST]")]
    pub(crate) image: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Fetch an image from a registry
    Pull(Pull),
    /// Send an image to a registry
    Push(Push),
    /// List images
    Images(Images),
    /// Give an image another name
    Tag(Tag),
    /// Remove images
    Rmi(RemoveImages),
    /// Write images into a tar archive (standard output by default)
    #[command(hide = true)]
    Save(Save),
    /// Take images in from a tar archive (standard input by default)
    #[command(hide = true)]
    Load(Load),
    /// The steps that made an image
    #[command(hide = true)]
    History(History),
    /// Tags of a repository in its registry
    #[command(hide = true)]
    Search(Search),
    /// Not supported: load images, or push them into a registry
    #[command(hide = true)]
    Import(AnyArguments),
    /// Not supported: build elsewhere, then push or load
    #[command(hide = true)]
    Build(AnyArguments),
}

#[derive(Debug, Args)]
pub(crate) struct Images {
    #[command(flatten)]
    pub(crate) list: ListOptions,
    /// Digests too
    #[arg(long)]
    pub(crate) digests: bool,
    /// All images (there are no intermediate ones)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only this repository, or this image
    #[arg(value_name = "REPOSITORY[:TAG]")]
    pub(crate) repository: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Push {
    /// Say nothing but the image
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// All tags of the repository
    #[arg(short, long)]
    pub(crate) all_tags: bool,
    /// Platform: linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Image
    #[arg(value_name = "NAME[:TAG]")]
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct Tag {
    /// Image
    #[arg(value_name = "SOURCE_IMAGE[:TAG]")]
    pub(crate) source: String,
    /// Its other name
    #[arg(value_name = "TARGET_IMAGE[:TAG]")]
    pub(crate) target: String,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveImages {
    /// Also if stopped containers use it
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Taken and not looked at: there are no parents to keep
    #[arg(long)]
    pub(crate) no_prune: bool,
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<std::path::PathBuf>,
    /// Platform: linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Load {
    /// File to read
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<std::path::PathBuf>,
    /// No progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Platform: linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct History {
    /// Sizes and dates for people; --human=false for machines
    #[arg(short = 'H', long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) human: bool,
    /// Whole commands and ids
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Only ids
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// table, json or a Go template
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// Platform: linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Image
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct Search {
    /// table, json or a Go template
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// Most tags
    #[arg(long, default_value_t = 25)]
    pub(crate) limit: usize,
    /// Whole names
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Repository, such as registry.example/team/web
    #[arg(value_name = "REPOSITORY")]
    pub(crate) repository: String,
}

#[derive(Debug, Args)]
pub(crate) struct InspectImages {
    /// json or a Go template
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// Platform: linux/amd64
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PruneImages {
    /// Also images with a name that no container uses
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Only those with a label, or older than a time (until=24h)
    #[arg(long, value_name = "FILTER", action = ArgAction::Append, value_parser = crate::format::well_formed)]
    pub(crate) filter: Vec<String>,
}

/// `hyper image …`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageGroup {
    /// List images
    #[command(aliases = ["list"])]
    Ls(Images),
    /// Remove images
    #[command(aliases = ["remove"])]
    Rm(RemoveImages),
    /// Details of images as JSON
    Inspect(InspectImages),
    /// Remove images that nothing uses
    Prune(PruneImages),
    #[command(flatten)]
    Other(ImageCommand),
}
