use serde_json::{Value, json};

use super::*;

struct Case {
    operation: Operation,
    groups: Vec<String>,
    group: &'static str,
    kind: &'static str,
    subresource: &'static str,
    namespace_object: Value,
    object: Value,
    old: Option<Value>,
}

impl Case {
    fn create(group: &'static str, kind: &'static str, object: Value) -> Self {
        Self {
            operation: Operation::Create,
            groups: vec![
                "hypernetes:tenant:acme:admin".into(),
                "system:authenticated".into(),
            ],
            group,
            kind,
            subresource: "",
            namespace_object: json!({"metadata": {"name": "acme",
                "labels": {"hypernetes.io/tenant": "acme"}}}),
            object,
            old: None,
        }
    }

    fn pod(spec: Value) -> Self {
        let mut spec = spec;
        if spec["containers"].is_null() {
            spec["containers"] = json!([{"name": "c", "image": "busybox"}]);
        }
        Self::create(
            "",
            "Pod",
            json!({"metadata": {"name": "p", "namespace": "acme"}, "spec": spec}),
        )
    }

    fn update(mut self, old: Value) -> Self {
        self.operation = Operation::Update;
        self.old = Some(old);
        self
    }

    fn by_operator(mut self) -> Self {
        self.groups = vec![MASTERS_GROUP.into()];
        self
    }

    fn outside(mut self) -> Self {
        self.namespace_object = json!({"metadata": {"name": "default"}});
        self
    }

    fn admit(&self) -> Result<Outcome, Denied> {
        admit(&AdmissionRequest {
            operation: self.operation,
            user: "alice",
            groups: &self.groups,
            gvk: Gvk {
                group: self.group,
                version: "v1",
                kind: self.kind,
            },
            resource: "things",
            subresource: self.subresource,
            namespace: Some("acme"),
            namespace_object: Some(&self.namespace_object),
            object: Some(&self.object),
            old_object: self.old.as_ref(),
        })
    }

    fn fields(&self) -> Vec<String> {
        match self.admit() {
            Ok(_) => Vec::new(),
            Err(denied) => {
                for cause in &denied.causes {
                    assert!(denied.message.contains(&cause.field), "{}", denied.message);
                }
                denied.causes.into_iter().map(|cause| cause.field).collect()
            }
        }
    }
}

#[test]
fn a_plain_pod_gets_the_runtime_class() {
    let outcome = Case::pod(json!({})).admit().unwrap();
    assert_eq!(
        outcome.object.unwrap()["spec"]["runtimeClassName"],
        "hypernetes"
    );
    let named = Case::pod(json!({"runtimeClassName": "hypernetes"}))
        .admit()
        .unwrap();
    assert_eq!(named, Outcome::default());
    assert_eq!(
        Case::pod(json!({})).outside().admit().unwrap(),
        Outcome::default()
    );
}

#[test]
fn host_level_fields_are_refused_for_everyone_in_a_tenants_namespace() {
    let c = |extra: Value| {
        let mut container = json!({"name": "c", "image": "i"});
        container
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        json!([container])
    };
    for (field, spec) in [
        ("spec.hostNetwork", json!({"hostNetwork": true})),
        ("spec.hostPID", json!({"hostPID": true})),
        ("spec.hostIPC", json!({"hostIPC": true})),
        ("spec.hostIPC", json!({"hostIPC": "yes"})),
        ("spec.hostUsers", json!({"hostUsers": true})),
        ("spec.nodeName", json!({"nodeName": "n"})),
        ("spec.runtimeClassName", json!({"runtimeClassName": "runc"})),
        (
            "spec.priorityClassName",
            json!({"priorityClassName": "system-node-critical"}),
        ),
        (
            "spec.volumes[0].hostPath",
            json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}),
        ),
        (
            "spec.volumes[0].hostPath",
            json!({"volumes": [{"name": "v", "hostPath": {}}]}),
        ),
        (
            "spec.volumes[0].nfs",
            json!({"volumes": [{"name": "v", "nfs": {"server": "s"}}]}),
        ),
        (
            "spec.volumes[0].csi",
            json!({"volumes": [{"name": "v", "csi": {"driver": "d"}}]}),
        ),
        (
            "spec.containers[0].ports[0].hostPort",
            json!({"containers": c(json!({"ports": [{"containerPort": 1, "hostPort": 1}]}))}),
        ),
        (
            "spec.containers[0].securityContext.privileged",
            json!({"containers": c(json!({"securityContext": {"privileged": true}}))}),
        ),
        (
            "spec.initContainers[0].securityContext.privileged",
            json!({"initContainers": c(json!({"securityContext": {"privileged": true}}))}),
        ),
        (
            "spec.ephemeralContainers[0].securityContext.privileged",
            json!({"ephemeralContainers": c(json!({"securityContext": {"privileged": true}}))}),
        ),
    ] {
        let case = Case::pod(spec.clone());
        assert_eq!(case.fields(), [field], "{spec}");
        assert_eq!(
            Case::pod(spec.clone()).by_operator().fields(),
            [field],
            "{spec}"
        );
        assert_eq!(Case::pod(spec).outside().fields(), Vec::<String>::new());
    }
}

#[test]
fn the_node_may_write_status_and_the_scheduler_bind() {
    let mut case = Case::pod(json!({"nodeName": "n"}));
    case.subresource = "binding";
    assert_eq!(case.fields(), Vec::<String>::new());
    let case = Case::pod(json!({"nodeName": "n"}));
    let old = case.object.clone();
    assert_eq!(case.update(old).fields(), Vec::<String>::new());
}

#[test]
fn kernels_are_those_that_the_tenant_may_use() {
    let annotated = |kernel: &str, allowed: Option<&str>| {
        let mut case = Case::pod(json!({}));
        case.object["metadata"]["annotations"] = json!({"hypernetes.io/kernel": kernel});
        if let Some(allowed) = allowed {
            case.namespace_object["metadata"]["annotations"] =
                json!({"hypernetes.io/allowed-kernels": allowed});
        }
        case.fields().len()
    };
    assert_eq!(annotated("debian", None), 0);
    assert_eq!(annotated("debian", Some("hyper, debian")), 0);
    assert_eq!(annotated("debian", Some("hyper")), 1);
    assert_eq!(annotated("debian", Some("")), 1);
    assert_eq!(annotated("../x", None), 1);
    let mut case = Case::pod(json!({}));
    let old = case.object.clone();
    case.object["metadata"]["annotations"] = json!({"hypernetes.io/kernel": "debian"});
    assert_eq!(
        case.update(old).fields(),
        ["metadata.annotations[hypernetes.io/kernel]"]
    );
}

#[test]
fn networks_are_of_the_own_namespace() {
    for (network, refused) in [
        ("blue", 0),
        ("globex.default", 1),
        ("globex/default", 1),
        ("", 1),
    ] {
        let mut case = Case::pod(json!({}));
        case.object["metadata"]["annotations"] = json!({"hypernetes.io/network": network});
        assert_eq!(case.fields().len(), refused, "{network}");
        let namespace = json!({"metadata": {"name": "acme", "labels": {
            "hypernetes.io/network": network, "hypernetes.io/tenant": "acme"}}});
        let old = json!({"metadata": {"name": "acme", "labels": {"hypernetes.io/tenant": "acme"}}});
        let case = Case::create("", "Namespace", namespace).update(old);
        assert_eq!(case.fields().len(), refused, "{network}");
    }
}

#[test]
fn a_namespace_keeps_its_tenant() {
    let with = |tenant: Option<&str>| {
        let labels = tenant.map_or(json!({}), |tenant| json!({"hypernetes.io/tenant": tenant}));
        json!({"metadata": {"name": "acme", "labels": labels}})
    };
    for (old, new, member, operator) in [
        (Some("acme"), Some("acme"), 0, 0),
        (Some("acme"), Some("globex"), 2, 1),
        (Some("acme"), None, 2, 1),
        (None, Some("globex"), 1, 0),
    ] {
        let case = || Case::create("", "Namespace", with(new)).update(with(old));
        assert_eq!(case().fields().len(), member, "{old:?} {new:?}");
        assert_eq!(
            case().by_operator().fields().len(),
            operator,
            "{old:?} {new:?}"
        );
    }
    assert_eq!(
        Case::create("", "Namespace", with(None)).fields(),
        ["metadata.name"]
    );
    assert_eq!(
        Case::create("", "Namespace", with(None))
            .by_operator()
            .fields()
            .len(),
        0
    );
}

#[test]
fn reserved_labels_annotations_and_finalizers_are_the_controllers() {
    let config = |meta: Value| Case::create("", "ConfigMap", json!({"metadata": meta}));
    for meta in [
        json!({"labels": {"hypernetes.io/x": "1"}}),
        json!({"labels": {"sub.hypernetes.io/x": "1"}}),
        json!({"annotations": {"hypernetes.io/allowed-kernels": "x"}}),
        json!({"finalizers": ["hypernetes.io/cleanup"]}),
    ] {
        assert_eq!(config(meta.clone()).fields().len(), 1, "{meta}");
        assert_eq!(
            config(meta.clone()).by_operator().fields().len(),
            0,
            "{meta}"
        );
        // Taking away is a change as well; leaving as it is is none.
        let removed = config(json!({})).update(json!({"metadata": meta}));
        assert_eq!(removed.fields().len(), 1, "{meta}");
        let same = config(meta.clone()).update(json!({"metadata": meta}));
        assert_eq!(same.fields().len(), 0, "{meta}");
    }
    let foreign = json!({"labels": {"nothypernetes.io/x": "1", "app": "x"}});
    assert_eq!(config(foreign).fields().len(), 0);
    // The tenants' own command line keeps its records there.
    let client = json!({"labels": {"hyper.hypernetes.io/name": "a"}, "annotations": {"hyper.hypernetes.io/id": "b"}});
    assert_eq!(config(client).fields().len(), 0);
}

#[test]
fn a_pod_says_what_the_node_shall_do_at_its_end() {
    let wishes = json!({"metadata": {"annotations": {
        "hypernetes.io/max-restarts": "3", "hypernetes.io/stop-grace-seconds": "1"}}, "spec": {}});
    assert_eq!(Case::create("", "Pod", wishes.clone()).fields().len(), 0);
    let changed =
        Case::create("", "Pod", wishes.clone()).update(json!({"metadata": {}, "spec": {}}));
    assert_eq!(changed.fields().len(), 0);
    assert_eq!(Case::create("", "ConfigMap", wishes).fields().len(), 2);
}

#[test]
fn a_pod_is_paused_or_suspended_or_not() {
    for key in ["hypernetes.io/paused", "hypernetes.io/suspended"] {
        is_true_or_false(key);
    }
}

fn is_true_or_false(key: &str) {
    let pod = |value: Value| {
        let meta = json!({"annotations": {key: value}});
        Case::create("", "Pod", json!({"metadata": meta, "spec": {}}))
    };
    for good in ["true", "false"] {
        assert_eq!(pod(json!(good)).fields().len(), 0, "{good}");
        let changed = pod(json!(good)).update(json!({"metadata": {}, "spec": {}}));
        assert_eq!(changed.fields().len(), 0, "{good}");
    }
    for bad in [json!(""), json!("True"), json!("1"), json!(true)] {
        let field = [format!("metadata.annotations[{key}]")];
        assert_eq!(pod(bad.clone()).fields(), field, "{bad}");
        assert_eq!(pod(bad.clone()).by_operator().fields(), field, "{bad}");
    }
}

#[test]
fn a_clone_names_a_pod_or_a_snapshot_and_stays_its_clone() {
    for key in ["hypernetes.io/clone-of", "hypernetes.io/clone-of-snapshot"] {
        names_what_it_is_a_clone_of(key);
    }
    let meta = json!({"annotations": {"hypernetes.io/clone-of": "a", "hypernetes.io/clone-of-snapshot": "b"}});
    let both = Case::create("", "Pod", json!({"metadata": meta, "spec": {}}));
    let field = "metadata.annotations[hypernetes.io/clone-of-snapshot]";
    assert_eq!(both.by_operator().fields(), [field]);
}

fn names_what_it_is_a_clone_of(key: &str) {
    let pod = |value: Value| {
        let meta = json!({"annotations": {key: value}});
        Case::create("", "Pod", json!({"metadata": meta, "spec": {}}))
    };
    let field = [format!("metadata.annotations[{key}]")];
    for good in ["web", "web-1.a"] {
        assert_eq!(pod(json!(good)).fields().len(), 0, "{good}");
        let changed = pod(json!(good)).update(json!({"metadata": {}, "spec": {}}));
        assert_eq!(changed.fields(), field, "{good}");
    }
    for bad in [
        json!(""),
        json!("other/web"),
        json!("-x"),
        json!("a..b"),
        json!(1),
    ] {
        assert_eq!(pod(bad.clone()).by_operator().fields(), field, "{bad}");
    }
}

#[test]
fn role_bindings_stay_in_the_tenant() {
    let binding = |role: Value, subject: Value| {
        Case::create(
            "rbac.authorization.k8s.io",
            "RoleBinding",
            json!({"metadata": {"name": "b"}, "roleRef": role, "subjects": [subject]}),
        )
    };
    let view = json!({"kind": "ClusterRole", "name": "hypernetes-tenant-view"});
    let group = |name: &str| json!({"kind": "Group", "name": name});
    let own = group("hypernetes:tenant:acme:view");
    for (role, subject, refused) in [
        (view.clone(), own.clone(), 0),
        (json!({"kind": "Role", "name": "x"}), own.clone(), 0),
        (
            view.clone(),
            json!({"kind": "ServiceAccount", "name": "s", "namespace": "acme"}),
            0,
        ),
        (
            view.clone(),
            json!({"kind": "ServiceAccount", "name": "s", "namespace": "globex"}),
            1,
        ),
        (
            view.clone(),
            json!({"kind": "ServiceAccount", "name": "s"}),
            1,
        ),
        (view.clone(), group("hypernetes:tenant:globex:view"), 1),
        (view.clone(), group("hypernetes:tenant:acmex:view"), 1),
        (view.clone(), group("system:authenticated"), 1),
        (view.clone(), json!({"kind": "User", "name": "bob"}), 1),
        (
            json!({"kind": "ClusterRole", "name": "cluster-admin"}),
            own,
            1,
        ),
    ] {
        assert_eq!(
            binding(role.clone(), subject.clone()).fields().len(),
            refused,
            "{role} {subject}"
        );
        assert_eq!(binding(role, subject).by_operator().fields().len(), 0);
    }
}

#[test]
fn network_and_tenant_objects_are_checked() {
    let network = |spec: Value| {
        Case::create(
            "hypernetes.io",
            "Network",
            json!({"metadata": {"name": "n"}, "spec": spec}),
        )
    };
    let one = |cidr: &str| json!({"subnets": [{"cidr": cidr}]});
    for (spec, refused) in [
        (one("10.0.0.0/16"), 0),
        (one("10.0.0.1/16"), 1),
        (one("10.0.0.0/30"), 1),
        (one("0.0.0.0/0"), 1),
        (one("127.0.0.0/8"), 1),
        (one("fd00::/64"), 1),
        (one("x"), 1),
        (json!({}), 1),
        (
            json!({"subnets": [{"cidr": "10.0.0.0/24"}, {"cidr": "10.0.1.0/24"}]}),
            1,
        ),
        (
            json!({"subnets": [{"cidr": "10.0.0.0/24", "gateway": "10.0.1.1"}]}),
            1,
        ),
        (
            json!({"subnets": [{"cidr": "10.0.0.0/24", "gateway": "10.0.0.255"}]}),
            1,
        ),
        (json!({"subnets": [{"cidr": "10.0.0.0/24"}], "mtu": 100}), 1),
        (
            json!({"subnets": [{"cidr": "10.0.0.0/24"}], "share": "Tenant"}),
            1,
        ),
        (
            json!({"subnets": [{"cidr": "10.0.0.0/24"}], "external": {"snat": true}}),
            0,
        ),
    ] {
        assert_eq!(network(spec.clone()).fields().len(), refused, "{spec}");
    }
    let changed = network(one("10.0.0.0/16")).update(json!({"spec": one("10.1.0.0/16")}));
    assert_eq!(changed.fields(), ["spec.subnets"]);

    let tenant = |name: &str, spec: Value| {
        Case::create(
            "hypernetes.io",
            "Tenant",
            json!({"metadata": {"name": name}, "spec": spec}),
        )
        .by_operator()
        .fields()
        .len()
    };
    assert_eq!(
        tenant(
            "acme",
            json!({"network": {"default": {"cidr": "10.0.0.0/16"}}})
        ),
        0
    );
    assert_eq!(
        tenant(
            "acme",
            json!({"kernels": ["debian"], "displayName": "Acme"})
        ),
        0
    );
    assert_eq!(tenant("acme", json!({"kernels": ["../x"]})), 1);
    for storage in ["10Gi", "0", "unlimited"] {
        assert_eq!(tenant("acme", json!({"storage": storage})), 0);
    }
    for storage in [json!("much"), json!("-1Gi"), json!(""), json!({})] {
        assert_eq!(tenant("acme", json!({"storage": storage})), 1);
    }
    assert_eq!(tenant("acme", json!({"quota": {}})), 1);
    assert_eq!(tenant("Acme", json!({})), 1);
    assert_eq!(tenant("kube-system", json!({})), 1);
    assert_eq!(tenant("default", json!({})), 1);
}

#[test]
fn services_have_no_addresses_or_ports_of_the_node() {
    let fields = |spec: Value| Case::create("", "Service", json!({"spec": spec})).fields();
    let none: [&str; 0] = [];
    assert_eq!(fields(json!({"type": "ClusterIP"})), none);
    assert_eq!(
        fields(json!({"type": "LoadBalancer", "ports": [{"port": 80}]})),
        none
    );
    assert_eq!(fields(json!({"type": "NodePort"})), ["spec.type"]);
    assert_eq!(
        fields(json!({"externalIPs": ["10.0.0.1"]})),
        ["spec.externalIPs"]
    );
    let balanced = json!({"type": "LoadBalancer", "ports": [{"port": 80, "nodePort": 30080}]});
    assert_eq!(fields(balanced), ["spec.ports[0].nodePort"]);
}

#[test]
fn tenants_have_as_many_ports_of_the_node_as_their_object_says() {
    let denied = |annotations: Value, tenant: bool| {
        let mut case = Case::create("", "Service", json!({"spec": {"type": "NodePort"}}));
        if !tenant {
            case.namespace_object["metadata"]["labels"] = json!({});
        }
        case.namespace_object["metadata"]["annotations"] = annotations;
        case.fields()
    };
    let none: [&str; 0] = [];
    assert_eq!(denied(json!({}), false), none);
    assert_eq!(denied(json!({}), true), ["spec.type"]);
    for (count, fits) in [("0", false), ("-1", false), ("x", false), ("2", true)] {
        let found = denied(json!({"hypernetes.io/node-ports": count}), true);
        assert_eq!(found.is_empty(), fits, "{count}");
    }
}

#[test]
fn bandwidths_are_checked_and_stay() {
    let annotated = |ingress: &str, egress: &str| {
        let mut case = Case::pod(json!({}));
        case.object["metadata"]["annotations"] = json!({
            "kubernetes.io/ingress-bandwidth": ingress, "kubernetes.io/egress-bandwidth": egress,
        });
        case
    };
    assert_eq!(annotated("10M", "1G").fields(), Vec::<String>::new());
    assert_eq!(
        annotated("much", "1G").fields(),
        ["metadata.annotations[kubernetes.io/ingress-bandwidth]"]
    );
    let egress = ["metadata.annotations[kubernetes.io/egress-bandwidth]"];
    assert_eq!(annotated("10M", "1").fields(), egress);
    let old = annotated("10M", "1G").object;
    assert_eq!(annotated("10M", "2G").update(old.clone()).fields(), egress);
    assert_eq!(
        annotated("10M", "1G").update(old).fields(),
        Vec::<String>::new()
    );
}
