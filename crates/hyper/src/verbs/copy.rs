//! `cp`: files between a container and here, as tar streams through the container's own `tar`.

use std::path::{Component, Path, PathBuf};

use kube::api::AttachParams;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::exec;
use crate::{
    cli::Copy,
    cluster::Cluster,
    error::{Failure, Result},
    model::{Container, State},
    streams, terminal, units,
};

mod unpack;

/// `CONTAINER:PATH`, unless it is a path here.
fn of_container(text: &str) -> Option<(&str, &str)> {
    if text.starts_with(['/', '.']) || text == "-" {
        return None;
    }
    text.split_once(':').filter(|(name, _)| !name.is_empty())
}

/// `cp`.
pub(crate) async fn run(cluster: &Cluster, options: &Copy) -> Result<()> {
    match (
        of_container(&options.source),
        of_container(&options.destination),
    ) {
        (Some(_), Some(_)) => Err(Failure::plain(
            "copying between containers is not supported",
        )),
        (None, None) => Err(Failure::plain("must specify at least one container source")),
        (Some((name, path)), None) => {
            let container = running(cluster, name).await?;
            from_container(cluster, &container, path, options).await
        }
        (None, Some((name, path))) => {
            let container = running(cluster, name).await?;
            to_container(cluster, &container, path, options).await
        }
    }
}

async fn running(cluster: &Cluster, name: &str) -> Result<Container> {
    let container = cluster.find(name).await?;
    if container.state() == State::Running {
        return Ok(container);
    }
    if container.state() == State::Paused {
        return Err(Failure::refused(
            format_args!("cp with the paused container {name}"),
            "unpause it first",
        ));
    }
    if container.state() == State::Suspended {
        return Err(Failure::refused(
            format_args!("cp with the suspended container {name}"),
            "resume it first",
        ));
    }
    Err(Failure::refused(
        format_args!("cp with the stopped container {name}"),
        "its files have gone with its microVM; start it, or keep files in a volume",
    ))
}

fn no_tar(failure: Failure) -> Failure {
    if failure.code == crate::error::NOT_FOUND {
        return Failure::refused(
            "cp with an image without tar",
            "the image needs a `tar` command",
        );
    }
    failure
}

/// Directory and last name of a path in the container; `.` is the directory itself.
fn split(path: &str) -> (String, String) {
    let path = if path.is_empty() { "/" } else { path };
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() {
        return ("/".to_owned(), ".".to_owned());
    }
    let absolute = if trimmed.starts_with('/') {
        trimmed.to_owned()
    } else {
        format!("/{trimmed}")
    };
    match absolute.rsplit_once('/') {
        Some((dir, name)) if !name.is_empty() => (
            if dir.is_empty() {
                "/".to_owned()
            } else {
                dir.to_owned()
            },
            name.to_owned(),
        ),
        _ => ("/".to_owned(), ".".to_owned()),
    }
}

/// What is at a path in the container.
async fn kind(cluster: &Cluster, container: &Container, path: &str) -> Result<&'static str> {
    let path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    for (flag, kind) in [("-d", "directory"), ("-e", "file")] {
        let test = ["test", flag, &path].map(str::to_owned);
        match exec::output(cluster, container, &test).await {
            Ok(_) => return Ok(kind),
            Err(failure) if failure.code == 1 && failure.message.contains("ended with 1") => {}
            Err(failure) if failure.code == crate::error::NOT_FOUND => return Ok("unknown"),
            Err(failure) => return Err(failure),
        }
    }
    Ok("nothing")
}

async fn from_container(
    cluster: &Cluster,
    container: &Container,
    path: &str,
    options: &Copy,
) -> Result<()> {
    if kind(cluster, container, path).await? == "nothing" {
        return Err(Failure::daemon(format_args!(
            "Could not find the file {path} in container {}",
            container.name
        )));
    }
    let (dir, name) = split(path);
    let flags = if options.follow_link { "-chf" } else { "-cf" };
    let command = ["tar", flags, "-", "-C", &dir, "--", &name].map(str::to_owned);
    let params = AttachParams::default()
        .stdout(true)
        .stderr(true)
        .container(container.spec().name)
        .max_stdout_buf_size(256 * 1024);
    let mut process = exec::open(cluster, container, &command, &params)
        .await
        .map_err(no_tar)?;
    let mut stdout = process
        .stdout()
        .ok_or_else(|| Failure::plain("no output"))?;
    let status = process.take_status();
    if options.destination == "-" {
        if terminal::stdout_is_terminal() {
            return Err(Failure::plain(
                "refusing to copy to the terminal, redirect output to a file",
            ));
        }
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = stdout.read(&mut buffer).await?;
            if count == 0 {
                break;
            }
            terminal::bytes(false, &buffer[..count])?;
        }
        return ended(status).await;
    }
    let target = Place::of(Path::new(&options.destination), &name)?;
    let (mut pipe, reader) = tokio::io::duplex(256 * 1024);
    let unpacked = tokio::task::spawn_blocking({
        let reader = tokio_util::io::SyncIoBridge::new(reader);
        let name = name.clone();
        move || unpack::unpack(reader, &target.directory, &name, &target.name)
    });
    let copied = tokio::io::copy(&mut stdout, &mut pipe).await;
    drop(pipe);
    let bytes = unpacked.await.map_err(Failure::plain)??;
    copied?;
    ended(status).await?;
    if !options.quiet && terminal::stdout_is_terminal() {
        terminal::note(&format!(
            "Successfully copied {} to {}",
            units::decimal_bytes(bytes),
            options.destination
        ));
    }
    Ok(())
}

async fn ended(
    status: Option<
        impl Future<Output = Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Status>>,
    >,
) -> Result<()> {
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    match streams::exit_of(status.as_ref()).map_err(no_tar)? {
        0 => Ok(()),
        code => Err(Failure::daemon(format_args!(
            "tar in the container ended with {code}"
        ))),
    }
}

/// Where a copy goes, by docker's rules: into a directory that is there, else as that name.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    directory: PathBuf,
    name: String,
}

impl Place {
    fn of(destination: &Path, source: &str) -> Result<Self> {
        let slash = destination.to_string_lossy().ends_with('/');
        if destination.is_dir() {
            return Ok(Self {
                directory: destination.to_owned(),
                name: source.to_owned(),
            });
        }
        if slash {
            return Err(Failure::plain(format_args!(
                "destination directory {} does not exist",
                destination.display()
            )));
        }
        let directory = match destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        if !directory.is_dir() {
            return Err(Failure::plain(format_args!(
                "invalid output path: directory \"{}\" does not exist",
                directory.display()
            )));
        }
        let name = match destination.components().next_back() {
            Some(Component::Normal(name)) => name.to_string_lossy().into_owned(),
            _ => source.to_owned(),
        };
        Ok(Self { directory, name })
    }
}

async fn to_container(
    cluster: &Cluster,
    container: &Container,
    path: &str,
    options: &Copy,
) -> Result<()> {
    let there = kind(cluster, container, path).await?;
    let source = options.source.clone();
    let (dir, name) = if source == "-" {
        if there != "directory" {
            return Err(Failure::daemon(format_args!(
                "extraction point is not a directory: {path}"
            )));
        }
        (
            if path.is_empty() {
                "/".to_owned()
            } else {
                path.to_owned()
            },
            String::new(),
        )
    } else {
        let local = Path::new(&source);
        if std::fs::symlink_metadata(local).is_err() {
            return Err(Failure::plain(format_args!(
                "lstat {source}: no such file or directory"
            )));
        }
        // `DIR/.` is what is in the directory.
        let own = match local.file_name() {
            Some(name) if !source.ends_with("/.") => name.to_string_lossy().into_owned(),
            _ => ".".to_owned(),
        };
        match there {
            "directory" => (path.to_owned(), own),
            "nothing" if path.ends_with('/') && local.is_file() => {
                return Err(Failure::daemon(format_args!(
                    "no such directory: {path} in container {}",
                    container.name
                )));
            }
            "file" if local.is_dir() => return Err(Failure::plain("cannot copy directory")),
            _ => split(path),
        }
    };
    let mut flags = String::from("-xf");
    if !options.archive {
        flags = "-xof".to_owned();
    }
    let dir = if dir.starts_with('/') {
        dir
    } else {
        format!("/{dir}")
    };
    let command = ["tar", &flags, "-", "-C", &dir].map(str::to_owned);
    let params = AttachParams::default()
        .stdin(true)
        .stdout(true)
        .stderr(true)
        .container(container.spec().name)
        .max_stdin_buf_size(256 * 1024);
    let mut process = exec::open(cluster, container, &command, &params)
        .await
        .map_err(no_tar)?;
    let mut stdin = process.stdin().ok_or_else(|| Failure::plain("no input"))?;
    let status = process.take_status();
    let (writer, mut pipe) = tokio::io::duplex(256 * 1024);
    let follow = options.follow_link;
    let packing = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        let mut writer = tokio_util::io::SyncIoBridge::new(writer);
        if source == "-" {
            std::io::copy(&mut std::io::stdin().lock(), &mut writer)?;
            return Ok(());
        }
        let mut archive = tar::Builder::new(writer);
        archive.follow_symlinks(follow);
        let local = Path::new(&source);
        if local.is_dir() {
            archive.append_dir_all(&name, local)?;
        } else {
            archive.append_path_with_name(local, &name)?;
        }
        archive.finish()
    });
    let copied = tokio::io::copy(&mut pipe, &mut stdin).await;
    drop(stdin.shutdown().await);
    packing.await.map_err(Failure::plain)??;
    let finished = ended(status).await;
    if finished.is_ok()
        && let Ok(bytes) = copied
        && !options.quiet
        && terminal::stdout_is_terminal()
    {
        terminal::note(&format!(
            "Successfully copied {} to {}:{path}",
            units::decimal_bytes(bytes),
            container.name
        ));
    }
    finished
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_containers() {
        assert_eq!(of_container("web:/etc/x"), Some(("web", "/etc/x")));
        for here in ["/a:b", "./a:b", "-", "plain"] {
            assert_eq!(of_container(here), None, "{here}");
        }
        for (path, dir, name) in [
            ("/etc/passwd", "/etc", "passwd"),
            ("/", "/", "."),
            ("", "/", "."),
            ("tmp/", "/", "tmp"),
            ("/a/b/", "/a", "b"),
        ] {
            assert_eq!(split(path), (dir.to_owned(), name.to_owned()), "{path}");
        }
    }

    #[test]
    fn a_copy_goes_into_a_directory_or_takes_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let into = Place::of(dir.path(), "x").unwrap();
        assert_eq!(
            (into.directory.as_path(), into.name.as_str()),
            (dir.path(), "x")
        );
        let named = Place::of(&dir.path().join("y"), "x").unwrap();
        assert_eq!(
            (named.directory.as_path(), named.name.as_str()),
            (dir.path(), "y")
        );
        assert!(Place::of(&dir.path().join("no/y"), "x").is_err());
        assert!(Place::of(Path::new(&format!("{}/no/", dir.path().display())), "x").is_err());
    }
}
