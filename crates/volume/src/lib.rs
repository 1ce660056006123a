//! Volumes: block devices that outlive pods, by drivers behind one trait.
//!
//! A driver makes, finds and removes volumes, and says who has one. It never reads what a guest has
//! written: file systems are mounted, repaired and grown in guests only.
#![forbid(unsafe_code)]

mod error;
mod id;
mod local;

use std::fs::File;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use error::VolumeError;
pub use id::VolumeId;
pub use local::{LocalConfig, LocalVolumes};

/// Sizes of volumes are multiples of this.
pub const GRANULE: u64 = 1 << 20;

/// What a volume is to the containers that have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeMode {
    /// A file system (ext4), empty at first.
    Filesystem,
    /// A block device, zeros at first.
    Block,
}

/// A volume as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its name.
    pub id: VolumeId,
    /// Its size, a multiple of [`GRANULE`].
    pub bytes: u64,
    /// What it is.
    pub mode: VolumeMode,
    /// Who has it now: one that writes, or any number that read.
    pub attached_to: Vec<String>,
}

/// An attached volume, to be handed to a VMM.
#[derive(Debug)]
pub struct BlockDevice {
    /// Open for what may be done with it.
    pub file: File,
    /// Size.
    pub bytes: u64,
    /// Not writable.
    pub read_only: bool,
}

/// How much a driver can promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes that may be promised.
    pub total: u64,
    /// Bytes that are promised, as the sum of the volumes' sizes.
    pub allocated: u64,
}

impl Capacity {
    /// Bytes that may be promised still.
    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.allocated)
    }
}

/// Keeps volumes of one kind.
///
/// Every call is durable before it returns, and safe to repeat. A call whose future is dropped is
/// done all the same, or not at all; nothing half made is ever seen.
#[async_trait]
pub trait VolumeDriver: Send + Sync + std::fmt::Debug {
    /// Makes a volume, its size rounded up to a multiple of [`GRANULE`]. One that is there with this
    /// size and mode is success, another of that name a [`VolumeError::Conflict`].
    async fn create(
        &self,
        id: &VolumeId,
        bytes: u64,
        mode: VolumeMode,
    ) -> Result<VolumeInfo, VolumeError>;
    /// Removes a volume and what is in it. [`VolumeError::InUse`] while it is attached.
    async fn delete(&self, id: &VolumeId) -> Result<(), VolumeError>;
    /// Makes a volume at least this large, attached or not. It never becomes smaller.
    async fn expand(&self, id: &VolumeId, bytes: u64) -> Result<VolumeInfo, VolumeError>;
    /// One volume.
    async fn get(&self, id: &VolumeId) -> Result<Option<VolumeInfo>, VolumeError>;
    /// All volumes.
    async fn list(&self) -> Result<Vec<VolumeInfo>, VolumeError>;
    /// Gives a volume to a pod: to one alone, or to any number that only read. Else
    /// [`VolumeError::InUse`]. Who has it to write keeps it so, whatever is asked for later.
    async fn attach(
        &self,
        id: &VolumeId,
        pod: &str,
        read_only: bool,
    ) -> Result<BlockDevice, VolumeError>;
    /// Takes a volume from a pod, whose VM must have ended. Not attached, or no volume: success.
    async fn detach(&self, id: &VolumeId, pod: &str) -> Result<(), VolumeError>;
    /// What is promised, and what may be.
    async fn capacity(&self) -> Result<Capacity, VolumeError>;
}
