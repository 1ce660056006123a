//! A real registry on loopback with the test images in it.

use std::{fs, path::PathBuf, process::Command};

use tempfile::TempDir;

use crate::{run, workspace_root};

/// Debian's docker-registry, for as long as this value lives.
#[derive(Debug)]
pub struct Registry {
    dir: TempDir,
    address: String,
}

impl Registry {
    /// Starts a registry and pushes the test images into it.
    pub fn start() -> Self {
        Self::start_in(None)
    }

    /// Starts one in a network namespace below `/run/netns`.
    pub fn start_in(namespace: Option<&str>) -> Self {
        let root = workspace_root().join("tests/images");
        let dir = TempDir::new().unwrap();
        let command = |program: PathBuf| match namespace {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).arg(program);
                command
            }
        };
        run(command(root.join("registry"))
            .args(["up", "--dir"])
            .arg(dir.path()));
        let address = fs::read_to_string(dir.path().join("address"))
            .unwrap()
            .trim()
            .to_owned();
        let images = cache_dir().join("test-images");
        run(Command::new("flock")
            .arg(cache_dir().join("test-images.lock"))
            .arg(root.join("build_images.py"))
            .args(["build", "--out"])
            .arg(&images));
        run(command(root.join("build_images.py"))
            .env_remove("http_proxy")
            .args(["push", "--out"])
            .arg(&images)
            .args(["--registry", &format!("http://{address}")]));
        Self { dir, address }
    }

    /// Full reference of a test image: `web:1` → `127.0.0.1:…/web:1`.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Host and port.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let script = workspace_root().join("tests/images/registry");
        let ended = Command::new(script)
            .args(["down", "--dir"])
            .arg(self.dir.path())
            .status();
        if !ended.is_ok_and(|status| status.success()) {
            eprintln!("the registry in {} did not stop", self.dir.path().display());
        }
    }
}

/// Where slow artefacts are kept between runs.
pub(crate) fn cache_dir() -> PathBuf {
    let dir = std::env::var_os("HYPERNETES_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/hypernetes"),
        PathBuf::from,
    );
    fs::create_dir_all(&dir).unwrap();
    dir
}
