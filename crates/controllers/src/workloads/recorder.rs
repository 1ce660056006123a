//! Events of workloads: what happens again is one event that counts, not many.
//!
//! As upstream's recorder: the same event is written again with a higher count; of many that differ in
//! their message only, the later ones are taken together. What has been written is known for as long as
//! the daemon runs; after a restart counting begins anew.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use hypernetes_apimachinery::meta;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::cluster::{Cluster, events, name, namespace, uid};
use crate::error::ReconcileError;

const COMPONENT: &str = "hypernetes-controllers";
/// More is not remembered.
const MOST: usize = 4096;
/// So many messages of one reason are told apart within [`WINDOW`].
const MESSAGES: usize = 10;
const WINDOW: i64 = 600;

/// What an event is about, and what it says.
type Key = (String, String, String, String);

#[derive(Debug, Clone)]
struct Noted {
    /// Name of the event's object.
    name: String,
    count: i64,
}

/// Messages of one reason about one object.
#[derive(Debug, Default)]
struct Similar {
    since: i64,
    messages: Vec<String>,
}

#[derive(Debug, Default)]
struct State {
    noted: HashMap<Key, Noted>,
    similar: HashMap<(String, String, String), Similar>,
}

/// Writes events.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    state: Mutex<State>,
}

impl State {
    /// The message to be written, and whether it stands for several.
    fn message(
        &mut self,
        about: (String, String, String),
        message: &str,
        now: i64,
    ) -> (String, bool) {
        if self.similar.len() >= MOST {
            self.similar.clear();
        }
        let similar = self.similar.entry(about).or_default();
        if now - similar.since > WINDOW {
            *similar = Similar {
                since: now,
                messages: Vec::new(),
            };
        }
        if !similar.messages.iter().any(|known| known == message) {
            if similar.messages.len() >= MESSAGES {
                return (format!("(combined from similar events): {message}"), true);
            }
            similar.messages.push(message.to_owned());
        }
        (message.to_owned(), false)
    }

    /// The event that says the same, counted up.
    fn again(&mut self, key: &Key) -> Option<Noted> {
        let noted = self.noted.get_mut(key)?;
        noted.count += 1;
        Some(noted.clone())
    }
}

impl Recorder {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn record(
        &self,
        cluster: &Cluster,
        object: &Value,
        kind: &str,
        reason: &str,
        message: &str,
    ) -> Result<(), ReconcileError> {
        let place = match namespace(object) {
            "" => "default",
            namespace => namespace,
        };
        let now = Timestamp::now();
        let about = (uid(object).to_owned(), kind.to_owned(), reason.to_owned());
        let (message, combined) = self
            .state()
            .message(about.clone(), message, now.as_second());
        // Those that are taken together are one event, whatever its latest message.
        let text = if combined { "" } else { message.as_str() };
        let key = (about.0, about.1, about.2, text.to_owned());
        let time = meta::format_time(now);
        let again = self.state().again(&key);
        if let Some(noted) = again {
            let patch = json!({"count": noted.count, "lastTimestamp": time, "message": message});
            let object = (place, noted.name.as_str());
            if cluster
                .patch(&events(), object, "", &patch)
                .await?
                .is_some()
            {
                return Ok(());
            }
        }
        let event_name = format!("{}.{:x}", name(object), now.as_nanosecond());
        let event = json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": event_name, "namespace": place},
            "involvedObject": {
                "apiVersion": object["apiVersion"], "kind": object["kind"],
                "namespace": object["metadata"]["namespace"], "name": object["metadata"]["name"],
                "uid": object["metadata"]["uid"],
                "resourceVersion": object["metadata"]["resourceVersion"],
            },
            "type": kind, "reason": reason, "message": message, "count": 1,
            "firstTimestamp": time, "lastTimestamp": time,
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT, "reportingInstance": "",
        });
        cluster.create(&events(), place, &event).await?;
        let mut state = self.state();
        if state.noted.len() >= MOST {
            state.noted.clear();
        }
        let noted = Noted {
            name: event_name,
            count: 1,
        };
        state.noted.insert(key, noted);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_messages_of_one_reason_are_taken_together() {
        let mut state = State::default();
        let about = || {
            (
                "u".to_owned(),
                "Warning".to_owned(),
                "FailedCreate".to_owned(),
            )
        };
        for number in 0..MESSAGES {
            let text = format!("m{number}");
            assert_eq!(state.message(about(), &text, 0), (text, false));
        }
        assert_eq!(state.message(about(), "m3", 1), ("m3".to_owned(), false));
        let (text, combined) = state.message(about(), "m99", 1);
        assert!(
            combined && text == "(combined from similar events): m99",
            "{text}"
        );
        assert!(!state.message(about(), "m99", WINDOW + 2).1, "a new window");
    }
}
