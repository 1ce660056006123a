//! Containers' logs, sent on to a collector.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use hypernetes_runtime::LogShipping;
use reqwest::Url;
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;

use crate::paths::Paths;

/// Where to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct LogOptions {
    pub(crate) forward: Option<String>,
    pub(crate) token_file: Option<PathBuf>,
}

impl LogOptions {
    fn endpoint(&self) -> Result<Option<Url>> {
        let Some(text) = &self.forward else {
            return Ok(None);
        };
        // The text may hold a password.
        let url: Url = text.parse().context("logs.forward is no URL")?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            bail!("logs.forward must be http://HOST:PORT/PATH or https");
        }
        Ok(Some(url))
    }

    /// Refuses what can never work.
    pub(crate) fn check(&self) -> Result<()> {
        if self.endpoint()?.is_none() && self.token_file.is_some() {
            bail!("logs.tokenFile needs logs.forward");
        }
        Ok(())
    }

    /// What is asked for, ready to go.
    pub(crate) fn shipping(&self, paths: &Paths) -> Result<Option<LogShipping>> {
        let Some(endpoint) = self.endpoint()? else {
            return Ok(None);
        };
        let token = match &self.token_file {
            Some(file) => {
                let text = std::fs::read_to_string(file)
                    .with_context(|| format!("cannot read logs.tokenFile {}", file.display()))?;
                Some(text.trim().to_owned())
            }
            None => None,
        };
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let tls = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("hypernetes/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Some(LogShipping {
            client,
            endpoint,
            token,
            state: paths.log_cursors(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_has_an_address() {
        let of = |forward: &str| LogOptions {
            forward: Some(forward.into()),
            token_file: None,
        };
        assert!(of("http://127.0.0.1:8080/logs").check().is_ok());
        assert!(of("https://logs.example").check().is_ok());
        for bad in [
            "",
            "logs.example:80",
            "tcp://logs.example:80",
            "/logs",
            "http://",
        ] {
            assert!(of(bad).check().is_err(), "{bad:?}");
        }
        let token = LogOptions {
            forward: None,
            token_file: Some("/token".into()),
        };
        assert!(
            token
                .check()
                .unwrap_err()
                .to_string()
                .contains("logs.forward")
        );
    }
}
