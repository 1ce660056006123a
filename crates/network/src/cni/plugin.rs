//! Runs plugins (CNI specification, sections 2 and 4).

use std::{path::PathBuf, process::Stdio, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use crate::NetworkError;

/// Most that a plugin may say.
const MAX_OUTPUT: u64 = 1 << 20;
/// How long one may take. The kubelet waits four minutes for a sandbox.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a plugin is asked for whom.
#[derive(Debug, Clone)]
pub(super) struct Call<'a> {
    /// `ADD`, `DEL`, `CHECK`, `GC`, `STATUS`.
    pub(super) command: &'static str,
    /// Where plugins are looked for, in order.
    pub(super) path: &'a [PathBuf],
    /// The attachment that the command is about; none for `GC` and `STATUS`.
    pub(super) attachment: Option<Attachment<'a>>,
}

/// An interface of a pod.
#[derive(Debug, Clone)]
pub(super) struct Attachment<'a> {
    pub(super) container: &'a str,
    /// Path of the network namespace; empty when it is gone.
    pub(super) namespace: &'a str,
    pub(super) interface: &'a str,
    pub(super) arguments: &'a str,
}

impl Call<'_> {
    /// Runs `plugin` with that input; its answer, if it gives one.
    pub(super) async fn run(
        &self,
        plugin: &str,
        input: Vec<u8>,
    ) -> Result<Option<Value>, NetworkError> {
        let failed = |message: String| NetworkError::Plugin {
            plugin: plugin.to_owned(),
            command: self.command,
            message,
        };
        let program = find(self.path, plugin).map_err(failed)?;
        let mut command = Command::new(program);
        command
            .env("CNI_COMMAND", self.command)
            .env("CNI_PATH", joined(self.path))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"] {
            command.env_remove(name);
        }
        if let Some(attachment) = &self.attachment {
            command
                .env("CNI_CONTAINERID", attachment.container)
                .env("CNI_NETNS", attachment.namespace)
                .env("CNI_IFNAME", attachment.interface)
                .env("CNI_ARGS", attachment.arguments);
        }
        let run = async {
            let mut child = command.spawn()?;
            let (mut stdin, stdout, stderr) =
                (child.stdin.take(), child.stdout.take(), child.stderr.take());
            let write = async {
                if let Some(pipe) = &mut stdin {
                    // One that does not read its input may still do its work.
                    drop(pipe.write_all(&input).await);
                }
                drop(stdin.take());
            };
            let ((), out, err) = tokio::join!(write, bounded(stdout), bounded(stderr));
            Ok::<_, std::io::Error>((child.wait().await?, out?, err?))
        };
        let (status, out, err) = timeout(PATIENCE, run)
            .await
            .map_err(|_late| failed(format!("no answer within {} s", PATIENCE.as_secs())))?
            .map_err(|error| failed(error.to_string()))?;
        let answer = serde_json::from_slice::<Value>(&out).ok();
        if !status.success() {
            let said = answer.as_ref().and_then(error_text).unwrap_or_else(|| {
                let text = if out.is_empty() { &err } else { &out };
                format!("{status}: {}", excerpt(text))
            });
            return Err(failed(said));
        }
        match answer {
            None if !out.trim_ascii().is_empty() => {
                Err(failed(format!("its answer is no JSON: {}", excerpt(&out))))
            }
            answer => Ok(answer),
        }
    }
}

async fn bounded(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // Closing it at the limit ends a plugin that writes for ever.
        pipe.take(MAX_OUTPUT).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

fn excerpt(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().take(1000).collect();
    text.trim().to_owned()
}

/// The words of an error result (section 5, "Error").
fn error_text(answer: &Value) -> Option<String> {
    let message = answer.get("msg")?.as_str()?;
    let code = answer.get("code").and_then(Value::as_u64).unwrap_or(0);
    let details = answer.get("details").and_then(Value::as_str).unwrap_or("");
    let details = if details.is_empty() {
        String::new()
    } else {
        format!("; {details}")
    };
    Some(excerpt(
        format!("{message}{details} (code {code})").as_bytes(),
    ))
}

fn joined(path: &[PathBuf]) -> std::ffi::OsString {
    std::env::join_paths(path).unwrap_or_default()
}

/// The program of a plugin.
fn find(path: &[PathBuf], plugin: &str) -> Result<PathBuf, String> {
    path.iter()
        .map(|dir| dir.join(plugin))
        .find(|program| program.is_file())
        .ok_or_else(|| {
            let dirs: Vec<_> = path.iter().map(|dir| dir.display().to_string()).collect();
            format!("no such program in {}", dirs.join(", "))
        })
}

/// Whether all of a list's programs are there.
pub(super) fn check_programs<'a>(
    path: &[PathBuf],
    plugins: impl Iterator<Item = &'a str>,
) -> Result<(), NetworkError> {
    for plugin in plugins {
        find(path, plugin)
            .map_err(|why| NetworkError::NotReady(format!("plugin {plugin}: {why}")))?;
    }
    Ok(())
}
