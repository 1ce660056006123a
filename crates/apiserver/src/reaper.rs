//! Removes events that are too old.

use std::time::Duration;

use hypernetes_apimachinery::meta;
use hypernetes_store::{Compare, Durability, Op, Store};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{codec, config::Clock, keys};

/// How many events are looked at between two pauses.
const STEP: usize = 1000;
const PAUSE: Duration = Duration::from_secs(60);

/// Runs until shutdown.
pub(crate) async fn run(store: Store, clock: Clock, life: Duration, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(PAUSE) => {}
        }
        if let Err(error) = sweep(&store, clock(), life).await {
            tracing::warn!(error = %hypernetes_telemetry::chain(&error), "old events stay for now");
        }
    }
}

/// Removes what has not been written for `life`.
async fn sweep(
    store: &Store,
    now: Timestamp,
    life: Duration,
) -> Result<(), hypernetes_store::StoreError> {
    let life = SignedDuration::try_from(life).unwrap_or(SignedDuration::from_hours(1));
    let prefix = format!("{}events/", keys::ROOT);
    let mut after: Option<String> = None;
    loop {
        let page = store.list(&prefix, None, after.as_deref(), Some(STEP))?;
        after = page.entries.last().map(|entry| entry.key.clone());
        for entry in page.entries {
            let seen = last_seen(&codec::decode(&entry.value));
            if seen.is_some_and(|seen| now.duration_since(seen) <= life) {
                continue;
            }
            let compares = vec![Compare::ModRevision(entry.key.clone(), entry.mod_revision)];
            let result = store
                .txn(compares, vec![Op::Delete(entry.key)], Durability::Relaxed)
                .await;
            match result {
                // It happened again meanwhile.
                Ok(_) | Err(hypernetes_store::StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if !page.more {
            return Ok(());
        }
        tokio::task::yield_now().await;
    }
}

fn last_seen(event: &Value) -> Option<Timestamp> {
    let texts = [
        event["series"]["lastObservedTime"].as_str(),
        event["lastTimestamp"].as_str(),
        event["eventTime"].as_str(),
    ];
    let times = texts
        .into_iter()
        .flatten()
        .filter_map(|text| text.parse().ok());
    times.chain(meta::creation_timestamp(event)).max()
}

#[cfg(test)]
mod tests {
    use hypernetes_store::{StoreConfig, Value as StoreValue};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn only_old_events_go() {
        let store = Store::in_memory(StoreConfig::default()).unwrap();
        let now: Timestamp = "2026-01-01T02:00:00Z".parse().unwrap();
        for (name, event) in [
            (
                "old",
                json!({"metadata": {"creationTimestamp": "2026-01-01T00:30:00Z"}}),
            ),
            (
                "again",
                json!({"metadata": {"creationTimestamp": "2026-01-01T00:30:00Z"},
                "lastTimestamp": "2026-01-01T01:30:00Z"}),
            ),
            (
                "new",
                json!({"metadata": {"creationTimestamp": "2026-01-01T01:30:00Z"}}),
            ),
        ] {
            let key = format!("{}events/default/{name}", keys::ROOT);
            let op = Op::Put(key, StoreValue::Bytes(event.to_string().into()));
            store
                .txn(vec![], vec![op], Durability::Relaxed)
                .await
                .unwrap();
        }
        sweep(&store, now, Duration::from_secs(3600)).await.unwrap();
        let left = store
            .list(&format!("{}events/", keys::ROOT), None, None, None)
            .unwrap();
        let names: Vec<&str> = left.entries.iter().map(|e| keys::name_of(&e.key)).collect();
        assert_eq!(names, ["again", "new"]);
    }
}
