//! `save` and `load`.

use std::{
    fs::File,
    io::{IsTerminal as _, Write as _},
    path::Path,
};

use bytes::Bytes;
use futures::StreamExt as _;
use http::Method;
use http_body_util::{BodyExt as _, StreamBody};
use kube::client::Body;
use tokio::io::AsyncRead;
use tokio_util::io::ReaderStream;

use super::{
    check_platform,
    library::{self, Meant, Own, familiar},
    pull, wire,
};
use crate::{
    cli::{Load, Save},
    cluster::Cluster,
    error::{Failure, Result},
    terminal,
};

/// `save`.
pub(super) async fn save(cluster: &Cluster, options: &Save) -> Result<()> {
    check_platform(options.platform.as_deref())?;
    if options.output.is_none() && std::io::stdout().is_terminal() {
        return Err(Failure::plain(
            "cowardly refusing to save to a terminal. Use the -o flag or redirect",
        ));
    }
    if let Some(path) = &options.output {
        check_output(path)?;
    }
    let library = library::needed(cluster, "save").await?;
    let mut query = String::new();
    for text in &options.images {
        let (key, object) = match library.find(text)? {
            Some(Meant::Id(all)) => ("untagged", all[0].object.clone()),
            Some(Meant::Name(own)) => ("image", own.object.clone()),
            None => ("image", pull::own(cluster, &library, text).await?.object),
        };
        let sign = if query.is_empty() { '?' } else { '&' };
        query.push_str(&format!("{sign}{key}={}", wire::escaped(&object)));
    }
    let path = wire::path(cluster, &format!("/-/archive{query}"));
    let mut body = wire::send(cluster, Method::GET, &path, Body::empty()).await??;
    let Some(path) = &options.output else {
        let mut out = std::io::stdout().lock();
        while let Some(piece) = wire::next(&mut body).await? {
            out.write_all(&piece)?;
        }
        out.flush()?;
        return Ok(());
    };
    // Beside it first: a file of that name is a whole archive.
    let beside = path.with_file_name(format!(
        ".{}.{}",
        path.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let written = async {
        let mut file = File::create(&beside)?;
        while let Some(piece) = wire::next(&mut body).await? {
            file.write_all(&piece)?;
        }
        file.flush()?;
        std::fs::rename(&beside, path)?;
        Ok(())
    };
    let written: Result<()> = written.await;
    if written.is_err() {
        // It may not have been made.
        drop(std::fs::remove_file(&beside));
    }
    written
}

fn check_output(path: &Path) -> Result<()> {
    let invalid = |why: &str| {
        Failure::plain(format_args!(
            "invalid output path: {} {why}",
            path.display()
        ))
    };
    if path.is_dir() {
        return Err(invalid("must be a file, it is a directory"));
    }
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => {
            Err(Failure::plain(format_args!(
                "invalid output path: directory \"{}\" does not exist",
                parent.display()
            )))
        }
        _ => Ok(()),
    }
}

/// `load`.
pub(super) async fn load(cluster: &Cluster, options: &Load) -> Result<()> {
    check_platform(options.platform.as_deref())?;
    let source: Box<dyn AsyncRead + Send + Unpin> = match &options.input {
        Some(path) => {
            let file = File::open(path).map_err(|error| {
                Failure::plain(format_args!("open {}: {error}", path.display()))
            })?;
            Box::new(tokio::fs::File::from_std(file))
        }
        None if terminal::stdin_is_terminal() => {
            return Err(Failure::plain(
                "requested load from stdin, but stdin is empty",
            ));
        }
        None => Box::new(tokio::io::stdin()),
    };
    library::needed(cluster, "load").await?;
    let frames =
        ReaderStream::with_capacity(source, 128 << 10).map(|piece: std::io::Result<Bytes>| {
            piece
                .map(http_body::Frame::data)
                .map_err(|error| Box::new(error) as _)
        });
    let path = wire::path(cluster, "/-/archive");
    let answer = wire::upload(cluster, &path, StreamBody::new(frames).boxed_unsync()).await??;
    let done = wire::lines(answer, |_| {}).await?;
    for event in done {
        let Some(own) = Own::parse(&event["object"]) else {
            continue;
        };
        match &own.name {
            Some(name) => terminal::line(&format!("Loaded image: {}", familiar(name))),
            None => terminal::line(&format!("Loaded image ID: {}", own.id)),
        }
    }
    Ok(())
}
