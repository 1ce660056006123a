//! Writing volumes, and the disks of those that have one for themselves.
//!
//! A disk-backed emptyDir with a size limit is a file system of that size, so that the limit holds
//! whoever writes. Its slot is recorded before its file is made; a file that is plugged is whole, and
//! one that is not is made anew. It goes with the sandbox.

use std::{collections::BTreeSet, sync::Arc};

use hypernetes_agent_api::{FEATURE_HUGE_PAGES, v1};
use hypernetes_vmm::{Disk, Vm};
use hypernetes_volume::VolumeMode;

use super::{
    Actor,
    attached::VOLUME_READY,
    containers::{invalid, unknown_to_guest},
};
use crate::{
    api::{GroupChange, VolumeConfig, VolumeKind},
    error::RuntimeError,
    records::VolumeDisk,
    scratch::ScratchDisks,
};

/// What a volume may hold: it travels in one message.
const MAX_VOLUME: usize = hypernetes_agent_api::MAX_MESSAGE_SIZE - 256 * 1024;
/// Slots of the SCSI bus that volumes can have: from the top, as layers come from the bottom.
const DISK_SLOTS: std::ops::RangeInclusive<u32> = 223..=254;
/// The first version of the protocol in which a volume can have a disk, and its files an owner.
const PROTOCOL_WITH_DISKS: u32 = 2;

/// Whether files of a volume belong to somebody else than root.
fn has_owners(kind: &VolumeKind) -> bool {
    match kind {
        VolumeKind::Files { files } => files.values().any(|file| file.uid != 0),
        VolumeKind::EmptyDir { .. } | VolumeKind::HugePages { .. } | VolumeKind::Disk { .. } => {
            false
        }
    }
}

impl Actor {
    pub(super) async fn write_volume(&mut self, volume: VolumeConfig) -> Result<(), RuntimeError> {
        let action = "write a volume";
        let vm = self.ready_vm(action)?;
        let client = self.client(action).await?;
        if client.hello().version < PROTOCOL_WITH_DISKS && has_owners(&volume.kind) {
            let rule = "have no owner in the guest of an earlier release: make the pod anew";
            return Err(invalid("files", rule));
        }
        if matches!(volume.kind, VolumeKind::HugePages { .. }) && !client.has(FEATURE_HUGE_PAGES) {
            return Err(unknown_to_guest("huge_pages"));
        }
        let slot = match own_disk(&volume.kind, self.record.config.scratch_mib) {
            None => match &volume.kind {
                VolumeKind::Disk {
                    volume, read_only, ..
                } => {
                    Self::check_disk_volumes(&client)?;
                    let mode = VolumeMode::Filesystem;
                    Box::pin(self.ensure_attached(&vm, volume, *read_only, mode)).await?
                }
                VolumeKind::EmptyDir { .. }
                | VolumeKind::HugePages { .. }
                | VolumeKind::Files { .. } => 0,
            },
            Some(_) if client.hello().version < PROTOCOL_WITH_DISKS => {
                let rule = "is not enforced by the guest of an earlier release: make the pod anew";
                return Err(invalid("size_limit", rule));
            }
            Some(limit) => Box::pin(self.ensure_disk(&vm, &volume.name, limit)).await?,
        };
        let deadline = match volume.kind {
            VolumeKind::Disk { .. } => VOLUME_READY,
            _ => self.shared.config.deadlines.call,
        };
        let request = request(volume, slot)?;
        let sandbox = self.record.id.clone();
        self.with_vm(action, &vm, async {
            let written = client.write_volume(request, deadline).await;
            written
                .map(drop)
                .map_err(|error| crate::guest::error(&sandbox, action, &error))
        })
        .await
    }

    /// Slot of the disk that a volume has for itself, plugged.
    async fn ensure_disk(
        &mut self,
        vm: &Arc<dyn Vm>,
        volume: &str,
        limit: u64,
    ) -> Result<u32, RuntimeError> {
        ScratchDisks::check_volume(limit)?;
        let known = self.record.disks.iter().find(|disk| disk.volume == volume);
        let slot = match known {
            Some(disk) if disk.size_limit == limit => disk.slot,
            Some(disk) => {
                let rule = format!("must stay {}", disk.size_limit);
                return Err(invalid("size_limit", rule));
            }
            None => self.take_slot(volume, limit).await?,
        };
        if self.plugged.contains(&slot) {
            return Ok(slot);
        }
        let disks = &self.shared.scratch;
        let file = disks.create_volume(&self.record.id, slot, limit).await?;
        // Noted before it is done: if it is cut short, the disk may be there.
        self.plugged.insert(slot);
        let plug = async {
            Ok(vm
                .plug_disk(Disk {
                    slot,
                    file,
                    read_only: false,
                })
                .await?)
        };
        let plugged = self.with_vm("plug a volume's disk", vm, plug).await;
        if let Err(error) = plugged {
            self.give_up(volume).await;
            return Err(error);
        }
        Ok(slot)
    }

    /// A slot that nothing has, for a volume's disk.
    pub(super) fn free_volume_slot(&self, field: &str) -> Result<u32, RuntimeError> {
        let layers = self
            .members
            .values()
            .flat_map(|member| member.record.all_slots());
        let taken: BTreeSet<u32> = layers
            .chain(self.record.disk_slots())
            .chain(self.plugged.iter().copied())
            .collect();
        let free = DISK_SLOTS.rev().find(|slot| !taken.contains(slot));
        free.ok_or_else(|| {
            let count = DISK_SLOTS.count();
            let rule = format!("at most {count} volumes of a sandbox can have a disk of their own");
            invalid(field, rule)
        })
    }

    /// Records a slot for a volume's disk.
    async fn take_slot(&mut self, volume: &str, size_limit: u64) -> Result<u32, RuntimeError> {
        let slot = self.free_volume_slot("size_limit")?;
        let before = self.record.clone();
        let mut disks = before.disks.clone();
        disks.push(VolumeDisk {
            volume: volume.to_owned(),
            slot,
            size_limit,
        });
        self.record.set_disks(disks);
        if let Err(error) = self.save().await {
            self.record = before;
            return Err(error);
        }
        Ok(slot)
    }

    /// Frees a volume's slot: the next attempt has another disk. What cannot be undone now is done
    /// by the next session, or goes with the sandbox.
    async fn give_up(&mut self, volume: &str) {
        let mut disks = self.record.disks.clone();
        disks.retain(|disk| disk.volume != volume);
        self.record.set_disks(disks);
        let undone = match self.save().await {
            Ok(()) => self.unplug_unused().await,
            Err(error) => Err(error),
        };
        if let Err(error) = undone {
            let error = hypernetes_telemetry::chain(&error).to_string();
            tracing::warn!(volume, error, "cannot take back a volume's disk yet");
        }
    }
}

/// Size of the disk that a volume needs for itself, if it does.
fn own_disk(kind: &VolumeKind, scratch_mib: u64) -> Option<u64> {
    match kind {
        VolumeKind::EmptyDir {
            memory: false,
            size_limit: limit @ 1..,
        } => {
            // A limit that the scratch disk ends before needs no other.
            let scratch = scratch_mib << 20;
            (scratch == 0 || *limit < scratch).then_some(*limit)
        }
        VolumeKind::EmptyDir { .. }
        | VolumeKind::HugePages { .. }
        | VolumeKind::Files { .. }
        | VolumeKind::Disk { .. } => None,
    }
}

pub(super) fn request(
    volume: VolumeConfig,
    disk_slot: u32,
) -> Result<v1::WriteVolumeRequest, RuntimeError> {
    let kind = match volume.kind {
        VolumeKind::EmptyDir { memory, size_limit } => v1::volume::Kind::EmptyDir(v1::EmptyDir {
            memory,
            size_limit,
            disk_slot,
        }),
        VolumeKind::Disk {
            read_only,
            group_change,
            ..
        } => v1::volume::Kind::Disk(v1::DiskVolume {
            slot: disk_slot,
            read_only,
            keep_matching_root: group_change == GroupChange::OnRootMismatch,
        }),
        VolumeKind::HugePages {
            page_size,
            size_limit,
        } => v1::volume::Kind::HugePages(v1::HugePagesVolume {
            page_size,
            size_limit,
        }),
        VolumeKind::Files { files } => {
            let size: usize = files
                .iter()
                .map(|(path, file)| path.len() + file.content.len() + 16)
                .sum();
            if size > MAX_VOLUME {
                return Err(invalid(
                    "volume",
                    format!("must hold at most {MAX_VOLUME} bytes"),
                ));
            }
            let file = |(path, file): (String, crate::api::VolumeFile)| v1::File {
                path,
                content: file.content.to_vec(),
                mode: file.mode,
                uid: file.uid,
            };
            v1::volume::Kind::Files(v1::FilesVolume {
                files: files.into_iter().map(file).collect(),
                default_mode: 0o644,
                gid: volume.gid,
            })
        }
    };
    Ok(v1::WriteVolumeRequest {
        volume: Some(v1::Volume {
            name: volume.name,
            kind: Some(kind),
        }),
        gid: volume.gid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_limit_below_the_scratch_disk_s_size_needs_a_disk() {
        let empty = |memory, size_limit| VolumeKind::EmptyDir { memory, size_limit };
        let mib = |n: u64| n << 20;
        assert_eq!(own_disk(&empty(false, 1), 64), Some(1));
        assert_eq!(own_disk(&empty(false, mib(64) - 1), 64), Some(mib(64) - 1));
        assert_eq!(own_disk(&empty(false, mib(64)), 64), None);
        assert_eq!(own_disk(&empty(false, mib(64)), 0), Some(mib(64)));
        assert_eq!(own_disk(&empty(false, 0), 64), None);
        assert_eq!(own_disk(&empty(true, 1), 64), None);
    }
}
