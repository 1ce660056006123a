//! The installed OCI runtime (runc, crun): the commands of it that are used.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use hypernetes_runtime::RuntimeError;
use hypernetes_types::ContainerId;
use oci_spec::runtime::LinuxResources;
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use crate::records::{failed, storage};

/// What programs find others by. Nothing else of our environment is theirs: a runtime would act on
/// variables of the service manager.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Longest text of a failed program that is passed on.
const MAX_MESSAGE: usize = 1024;

/// The program and the directory of its own state.
#[derive(Debug, Clone)]
pub(crate) struct Oci {
    pub(crate) program: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) patience: Duration,
}

/// The end of what a program said, without what would break a line.
pub(crate) fn message(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let text: String = text.trim().chars().map(plain).collect();
    let from = text.len().saturating_sub(MAX_MESSAGE);
    let from = (from..=text.len()).find(|index| text.is_char_boundary(*index));
    text[from.unwrap_or(0)..].to_owned()
}

impl Oci {
    /// The option that names the directory of its state.
    pub(crate) fn root_option(&self) -> OsString {
        let mut option = OsString::from("--root=");
        option.push(&self.root);
        option
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env_clear()
            .env("PATH", PATH)
            .current_dir("/")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .arg(self.root_option());
        command
    }

    async fn run<'a>(
        &self,
        action: &'static str,
        args: impl IntoIterator<Item = &'a OsStr>,
        input: Option<Vec<u8>>,
    ) -> Result<(), RuntimeError> {
        let mut command = self.command();
        command
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if input.is_some() {
            command.stdin(Stdio::piped());
        }
        let work = async {
            let mut child = command.spawn()?;
            if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
                stdin.write_all(&input).await?;
            }
            child.wait_with_output().await
        };
        let output = match timeout(self.patience, work).await {
            Ok(output) => output.map_err(|error| storage(action, error))?,
            Err(late) => return Err(storage(action, late)),
        };
        match output.status.success() {
            true => Ok(()),
            false => Err(failed(action, message(&output.stderr))),
        }
    }

    /// Runs the program of a created container.
    pub(crate) async fn start(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let args = ["start", id.as_str()].map(OsStr::new);
        self.run("start the container", args, None).await
    }

    /// Sends a signal to a container's first process, or to all of them.
    pub(crate) async fn kill(
        &self,
        id: &ContainerId,
        signal: u32,
        all: bool,
    ) -> Result<(), RuntimeError> {
        let signal = signal.to_string();
        let args = match all {
            true => vec!["kill", "--all", id.as_str(), &signal],
            false => vec!["kill", id.as_str(), &signal],
        };
        let args = args.into_iter().map(OsStr::new);
        self.run("send a signal to the container", args, None).await
    }

    /// Makes the runtime forget a container, if it knows it. Kills what runs.
    pub(crate) async fn delete(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        if !self.root.join(id.as_str()).exists() {
            return Ok(());
        }
        let args = ["delete", "--force", id.as_str()].map(OsStr::new);
        self.run("clear the container away", args, None).await
    }

    /// Changes the limits of a container that has not ended.
    pub(crate) async fn update(
        &self,
        id: &ContainerId,
        resources: &LinuxResources,
        draft: &Path,
    ) -> Result<(), RuntimeError> {
        let action = "change the container's limits";
        let bytes = serde_json::to_vec(resources).map_err(|error| storage(action, error))?;
        let written = tokio::fs::write(draft, bytes).await;
        written.map_err(|error| storage(action, error))?;
        let args = [
            OsStr::new("update"),
            OsStr::new("--resources"),
            draft.as_os_str(),
            OsStr::new(id.as_str()),
        ];
        self.run(action, args, None).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_of_one_line() {
        assert_eq!(message(b" a\nb\x1bc "), "a b c");
        let long = "\u{e9}".repeat(MAX_MESSAGE);
        assert!(message(long.as_bytes()).len() <= MAX_MESSAGE);
    }
}
