//! A rehearsal: a VM that is nobody's goes through the motions of a pod, and forgets them.
//!
//! What a kernel does for the first time takes longer, and under emulation much longer, because its
//! code is translated then. So a VM that waits in the pool, and the one that a template is made of,
//! have run a container before: on a scratch disk like those of pods, from an image that holds
//! HyperStart and nothing else. No tenant's data can be in it: there is no tenant's data in what it
//! is given. Afterwards the guest unmounts, empties and forgets all of it, and the disks are taken
//! away.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use hypernetes_agent_api::{AgentClient, FEATURE_REHEARSAL, defaults, v1};
use hypernetes_image::{Limits, erofs};
use hypernetes_types::SandboxId;
use hypernetes_vmm::{Disk, Vm};
use tokio::{sync::OnceCell, time::timeout};
use tokio_stream::wrappers::WatchStream;

use crate::{
    api::SecurityConfig,
    error::RuntimeError,
    identity::{self, SCRATCH_SLOT},
    process::privileges,
    scratch::blocking,
    shared::Shared,
};

/// The rehearsal's program in its image, as HyperStart knows it, and the line that it writes.
const PROGRAM: &str = "/rehearsal";
const LINE: &str = "rehearsed\n";
/// Its container.
const CONTAINER: &str = "rehearsal";
const LAYER_SLOT: u32 = SCRATCH_SLOT + 1;
/// Size of its scratch disk: what pods usually have, for which there is a formatted disk already.
const SCRATCH_MIB: u64 = 10 * 1024;

/// The rehearsal's image: a layer with one program.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    disk: OnceCell<OwnedFd>,
    /// A guest has failed at it: VMs go without.
    given_up: AtomicBool,
}

impl Layer {
    /// A descriptor of the layer's disk.
    async fn open(&self, hyperstart: PathBuf) -> Result<File, RuntimeError> {
        let action = "make the image of the rehearsal";
        let make = blocking(action.to_owned(), move || make_layer(&hyperstart));
        let layer = self.disk.get_or_try_init(|| make).await?;
        let copy = layer.try_clone().map(File::from);
        copy.map_err(|error| crate::records::storage(action, error))
    }
}

fn make_layer(hyperstart: &std::path::Path) -> io::Result<OwnedFd> {
    let program = std::fs::read(hyperstart)?;
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    tar.append_data(
        &mut header,
        PROGRAM.trim_start_matches('/'),
        program.as_slice(),
    )?;
    let tar = tar.into_inner()?;
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut layer = File::from(rustix::fs::memfd_create("rehearsal", flags)?);
    erofs::write_layer(tar.as_slice(), &mut layer, &Limits::default()).map_err(io::Error::other)?;
    Ok(layer.into())
}

/// Rehearses in a VM that has no disks. After a failure the VM is good for nothing, and later ones are
/// not asked to rehearse.
pub(crate) async fn rehearse(
    shared: &Shared,
    vm: &dyn Vm,
    client: &AgentClient,
) -> Result<(), RuntimeError> {
    if !client.has(FEATURE_REHEARSAL) || shared.rehearsal.given_up.load(Ordering::Relaxed) {
        return Ok(());
    }
    let id = vm.record().sandbox;
    let waited = shared.config.deadlines.boot;
    let rehearsal = Rehearsal {
        shared,
        vm,
        client,
        id: &id,
    };
    let rehearsed = tokio::select! {
        rehearsed = timeout(waited, rehearsal.perform()) => {
            rehearsed.unwrap_or_else(|_late| Err(crate::guest::silent(&id, ACTION, waited)))
        }
        _ = vm.wait() => Err(rehearsal.failed("the VM has ended")),
    };
    // The VMM has the disk open, if it is there still; nobody else is to.
    let removed = shared.scratch.remove(&id).await;
    if rehearsed.is_err() {
        shared.rehearsal.given_up.store(true, Ordering::Relaxed);
    }
    rehearsed.and(removed)
}

const ACTION: &str = "rehearse";

struct Rehearsal<'a> {
    shared: &'a Shared,
    vm: &'a dyn Vm,
    client: &'a AgentClient,
    id: &'a SandboxId,
}

impl Rehearsal<'_> {
    fn failed(&self, message: &str) -> RuntimeError {
        RuntimeError::Guest {
            sandbox: self.id.to_string(),
            action: ACTION,
            message: message.to_owned(),
        }
    }

    async fn perform(&self) -> Result<(), RuntimeError> {
        let (scratch, layer) = tokio::try_join!(
            self.shared.scratch.create(self.id, SCRATCH_MIB),
            self.shared
                .rehearsal
                .open(self.shared.config.hyperstart.clone()),
        )?;
        for (slot, file, read_only) in [(SCRATCH_SLOT, scratch, false), (LAYER_SLOT, layer, true)] {
            let disk = Disk {
                slot,
                file,
                read_only,
            };
            self.vm.plug_disk(disk).await?;
        }
        self.converse().await?;
        for slot in [LAYER_SLOT, SCRATCH_SLOT] {
            self.vm.unplug_disk(slot).await?;
        }
        Ok(())
    }

    /// What is said to a guest until a container runs, and until it is forgotten.
    async fn converse(&self) -> Result<(), RuntimeError> {
        let (client, call) = (self.client, self.shared.config.deadlines.call);
        let refused =
            |error: hypernetes_agent_api::AgentError| crate::guest::error(self.id, ACTION, &error);
        let said = |status: tonic::Status| {
            crate::guest::status_error(self.id.to_string(), ACTION, &status)
        };
        client
            .configure_sandbox(identity::rehearsal_request()?, call)
            .await
            .map_err(refused)?;
        // Kept until the end, as of a pod.
        let _events = client
            .client()
            .events(v1::EventsRequest {})
            .await
            .map_err(said)?;
        client
            .list_containers(v1::ListContainersRequest {}, call)
            .await
            .map_err(refused)?;
        let created = client.create_container(container(), call);
        Box::pin(created).await.map_err(refused)?;
        let ack = |stdout| v1::OutputAck {
            id: CONTAINER.to_owned(),
            stdout,
            stderr: 0,
        };
        let (acks, stream) = tokio::sync::watch::channel(ack(0));
        let mut output = client
            .client()
            .output(WatchStream::new(stream))
            .await
            .map_err(said)?
            .into_inner();
        let start = v1::StartContainerRequest {
            id: CONTAINER.to_owned(),
        };
        client.start_container(start, call).await.map_err(refused)?;
        let mut line = Vec::new();
        while let Some(chunk) = output.message().await.map_err(said)? {
            line.extend_from_slice(&chunk.data);
            acks.send_replace(ack(line.len() as u64));
            if line.len() >= LINE.len() {
                break;
            }
        }
        if line != LINE.as_bytes() {
            return Err(self.failed("its container did not write what it should"));
        }
        drop(output);
        let remove = v1::RemoveContainerRequest {
            id: CONTAINER.to_owned(),
        };
        client
            .remove_container(remove, call)
            .await
            .map_err(refused)?;
        client
            .forget(v1::ForgetRequest {}, call)
            .await
            .map_err(refused)?;
        Ok(())
    }
}

/// A container as most are.
fn container() -> v1::CreateContainerRequest {
    let owned = |paths: &[&str]| paths.iter().map(|&path| path.to_owned()).collect();
    v1::CreateContainerRequest {
        id: CONTAINER.to_owned(),
        name: CONTAINER.to_owned(),
        layer_slots: vec![LAYER_SLOT],
        process: Some(v1::Process {
            args: vec![PROGRAM.to_owned()],
            cwd: "/".to_owned(),
            user: Some(v1::User::default()),
            ..privileges(&SecurityConfig::default())
        }),
        resources: Some(v1::Resources::default()),
        masked_paths: owned(defaults::MASKED_PATHS),
        readonly_paths: owned(defaults::READONLY_PATHS),
        termination_path: "/dev/termination-log".to_owned(),
        ..v1::CreateContainerRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[tokio::test]
    async fn the_image_is_made_once_and_holds_the_program() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("hyperstart");
        std::fs::write(&path, b"a program of some bytes").unwrap();
        let layer = Layer::default();
        let disk = layer.open(path.clone()).await.unwrap();
        let mut content = vec![0; usize::try_from(disk.metadata().unwrap().len()).unwrap()];
        disk.read_exact_at(&mut content, 0).unwrap();
        let has = |text: &[u8]| content.windows(text.len()).any(|window| window == text);
        assert!(has(b"a program of some bytes") && has(b"rehearsal"));
        // EROFS_SUPER_MAGIC_V1, little endian, behind the first KiB.
        assert_eq!(content[1024..1028], [0xe2, 0xe1, 0xf5, 0xe0]);
        std::fs::remove_file(&path).unwrap();
        layer.open(path).await.unwrap();
    }
}
