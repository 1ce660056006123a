//! The operator's binary: everything on one machine, and the tools around it.
#![forbid(unsafe_code)]

mod admin;
mod cli;
mod debug;
mod doctor;
mod image;
mod kernel;
mod lock;
mod logs;
mod node;
mod node_config;
mod parts;
mod paths;
mod tenant;
mod terminal;
mod up;

use std::{io, process::ExitCode};

use clap::{CommandFactory, Parser};
use hypernetes_telemetry::{LogFormat, traces};

use crate::{
    cli::{Cli, Command},
    paths::Paths,
};

/// Objects come and go by the ten thousand: the system's allocator keeps several times what is in use.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::VmmLaunch { args } = &cli.command {
        // Before anything else: this process is about to become the VMM.
        return launch(args);
    }
    if let Command::PausePod { .. } = &cli.command {
        // No more than it needs: one such process is in each pod that shares its processes.
        return match hypernetes_hostpods::pause() {
            Ok(never) => match never {},
            Err(error) => fail(&anyhow::Error::new(error)),
        };
    }
    let format = match cli.log_format {
        cli::LogFormat::Text => LogFormat::Text,
        cli::LogFormat::Json => LogFormat::Json,
    };
    let traces = match &cli.command {
        Command::Up(options) => options.tracing.traces(),
        Command::Node(options) => options.tracing.traces(),
        _ => None,
    };
    if traces.is_none() {
        hypernetes_telemetry::init(&cli.log, format);
    }
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        tracing::debug!("a TLS provider is installed already");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("cannot start")),
    };
    let _exporting = match traces {
        Some(traces) => {
            let _entered = runtime.enter();
            match traces::init(&cli.log, format, "hypernetes", &traces) {
                Ok(exporting) => Some(exporting),
                Err(error) => return fail(&anyhow::Error::new(error)),
            }
        }
        None => None,
    };
    match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let paths = Paths::new(std::path::absolute(&cli.state_dir)?);
    match cli.command {
        Command::Up(options) => up::run(&paths, *options).await?,
        Command::Node(options) => node::run(&paths, options).await?,
        Command::Tenant(command) => tenant::run(&paths, command).await?,
        Command::Kernel(command) => return kernel::run(&paths, command).await,
        Command::Image(command) => image::run(&paths, command).await?,
        Command::Doctor(options) => return doctor::run(&paths, &options).await,
        Command::Console(options) => {
            let text = admin::console(&paths.admin_socket(), options.pod).await?;
            terminal::line(text.trim_end());
        }
        Command::Debug(options) => return debug::run(&paths.admin_socket(), options).await,
        Command::Backup(options) => backup(&paths, options).await?,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "hypernetes", &mut io::stdout());
        }
        Command::PausePod { .. } => anyhow::bail!("pause-pod is the daemon's own"),
        Command::VmmLaunch { .. } => anyhow::bail!("vmm-launch is the daemon's own"),
    }
    Ok(ExitCode::SUCCESS)
}

async fn backup(paths: &Paths, options: cli::Backup) -> anyhow::Result<()> {
    let path = std::path::absolute(&options.file)?;
    let revision = admin::backup(&paths.admin_socket(), path.clone()).await?;
    terminal::line(&format!("{} (revision {revision})", path.display()));
    Ok(())
}

fn launch(args: &[String]) -> ExitCode {
    let spec = args.last().and_then(|text| text.parse().ok());
    let Some(spec) = spec else {
        return fail(&anyhow::anyhow!("vmm-launch is called by the daemon only"));
    };
    let error = hypernetes_vmm::launcher::exec_from_fd(spec);
    fail(&anyhow::Error::new(error))
}

#[allow(
    clippy::print_stderr,
    reason = "the last word of a command that failed"
)]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
