//! Finds and executes the program.

use std::{convert::Infallible, ffi::CString, os::unix::fs::PermissionsExt, path::Path};

use nix::{errno::Errno, unistd::execve};

use seccompiler::BpfProgram;

use crate::{control::Reply, sys};

/// Where programs are looked for when the environment does not say.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// System call filters, to be installed in order, and their `SECCOMP_FILTER_FLAG_…`.
#[derive(Debug, Default)]
pub(crate) struct Filters {
    pub(crate) programs: Vec<BpfProgram>,
    pub(crate) flags: libc::c_ulong,
}

impl Filters {
    pub(crate) fn install(&self) -> std::io::Result<()> {
        self.programs
            .iter()
            .try_for_each(|program| sys::install_filter(program, self.flags))
    }
}

fn not_run(code: u8, program: &str, why: &str) -> Reply {
    Reply::NotRun {
        code,
        message: format!("exec: \"{program}\": {why}"),
    }
}

/// Whether a file can be executed by this process, root's overrides included.
fn probe(path: &Path) -> Result<(), Errno> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if metadata.is_dir() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK)
}

/// The program's path: as it stands if it has a slash, else from `PATH`.
fn find(program: &str, env: &[String]) -> Result<String, Reply> {
    if program.contains('/') {
        return Ok(program.to_owned());
    }
    if program.is_empty() {
        return Err(not_run(127, program, "no command"));
    }
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = format!("{directory}/{program}");
        match probe(Path::new(&candidate)) {
            Ok(()) => return Ok(candidate),
            Err(errno) => denied |= errno == Errno::EACCES,
        }
    }
    match denied {
        true => Err(not_run(126, program, "permission denied")),
        false => Err(not_run(127, program, "executable file not found in $PATH")),
    }
}

/// Becomes the program. Returns only what went wrong; a filter may keep even that from being told.
pub(crate) fn run(args: &[String], env: &[String], filters: &Filters) -> Reply {
    let program = args.first().map_or("", String::as_str);
    match try_run(program, args, env, filters) {
        Ok(never) => match never {},
        Err(reply) => reply,
    }
}

fn try_run(
    program: &str,
    args: &[String],
    env: &[String],
    filters: &Filters,
) -> Result<Infallible, Reply> {
    let path = find(program, env)?;
    let text = |text: &str| {
        CString::new(text).map_err(|_nul| not_run(126, program, "an argument holds a zero byte"))
    };
    let path_text = text(&path)?;
    let args = args
        .iter()
        .map(|arg| text(arg))
        .collect::<Result<Vec<_>, _>>()?;
    let env = env
        .iter()
        .map(|entry| text(entry))
        .collect::<Result<Vec<_>, _>>()?;
    filters.install().map_err(|error| {
        let why = format!("cannot install the system call filter: {error}");
        not_run(126, program, &why)
    })?;
    execve(&path_text, &args, &env).map_err(|errno| match errno {
        // Also when a script's interpreter is missing.
        Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => {
            not_run(127, program, "no such file or directory")
        }
        Errno::ENOEXEC => not_run(126, program, "exec format error"),
        Errno::EACCES => not_run(126, program, "permission denied"),
        Errno::E2BIG => not_run(126, program, "argument list too long"),
        other => not_run(126, program, other.desc()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_the_containers_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("tool"), "").unwrap();
        let env = |path: &str| vec![format!("PATH=/nonexistent:{path}")];
        let code = |result: Result<String, Reply>| match result {
            Err(Reply::NotRun { code, .. }) => code,
            other => panic!("{other:?}"),
        };
        assert_eq!(code(find("tool", &env(path))), 126);
        assert_eq!(code(find("none", &env(path))), 127);
        assert_eq!(code(find("", &env(path))), 127);
        let mode = PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path().join("tool"), mode).unwrap();
        assert_eq!(find("tool", &env(path)).unwrap(), format!("{path}/tool"));
        assert_eq!(find("./x", &env(path)).unwrap(), "./x");
    }
}
