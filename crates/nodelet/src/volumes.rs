//! Volumes of a pod as the runtime takes them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use hypernetes_runtime::{VolumeConfig, VolumeFile, VolumeKind};
use hypernetes_types::{PageSize, Quantity};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, PodSpec, Volume};

use crate::{
    claims::{self, ClaimError},
    fields::{self, FieldsError, PodFacts},
    resources,
    sources::{Data, SourceError, Sources},
    tokens::{TokenError, Tokens},
};

const DEFAULT_MODE: i32 = 0o644;

/// Why a volume cannot be filled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {source}")]
    Source { volume: String, source: SourceError },
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {source}")]
    Field { volume: String, source: FieldsError },
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {source}")]
    Token { volume: String, source: TokenError },
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {source}")]
    Claim { volume: String, source: ClaimError },
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {why}")]
    Medium { volume: String, why: String },
    #[error("volume \"{volume}\": invalid path {path:?}: must be relative without ..")]
    Path { volume: String, path: String },
}

/// The volumes of a pod with their present content.
#[derive(Debug, Clone, Default)]
pub(crate) struct Built {
    pub(crate) volumes: Vec<VolumeConfig>,
    /// When a token in them is to be renewed.
    pub(crate) renew_at: Option<Timestamp>,
}

/// What volumes are made from.
pub(crate) struct Builder<'a> {
    pub(crate) sources: &'a Sources,
    pub(crate) tokens: &'a Tokens,
    pub(crate) facts: PodFacts<'a>,
}

type Files = BTreeMap<String, VolumeFile>;

impl Builder<'_> {
    /// All volumes that live in the guest; images are mounted by themselves.
    pub(crate) async fn build(&self, spec: &PodSpec) -> Result<Built, VolumeError> {
        let gid = spec
            .security_context
            .as_ref()
            .and_then(|context| context.fs_group)
            .and_then(|gid| u32::try_from(gid).ok());
        let mut built = Built::default();
        for volume in spec.volumes.iter().flatten() {
            if volume.image.is_some() {
                continue;
            }
            let mut kind = match volume {
                Volume {
                    persistent_volume_claim: Some(_),
                    ..
                }
                | Volume {
                    ephemeral: Some(_), ..
                } => match self.claimed(volume, spec).await? {
                    Some(kind) => kind,
                    // No container mounts it.
                    None => continue,
                },
                _ => self.kind(volume, spec, &mut built.renew_at).await?,
            };
            if let (VolumeKind::Files { files }, Some(_)) = (&mut kind, gid) {
                // As a kubelet does for read-only volumes: the group can read what the owner can.
                for file in files.values_mut() {
                    file.mode |= 0o440;
                }
            }
            built.volumes.push(VolumeConfig {
                name: volume.name.clone(),
                kind,
                gid,
            });
        }
        Ok(built)
    }

    async fn claimed(
        &self,
        volume: &Volume,
        spec: &PodSpec,
    ) -> Result<Option<VolumeKind>, VolumeError> {
        let found = claims::mounted(self.sources.client(), self.facts.pod, spec, volume).await;
        found.map_err(|source| VolumeError::Claim {
            volume: volume.name.clone(),
            source,
        })
    }

    fn namespace(&self) -> &str {
        let meta = &self.facts.pod.metadata;
        meta.namespace.as_deref().unwrap_or_default()
    }

    async fn kind(
        &self,
        volume: &Volume,
        spec: &PodSpec,
        renew_at: &mut Option<Timestamp>,
    ) -> Result<VolumeKind, VolumeError> {
        let name = volume.name.as_str();
        let mut files = Files::new();
        if let Some(map) = &volume.config_map {
            let from = Selection {
                name: &map.name,
                items: map.items.as_deref(),
                optional: map.optional == Some(true),
                mode: map.default_mode.unwrap_or(DEFAULT_MODE),
            };
            self.config_map(&mut files, name, &from).await?;
        } else if let Some(secret) = &volume.secret {
            let from = Selection {
                name: secret.secret_name.as_deref().unwrap_or_default(),
                items: secret.items.as_deref(),
                optional: secret.optional == Some(true),
                mode: secret.default_mode.unwrap_or(DEFAULT_MODE),
            };
            self.secret(&mut files, name, &from).await?;
        } else if let Some(downward) = &volume.downward_api {
            let mode = downward.default_mode.unwrap_or(DEFAULT_MODE);
            self.downward(&mut files, name, downward.items.as_deref(), mode)?;
        } else if let Some(projected) = &volume.projected {
            let mode = projected.default_mode.unwrap_or(DEFAULT_MODE);
            for part in projected.sources.iter().flatten() {
                if let Some(map) = &part.config_map {
                    let from = Selection {
                        name: &map.name,
                        items: map.items.as_deref(),
                        optional: map.optional == Some(true),
                        mode,
                    };
                    self.config_map(&mut files, name, &from).await?;
                }
                if let Some(secret) = &part.secret {
                    let from = Selection {
                        name: &secret.name,
                        items: secret.items.as_deref(),
                        optional: secret.optional == Some(true),
                        mode,
                    };
                    self.secret(&mut files, name, &from).await?;
                }
                if let Some(downward) = &part.downward_api {
                    self.downward(&mut files, name, downward.items.as_deref(), mode)?;
                }
                if let Some(wanted) = &part.service_account_token {
                    let token = self.tokens.get(self.facts.pod, wanted).await;
                    let token = token.map_err(|source| VolumeError::Token {
                        volume: name.to_owned(),
                        source,
                    })?;
                    *renew_at = Some(renew_at.map_or(token.renew_at, |at| at.min(token.renew_at)));
                    let owner = only_user(spec);
                    let group = spec.security_context.as_ref().and_then(|c| c.fs_group);
                    // Readable by the one who needs it, if that is known.
                    let mode = match (owner, group) {
                        (None, None) => mode,
                        _ => 0o600,
                    };
                    insert(&mut files, &wanted.path, token.text, mode, name)?;
                    if let (Some(file), Some(uid)) = (files.get_mut(&wanted.path), owner) {
                        file.uid = uid;
                    }
                }
            }
        } else {
            // An emptyDir; a volume with no source at all is one too, as Kubernetes defaults it.
            let empty = volume.empty_dir.clone().unwrap_or_default();
            let size_limit = empty
                .size_limit
                .and_then(|quantity| quantity.0.parse::<Quantity>().ok())
                .and_then(|quantity| u64::try_from(quantity.value()).ok())
                .unwrap_or(0);
            let medium = empty.medium.unwrap_or_default();
            if medium.starts_with("HugePages") {
                let page = huge_page(&medium, spec).map_err(|why| VolumeError::Medium {
                    volume: name.to_owned(),
                    why,
                })?;
                return Ok(VolumeKind::HugePages {
                    page_size: page.to_string(),
                    size_limit,
                });
            }
            return Ok(VolumeKind::EmptyDir {
                memory: medium == "Memory",
                size_limit,
            });
        }
        Ok(VolumeKind::Files { files })
    }

    async fn config_map(
        &self,
        files: &mut Files,
        volume: &str,
        from: &Selection<'_>,
    ) -> Result<(), VolumeError> {
        let data = self
            .sources
            .config_map(self.namespace(), from.name, from.optional)
            .await;
        from.add_to(files, data, volume)
    }

    async fn secret(
        &self,
        files: &mut Files,
        volume: &str,
        from: &Selection<'_>,
    ) -> Result<(), VolumeError> {
        let data = self
            .sources
            .secret(self.namespace(), from.name, from.optional)
            .await;
        from.add_to(files, data, volume)
    }

    fn downward(
        &self,
        files: &mut Files,
        volume: &str,
        items: Option<&[DownwardAPIVolumeFile]>,
        mode: i32,
    ) -> Result<(), VolumeError> {
        for item in items.into_iter().flatten() {
            let failed = |source| VolumeError::Field {
                volume: volume.to_owned(),
                source,
            };
            let text = if let Some(selector) = &item.field_ref {
                fields::field(&self.facts, selector).map_err(failed)?
            } else if let Some(selector) = &item.resource_field_ref {
                fields::resource(&self.facts, None, selector).map_err(failed)?
            } else {
                String::new()
            };
            let mode = item.mode.unwrap_or(mode);
            insert(files, &item.path, Bytes::from(text), mode, volume)?;
        }
        Ok(())
    }
}

/// The size of the pages of a volume, which a container must have asked for; what is wrong in a
/// kubelet's words.
fn huge_page(medium: &str, spec: &PodSpec) -> Result<PageSize, String> {
    let asked: BTreeSet<PageSize> = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .flat_map(|container| resources::huge_pages(container).into_keys())
        .collect();
    let found = match medium.strip_prefix("HugePages-") {
        Some(size) => {
            let size = PageSize::from_quantity(size).map_err(|error| error.to_string())?;
            asked.get(&size).copied()
        }
        None if asked.len() > 1 => {
            return Err(format!(
                "medium: {medium} can't be used if container requests multiple huge page sizes"
            ));
        }
        None => asked.first().copied(),
    };
    found.ok_or_else(|| {
        format!(
            "medium {medium}: hugePages storage requested, but there is no resource request for \
             huge pages"
        )
    })
}

/// The user that all containers of the pod run as, if the pod says so.
fn only_user(spec: &PodSpec) -> Option<u32> {
    let pod = spec.security_context.as_ref().and_then(|c| c.run_as_user);
    let mut users = crate::roles::all(spec).into_iter().map(|(container, _)| {
        let own = container.security_context.and_then(|c| c.run_as_user);
        own.or(pod)
    });
    let first = users.next()??;
    users
        .all(|user| user == Some(first))
        .then(|| u32::try_from(first).ok())
        .flatten()
}

/// What of a ConfigMap or Secret goes into a volume.
struct Selection<'a> {
    name: &'a str,
    items: Option<&'a [KeyToPath]>,
    optional: bool,
    mode: i32,
}

impl Selection<'_> {
    fn add_to(
        &self,
        files: &mut Files,
        data: Result<Option<Data>, SourceError>,
        volume: &str,
    ) -> Result<(), VolumeError> {
        let data = data.map_err(|source| VolumeError::Source {
            volume: volume.to_owned(),
            source,
        })?;
        let data = data.unwrap_or_default();
        files.extend(select(data, self.items, self.mode, self.optional, volume)?);
        Ok(())
    }
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
    use serde_json::json;

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

    #[test]
    fn volumes_of_huge_pages_have_a_size_that_the_pod_asks_for() {
        let spec = |limits: serde_json::Value| -> PodSpec {
            let container = json!({"name": "c", "resources": {"limits": limits}});
            serde_json::from_value(json!({"containers": [container]})).unwrap()
        };
        let one = spec(json!({"hugepages-2Mi": "4Mi"}));
        let two = spec(json!({"hugepages-2Mi": "4Mi", "hugepages-1Gi": "1Gi"}));
        let size = |medium: &str, spec: &PodSpec| {
            let page = huge_page(medium, spec)?;
            Ok::<_, String>(page.to_string())
        };
        assert_eq!(size("HugePages", &one).as_deref(), Ok("2MB"));
        assert_eq!(size("HugePages-2Mi", &two).as_deref(), Ok("2MB"));
        assert_eq!(size("HugePages-1Gi", &two).as_deref(), Ok("1GB"));
        for (medium, spec, why) in [
            ("HugePages", &two, "multiple huge page sizes"),
            ("HugePages-1Gi", &one, "no resource request"),
            (
                "HugePages",
                &spec(json!({"cpu": "1"})),
                "no resource request",
            ),
        ] {
            let error = size(medium, spec).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
