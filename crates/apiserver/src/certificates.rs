//! Requests for certificates: who asks is written down by the server, and a decision is a subresource.

use hypernetes_apimachinery::{ResourceKind, Status, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    engine::{Call, Engine},
    rbac::Action,
    status::Result,
};

const GROUP: &str = "certificates.k8s.io";
/// Conditions that only the subresource `approval` sets.
const DECISIONS: [&str; 2] = ["Approved", "Denied"];

pub(crate) fn is_request(kind: &ResourceKind) -> bool {
    kind.group == GROUP
}

/// Writes into a new request who makes it; what it says of that itself is not believed.
pub(crate) fn prepare_create(call: &Call, object: &mut Value) {
    if !is_request(call.kind) || !object["spec"].is_object() {
        return;
    }
    let user = &call.user;
    object["spec"]["username"] = user.name.as_str().into();
    object["spec"]["groups"] = user.groups.as_slice().into();
    if let Some(spec) = object["spec"].as_object_mut() {
        for field in ["uid", "extra"] {
            spec.remove(field);
        }
        if !user.uid.is_empty() {
            spec.insert("uid".into(), user.uid.as_str().into());
        }
    }
}

/// Takes over of a changed status what the write is about: the decision, or everything but it.
pub(crate) fn prepare_status(new: &mut Value, old: &Value, decision: bool, now: Timestamp) {
    let is_decision =
        |condition: &Value| DECISIONS.contains(&condition["type"].as_str().unwrap_or_default());
    let list = |object: &Value| -> Vec<Value> {
        let conditions = object["status"]["conditions"].as_array();
        conditions.into_iter().flatten().cloned().collect()
    };
    let (mut wanted, former) = (list(new), list(old));
    if decision {
        let conditions = std::mem::take(&mut wanted);
        new["status"] = old["status"].clone();
        if !new["status"].is_object() {
            new["status"] = json!({});
        }
        wanted = conditions;
    } else {
        wanted.retain(|condition| !is_decision(condition));
        let mut kept: Vec<Value> = former
            .iter()
            .filter(|one| is_decision(one))
            .cloned()
            .collect();
        kept.append(&mut wanted);
        wanted = kept;
    }
    let time = meta::format_time(now);
    for condition in &mut wanted {
        let was = former.iter().find(|one| one["type"] == condition["type"]);
        if condition["lastUpdateTime"].is_null() {
            condition["lastUpdateTime"] = time.as_str().into();
        }
        if condition["lastTransitionTime"].is_null() {
            let same = was.filter(|one| one["status"] == condition["status"]);
            condition["lastTransitionTime"] = match same {
                Some(one) => one["lastTransitionTime"].clone(),
                None => time.as_str().into(),
            };
        }
    }
    if !wanted.is_empty() {
        new["status"]["conditions"] = wanted.into();
    }
}

impl Engine {
    /// Whether the caller may decide about requests to the signer.
    pub(crate) fn check_signer(&self, call: &Call, old: &Value, verb: &'static str) -> Result<()> {
        if !is_request(call.kind) {
            return Ok(());
        }
        let signer = old["spec"]["signerName"].as_str().unwrap_or_default();
        let domain = signer.split('/').next().unwrap_or_default();
        for name in [signer, &format!("{domain}/*")] {
            let action = Action {
                verb,
                group: GROUP,
                resource: "signers",
                name,
                ..Action::default()
            };
            if self.authorizer.allows(&call.user, &action)? {
                return Ok(());
            }
        }
        let why = format!("user not permitted to {verb} requests with signerName {signer:?}");
        Err(Status::forbidden(
            GROUP,
            call.kind.plural,
            &call.info.name,
            &why,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_changes_nothing_else_and_only_itself() {
        let old = json!({"status": {"certificate": "c", "conditions": [{"type": "Approved", "status": "True"}]}});
        let mut new = json!({"status": {"certificate": "x", "conditions": [
            {"type": "Approved", "status": "True"}, {"type": "Other", "status": "True"}]}});
        prepare_status(&mut new, &old, true, Timestamp::UNIX_EPOCH);
        assert_eq!(new["status"]["certificate"], "c");
        assert_eq!(
            new["status"]["conditions"][1]["lastUpdateTime"],
            "1970-01-01T00:00:00Z"
        );
        let mut new = json!({"status": {"certificate": "y", "conditions": [
            {"type": "Denied", "status": "True"}, {"type": "Failed", "status": "True"}]}});
        prepare_status(&mut new, &old, false, Timestamp::UNIX_EPOCH);
        assert_eq!(new["status"]["certificate"], "y");
        let kinds: Vec<&Value> = new["status"]["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| &c["type"])
            .collect();
        assert_eq!(kinds, ["Approved", "Failed"]);
    }
}
