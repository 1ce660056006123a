//! Evictions: deletions of pods that the disruption budgets allow.

use std::sync::Arc;

use hypernetes_apimachinery::{Status, kinds, meta, selector::LabelSelector};
use hypernetes_store::{Compare, Op, StoreError};
use serde_json::{Value, json};

use super::{Call, DeleteOptions, Engine};
use crate::{
    codec::{self, Encoded},
    keys,
    status::{self, Result},
};

/// A budget that has more under way than this is taken for stuck.
const MAX_DISRUPTED: usize = 2000;
/// When to try again where the server is only behind. Where the budget is used up nobody knows when, and
/// clients have a patience of their own.
const RETRY_SECONDS: u32 = 10;

impl Engine {
    /// Takes one disruption from the budget of the pod, if it has one; refuses if none is left.
    pub(crate) async fn disrupt(&self, call: &Call, options: &DeleteOptions) -> Result<()> {
        let kind = kinds::by_resource("policy", "v1", "poddisruptionbudgets")
            .ok_or_else(Status::no_resource)?;
        let (namespace, name) = (call.info.namespace.as_str(), call.info.name.as_str());
        loop {
            let (_, pod) = self.find(call.kind, namespace, name)?;
            // What has ended, has not begun or is ending disrupts nobody.
            if matches!(
                pod["status"]["phase"].as_str(),
                Some("Succeeded" | "Failed" | "Pending")
            ) || meta::is_deleting(&pod)
            {
                return Ok(());
            }
            let page = self
                .store
                .list(&keys::prefix(kind, namespace), None, None, None)
                .map_err(|error| status::of_store(&error))?;
            let mut budgets = page.entries.into_iter().filter_map(|entry| {
                let budget = codec::decode(&entry.value);
                let selector = LabelSelector::from_json(&budget["spec"]["selector"]).ok()?;
                selector.matches(&pod).then_some((entry, budget))
            });
            let Some((entry, mut budget)) = budgets.next() else {
                return Ok(());
            };
            if budgets.next().is_some() {
                return Err(Status::internal(
                    "This pod has more than one PodDisruptionBudget, which the eviction \
                     subresource does not support.",
                ));
            }
            let ready = is_ready(&pod);
            let status = &budget["status"];
            let count = |field: &str| status[field].as_i64().unwrap_or_default();
            let always = budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow";
            let healthy = count("currentHealthy") >= count("desiredHealthy");
            if !ready && (always || (healthy && count("desiredHealthy") > 0)) {
                return Ok(());
            }
            take(&mut budget, name, &meta::format_time((self.clock)()))?;
            if options.dry_run {
                return Ok(());
            }
            let op = Op::Put(
                entry.key.clone(),
                Arc::new(Encoded::new(&budget)).to_store_value(),
            );
            let compares = vec![Compare::ModRevision(entry.key, entry.mod_revision)];
            match self
                .store
                .txn(compares, vec![op], Self::durability(kind))
                .await
            {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(status::of_store(&error)),
            }
        }
    }
}

fn is_ready(pod: &Value) -> bool {
    pod["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// Counts the pod as disrupted.
fn take(budget: &mut Value, pod: &str, now: &str) -> Result<()> {
    let name = meta::name(budget).unwrap_or_default().to_owned();
    let refuse_for = |why: String, seconds: u32| {
        let mut status = Status::too_many_requests(
            "Cannot evict pod as it would violate the pod's disruption budget.",
            seconds,
        );
        status = status.with_cause("DisruptionBudget", &why, "");
        Err(status)
    };
    let refuse = |why: String| refuse_for(why, 0);
    let status = &mut budget["status"];
    let generation = status["observedGeneration"].as_i64().unwrap_or_default();
    let allowed = status["disruptionsAllowed"].as_i64().unwrap_or_default();
    let healthy = status["currentHealthy"].as_i64().unwrap_or_default();
    let desired = status["desiredHealthy"].as_i64().unwrap_or_default();
    let under_way = status["disruptedPods"]
        .as_object()
        .map_or(0, serde_json::Map::len);
    if generation
        < budget["metadata"]["generation"]
            .as_i64()
            .unwrap_or_default()
    {
        let why = format!("The disruption budget {name} is still being processed by the server.");
        return refuse_for(why, RETRY_SECONDS);
    }
    if allowed < 0 {
        return refuse("pdb disruptions allowed is negative".into());
    }
    if under_way > MAX_DISRUPTED {
        return refuse(
            "DisruptedPods map too big - too many evictions not confirmed by PDB controller".into(),
        );
    }
    if allowed == 0 {
        return refuse(format!(
            "The disruption budget {name} needs {desired} healthy pods and has {healthy} currently"
        ));
    }
    let status = &mut budget["status"];
    status["disruptionsAllowed"] = (allowed - 1).into();
    if allowed == 1 {
        let condition = json!({"type": "DisruptionAllowed", "status": "False",
            "reason": "InsufficientPods", "message": "", "lastTransitionTime": now,
            "observedGeneration": generation});
        match status["conditions"].as_array_mut() {
            Some(conditions) => {
                conditions.retain(|condition| condition["type"] != "DisruptionAllowed");
                conditions.push(condition);
            }
            None => status["conditions"] = json!([condition]),
        }
    }
    if !status["disruptedPods"].is_object() {
        status["disruptedPods"] = json!({});
    }
    // The controller forgets the entry when it sees the pod go, or after two minutes.
    status["disruptedPods"][pod] = now.into();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_spent_one_by_one() {
        let mut budget = json!({"metadata": {"name": "b", "generation": 1}, "status": {
            "observedGeneration": 1, "disruptionsAllowed": 1, "currentHealthy": 3, "desiredHealthy": 2}});
        take(&mut budget, "p", "2026-01-01T00:00:00Z").unwrap();
        assert_eq!(budget["status"]["disruptionsAllowed"], 0);
        assert_eq!(
            budget["status"]["disruptedPods"]["p"],
            "2026-01-01T00:00:00Z"
        );
        let refused = take(&mut budget, "q", "2026-01-01T00:00:00Z").unwrap_err();
        assert_eq!((refused.code, refused.reason), (429, "TooManyRequests"));
        assert!(
            refused
                .to_value()
                .to_string()
                .contains("The disruption budget b needs 2 healthy pods and has 3 currently")
        );
        budget["metadata"]["generation"] = 2.into();
        let refused = take(&mut budget, "q", "2026-01-01T00:00:00Z").unwrap_err();
        assert!(
            refused
                .to_value()
                .to_string()
                .contains("still being processed")
        );
    }
}
