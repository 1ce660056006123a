//! The images that a namespace has.

use std::collections::BTreeMap;

use hypernetes_types::ImageReference;
use jiff::Timestamp;
use serde_json::Value;

use super::wire;
use crate::{
    cluster::Cluster,
    error::{Failure, Result},
    model::Container,
};

/// One object of kind Image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Own {
    /// Name of the object.
    pub(super) object: String,
    /// Name of the image; none if another image has it now.
    pub(super) name: Option<ImageReference>,
    pub(super) id: String,
    /// Digest by which the registry has it.
    pub(super) digest: Option<String>,
    pub(super) size: u64,
    pub(super) created: Option<Timestamp>,
}

impl Own {
    pub(super) fn parse(object: &Value) -> Option<Self> {
        let status = &object["status"];
        Some(Self {
            object: object["metadata"]["name"].as_str()?.to_owned(),
            name: object["spec"]["name"].as_str().and_then(|n| n.parse().ok()),
            id: status["id"].as_str()?.to_owned(),
            digest: status["digest"].as_str().map(str::to_owned),
            size: status["size"].as_u64().unwrap_or_default(),
            created: status["created"].as_str().and_then(|t| t.parse().ok()),
        })
    }

    pub(super) fn short_id(&self) -> String {
        short(&self.id)
    }

    /// Repository and tag as they are listed.
    pub(super) fn columns(&self) -> (String, String) {
        match &self.name {
            None => ("<none>".to_owned(), "<none>".to_owned()),
            Some(name) => (repository(name), name.tag().unwrap_or("<none>").to_owned()),
        }
    }
}

/// Twelve digits of a digest.
pub(super) fn short(digest: &str) -> String {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.chars().take(12).collect()
}

/// A repository as users write it.
pub(super) fn repository(name: &ImageReference) -> String {
    let path = name.repository();
    match name.registry() {
        "docker.io" => path.strip_prefix("library/").unwrap_or(path).to_owned(),
        registry => format!("{registry}/{path}"),
    }
}

/// A name as users write it.
pub(super) fn familiar(name: &ImageReference) -> String {
    let mut text = repository(name);
    if let Some(tag) = name.tag() {
        text = format!("{text}:{tag}");
    }
    if let Some(digest) = name.digest() {
        text = format!("{text}@{digest}");
    }
    text
}

/// A reference that a user wrote.
pub(super) fn parse(text: &str) -> Result<ImageReference> {
    text.parse()
        .map_err(|_wrong| Failure::daemon(format_args!("invalid reference format: {text}")))
}

/// The images of the namespace; nothing where the cluster has no API for them.
pub(super) async fn of(cluster: &Cluster) -> Result<Option<Library>> {
    let list = match wire::get(cluster, &wire::path(cluster, "")).await? {
        Ok(list) => list,
        Err(refused) if !refused.is_served => return Ok(None),
        Err(refused) => return Err(refused.into()),
    };
    let items = list["items"].as_array().into_iter().flatten();
    Ok(Some(Library(items.filter_map(Own::parse).collect())))
}

/// The same for verbs that go by no other way.
pub(super) async fn needed(cluster: &Cluster, verb: &str) -> Result<Library> {
    of(cluster).await?.ok_or_else(|| {
        Failure::refused(
            verb,
            "this cluster does not keep images for namespaces (images.hypernetes.io is not served): use the registry",
        )
    })
}

#[derive(Debug, Clone, Default)]
pub(super) struct Library(pub(super) Vec<Own>);

/// What a user's text means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meant<'a> {
    /// A name, or a name by its digest.
    Name(&'a Own),
    /// An id: all objects of it.
    Id(Vec<&'a Own>),
}

impl<'a> Meant<'a> {
    pub(super) fn first(&self) -> &'a Own {
        match self {
            Self::Name(own) => own,
            Self::Id(all) => all[0],
        }
    }
}

impl Library {
    /// What `text` means: docker's order is a name, then an id or the beginning of one.
    pub(super) fn find(&self, text: &str) -> Result<Option<Meant<'_>>> {
        if let Ok(name) = text.parse::<ImageReference>() {
            let named = self.0.iter().find(|own| {
                own.name.as_ref().is_some_and(|own_name| {
                    *own_name == name
                        || name.digest().is_some_and(|digest| {
                            own_name.registry() == name.registry()
                                && own_name.repository() == name.repository()
                                && own.digest.as_deref() == Some(digest.as_str())
                        })
                })
            });
            if let Some(own) = named {
                return Ok(Some(Meant::Name(own)));
            }
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.is_empty() || hex.len() > 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        let mut by_id: BTreeMap<&str, Vec<&Own>> = BTreeMap::new();
        for own in &self.0 {
            let id = own.id.strip_prefix("sha256:").unwrap_or(&own.id);
            if id.starts_with(hex) {
                by_id.entry(&own.id).or_default().push(own);
            }
        }
        match by_id.len() {
            0 => Ok(None),
            1 => Ok(by_id.into_values().next().map(Meant::Id)),
            _ => Err(Failure::daemon(format_args!(
                "multiple IDs found with provided prefix: {text}"
            ))),
        }
    }

    /// The same; what is not there is an error.
    pub(super) fn get(&self, text: &str) -> Result<Meant<'_>> {
        self.find(text)?.ok_or_else(|| no_such(text))
    }

    /// All objects of an id.
    pub(super) fn of_id(&self, id: &str) -> Vec<&Own> {
        self.0.iter().filter(|own| own.id == id).collect()
    }
}

pub(super) fn no_such(text: &str) -> Failure {
    let full = text
        .parse::<ImageReference>()
        .map_or_else(|_wrong| text.to_owned(), |name| familiar(&name));
    Failure::daemon(format_args!("No such image: {full}"))
}

/// Whether a container was made from an image: by one of its names, or because it runs it.
pub(super) fn uses(container: &Container, id: &str, names: &[&ImageReference]) -> bool {
    let spec: Option<ImageReference> = container.image().parse().ok();
    let runs = container
        .status()
        .is_some_and(|status| status.image_id.contains(id));
    runs || spec.is_some_and(|spec| names.contains(&&spec))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(name: &str, id: char) -> Own {
        Own {
            object: format!("o-{id}"),
            name: name.parse().ok(),
            id: format!("sha256:{}", id.to_string().repeat(64)),
            digest: Some(format!("sha256:{}", "9".repeat(64))),
            size: 1,
            created: None,
        }
    }

    #[test]
    fn images_are_found_by_name_digest_and_id() {
        let library = Library(vec![
            own("busybox", 'a'),
            own("x.example/web:1", 'b'),
            own("", 'a'),
        ]);
        let object = |text: &str| {
            library
                .find(text)
                .unwrap()
                .map(|meant| (meant.first().object.clone(), matches!(meant, Meant::Id(_))))
        };
        assert_eq!(object("busybox"), Some(("o-a".into(), false)));
        assert_eq!(
            object("docker.io/library/busybox:latest"),
            Some(("o-a".into(), false))
        );
        assert_eq!(
            object(&format!("x.example/web@sha256:{}", "9".repeat(64))),
            Some(("o-b".into(), false))
        );
        assert_eq!(object("bbb"), Some(("o-b".into(), true)));
        assert_eq!(object("sha256:aaaa"), Some(("o-a".into(), true)));
        assert_eq!(object("busybox:2"), None);
        assert_eq!(
            library.get("nope").unwrap_err().message,
            "Error response from daemon: No such image: nope:latest"
        );
        let Meant::Id(both) = library.get("aaaaaaaaaaaa").unwrap() else {
            panic!("an id");
        };
        assert_eq!(both.len(), 2);
    }

    #[test]
    fn names_are_written_as_users_do() {
        let text = |name: &str| familiar(&name.parse().unwrap());
        assert_eq!(text("docker.io/library/busybox"), "busybox:latest");
        assert_eq!(text("acme/web:1"), "acme/web:1");
        assert_eq!(text("127.0.0.1:5000/web"), "127.0.0.1:5000/web:latest");
    }
}
