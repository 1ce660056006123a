//! Completion scripts, names of containers while typing, man pages.

use std::{io, path::Path, time::Duration};

use clap::CommandFactory as _;
use clap_complete::{
    CompletionCandidate,
    env::{Bash, EnvCompleter, Fish, Zsh},
};

use crate::{
    cli::{Cli, Shell},
    cluster::{Cluster, Target},
    error::{Failure, Result},
    terminal,
    verbs::snapshot,
};

/// How long a shell waits for names.
const LIMIT: Duration = Duration::from_secs(2);

/// Names of the namespace's containers, as completions. None if the cluster cannot be asked.
pub(crate) fn containers() -> Vec<CompletionCandidate> {
    candidates(async |cluster| {
        let containers = cluster.containers().await?.into_iter();
        let now = jiff::Timestamp::now();
        let named = containers.map(|container| {
            let help = format!("{} {}", container.image(), container.status_text(now));
            CompletionCandidate::new(container.name).help(Some(help.into()))
        });
        Ok(named.collect())
    })
}

/// Names of the namespace's snapshots, as completions. None if the cluster cannot be asked.
pub(crate) fn snapshots() -> Vec<CompletionCandidate> {
    candidates(async |cluster| {
        let names = snapshot::names(cluster).await?.into_iter();
        Ok(names.map(CompletionCandidate::new).collect())
    })
}

fn candidates(
    ask: impl AsyncFnOnce(&Cluster) -> Result<Vec<CompletionCandidate>>,
) -> Vec<CompletionCandidate> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    else {
        return Vec::new();
    };
    let target = Target {
        kubeconfig: std::env::var_os("HYPER_KUBECONFIG").map(Into::into),
        context: std::env::var("HYPER_CONTEXT").ok(),
        namespace: std::env::var("HYPER_NAMESPACE").ok(),
    };
    let names = async { ask(&target.connect().await?).await };
    runtime
        .block_on(async { tokio::time::timeout(LIMIT, names).await })
        .ok()
        .and_then(Result::ok)
        .unwrap_or_default()
}

/// Prints the script that makes a shell ask hyper.
pub(crate) fn print(shell: Shell) {
    let mut script = Vec::new();
    let completer: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let written = completer.write_registration("COMPLETE", "hyper", "hyper", "hyper", &mut script);
    // A vector takes everything.
    drop(written);
    terminal::out(&String::from_utf8_lossy(&script));
}

/// Writes hyper.1 and a page for each verb.
pub(crate) fn man_pages(directory: &Path) -> Result<()> {
    let failed =
        |error: io::Error| Failure::plain(format_args!("{}: {error}", directory.display()));
    std::fs::create_dir_all(directory).map_err(failed)?;
    let mut command = Cli::command();
    command.build();
    clap_mangen::generate_to(command, directory).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn pages_are_written() {
        let dir = tempfile::tempdir().unwrap();
        man_pages(dir.path()).unwrap();
        for page in ["hyper.1", "hyper-run.1", "hyper-compose-up.1"] {
            let text = std::fs::read_to_string(dir.path().join(page)).unwrap();
            assert!(text.contains(".TH"), "{page}");
        }
    }

    #[test]
    fn help_fits_one_screen() {
        let help = Cli::command().render_help().to_string();
        assert!(help.lines().count() <= 60, "{} lines", help.lines().count());
        assert!(
            help.lines().all(|line| line.chars().count() <= 100),
            "{help}"
        );
    }
}
