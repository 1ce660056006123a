//! What this node does: the table of the pod fields that it honours.
//!
//! The table lists what is supported, not what is not, so that a field nobody has thought of is
//! refused by its name and never silently dropped. A value that asks for nothing (`null`, `false`,
//! an empty text, list or object) needs no support.

use hypernetes_types::{PageSize, Quantity};
use serde_json::Value;

use crate::FieldError;

/// What the node does with a field.
#[derive(Debug, Clone, Copy)]
enum Support {
    /// Honours it and all that is in it.
    Yes,
    /// Has rules for what is in it.
    Inside,
    /// Honours these texts.
    Only(&'static [&'static str]),
    /// Does not honour it, for this reason or with this advice.
    No(&'static str),
    /// A rule of its own: what is wrong, if anything.
    Rule(fn(&Value) -> Option<String>),
}

use Support::{Inside, No, Only, Rule, Yes};

const OWN_ADDRESS: &str =
    "probes and hooks reach the pod's own address only: leave it unset, and give a Host header";
/// emptyDirs on disk that can have a limit each: a limit is a disk, and a pod has so many slots.
const MAX_LIMITED: usize = 32;
const NO_TCP_HOOK: &str = "was never implemented by any node; use exec or httpGet";

/// Fields of `spec`. `[]` stands for every element of a list.
const POD: &[(&str, Support)] = &[
    ("activeDeadlineSeconds", Yes),
    ("affinity", Rule(affinity)),
    ("automountServiceAccountToken", Yes),
    ("containers", Inside),
    ("dnsConfig", Inside),
    ("dnsConfig.nameservers", Yes),
    ("dnsConfig.options", Yes),
    ("dnsConfig.searches", Yes),
    ("dnsPolicy", Only(&["ClusterFirst", "Default", "None"])),
    ("enableServiceLinks", Yes),
    ("ephemeralContainers", Inside),
    ("hostAliases", Inside),
    ("hostAliases[].hostnames", Yes),
    ("hostAliases[].ip", Yes),
    (
        "hostIPC",
        No("a pod has its own kernel and cannot join the node's namespaces"),
    ),
    (
        "hostNetwork",
        No("a pod has its own kernel and cannot join the node's namespaces"),
    ),
    (
        "hostPID",
        No("a pod has its own kernel and cannot join the node's namespaces"),
    ),
    ("hostUsers", Yes),
    ("hostname", Yes),
    (
        "hostnameOverride",
        No("is not supported by this node; use hostname"),
    ),
    ("imagePullSecrets", Yes),
    ("initContainers", Inside),
    ("nodeName", Yes),
    ("nodeSelector", Yes),
    ("os", Inside),
    ("os.name", Only(&["linux"])),
    (
        "overhead",
        No("is not supported by this node: the VM's overhead is added by itself"),
    ),
    ("preemptionPolicy", Yes),
    ("priority", Yes),
    ("priorityClassName", Yes),
    ("readinessGates", Yes),
    (
        "resourceClaims",
        No("dynamic resource allocation is not supported by this node"),
    ),
    ("resources", Inside),
    (
        "resources.claims",
        No("dynamic resource allocation is not supported by this node"),
    ),
    ("resources.limits", Rule(pod_limits)),
    ("resources.requests", Rule(pod_resource_names)),
    ("restartPolicy", Only(&["Always", "OnFailure", "Never"])),
    ("runtimeClassName", Only(&[crate::RUNTIME_CLASS])),
    ("schedulerName", Only(&["default-scheduler"])),
    ("schedulingGates", Yes),
    ("schedulingGroup", No("pod groups are not supported")),
    ("workloadRef", No("pod groups are not supported")),
    ("securityContext", Inside),
    ("securityContext.appArmorProfile", Inside),
    (
        "securityContext.appArmorProfile.type",
        Only(&["Unconfined"]),
    ),
    ("securityContext.fsGroup", Yes),
    ("securityContext.fsGroupChangePolicy", Yes),
    ("securityContext.runAsGroup", Yes),
    ("securityContext.runAsNonRoot", Yes),
    ("securityContext.runAsUser", Yes),
    ("securityContext.seccompProfile", Inside),
    ("securityContext.seccompProfile.localhostProfile", Yes),
    (
        "securityContext.seccompProfile.type",
        Only(&["Localhost", "RuntimeDefault", "Unconfined"]),
    ),
    (
        "securityContext.seLinuxChangePolicy",
        No("SELinux is not supported in guests"),
    ),
    (
        "securityContext.seLinuxOptions",
        No("SELinux is not supported in guests"),
    ),
    ("securityContext.supplementalGroups", Yes),
    (
        "securityContext.supplementalGroupsPolicy",
        Only(&["Merge", "Strict"]),
    ),
    ("securityContext.sysctls", Rule(sysctls)),
    ("securityContext.windowsOptions", No("guests are Linux")),
    ("serviceAccount", Yes),
    ("serviceAccountName", Yes),
    ("setHostnameAsFQDN", No("is not supported by this node")),
    ("shareProcessNamespace", Yes),
    ("subdomain", Yes),
    ("terminationGracePeriodSeconds", Yes),
    ("tolerations", Yes),
    ("topologySpreadConstraints", Yes),
    ("volumes", Inside),
    ("volumes[].name", Yes),
    ("volumes[].configMap", Yes),
    ("volumes[].downwardAPI", Yes),
    ("volumes[].emptyDir", Inside),
    ("volumes[].emptyDir.medium", Rule(medium)),
    ("volumes[].emptyDir.sizeLimit", Yes),
    ("volumes[].ephemeral", Yes),
    (
        "volumes[].hostPath",
        No("the guest does not see the node's file system"),
    ),
    ("volumes[].image", Yes),
    ("volumes[].persistentVolumeClaim", Yes),
    ("volumes[].projected", Inside),
    ("volumes[].projected.defaultMode", Yes),
    ("volumes[].projected.sources", Inside),
    (
        "volumes[].projected.sources[].clusterTrustBundle",
        No("cluster trust bundles are not supported by this node"),
    ),
    ("volumes[].projected.sources[].configMap", Yes),
    ("volumes[].projected.sources[].downwardAPI", Yes),
    (
        "volumes[].projected.sources[].podCertificate",
        No("pod certificates are not supported by this node"),
    ),
    ("volumes[].projected.sources[].secret", Yes),
    ("volumes[].projected.sources[].serviceAccountToken", Yes),
    ("volumes[].secret", Yes),
];

/// Fields of a container, under `containers[]` and `initContainers[]`.
const CONTAINER: &[(&str, Support)] = &[
    ("args", Yes),
    ("command", Yes),
    ("env", Inside),
    ("env[].name", Yes),
    ("env[].value", Yes),
    ("env[].valueFrom", Inside),
    ("env[].valueFrom.configMapKeyRef", Yes),
    ("env[].valueFrom.fieldRef", Inside),
    ("env[].valueFrom.fieldRef.apiVersion", Only(&["v1"])),
    ("env[].valueFrom.fieldRef.fieldPath", Rule(env_field)),
    (
        "env[].valueFrom.fileKeyRef",
        No("variables from files are not supported by this node"),
    ),
    ("env[].valueFrom.resourceFieldRef", Yes),
    ("env[].valueFrom.secretKeyRef", Yes),
    ("envFrom", Yes),
    ("image", Yes),
    (
        "imagePullPolicy",
        Only(&["Always", "IfNotPresent", "Never"]),
    ),
    ("lifecycle", Inside),
    ("lifecycle.postStart", Inside),
    ("lifecycle.postStart.exec", Yes),
    ("lifecycle.postStart.httpGet", Inside),
    ("lifecycle.postStart.httpGet.host", No(OWN_ADDRESS)),
    ("lifecycle.postStart.httpGet.httpHeaders", Yes),
    ("lifecycle.postStart.httpGet.path", Yes),
    ("lifecycle.postStart.httpGet.port", Yes),
    (
        "lifecycle.postStart.httpGet.scheme",
        Only(&["HTTP", "HTTPS"]),
    ),
    ("lifecycle.postStart.sleep", Yes),
    ("lifecycle.postStart.tcpSocket", No(NO_TCP_HOOK)),
    ("lifecycle.preStop", Inside),
    ("lifecycle.preStop.exec", Yes),
    ("lifecycle.preStop.httpGet", Inside),
    ("lifecycle.preStop.httpGet.host", No(OWN_ADDRESS)),
    ("lifecycle.preStop.httpGet.httpHeaders", Yes),
    ("lifecycle.preStop.httpGet.path", Yes),
    ("lifecycle.preStop.httpGet.port", Yes),
    ("lifecycle.preStop.httpGet.scheme", Only(&["HTTP", "HTTPS"])),
    ("lifecycle.preStop.sleep", Yes),
    ("lifecycle.preStop.tcpSocket", No(NO_TCP_HOOK)),
    ("lifecycle.stopSignal", Rule(stop_signal)),
    ("livenessProbe", Rule(probe)),
    ("name", Yes),
    ("ports", Inside),
    ("ports[].containerPort", Yes),
    ("ports[].hostIP", Yes),
    ("ports[].hostPort", Yes),
    ("ports[].name", Yes),
    ("ports[].protocol", Yes),
    ("readinessProbe", Rule(probe)),
    ("resizePolicy", Yes),
    ("resources", Inside),
    (
        "resources.claims",
        No("dynamic resource allocation is not supported by this node"),
    ),
    ("resources.limits", Rule(resource_names)),
    ("resources.requests", Rule(resource_names)),
    ("restartPolicy", Only(&["Always", "OnFailure", "Never"])),
    ("restartPolicyRules", Inside),
    ("restartPolicyRules[].action", Only(&["Restart"])),
    ("restartPolicyRules[].exitCodes", Yes),
    ("securityContext", Inside),
    ("securityContext.allowPrivilegeEscalation", Yes),
    ("securityContext.appArmorProfile", Inside),
    (
        "securityContext.appArmorProfile.type",
        Only(&["Unconfined"]),
    ),
    ("securityContext.capabilities", Yes),
    ("securityContext.privileged", Yes),
    ("securityContext.procMount", Only(&["Default", "Unmasked"])),
    ("securityContext.readOnlyRootFilesystem", Yes),
    ("securityContext.runAsGroup", Yes),
    ("securityContext.runAsNonRoot", Yes),
    ("securityContext.runAsUser", Yes),
    ("securityContext.seccompProfile", Inside),
    ("securityContext.seccompProfile.localhostProfile", Yes),
    (
        "securityContext.seccompProfile.type",
        Only(&["Localhost", "RuntimeDefault", "Unconfined"]),
    ),
    (
        "securityContext.seLinuxOptions",
        No("SELinux is not supported in guests"),
    ),
    ("securityContext.windowsOptions", No("guests are Linux")),
    ("startupProbe", Rule(probe)),
    ("stdin", Yes),
    ("stdinOnce", Yes),
    // Of an ephemeral container.
    ("targetContainerName", Yes),
    ("terminationMessagePath", Rule(termination_path)),
    (
        "terminationMessagePolicy",
        Only(&["File", "FallbackToLogsOnError"]),
    ),
    ("tty", Yes),
    ("volumeDevices", Yes),
    ("volumeMounts", Inside),
    ("volumeMounts[].mountPath", Yes),
    ("volumeMounts[].mountPropagation", Only(&["None"])),
    ("volumeMounts[].name", Yes),
    ("volumeMounts[].readOnly", Yes),
    (
        "volumeMounts[].recursiveReadOnly",
        Only(&["Disabled", "IfPossible", "Enabled"]),
    ),
    ("volumeMounts[].subPath", Yes),
    ("volumeMounts[].subPathExpr", Yes),
    ("workingDir", Yes),
];

/// Every field of the pod that this node does not do.
pub fn unsupported(pod: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    match pod.get("spec") {
        Some(spec @ Value::Object(_)) => {
            walk(spec, "", "spec", POD, &mut errors);
            limited_volumes(spec, &mut errors);
        }
        _ => errors.push(FieldError::new("spec", "must be an object")),
    }
    annotations(pod, &mut errors);
    errors
}

/// Volumes with a limit that find no slot.
fn limited_volumes(spec: &Value, errors: &mut Vec<FieldError>) {
    let volumes = spec["volumes"].as_array().into_iter().flatten();
    let limited = volumes.enumerate().filter(|(_, volume)| {
        let empty = &volume["emptyDir"];
        let limit = match &empty["sizeLimit"] {
            Value::String(text) => text.parse().unwrap_or_default(),
            Value::Number(number) => number.to_string().parse().unwrap_or_default(),
            _ => Quantity::default(),
        };
        let own = asks_for_nothing(&empty["medium"]) && limit > Quantity::default();
        own || !volume["persistentVolumeClaim"].is_null() || !volume["ephemeral"].is_null()
    });
    for (index, volume) in limited.skip(MAX_LIMITED) {
        for source in ["persistentVolumeClaim", "ephemeral"] {
            if !volume[source].is_null() {
                errors.push(FieldError::new(
                    format!("spec.volumes[{index}].{source}"),
                    format!("a pod on this node can have {MAX_LIMITED} volumes with a disk each"),
                ));
            }
        }
        if volume["emptyDir"].is_null() {
            continue;
        }
        errors.push(FieldError::new(
            format!("spec.volumes[{index}].emptyDir.sizeLimit"),
            format!("can be set on {MAX_LIMITED} volumes of a pod on this node"),
        ));
    }
}

/// Annotations that older clients used for fields.
fn annotations(pod: &Value, errors: &mut Vec<FieldError>) {
    let keys = pod["metadata"]["annotations"].as_object();
    for key in keys.into_iter().flat_map(|map| map.keys()) {
        if key.starts_with("container.apparmor.security.beta.kubernetes.io/") {
            errors.push(FieldError::new(
                format!("metadata.annotations[{key}]"),
                "AppArmor is not supported in guests",
            ));
        }
    }
}

fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Checks the fields of an object. `rule` is the path in the table, `path` the one for people.
fn walk(
    object: &Value,
    rule: &str,
    path: &str,
    table: &[(&str, Support)],
    errors: &mut Vec<FieldError>,
) {
    let Some(fields) = object.as_object() else {
        errors.push(FieldError::new(path, "must be an object"));
        return;
    };
    for (name, value) in fields {
        let rule = if rule.is_empty() {
            name.clone()
        } else {
            format!("{rule}.{name}")
        };
        let path = format!("{path}.{name}");
        let support = table
            .iter()
            .find(|(key, _)| *key == rule)
            .map(|(_, support)| *support);
        let detail = match support {
            Some(Yes) => None,
            Some(Rule(check)) => (!value.is_null()).then(|| check(value)).flatten(),
            _ if asks_for_nothing(value) => None,
            None => Some("is not known to this node".to_owned()),
            Some(No(reason)) => Some(reason.to_owned()),
            Some(Only(texts)) => {
                (!value.as_str().is_some_and(|text| texts.contains(&text))).then(|| {
                    format!(
                        "{value} is not supported by this node; supported: {}",
                        texts.join(", ")
                    )
                })
            }
            Some(Inside) => {
                inside(value, &rule, &path, table, errors);
                None
            }
        };
        if let Some(detail) = detail {
            errors.push(FieldError::new(path, detail));
        }
    }
}

fn inside(
    value: &Value,
    rule: &str,
    path: &str,
    table: &[(&str, Support)],
    errors: &mut Vec<FieldError>,
) {
    let Some(list) = value.as_array() else {
        walk(value, rule, path, table, errors);
        return;
    };
    let is_container = matches!(
        rule,
        "containers" | "initContainers" | "ephemeralContainers"
    );
    for (index, item) in list.iter().enumerate() {
        let path = format!("{path}[{index}]");
        if is_container {
            walk(item, "", &path, CONTAINER, errors);
        } else {
            walk(item, &format!("{rule}[]"), &path, table, errors);
        }
    }
}

/// Sysctls that upstream calls safe: they are namespaced, and here they are the guest's own.
const SAFE_SYSCTLS: [&str; 13] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
    "net.ipv4.tcp_notsent_lowat",
];

fn sysctls(value: &Value) -> Option<String> {
    for sysctl in value.as_array().into_iter().flatten() {
        let name = sysctl["name"].as_str().unwrap_or_default();
        if !SAFE_SYSCTLS.contains(&name.replace('/', ".").as_str()) {
            return Some(format!("{name:?} is not one of the safe sysctls"));
        }
    }
    None
}

/// A path that the guest can make a file at.
fn termination_path(value: &Value) -> Option<String> {
    let path = value.as_str().unwrap_or_default();
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !matches!(*part, "" | "."))
        .collect();
    let usable = path.starts_with('/')
        && path.len() < 4096
        && !path.contains('\0')
        && !parts.contains(&"..")
        && parts.first().is_some_and(|part| *part != "proc");
    (!usable && !path.is_empty()).then(|| {
        format!(
            "{path:?} is not the absolute path of a file that can be made: use /dev/termination-log"
        )
    })
}

/// A signal by the names that Kubernetes has for those of Linux.
fn stop_signal(value: &Value) -> Option<String> {
    const NAMES: [&str; 36] = [
        "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT",
        "KILL", "PIPE", "POLL", "PROF", "PWR", "QUIT", "RTMAX", "RTMIN", "SEGV", "STKFLT", "STOP",
        "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH",
        "XCPU", "XFSZ",
    ];
    let text = value.as_str().unwrap_or_default();
    let offset = |prefix: &str| text.strip_prefix(prefix)?.parse::<u8>().ok();
    let known = text
        .strip_prefix("SIG")
        .is_some_and(|name| NAMES.contains(&name))
        || offset("SIGRTMIN+").is_some_and(|offset| offset <= 15)
        || offset("SIGRTMAX-").is_some_and(|offset| offset <= 14);
    (!known && !text.is_empty()).then(|| format!("{text:?} is no signal, such as SIGTERM"))
}

/// What of an affinity this node does not do.
fn affinity(value: &Value) -> Option<String> {
    for kind in ["podAffinity", "podAntiAffinity"] {
        // Preferences between nodes mean nothing where there is one.
        let terms = &value[kind]["requiredDuringSchedulingIgnoredDuringExecution"];
        for term in terms.as_array().into_iter().flatten() {
            let selector = term["namespaceSelector"].as_object();
            if selector.is_some_and(|fields| !fields.values().all(asks_for_nothing)) {
                return Some(format!(
                    "{kind}: namespaceSelector can only be empty; use namespaces"
                ));
            }
            for field in ["matchLabelKeys", "mismatchLabelKeys"] {
                if !asks_for_nothing(&term[field]) {
                    return Some(format!("{kind}: {field} is not supported by this node"));
                }
            }
        }
    }
    None
}

/// What of a probe this node does not do.
fn probe(value: &Value) -> Option<String> {
    const FIELDS: [&str; 10] = [
        "exec",
        "failureThreshold",
        "grpc",
        "httpGet",
        "initialDelaySeconds",
        "periodSeconds",
        "successThreshold",
        "tcpSocket",
        "terminationGracePeriodSeconds",
        "timeoutSeconds",
    ];
    let fields = value.as_object()?;
    if let Some(name) = fields.keys().find(|name| !FIELDS.contains(&name.as_str())) {
        return Some(format!("{name} is not known to this node"));
    }
    let host = ["httpGet", "tcpSocket"]
        .into_iter()
        .find(|handler| !asks_for_nothing(&value[*handler]["host"]));
    host.map(|handler| format!("{handler}.host: {OWN_ADDRESS}"))
}

fn pod_resource_names(value: &Value) -> Option<String> {
    value
        .as_object()?
        .keys()
        .find(|name| !matches!(name.as_str(), "cpu" | "memory"))
        .map(|name| format!("{name} is not a resource of a whole pod on this node"))
}

/// A pod's CPUs are those of its VM, which are whole ones.
fn pod_limits(value: &Value) -> Option<String> {
    let cpu = match &value["cpu"] {
        Value::String(text) => text.parse::<Quantity>().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    };
    let whole = cpu.is_none_or(|cpu| cpu.milli_value() % 1000 == 0);
    pod_resource_names(value)
        .or_else(|| (!whole).then(|| "cpu must be a number of whole CPUs on this node".to_owned()))
}

fn resource_names(value: &Value) -> Option<String> {
    value
        .as_object()?
        .keys()
        .find(|name| {
            let page = name.strip_prefix("hugepages-");
            let huge = page.is_some_and(|page| PageSize::from_quantity(page).is_ok());
            !huge && !matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage")
        })
        .map(|name| format!("{name} is not a resource of this node"))
}

/// What an emptyDir can be made of, beside the pod's disk.
fn medium(value: &Value) -> Option<String> {
    let medium = value.as_str().unwrap_or("?");
    let page = medium.strip_prefix("HugePages-");
    let huge = page.is_some_and(|page| PageSize::from_quantity(page).is_ok());
    (!huge && !matches!(medium, "" | "Memory" | "HugePages")).then(|| {
        format!(
            "{value} is not supported by this node; supported: Memory, HugePages, HugePages-2Mi \
             and other sizes of pages"
        )
    })
}

/// Fields of a pod that a variable can be of.
const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn env_field(value: &Value) -> Option<String> {
    let path = value.as_str().unwrap_or_default();
    let keyed = ["metadata.labels['", "metadata.annotations['"]
        .iter()
        .any(|prefix| path.starts_with(prefix) && path.ends_with("']"));
    (!keyed && !ENV_FIELDS.contains(&path))
        .then(|| format!("{path:?} is not a field that a variable can take"))
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "json! makes values")]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(spec: Value) -> Vec<String> {
        unsupported(&json!({"spec": spec}))
            .into_iter()
            .map(|error| error.field)
            .collect()
    }

    fn container(extra: Value) -> Value {
        let mut container = json!({"name": "c", "image": "busybox"});
        container
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        json!({"containers": [container]})
    }

    #[test]
    fn what_the_server_defaults_is_supported() {
        let spec = json!({
            "containers": [{
                "name": "c", "image": "busybox", "imagePullPolicy": "Always", "resources": {},
                "terminationMessagePath": "/dev/termination-log",
                "terminationMessagePolicy": "File", "env": null,
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "securityContext": {"privileged": false, "procMount": "Default"},
            }],
            "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "hostNetwork": false,
            "nodeName": "n", "preemptionPolicy": "PreemptLowerPriority", "priority": 0,
            "restartPolicy": "Always", "schedulerName": "default-scheduler",
            "securityContext": {}, "serviceAccount": "default", "serviceAccountName": "default",
            "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 30,
            "runtimeClassName": "hypernetes",
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
            "volumes": [{"name": "v", "emptyDir": {}}, {"name": "w", "configMap": {"name": "m"}}],
        });
        assert_eq!(fields(spec), Vec::<String>::new());
    }

    #[test]
    fn every_unsupported_field_of_a_pod_is_named() {
        for (field, value) in [
            (
                "affinity",
                json!({"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                    [{"topologyKey": "x", "namespaceSelector": {"matchLabels": {"a": "b"}}}]}}),
            ),
            ("dnsPolicy", json!("ClusterFirstWithHostNet")),
            ("hostIPC", json!(true)),
            ("hostNetwork", json!(true)),
            ("hostPID", json!(true)),
            ("hostnameOverride", json!("x")),
            ("os.name", json!("windows")),
            ("overhead", json!({"cpu": "1"})),
            ("resourceClaims", json!([{"name": "x"}])),
            ("resources.limits", json!({"cpu": "1500m"})),
            ("resources.limits", json!({"hugepages-2Mi": "2Mi"})),
            ("resources.requests", json!({"ephemeral-storage": "1Gi"})),
            ("runtimeClassName", json!("runc")),
            ("schedulerName", json!("mine")),
            (
                "securityContext.appArmorProfile.type",
                json!("RuntimeDefault"),
            ),
            ("securityContext.seLinuxOptions", json!({"level": "x"})),
            ("securityContext.seccompProfile.type", json!("Other")),
            (
                "securityContext.sysctls",
                json!([{"name": "kernel.msgmax", "value": "1"}]),
            ),
            (
                "securityContext.windowsOptions",
                json!({"hostProcess": true}),
            ),
            ("setHostnameAsFQDN", json!(true)),
            ("someFutureField", json!(1)),
        ] {
            let mut spec = json!({"containers": [{"name": "c", "image": "i"}]});
            let mut at = &mut spec;
            for part in field.split('.') {
                at = &mut at[part];
            }
            *at = value;
            assert_eq!(fields(spec), [format!("spec.{field}")], "{field}");
        }
    }

    #[test]
    fn every_unsupported_volume_is_named() {
        for source in [
            "hostPath",
            "nfs",
            "csi",
            "iscsi",
            "fc",
            "rbd",
            "cephfs",
            "gitRepo",
            "cinder",
            "someFutureVolume",
        ] {
            let mut volume = json!({"name": "v"});
            volume[source] = json!({"x": 1});
            let spec = json!({"containers": [], "volumes": [volume]});
            assert_eq!(
                fields(spec),
                [format!("spec.volumes[0].{source}")],
                "{source}"
            );
        }
        let huge = json!({"containers": [],
            "volumes": [{"name": "v", "emptyDir": {"medium": "HugePages-3Mi"}}]});
        assert_eq!(fields(huge), ["spec.volumes[0].emptyDir.medium"]);
        for medium in ["", "Memory", "HugePages", "HugePages-2Mi", "HugePages-1Gi"] {
            let volume = json!({"name": "v", "emptyDir": {"medium": medium}});
            let spec = json!({"containers": [], "volumes": [volume]});
            assert!(fields(spec).is_empty(), "{medium}");
        }
        let limits = json!({"hugepages-2Mi": "4Mi", "hugepages-1Gi": "0", "cpu": "1"});
        assert!(fields(container(json!({"resources": {"limits": limits}}))).is_empty());
    }

    #[test]
    fn limits_beyond_the_slots_of_a_pod_are_named() {
        let volume = |medium: &str, limit: Value| json!({"name": "v", "emptyDir": {"medium": medium, "sizeLimit": limit}});
        let mut volumes = vec![
            volume("Memory", json!("1Mi")),
            volume("", json!("0Mi")),
            volume("", json!(0)),
            volume("", Value::Null),
        ];
        volumes.extend((0..MAX_LIMITED).map(|_| volume("", json!("1Mi"))));
        assert!(fields(json!({"containers": [], "volumes": volumes})).is_empty());
        volumes.push(volume("", json!(1)));
        assert_eq!(
            fields(json!({"containers": [], "volumes": volumes})),
            ["spec.volumes[36].emptyDir.sizeLimit"]
        );
        volumes.pop();
        volumes.push(json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}}));
        assert_eq!(
            fields(json!({"containers": [], "volumes": volumes})),
            ["spec.volumes[36].persistentVolumeClaim"]
        );
    }

    #[test]
    fn every_unsupported_field_of_a_container_is_named() {
        for (field, extra) in [
            (
                "env[0].valueFrom.fileKeyRef",
                json!({"env": [{"name": "A", "valueFrom": {"fileKeyRef": {"key": "k"}}}]}),
            ),
            (
                "env[0].valueFrom.fieldRef.fieldPath",
                json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec"}}}]}),
            ),
            (
                "lifecycle.preStop.httpGet.host",
                json!({"lifecycle": {"preStop": {"httpGet": {"port": 1, "host": "192.0.2.1"}}}}),
            ),
            (
                "lifecycle.stopSignal",
                json!({"lifecycle": {"stopSignal": "TERM"}}),
            ),
            (
                "lifecycle.stopSignal",
                json!({"lifecycle": {"stopSignal": "SIGRTMIN+16"}}),
            ),
            (
                "livenessProbe",
                json!({"livenessProbe": {"httpGet": {"port": 1, "host": "169.254.169.254"}}}),
            ),
            (
                "readinessProbe",
                json!({"readinessProbe": {"someFutureHandler": {}}}),
            ),
            (
                "resources.claims",
                json!({"resources": {"claims": [{"name": "x"}]}}),
            ),
            (
                "resources.limits",
                json!({"resources": {"limits": {"hugepages-3Mi": "3Mi"}}}),
            ),
            (
                "resources.requests",
                json!({"resources": {"requests": {"nvidia.com/gpu": "1"}}}),
            ),
            (
                "restartPolicyRules[0].action",
                json!({"restartPolicyRules": [{"action": "RestartAllContainers"}]}),
            ),
            (
                "securityContext.seLinuxOptions",
                json!({"securityContext": {"seLinuxOptions": {"level": "x"}}}),
            ),
            (
                "securityContext.seccompProfile.type",
                json!({"securityContext": {"seccompProfile": {"type": "Other"}}}),
            ),
            (
                "startupProbe",
                json!({"startupProbe": {"tcpSocket": {"port": 1, "host": "192.0.2.1"}}}),
            ),
            (
                "terminationMessagePath",
                json!({"terminationMessagePath": "/tmp/../x"}),
            ),
            (
                "terminationMessagePath",
                json!({"terminationMessagePath": "/proc/x"}),
            ),
            (
                "volumeMounts[0].mountPropagation",
                json!({"volumeMounts": [{"name": "v", "mountPropagation": "Bidirectional"}]}),
            ),
            ("someFutureField", json!({"someFutureField": [1]})),
        ] {
            assert_eq!(
                fields(container(extra.clone())),
                [format!("spec.containers[0].{field}")],
                "{field}"
            );
            let mut init = json!({"containers": []});
            init["initContainers"] = container(extra)["containers"].clone();
            assert_eq!(
                fields(init),
                [format!("spec.initContainers[0].{field}")],
                "{field}"
            );
        }
    }

    #[test]
    fn shapes_that_are_wrong_are_refused_and_do_not_panic() {
        assert_eq!(unsupported(&json!([]))[0].field, "spec");
        assert_eq!(fields(json!({"containers": ["x"]})), ["spec.containers[0]"]);
        assert_eq!(fields(json!({"os": 3})), ["spec.os"]);
    }
}
