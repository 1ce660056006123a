//! New limits of a container.

use std::{fs, sync::Arc};

use hypernetes_runtime::{ContainerUpdate, RuntimeError};
use oci_spec::runtime::{LinuxResources, Spec};

use crate::{
    cgroup::Hierarchies,
    records::{ContainerPhase, ContainerRecord, blocking, invalid, state, storage},
    runtime::{Container, Inner},
    spec,
};

/// Changes the limits at once, or for the start that is to come. Call with the sandbox's work lock.
pub(crate) async fn apply(
    inner: &Arc<Inner>,
    container: &Container,
    update: ContainerUpdate,
) -> Result<(), RuntimeError> {
    let record = container.record();
    let limits = update
        .host
        .ok_or_else(|| invalid("host", "must be given for a container on the host"))?;
    let cgroups = blocking("find the host's cgroups", Hierarchies::read).await?;
    let resources = spec::resources(&limits, &cgroups, &record.cgroup)?;
    let bundle = inner.bundle(&record.id);
    match record.phase {
        ContainerPhase::Running => {
            let draft = bundle.join("update.json");
            inner.oci.update(&record.id, &resources, &draft).await?;
        }
        ContainerPhase::Created => {
            let path = bundle.join("config.json");
            blocking("change the container's configuration", move || {
                let bytes = rewritten(&fs::read(&path)?, resources)?;
                let draft = path.with_extension("tmp");
                fs::write(&draft, bytes)?;
                fs::rename(draft, path)
            })
            .await?;
        }
        phase => {
            let phase = format!("{phase:?}").to_lowercase();
            return Err(state(
                "change the limits of",
                "container",
                &record.id,
                phase,
            ));
        }
    }
    let changed = |record: &mut ContainerRecord| {
        record.config.resources = update.resources;
        record.config.memo = update.memo;
        if let Some(host) = &mut record.config.host {
            host.limits = limits;
        }
    };
    inner.change_container(container, changed).await.map(drop)
}

fn rewritten(config: &[u8], mut resources: LinuxResources) -> std::io::Result<Vec<u8>> {
    let mut spec: Spec = serde_json::from_slice(config)?;
    let mut linux = spec.linux().clone().unwrap_or_default();
    let devices = linux
        .resources()
        .as_ref()
        .and_then(|old| old.devices().clone());
    resources.set_devices(devices);
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
    Ok(serde_json::to_vec(&spec)?)
}

/// The first process of a container, as its configuration has it. Blocks.
pub(crate) fn first_process(
    bundle: &std::path::Path,
) -> Result<oci_spec::runtime::Process, RuntimeError> {
    let action = "read the container's configuration";
    let bytes = fs::read(bundle.join("config.json")).map_err(|error| storage(action, error))?;
    let spec: Spec = serde_json::from_slice(&bytes).map_err(|error| storage(action, error))?;
    let process = spec.process().clone();
    process.ok_or_else(|| storage(action, std::io::Error::other("it has no process")))
}
