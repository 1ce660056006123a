//! The CPUs of the host that a VM's virtual CPUs run on: those of all of its containers that name some.
//!
//! A container without a set asks for nothing. The virtual CPUs are the pod's, so that a set is not
//! one container's alone.

use hypernetes_types::{ContainerId, CpuSet};

use super::Actor;
use crate::{container::Phase, error::RuntimeError};

impl Actor {
    /// The union, with `changed` instead of what a container's record says.
    fn cpus(&self, changed: Option<(&ContainerId, &CpuSet)>) -> Option<CpuSet> {
        let mut union = CpuSet::default();
        for member in self.members.values() {
            let record = &member.record;
            if !(record.phase.is_live() || record.phase == Phase::Creating) {
                continue;
            }
            union.extend(match changed {
                Some((id, cpus)) if *id == record.id => cpus,
                _ => &record.config.resources.cpuset_cpus,
            });
        }
        Some(union).filter(|union| !union.is_empty())
    }

    /// Has the VM run on the CPUs that its containers name, with `changed` for one of them.
    pub(super) async fn pin(
        &mut self,
        changed: Option<(&ContainerId, &CpuSet)>,
    ) -> Result<(), RuntimeError> {
        let wanted = self.cpus(changed);
        let Some(vm) = self.vm.clone().filter(|vm| vm.exit().is_none()) else {
            return Ok(());
        };
        if self.pinned.as_ref() == Some(&wanted) {
            return Ok(());
        }
        // If it is cut short, nobody knows.
        self.pinned = None;
        let set = async { Ok(vm.set_cpus(wanted.as_ref()).await?) };
        self.with_vm("choose CPUs", &vm, set).await?;
        self.pinned = Some(wanted);
        Ok(())
    }

    /// The same where nobody waits for it.
    pub(super) async fn pin_or_tell(&mut self) {
        if let Err(error) = self.pin(None).await {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(error, "cannot choose the CPUs of a VM");
        }
    }
}
