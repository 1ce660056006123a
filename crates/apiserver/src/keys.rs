//! Where objects are in the store: `api/<storage>/[<namespace>/]<name>`.

use hypernetes_apimachinery::ResourceKind;

/// Beginning of all keys of this server.
pub(crate) const ROOT: &str = "api/";

/// The key of an object; the namespace is not looked at for cluster-wide kinds.
pub(crate) fn object(kind: &ResourceKind, namespace: &str, name: &str) -> String {
    format!("{}{name}", prefix(kind, namespace))
}

/// The beginning of the keys of a kind, in one namespace or (empty) in all.
pub(crate) fn prefix(kind: &ResourceKind, namespace: &str) -> String {
    if kind.namespaced && !namespace.is_empty() {
        format!("{ROOT}{}/{namespace}/", kind.storage)
    } else {
        format!("{ROOT}{}/", kind.storage)
    }
}

/// The key of a namespace.
pub(crate) fn namespace(name: &str) -> String {
    format!("{ROOT}namespaces/{name}")
}

/// The last part of a key: the object's name.
pub(crate) fn name_of(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or_default()
}
