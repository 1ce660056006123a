//! Discovery documents, made from the kind table.

use serde_json::{Map, Value, json};

use crate::kinds::{self, ResourceKind, Subresource};

/// Media type of the aggregated form.
pub const AGGREGATED_MEDIA_TYPE: &str =
    "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// `/api`. The address is where clients reach the server, `host:port`.
pub fn api_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [
            {"clientCIDR": "0.0.0.0/0", "serverAddress": server_address},
        ],
    })
}

fn group_body(group: &str, versions: &[&str]) -> Map<String, Value> {
    let version =
        |version: &&str| json!({"groupVersion": format!("{group}/{version}"), "version": version});
    let mut out = Map::new();
    out.insert("name".into(), group.into());
    out.insert("versions".into(), versions.iter().map(version).collect());
    out.insert(
        "preferredVersion".into(),
        versions.first().map(version).into(),
    );
    out
}

/// Groups other than the core group with their versions: those of the table, then the others.
fn groups(more: &[&'static ResourceKind]) -> Vec<(&'static str, Vec<&'static str>)> {
    let mut groups = kinds::groups();
    for kind in more {
        match groups.iter_mut().find(|(group, _)| *group == kind.group) {
            Some((_, versions)) if versions.contains(&kind.version) => {}
            Some((_, versions)) => versions.push(kind.version),
            None => groups.push((kind.group, vec![kind.version])),
        }
    }
    groups
}

/// `/apis`. In all of these, `more` are the custom resources, the better versions first.
pub fn api_group_list(more: &[&'static ResourceKind]) -> Value {
    let groups: Vec<Value> = groups(more)
        .iter()
        .map(|(group, versions)| group_body(group, versions).into())
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/GROUP`.
pub fn api_group(group: &str, more: &[&'static ResourceKind]) -> Option<Value> {
    let groups = groups(more);
    let (group, versions) = groups.iter().find(|(name, _)| *name == group)?;
    let mut out = group_body(group, versions);
    out.insert("kind".into(), "APIGroup".into());
    out.insert("apiVersion".into(), "v1".into());
    Some(out.into())
}

fn of_version(
    group: &str,
    version: &str,
    more: &[&'static ResourceKind],
) -> Vec<&'static ResourceKind> {
    kinds::all()
        .iter()
        .chain(more.iter().copied())
        .filter(|k| k.group == group && k.version == version)
        .collect()
}

/// `/api/v1` and `/apis/GROUP/VERSION`.
pub fn api_resource_list(
    group: &str,
    version: &str,
    more: &[&'static ResourceKind],
) -> Option<Value> {
    let kinds = of_version(group, version, more);
    let first = kinds.first()?;
    let mut resources = Vec::new();
    for kind in &kinds {
        resources.push(resource(kind));
        resources.extend(kind.subresources.iter().map(|sub| subresource(kind, sub)));
    }
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": first.api_version(),
        "resources": resources,
    }))
}

fn resource(kind: &ResourceKind) -> Value {
    let mut out = json!({
        "name": kind.plural,
        "singularName": kind.singular,
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": kind.verbs,
    });
    if !kind.short_names.is_empty() {
        out["shortNames"] = kind.short_names.into();
    }
    if !kind.categories.is_empty() {
        out["categories"] = kind.categories.into();
    }
    if kind.is_stored() {
        out["storageVersionHash"] = storage_version_hash(kind).into();
    }
    out
}

fn subresource(kind: &ResourceKind, sub: &Subresource) -> Value {
    let mut out = json!({
        "name": format!("{}/{}", kind.plural, sub.name),
        "singularName": "",
        "namespaced": kind.namespaced,
        "kind": sub.kind,
        "verbs": sub.verbs,
    });
    if let (Some(group), Some(version)) = (sub.group, sub.version) {
        out["group"] = group.into();
        out["version"] = version.into();
    }
    out
}

/// An opaque text that changes with the storage version: base64 of 8 bytes of a hash.
fn storage_version_hash(kind: &ResourceKind) -> String {
    use base64::Engine;
    use sha2::{Digest, Sha256};

    let sum = Sha256::digest(format!("{}/{}/{}", kind.group, kind.version, kind.kind));
    base64::engine::general_purpose::STANDARD.encode(&sum[..8])
}

/// The aggregated document of `/api` (`core`) or `/apis`.
pub fn aggregated(core: bool, more: &[&'static ResourceKind]) -> Value {
    let groups: Vec<(&str, Vec<&str>)> = if core {
        vec![("", vec!["v1"])]
    } else {
        groups(more)
    };
    let items: Vec<Value> = groups
        .iter()
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let resources: Vec<Value> = of_version(group, version, more)
                        .into_iter()
                        .map(aggregated_resource)
                        .collect();
                    json!({"version": version, "freshness": "Current", "resources": resources})
                })
                .collect();
            let mut metadata = json!({"creationTimestamp": null});
            if !group.is_empty() {
                metadata["name"] = (*group).into();
            }
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items,
    })
}

fn aggregated_resource(kind: &ResourceKind) -> Value {
    let type_of = |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let mut out = json!({
        "resource": kind.plural,
        "responseKind": type_of(kind.group, kind.version, kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": kind.verbs,
    });
    if !kind.short_names.is_empty() {
        out["shortNames"] = kind.short_names.into();
    }
    if !kind.categories.is_empty() {
        out["categories"] = kind.categories.into();
    }
    if !kind.subresources.is_empty() {
        out["subresources"] = kind
            .subresources
            .iter()
            .map(|sub| {
                let group = sub.group.unwrap_or(kind.group);
                let version = sub.version.unwrap_or(kind.version);
                json!({
                    "subresource": sub.name,
                    "responseKind": type_of(group, version, sub.kind),
                    "verbs": sub.verbs,
                })
            })
            .collect();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_resources_list_their_subresources() {
        let list = api_resource_list("", "v1", &[]).unwrap();
        assert_eq!(list["groupVersion"], "v1");
        let resources = list["resources"].as_array().unwrap();
        let find = |name: &str| resources.iter().find(|r| r["name"] == name).unwrap();
        assert_eq!(find("pods")["shortNames"], json!(["po"]));
        assert_eq!(find("pods/eviction")["group"], "policy");
        assert_eq!(find("namespaces")["namespaced"], false);
        assert!(api_resource_list("extensions", "v1", &[]).is_none());
    }

    #[test]
    fn groups_name_their_preferred_version() {
        let own: Vec<_> = crate::crd::own_kinds().iter().map(|k| k.kind).collect();
        let group = api_group("hypernetes.io", &own).unwrap();
        assert_eq!(
            group["preferredVersion"]["groupVersion"],
            "hypernetes.io/v1alpha1"
        );
        assert!(api_group("", &[]).is_none());
        let list = api_group_list(&[]);
        assert_eq!(
            list["groups"].as_array().unwrap().len(),
            kinds::groups().len()
        );
    }

    #[test]
    fn the_aggregated_form_holds_every_kind() {
        let count = |document: Value| -> usize {
            document["items"]
                .as_array()
                .unwrap()
                .iter()
                .flat_map(|group| group["versions"].as_array().unwrap())
                .map(|version| version["resources"].as_array().unwrap().len())
                .sum()
        };
        assert_eq!(
            count(aggregated(true, &[])) + count(aggregated(false, &[])),
            kinds::all().len()
        );
    }
}
