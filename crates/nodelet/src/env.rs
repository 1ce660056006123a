//! Environment, command and arguments of a container, with `$(VAR)` expanded as Kubernetes does.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, EnvVar};

use crate::{
    fields::{self, FieldsError, PodFacts},
    sources::{SourceError, Sources},
};

/// Why a container's configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnvError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Field(#[from] FieldsError),
}

/// Replaces `$(NAME)` of known names; `$$` is `$`; what is unknown stays as it is.
pub(crate) fn expand(text: &str, known: &BTreeMap<String, String>) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        result.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            result.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('(') {
            match after.split_once(')') {
                Some((name, tail)) => {
                    match known.get(name) {
                        Some(value) => result.push_str(value),
                        None => {
                            result.push_str("$(");
                            result.push_str(name);
                            result.push(')');
                        }
                    }
                    rest = tail;
                }
                None => {
                    result.push_str("$(");
                    rest = after;
                }
            }
        } else {
            result.push('$');
        }
    }
    result.push_str(rest);
    result
}

/// Command and arguments with the environment's values in them.
pub(crate) fn expand_all(texts: Option<&Vec<String>>, env: &[(String, String)]) -> Vec<String> {
    let known: BTreeMap<String, String> = env.iter().cloned().collect();
    texts
        .into_iter()
        .flatten()
        .map(|text| expand(text, &known))
        .collect()
}

/// Names of variables that an `envFrom` key can be.
fn is_env_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=')
}

/// The container's variables, in order, each name once. Its own values can refer to those of
/// `services`, and replace them.
pub(crate) async fn build(
    sources: &Sources,
    facts: &PodFacts<'_>,
    container: &Container,
    services: Vec<(String, String)>,
) -> Result<Vec<(String, String)>, EnvError> {
    let namespace = facts.pod.metadata.namespace.as_deref().unwrap_or_default();
    let theirs: Vec<String> = services.iter().map(|(name, _value)| name.clone()).collect();
    let mut known: BTreeMap<String, String> = services.into_iter().collect();
    let mut own = BTreeSet::new();
    let mut order: Vec<String> = Vec::new();
    let mut set = |known: &mut BTreeMap<String, String>, name: String, value: String| {
        known.insert(name.clone(), value);
        if own.insert(name.clone()) {
            order.push(name);
        }
    };
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let data = if let Some(reference) = &from.config_map_ref {
            sources
                .config_map(namespace, &reference.name, reference.optional == Some(true))
                .await?
        } else if let Some(reference) = &from.secret_ref {
            sources
                .secret(namespace, &reference.name, reference.optional == Some(true))
                .await?
        } else {
            continue;
        };
        for (key, value) in data.into_iter().flatten() {
            let name = format!("{prefix}{key}");
            // Keys that cannot be names are left out, as upstream does.
            if is_env_name(&name)
                && let Ok(text) = String::from_utf8(value.to_vec())
            {
                set(&mut known, name, text);
            }
        }
    }
    for variable in container.env.iter().flatten() {
        if let Some(value) = value(sources, facts, container, variable, namespace, &known).await? {
            set(&mut known, variable.name.clone(), value);
        }
    }
    order.extend(theirs.into_iter().filter(|name| !own.contains(name)));
    Ok(order
        .into_iter()
        .filter_map(|name| known.get(&name).cloned().map(|value| (name, value)))
        .collect())
}

async fn value(
    sources: &Sources,
    facts: &PodFacts<'_>,
    container: &Container,
    variable: &EnvVar,
    namespace: &str,
    known: &BTreeMap<String, String>,
) -> Result<Option<String>, EnvError> {
    let Some(from) = &variable.value_from else {
        return Ok(Some(expand(
            variable.value.as_deref().unwrap_or_default(),
            known,
        )));
    };
    if let Some(selector) = &from.field_ref {
        return Ok(Some(fields::field(facts, selector)?));
    }
    if let Some(selector) = &from.resource_field_ref {
        return Ok(Some(fields::resource(facts, Some(container), selector)?));
    }
    if let Some(key) = &from.config_map_key_ref {
        let optional = key.optional == Some(true);
        let data = sources.config_map(namespace, &key.name, optional).await?;
        return Ok(pick(
            data.as_ref(),
            &key.key,
            optional,
            "ConfigMap",
            namespace,
            &key.name,
        )?);
    }
    if let Some(key) = &from.secret_key_ref {
        let optional = key.optional == Some(true);
        let data = sources.secret(namespace, &key.name, optional).await?;
        return Ok(pick(
            data.as_ref(),
            &key.key,
            optional,
            "Secret",
            namespace,
            &key.name,
        )?);
    }
    Ok(Some(String::new()))
}

fn pick(
    data: Option<&crate::sources::Data>,
    key: &str,
    optional: bool,
    kind: &'static str,
    namespace: &str,
    name: &str,
) -> Result<Option<String>, SourceError> {
    match data.and_then(|data| data.get(key)) {
        Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
        None if optional => Ok(None),
        None => Err(SourceError::Key {
            key: key.to_owned(),
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expansion_table() {
        let known: BTreeMap<String, String> = [("A", "1"), ("B", "$(A)"), ("E", "")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("$(A)", "1"),
            ("x$(A)y$(A)z", "x1y1z"),
            ("$(B)", "$(A)"),
            ("$(E)", ""),
            ("$(NONE)", "$(NONE)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$", "$"),
            ("a$", "a$"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$()", "$()"),
            ("$(A)$(", "1$("),
            ("$((A))", "$((A))"),
            ("ü$(A)ü", "ü1ü"),
        ] {
            assert_eq!(expand(text, &known), expected, "{text}");
        }
    }
}
