//! What the server itself writes into workloads.

use hypernetes_apimachinery::{ResourceKind, meta};
use serde_json::{Value, json};

/// A job's pods are found by its id, unless it brings a selector of its own.
pub(super) fn finish_create(kind: &ResourceKind, object: &mut Value) {
    if (kind.group, kind.kind) != ("batch", "Job") || !object["spec"].is_object() {
        return;
    }
    if object["spec"]["manualSelector"] != true {
        let name = meta::name(object).unwrap_or_default().to_owned();
        let uid = meta::uid(object).unwrap_or_default().to_owned();
        let template = &mut object["spec"]["template"];
        if !template.is_object() {
            *template = json!({});
        }
        for (key, value) in [
            ("batch.kubernetes.io/controller-uid", &uid),
            ("batch.kubernetes.io/job-name", &name),
            // The names from before there was a prefix.
            ("controller-uid", &uid),
            ("job-name", &name),
        ] {
            meta::set_label(template, key, value);
        }
        object["spec"]["selector"]["matchLabels"]["batch.kubernetes.io/controller-uid"] =
            uid.into();
    }
    let unlabelled = meta::labels(object).is_none_or(serde_json::Map::is_empty);
    let labels = object["spec"]["template"]["metadata"]["labels"].clone();
    if unlabelled && labels.is_object() {
        meta::set(object, "labels", labels);
    }
}

#[cfg(test)]
mod tests {
    use hypernetes_apimachinery::kinds::by_api_version;

    use super::*;

    #[test]
    fn a_job_selects_its_own_pods() {
        let kind = by_api_version("batch/v1", "Job").unwrap();
        let mut job = json!({"metadata": {"name": "j", "uid": "u"}, "spec": {}});
        finish_create(kind, &mut job);
        assert_eq!(
            job["spec"]["selector"],
            json!({"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}})
        );
        let labels = &job["spec"]["template"]["metadata"]["labels"];
        assert_eq!(labels["job-name"], "j");
        assert_eq!(&job["metadata"]["labels"], labels);
        let mut manual = json!({"metadata": {"name": "j", "uid": "u"},
            "spec": {"manualSelector": true, "selector": {"matchLabels": {"a": "b"}}}});
        finish_create(kind, &mut manual);
        assert_eq!(
            manual["spec"]["selector"],
            json!({"matchLabels": {"a": "b"}})
        );
    }
}
