//! What nodes and pods use: the resource metrics of `metrics.k8s.io`.
//!
//! The node notes, the API server reads; in between is a [`UsageBoard`].

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::meta;

/// API group of resource metrics.
pub const GROUP: &str = "metrics.k8s.io";

/// CPU and memory in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Thousand-millionths of a CPU.
    pub cpu_nano_cores: u64,
    /// Bytes that cannot be dropped at once.
    pub memory_bytes: u64,
}

impl Usage {
    fn to_value(self) -> Value {
        json!({
            "cpu": format!("{}n", self.cpu_nano_cores),
            "memory": format!("{}Ki", self.memory_bytes / 1024),
        })
    }
}

/// What a pod uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodUsage {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// When it was measured.
    pub at: Timestamp,
    /// Over which time CPU use was measured.
    pub window: Duration,
    /// By container.
    pub containers: BTreeMap<String, Usage>,
}

/// What a node uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeUsage {
    /// Its name.
    pub name: String,
    /// When it was measured.
    pub at: Timestamp,
    /// Over which time CPU use was measured.
    pub window: Duration,
    /// In all.
    pub usage: Usage,
}

/// The latest figures.
#[derive(Debug, Clone, Default)]
pub struct UsageBoard(Arc<RwLock<Figures>>);

#[derive(Debug, Default)]
struct Figures {
    nodes: Vec<NodeUsage>,
    pods: Vec<PodUsage>,
}

impl UsageBoard {
    /// Replaces what is known.
    pub fn set(&self, nodes: Vec<NodeUsage>, pods: Vec<PodUsage>) {
        let mut figures = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *figures = Figures { nodes, pods };
    }

    /// `NodeMetrics` of a Node object, if there are figures.
    pub fn of_node(&self, node: &Value) -> Option<Value> {
        let figures = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let name = meta::name(node)?;
        let found = figures.nodes.iter().find(|usage| usage.name == name)?;
        let mut object = head("NodeMetrics", node, found.at, found.window);
        object["usage"] = found.usage.to_value();
        Some(object)
    }

    /// `PodMetrics` of a Pod object, if there are figures.
    pub fn of_pod(&self, pod: &Value) -> Option<Value> {
        let figures = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let uid = meta::uid(pod)?;
        let found = figures.pods.iter().find(|usage| usage.uid == uid)?;
        let mut object = head("PodMetrics", pod, found.at, found.window);
        object["metadata"]["namespace"] = found.namespace.as_str().into();
        object["containers"] = found
            .containers
            .iter()
            .map(|(name, usage)| json!({"name": name, "usage": usage.to_value()}))
            .collect();
        Some(object)
    }
}

fn head(kind: &str, of: &Value, at: Timestamp, window: Duration) -> Value {
    let mut metadata = json!({
        "name": meta::name(of).unwrap_or_default(),
        "creationTimestamp": meta::format_time(at),
    });
    if let Some(labels) = of["metadata"].get("labels") {
        metadata["labels"] = labels.clone();
    }
    json!({
        "kind": kind,
        "apiVersion": format!("{GROUP}/v1beta1"),
        "metadata": metadata,
        "timestamp": meta::format_time(at),
        "window": go_duration(window),
    })
}

/// A duration as Go prints it, to milliseconds.
fn go_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    let seconds = format!("{}.{:03}", rest / 1000, rest % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
    match minutes {
        0 => format!("{seconds}s"),
        minutes => format!("{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_become_metrics_of_the_same_pod_only() {
        let board = UsageBoard::default();
        let at = Timestamp::from_second(1_800_000_000).unwrap();
        let usage = Usage {
            cpu_nano_cores: 12_345,
            memory_bytes: 3 << 20,
        };
        board.set(
            vec![NodeUsage {
                name: "n1".into(),
                at,
                window: Duration::from_millis(10_250),
                usage,
            }],
            vec![PodUsage {
                namespace: "acme".into(),
                name: "web".into(),
                uid: "u1".into(),
                at,
                window: Duration::from_secs(75),
                containers: [("c".to_owned(), usage)].into(),
            }],
        );
        let pod = json!({"metadata": {"name": "web", "namespace": "acme", "uid": "u1",
            "labels": {"app": "web"}}});
        assert_eq!(
            board.of_pod(&pod).unwrap(),
            json!({
                "kind": "PodMetrics", "apiVersion": "metrics.k8s.io/v1beta1",
                "metadata": {"name": "web", "namespace": "acme", "labels": {"app": "web"},
                    "creationTimestamp": "2027-01-15T08:00:00Z"},
                "timestamp": "2027-01-15T08:00:00Z", "window": "1m15s",
                "containers": [{"name": "c", "usage": {"cpu": "12345n", "memory": "3072Ki"}}],
            })
        );
        let other = json!({"metadata": {"name": "web", "namespace": "acme", "uid": "u2"}});
        assert_eq!(board.of_pod(&other), None);
        let node = board.of_node(&json!({"metadata": {"name": "n1"}})).unwrap();
        assert_eq!(node["window"], "10.25s");
        assert_eq!(node["usage"]["cpu"], "12345n");
    }
}
