//! `login` and `logout`: a Secret of the registry's credentials in the namespace.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;

use crate::{
    cli::{Login, Logout},
    cluster::Cluster,
    error::{Failure, Result},
    meta, terminal,
};

/// The key of Docker Hub in configuration files.
const HUB: &str = "https://index.docker.io/v1/";

/// The registry as nodes look it up.
fn key(server: &str) -> String {
    let bare = server
        .trim_start_matches("https://")
        .trim_start_matches("http://")
        .trim_end_matches('/');
    match bare {
        "docker.io" | "index.docker.io" | "index.docker.io/v1" | "registry-1.docker.io" => {
            HUB.to_owned()
        }
        other => other.to_owned(),
    }
}

/// The registry as a name and a label can hold it.
fn slug(server: &str) -> String {
    let bare = server
        .trim_start_matches("https://")
        .trim_start_matches("http://")
        .trim_end_matches('/');
    let text: String = bare
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .take(48)
        .collect();
    text.trim_matches(['-', '.']).to_owned()
}

fn secret_name(server: &str) -> String {
    format!("hyper-registry-{}", slug(server))
}

/// `login`.
pub(crate) async fn login(cluster: &Cluster, options: &Login) -> Result<()> {
    if options.password.is_some() && options.password_stdin {
        return Err(Failure::plain(
            "conflicting options: cannot specify both --password and --password-stdin",
        ));
    }
    if options.password_stdin && options.username.is_none() {
        return Err(Failure::plain(
            "the --password-stdin option requires --username to be set",
        ));
    }
    let username = match &options.username {
        Some(name) => name.clone(),
        None => prompt("Username: ")?,
    };
    let password = match &options.password {
        Some(password) => {
            terminal::note(
                "WARNING! Using --password via the CLI is insecure. Use --password-stdin.",
            );
            password.clone()
        }
        None if options.password_stdin => {
            let text = std::io::read_to_string(std::io::stdin())?;
            text.trim_end_matches(['\r', '\n']).to_owned()
        }
        None if terminal::stdin_is_terminal() => hidden("Password: ")?,
        None => {
            return Err(Failure::plain(
                "Error: Cannot perform an interactive login from a non TTY device",
            ));
        }
    };
    if username.is_empty() || password.is_empty() {
        return Err(Failure::plain("Error: username and password are required"));
    }
    let config = json!({"auths": {key(&options.server): {
        "username": username, "password": password, "auth": STANDARD.encode(format!("{username}:{password}")),
    }}});
    let name = secret_name(&options.server);
    let secret: Secret = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {meta::REGISTRY: slug(&options.server)}},
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": STANDARD.encode(config.to_string())},
    }))
    .map_err(Failure::plain)?;
    let api = cluster.api::<Secret>();
    match api.create(&PostParams::default(), &secret).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            api.replace(&name, &PostParams::default(), &secret).await?;
        }
        Err(error) => return Err(error.into()),
    }
    terminal::note(&format!(
        "Credentials are kept in Secret {name} of namespace {}; they are tried at the next pull.",
        cluster.namespace
    ));
    terminal::line("Login Succeeded");
    Ok(())
}

/// `logout`.
pub(crate) async fn logout(cluster: &Cluster, options: &Logout) -> Result<()> {
    match cluster
        .api::<Secret>()
        .delete(&secret_name(&options.server), &DeleteParams::default())
        .await
    {
        Ok(_) => terminal::line(&format!(
            "Removing login credentials for {}",
            key(&options.server)
        )),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            terminal::line(&format!("Not logged in to {}", key(&options.server)));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn prompt(text: &str) -> Result<String> {
    terminal::out(text);
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(line.trim().to_owned())
}

/// A line that is not seen while it is typed.
fn hidden(text: &str) -> Result<String> {
    let _silent = terminal::Silent::enter();
    let line = prompt(text);
    terminal::line("");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_have_keys_and_names() {
        for (server, is, name) in [
            ("docker.io", HUB, "hyper-registry-docker.io"),
            (
                "registry.example:5000",
                "registry.example:5000",
                "hyper-registry-registry.example-5000",
            ),
            (
                "https://registry.example/",
                "registry.example",
                "hyper-registry-registry.example",
            ),
        ] {
            assert_eq!(
                (key(server).as_str(), secret_name(server).as_str()),
                (is, name)
            );
        }
    }
}
