//! A command that is waited for, as probes and lifecycle hooks run one.

use std::time::Duration;

use hypernetes_runtime::{ExecConfig, Output, PodRuntime, Session};
use hypernetes_types::ContainerId;

use crate::{MAX_MESSAGE_SIZE, status::CriError, v1};

/// Output that fits the reply; what is beyond is discarded, as the API says (CVE-2022-1708).
const MAX_OUTPUT: usize = MAX_MESSAGE_SIZE - (64 << 10);

/// Runs a command to its end. One that does not end in time is killed.
pub(crate) async fn run(
    runtime: &dyn PodRuntime,
    id: &ContainerId,
    command: Vec<String>,
    limit: Option<Duration>,
) -> Result<v1::ExecSyncResponse, CriError> {
    let work = async {
        let config = ExecConfig {
            command,
            tty: false,
            stdin: false,
        };
        collect(runtime.exec(id, config).await?).await
    };
    match limit {
        None => work.await,
        // Dropping the session kills the process.
        Some(limit) => tokio::time::timeout(limit, work)
            .await
            .unwrap_or(Err(CriError::Timeout(limit))),
    }
}

async fn collect(mut session: Session) -> Result<v1::ExecSyncResponse, CriError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut room = MAX_OUTPUT;
    while let Some(piece) = session.output.recv().await {
        let (buffer, data) = match &piece {
            Output::Stdout(data) => (&mut stdout, data),
            Output::Stderr(data) => (&mut stderr, data),
        };
        let taken = data.len().min(room);
        buffer.extend_from_slice(&data[..taken]);
        room -= taken;
    }
    let lost = |_dropped| CriError::Lost("the command's exit code was lost");
    let exit_code = session.exit.await.map_err(lost)??;
    Ok(v1::ExecSyncResponse {
        stdout,
        stderr,
        exit_code,
    })
}
