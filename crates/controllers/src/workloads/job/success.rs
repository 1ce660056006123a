//! `successPolicy`: a job that has what it was for before all of its indexes have succeeded.

use serde_json::Value;

use super::{Indexes, is_indexed};

/// The rule that is met, as the condition says it.
pub(super) fn met(job: &Value, completed: &Indexes) -> Option<String> {
    if !is_indexed(job) || completed.len() == 0 {
        return None;
    }
    let end = job["spec"]["completions"].as_u64().unwrap_or_default();
    let rules = job["spec"]["successPolicy"]["rules"].as_array()?;
    let holds = |rule: &Value| {
        let count = rule["succeededCount"]
            .as_u64()
            .and_then(|count| usize::try_from(count).ok());
        match rule["succeededIndexes"].as_str() {
            Some(text) => {
                let wanted = Indexes::parse(text, end);
                let done = wanted.common(completed);
                wanted.len() > 0 && done >= count.unwrap_or(wanted.len())
            }
            None => count.is_some_and(|count| completed.len() >= count),
        }
    };
    let index = rules.iter().position(holds)?;
    Some(format!("Matched rules at index {index}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rule_is_met_by_indexes_a_count_or_both() {
        for (rules, done, expected) in [
            (
                json!([{"succeededIndexes": "0-2"}]),
                "0-2,4",
                Some("Matched rules at index 0"),
            ),
            (json!([{"succeededIndexes": "0-2"}]), "0,1,4", None),
            (
                json!([{"succeededIndexes": "0-2", "succeededCount": 2}]),
                "1,2",
                Some("Matched rules at index 0"),
            ),
            (
                json!([{"succeededIndexes": "9"}, {"succeededCount": 3}]),
                "0-2",
                Some("Matched rules at index 1"),
            ),
            (json!([{"succeededCount": 4}]), "0-2", None),
            (json!([{"succeededIndexes": "nonsense"}]), "0-2", None),
            (Value::Null, "0-4", None),
        ] {
            let job = json!({"spec": {"completionMode": "Indexed", "completions": 6, "successPolicy": {"rules": rules}}});
            let found = met(&job, &Indexes::parse(done, 6));
            assert_eq!(found.as_deref(), expected, "{job} {done}");
        }
    }
}
