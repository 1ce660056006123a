//! What a host runtime is made of.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use hypernetes_network::NetworkDriver;
use hypernetes_runtime::Images;
use hypernetes_store::Store;

use crate::cgroup::Hierarchies;

/// Parts and limits of a [`crate::HostRuntime`].
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Durable files: what containers write, their configurations and exit codes. For root alone.
    pub state_dir: PathBuf,
    /// What is gone with the next boot: mounts, namespaces, the OCI runtime's own state.
    pub run_dir: PathBuf,
    /// Records of sandboxes and containers, under `/node/host/`.
    pub store: Store,
    /// Images.
    pub images: Arc<dyn Images>,
    /// Networks of pods that are not in the host's.
    pub network: Arc<dyn NetworkDriver>,
    /// The installed programs.
    pub programs: Programs,
    /// Program and arguments that run [`crate::pause`]; the sandbox's id is added.
    pub pause: Vec<OsString>,
    /// Longest time for one call of the OCI runtime, and from SIGKILL to a container's end.
    pub patience: Duration,
}

/// The programs that host pods need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// The OCI runtime.
    pub oci: PathBuf,
    /// The monitor of containers.
    pub conmon: PathBuf,
}

/// A program that is not there, or cannot work here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// It is not installed.
    #[error("{0} is not installed, neither in PATH nor in /usr/sbin")]
    Missing(String),
    /// It does not run.
    #[error("{} does not tell its version: {message}", path.display())]
    Broken {
        /// Which.
        path: PathBuf,
        /// What it said instead.
        message: String,
    },
    /// crun on a host whose controllers are on both versions of cgroups.
    #[error(
        "{} (crun) does not work where cgroup version 2 has controllers ({controllers}) beside version 1: \
         use runc, or leave version 2 without controllers",
        path.display()
    )]
    Hybrid {
        /// Which.
        path: PathBuf,
        /// Those of version 2.
        controllers: String,
    },
}

fn find(program: &Path) -> Result<PathBuf, ProgramError> {
    let missing = || ProgramError::Missing(program.display().to_string());
    if program.is_absolute() {
        return program
            .is_file()
            .then(|| program.to_owned())
            .ok_or_else(missing);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/usr/bin"].map(Into::into);
    env::split_paths(&path)
        .chain(system)
        .map(|dir| dir.join(program))
        .find(|path| path.is_absolute() && path.is_file())
        .ok_or_else(missing)
}

/// What a program says about itself.
fn version(path: &Path) -> Result<String, ProgramError> {
    let broken = |message: String| ProgramError::Broken {
        path: path.to_owned(),
        message,
    };
    let output = Command::new(path)
        .arg("--version")
        .output()
        .map_err(|error| broken(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(broken(said.chars().take(200).collect()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Programs {
    /// Finds the programs, by name or absolute path, and sees whether they run on this host. Blocks.
    ///
    /// # Errors
    /// If one is missing or cannot work here.
    pub fn find(oci: &Path, conmon: &Path) -> Result<Self, ProgramError> {
        let (oci, conmon) = (find(oci)?, find(conmon)?);
        version(&conmon)?;
        let is_crun = version(&oci)?.starts_with("crun");
        if let Some(controllers) = Hierarchies::read().ok().and_then(|all| all.hybrid())
            && is_crun
        {
            return Err(ProgramError::Hybrid {
                path: oci,
                controllers,
            });
        }
        Ok(Self { oci, conmon })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_name_or_path_or_named_as_missing() {
        assert!(find(Path::new("sh")).unwrap().is_absolute());
        assert_eq!(find(Path::new("/bin/sh")).unwrap(), Path::new("/bin/sh"));
        for missing in ["no-such-program", "/no/such/program"] {
            let error = find(Path::new(missing)).unwrap_err().to_string();
            assert!(error.contains(missing), "{error}");
        }
    }
}
