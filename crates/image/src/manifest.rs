//! Manifests, indexes and configurations, in the OCI and the Docker dialect.

use std::collections::BTreeMap;

use hypernetes_types::Digest;
use serde::{Deserialize, Serialize};

use crate::{
    ImageConfig, ImageError, Limits,
    layer::Compression,
    tarball::{invalid, shown},
};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// What is asked for, in one `Accept` header.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// A pointer to content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Platform {
    pub(crate) architecture: String,
    pub(crate) os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
}

impl Descriptor {
    /// A descriptor of `bytes`.
    pub(crate) fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: crate::layer::digest_of(bytes),
            size: bytes.len() as u64,
            platform: None,
            annotations: None,
        }
    }

    /// How the layer that this points to is packed.
    pub(crate) fn compression(&self) -> Result<Compression, ImageError> {
        match self.media_type.as_str() {
            OCI_LAYER | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Compression::None),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Compression::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Compression::Zstd),
            other => Err(invalid(
                format!("layer {}", self.digest),
                format!("media type {} is not a layer's", shown(other.as_bytes())),
            )),
        }
    }
}

/// The manifest of one image.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    pub(crate) media_type: String,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// What a manifest request can bring.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    #[serde(default)]
    schema_version: u32,
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Document {
    /// Parses a manifest or index. `stated` is the media type that the transport or the descriptor
    /// gave; it and the document must agree, so that no two readers take it for two things.
    pub(crate) fn parse(
        bytes: &[u8],
        stated: Option<&str>,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        let bad = |rule: String| invalid("manifest", rule);
        let wire: Wire =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("is not one: {e}")))?;
        if wire.schema_version != 2 {
            return Err(bad(format!(
                "schema version {} is not 2",
                wire.schema_version
            )));
        }
        let stated = stated.filter(|t| {
            matches!(
                *t,
                OCI_MANIFEST | OCI_INDEX | DOCKER_MANIFEST | DOCKER_INDEX
            )
        });
        if let (Some(own), Some(stated)) = (&wire.media_type, stated)
            && own != stated
        {
            let own = shown(own.as_bytes());
            return Err(bad(format!(
                "it calls itself {own} but was given as {stated}"
            )));
        }
        let kind = wire.media_type.as_deref().or(stated);
        match (wire.manifests, wire.config, wire.layers) {
            (Some(manifests), None, None) => {
                if !matches!(kind, None | Some(OCI_INDEX | DOCKER_INDEX)) {
                    return Err(bad("an index with a manifest's media type".to_owned()));
                }
                Ok(Self::Index(manifests))
            }
            (None, Some(config), Some(layers)) => {
                let media_type = match kind {
                    None | Some(OCI_MANIFEST) => OCI_MANIFEST,
                    Some(DOCKER_MANIFEST) => DOCKER_MANIFEST,
                    Some(_) => return Err(bad("a manifest with an index's media type".to_owned())),
                };
                if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
                    let kind = shown(config.media_type.as_bytes());
                    return Err(bad(format!("it describes {kind}, not a container image")));
                }
                if layers.is_empty() || layers.len() > limits.max_layers {
                    let rule = format!(
                        "{} layers; 1 to {} are taken",
                        layers.len(),
                        limits.max_layers
                    );
                    return Err(bad(rule));
                }
                if config.size > limits.max_config_size {
                    return Err(bad(format!("a configuration of {} bytes", config.size)));
                }
                Ok(Self::Manifest(Manifest {
                    schema_version: 2,
                    media_type: media_type.to_owned(),
                    config,
                    layers,
                }))
            }
            _ => Err(bad(
                "must have either manifests or a configuration and layers".to_owned(),
            )),
        }
    }
}

/// The entry of an index for this machine, or the platforms that it has instead.
pub(crate) fn select(manifests: &[Descriptor]) -> Result<&Descriptor, String> {
    let ours = |p: &Platform| p.os == "linux" && p.architecture == "amd64";
    let plain = |p: &Platform| matches!(p.variant.as_deref(), None | Some("" | "v1"));
    let with = |wanted: &dyn Fn(&Platform) -> bool| {
        manifests
            .iter()
            .find(|d| d.platform.as_ref().is_some_and(wanted))
    };
    if let Some(found) = with(&|p| ours(p) && plain(p)).or_else(|| with(&ours)) {
        return Ok(found);
    }
    if let [only] = manifests
        && only.platform.is_none()
    {
        return Ok(only);
    }
    let mut names: Vec<String> = manifests
        .iter()
        .filter_map(|d| d.platform.as_ref())
        .map(|p| shown(format!("{}/{}", p.os, p.architecture).as_bytes()))
        .take(20)
        .collect();
    names.dedup();
    Err(if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    })
}

/// An image's configuration, as far as it is used.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) run: ImageConfig,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) created: Option<String>,
    pub(crate) architecture: String,
    pub(crate) os: String,
}

#[derive(Deserialize)]
struct WireConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    created: Option<String>,
    config: Option<WireRun>,
    rootfs: WireRootfs,
}

#[derive(Deserialize)]
struct WireRootfs {
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct WireRun {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
}

impl Config {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        let bad = |rule: String| invalid("configuration", rule);
        let wire: WireConfig =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("is not one: {e}")))?;
        let run = wire.config.unwrap_or_default();
        Ok(Self {
            run: ImageConfig {
                user: run.user.unwrap_or_default(),
                env: run.env.unwrap_or_default(),
                entrypoint: run.entrypoint.unwrap_or_default(),
                cmd: run.cmd.unwrap_or_default(),
                working_dir: run.working_dir.unwrap_or_default(),
                stop_signal: run.stop_signal.unwrap_or_default(),
                labels: run.labels.unwrap_or_default(),
                exposed_ports: run.exposed_ports.unwrap_or_default().into_keys().collect(),
                volumes: run.volumes.unwrap_or_default().into_keys().collect(),
            },
            diff_ids: wire.rootfs.diff_ids,
            created: wire.created,
            architecture: wire.architecture,
            os: wire.os,
        })
    }

    /// Whether this machine can run it.
    pub(crate) fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, stated: Option<&str>) -> Result<Document, ImageError> {
        Document::parse(text.as_bytes(), stated, &Limits::default())
    }

    fn descriptor(kind: &str) -> String {
        format!(
            r#"{{"mediaType":"{kind}","digest":"sha256:{}","size":3}}"#,
            "0".repeat(64)
        )
    }

    #[test]
    fn a_document_is_one_thing_only() {
        let (config, layer) = (descriptor(OCI_CONFIG), descriptor(OCI_LAYER));
        let both =
            format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}],"manifests":[]}}"#);
        assert!(
            parse(&both, None)
                .unwrap_err()
                .to_string()
                .contains("either")
        );
        let manifest = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}]}}"#);
        assert!(matches!(parse(&manifest, None), Ok(Document::Manifest(_))));
        assert!(parse(&manifest, Some(OCI_INDEX)).is_err());
        let named = manifest.replacen('{', &format!(r#"{{"mediaType":"{OCI_MANIFEST}","#), 1);
        assert!(parse(&named, Some(OCI_MANIFEST)).is_ok());
        assert!(parse(&named, Some(DOCKER_MANIFEST)).is_err());
    }

    #[test]
    fn what_is_not_an_image_is_refused() {
        let config = descriptor("application/vnd.example.chart+json");
        let layer = descriptor(OCI_LAYER);
        let chart = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}]}}"#);
        assert!(
            parse(&chart, None)
                .unwrap_err()
                .to_string()
                .contains("not a container image")
        );
        let config = descriptor(OCI_CONFIG);
        let empty = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#);
        assert!(
            parse(&empty, None)
                .unwrap_err()
                .to_string()
                .contains("0 layers")
        );
        assert!(parse(r#"{"schemaVersion":1}"#, None).is_err());
    }

    #[test]
    fn the_index_entry_for_this_machine_is_taken() {
        let entry = |os: &str, architecture: &str, size| Descriptor {
            media_type: OCI_MANIFEST.to_owned(),
            digest: crate::layer::digest_of(architecture.as_bytes()),
            size,
            platform: Some(Platform {
                os: os.to_owned(),
                architecture: architecture.to_owned(),
                variant: None,
            }),
            annotations: None,
        };
        let all = [
            entry("linux", "arm64", 1),
            entry("windows", "amd64", 2),
            entry("linux", "amd64", 3),
        ];
        assert_eq!(select(&all).unwrap().size, 3);
        assert_eq!(select(&all[..2]).unwrap_err(), "linux/arm64, windows/amd64");
    }

    #[test]
    fn null_lists_are_empty_lists() {
        let config = Config::parse(
            br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
                "config":{"User":"www-data","Env":null,"ExposedPorts":{"80/tcp":{}}}}"#,
        )
        .unwrap();
        assert!(config.is_ours());
        assert_eq!(config.run.user, "www-data");
        assert_eq!(config.run.exposed_ports, ["80/tcp"]);
    }
}
