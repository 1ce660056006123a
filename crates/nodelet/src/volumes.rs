//! Volumes of a pod as the runtime takes them.

use std::collections::BTreeMap;

use bytes::Bytes;
use hypernetes_runtime::{VolumeConfig, VolumeFile, VolumeKind};
use hypernetes_types::Quantity;
use k8s_openapi::api::core::v1::{KeyToPath, PodSpec, Volume};

use crate::{
    fields::{self, FieldsError, PodFacts},
    sources::{Data, SourceError, Sources},
};

const DEFAULT_MODE: i32 = 0o644;

/// Why a volume cannot be filled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {source}")]
    Source { volume: String, source: SourceError },
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {source}")]
    Field { volume: String, source: FieldsError },
    #[error("volume \"{volume}\": invalid path {path:?}: must be relative without ..")]
    Path { volume: String, path: String },
}

/// All volumes with their present content.
pub(crate) async fn build(
    sources: &Sources,
    facts: &PodFacts<'_>,
    spec: &PodSpec,
) -> Result<Vec<VolumeConfig>, VolumeError> {
    let gid = spec
        .security_context
        .as_ref()
        .and_then(|context| context.fs_group)
        .and_then(|gid| u32::try_from(gid).ok());
    let mut volumes = Vec::new();
    for volume in spec.volumes.iter().flatten() {
        let kind = kind(sources, facts, volume).await?;
        volumes.push(VolumeConfig {
            name: volume.name.clone(),
            kind,
            gid,
        });
    }
    Ok(volumes)
}

async fn kind(
    sources: &Sources,
    facts: &PodFacts<'_>,
    volume: &Volume,
) -> Result<VolumeKind, VolumeError> {
    let namespace = facts.pod.metadata.namespace.as_deref().unwrap_or_default();
    let failed = |source| VolumeError::Source {
        volume: volume.name.clone(),
        source,
    };
    let files = if let Some(map) = &volume.config_map {
        let optional = map.optional == Some(true);
        let data = sources
            .config_map(namespace, &map.name, optional)
            .await
            .map_err(failed)?;
        let mode = map.default_mode.unwrap_or(DEFAULT_MODE);
        select(
            data.unwrap_or_default(),
            map.items.as_deref(),
            mode,
            optional,
            &volume.name,
        )?
    } else if let Some(secret) = &volume.secret {
        let optional = secret.optional == Some(true);
        let name = secret.secret_name.as_deref().unwrap_or_default();
        let data = sources
            .secret(namespace, name, optional)
            .await
            .map_err(failed)?;
        let mode = secret.default_mode.unwrap_or(DEFAULT_MODE);
        select(
            data.unwrap_or_default(),
            secret.items.as_deref(),
            mode,
            optional,
            &volume.name,
        )?
    } else if let Some(downward) = &volume.downward_api {
        let mut files = BTreeMap::new();
        for item in downward.items.iter().flatten() {
            let failed = |source| VolumeError::Field {
                volume: volume.name.clone(),
                source,
            };
            let text = if let Some(selector) = &item.field_ref {
                fields::field(facts, selector).map_err(failed)?
            } else if let Some(selector) = &item.resource_field_ref {
                fields::resource(facts, None, selector).map_err(failed)?
            } else {
                String::new()
            };
            let mode = item.mode.or(downward.default_mode).unwrap_or(DEFAULT_MODE);
            insert(
                &mut files,
                &item.path,
                Bytes::from(text),
                mode,
                &volume.name,
            )?;
        }
        files
    } else {
        // An emptyDir; a volume with no source at all is one too, as Kubernetes defaults it.
        let empty = volume.empty_dir.clone().unwrap_or_default();
        return Ok(VolumeKind::EmptyDir {
            memory: empty.medium.as_deref() == Some("Memory"),
            size_limit: empty
                .size_limit
                .and_then(|quantity| quantity.0.parse::<Quantity>().ok())
                .and_then(|quantity| u64::try_from(quantity.value()).ok())
                .unwrap_or(0),
        });
    };
    Ok(VolumeKind::Files { files })
}

fn select(
    data: Data,
    items: Option<&[KeyToPath]>,
    mode: i32,
    optional: bool,
    volume: &str,
) -> Result<BTreeMap<String, VolumeFile>, VolumeError> {
    let mut files = BTreeMap::new();
    match items {
        None | Some([]) => {
            for (key, content) in data {
                insert(&mut files, &key, content, mode, volume)?;
            }
        }
        Some(items) => {
            for item in items {
                match data.get(&item.key) {
                    Some(content) => {
                        let mode = item.mode.unwrap_or(mode);
                        insert(&mut files, &item.path, content.clone(), mode, volume)?;
                    }
                    None if optional => {}
                    None => {
                        return Err(VolumeError::Source {
                            volume: volume.to_owned(),
                            source: SourceError::Item {
                                key: item.key.clone(),
                            },
                        });
                    }
                }
            }
        }
    }
    Ok(files)
}

fn insert(
    files: &mut BTreeMap<String, VolumeFile>,
    path: &str,
    content: Bytes,
    mode: i32,
    volume: &str,
) -> Result<(), VolumeError> {
    let valid = !path.is_empty()
        && path.len() <= 4096
        && path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..");
    if !valid {
        return Err(VolumeError::Path {
            volume: volume.to_owned(),
            path: path.to_owned(),
        });
    }
    let mode = u32::try_from(mode & 0o777).unwrap_or(0o644);
    files.insert(
        path.to_owned(),
        VolumeFile {
            content,
            mode,
            uid: 0,
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Data {
        [
            ("a".to_owned(), Bytes::from("1")),
            ("b".to_owned(), Bytes::from("2")),
        ]
        .into()
    }

    fn item(key: &str, path: &str, mode: Option<i32>) -> KeyToPath {
        KeyToPath {
            key: key.into(),
            path: path.into(),
            mode,
        }
    }

    #[test]
    fn all_keys_or_the_named_items() {
        let all = select(data(), None, 0o600, false, "v").unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(all["a"].mode, 0o600);
        let items = [item("b", "dir/x", Some(0o400))];
        let some = select(data(), Some(&items), 0o644, false, "v").unwrap();
        assert_eq!(some.keys().collect::<Vec<_>>(), ["dir/x"]);
        assert_eq!(some["dir/x"].mode, 0o400);
    }

    #[test]
    fn a_missing_item_is_an_error_unless_optional() {
        let items = [item("none", "x", None)];
        let error = select(data(), Some(&items), 0o644, false, "v").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("references non-existent config key: none"),
            "{error}"
        );
        assert!(
            select(data(), Some(&items), 0o644, true, "v")
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn paths_stay_inside() {
        for path in ["../x", "/x", "a/../b", "", "a//b", "."] {
            let items = [item("a", path, None)];
            assert!(
                select(data(), Some(&items), 0o644, false, "v").is_err(),
                "{path}"
            );
        }
    }
}
