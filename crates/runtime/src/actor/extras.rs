//! What a VM is given while it runs: directories of the host, CPUs, memory.

use std::collections::BTreeSet;

use hypernetes_agent_api::v1;
use hypernetes_vmm::{Disk, HostShare, SHARE_TAG, VmmError};

use super::{Actor, containers::invalid};
use crate::{
    api::{HostDevice, SHARED_VOLUME, SandboxUpdate},
    error::RuntimeError,
    records::VmSize,
};

/// Slots of the SCSI bus that devices can have: below those of volumes.
const DEVICE_SLOTS: std::ops::RangeInclusive<u32> = 159..=222;

impl Actor {
    /// Shows the guest something of the host's. What is shown stays until the VM ends, so that there
    /// is nothing to be recorded: a repetition finds it.
    pub(super) async fn share(&mut self, share: HostShare) -> Result<String, RuntimeError> {
        let action = "share a host path";
        let vm = self.ready_vm(action)?;
        if !self.record.config.extras.shares {
            let rule = "was not planned when the sandbox was made: make the pod anew";
            return Err(invalid("extras.shares", rule));
        }
        let client = self.client(action).await?;
        let shown = async { Ok(vm.share(share).await?) };
        let name = self.with_vm(action, &vm, shown).await?;
        let request = v1::WriteVolumeRequest {
            volume: Some(v1::Volume {
                name: SHARED_VOLUME.to_owned(),
                kind: Some(v1::volume::Kind::Shared(v1::SharedVolume {
                    tag: SHARE_TAG.to_owned(),
                })),
            }),
            gid: None,
        };
        let deadline = self.shared.config.deadlines.call;
        let sandbox = self.record.id.clone();
        self.with_vm(action, &vm, async {
            let mounted = client.write_volume(request, deadline).await;
            mounted
                .map(drop)
                .map_err(|error| crate::guest::error(&sandbox, action, &error))
        })
        .await?;
        Ok(name)
    }

    /// Plugs a block device of the host, for the next container. It is recorded with that: until then
    /// a restarted node finds a disk that nobody has.
    pub(super) async fn attach_device(&mut self, device: HostDevice) -> Result<u32, RuntimeError> {
        let action = "attach a device";
        let vm = self.ready_vm(action)?;
        let slots = self.members.values();
        let taken: BTreeSet<u32> = slots
            .flat_map(|member| member.record.all_slots())
            .chain(self.record.disk_slots())
            .chain(self.plugged.iter().copied())
            .collect();
        let free = DEVICE_SLOTS.rev().find(|slot| !taken.contains(slot));
        let slot = free.ok_or_else(|| {
            let rule = format!("a sandbox can have {} in all", DEVICE_SLOTS.count());
            invalid("devices", rule)
        })?;
        self.plugged.insert(slot);
        self.pending.insert(slot);
        let HostDevice { file, read_only } = device;
        let disk = Disk {
            slot,
            file,
            read_only,
        };
        let plugged = async { Ok(vm.plug_disk(disk).await?) };
        if let Err(error) = self.with_vm(action, &vm, plugged).await {
            self.pending.remove(&slot);
            self.unplug_unused().await?;
            return Err(error);
        }
        Ok(slot)
    }

    /// Changes the VM's size. The record comes after the VM: what is shown is so, and whoever gets an
    /// error asks again.
    pub(super) async fn resize(&mut self, update: SandboxUpdate) -> Result<(), RuntimeError> {
        let action = "resize the sandbox";
        let vm = self.ready_vm(action)?;
        let (config, defaults) = (&self.record.config, &self.shared.config.defaults);
        let or = |asked: u32, default: u32| if asked == 0 { default } else { asked };
        let first = VmSize {
            vcpus: or(config.vcpus, defaults.vcpus),
            memory_mib: or(config.memory_mib, defaults.memory_mib),
        };
        let most = VmSize {
            vcpus: config.extras.max_vcpus.max(first.vcpus),
            memory_mib: config.extras.max_memory_mib.max(first.memory_mib),
        };
        if update.vcpus == 0 || update.vcpus > most.vcpus {
            let rule = format!("must be 1 to {} for this sandbox", most.vcpus);
            return Err(invalid("vcpus", rule));
        }
        if update.memory_mib > most.memory_mib {
            let rule = format!("must be at most {} for this sandbox", most.memory_mib);
            return Err(invalid("memory_mib", rule));
        }
        let now = self.record.size.unwrap_or(first);
        if update.vcpus != now.vcpus {
            let client = self.client(action).await?;
            let deadline = self.shared.config.deadlines.call;
            let sandbox = self.record.id.clone();
            let request = v1::ResizeRequest {
                vcpus: update.vcpus,
            };
            let answer = self
                .with_vm(action, &vm, async {
                    let resized = client.resize(request, deadline).await;
                    resized.map_err(|error| crate::guest::error(&sandbox, action, &error))
                })
                .await?;
            if answer.vcpus != update.vcpus {
                return Err(RuntimeError::Guest {
                    sandbox: sandbox.to_string(),
                    action,
                    message: format!("it has {} CPUs up, not {}", answer.vcpus, update.vcpus),
                });
            }
        }
        // Memory that the VM has from its start stays.
        let extra = update.memory_mib.saturating_sub(first.memory_mib);
        let had = now.memory_mib.saturating_sub(first.memory_mib);
        if extra != had {
            let changed = async { Ok(vm.set_extra_memory(extra).await?) };
            let reached = self.with_vm(action, &vm, changed).await?;
            if reached != extra {
                // Or the guest would go on giving back, unseen.
                let undone = async { Ok(vm.set_extra_memory(had).await?) };
                self.with_vm(action, &vm, undone).await?;
                let message = format!("it has {reached} MiB more than at first, not {extra}");
                return Err(RuntimeError::Vmm(VmmError::Control {
                    action: action.to_owned(),
                    sandbox: self.record.id.clone(),
                    message,
                }));
            }
        }
        let before = self.record.clone();
        self.record.size = Some(VmSize {
            vcpus: update.vcpus,
            memory_mib: update.memory_mib.max(first.memory_mib),
        });
        if let Some(memo) = update.memo {
            self.record.config.memo = memo;
        }
        if let Err(error) = self.save().await {
            self.record = before;
            return Err(error);
        }
        self.publish_sandbox();
        Ok(())
    }
}
