//! More memory for a running VM, and less again: a virtio-mem device, planned at its start.

use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{argv::MEMORY_DEVICE, qmp::QmpError, vm::QemuVm};
use crate::VmmError;

/// How long the guest may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long without a change means that the guest has nothing more to give.
const STUCK: Duration = Duration::from_secs(2);
const MIB: u64 = 1 << 20;

impl QemuVm {
    /// See [`crate::Vm::set_extra_memory`].
    pub(super) async fn resize_memory(&self, mib: u32) -> Result<u32, VmmError> {
        let action = "change the memory";
        let most = self.memory_property("memdev-size").await;
        let most = match most {
            Ok(most) => most,
            // Not a VM that can grow.
            Err(e) if e.is_not_found() => 0,
            Err(e) => return Err(self.failed(action)(e)),
        };
        let wanted = u64::from(mib) * MIB;
        if wanted > most {
            return Err(VmmError::Spec {
                field: "extras.max_memory_mib",
                rule: format!(
                    "allows {} MiB more than at the start, not {mib}",
                    most / MIB
                ),
            });
        }
        if most == 0 {
            return Ok(0);
        }
        let set = json!({
            "path": path(),
            "property": "requested-size",
            "value": wanted,
        });
        self.qmp
            .execute("qom-set", set)
            .await
            .map_err(self.failed(action))?;
        let (start, mut changed, mut last) = (Instant::now(), Instant::now(), None);
        loop {
            let size = self.memory_property("size").await;
            let size = size.map_err(self.failed(action))?;
            if last != Some(size) {
                (changed, last) = (Instant::now(), Some(size));
            }
            if size == wanted || start.elapsed() > PATIENCE || changed.elapsed() > STUCK {
                return Ok(u32::try_from(size / MIB).unwrap_or(u32::MAX));
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn memory_property(&self, name: &str) -> Result<u64, QmpError> {
        let get = match name {
            // The device has no property of its own for it.
            "memdev-size" => json!({ "path": "/objects/more", "property": "size" }),
            name => json!({ "path": path(), "property": name }),
        };
        let value = self.qmp.execute("qom-get", get).await?;
        value
            .as_u64()
            .ok_or_else(|| QmpError::Protocol("qom-get".to_owned()))
    }
}

fn path() -> String {
    format!("/machine/peripheral/{MEMORY_DEVICE}")
}
