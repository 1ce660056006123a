//! Sandboxes and containers by id, or by the beginning of one.

use hypernetes_runtime::{ContainerStatus, PodRuntime, SandboxStatus};
use hypernetes_types::{ContainerId, SandboxId};

use crate::status::CriError;

/// The sandbox with this id, or the only one whose id begins so.
pub(crate) async fn sandbox(runtime: &dyn PodRuntime, id: &str) -> Result<SandboxStatus, CriError> {
    if let Ok(whole) = id.parse::<SandboxId>()
        && let Some(status) = runtime.sandbox(&whole).await
    {
        return Ok(status);
    }
    let all = runtime.list_sandboxes().await;
    only("pod_sandbox_id", "sandbox", id, all, |status| {
        status.id.as_str()
    })
}

/// The container with this id, or the only one whose id begins so.
pub(crate) async fn container(
    runtime: &dyn PodRuntime,
    id: &str,
) -> Result<ContainerStatus, CriError> {
    if let Ok(whole) = id.parse::<ContainerId>()
        && let Some(status) = runtime.container(&whole).await
    {
        return Ok(status);
    }
    let all = runtime.list_containers(None).await;
    only("container_id", "container", id, all, |status| {
        status.id.as_str()
    })
}

fn only<T>(
    field: &str,
    kind: &'static str,
    id: &str,
    all: Vec<T>,
    id_of: impl Fn(&T) -> &str,
) -> Result<T, CriError> {
    if id.is_empty() {
        return Err(CriError::invalid(field, "must not be empty"));
    }
    let mut found = all
        .into_iter()
        .filter(|status| id_of(status).starts_with(id));
    match (found.next(), found.next()) {
        (Some(status), None) => Ok(status),
        (Some(_), Some(_)) => Err(CriError::invalid(
            field,
            format!("more than one {kind} id begins with {:?}", shown(id)),
        )),
        (None, _) => Err(CriError::NotFound {
            kind,
            id: shown(id),
        }),
    }
}

/// The beginning of a text from a client, fit for a message.
pub(crate) fn shown(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_must_be_of_one_only() {
        let all = || vec!["aa11".to_owned(), "ab22".to_owned()];
        let find = |id: &str| only("id", "thing", id, all(), String::as_str);
        assert_eq!(find("aa").unwrap(), "aa11");
        assert!(matches!(find("a"), Err(CriError::Invalid { .. })));
        assert!(matches!(find(""), Err(CriError::Invalid { .. })));
        assert!(find("b").unwrap_err().is_not_found());
    }
}
