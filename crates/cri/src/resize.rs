//! Pods that are resized in place: limits of containers, and the VM around them.
//!
//! The VM has room for the sum of its containers' limits and for the pod's own, within what was planned
//! when it was made. It grows before a limit does and shrinks after one has; memory that a guest
//! does not give back stays with it, and is asked for again with the next change. Huge pages are
//! memory beside the limits, and known only when a container is made: the kubelet's sums do not have them.

use hypernetes_runtime::{
    ContainerState, ContainerStatus, ContainerUpdate, ResourceConfig, SandboxStatus, SandboxUpdate,
};
use hypernetes_telemetry::chain;
use hypernetes_types::ContainerId;

use crate::{
    memo,
    resources::{self, VmSize},
    service::Service,
    status::CriError,
    v1,
};

const MIB: i64 = 1 << 20;

/// Limits that a VM is to have room for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Limits {
    /// Bytes.
    memory: i64,
    /// Bytes beside `memory`.
    huge_pages: i64,
    cpu_milli: i64,
}

impl Limits {
    fn size(self, overhead_mib: u32) -> VmSize {
        let up = |value: i64, unit: i64| {
            u32::try_from(value.max(0).saturating_add(unit - 1) / unit).unwrap_or(u32::MAX)
        };
        VmSize {
            vcpus: up(self.cpu_milli, 1000),
            memory_mib: up(self.memory.saturating_add(self.huge_pages), MIB)
                .saturating_add(overhead_mib),
        }
    }

    fn sum(containers: impl Iterator<Item = Self>) -> Self {
        containers.fold(Self::default(), |sum, limits| Self {
            memory: sum.memory.saturating_add(limits.memory),
            huge_pages: sum.huge_pages.saturating_add(limits.huge_pages),
            cpu_milli: sum.cpu_milli.saturating_add(limits.cpu_milli),
        })
    }

    fn or_more(self, other: Self) -> Self {
        Self {
            memory: self.memory.max(other.memory),
            huge_pages: self.huge_pages.max(other.huge_pages),
            cpu_milli: self.cpu_milli.max(other.cpu_milli),
        }
    }
}

fn limits_of(resources: &v1::LinuxContainerResources) -> Result<Limits, CriError> {
    Ok(resources::of_container("resources", resources)?.limits())
}

trait OfConfig {
    fn limits(&self) -> Limits;
}

impl OfConfig for ResourceConfig {
    fn limits(&self) -> Limits {
        let huge = self.huge_pages.values().copied();
        Limits {
            memory: self.memory_limit,
            huge_pages: i64::try_from(huge.fold(0, u64::saturating_add)).unwrap_or(i64::MAX),
            cpu_milli: self.cpu_limit_milli,
        }
    }
}

/// The pod's own limits, as they were asked for last.
fn limits_of_pod(sandbox: &SandboxStatus) -> Limits {
    let asked = memo::sandbox(&sandbox.config.memo).config;
    let resources = asked.and_then(|config| config.linux?.resources);
    resources
        .and_then(|resources| limits_of(&resources).ok())
        .unwrap_or_default()
}

/// Least and most that a VM can have.
fn range(sandbox: &SandboxStatus) -> (VmSize, VmSize) {
    let config = &sandbox.config;
    let least = VmSize {
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
    };
    let most = VmSize {
        vcpus: config.extras.max_vcpus.max(least.vcpus),
        memory_mib: config.extras.max_memory_mib.max(least.memory_mib),
    };
    (least, most)
}

fn within(size: VmSize, (least, most): (VmSize, VmSize)) -> VmSize {
    VmSize {
        vcpus: size.vcpus.clamp(least.vcpus, most.vcpus),
        memory_mib: size.memory_mib.clamp(least.memory_mib, most.memory_mib),
    }
}

impl Service {
    pub(crate) async fn update_resources(
        &self,
        request: v1::UpdateContainerResourcesRequest,
    ) -> Result<(), CriError> {
        let status = self.container(&request.container_id).await?;
        let update = request
            .linux
            .ok_or_else(|| CriError::invalid("linux", "must be given"))?;
        if status.config.host.is_some() {
            return self.update_on_host(&status, &update).await;
        }
        let sandbox = self.sandbox(status.sandbox.as_str()).await?;
        // One change of a pod at a time: each is about the sum.
        let ledger = self.carried.of(&sandbox.id);
        let _turn = ledger.lock().await;
        let mut asked = memo::container(&status.config.memo);
        let linux = asked.linux.get_or_insert_default();
        let old = linux.resources.take().unwrap_or_default();
        let merged = resources::merged(&old, &update);
        let config = resources::of_container("linux", &merged)?;
        self.check_memory("linux", config.memory_limit, &sandbox)?;

        let others = self.sum_of_live(&sandbox, Some(&status.id)).await;
        let sum = Limits::sum([others, config.limits()].into_iter());
        let wanted = sum.or_more(limits_of_pod(&sandbox));
        let wanted = within(wanted.size(self.config.vm.overhead_mib), range(&sandbox));
        self.grow(&sandbox, wanted, None).await?;
        linux.resources = Some(merged);
        let update = ContainerUpdate {
            resources: config,
            memo: memo::of_container(&asked),
            host: None,
        };
        self.runtime.update_container(&status.id, update).await?;
        self.shrink(&sandbox, wanted).await;
        Ok(())
    }

    /// New limits of a whole pod: the containers' own hold inside the VM, and the kubelet sets those
    /// of the cgroup around it. But the VM must have what they promise.
    pub(crate) async fn update_pod_resources(
        &self,
        request: &v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<(), CriError> {
        let sandbox = self.sandbox(&request.pod_sandbox_id).await?;
        if sandbox.config.host.is_some() {
            // The pod's cgroup is the kubelet's, and nothing else is around its containers.
            return Ok(());
        }
        let ledger = self.carried.of(&sandbox.id);
        let _turn = ledger.lock().await;
        let update = request.resources.clone().unwrap_or_default();
        let mut asked = memo::sandbox(&sandbox.config.memo);
        let config = asked.config.get_or_insert_default();
        let linux = config.linux.get_or_insert_default();
        let old = linux.resources.take().unwrap_or_default();
        let merged = resources::merged(&old, &update);
        let limits = limits_of(&merged)?;
        self.check_memory("resources", limits.memory, &sandbox)?;
        let (least, most) = range(&sandbox);
        if limits.size(0).vcpus > most.vcpus {
            let rule = format!(
                "is more than the {} CPUs of the pod's VM, which does not grow{}",
                most.vcpus,
                if most.vcpus > least.vcpus {
                    " further"
                } else {
                    ""
                },
            );
            return Err(CriError::invalid("resources.cpu_quota", rule));
        }
        linux.resources = Some(merged);
        let sum = self.sum_of_live(&sandbox, None).await;
        let wanted = sum.or_more(limits).size(self.config.vm.overhead_mib);
        let wanted = within(wanted, (least, most));
        self.grow(&sandbox, wanted, Some(memo::of_sandbox(&asked)))
            .await?;
        self.shrink(&sandbox, wanted).await;
        Ok(())
    }

    /// Makes room for the huge pages of a container that is about to be made.
    pub(crate) async fn make_room(
        &self,
        base: &str,
        sandbox: &SandboxStatus,
        container: &ResourceConfig,
    ) -> Result<(), CriError> {
        if container.huge_pages.is_empty() {
            return Ok(());
        }
        let others = self.sum_of_live(sandbox, None).await;
        let sum = Limits::sum([others, container.limits()].into_iter());
        let wanted = sum.or_more(limits_of_pod(sandbox));
        let wanted = wanted.size(self.config.vm.overhead_mib);
        let (least, most) = range(sandbox);
        if wanted.memory_mib > most.memory_mib {
            let rule = format!(
                "the pod's VM of {} MiB has no room for them beside the memory limits, {} MiB in all; the \
                 node's setting vm.resizeMemoryMiB lets VMs grow",
                most.memory_mib, wanted.memory_mib
            );
            return Err(CriError::invalid(format!("{base}.hugepage_limits"), rule));
        }
        let wanted = within(wanted, (least, most));
        self.grow(sandbox, wanted, None).await
    }

    /// What the containers of a pod that have not ended are promised, but for one.
    async fn sum_of_live(&self, sandbox: &SandboxStatus, but: Option<&ContainerId>) -> Limits {
        let containers = self.runtime.list_containers(Some(&sandbox.id)).await;
        let counted = |container: &&ContainerStatus| {
            container.state != ContainerState::Exited && but != Some(&container.id)
        };
        let counted = containers.iter().filter(counted);
        Limits::sum(counted.map(|container| container.config.resources.limits()))
    }

    /// Refuses a limit that the VM can never have room for.
    fn check_memory(
        &self,
        base: &str,
        limit: i64,
        sandbox: &SandboxStatus,
    ) -> Result<(), CriError> {
        let (least, most) = range(sandbox);
        let room = most.memory_mib.saturating_sub(self.config.vm.overhead_mib);
        let room = i64::from(room) * MIB;
        if limit <= room {
            return Ok(());
        }
        let rule = format!(
            "{limit} is more than the {room} bytes of the pod's VM, which does not grow{}",
            if most == least { "" } else { " further" },
        );
        Err(CriError::invalid(
            format!("{base}.memory_limit_in_bytes"),
            rule,
        ))
    }

    /// Makes a VM as large as is wanted, where it is smaller.
    async fn grow(
        &self,
        sandbox: &SandboxStatus,
        wanted: VmSize,
        memo: Option<String>,
    ) -> Result<(), CriError> {
        let update = SandboxUpdate {
            vcpus: wanted.vcpus.max(sandbox.vcpus),
            memory_mib: wanted.memory_mib.max(sandbox.memory_mib),
            memo,
        };
        let same = (update.vcpus, update.memory_mib) == (sandbox.vcpus, sandbox.memory_mib);
        if same && update.memo.is_none() {
            return Ok(());
        }
        Ok(self.runtime.resize_sandbox(&sandbox.id, update).await?)
    }

    /// Makes a VM as small as is wanted, as far as its guest lets us.
    async fn shrink(&self, sandbox: &SandboxStatus, wanted: VmSize) {
        let Some(now) = self.runtime.sandbox(&sandbox.id).await else {
            return;
        };
        if (now.vcpus, now.memory_mib) == (wanted.vcpus, wanted.memory_mib) {
            return;
        }
        let update = SandboxUpdate {
            vcpus: wanted.vcpus,
            memory_mib: wanted.memory_mib,
            memo: None,
        };
        if let Err(error) = self.runtime.resize_sandbox(&sandbox.id, update).await {
            tracing::warn!(sandbox = %sandbox.id, error = %chain(&error), "a VM stays larger than its pod");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_holds_what_it_must_within_what_was_planned() {
        let limits = Limits {
            memory: (1 << 30) + 1,
            huge_pages: 0,
            cpu_milli: 1001,
        };
        let size = limits.size(64);
        assert_eq!((size.vcpus, size.memory_mib), (2, 1089));
        let at = |vcpus, memory_mib| VmSize { vcpus, memory_mib };
        assert_eq!(within(size, (at(1, 320), at(1, 512))), at(1, 512));
        assert_eq!(within(at(0, 64), (at(1, 320), at(4, 512))), at(1, 320));
        let sum = Limits::sum([limits, limits].into_iter());
        assert_eq!(sum.cpu_milli, 2002);
        let huge = Limits {
            huge_pages: 2 << 20,
            ..limits
        };
        assert_eq!(huge.size(64).memory_mib, 1091);
        let most = Limits {
            memory: i64::MAX,
            ..Limits::default()
        };
        assert_eq!(Limits::sum([most, most].into_iter()).size(1).vcpus, 0);
    }
}
