//! The request that made a sandbox or a container, kept with it.
//!
//! The runtime stores it as text and does not read it: the message's bytes, in base64.

use base64::{Engine, engine::general_purpose::STANDARD};
use prost::Message;

use crate::v1;

/// The memo of a sandbox. Labels and annotations have a place of their own.
pub(crate) fn of_sandbox(request: &v1::RunPodSandboxRequest) -> String {
    let mut kept = request.clone();
    if let Some(config) = &mut kept.config {
        config.labels.clear();
        config.annotations.clear();
    }
    STANDARD.encode(kept.encode_to_vec())
}

/// The memo of a container. Labels and annotations have a place of their own, and so has the
/// environment, which may hold secrets.
pub(crate) fn of_container(config: &v1::ContainerConfig) -> String {
    let mut kept = config.clone();
    kept.labels.clear();
    kept.annotations.clear();
    kept.envs.clear();
    STANDARD.encode(kept.encode_to_vec())
}

/// The request of a sandbox. One without, made by something else, gives an empty one.
pub(crate) fn sandbox(memo: &str) -> v1::RunPodSandboxRequest {
    decode(memo)
}

/// The configuration of a container.
pub(crate) fn container(memo: &str) -> v1::ContainerConfig {
    decode(memo)
}

fn decode<M: Message + Default>(memo: &str) -> M {
    STANDARD
        .decode(memo)
        .ok()
        .and_then(|bytes| M::decode(bytes.as_slice()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_comes_back() {
        let config = v1::ContainerConfig {
            log_path: "c/0.log".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            envs: vec![v1::KeyValue {
                key: "TOKEN".into(),
                value: b"secret".to_vec(),
            }],
            ..Default::default()
        };
        let memo = of_container(&config);
        assert_eq!(of_container(&config), memo);
        let back = container(&memo);
        assert_eq!(back.log_path, "c/0.log");
        assert!(back.labels.is_empty() && back.envs.is_empty());
        assert_eq!(container("not a memo"), v1::ContainerConfig::default());
    }
}
