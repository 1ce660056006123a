//! Kubeconfig files with everything embedded.

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::{Authority, Credentials, FileError, write_private};

/// What a kubeconfig says: one cluster, one user, one context.
#[derive(Debug)]
pub struct Kubeconfig<'a> {
    /// URL of the API server.
    pub server: &'a str,
    /// Name of the cluster and of the context.
    pub context: &'a str,
    /// Name of the user's entry.
    pub user: &'a str,
    /// Namespace that commands use by default.
    pub namespace: &'a str,
    /// Who vouches for the server.
    pub authority: &'a Authority,
    /// The user's certificate and key.
    pub credentials: &'a Credentials,
}

impl Kubeconfig<'_> {
    /// The file's text.
    pub fn to_yaml(&self) -> String {
        // A JSON string is a YAML string.
        let text = |value: &str| serde_json::Value::from(value).to_string();
        let data = |value: &str| STANDARD.encode(value);
        format!(
            "apiVersion: v1\n\
             kind: Config\n\
             clusters:\n\
             - name: {context}\n\
             \x20 cluster:\n\
             \x20   server: {server}\n\
             \x20   certificate-authority-data: {authority}\n\
             users:\n\
             - name: {user}\n\
             \x20 user:\n\
             \x20   client-certificate-data: {certificate}\n\
             \x20   client-key-data: {key}\n\
             contexts:\n\
             - name: {context}\n\
             \x20 context:\n\
             \x20   cluster: {context}\n\
             \x20   user: {user}\n\
             \x20   namespace: {namespace}\n\
             current-context: {context}\n",
            context = text(self.context),
            server = text(self.server),
            user = text(self.user),
            namespace = text(self.namespace),
            authority = data(self.authority.certificate_pem()),
            certificate = data(&self.credentials.certificate_pem),
            key = data(&self.credentials.key_pem),
        )
    }

    /// Writes the file with mode 0600. Blocks.
    ///
    /// # Errors
    /// [`FileError::Write`].
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        write_private(path, self.to_yaml().as_bytes())
    }
}
