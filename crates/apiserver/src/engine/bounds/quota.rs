//! Quotas: charged when objects are made and when pods grow.

use std::sync::Arc;

use hypernetes_apimachinery::{
    Quantity, meta,
    quota::{self, Amounts},
};
use hypernetes_store::{Compare, Op};
use serde_json::Value;

use super::{Charge, is_pod, refusal};
use crate::{
    codec::Encoded,
    engine::{Call, Engine, strategy},
    status::Result,
};

impl Engine {
    /// Charges the namespace's quotas with a new object, or with the growth of a changed one.
    pub(crate) fn charge(
        &self,
        call: &Call,
        object: &Value,
        old: Option<&Value>,
    ) -> Result<Charge> {
        let kind = strategy::stored_kind(call.kind);
        let mut charge = Charge::default();
        // Upstream counts no events and no reviews; quotas are not charged for leases' heartbeats.
        if !kind.namespaced || matches!(kind.plural, "events") {
            return Ok(charge);
        }
        let mut delta = quota::usage(kind, object);
        if let Some(old) = old {
            let before = quota::usage(kind, old);
            delta = delta
                .into_iter()
                .map(|(name, amount)| {
                    let was = before.get(&name).copied().unwrap_or_default();
                    (name, amount - was)
                })
                .collect();
        }
        delta.retain(|_, amount| *amount > Quantity::default());
        if delta.is_empty() {
            return Ok(charge);
        }
        for (entry, mut quota) in self.listed("resourcequotas", &call.info.namespace)? {
            if !quota::counts(&quota, kind, object) {
                continue;
            }
            let name = meta::name(&quota).unwrap_or_default().to_owned();
            // Before the first count nobody knows what there is already.
            if quota["status"]["hard"].is_null() {
                let asked = quota::bounded(&delta, &quota::amounts(&quota["spec"]["hard"]));
                if asked.is_empty() {
                    continue;
                }
                let names: Vec<&str> = asked.keys().map(String::as_str).collect();
                let why = format!(
                    "status unknown for quota: {name}, resources: {}",
                    names.join(",")
                );
                return Err(refusal(call, object, &why));
            }
            let hard = quota::amounts(&quota["status"]["hard"]);
            if is_pod(kind) && old.is_none() {
                let missing = quota::unspecified(object, &hard);
                if !missing.is_empty() {
                    let why = format!("failed quota: {name}: must specify {}", missing.join("; "));
                    return Err(refusal(call, object, &why));
                }
            }
            let asked = quota::bounded(&delta, &hard);
            if asked.is_empty() {
                continue;
            }
            let used = quota::amounts(&quota["status"]["used"]);
            let mut total = used.clone();
            quota::add(&mut total, &asked);
            let over: Vec<&String> = asked
                .keys()
                .filter(|name| total.get(*name) > hard.get(*name))
                .collect();
            if !over.is_empty() {
                let shown = |amounts: &Amounts| {
                    let texts: Vec<String> = over
                        .iter()
                        .map(|name| {
                            let amount = amounts.get(*name).copied().unwrap_or_default();
                            format!("{name}={}", quota::show(name, amount))
                        })
                        .collect();
                    texts.join(",")
                };
                let why = format!(
                    "exceeded quota: {name}, requested: {}, used: {}, limited: {}",
                    shown(&asked),
                    shown(&used),
                    shown(&hard)
                );
                return Err(refusal(call, object, &why));
            }
            quota["status"]["hard"] = quota::to_value(&hard);
            quota["status"]["used"] = quota::to_value(&total);
            let encoded = Arc::new(Encoded::new(&quota));
            charge
                .compares
                .push(Compare::ModRevision(entry.key.clone(), entry.mod_revision));
            charge
                .ops
                .push(Op::Put(entry.key, encoded.to_store_value()));
        }
        Ok(charge)
    }
}
