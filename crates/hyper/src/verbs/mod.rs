//! One file a verb, or a few that go together.

mod clone;
mod compose;
mod context;
mod copy;
mod events;
mod exec;
mod images;
mod inspect;
mod launch;
mod lifecycle;
mod list;
mod logs;
mod network;
pub(crate) mod pause;
mod publish;
mod registry;
mod run;
pub(crate) mod snapshot;
mod stats;
mod system;
mod volume;
mod watch;

use crate::{
    cli::{
        Cli, Command, ComposeCommand, ComposeFiles, ContainerCommand, ContainerGroup, SystemCommand,
    },
    cluster::{Cluster, Target},
    completion,
    error::{Failure, Result},
};

/// Runs one command.
pub(crate) async fn run(cli: Cli) -> Result<()> {
    let target = Target::of(&cli);
    match cli.command {
        Command::Container(command) => {
            Box::pin(container(&target.connect().await?, *command)).await
        }
        Command::ContainerGroup { command } => match command {
            ContainerGroup::Ls(ps) => list::ps(&target.connect().await?, &ps).await,
            ContainerGroup::Prune(options) => {
                lifecycle::prune(&target.connect().await?, &options).await
            }
            ContainerGroup::Other(command) => {
                Box::pin(container(&target.connect().await?, *command)).await
            }
        },
        Command::Image(command) => images::run(&target, command).await,
        Command::ImageGroup { command } => images::group(&target, command).await,
        Command::Compose(compose) => project(&target, &compose.files, compose.command).await,
        Command::Up(top) => {
            project(&target, &top.files, crate::cli::ComposeCommand::Up(top.up)).await
        }
        Command::Down(top) => {
            project(
                &target,
                &top.files,
                crate::cli::ComposeCommand::Down(top.down),
            )
            .await
        }
        Command::Volume(command) => volume::run(&target.connect().await?, command).await,
        Command::Network(command) => network::run(&target.connect().await?, command).await,
        Command::Snapshot(command) => snapshot::run(&target.connect().await?, command).await,
        Command::Context(command) => context::run(&target, command),
        Command::Login(options) => registry::login(&target.connect().await?, &options).await,
        Command::Logout(options) => registry::logout(&target.connect().await?, &options).await,
        Command::Version(options) => system::version(&target, &options).await,
        Command::Info(options) => system::info(&target, &options).await,
        Command::System(command) => match command {
            SystemCommand::Info(options) => system::info(&target, &options).await,
            SystemCommand::Events(options) => events::run(&target.connect().await?, &options).await,
            SystemCommand::Prune(options) => {
                lifecycle::prune(&target.connect().await?, &options).await
            }
            SystemCommand::Df(_) => Err(Failure::refused(
                "system df",
                "disks are the node's; `hypernetes image` is the operator's view",
            )),
        },
        Command::Completion { shell } => {
            completion::print(shell);
            Ok(())
        }
        Command::Man { directory } => completion::man_pages(&directory),
    }
}

async fn container(cluster: &Cluster, command: ContainerCommand) -> Result<()> {
    match command {
        ContainerCommand::Run(options) => Box::pin(run::run(cluster, &options))
            .await
            .map_err(|failure| of_a_start("run", failure)),
        ContainerCommand::Create(options) => run::create(cluster, &options)
            .await
            .map_err(|failure| of_a_start("create", failure)),
        ContainerCommand::Ps(options) => list::ps(cluster, &options).await,
        ContainerCommand::Logs(options) => logs::run(cluster, &options).await,
        ContainerCommand::Exec(options) => exec::run(cluster, &options).await,
        ContainerCommand::Attach(options) => run::attach(cluster, &options).await,
        ContainerCommand::Start(options) => Box::pin(lifecycle::start(cluster, &options)).await,
        ContainerCommand::Stop(options) => lifecycle::stop(cluster, &options).await,
        ContainerCommand::Restart(options) => lifecycle::restart(cluster, &options).await,
        ContainerCommand::Kill(options) => lifecycle::kill(cluster, &options).await,
        ContainerCommand::Rm(options) => lifecycle::remove(cluster, &options).await,
        ContainerCommand::Wait(options) => lifecycle::wait(cluster, &options).await,
        ContainerCommand::Rename(options) => lifecycle::rename(cluster, &options).await,
        ContainerCommand::Inspect(options) => inspect::run(cluster, &options).await,
        ContainerCommand::Cp(options) => copy::run(cluster, &options).await,
        ContainerCommand::Port(options) => list::port(cluster, &options).await,
        ContainerCommand::Top(options) => exec::top(cluster, &options).await,
        ContainerCommand::Stats(options) => stats::run(cluster, &options).await,
        ContainerCommand::Events(options) => events::run(cluster, &options).await,
        ContainerCommand::Pause(options) => pause::pause(cluster, &options).await,
        ContainerCommand::Unpause(options) => pause::unpause(cluster, &options).await,
        ContainerCommand::Suspend(options) => pause::suspend(cluster, &options).await,
        ContainerCommand::Resume(options) => pause::resume(cluster, &options).await,
        ContainerCommand::Clone(options) => Box::pin(clone::run(cluster, &options)).await,
        ContainerCommand::Diff(_) => Err(Failure::refused(
            "diff",
            "compare with `hyper cp CONTAINER:PATH -`",
        )),
        ContainerCommand::Commit(_) => Err(Failure::refused(
            "commit",
            "build the image from a Dockerfile elsewhere, push it, and run that",
        )),
        ContainerCommand::Export(_) => Err(Failure::refused(
            "export",
            "`hyper cp CONTAINER:/ -` streams the files as a tar archive",
        )),
        ContainerCommand::Update(_) => Err(Failure::refused(
            "update",
            "create the container anew with other limits",
        )),
    }
}

/// docker's way to say that `run` or `create` itself failed, and not the container.
fn of_a_start(verb: &str, failure: Failure) -> Failure {
    let refused = failure.message.contains(" is not supported: ");
    if failure.code < crate::error::OWN || failure.message.is_empty() || refused {
        return failure;
    }
    let said = failure
        .message
        .strip_prefix("hyper: ")
        .unwrap_or(&failure.message);
    Failure {
        message: format!("hyper: {said}\n\nRun 'hyper {verb} --help' for more information"),
        ..failure
    }
}

async fn project(target: &Target, files: &ComposeFiles, command: ComposeCommand) -> Result<()> {
    Box::pin(compose::run(target, files, command)).await
}

/// Does something to each name; failures are said one by one, and the whole fails if one did.
pub(crate) async fn each<F, Fut>(names: &[String], mut act: F) -> Result<()>
where
    F: FnMut(String) -> Fut,
    Fut: Future<Output = Result<Option<String>>>,
{
    let mut failed = None;
    for name in names {
        match act(name.clone()).await {
            Ok(Some(text)) => crate::terminal::line(&text),
            Ok(None) => {}
            Err(error) => {
                crate::terminal::note(&error.message);
                failed = Some(error.code.max(1));
            }
        }
    }
    failed.map_or(Ok(()), |code| Err(Failure::exit(code)))
}
