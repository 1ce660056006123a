use std::collections::BTreeMap;

use k8s_pb::{
    api::{
        authentication::v1 as authn, authorization::v1 as authz, coordination::v1 as coordination,
        core::v1 as core, events::v1 as events, node::v1 as node, policy::v1 as policy,
        rbac::v1 as rbac,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{
            DeleteOptions, LabelSelector, MicroTime, ObjectMeta, OwnerReference, Preconditions,
            Time,
        },
        runtime::{TypeMeta, Unknown},
        util::intstr::IntOrString,
    },
};
use proptest::prelude::*;
use prost::Message;
use serde_json::json;

use super::*;

fn s(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn body(api_version: &str, kind: &str, message: &impl Message) -> Vec<u8> {
    let unknown = Unknown {
        type_meta: Some(TypeMeta {
            api_version: s(api_version),
            kind: s(kind),
        }),
        raw: Some(message.encode_to_vec()),
        content_encoding: s(""),
        content_type: s(""),
    };
    let mut out = MAGIC.to_vec();
    out.extend(unknown.encode_to_vec());
    out
}

fn decoded(api_version: &str, kind: &str, message: &impl Message) -> Value {
    let mut value = decode(&body(api_version, kind, message)).unwrap();
    let object = value.as_object_mut().unwrap();
    assert_eq!(object.remove("apiVersion"), Some(json!(api_version)));
    assert_eq!(object.remove("kind"), Some(json!(kind)));
    value
}

/// Metadata as Go writes it: empty texts and a zero time included.
fn named(name: &str) -> Option<ObjectMeta> {
    Some(ObjectMeta {
        name: s(name),
        generate_name: s(""),
        namespace: s("default"),
        self_link: s(""),
        uid: s(""),
        resource_version: s(""),
        generation: Some(0),
        creation_timestamp: Some(Time::default()),
        labels: BTreeMap::from([("app".into(), "x".into()), ("empty".into(), String::new())]),
        owner_references: vec![OwnerReference {
            kind: s("Node"),
            name: s("n"),
            uid: s("u"),
            api_version: s("v1"),
            controller: Some(false),
            block_owner_deletion: Some(true),
        }],
        finalizers: vec!["a/b".into()],
        ..ObjectMeta::default()
    })
}

fn named_json(name: &str) -> Value {
    json!({
        "name": name,
        "namespace": "default",
        "labels": {"app": "x", "empty": ""},
        "ownerReferences": [{"kind": "Node", "name": "n", "uid": "u", "apiVersion": "v1",
            "controller": false, "blockOwnerDeletion": true}],
        "finalizers": ["a/b"],
    })
}

#[test]
fn secrets_and_config_maps() {
    let secret = core::Secret {
        metadata: named("s"),
        data: BTreeMap::from([("k".into(), vec![0, 255]), ("e".into(), Vec::new())]),
        string_data: BTreeMap::from([("t".into(), "x".into())]),
        r#type: s("Opaque"),
        immutable: Some(false),
    };
    assert_eq!(
        decoded("v1", "Secret", &secret),
        json!({"metadata": named_json("s"), "data": {"k": "AP8=", "e": ""},
            "stringData": {"t": "x"}, "type": "Opaque", "immutable": false})
    );
    let config = core::ConfigMap {
        metadata: named("c"),
        data: BTreeMap::from([("k".into(), "v".into())]),
        binary_data: BTreeMap::from([("b".into(), b"hi".to_vec())]),
        immutable: None,
    };
    assert_eq!(
        decoded("v1", "ConfigMap", &config),
        json!({"metadata": named_json("c"), "data": {"k": "v"}, "binaryData": {"b": "aGk="}})
    );
}

#[test]
fn pods_with_everything_that_is_embedded() {
    let pod = core::Pod {
        metadata: named("p"),
        spec: Some(core::PodSpec {
            volumes: vec![core::Volume {
                name: s("v"),
                volume_source: Some(core::VolumeSource {
                    empty_dir: Some(core::EmptyDirVolumeSource {
                        medium: s("Memory"),
                        size_limit: Some(Quantity { string: s("1Mi") }),
                    }),
                    ..Default::default()
                }),
            }],
            containers: vec![core::Container {
                name: s("c"),
                image: s("nginx"),
                command: vec!["sh".into(), String::new()],
                env: vec![core::EnvVar {
                    name: s("E"),
                    value: s(""),
                    value_from: Some(core::EnvVarSource {
                        secret_key_ref: Some(core::SecretKeySelector {
                            local_object_reference: Some(core::LocalObjectReference {
                                name: s("sec"),
                            }),
                            key: s("k"),
                            optional: Some(false),
                        }),
                        ..Default::default()
                    }),
                }],
                ports: vec![core::ContainerPort {
                    name: s(""),
                    host_port: Some(0),
                    container_port: Some(80),
                    protocol: s("TCP"),
                    host_ip: s(""),
                }],
                liveness_probe: Some(core::Probe {
                    handler: Some(core::ProbeHandler {
                        http_get: Some(core::HttpGetAction {
                            path: s("/"),
                            port: Some(IntOrString {
                                r#type: Some(1),
                                int_val: Some(0),
                                str_val: s("http"),
                            }),
                            ..Default::default()
                        }),
                        tcp_socket: Some(core::TcpSocketAction {
                            port: Some(IntOrString {
                                r#type: Some(0),
                                int_val: Some(8080),
                                str_val: s(""),
                            }),
                            host: s(""),
                        }),
                        ..Default::default()
                    }),
                    initial_delay_seconds: Some(0),
                    period_seconds: Some(3),
                    ..Default::default()
                }),
                resources: Some(core::ResourceRequirements {
                    limits: BTreeMap::from([("cpu".into(), Quantity { string: s("1") })]),
                    ..Default::default()
                }),
                security_context: Some(core::SecurityContext {
                    run_as_user: Some(0),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            restart_policy: s(""),
            termination_grace_period_seconds: Some(0),
            host_network: Some(false),
            automount_service_account_token: Some(false),
            image_pull_secrets: vec![core::LocalObjectReference { name: s("pull") }],
            ..Default::default()
        }),
        status: Some(core::PodStatus {
            start_time: Some(Time {
                seconds: Some(1_700_000_000),
                nanos: Some(5),
            }),
            ..Default::default()
        }),
    };
    assert_eq!(
        decoded("v1", "Pod", &pod),
        json!({
            "metadata": named_json("p"),
            "spec": {
                "volumes": [{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
                "containers": [{
                    "name": "c",
                    "image": "nginx",
                    "command": ["sh", ""],
                    "env": [{"name": "E", "valueFrom": {"secretKeyRef":
                        {"name": "sec", "key": "k", "optional": false}}}],
                    "ports": [{"containerPort": 80, "protocol": "TCP"}],
                    "livenessProbe": {"httpGet": {"path": "/", "port": "http"},
                        "tcpSocket": {"port": 8080}, "periodSeconds": 3},
                    "resources": {"limits": {"cpu": "1"}},
                    "securityContext": {"runAsUser": 0},
                }],
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                "imagePullSecrets": [{"name": "pull"}],
            },
            "status": {"startTime": "2023-11-14T22:13:20Z"},
        })
    );
}

#[test]
fn role_based_access_control() {
    let rule = rbac::PolicyRule {
        verbs: vec!["get".into()],
        api_groups: vec![String::new()],
        resources: vec!["pods".into()],
        resource_names: vec!["a".into()],
        non_resource_ur_ls: vec!["/x".into()],
    };
    let rule_json = json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"],
        "resourceNames": ["a"], "nonResourceURLs": ["/x"]});
    let role = rbac::Role {
        metadata: named("r"),
        rules: vec![rule.clone()],
    };
    assert_eq!(
        decoded("rbac.authorization.k8s.io/v1", "Role", &role),
        json!({"metadata": named_json("r"), "rules": [rule_json]})
    );
    let selector = LabelSelector {
        match_labels: BTreeMap::from([("a".into(), "b".into())]),
        match_expressions: Vec::new(),
    };
    let cluster = rbac::ClusterRole {
        metadata: named("r"),
        rules: vec![rule],
        aggregation_rule: Some(rbac::AggregationRule {
            cluster_role_selectors: vec![selector],
        }),
    };
    assert_eq!(
        decoded("rbac.authorization.k8s.io/v1", "ClusterRole", &cluster),
        json!({"metadata": named_json("r"), "rules": [rule_json],
            "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"a": "b"}}]}})
    );
    let subjects = vec![rbac::Subject {
        kind: s("User"),
        api_group: s("rbac.authorization.k8s.io"),
        name: s("u"),
        namespace: s(""),
    }];
    let role_ref = Some(rbac::RoleRef {
        api_group: s("rbac.authorization.k8s.io"),
        kind: s("Role"),
        name: s("r"),
    });
    let expected = json!({
        "metadata": named_json("b"),
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "u"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"},
    });
    let binding = rbac::RoleBinding {
        metadata: named("b"),
        subjects: subjects.clone(),
        role_ref: role_ref.clone(),
    };
    assert_eq!(
        decoded("rbac.authorization.k8s.io/v1", "RoleBinding", &binding),
        expected
    );
    let binding = rbac::ClusterRoleBinding {
        metadata: named("b"),
        subjects,
        role_ref,
    };
    assert_eq!(
        decoded(
            "rbac.authorization.k8s.io/v1",
            "ClusterRoleBinding",
            &binding
        ),
        expected
    );
}

#[test]
fn namespaces_nodes_and_service_accounts() {
    let namespace = core::Namespace {
        metadata: named("n"),
        spec: Some(core::NamespaceSpec {
            finalizers: vec!["kubernetes".into()],
        }),
        status: Some(core::NamespaceStatus {
            phase: s(""),
            conditions: Vec::new(),
        }),
    };
    assert_eq!(
        decoded("v1", "Namespace", &namespace),
        json!({"metadata": named_json("n"), "spec": {"finalizers": ["kubernetes"]}, "status": {}})
    );
    let node = core::Node {
        metadata: named("n"),
        spec: Some(core::NodeSpec {
            pod_cidr: s("10.0.0.0/24"),
            pod_cid_rs: vec!["10.0.0.0/24".into()],
            provider_id: s("x"),
            taints: vec![core::Taint {
                key: s("k"),
                effect: s("NoSchedule"),
                ..Default::default()
            }],
            ..Default::default()
        }),
        status: Some(core::NodeStatus {
            capacity: BTreeMap::from([("memory".into(), Quantity { string: s("1Gi") })]),
            node_info: Some(core::NodeSystemInfo {
                machine_id: s("m"),
                os_image: s("o"),
                ..Default::default()
            }),
            ..Default::default()
        }),
    };
    assert_eq!(
        decoded("v1", "Node", &node),
        json!({"metadata": named_json("n"),
            "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"], "providerID": "x",
                "taints": [{"key": "k", "effect": "NoSchedule"}]},
            "status": {"capacity": {"memory": "1Gi"},
                "nodeInfo": {"machineID": "m", "osImage": "o"}}})
    );
    let account = core::ServiceAccount {
        metadata: named("a"),
        automount_service_account_token: Some(false),
        ..Default::default()
    };
    assert_eq!(
        decoded("v1", "ServiceAccount", &account),
        json!({"metadata": named_json("a"), "automountServiceAccountToken": false})
    );
}

#[test]
fn events_leases_and_runtime_classes() {
    let time = MicroTime {
        seconds: Some(1_700_000_000),
        nanos: Some(123_456_789),
    };
    let event = core::Event {
        metadata: named("e"),
        involved_object: Some(core::ObjectReference {
            kind: s("Pod"),
            name: s("p"),
            ..Default::default()
        }),
        count: Some(0),
        event_time: Some(time),
        ..Default::default()
    };
    assert_eq!(
        decoded("v1", "Event", &event),
        json!({"metadata": named_json("e"), "involvedObject": {"kind": "Pod", "name": "p"},
            "eventTime": "2023-11-14T22:13:20.123456Z"})
    );
    let event = events::Event {
        metadata: named("e"),
        note: s("n"),
        deprecated_count: Some(2),
        ..Default::default()
    };
    assert_eq!(
        decoded("events.k8s.io/v1", "Event", &event),
        json!({"metadata": named_json("e"), "note": "n", "deprecatedCount": 2})
    );
    let lease = coordination::Lease {
        metadata: named("l"),
        spec: Some(coordination::LeaseSpec {
            holder_identity: s("h"),
            lease_duration_seconds: Some(40),
            renew_time: Some(time),
            ..Default::default()
        }),
    };
    assert_eq!(
        decoded("coordination.k8s.io/v1", "Lease", &lease),
        json!({"metadata": named_json("l"), "spec": {"holderIdentity": "h",
            "leaseDurationSeconds": 40, "renewTime": "2023-11-14T22:13:20.123456Z"}})
    );
    let class = node::RuntimeClass {
        metadata: named("c"),
        handler: s("h"),
        overhead: Some(node::Overhead {
            pod_fixed: BTreeMap::from([("cpu".into(), Quantity { string: s("10m") })]),
        }),
        scheduling: None,
    };
    assert_eq!(
        decoded("node.k8s.io/v1", "RuntimeClass", &class),
        json!({"metadata": named_json("c"), "handler": "h", "overhead": {"podFixed": {"cpu": "10m"}}})
    );
}

#[test]
fn reviews_and_token_requests() {
    let review = authz::SelfSubjectAccessReview {
        metadata: Some(ObjectMeta::default()),
        spec: Some(authz::SelfSubjectAccessReviewSpec {
            resource_attributes: Some(authz::ResourceAttributes {
                namespace: s("default"),
                verb: s("list"),
                group: s(""),
                resource: s("pods"),
                ..Default::default()
            }),
            non_resource_attributes: None,
        }),
        status: Some(authz::SubjectAccessReviewStatus {
            allowed: Some(false),
            ..Default::default()
        }),
    };
    assert_eq!(
        decoded(
            "authorization.k8s.io/v1",
            "SelfSubjectAccessReview",
            &review
        ),
        json!({"metadata": {}, "spec": {"resourceAttributes":
            {"namespace": "default", "verb": "list", "resource": "pods"}},
            "status": {"allowed": false}})
    );
    let extra = BTreeMap::from([(
        "scopes".to_owned(),
        authz::ExtraValue {
            items: vec!["a".into(), "b".into()],
        },
    )]);
    let spec = Some(authz::SubjectAccessReviewSpec {
        user: s("u"),
        groups: vec!["g".into()],
        extra,
        uid: s("i"),
        ..Default::default()
    });
    let expected = json!({"spec": {"user": "u", "groups": ["g"],
        "extra": {"scopes": ["a", "b"]}, "uid": "i"}});
    let review = authz::SubjectAccessReview {
        spec: spec.clone(),
        ..Default::default()
    };
    assert_eq!(
        decoded("authorization.k8s.io/v1", "SubjectAccessReview", &review),
        expected
    );
    let review = authz::LocalSubjectAccessReview {
        spec,
        ..Default::default()
    };
    assert_eq!(
        decoded(
            "authorization.k8s.io/v1",
            "LocalSubjectAccessReview",
            &review
        ),
        expected
    );
    let review = authz::SelfSubjectRulesReview {
        spec: Some(authz::SelfSubjectRulesReviewSpec { namespace: s("x") }),
        ..Default::default()
    };
    assert_eq!(
        decoded("authorization.k8s.io/v1", "SelfSubjectRulesReview", &review),
        json!({"spec": {"namespace": "x"}})
    );
    let review = authn::SelfSubjectReview {
        metadata: None,
        status: Some(authn::SelfSubjectReviewStatus {
            user_info: Some(authn::UserInfo::default()),
        }),
    };
    assert_eq!(
        decoded("authentication.k8s.io/v1", "SelfSubjectReview", &review),
        json!({"status": {"userInfo": {}}})
    );
    let review = authn::TokenReview {
        spec: Some(authn::TokenReviewSpec {
            token: s("t"),
            audiences: vec!["a".into()],
        }),
        ..Default::default()
    };
    assert_eq!(
        decoded("authentication.k8s.io/v1", "TokenReview", &review),
        json!({"spec": {"token": "t", "audiences": ["a"]}})
    );
    let request = authn::TokenRequest {
        metadata: Some(ObjectMeta::default()),
        spec: Some(authn::TokenRequestSpec {
            audiences: Vec::new(),
            expiration_seconds: Some(600),
            bound_object_ref: None,
        }),
        status: Some(authn::TokenRequestStatus {
            token: s(""),
            expiration_timestamp: Some(Time::default()),
        }),
    };
    assert_eq!(
        decoded("authentication.k8s.io/v1", "TokenRequest", &request),
        json!({"metadata": {}, "spec": {"expirationSeconds": 600}, "status": {}})
    );
}

#[test]
fn bodies_of_deletion_eviction_and_binding() {
    let options = DeleteOptions {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: s("u"),
            resource_version: None,
        }),
        propagation_policy: s("Foreground"),
        dry_run: vec!["All".into()],
        ..Default::default()
    };
    let expected = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": "u"},
        "propagationPolicy": "Foreground", "dryRun": ["All"]});
    assert_eq!(decoded("v1", "DeleteOptions", &options), expected);
    let eviction = policy::Eviction {
        metadata: named("p"),
        delete_options: Some(options),
    };
    assert_eq!(
        decoded("policy/v1", "Eviction", &eviction),
        json!({"metadata": named_json("p"), "deleteOptions": expected})
    );
    let binding = core::Binding {
        metadata: named("p"),
        target: Some(core::ObjectReference {
            kind: s("Node"),
            name: s("n"),
            ..Default::default()
        }),
    };
    assert_eq!(
        decoded("v1", "Binding", &binding),
        json!({"metadata": named_json("p"), "target": {"kind": "Node", "name": "n"}})
    );
}

#[test]
fn every_stored_kubernetes_kind_has_a_table() {
    for kind in crate::kinds::all()
        .iter()
        // Definitions are sent as JSON or YAML; API services and metrics are only read.
        .filter(|k| {
            !matches!(
                k.group,
                "apiextensions.k8s.io"
                    | "apiregistration.k8s.io"
                    | crate::usage::GROUP
                    | crate::kinds::images::GROUP
            )
        })
    {
        let name = definitions()
            .of(kind)
            .and_then(|s| s.definition_name())
            .unwrap();
        assert!(
            table().get(name).is_some_and(|fields| fields.len() > 1),
            "{name}"
        );
    }
    for (name, fields) in table() {
        assert!(fields.is_sorted_by_key(|f| f.number), "{name}");
        for field in fields {
            if let Kind::Message(inner) = field.kind {
                assert!(
                    table().contains_key(inner),
                    "{name}.{} is of {inner}",
                    field.json
                );
            }
        }
    }
}

#[test]
fn what_is_not_served_or_not_protobuf_is_refused() {
    assert_eq!(decode(b"{}"), Err(ProtobufError::Magic));
    let error = decode(&body("apps/v2", "Deployment", &core::Pod::default())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no kind \"Deployment\" is registered for version \"apps/v2\""
    );
}

#[test]
fn nesting_and_number_of_values_are_bounded() {
    // managedFields may nest only as JSON; a PodSpec cannot nest in itself, so the depth limit is
    // checked on the decoder alone.
    let mut values = MAX_VALUES;
    let error = Decoder {
        values: &mut values,
    }
    .message(
        &[],
        "io.k8s.api.core.v1.Pod",
        MAX_DEPTH + 1,
        &mut Map::new(),
    )
    .unwrap_err();
    assert_eq!(error, Malformed("nested too deeply"));
    let mut values = 3;
    let pod = core::PodSpec {
        containers: vec![core::Container::default(); 4],
        ..Default::default()
    };
    let error = Decoder {
        values: &mut values,
    }
    .message(
        &pod.encode_to_vec(),
        "io.k8s.api.core.v1.PodSpec",
        0,
        &mut Map::new(),
    )
    .unwrap_err();
    assert_eq!(error, Malformed("too many values in one body"));
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut values = MAX_VALUES;
        // Only that it returns is asked; most garbage is an error, some is a valid message.
        let _ = Decoder { values: &mut values }
            .message(&bytes, "io.k8s.api.core.v1.Pod", 0, &mut Map::new());
    }

    #[test]
    fn cut_bodies_are_errors_or_shorter(cut in 0usize..60) {
        let pod = core::Pod { metadata: named("p"), ..Default::default() };
        let whole = body("v1", "Pod", &pod);
        let cut = cut.min(whole.len() - 1);
        let result = decode(&whole[..whole.len() - 1 - cut]);
        if let Ok(value) = result {
            prop_assert!(value.to_string().len() <= decode(&whole).unwrap().to_string().len());
        }
    }
}
