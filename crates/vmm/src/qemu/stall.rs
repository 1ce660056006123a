//! A VM that stands still because the host has no room for what its guest writes, and goes on when there is.
//!
//! QEMU stops a guest at ENOSPC before the guest hears of it (`werror=enospc`, the default of a disk), and writes again
//! when it is told to go on. So a full disk of the host costs a pod time and no data. Whether there is room is known only
//! by trying: others may be quicker.

use std::{sync::Arc, time::Duration};

use hypernetes_types::SandboxId;
use serde_json::json;
use tokio::{
    sync::{Mutex, broadcast::error::RecvError, watch},
    time::sleep,
};

use super::qmp::{Qmp, QmpError};

/// From one attempt to the next.
const PAUSE: Duration = Duration::from_secs(1);

/// Watches one VM until its VMM is gone, and tells `stalled` how it stands. `disks` is held by whoever needs the VM to
/// stand still.
pub(super) async fn watch(
    sandbox: SandboxId,
    qmp: Arc<Qmp>,
    disks: Arc<Mutex<()>>,
    stalled: watch::Sender<bool>,
) {
    let mut events = qmp.subscribe();
    // A VM that was taken over may stand still since nobody looked.
    loop {
        if let Err(error) = overcome(&sandbox, &qmp, &disks, &stalled).await {
            tracing::debug!(vm = %sandbox, %error, "cannot see whether a VM stands still");
        }
        loop {
            match events.recv().await {
                Ok(event) if event.name == "BLOCK_IO_ERROR" => break,
                Ok(_) => {}
                // What was missed may have been it.
                Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => return,
            }
        }
    }
}

/// Returns when the VM does not stand still for want of room.
async fn overcome(
    sandbox: &SandboxId,
    qmp: &Qmp,
    disks: &Mutex<()>,
    stalled: &watch::Sender<bool>,
) -> Result<(), QmpError> {
    if !is_out_of_room(qmp).await? {
        return Ok(());
    }
    stalled.send_replace(true);
    tracing::warn!(vm = %sandbox, "there is no room on the node for what a guest writes: its VM stands still until there is");
    loop {
        sleep(PAUSE).await;
        {
            let _turn = disks.lock().await;
            if is_out_of_room(qmp).await? {
                qmp.execute("cont", json!({})).await?;
            }
        }
        // It writes at once.
        sleep(PAUSE).await;
        if !is_out_of_room(qmp).await? {
            stalled.send_replace(false);
            tracing::info!(vm = %sandbox, "a VM that had no room goes on");
            return Ok(());
        }
    }
}

async fn is_out_of_room(qmp: &Qmp) -> Result<bool, QmpError> {
    let status = qmp.execute("query-status", json!({})).await?;
    Ok(status["status"] == "io-error")
}
