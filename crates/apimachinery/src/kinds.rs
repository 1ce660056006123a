//! The table of served kinds: names, scope, verbs, subresources.

mod cluster;
pub mod images;
mod legacy;
mod storage;
mod workloads;

/// A kind that the server serves under one group and version.
#[derive(Debug, PartialEq, Eq)]
pub struct ResourceKind {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// Version in the group.
    pub version: &'static str,
    /// Kind, as in the `kind` field.
    pub kind: &'static str,
    /// Name in paths.
    pub plural: &'static str,
    /// Singular name.
    pub singular: &'static str,
    /// Short names for command lines.
    pub short_names: &'static [&'static str],
    /// Categories such as `all`.
    pub categories: &'static [&'static str],
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Verbs, as discovery shows them.
    pub verbs: &'static [&'static str],
    /// Subresources.
    pub subresources: &'static [Subresource],
    /// Where objects are stored: the same for two views of one store. Empty: not stored, the
    /// kind exists only as a request (reviews).
    pub storage: &'static str,
    /// Rule for object names.
    pub name_rule: NameRule,
}

/// A subresource of a kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Subresource {
    /// Name in paths, after the object's name.
    pub name: &'static str,
    /// Group of its kind, if not the parent's.
    pub group: Option<&'static str>,
    /// Version of its kind, if not the parent's.
    pub version: Option<&'static str>,
    /// Kind of the body.
    pub kind: &'static str,
    /// Verbs.
    pub verbs: &'static [&'static str],
}

/// What a kind's object names must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameRule {
    /// RFC 1123 subdomain, at most 253 characters.
    Subdomain,
    /// RFC 1123 label, at most 63 characters.
    Label,
    /// RFC 1035 label, which begins with a letter.
    Label1035,
    /// Anything that is one path segment (RBAC).
    PathSegment,
}

impl ResourceKind {
    /// `apiVersion` of its objects.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `kind` of its lists.
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    /// The subresource of that name.
    pub fn subresource(&self, name: &str) -> Option<&'static Subresource> {
        self.subresources.iter().find(|sub| sub.name == name)
    }

    /// Whether the server stores objects of this kind.
    pub fn is_stored(&self) -> bool {
        !self.storage.is_empty()
    }

    /// Whether the verb is served.
    pub fn allows(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// `resource.group`, as messages and RBAC write it.
    pub fn qualified_resource(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }
}

const ALL: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];
/// Namespaces have no collection delete.
const NO_COLLECTION: &[&str] = &[
    "create", "delete", "get", "list", "patch", "update", "watch",
];
const CREATE: &[&str] = &["create"];
const GET: &[&str] = &["get"];
const CONNECT: &[&str] = &["create", "get"];
pub(crate) const STATUS: &[&str] = &["get", "patch", "update"];
const READ_ONLY: &[&str] = &["get", "list"];
const UPDATE: &[&str] = &["update"];

pub(crate) const fn sub(
    name: &'static str,
    kind: &'static str,
    verbs: &'static [&'static str],
) -> Subresource {
    Subresource {
        name,
        group: None,
        version: None,
        kind,
        verbs,
    }
}

pub(crate) const fn kind(
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
) -> ResourceKind {
    ResourceKind {
        group,
        version,
        kind,
        plural,
        singular,
        short_names: &[],
        categories: &[],
        namespaced: true,
        verbs: ALL,
        subresources: &[],
        storage: plural,
        name_rule: NameRule::Subdomain,
    }
}

const fn review(
    group: &'static str,
    name: &'static str,
    plural: &'static str,
    singular: &'static str,
) -> ResourceKind {
    ResourceKind {
        verbs: CREATE,
        storage: "",
        namespaced: false,
        ..kind(group, "v1", name, plural, singular)
    }
}

const RBAC: &str = "rbac.authorization.k8s.io";
const AUTHZ: &str = "authorization.k8s.io";
const AUTHN: &str = "authentication.k8s.io";

static KINDS: &[ResourceKind] = &[
    ResourceKind {
        short_names: &["cm"],
        ..kind("", "v1", "ConfigMap", "configmaps", "configmap")
    },
    legacy::ENDPOINTS,
    ResourceKind {
        short_names: &["ev"],
        // Recorders name events after objects of any kind.
        name_rule: NameRule::PathSegment,
        ..kind("", "v1", "Event", "events", "event")
    },
    workloads::LIMIT_RANGES,
    ResourceKind {
        short_names: &["ns"],
        namespaced: false,
        verbs: NO_COLLECTION,
        subresources: &[
            sub("finalize", "Namespace", UPDATE),
            sub("status", "Namespace", STATUS),
        ],
        name_rule: NameRule::Label,
        ..kind("", "v1", "Namespace", "namespaces", "namespace")
    },
    ResourceKind {
        short_names: &["no"],
        namespaced: false,
        subresources: &[
            sub("proxy", "NodeProxyOptions", GET),
            sub("status", "Node", STATUS),
        ],
        ..kind("", "v1", "Node", "nodes", "node")
    },
    storage::CLAIMS,
    storage::VOLUMES,
    ResourceKind {
        short_names: &["po"],
        categories: &["all"],
        subresources: &[
            sub("attach", "PodAttachOptions", CONNECT),
            sub("binding", "Binding", CREATE),
            sub("ephemeralcontainers", "Pod", STATUS),
            Subresource {
                group: Some("policy"),
                version: Some("v1"),
                ..sub("eviction", "Eviction", CREATE)
            },
            sub("exec", "PodExecOptions", CONNECT),
            sub("log", "Pod", GET),
            sub("portforward", "PodPortForwardOptions", CONNECT),
            sub("resize", "Pod", STATUS),
            sub("status", "Pod", STATUS),
        ],
        ..kind("", "v1", "Pod", "pods", "pod")
    },
    legacy::REPLICATION_CONTROLLERS,
    workloads::RESOURCE_QUOTAS,
    kind("", "v1", "Secret", "secrets", "secret"),
    ResourceKind {
        short_names: &["sa"],
        subresources: &[Subresource {
            group: Some(AUTHN),
            version: Some("v1"),
            ..sub("token", "TokenRequest", CREATE)
        }],
        ..kind(
            "",
            "v1",
            "ServiceAccount",
            "serviceaccounts",
            "serviceaccount",
        )
    },
    workloads::CONTROLLER_REVISIONS,
    workloads::DAEMON_SETS,
    workloads::DEPLOYMENTS,
    workloads::REPLICA_SETS,
    workloads::STATEFUL_SETS,
    ResourceKind {
        short_names: &["svc"],
        categories: &["all"],
        subresources: &[sub("status", "Service", STATUS)],
        name_rule: NameRule::Label1035,
        ..kind("", "v1", "Service", "services", "service")
    },
    review(
        AUTHN,
        "SelfSubjectReview",
        "selfsubjectreviews",
        "selfsubjectreview",
    ),
    review(AUTHN, "TokenReview", "tokenreviews", "tokenreview"),
    ResourceKind {
        namespaced: true,
        ..review(
            AUTHZ,
            "LocalSubjectAccessReview",
            "localsubjectaccessreviews",
            "localsubjectaccessreview",
        )
    },
    review(
        AUTHZ,
        "SelfSubjectAccessReview",
        "selfsubjectaccessreviews",
        "selfsubjectaccessreview",
    ),
    review(
        AUTHZ,
        "SelfSubjectRulesReview",
        "selfsubjectrulesreviews",
        "selfsubjectrulesreview",
    ),
    review(
        AUTHZ,
        "SubjectAccessReview",
        "subjectaccessreviews",
        "subjectaccessreview",
    ),
    ResourceKind {
        short_names: &["crd", "crds"],
        categories: &["api-extensions"],
        namespaced: false,
        subresources: &[sub("status", "CustomResourceDefinition", STATUS)],
        ..kind(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
            "customresourcedefinitions",
            "customresourcedefinition",
        )
    },
    cluster::API_SERVICES,
    // The first version of a group is the one that clients prefer.
    workloads::AUTOSCALERS,
    legacy::AUTOSCALERS_V1,
    workloads::CRON_JOBS,
    workloads::JOBS,
    cluster::SIGNING_REQUESTS,
    kind("coordination.k8s.io", "v1", "Lease", "leases", "lease"),
    kind(
        "discovery.k8s.io",
        "v1",
        "EndpointSlice",
        "endpointslices",
        "endpointslice",
    ),
    ResourceKind {
        short_names: &["ev"],
        ..kind("events.k8s.io", "v1", "Event", "events", "event")
    },
    images::IMAGES,
    ResourceKind {
        namespaced: false,
        verbs: READ_ONLY,
        storage: "",
        ..kind(crate::usage::GROUP, "v1beta1", "NodeMetrics", "nodes", "")
    },
    ResourceKind {
        verbs: READ_ONLY,
        storage: "",
        ..kind(crate::usage::GROUP, "v1beta1", "PodMetrics", "pods", "")
    },
    ResourceKind {
        namespaced: false,
        ..kind(
            "node.k8s.io",
            "v1",
            "RuntimeClass",
            "runtimeclasses",
            "runtimeclass",
        )
    },
    workloads::DISRUPTION_BUDGETS,
    ResourceKind {
        namespaced: false,
        name_rule: NameRule::PathSegment,
        ..kind(
            RBAC,
            "v1",
            "ClusterRoleBinding",
            "clusterrolebindings",
            "clusterrolebinding",
        )
    },
    ResourceKind {
        namespaced: false,
        name_rule: NameRule::PathSegment,
        ..kind(RBAC, "v1", "ClusterRole", "clusterroles", "clusterrole")
    },
    ResourceKind {
        name_rule: NameRule::PathSegment,
        ..kind(RBAC, "v1", "RoleBinding", "rolebindings", "rolebinding")
    },
    ResourceKind {
        name_rule: NameRule::PathSegment,
        ..kind(RBAC, "v1", "Role", "roles", "role")
    },
    workloads::PRIORITY_CLASSES,
    storage::DRIVERS,
    storage::DRIVERS_OF_NODES,
    storage::CAPACITIES,
    storage::CLASSES,
    storage::ATTACHMENTS,
];

/// All served kinds, sorted by group and resource within the order of groups.
pub fn all() -> &'static [ResourceKind] {
    KINDS
}

/// The kind served under a path.
pub fn by_resource(group: &str, version: &str, plural: &str) -> Option<&'static ResourceKind> {
    KINDS
        .iter()
        .find(|k| k.group == group && k.version == version && k.plural == plural)
}

/// Whether the kind is no row of the table but comes from a definition.
pub fn is_custom(kind: &ResourceKind) -> bool {
    !KINDS.iter().any(|known| std::ptr::eq(known, kind))
}

/// The kind of an object: of the table, or of this project's own definitions.
pub fn by_kind(group: &str, version: &str, kind: &str) -> Option<&'static ResourceKind> {
    KINDS
        .iter()
        .find(|k| k.group == group && k.version == version && k.kind == kind)
        .or_else(|| crate::crd::own_kind(group, version, kind))
}

/// The kind of an object by its `apiVersion` and `kind`.
pub fn by_api_version(api_version: &str, kind: &str) -> Option<&'static ResourceKind> {
    let (group, version) = split_api_version(api_version);
    by_kind(group, version, kind)
}

/// Group and version of an `apiVersion`.
pub fn split_api_version(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// Groups other than the core group with their versions, in the order of the table.
pub fn groups() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for kind in KINDS.iter().filter(|k| !k.group.is_empty()) {
        match groups.iter_mut().find(|(group, _)| *group == kind.group) {
            Some((_, versions)) if versions.contains(&kind.version) => {}
            Some((_, versions)) => versions.push(kind.version),
            None => groups.push((kind.group, vec![kind.version])),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_found_by_path_and_by_type() {
        let pod = by_resource("", "v1", "pods").unwrap();
        assert_eq!(by_api_version("v1", "Pod"), Some(pod));
        assert_eq!(pod.subresource("exec").unwrap().kind, "PodExecOptions");
        assert_eq!(by_resource("apps", "v1beta1", "deployments"), None);
        assert_eq!(
            by_api_version("hypernetes.io/v1alpha1", "Tenant")
                .unwrap()
                .qualified_resource(),
            "tenants.hypernetes.io"
        );
    }

    #[test]
    fn names_are_unique_within_a_group() {
        for (index, kind) in all().iter().enumerate() {
            for other in &all()[index + 1..] {
                let same = kind.group == other.group && kind.version == other.version;
                assert!(!(same && kind.plural == other.plural), "{kind:?}");
                assert!(!(same && kind.kind == other.kind), "{kind:?}");
            }
        }
    }

    #[test]
    fn views_share_a_store() {
        let core = by_api_version("v1", "Event").unwrap();
        let group = by_api_version("events.k8s.io/v1", "Event").unwrap();
        assert_eq!(core.storage, group.storage);
        let (new, old) = (
            by_resource("autoscaling", "v2", "horizontalpodautoscalers").unwrap(),
            by_resource("autoscaling", "v1", "horizontalpodautoscalers").unwrap(),
        );
        assert_eq!(new.storage, old.storage);
    }

    #[test]
    fn groups_are_listed_once() {
        let groups = groups();
        assert_eq!(groups.iter().filter(|(g, _)| *g == RBAC).count(), 1);
        assert!(groups.iter().all(|(group, versions)| !group.is_empty()
            && (versions.len() == 1 || *group == "autoscaling")));
    }
}
