//! Priorities of pods by the name of their class.

use hypernetes_apimachinery::meta;
use serde_json::{Value, json};

/// Writes the class's number and its preemption policy into a new pod.
pub(super) fn complete(classes: &[Value], pod: &mut Value) -> Result<(), String> {
    let name = pod["spec"]["priorityClassName"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let class = if name.is_empty() {
        // Of several default classes the least counts, as upstream.
        let default = classes
            .iter()
            .filter(|class| class["globalDefault"] == true);
        default.min_by_key(|class| class["value"].as_i64())
    } else {
        let found = classes
            .iter()
            .find(|class| meta::name(class) == Some(&name));
        Some(found.ok_or_else(|| format!("no PriorityClass with name {name} was found"))?)
    };
    let value = class.map_or(0, |class| class["value"].as_i64().unwrap_or_default());
    let policy = class.map_or("PreemptLowerPriority", |class| {
        class["preemptionPolicy"]
            .as_str()
            .unwrap_or("PreemptLowerPriority")
    });
    let spec = &mut pod["spec"];
    if let Some(given) = spec["priority"].as_i64()
        && given != value
    {
        return Err(format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority \
             admission controller computed {value} from the given PriorityClass name"
        ));
    }
    match spec["preemptionPolicy"].as_str() {
        Some(given) if !given.is_empty() && given != policy => {
            return Err(format!(
                "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; \
                 priority admission controller computed {policy} from the given PriorityClass name"
            ));
        }
        _ => spec["preemptionPolicy"] = policy.into(),
    }
    spec["priority"] = value.into();
    if let Some(class) = class
        && name.is_empty()
    {
        spec["priorityClassName"] = json!(meta::name(class));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_priority_is_its_classs() {
        let class = |name: &str, value: i64, default: bool| json!({"metadata": {"name": name}, "value": value, "globalDefault": default, "preemptionPolicy": "Never"});
        let mut pod = json!({"spec": {}});
        complete(&[class("a", 5, false)], &mut pod).unwrap();
        assert_eq!(pod["spec"]["priority"], 0);
        assert_eq!(pod["spec"]["preemptionPolicy"], "PreemptLowerPriority");
        let mut pod = json!({"spec": {}});
        complete(&[class("a", 5, true), class("b", 3, true)], &mut pod).unwrap();
        assert_eq!(pod["spec"]["priorityClassName"], "b");
        let mut pod = json!({"spec": {"priorityClassName": "a"}});
        complete(&[class("a", 5, false)], &mut pod).unwrap();
        assert_eq!(
            (&pod["spec"]["priority"], &pod["spec"]["preemptionPolicy"]),
            (&json!(5), &json!("Never"))
        );
        let mut pod = json!({"spec": {"priorityClassName": "c"}});
        assert_eq!(
            complete(&[], &mut pod).unwrap_err(),
            "no PriorityClass with name c was found"
        );
        let mut pod = json!({"spec": {"priority": 7}});
        assert!(complete(&[], &mut pod).is_err());
    }
}
