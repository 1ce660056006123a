//! HyperKernel: this project's own kernel configuration, built from a distribution's source.
//!
//! The script and the configuration are part of the program, so that an installed binary can build
//! its kernel. Both are in `kernel/` of the source tree, where they also work by themselves.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::KernelError;

const SCRIPT: &str = include_str!("../../../kernel/build");
const FRAGMENT: &str = include_str!("../../../kernel/hyperkernel.config");

/// Exit code of the script when something that it needs is not installed.
const MISSING: i32 = 69;
const MAX_LINE: u64 = 8 * 1024;

/// Choices of a build. All may be left out.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Tarball of the kernel's source; without it, the newest of `/usr/src`.
    pub source: Option<PathBuf>,
    /// Configuration instead of the built-in one.
    pub config: Option<PathBuf>,
    /// Where results are kept between builds.
    pub cache: Option<PathBuf>,
    /// Compilers at a time.
    pub jobs: Option<u32>,
    /// Builds even if the result is in the cache.
    pub force: bool,
}

/// Builds the kernel, or finds it built, and returns the directory for
/// [`KernelCatalog::add_built`](crate::KernelCatalog::add_built). Takes some ten minutes on two
/// processors; `progress` gets each line that the script says meanwhile.
///
/// `work` is a directory for the script and the configuration while they run.
pub fn build(
    work: &Path,
    options: &BuildOptions,
    mut progress: impl FnMut(&str),
) -> Result<PathBuf, KernelError> {
    let dir = work.join(format!("hyperkernel-build-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(KernelError::io("create", &dir))?;
    let result = run(&dir, options, &mut progress);
    drop(fs::remove_dir_all(&dir));
    result
}

fn run(
    dir: &Path,
    options: &BuildOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<PathBuf, KernelError> {
    let script = dir.join("build");
    for (path, text) in [
        (&script, SCRIPT),
        (&dir.join("hyperkernel.config"), FRAGMENT),
    ] {
        fs::write(path, text).map_err(KernelError::io("write", path))?;
    }
    let mut arguments: Vec<OsString> = Vec::new();
    let paths = [
        ("--source", &options.source),
        ("--config", &options.config),
        ("--cache", &options.cache),
    ];
    for (flag, path) in paths {
        if let Some(path) = path {
            arguments.extend([flag.into(), path.into()]);
        }
    }
    if let Some(jobs) = options.jobs {
        arguments.extend(["--jobs".into(), jobs.to_string().into()]);
    }
    if options.force {
        arguments.push("--force".into());
    }
    let mut child = Command::new("bash")
        .arg(&script)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(KernelError::io("run", &script))?;
    // The script says one line on its standard output, at the end: no need to read both at once.
    let mut last = String::new();
    let mut errors = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = Vec::new();
    while let Ok(1..) = (&mut errors).take(MAX_LINE).read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        progress(text);
        if !text.is_empty() {
            last = text.to_owned();
        }
        line.clear();
    }
    let mut answer = String::new();
    let stdout = child.stdout.take().expect("piped");
    stdout
        .take(MAX_LINE)
        .read_to_string(&mut answer)
        .map_err(KernelError::io("read from", &script))?;
    let status = child.wait().map_err(KernelError::io("wait for", &script))?;
    if !status.success() {
        let status = match status.code() {
            Some(MISSING) => "something it needs is missing".to_owned(),
            _ => status.to_string(),
        };
        return Err(KernelError::Build { status, last });
    }
    Ok(PathBuf::from(answer.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_source_is_told() {
        let temp = tempfile::tempdir().unwrap();
        let options = BuildOptions {
            source: Some(temp.path().join("none.tar.xz")),
            cache: Some(temp.path().join("cache")),
            ..BuildOptions::default()
        };
        let mut lines = Vec::new();
        let error = build(temp.path(), &options, |line| lines.push(line.to_owned())).unwrap_err();
        assert!(
            lines.iter().any(|line| line.contains("no kernel source")),
            "{lines:?}"
        );
        assert!(
            matches!(error, KernelError::Build { last, .. } if last.contains("no kernel source"))
        );
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }
}
