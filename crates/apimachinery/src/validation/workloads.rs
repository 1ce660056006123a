//! Rules of `apps` and `batch`.

use serde_json::{Value, json};

use crate::{
    kinds::ResourceKind,
    meta::rules,
    schedule::{Schedule, time_zone},
    selector::LabelSelector,
};

use super::{Found, Path, items, meta, pod, storage, text};

/// A cron job's name and eleven characters are the name of its job, which becomes a label.
const MAX_CRON_JOB_NAME: usize = 52;
/// Indexes are kept as text of this length at most.
const MAX_INDEXES: i64 = 100_000;

pub(super) fn validate(kind: &ResourceKind, object: &Value, found: &mut Found) {
    let (spec, path) = (&object["spec"], Path::root("spec"));
    match kind.kind {
        "Deployment" => deployment(spec, &path, found),
        "ReplicaSet" => {
            found.not_negative(&path.field("replicas"), &spec["replicas"]);
            found.not_negative(&path.field("minReadySeconds"), &spec["minReadySeconds"]);
            selected(
                spec,
                &path,
                "empty selector is invalid for deployment",
                found,
            );
            template(spec, &path, &["Always"], found);
        }
        "StatefulSet" => stateful_set(spec, &path, found),
        "DaemonSet" => daemon_set(spec, &path, found),
        "ControllerRevision" => found.not_negative(&Path::root("revision"), &object["revision"]),
        "Job" => job(spec, &path, true, found),
        "CronJob" => cron_job(object, spec, &path, found),
        _ => {}
    }
}

/// The selector of a kind that owns pods, and that its template's pods are selected by it.
fn selected(spec: &Value, path: &Path, when_empty: &str, found: &mut Found) {
    let at = path.field("selector");
    if !spec["selector"].is_object() {
        found.required(&at, "");
        return;
    }
    let Some(selector) = selector(&spec["selector"], &at, found) else {
        return;
    };
    if selector.is_empty() {
        found.invalid(&at, &spec["selector"], when_empty);
        return;
    }
    let template = &spec["template"]["metadata"]["labels"];
    if !selector.matches_labels(template.as_object()) {
        found.invalid(
            &path.field("template.metadata.labels"),
            template,
            "`selector` does not match template `labels`",
        );
    }
}

/// The selector, if it can be read.
pub(super) fn selector(value: &Value, path: &Path, found: &mut Found) -> Option<LabelSelector> {
    meta::labels(&value["matchLabels"], &path.field("matchLabels"), found);
    match LabelSelector::from_json(value) {
        Ok(selector) => Some(selector),
        Err(error) => {
            found.invalid(path, value, error.to_string());
            None
        }
    }
}

pub(super) fn template(spec: &Value, path: &Path, policies: &[&str], found: &mut Found) {
    let (template, at) = (&spec["template"], path.field("template"));
    let labels = at.field("metadata.labels");
    meta::labels(&template["metadata"]["labels"], &labels, found);
    if !template["spec"].is_object() {
        found.required(&at.field("spec.containers"), "");
        return;
    }
    pod::validate_spec(&template["spec"], &at.field("spec"), found);
    let policy = &template["spec"]["restartPolicy"];
    if !policies.contains(&policy.as_str().unwrap_or_default()) {
        let at = at.field("spec.restartPolicy");
        match policies {
            ["Always"] => found.not_supported(&at, policy, policies),
            _ => found.required(&at, "valid values: \"OnFailure\", \"Never\""),
        }
    }
    if policies == ["Always"] && template["spec"]["activeDeadlineSeconds"].is_i64() {
        found.forbidden(
            &at.field("spec.activeDeadlineSeconds"),
            "activeDeadlineSeconds in ReplicaSet is not Supported",
        );
    }
}

/// A number or a percentage; gives the number, or the percentage as a number below zero never.
fn amount(value: &Value, path: &Path, found: &mut Found) -> Option<i64> {
    match value {
        Value::Null => None,
        Value::Number(_) => {
            found.not_negative(path, value);
            value.as_i64()
        }
        _ => {
            let text = value.as_str().unwrap_or_default();
            let percent = text
                .strip_suffix('%')
                .filter(|digits| digits.chars().all(|c| c.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok());
            if percent.is_none() {
                found.invalid(
                    path,
                    value,
                    "a valid percent string must be a numeric string followed by an ending '%' \
                     (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
                );
            }
            percent
        }
    }
}

pub(super) fn amount_of_pods(value: &Value, path: &Path, most: bool, found: &mut Found) -> i64 {
    let amount = amount(value, path, found).unwrap_or_default();
    if most && value.is_string() && amount > 100 {
        found.invalid(path, value, "must not be greater than 100%");
    }
    amount
}

fn deployment(spec: &Value, path: &Path, found: &mut Found) {
    found.not_negative(&path.field("replicas"), &spec["replicas"]);
    selected(
        spec,
        path,
        "empty selector is invalid for deployment",
        found,
    );
    template(spec, path, &["Always"], found);
    let (strategy, at) = (&spec["strategy"], path.field("strategy"));
    match text(strategy, "type") {
        "Recreate" => {
            if !strategy["rollingUpdate"].is_null() {
                found.forbidden(
                    &at.field("rollingUpdate"),
                    "may not be specified when strategy `type` is 'Recreate'",
                );
            }
        }
        "RollingUpdate" => {
            let (rolling, at) = (&strategy["rollingUpdate"], at.field("rollingUpdate"));
            let unavailable = at.field("maxUnavailable");
            let most = amount_of_pods(&rolling["maxUnavailable"], &unavailable, true, found);
            let surge = amount_of_pods(&rolling["maxSurge"], &at.field("maxSurge"), false, found);
            if most == 0 && surge == 0 {
                let value = &rolling["maxUnavailable"];
                found.invalid(&unavailable, value, "may not be 0 when `maxSurge` is 0");
            }
        }
        _ => found.not_supported(
            &at.field("type"),
            &strategy["type"],
            &["Recreate", "RollingUpdate"],
        ),
    }
    for field in [
        "minReadySeconds",
        "revisionHistoryLimit",
        "progressDeadlineSeconds",
    ] {
        found.not_negative(&path.field(field), &spec[field]);
    }
    let ready = spec["minReadySeconds"].as_i64().unwrap_or_default();
    if spec["progressDeadlineSeconds"]
        .as_i64()
        .is_some_and(|deadline| deadline <= ready)
    {
        found.invalid(
            &path.field("progressDeadlineSeconds"),
            &spec["progressDeadlineSeconds"],
            "must be greater than minReadySeconds",
        );
    }
}

fn stateful_set(spec: &Value, path: &Path, found: &mut Found) {
    let policies = ["OrderedReady", "Parallel"];
    let at = path.field("podManagementPolicy");
    if !policies.contains(&text(spec, "podManagementPolicy")) {
        found.invalid(
            &at,
            &spec["podManagementPolicy"],
            "must be 'OrderedReady' or 'Parallel'",
        );
    }
    let (strategy, at) = (&spec["updateStrategy"], path.field("updateStrategy"));
    match text(strategy, "type") {
        "RollingUpdate" => found.not_negative(
            &at.field("rollingUpdate.partition"),
            &strategy["rollingUpdate"]["partition"],
        ),
        "OnDelete" => {
            if !strategy["rollingUpdate"].is_null() {
                found.invalid(
                    &at.field("rollingUpdate"),
                    &strategy["rollingUpdate"],
                    "only allowed for updateStrategy 'RollingUpdate'",
                );
            }
        }
        _ => found.invalid(&at, strategy, "must be 'RollingUpdate' or 'OnDelete'"),
    }
    for field in ["replicas", "minReadySeconds", "revisionHistoryLimit"] {
        found.not_negative(&path.field(field), &spec[field]);
    }
    found.not_negative(&path.field("ordinals.start"), &spec["ordinals"]["start"]);
    selected(
        spec,
        path,
        "empty selector is invalid for statefulset",
        found,
    );
    for (claim, at) in items(
        &spec["volumeClaimTemplates"],
        &path.field("volumeClaimTemplates"),
    ) {
        let name = text(&claim["metadata"], "name");
        found.all_invalid(&at.field("metadata.name"), name, rules::label(name));
        storage::claim(&claim["spec"], &at.field("spec"), found);
    }
    let (retention, at) = (
        &spec["persistentVolumeClaimRetentionPolicy"],
        path.field("persistentVolumeClaimRetentionPolicy"),
    );
    for field in ["whenDeleted", "whenScaled"] {
        if !["Delete", "Retain"].contains(&text(retention, field)) {
            found.not_supported(&at.field(field), &retention[field], &["Delete", "Retain"]);
        }
    }
    template(&storage::with_claims(spec), path, &["Always"], found);
}

fn daemon_set(spec: &Value, path: &Path, found: &mut Found) {
    selected(spec, path, "empty selector is invalid for daemonset", found);
    template(spec, path, &["Always"], found);
    for field in ["minReadySeconds", "revisionHistoryLimit"] {
        found.not_negative(&path.field(field), &spec[field]);
    }
    let (strategy, at) = (&spec["updateStrategy"], path.field("updateStrategy"));
    match text(strategy, "type") {
        "OnDelete" => {}
        "RollingUpdate" => {
            let (rolling, at) = (&strategy["rollingUpdate"], at.field("rollingUpdate"));
            let unavailable = at.field("maxUnavailable");
            let most = amount_of_pods(&rolling["maxUnavailable"], &unavailable, true, found);
            let surge = amount_of_pods(&rolling["maxSurge"], &at.field("maxSurge"), true, found);
            match (most, surge) {
                (0, 0) => found.invalid(
                    &unavailable,
                    &rolling["maxUnavailable"],
                    "cannot be 0 when maxSurge is 0",
                ),
                (1.., 1..) => found.invalid(
                    &at.field("maxSurge"),
                    &rolling["maxSurge"],
                    "may not be set when maxUnavailable is non-zero",
                ),
                _ => {}
            }
        }
        _ => found.not_supported(
            &at.field("type"),
            &strategy["type"],
            &["OnDelete", "RollingUpdate"],
        ),
    }
}

/// `own`: a job, whose selector is there; in a cron job's template it is made later.
fn job(spec: &Value, path: &Path, own: bool, found: &mut Found) {
    for field in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        found.not_negative(&path.field(field), &spec[field]);
    }
    let modes = ["NonIndexed", "Indexed"];
    let mode = text(spec, "completionMode");
    if !mode.is_empty() && !modes.contains(&mode) {
        found.not_supported(
            &path.field("completionMode"),
            &spec["completionMode"],
            &modes,
        );
    }
    if mode == "Indexed" {
        let at = path.field("completions");
        match spec["completions"].as_i64() {
            None => found.required(&at, &format!("when completion mode is {mode}")),
            Some(_) => {
                let at = path.field("parallelism");
                if spec["parallelism"].as_i64().unwrap_or_default() > MAX_INDEXES {
                    found.invalid(
                        &at,
                        &spec["parallelism"],
                        "must be less than or equal to 100000 when completion mode is Indexed",
                    );
                }
            }
        }
    } else if spec["backoffLimitPerIndex"].is_i64() {
        found.invalid(
            &path.field("backoffLimitPerIndex"),
            &spec["backoffLimitPerIndex"],
            "requires indexed completion mode",
        );
    }
    super::jobs::success_policy(spec, path, found);
    for (rule, at) in items(
        &spec["podFailurePolicy"]["rules"],
        &path.field("podFailurePolicy.rules"),
    ) {
        let actions = ["Count", "FailIndex", "FailJob", "Ignore"];
        found.one_of(&at.field("action"), &rule["action"], &actions);
        let codes = rule["onExitCodes"].is_object();
        let conditions = rule["onPodConditions"]
            .as_array()
            .is_some_and(|c| !c.is_empty());
        if codes == conditions {
            found.invalid(
                &at,
                rule,
                if codes {
                    "specifying both OnExitCodes and OnPodConditions is not supported"
                } else {
                    "specifying one of OnExitCodes and OnPodConditions is required"
                },
            );
        }
    }
    if spec["podFailurePolicy"].is_object() && spec["template"]["spec"]["restartPolicy"] != "Never"
    {
        found.invalid(
            &path.field("template.spec.restartPolicy"),
            &spec["template"]["spec"]["restartPolicy"],
            "only \"Never\" is supported when podFailurePolicy is specified",
        );
    }
    if own {
        selected(spec, path, "empty selector is invalid for job", found);
    } else if spec["manualSelector"] == true {
        found.not_supported(
            &path.field("manualSelector"),
            &spec["manualSelector"],
            &["nil", "false"],
        );
    }
    template(spec, path, &["OnFailure", "Never"], found);
}

fn cron_job(object: &Value, spec: &Value, path: &Path, found: &mut Found) {
    if text(&object["metadata"], "name").len() > MAX_CRON_JOB_NAME {
        found.invalid(
            &Path::root("metadata.name"),
            &object["metadata"]["name"],
            format!("must be no more than {MAX_CRON_JOB_NAME} characters"),
        );
    }
    let schedule = text(spec, "schedule");
    let at = path.field("schedule");
    if schedule.is_empty() {
        found.required(&at, "");
    } else if schedule.contains("TZ") {
        found.invalid(
            &at,
            &spec["schedule"],
            "cannot use TZ or CRON_TZ in schedule, use timeZone field instead",
        );
    } else if let Err(error) = Schedule::parse(schedule, None) {
        found.invalid(&at, &spec["schedule"], error.to_string());
    }
    if let Some(zone) = spec["timeZone"].as_str() {
        let at = path.field("timeZone");
        match time_zone(zone) {
            _ if zone.is_empty() => {
                found.invalid(
                    &at,
                    &spec["timeZone"],
                    "timeZone must be nil or non-empty string",
                );
            }
            Ok(_) => {}
            Err(error) => found.invalid(&at, &spec["timeZone"], error.to_string()),
        }
    }
    let policies = ["Allow", "Forbid", "Replace"];
    let at = path.field("concurrencyPolicy");
    found.one_of(&at, &spec["concurrencyPolicy"], &policies);
    for field in [
        "startingDeadlineSeconds",
        "successfulJobsHistoryLimit",
        "failedJobsHistoryLimit",
    ] {
        found.not_negative(&path.field(field), &spec[field]);
    }
    let at = path.field("jobTemplate.spec");
    job(&spec["jobTemplate"]["spec"], &at, false, found);
}

// === changes ===

pub(super) fn validate_update(kind: &ResourceKind, new: &Value, old: &Value, found: &mut Found) {
    let (is, was, path) = (&new["spec"], &old["spec"], Path::root("spec"));
    let mut fixed = |field: &str| found.immutable(&path.field(field), &is[field], &was[field]);
    match kind.kind {
        "Deployment" | "ReplicaSet" | "DaemonSet" => fixed("selector"),
        "StatefulSet" => stateful_set_update(is, was, &path, found),
        "ControllerRevision" => found.immutable(&Path::root("data"), &new["data"], &old["data"]),
        "Job" => {
            // An indexed job grows and shrinks with its parallelism.
            let elastic =
                text(is, "completionMode") == "Indexed" && is["completions"] == is["parallelism"];
            if !elastic {
                fixed("completions");
            }
            for field in [
                "selector",
                "podFailurePolicy",
                "completionMode",
                "backoffLimitPerIndex",
                "managedBy",
                "successPolicy",
            ] {
                fixed(field);
            }
            job_template_update(is, old, &path, found);
        }
        _ => {}
    }
}

/// A job that has not begun may still be told where and with what its pods run.
fn job_template_update(is: &Value, old: &Value, path: &Path, found: &mut Found) {
    let was = &old["spec"];
    let mut masked = is["template"].clone();
    if was["suspend"] == true && old["status"]["startTime"].is_null() {
        for field in ["nodeSelector", "tolerations", "affinity", "schedulingGates"] {
            mask(&mut masked["spec"], &was["template"]["spec"], field);
        }
        for field in ["labels", "annotations"] {
            mask(&mut masked["metadata"], &was["template"]["metadata"], field);
        }
        let old_containers = &was["template"]["spec"]["containers"];
        if let Some(list) = masked["spec"]["containers"].as_array_mut() {
            for (index, container) in list.iter_mut().enumerate() {
                mask(container, &old_containers[index], "resources");
            }
        }
    }
    if masked != was["template"] {
        found.invalid(
            &path.field("template"),
            &is["template"],
            "field is immutable",
        );
    }
}

fn mask(new: &mut Value, old: &Value, field: &str) {
    let Some(new) = new.as_object_mut() else {
        return;
    };
    match old.get(field) {
        Some(value) => new.insert(field.to_owned(), value.clone()),
        None => new.remove(field),
    };
}

fn stateful_set_update(is: &Value, was: &Value, path: &Path, found: &mut Found) {
    let mut masked = is.clone();
    for field in [
        "replicas",
        "ordinals",
        "template",
        "updateStrategy",
        "revisionHistoryLimit",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
    ] {
        mask(&mut masked, was, field);
    }
    if masked != *was {
        found.forbidden(
            path,
            "updates to statefulset spec for fields other than 'replicas', 'ordinals', \
             'template', 'updateStrategy', 'revisionHistoryLimit', \
             'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
        );
    }
}

/// What is wrong with a body of `scale`.
pub fn validate_scale(scale: &Value) -> Vec<super::FieldError> {
    let mut found = Found::default();
    let replicas = &scale["spec"]["replicas"];
    let replicas = if replicas.is_null() {
        &json!(0)
    } else {
        replicas
    };
    found.not_negative(&Path::root("spec.replicas"), replicas);
    found.errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{defaults, kinds::by_api_version};

    fn object(api_version: &str, kind: &str, spec: Value) -> (&'static ResourceKind, Value) {
        let kind = by_api_version(api_version, kind).unwrap();
        let mut object = json!({"metadata": {"name": "x", "namespace": "d"}, "spec": spec});
        defaults::apply(kind, &mut object);
        (kind, object)
    }

    fn template(policy: &str) -> Value {
        json!({"metadata": {"labels": {"a": "b"}},
            "spec": {"restartPolicy": policy, "containers": [{"name": "c", "image": "i"}]}})
    }

    fn spec(policy: &str, more: &Value) -> Value {
        let mut spec =
            json!({"selector": {"matchLabels": {"a": "b"}}, "template": template(policy)});
        for (field, value) in more.as_object().unwrap() {
            spec[field] = value.clone();
        }
        spec
    }

    fn errors(api_version: &str, kind: &str, spec: Value) -> Vec<String> {
        let (kind, object) = object(api_version, kind, spec);
        let errors = super::super::validate_create(kind, &object);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn deployments_are_refused_in_upstreams_words() {
        let cases = [
            (json!({}), vec![]),
            (
                json!({"replicas": -1}),
                vec!["spec.replicas: Invalid value: -1: must be greater than or equal to 0"],
            ),
            (
                json!({"selector": null}),
                vec!["spec.selector: Required value"],
            ),
            (
                json!({"selector": {}}),
                vec!["spec.selector: Invalid value: {}: empty selector is invalid for deployment"],
            ),
            (
                json!({"selector": {"matchLabels": {"a": "c"}}}),
                vec![
                    "spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`",
                ],
            ),
            (
                json!({"template": template("Never")}),
                vec![
                    "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
                ],
            ),
            (
                json!({"strategy": {"type": "Recreate", "rollingUpdate": {"maxSurge": 1}}}),
                vec![
                    "spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type` is 'Recreate'",
                ],
            ),
            (
                json!({"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}}),
                vec![
                    "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0",
                ],
            ),
            (
                json!({"progressDeadlineSeconds": 5, "minReadySeconds": 5}),
                vec![
                    "spec.progressDeadlineSeconds: Invalid value: 5: must be greater than minReadySeconds",
                ],
            ),
        ];
        for (more, expected) in cases {
            assert_eq!(
                errors("apps/v1", "Deployment", spec("Always", &more)),
                expected,
                "{more}"
            );
        }
    }

    #[test]
    fn jobs_need_an_end() {
        let ok = spec("Never", &json!({}));
        assert_eq!(errors("batch/v1", "Job", ok), Vec::<String>::new());
        assert_eq!(
            errors("batch/v1", "Job", spec("Always", &json!({}))),
            [
                "spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\""
            ]
        );
        assert_eq!(
            errors(
                "batch/v1",
                "Job",
                spec(
                    "Never",
                    &json!({"completionMode": "Indexed", "parallelism": 2})
                )
            ),
            ["spec.completions: Required value: when completion mode is Indexed"]
        );
        assert_eq!(
            errors(
                "batch/v1",
                "Job",
                spec("Never", &json!({"backoffLimitPerIndex": 1}))
            ),
            ["spec.backoffLimitPerIndex: Invalid value: 1: requires indexed completion mode"]
        );
    }

    #[test]
    fn cron_jobs_need_a_time() {
        let cron = |schedule: &str, more: &Value| {
            let mut spec = json!({"schedule": schedule, "jobTemplate": {"spec": {"template": template("Never")}}});
            for (field, value) in more.as_object().unwrap() {
                spec[field] = value.clone();
            }
            errors("batch/v1", "CronJob", spec)
        };
        assert_eq!(cron("*/5 * * * *", &json!({})), Vec::<String>::new());
        assert_eq!(cron("", &json!({})), ["spec.schedule: Required value"]);
        assert_eq!(
            cron("* * *", &json!({})),
            [
                "spec.schedule: Invalid value: \"* * *\": expected exactly 5 fields, found 3: [* * *]"
            ]
        );
        assert_eq!(
            cron("TZ=UTC * * * * *", &json!({})),
            [
                "spec.schedule: Invalid value: \"TZ=UTC * * * * *\": cannot use TZ or CRON_TZ in schedule, use timeZone field instead"
            ]
        );
        assert_eq!(
            cron("* * * * *", &json!({"timeZone": "Mars"})),
            ["spec.timeZone: Invalid value: \"Mars\": unknown time zone Mars"]
        );
        assert_eq!(
            cron("* * * * *", &json!({"concurrencyPolicy": "Maybe"})),
            [
                "spec.concurrencyPolicy: Unsupported value: \"Maybe\": supported values: \"Allow\", \"Forbid\", \"Replace\""
            ]
        );
    }

    #[test]
    fn what_may_not_change_is_named() {
        let cases = [
            (
                "apps/v1",
                "Deployment",
                "Always",
                json!({"selector": {"matchLabels": {"a": "b"}, "matchExpressions": []}}),
                "spec.selector",
            ),
            (
                "apps/v1",
                "StatefulSet",
                "Always",
                json!({"serviceName": "other"}),
                "spec",
            ),
            (
                "batch/v1",
                "Job",
                "Never",
                json!({"completions": 3}),
                "spec.completions",
            ),
            (
                "batch/v1",
                "Job",
                "Never",
                json!({"template": template("OnFailure")}),
                "spec.template",
            ),
        ];
        for (api_version, kind, policy, change, field) in cases {
            let (kind, old) = object(api_version, kind, spec(policy, &json!({})));
            let (_, new) = object(api_version, kind.kind, spec(policy, &change));
            let errors = super::super::validate_update(kind, &new, &old);
            let fields: Vec<&str> = errors.iter().map(|e| e.field.as_str()).collect();
            assert_eq!(fields, [field], "{kind:?} {errors:?}");
            assert!(super::super::validate_update(kind, &old, &old).is_empty());
        }
    }
}
