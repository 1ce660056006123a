//! A running container that stands still, by the freezer of its cgroup, and goes on.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    container::Container,
    error::{Attempt, GuestError},
    pod::Pod,
};

/// How long standing still may take: a process may be waiting for a disk.
const PATIENCE: Duration = Duration::from_secs(5);

/// Freezes every process of a container, or lets them go on. On an error it goes on.
pub(crate) async fn set(pod: &Pod, id: &str, paused: bool) -> Result<(), GuestError> {
    let container = pod.container(id)?;
    let _one_at_a_time = container.pausing.lock().await;
    if !container.is_running() {
        let message = format!("container {id} is not running");
        return Err(GuestError::Precondition(message));
    }
    if container.is_paused() == paused {
        return Ok(());
    }
    let frozen = match paused {
        true => freeze(&container).await,
        false => Ok(()),
    };
    if frozen.is_err() || !paused {
        container
            .cgroup()
            .freeze(false)
            .attempt("thaw the container")?;
    }
    frozen?;
    if container.note_paused(paused) {
        pod.emit(container.state());
    }
    Ok(())
}

async fn freeze(container: &Container) -> Result<(), GuestError> {
    let cgroup = container.cgroup();
    cgroup.freeze(true).attempt("freeze the container")?;
    let deadline = Instant::now() + PATIENCE;
    while !cgroup.is_frozen() {
        if Instant::now() > deadline {
            let id = container.id();
            let message = format!("container {id} has a process that does not stand still");
            return Err(GuestError::Internal(message));
        }
        sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}
