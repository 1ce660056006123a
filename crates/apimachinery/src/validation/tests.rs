use serde_json::json;

use super::*;
use crate::{defaults, kinds::by_api_version};

fn kind(api_version: &str, kind: &str) -> &'static ResourceKind {
    by_api_version(api_version, kind).unwrap()
}

/// What is wrong after defaulting.
fn problems(api_version: &str, name: &str, mut object: Value) -> Vec<String> {
    let kind = kind(api_version, name);
    defaults::apply(kind, &mut object);
    validate_create(kind, &object)
        .iter()
        .map(ToString::to_string)
        .collect()
}

fn pod(spec: Value) -> Vec<String> {
    problems(
        "v1",
        "Pod",
        json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec}),
    )
}

#[test]
fn a_plain_pod_is_valid() {
    let spec = json!({
        "containers": [{"name": "c", "image": "nginx", "ports": [{"containerPort": 80, "name": "http"}],
            "env": [{"name": "A", "value": "b"}, {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}}],
            "volumeMounts": [{"name": "v", "mountPath": "/v"}],
            "readinessProbe": {"httpGet": {"port": "http"}, "successThreshold": 2},
            "resources": {"limits": {"cpu": "1"}}}],
        "initContainers": [{"name": "i", "image": "busybox"}],
        "volumes": [{"name": "v"}, {"name": "s", "secret": {"secretName": "s"}}],
        "tolerations": [{"operator": "Exists"}],
    });
    assert_eq!(pod(spec), Vec::<String>::new());
}

#[test]
fn what_is_missing_is_required() {
    assert_eq!(pod(json!({})), ["spec.containers: Required value"]);
    assert_eq!(
        pod(json!({"containers": [{"ports": [{}], "env": [{}], "volumeMounts": [{}]}]})),
        [
            "spec.containers[0].name: Required value",
            "spec.containers[0].image: Required value",
            "spec.containers[0].ports[0].containerPort: Required value",
            "spec.containers[0].env[0].name: Required value",
            "spec.containers[0].volumeMounts[0].name: Required value",
            "spec.containers[0].volumeMounts[0].mountPath: Required value",
        ]
    );
    assert_eq!(
        problems("v1", "ConfigMap", json!({"metadata": {}})),
        [
            "metadata.name: Required value: name or generateName is required",
            "metadata.namespace: Required value",
        ]
    );
}

#[test]
fn pods_are_checked_field_by_field() {
    let with = |extra: Value| {
        let mut container = json!({"name": "c", "image": "i:1"});
        container
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        pod(json!({"containers": [container]}))
    };
    for (extra, expected) in [
        (
            json!({"imagePullPolicy": "Sometimes"}),
            "spec.containers[0].imagePullPolicy: Unsupported value: \"Sometimes\": supported values: \
             \"Always\", \"IfNotPresent\", \"Never\"",
        ),
        (
            json!({"image": " i"}),
            "spec.containers[0].image: Invalid value: \" i\": must not have leading or trailing \
             whitespace",
        ),
        (
            json!({"ports": [{"containerPort": 70000}]}),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and \
             65535, inclusive",
        ),
        (
            json!({"volumeMounts": [{"name": "x", "mountPath": "/x"}]}),
            "spec.containers[0].volumeMounts[0].name: Not found: \"x\"",
        ),
        (
            json!({"resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}}),
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal \
             to cpu limit of 1",
        ),
        (
            json!({"resources": {"limits": {"hugepages-2Mi": "2Mi"}}}),
            "spec.containers[0].resources: Forbidden: HugePages require cpu or memory",
        ),
        (
            json!({"resources": {"limits": {"cpu": "1", "hugepages-2Mi": "4Mi"},
                "requests": {"hugepages-2Mi": "2Mi"}}}),
            "spec.containers[0].resources.requests: Invalid value: \"2Mi\": must be equal to \
             hugepages-2Mi limit of 4Mi",
        ),
        (
            json!({"resources": {"requests": {"cpu": "1", "hugepages-2Mi": "2Mi"}}}),
            "spec.containers[0].resources.limits: Required value: Limit must be set for non \
             overcommitable resources",
        ),
        (
            json!({"livenessProbe": {}}),
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
        ),
        (
            json!({"livenessProbe": {"exec": {"command": ["a"]}, "tcpSocket": {"port": 1}}}),
            "spec.containers[0].livenessProbe.tcpSocket: Forbidden: may not specify more than 1 \
             handler type",
        ),
        (
            json!({"env": [{"name": "A=B"}]}),
            "spec.containers[0].env[0].name: Invalid value: \"A=B\": a valid environment variable \
             name must consist only of printable ASCII characters other than '='",
        ),
        (
            json!({"securityContext": {"runAsUser": -1}}),
            "spec.containers[0].securityContext.runAsUser: Invalid value: -1: must be between 0 and \
             2147483647, inclusive",
        ),
    ] {
        assert_eq!(with(extra), [expected]);
    }
    // The request is defaulted to the limit.
    let part = ["limits", "requests"].map(|list| {
        format!(
            "spec.containers[0].resources.{list}[hugepages-2Mi]: Invalid value: \"3Mi\": 3Mi is not \
             positive integer multiple of hugepages-2Mi"
        )
    });
    let odd = json!({"resources": {"limits": {"cpu": "1", "hugepages-2Mi": "3Mi"}}});
    assert_eq!(with(odd), part);
    let names = json!({"containers": [{"name": "c", "image": "i"}, {"name": "c", "image": "i"}]});
    assert_eq!(
        pod(names),
        ["spec.containers[1].name: Duplicate value: \"c\""]
    );
    let policy = json!({"restartPolicy": "Maybe", "containers": [{"name": "c", "image": "i"}]});
    assert_eq!(
        pod(policy),
        [
            "spec.restartPolicy: Unsupported value: \"Maybe\": supported values: \"Always\", \"Never\", \
          \"OnFailure\""
        ]
    );
    let volumes = json!({
        "containers": [{"name": "c", "image": "i"}],
        "volumes": [
            {"name": "a", "secret": {"secretName": "s", "items": [{"key": "k", "path": "../x"}]}},
            {"name": "a", "configMap": {"name": "c", "defaultMode": 1000}},
            {"name": "b", "emptyDir": {}, "hostPath": {"path": "/"}},
        ],
    });
    assert_eq!(
        pod(volumes),
        [
            "spec.volumes[0].secret.items[0].path: Invalid value: \"../x\": must not contain '..'",
            "spec.volumes[1].name: Duplicate value: \"a\"",
            "spec.volumes[1].configMap.defaultMode: Invalid value: 1000: must be a number between 0 \
             and 0777 (octal), both inclusive",
            "spec.volumes[2].hostPath: Forbidden: may not specify more than 1 volume type",
        ]
    );
}

#[test]
fn a_running_pod_can_change_its_image_and_little_else() {
    let kind = kind("v1", "Pod");
    let mut old = json!({"metadata": {"name": "p", "namespace": "n"},
        "spec": {"containers": [{"name": "c", "image": "a"}], "tolerations": [{"key": "a", "operator": "Exists"}]}});
    defaults::apply(kind, &mut old);
    let changed = |edit: &dyn Fn(&mut Value)| -> Vec<String> {
        let mut new = old.clone();
        edit(&mut new);
        validate_update(kind, &new, &old)
            .iter()
            .map(ToString::to_string)
            .collect()
    };
    assert!(changed(&|_| {}).is_empty());
    assert!(changed(&|p| p["spec"]["containers"][0]["image"] = "b".into()).is_empty());
    assert!(changed(&|p| p["spec"]["activeDeadlineSeconds"] = 5.into()).is_empty());
    assert!(changed(&|p| p["metadata"]["labels"] = json!({"a": "b"})).is_empty());
    assert!(
        changed(&|p| {
            let list = p["spec"]["tolerations"].as_array_mut().unwrap();
            list.push(json!({"key": "b", "operator": "Exists"}));
        })
        .is_empty()
    );
    let found = changed(&|p| p["spec"]["hostNetwork"] = true.into());
    assert!(
        found[0].starts_with(
            "spec: Forbidden: pod updates may not change fields other than \
             `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
             `spec.tolerations` (only additions to existing tolerations),\
             `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously \
             negative)"
        ),
        "{found:?}"
    );
    assert_eq!(
        changed(&|p| p["spec"]["containers"].as_array_mut().unwrap().push(
            json!({"name": "d", "image": "e", "imagePullPolicy": "Always",
                "terminationMessagePolicy": "File"})
        )),
        ["spec.containers: Forbidden: pod updates may not add or remove containers"]
    );
    assert_eq!(
        changed(&|p| p["metadata"]["uid"] = "x".into()),
        ["metadata.uid: Invalid value: \"x\": field is immutable"]
    );
}

#[test]
fn metadata_is_checked_for_every_kind() {
    let object = json!({"metadata": {
        "name": "Bad_Name",
        "namespace": "n",
        "labels": {"a b": "c"},
        "finalizers": ["x"],
        "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": ""}],
    }});
    let found = problems("v1", "ConfigMap", object);
    assert!(found[0].starts_with(
        "metadata.name: Invalid value: \"Bad_Name\": a lowercase RFC 1123 subdomain must consist of"
    ));
    assert!(
        found[1].starts_with("metadata.labels: Invalid value: \"a b\": name part must consist of")
    );
    assert_eq!(
        found[2],
        "metadata.finalizers: Invalid value: \"x\": name is neither a standard finalizer name nor is \
         it fully qualified"
    );
    assert_eq!(
        found[3],
        "metadata.ownerReferences[0].uid: Invalid value: \"\": uid must not be empty"
    );
    assert_eq!(
        problems(
            "v1",
            "Node",
            json!({"metadata": {"name": "n", "namespace": "x"}})
        ),
        ["metadata.namespace: Forbidden: not allowed on this type"]
    );
    let long = json!({"metadata": {"name": "c", "namespace": "n", "annotations": {"a": "x".repeat(300_000)}}});
    assert_eq!(
        problems("v1", "ConfigMap", long),
        ["metadata.annotations: Too long: may not be more than 262144 bytes"]
    );
}

#[test]
fn deletion_takes_no_new_finalizers() {
    let kind = kind("v1", "ConfigMap");
    let old = json!({"metadata": {"name": "c", "namespace": "n",
        "deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["a/b"]}});
    let mut new = old.clone();
    new["metadata"]["finalizers"] = json!(["a/b", "c/d"]);
    assert_eq!(
        validate_update(kind, &new, &old)[0].to_string(),
        "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being \
         deleted, found new finalizers [\"c/d\"]"
    );
}

#[test]
fn config_maps_and_secrets() {
    let meta = json!({"name": "c", "namespace": "n"});
    assert_eq!(
        problems(
            "v1",
            "ConfigMap",
            json!({"metadata": meta, "data": {"a/b": "x", "k": ""}, "binaryData": {"k": ""}})
        ),
        [
            "data[a/b]: Invalid value: \"a/b\": a valid config key must consist of alphanumeric \
             characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex \
             used for validation is '[-._a-zA-Z0-9]+')",
            "data[k]: Invalid value: \"k\": duplicate of key present in binaryData",
        ]
    );
    let big = json!({"metadata": meta, "data": {"k": "x".repeat(1_100_000)}});
    assert_eq!(problems("v1", "ConfigMap", big).len(), 1);
    assert_eq!(
        problems(
            "v1",
            "Secret",
            json!({"metadata": meta, "type": "kubernetes.io/tls", "data": {"tls.crt": ""}})
        ),
        ["data[tls.key]: Required value"]
    );
    let kind = kind("v1", "Secret");
    let old = json!({"metadata": meta, "type": "Opaque", "immutable": true, "data": {"a": "YQ=="}});
    let mut new = old.clone();
    new["data"]["a"] = "Yg==".into();
    assert_eq!(
        validate_update(kind, &new, &old)[0].to_string(),
        "data: Forbidden: field is immutable when `immutable` is set"
    );
}

#[test]
fn access_control() {
    let rbac = "rbac.authorization.k8s.io/v1";
    let meta = json!({"name": "system:x", "namespace": "n"});
    assert_eq!(
        problems(
            rbac,
            "Role",
            json!({"metadata": meta, "rules": [{"resources": ["pods"]}]})
        ),
        [
            "rules[0].verbs: Required value: verbs must contain at least one value",
            "rules[0].apiGroups: Required value: resource rules must supply at least one api group",
        ]
    );
    let binding = json!({"metadata": meta, "roleRef": {"kind": "Nobody", "name": "r"},
        "subjects": [{"kind": "ServiceAccount", "name": "a"}, {"kind": "Robot", "name": "b"}]});
    assert_eq!(
        problems(rbac, "RoleBinding", binding),
        [
            "roleRef.kind: Unsupported value: \"Nobody\": supported values: \"ClusterRole\", \"Role\"",
            "subjects[0].namespace: Required value",
            "subjects[1].kind: Unsupported value: \"Robot\": supported values: \"Group\", \
             \"ServiceAccount\", \"User\"",
        ]
    );
    let old = json!({"metadata": meta, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}});
    let mut new = old.clone();
    new["roleRef"]["name"] = "s".into();
    let found = validate_update(kind(rbac, "RoleBinding"), &new, &old);
    assert!(found[0].to_string().ends_with("cannot change roleRef"));
}

#[test]
fn tenants_and_networks() {
    let tenant = |name: &str, cidr: &str| {
        problems(
            "hypernetes.io/v1alpha1",
            "Tenant",
            json!({"metadata": {"name": name}, "spec": {"network": {"default": {"cidr": cidr}}}}),
        )
    };
    assert!(tenant("acme", "10.244.0.0/16").is_empty());
    assert!(tenant("a.b", "10.244.0.0/16")[0].starts_with("metadata.name: Invalid value: \"a.b\""));
    for (cidr, words) in [
        ("10.0.0.1/16", "must be the network address, 10.0.0.0/16"),
        (
            "8.8.0.0/16",
            "must be inside a private range: 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
        ),
        (
            "fd00::/64",
            "must be a valid IPv4 CIDR address, e.g. 10.244.0.0/16",
        ),
        (
            "10.0.0.0/30",
            "prefix length must be between 8 and 29, inclusive",
        ),
    ] {
        assert_eq!(
            tenant("acme", cidr),
            [format!(
                "spec.network.default.cidr: Invalid value: \"{cidr}\": {words}"
            )]
        );
    }
    let network = |spec: Value| {
        problems(
            "hypernetes.io/v1alpha1",
            "Network",
            json!({"metadata": {"name": "d", "namespace": "n"}, "spec": spec}),
        )
    };
    assert!(network(json!({"subnets": [{"cidr": "10.1.0.0/16"}], "mtu": 1450})).is_empty());
    assert_eq!(
        network(json!({"subnets": [{"cidr": "10.1.0.0/16", "gateway": "10.2.0.1"}], "mtu": 1})),
        [
            "spec.subnets[0].gateway: Invalid value: \"10.2.0.1\": must be a host address inside \
             10.1.0.0/16",
            "spec.mtu: Invalid value: 1: must be between 576 and 65535, inclusive",
        ]
    );
    let old = json!({"metadata": {"name": "d", "namespace": "n"}, "spec": {"subnets": [{"cidr": "10.1.0.0/16"}]}});
    let mut new = old.clone();
    new["spec"]["subnets"][0]["cidr"] = "10.2.0.0/16".into();
    let found = validate_update(kind("hypernetes.io/v1alpha1", "Network"), &new, &old);
    assert_eq!(found[0].field, "spec.subnets");
    assert_eq!(found[0].detail, "field is immutable");
}

#[test]
fn hostile_objects_make_short_answers() {
    let containers: Vec<Value> = (0..500).map(|_| json!({})).collect();
    assert_eq!(pod(json!({"containers": containers})).len(), MAX_FINDINGS);
    // Wrong types are caught before by the schema; here they must only not panic.
    for spec in [
        json!(1),
        json!({"containers": {}}),
        json!({"containers": [1, null], "volumes": "x"}),
    ] {
        assert!(!pod(spec).is_empty());
    }
}
