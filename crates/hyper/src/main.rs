//! The tenant's command line: docker's verbs over the Kubernetes API, with the caller's kubeconfig and
//! nothing else.
//!
//! A container is a pod with one container; labels and annotations below `hyper.hypernetes.io` say
//! what Kubernetes has no field for.
#![forbid(unsafe_code)]

mod cli;
mod cluster;
mod completion;
mod compose;
mod error;
mod format;
#[cfg(test)]
mod golden;
mod logs;
mod meta;
mod model;
mod names;
mod refusals;
mod spec;
mod streams;
#[cfg(test)]
mod surface;
mod terminal;
mod units;
mod usage;
mod verbs;

use std::process::ExitCode;

use clap::CommandFactory as _;
use clap_complete::CompleteEnv;

use crate::{cli::Cli, error::OWN};

fn main() -> ExitCode {
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        // Somebody was first; one provider is as good as the other.
    }
    CompleteEnv::with_factory(Cli::command)
        .bin("hyper")
        .complete();
    let args: Vec<String> = std::env::args_os()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let cli = match usage::parse(&args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &args),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            terminal::note(&format!("hyper: cannot start: {error}"));
            return ExitCode::from(OWN);
        }
    };
    let result = runtime.block_on(Box::pin(verbs::run(cli)));
    // A read of standard input may still wait; nothing is lost with it.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                terminal::note(&failure.message);
            }
            ExitCode::from(failure.code)
        }
    }
}

/// A command line that is not one: help is success.
fn refuse(error: &clap::Error, args: &[String]) -> ExitCode {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            terminal::out(&error.render().to_string());
            ExitCode::SUCCESS
        }
        _ => {
            let failure = usage::explain(error, args);
            terminal::note(&failure.message);
            ExitCode::from(failure.code)
        }
    }
}
