//! A sandbox whose VM was there before it: it gets the sandbox's network, disk and cgroup.

use std::sync::Arc;

use hypernetes_agent_api::AgentClient;
use hypernetes_network::{Lease, ParkedPlace};
use hypernetes_vmm::{Disk, Vm};

use super::Actor;
use crate::{
    error::RuntimeError,
    identity::{SCRATCH_SLOT, network_request},
    pool::Pooled,
    timing::Stopwatch,
};

type Taken = (Arc<dyn Vm>, AgentClient);

impl Actor {
    /// Makes a VM of the pool this sandbox's. `None`: it cannot be used, and is gone.
    pub(super) async fn take_over(
        &mut self,
        pooled: Pooled,
    ) -> Result<Option<Taken>, RuntimeError> {
        let watch = Stopwatch::start();
        let Pooled {
            vm, client, nic, ..
        } = pooled;
        match self.equip(&vm, nic).await {
            Ok(()) => {
                self.timing.from_template = true;
                self.timing.from_pool = true;
                self.timing.phases.push(("take", watch.elapsed()));
                return Ok(Some((vm, client)));
            }
            // Another VM would not be better off.
            Err(error @ (RuntimeError::Network(_) | RuntimeError::Storage { .. })) => {
                return Err(error);
            }
            Err(error) => {
                let error = hypernetes_telemetry::chain(&error).to_string();
                tracing::warn!(error, "cannot use a VM of the pool: starting another");
            }
        }
        let run_dir = self.shared.run_dir(&self.record.id);
        self.shared.config.vmm.destroy(&run_dir).await?;
        self.vm = None;
        self.record.vm = None;
        self.plugged.clear();
        Ok(None)
    }

    async fn equip(
        &mut self,
        vm: &Arc<dyn Vm>,
        nic: Option<ParkedPlace>,
    ) -> Result<(), RuntimeError> {
        // Known from here on, so that whatever fails finds it to end it.
        self.vm = Some(Arc::clone(vm));
        let (shared, record) = (Arc::clone(&self.shared), &self.record);
        let cgroup = self.cgroup();
        let place = async {
            vm.stand_back(false).await?;
            match &cgroup {
                Some(cgroup) => Ok(vm.join_cgroup(cgroup).await?),
                None => Ok::<_, RuntimeError>(()),
            }
        };
        let network = async {
            let watch = Stopwatch::start();
            let lease = match (&record.config.network, nic) {
                (Some(network), Some(nic)) => {
                    let request = network_request(&record.config);
                    let driver = &shared.config.network;
                    Some(
                        driver
                            .attach_parked(&record.id, network, &request, nic)
                            .await?,
                    )
                }
                _ => None::<Lease>,
            };
            Ok((lease, watch.elapsed()))
        };
        let scratch = async {
            let watch = Stopwatch::start();
            let mib = record.config.scratch_mib;
            if mib > 0 {
                let file = shared.scratch.create(&record.id, mib).await?;
                let disk = Disk {
                    slot: SCRATCH_SLOT,
                    file,
                    read_only: false,
                };
                vm.plug_disk(disk).await?;
            }
            Ok((mib > 0, watch.elapsed()))
        };
        let ((), (lease, network), (plugged, scratch)) = tokio::try_join!(place, network, scratch)?;
        self.timing
            .phases
            .extend([("network", network), ("scratch", scratch)]);
        self.plugged = plugged.then_some(SCRATCH_SLOT).into_iter().collect();
        self.record.vm = Some(vm.record());
        self.record.lease = lease;
        self.save().await
    }
}
