//! Role-based access control: who may do what, from Role, ClusterRole and their bindings.

use std::collections::{BTreeSet, HashMap};

use hypernetes_apimachinery::Status;
use hypernetes_identity::{MASTERS, User};
use serde_json::Value;

use crate::request_info::RequestInfo;

/// What somebody wants to do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Action<'a> {
    pub(crate) verb: &'a str,
    /// Empty: cluster-wide.
    pub(crate) namespace: &'a str,
    pub(crate) group: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) subresource: &'a str,
    pub(crate) name: &'a str,
    /// Set for what is no resource; the other fields but the verb are then not looked at.
    pub(crate) path: Option<&'a str>,
}

impl<'a> Action<'a> {
    pub(crate) fn of(info: &'a RequestInfo) -> Self {
        Self {
            verb: info.verb,
            namespace: &info.namespace,
            group: &info.group,
            resource: &info.resource,
            subresource: &info.subresource,
            name: &info.name,
            path: (!info.is_resource).then_some(info.path.as_str()),
        }
    }

    /// The refusal, in upstream's words.
    pub(crate) fn refusal(&self, user: &User) -> Status {
        let who = &user.name;
        if let Some(path) = self.path {
            let why = format!("User {who:?} cannot {} path {path:?}", self.verb);
            return Status::forbidden("", "", "", &why);
        }
        let resource = if self.subresource.is_empty() {
            self.resource.to_owned()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        };
        let place =
            if self.namespace.is_empty() || self.resource == "namespaces" && self.name.is_empty() {
                "at the cluster scope".to_owned()
            } else {
                format!("in the namespace {:?}", self.namespace)
            };
        let why = format!(
            "User {who:?} cannot {} resource {resource:?} in API group {:?} {place}",
            self.verb, self.group
        );
        Status::forbidden(self.group, self.resource, self.name, &why)
    }
}

/// One `PolicyRule`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Rule {
    pub(crate) verbs: Vec<String>,
    pub(crate) groups: Vec<String>,
    pub(crate) resources: Vec<String>,
    pub(crate) names: Vec<String>,
    pub(crate) paths: Vec<String>,
}

fn strings(value: &Value) -> Vec<String> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn has(list: &[String], item: &str) -> bool {
    list.iter().any(|entry| entry == "*" || entry == item)
}

impl Rule {
    fn parse(value: &Value) -> Self {
        Self {
            verbs: strings(&value["verbs"]),
            groups: strings(&value["apiGroups"]),
            resources: strings(&value["resources"]),
            names: strings(&value["resourceNames"]),
            paths: strings(&value["nonResourceURLs"]),
        }
    }

    /// The rules of a Role or ClusterRole.
    pub(crate) fn of_role(role: &Value) -> Vec<Self> {
        role["rules"]
            .as_array()
            .into_iter()
            .flatten()
            .map(Self::parse)
            .collect()
    }

    fn allows(&self, action: &Action<'_>) -> bool {
        if !has(&self.verbs, action.verb) {
            return false;
        }
        if let Some(path) = action.path {
            return self.paths.iter().any(|entry| {
                entry == "*"
                    || entry == path
                    || entry
                        .strip_suffix('*')
                        .is_some_and(|prefix| path.starts_with(prefix))
            });
        }
        has(&self.groups, action.group)
            && self.has_resource(action.resource, action.subresource)
            && (self.names.is_empty()
                || !action.name.is_empty() && self.names.iter().any(|n| n == action.name))
    }

    fn has_resource(&self, resource: &str, subresource: &str) -> bool {
        self.resources.iter().any(|entry| {
            if entry == "*" {
                return true;
            }
            match entry.split_once('/') {
                None => subresource.is_empty() && entry == resource,
                Some(("*", sub)) => !subresource.is_empty() && sub == subresource,
                Some((main, sub)) => main == resource && sub == subresource && !sub.is_empty(),
            }
        })
    }

    /// Whether everything that this rule grants is granted by one of `held`.
    fn is_covered_by(&self, held: &[Self]) -> bool {
        let all =
            |mine: &[String], theirs: &[String]| mine.iter().all(|item| has_exact(theirs, item));
        // A rule is split into single grants: two rules of the holder may cover it together.
        if !self.paths.is_empty() {
            let paths = self.paths.iter().all(|path| {
                self.verbs.iter().all(|verb| {
                    held.iter()
                        .any(|rule| has_exact(&rule.verbs, verb) && covers_path(&rule.paths, path))
                })
            });
            if !paths {
                return false;
            }
        }
        let names: Vec<Option<&String>> = if self.names.is_empty() {
            vec![None]
        } else {
            self.names.iter().map(Some).collect()
        };
        self.verbs.iter().all(|verb| {
            self.groups.iter().all(|group| {
                self.resources.iter().all(|resource| {
                    names.iter().all(|name| {
                        held.iter().any(|rule| {
                            has_exact(&rule.verbs, verb)
                                && has_exact(&rule.groups, group)
                                && covers_resource(&rule.resources, resource)
                                && (rule.names.is_empty()
                                    || name.is_some_and(|name| {
                                        all(std::slice::from_ref(name), &rule.names)
                                    }))
                        })
                    })
                })
            })
        })
    }
}

/// As `has`, but `*` is asked for only by `*`.
fn has_exact(list: &[String], item: &str) -> bool {
    list.iter().any(|entry| entry == "*" || entry == item)
}

fn covers_path(held: &[String], path: &str) -> bool {
    held.iter().any(|entry| {
        entry == path
            || entry
                .strip_suffix('*')
                .is_some_and(|prefix| path.starts_with(prefix))
    })
}

fn covers_resource(held: &[String], resource: &str) -> bool {
    held.iter().any(|entry| {
        entry == "*"
            || entry == resource
            || matches!(
                (entry.split_once('/'), resource.split_once('/')),
                (Some(("*", held)), Some((_, asked))) if held == asked
            )
    })
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Subject {
    User(String),
    Group(String),
}

#[derive(Debug)]
struct Binding {
    role: RoleRef,
    subjects: Vec<Subject>,
    /// Empty for a ClusterRoleBinding.
    namespace: String,
}

/// Which role a binding grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoleRef {
    pub(crate) cluster: bool,
    pub(crate) name: String,
}

impl RoleRef {
    pub(crate) fn of_binding(binding: &Value) -> Self {
        Self {
            cluster: binding["roleRef"]["kind"].as_str() == Some("ClusterRole"),
            name: binding["roleRef"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        }
    }
}

impl Binding {
    fn parse(binding: &Value) -> Self {
        let namespace = binding["metadata"]["namespace"]
            .as_str()
            .unwrap_or_default();
        let subjects = binding["subjects"].as_array().into_iter().flatten();
        let subjects = subjects.filter_map(|subject| {
            let name = subject["name"].as_str()?.to_owned();
            match subject["kind"].as_str()? {
                "User" => Some(Subject::User(name)),
                "Group" => Some(Subject::Group(name)),
                "ServiceAccount" => {
                    let home = subject["namespace"].as_str().unwrap_or(namespace);
                    Some(Subject::User(format!(
                        "system:serviceaccount:{home}:{name}"
                    )))
                }
                _ => None,
            }
        });
        Self {
            role: RoleRef::of_binding(binding),
            subjects: subjects.collect(),
            namespace: namespace.to_owned(),
        }
    }
}

/// All roles and bindings, indexed by subject.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    /// By store key.
    roles: HashMap<String, Vec<Rule>>,
    bindings: HashMap<String, Binding>,
    /// Keys of bindings by namespace (empty: cluster-wide) and subject.
    by_subject: HashMap<String, HashMap<Subject, BTreeSet<String>>>,
}

/// Which of the four kinds an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PolicyKind {
    Role,
    Binding,
}

impl Policy {
    /// Takes over the newest state of an object; `None` is a deletion.
    pub(crate) fn set(&mut self, kind: PolicyKind, key: &str, object: Option<&Value>) {
        match kind {
            PolicyKind::Role => match object {
                Some(role) => {
                    self.roles.insert(key.to_owned(), Rule::of_role(role));
                }
                None => {
                    self.roles.remove(key);
                }
            },
            PolicyKind::Binding => {
                if let Some(old) = self.bindings.remove(key) {
                    self.unindex(key, &old);
                }
                if let Some(object) = object {
                    let binding = Binding::parse(object);
                    let scope = self
                        .by_subject
                        .entry(binding.namespace.clone())
                        .or_default();
                    for subject in &binding.subjects {
                        scope
                            .entry(subject.clone())
                            .or_default()
                            .insert(key.to_owned());
                    }
                    self.bindings.insert(key.to_owned(), binding);
                }
            }
        }
    }

    fn unindex(&mut self, key: &str, binding: &Binding) {
        let Some(scope) = self.by_subject.get_mut(&binding.namespace) else {
            return;
        };
        for subject in &binding.subjects {
            if let Some(keys) = scope.get_mut(subject) {
                keys.remove(key);
                if keys.is_empty() {
                    scope.remove(subject);
                }
            }
        }
        if scope.is_empty() {
            self.by_subject.remove(&binding.namespace);
        }
    }

    /// Whether the user may do it.
    pub(crate) fn allows(&self, user: &User, action: &Action<'_>) -> bool {
        if user.is_in(MASTERS) {
            return true;
        }
        let mut scopes = vec![""];
        if action.path.is_none() && !action.namespace.is_empty() {
            scopes.push(action.namespace);
        }
        scopes.into_iter().any(|scope| {
            self.rules_in(user, scope)
                .any(|rules| rules.iter().any(|rule| rule.allows(action)))
        })
    }

    /// The rules that hold for the user in a namespace, cluster-wide ones included.
    pub(crate) fn rules_of(&self, user: &User, namespace: &str) -> Vec<Rule> {
        if user.is_in(MASTERS) {
            let all = || vec!["*".to_owned()];
            return vec![
                Rule {
                    verbs: all(),
                    groups: all(),
                    resources: all(),
                    ..Rule::default()
                },
                Rule {
                    verbs: all(),
                    paths: all(),
                    ..Rule::default()
                },
            ];
        }
        let mut rules: Vec<Rule> = self.rules_in(user, "").flatten().cloned().collect();
        if !namespace.is_empty() {
            rules.extend(self.rules_in(user, namespace).flatten().cloned());
        }
        rules
    }

    /// The rules of a role; `namespace` is where a binding to it stands.
    pub(crate) fn rules_of_role(&self, role: &RoleRef, namespace: &str) -> Option<&Vec<Rule>> {
        self.roles.get(&role_key(role, namespace))
    }

    /// What of `wanted` the user does not hold in the namespace (empty: cluster-wide).
    pub(crate) fn missing<'a>(
        &self,
        user: &User,
        namespace: &str,
        wanted: &'a [Rule],
    ) -> Vec<&'a Rule> {
        let held = self.rules_of(user, namespace);
        wanted
            .iter()
            .filter(|rule| !rule.is_covered_by(&held))
            .collect()
    }

    fn rules_in<'a>(&'a self, user: &User, scope: &str) -> impl Iterator<Item = &'a Vec<Rule>> {
        let scope = self.by_subject.get(scope);
        let subjects = std::iter::once(Subject::User(user.name.clone()))
            .chain(user.groups.iter().cloned().map(Subject::Group));
        let keys: Vec<&String> = subjects
            .filter_map(|subject| scope?.get(&subject))
            .flatten()
            .collect();
        keys.into_iter().filter_map(|key| {
            let binding = self.bindings.get(key)?;
            self.roles.get(&role_key(&binding.role, &binding.namespace))
        })
    }
}

fn role_key(role: &RoleRef, namespace: &str) -> String {
    if role.cluster {
        format!("{}clusterroles/{}", crate::keys::ROOT, role.name)
    } else {
        format!("{}roles/{namespace}/{}", crate::keys::ROOT, role.name)
    }
}

/// A rule as upstream's escalation message shows it.
pub(crate) fn describe(rule: &Rule) -> String {
    let list = |items: &[String]| {
        items
            .iter()
            .map(|item| format!("{item:?}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut parts = Vec::new();
    for (name, items) in [
        ("APIGroups", &rule.groups),
        ("Resources", &rule.resources),
        ("ResourceNames", &rule.names),
        ("NonResourceURLs", &rule.paths),
        ("Verbs", &rule.verbs),
    ] {
        if !items.is_empty() {
            parts.push(format!("{name}:[{}]", list(items)));
        }
    }
    format!("{{{}}}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn policy() -> Policy {
        let mut policy = Policy::default();
        let mut set = |kind, key: &str, object: Value| {
            policy.set(kind, &format!("{}{key}", crate::keys::ROOT), Some(&object));
        };
        set(
            PolicyKind::Role,
            "clusterroles/edit",
            json!({"rules": [
                {"apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list"]},
                {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["one"], "verbs": ["get"]},
            ]}),
        );
        set(
            PolicyKind::Role,
            "clusterroles/info",
            json!({"rules": [{"nonResourceURLs": ["/version", "/api/*"], "verbs": ["get"]}]}),
        );
        set(
            PolicyKind::Binding,
            "rolebindings/a/edit",
            json!({"metadata": {"namespace": "a"}, "roleRef": {"kind": "ClusterRole", "name": "edit"},
                "subjects": [{"kind": "Group", "name": "devs"}, {"kind": "ServiceAccount", "name": "robot"}]}),
        );
        set(
            PolicyKind::Binding,
            "clusterrolebindings/info",
            json!({"metadata": {}, "roleRef": {"kind": "ClusterRole", "name": "info"},
                "subjects": [{"kind": "Group", "name": "system:authenticated"}]}),
        );
        policy
    }

    fn action<'a>(
        verb: &'a str,
        namespace: &'a str,
        resource: &'a str,
        name: &'a str,
    ) -> Action<'a> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Action {
            verb,
            namespace,
            resource,
            subresource,
            name,
            ..Action::default()
        }
    }

    #[test]
    fn a_binding_grants_in_its_namespace_only() {
        let policy = policy();
        let dev = User::authenticated("dev", ["devs".to_owned()]);
        assert!(policy.allows(&dev, &action("list", "a", "pods", "")));
        assert!(policy.allows(&dev, &action("get", "a", "pods/log", "x")));
        assert!(!policy.allows(&dev, &action("get", "a", "pods/exec", "x")));
        assert!(!policy.allows(&dev, &action("list", "b", "pods", "")));
        assert!(!policy.allows(&dev, &action("list", "", "pods", "")));
        assert!(!policy.allows(&dev, &action("delete", "a", "pods", "x")));
        let robot = User::authenticated("system:serviceaccount:a:robot", []);
        assert!(policy.allows(&robot, &action("list", "a", "pods", "")));
        assert!(!policy.allows(&User::anonymous(), &action("list", "a", "pods", "")));
    }

    #[test]
    fn names_limit_a_rule() {
        let policy = policy();
        let dev = User::authenticated("dev", ["devs".to_owned()]);
        assert!(policy.allows(&dev, &action("get", "a", "configmaps", "one")));
        assert!(!policy.allows(&dev, &action("get", "a", "configmaps", "two")));
        assert!(!policy.allows(&dev, &action("get", "a", "configmaps", "")));
    }

    #[test]
    fn paths_match_whole_or_by_their_beginning() {
        let policy = policy();
        let dev = User::authenticated("dev", []);
        let path = |path| Action {
            verb: "get",
            path: Some(path),
            ..Action::default()
        };
        assert!(policy.allows(&dev, &path("/version")));
        assert!(policy.allows(&dev, &path("/api/v1")));
        assert!(!policy.allows(&dev, &path("/metrics")));
        assert!(!policy.allows(&User::anonymous(), &path("/version")));
    }

    #[test]
    fn a_removed_binding_grants_nothing() {
        let mut policy = policy();
        policy.set(
            PolicyKind::Binding,
            &format!("{}rolebindings/a/edit", crate::keys::ROOT),
            None,
        );
        let dev = User::authenticated("dev", ["devs".to_owned()]);
        assert!(!policy.allows(&dev, &action("list", "a", "pods", "")));
        assert!(!policy.by_subject.contains_key("a"));
    }

    #[test]
    fn nobody_hands_out_more_than_they_hold() {
        let policy = policy();
        let dev = User::authenticated("dev", ["devs".to_owned()]);
        let rule = |resource: &str, verb: &str| Rule {
            verbs: vec![verb.into()],
            groups: vec![String::new()],
            resources: vec![resource.into()],
            ..Rule::default()
        };
        assert!(policy.missing(&dev, "a", &[rule("pods", "get")]).is_empty());
        assert_eq!(policy.missing(&dev, "a", &[rule("pods", "*")]).len(), 1);
        assert_eq!(policy.missing(&dev, "a", &[rule("*", "get")]).len(), 1);
        assert_eq!(policy.missing(&dev, "b", &[rule("pods", "get")]).len(), 1);
        // A name held is not all names held.
        assert_eq!(
            policy
                .missing(&dev, "a", &[rule("configmaps", "get")])
                .len(),
            1
        );
        let one = Rule {
            names: vec!["one".into()],
            ..rule("configmaps", "get")
        };
        assert!(policy.missing(&dev, "a", &[one]).is_empty());
        assert!(
            policy
                .missing(&User::system("x"), "", &[rule("*", "*")])
                .is_empty()
        );
    }

    #[test]
    fn refusals_read_as_upstream() {
        let user = User::authenticated("x", []);
        let text = |action: Action<'_>| action.refusal(&user).message;
        assert_eq!(
            text(action("list", "y", "pods", "")),
            r#"pods is forbidden: User "x" cannot list resource "pods" in API group "" in the namespace "y""#
        );
        assert_eq!(
            text(action("get", "y", "pods/log", "p")),
            r#"pods "p" is forbidden: User "x" cannot get resource "pods/log" in API group "" in the namespace "y""#
        );
        assert_eq!(
            text(Action {
                group: "hypernetes.io",
                ..action("list", "", "tenants", "")
            }),
            r#"tenants.hypernetes.io is forbidden: User "x" cannot list resource "tenants" in API group "hypernetes.io" at the cluster scope"#
        );
        let path = Action {
            verb: "get",
            path: Some("/metrics"),
            ..Action::default()
        };
        assert_eq!(
            text(path),
            r#"forbidden: User "x" cannot get path "/metrics""#
        );
    }
}
