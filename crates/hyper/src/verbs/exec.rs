//! `exec` and `top`.

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Resource as _,
    api::{AttachParams, AttachedProcess},
    core::Request,
};

use super::run::finish;
use crate::{
    cli::{Exec, Top},
    cluster::Cluster,
    error::{Failure, Result},
    model::{Container, State},
    spec,
    streams::{self, End, Streams},
    terminal,
};

/// Begins a process in a container. Why it cannot be, in the server's words.
pub(crate) async fn open(
    cluster: &Cluster,
    container: &Container,
    command: &[String],
    params: &AttachParams,
) -> Result<AttachedProcess> {
    match cluster
        .pods()
        .exec(container.pod_name(), command.to_vec(), params)
        .await
    {
        Ok(process) => Ok(process),
        Err(kube::Error::UpgradeConnection(_)) => {
            Err(refusal(cluster, container, command, params).await)
        }
        Err(error) => Err(error.into()),
    }
}

/// The client drops the body of a refused upgrade; asked again, the server says it again.
async fn refusal(
    cluster: &Cluster,
    container: &Container,
    command: &[String],
    params: &AttachParams,
) -> Failure {
    let said = async {
        let path = Pod::url_path(&(), Some(&cluster.namespace));
        let request = Request::new(path)
            .exec(container.pod_name(), command.to_vec(), params)
            .map_err(Failure::plain)?;
        let (mut parts, body) = request.into_parts();
        for (name, value) in [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "aHlwZXIgYXNrcyBhZ2Fpbg=="),
            ("sec-websocket-protocol", "v5.channel.k8s.io"),
        ] {
            parts.headers.insert(
                http::HeaderName::from_static(name),
                http::HeaderValue::from_static(value),
            );
        }
        let text = cluster
            .client
            .request_text(http::Request::from_parts(parts, body))
            .await?;
        Ok::<_, Failure>(text)
    };
    match said.await {
        Ok(_) => Failure::daemon("the server refused the connection"),
        Err(failure) => {
            let message = failure
                .message
                .strip_prefix("Error response from daemon: ")
                .unwrap_or(&failure.message)
                .to_owned();
            streams::start_failure(&message)
        }
    }
}

fn running(container: &Container) -> Result<()> {
    match container.state() {
        State::Running => Ok(()),
        State::Paused => Err(Failure::daemon(format_args!(
            "Container {} is paused, unpause the container before exec",
            container.id
        ))),
        State::Suspended => Err(Failure::daemon(format_args!(
            "Container {} is suspended, resume the container before exec",
            container.id
        ))),
        State::Restarting => Err(Failure::daemon(format_args!(
            "Container {} is restarting, wait until the container is running",
            container.id
        ))),
        _ => Err(Failure::daemon(format_args!(
            "container {} is not running",
            container.id
        ))),
    }
}

/// The command with what Kubernetes cannot say of it: variables and a directory.
fn wrapped(options: &Exec, command: &[String]) -> Result<Vec<String>> {
    if let Some(user) = &options.user {
        return Err(Failure::refused(
            format_args!("exec --user {user}"),
            "exec runs as the container's user; set that with run --user",
        ));
    }
    if options.privileged {
        return Err(Failure::refused(
            "exec --privileged",
            "give the container what it needs with run --cap-add",
        ));
    }
    let mut whole = Vec::new();
    let environment = spec::environment(&options.env_file, &options.env)?;
    if !environment.is_empty() {
        whole.push("env".to_owned());
        whole.extend(
            environment
                .iter()
                .map(|(key, value)| format!("{key}={value}")),
        );
    }
    if let Some(dir) = &options.workdir {
        whole.extend(["/bin/sh", "-c", "cd \"$0\" && exec \"$@\"", dir].map(str::to_owned));
    }
    if options.detach {
        // The connection goes with hyper, and so would the process.
        whole.extend(
            [
                "/bin/sh",
                "-c",
                "\"$@\" < /dev/null > /dev/null 2>&1 &",
                "sh",
            ]
            .map(str::to_owned),
        );
    }
    whole.extend(command.iter().cloned());
    Ok(whole)
}

/// `exec`.
pub(crate) async fn run(cluster: &Cluster, options: &Exec) -> Result<()> {
    let (name, command) = options
        .container_and_command
        .split_first()
        .ok_or_else(|| Failure::usage("\"hyper exec\" requires at least 2 arguments."))?;
    let container = cluster.find(name).await?;
    in_container(cluster, &container, options, command).await
}

/// Runs a command in a container that was found.
pub(crate) async fn in_container(
    cluster: &Cluster,
    container: &Container,
    options: &Exec,
    command: &[String],
) -> Result<()> {
    running(container)?;
    if options.tty && options.interactive && !options.detach && !terminal::stdin_is_terminal() {
        return Err(Failure::plain("the input device is not a TTY"));
    }
    let keys = streams::detach_keys(&options.detach_keys)?;
    let command = wrapped(options, command)?;
    let tty = options.tty && !options.detach;
    let params = AttachParams::default()
        .stdin(options.interactive && !options.detach)
        .stdout(true)
        .stderr(!tty)
        .tty(tty)
        .container(container.spec().name);
    let mut process = open(cluster, container, &command, &params).await?;
    if options.detach {
        let status = match process.take_status() {
            Some(status) => status.await,
            None => None,
        };
        return finish(streams::exit_of(status.as_ref())?);
    }
    let joined = Streams {
        stdin: options.interactive,
        tty,
        detach_keys: if tty { keys } else { Vec::new() },
        ..Streams::default()
    };
    match streams::join(process, joined, None).await? {
        End::Detached => Ok(()),
        End::Ended(status) => finish(streams::exit_of(status.as_deref())?),
    }
}

/// Output of a command in a container.
pub(crate) async fn output(
    cluster: &Cluster,
    container: &Container,
    command: &[String],
) -> Result<String> {
    use tokio::io::AsyncReadExt as _;
    let params = AttachParams::default()
        .stdout(true)
        .stderr(true)
        .container(container.spec().name);
    let mut process = open(cluster, container, command, &params).await?;
    let (mut out, mut error) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let status = process.take_status();
    tokio::join!(
        async {
            if let Some(mut stdout) = stdout {
                drop(stdout.read_to_end(&mut out).await);
            }
        },
        async {
            if let Some(mut stderr) = stderr {
                drop(stderr.read_to_end(&mut error).await);
            }
        }
    );
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    match streams::exit_of(status.as_ref())? {
        0 => Ok(String::from_utf8_lossy(&out).into_owned()),
        code => Err(Failure::daemon(format_args!(
            "{} in the container ended with {code}: {}",
            command[0],
            String::from_utf8_lossy(&error).trim()
        ))),
    }
}

/// `top`: the container's own `ps`, or what `/proc` says if it has none.
pub(crate) async fn top(cluster: &Cluster, options: &Top) -> Result<()> {
    let container = cluster.find(&options.container).await?;
    running(&container)?;
    let mut command = vec!["ps".to_owned()];
    command.extend(options.options.iter().cloned());
    let table = match output(cluster, &container, &command).await {
        Ok(table) => table,
        Err(failure) if failure.code == crate::error::NOT_FOUND => {
            return Err(Failure::refused(
                "top of an image without ps",
                "`hyper stats` shows what the container uses",
            ));
        }
        Err(failure) => return Err(failure),
    };
    terminal::out(&table);
    Ok(())
}
