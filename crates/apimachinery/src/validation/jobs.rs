//! Rules of a job's success policy.

use serde_json::Value;

use super::{Found, Path, items, text};

/// A policy has so many rules at most.
const MOST: usize = 20;

pub(super) fn success_policy(spec: &Value, path: &Path, found: &mut Found) {
    let policy = &spec["successPolicy"];
    if !policy.is_object() {
        return;
    }
    let at = path.field("successPolicy");
    if text(spec, "completionMode") != "Indexed" {
        found.invalid(&at, policy, "requires indexed completion mode");
        return;
    }
    let rules = &policy["rules"];
    let count = rules.as_array().map_or(0, Vec::len);
    if count == 0 {
        found.required(
            &at.field("rules"),
            "at least one rules must be specified when the successPolicy is specified",
        );
    }
    if count > MOST {
        found.add(
            super::ErrorKind::TooMany,
            &at.field("rules"),
            &count.into(),
            format!("must have at most {MOST} items"),
        );
    }
    let completions = spec["completions"].as_i64().unwrap_or_default();
    for (rule, at) in items(rules, &at.field("rules")) {
        one(rule, &at, completions, found);
    }
}

fn one(rule: &Value, at: &Path, completions: i64, found: &mut Found) {
    let (indexes, count) = (&rule["succeededIndexes"], &rule["succeededCount"]);
    if indexes.is_null() && count.is_null() {
        found.required(
            at,
            "at least one of succeededCount or succeededIndexes must be specified",
        );
        return;
    }
    let mut most = completions;
    if let Some(text) = indexes.as_str() {
        match total(text, completions) {
            Ok(total) => most = total,
            Err(detail) => found.invalid(&at.field("succeededIndexes"), indexes, detail),
        }
    }
    if let Some(wanted) = count.as_i64() {
        let path = at.field("succeededCount");
        if wanted < 1 {
            found.invalid(&path, count, "must be greater than or equal to 1");
        } else if wanted > most {
            let detail = if indexes.is_null() {
                format!(
                    "must be less than or equal to {most} (the number of specified completions)"
                )
            } else {
                format!(
                    "must be less than or equal to {most} (the number of indexes in the specified succeededIndexes field)"
                )
            };
            found.invalid(&path, count, detail);
        }
    }
}

/// How many indexes a text such as `0-2,5` has: rising, and below the number of completions.
fn total(text: &str, completions: i64) -> Result<i64, String> {
    let (mut last, mut total) = (-1, 0);
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| -> Result<i64, String> {
            let number: i64 = text.parse().map_err(|_error| {
                format!("cannot convert string to integer for index: {text:?}")
            })?;
            if number >= completions {
                return Err(format!("too large index: {text:?}"));
            }
            Ok(number)
        };
        let (from, to) = (number(from)?, number(to)?);
        if from <= last {
            return Err(format!(
                "non-increasing order, previous: {last}, current: {from}"
            ));
        }
        if to < from {
            return Err(format!(
                "non-increasing order, previous: {from}, current: {to}"
            ));
        }
        total += to - from + 1;
        last = to;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn policies_are_refused_by_the_field() {
        let text = |spec: Value| {
            let mut found = Found::default();
            success_policy(&spec, &Path::root("spec"), &mut found);
            let texts: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
            texts.join("; ")
        };
        let with = |rule: Value| json!({"completionMode": "Indexed", "completions": 5, "successPolicy": {"rules": [rule]}});
        assert_eq!(
            text(with(
                json!({"succeededIndexes": "0,2-3", "succeededCount": 3})
            )),
            ""
        );
        assert!(text(with(json!({"succeededIndexes": "0,9"}))).contains("too large index"));
        assert!(text(with(json!({"succeededIndexes": "3,1"}))).contains("non-increasing order"));
        assert!(
            text(with(
                json!({"succeededIndexes": "0-1", "succeededCount": 3})
            ))
            .contains("succeededCount")
        );
        assert!(text(with(json!({}))).contains("at least one of"));
        let plain = json!({"successPolicy": {"rules": [{"succeededCount": 1}]}});
        assert!(text(plain).contains("requires indexed completion mode"));
    }
}
