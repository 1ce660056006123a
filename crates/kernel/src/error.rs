//! What can go wrong with a kernel.

use std::{fmt, io, path::PathBuf};

use hypernetes_types::KernelName;

use crate::Finding;

/// Failure to keep, import, build or prepare a kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A file cannot be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// No kernel has this name.
    #[error("there is no kernel {name}")]
    NotFound {
        /// Name.
        name: KernelName,
    },
    /// No kernel was named and none is the default.
    #[error("no kernel is the default: build or import one")]
    NoDefault,
    /// The name is taken.
    #[error("there is a kernel {name} already")]
    Exists {
        /// Name.
        name: KernelName,
    },
    /// The kernel is the default and others are there.
    #[error("kernel {name} is the default: make another one the default first")]
    IsDefault {
        /// Name.
        name: KernelName,
    },
    /// The package is not what it says, or too large.
    #[error("{} is not a kernel package that can be used: {why}", path.display())]
    BadPackage {
        /// Package or file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The kernel cannot run pods.
    #[error("kernel {release} cannot run pods: {findings}")]
    Unfit {
        /// The kernel's release.
        release: String,
        /// What is missing, essentials only.
        findings: Findings,
    },
    /// The build script failed.
    #[error("the kernel build failed ({status}): {last}")]
    Build {
        /// Exit status.
        status: String,
        /// The last line it printed.
        last: String,
    },
}

impl KernelError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// Several findings as one text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings(pub Vec<Finding>);

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{finding}")?;
        }
        Ok(())
    }
}
