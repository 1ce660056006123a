//! System call filters in files of the node's, as the engines write them (`Localhost`).
//!
//! What is wrong with a file is told without a word of what is in it.

use std::{collections::BTreeSet, fs::File, io::Read, os::unix::fs::OpenOptionsExt, path::Path};

use serde::Deserialize;

use crate::seccomp::{SeccompAction, SeccompArg, SeccompOp, SeccompProfile, SeccompRule};

/// Largest file that is read. The engines' own profiles have 15 KiB.
const MAX_FILE: u64 = 1 << 20;
/// What a denied call fails with where the profile does not say: EPERM.
const DEFAULT_ERRNO: u32 = 1;
/// This machine, and so its guests', in the names of Go.
const ARCH: &str = "amd64";

/// Reads a profile for a guest with this kernel, or says what is wrong with it. Blocks.
pub fn read_seccomp_profile(path: &Path, kernel: &str) -> Result<SeccompProfile, String> {
    parse(&read_file(path)?, kernel)
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let cannot = |error: std::io::Error| format!("cannot read it: {error}");
    // A FIFO must not hold the call up.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err("is no regular file".to_owned());
    }
    let mut bytes = Vec::new();
    let limit = MAX_FILE + 1;
    file.take(limit).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("is larger than {MAX_FILE} bytes"));
    }
    Ok(bytes)
}

/// A profile as OCI runtimes, Docker and Podman have it. A field that is none of theirs is refused:
/// it may be one of theirs, misspelt.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    default_errno: Option<String>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchMap>>,
    #[serde(default)]
    flags: Option<Vec<String>>,
    #[serde(default)]
    listener_path: String,
    #[serde(default)]
    listener_metadata: String,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ArchMap {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    #[serde(default)]
    name: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: String,
    errno_ret: Option<u32>,
    errno: Option<String>,
    #[serde(default)]
    args: Option<Vec<Arg>>,
    #[serde(default, rename = "comment")]
    _comment: Option<String>,
    #[serde(default)]
    includes: Option<Filter>,
    #[serde(default)]
    excludes: Option<Filter>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Arg {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// For which containers a rule is there.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Filter {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default)]
    min_kernel: Option<String>,
}

fn parse(bytes: &[u8], kernel: &str) -> Result<SeccompProfile, String> {
    // Not the parser's own words, which quote the file.
    let profile: Profile = serde_json::from_slice(bytes).map_err(|error| {
        let what = match error.classify() {
            serde_json::error::Category::Data => "is no seccomp profile",
            _ => "is no JSON",
        };
        format!("{what}: line {}, column {}", error.line(), error.column())
    })?;
    if !profile.listener_path.is_empty() || !profile.listener_metadata.is_empty() {
        return Err("listenerPath: no listener of the host's is in a microVM".to_owned());
    }
    let architectures = profile.arch_map.iter().flatten().flat_map(|map| {
        [&map.architecture]
            .into_iter()
            .chain(map.sub_architectures.iter().flatten())
    });
    let mut architectures = architectures.chain(profile.architectures.iter().flatten());
    if architectures.any(|name| !name.is_empty() && !name.starts_with("SCMP_ARCH_")) {
        return Err("architectures: must be names of SCMP_ARCH_".to_owned());
    }
    let default_action = action(
        "defaultAction",
        &profile.default_action,
        profile.default_errno_ret,
        profile.default_errno.as_deref(),
    )?;
    let (mut log, mut spec_allow) = (false, false);
    for flag in profile.flags.iter().flatten() {
        match flag.as_str() {
            "SECCOMP_FILTER_FLAG_LOG" => log = true,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => spec_allow = true,
            // The process has one thread then.
            "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => {}
            _ => return Err("flags: must be names of SECCOMP_FILTER_FLAG_".to_owned()),
        }
    }
    let mut rules = Vec::new();
    for (index, rule) in profile.syscalls.into_iter().flatten().enumerate() {
        let rule = of_rule(rule, kernel).map_err(|why| format!("syscalls[{index}].{why}"))?;
        rules.extend(rule);
    }
    let profile = SeccompProfile {
        default_action,
        rules,
        log,
        spec_allow,
    };
    profile.check()?;
    Ok(profile)
}

/// A rule, unless it is for other machines.
fn of_rule(rule: Rule, kernel: &str) -> Result<Option<SeccompRule>, String> {
    let action = action(
        "action",
        &rule.action,
        rule.errno_ret,
        rule.errno.as_deref(),
    )?;
    let mut names = rule.names.unwrap_or_default();
    match (rule.name.is_empty(), names.is_empty()) {
        (false, false) => return Err("names: cannot be there beside name".to_owned()),
        (true, true) => return Err("names: must be given".to_owned()),
        (false, true) => names.push(rule.name),
        (true, false) => {}
    }
    let args = rule.args.into_iter().flatten().enumerate();
    let args = args
        .map(|(index, arg)| of_arg(&arg).map_err(|why| format!("args[{index}].{why}")))
        .collect::<Result<Vec<_>, _>>()?;
    let (includes, excludes) = (
        rule.includes.unwrap_or_default(),
        rule.excludes.unwrap_or_default(),
    );
    let here = |filter: &Filter| {
        let arches: BTreeSet<&str> = filter.arches.iter().flatten().map(String::as_str).collect();
        let arch = (!arches.is_empty()).then(|| arches.contains(ARCH));
        let old = |wanted: &String| Ok::<_, String>(version(kernel) >= kernel_version(wanted)?);
        let kernel = filter.min_kernel.as_ref().map(old).transpose()?;
        Ok::<_, String>((arch, kernel))
    };
    let (arch, new) = here(&includes).map_err(|why| format!("includes.{why}"))?;
    let (other_arch, too_new) = here(&excludes).map_err(|why| format!("excludes.{why}"))?;
    if arch == Some(false)
        || new == Some(false)
        || other_arch == Some(true)
        || too_new == Some(true)
    {
        return Ok(None);
    }
    Ok(Some(SeccompRule {
        names,
        action,
        args,
        include_capabilities: includes.caps.unwrap_or_default(),
        exclude_capabilities: excludes.caps.unwrap_or_default(),
    }))
}

fn of_arg(arg: &Arg) -> Result<SeccompArg, String> {
    let op = match arg.op.as_str() {
        "SCMP_CMP_EQ" => SeccompOp::Eq,
        "SCMP_CMP_NE" => SeccompOp::Ne,
        "SCMP_CMP_LT" => SeccompOp::Lt,
        "SCMP_CMP_LE" => SeccompOp::Le,
        "SCMP_CMP_GT" => SeccompOp::Gt,
        "SCMP_CMP_GE" => SeccompOp::Ge,
        "SCMP_CMP_MASKED_EQ" => SeccompOp::MaskedEq,
        _ => return Err("op: must be a name of SCMP_CMP_".to_owned()),
    };
    Ok(SeccompArg {
        index: u8::try_from(arg.index).map_err(|_large| "index: must be 0 to 5".to_owned())?,
        op,
        value: arg.value,
        value_two: arg.value_two,
    })
}

fn action(
    field: &str,
    name: &str,
    number: Option<u32>,
    symbol: Option<&str>,
) -> Result<SeccompAction, String> {
    // Podman writes both.
    if symbol.is_some_and(|symbol| !symbol.is_empty()) && number.is_none() {
        return Err(format!("{field}: needs the error as a number (errnoRet)"));
    }
    let number = u16::try_from(number.unwrap_or(DEFAULT_ERRNO))
        .map_err(|_large| format!("{field}: has an error number larger than 65535"))?;
    Ok(match name {
        "SCMP_ACT_ALLOW" => SeccompAction::Allow,
        "SCMP_ACT_ERRNO" => SeccompAction::Errno(number),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => SeccompAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => SeccompAction::KillProcess,
        "SCMP_ACT_LOG" => SeccompAction::Log,
        "SCMP_ACT_TRACE" => SeccompAction::Trace(number),
        "SCMP_ACT_TRAP" => SeccompAction::Trap,
        "SCMP_ACT_NOTIFY" => {
            return Err(format!(
                "{field}: SCMP_ACT_NOTIFY needs a listener of the host's, which no microVM has"
            ));
        }
        _ => return Err(format!("{field}: must be a name of SCMP_ACT_")),
    })
}

/// The first two numbers of a release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|digits| digits.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn kernel_version(text: &str) -> Result<(u32, u32), String> {
    let plain = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    match text.split_once('.') {
        Some((major, minor)) if plain(major) && plain(minor) => Ok(version(text)),
        _ => Err("minKernel: must be two numbers such as 4.8".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<SeccompProfile, String> {
        parse(text.as_bytes(), "6.12.1-hyper")
    }

    fn names(profile: &SeccompProfile) -> Vec<&str> {
        let names = profile.rules.iter().flat_map(|rule| &rule.names);
        names.map(String::as_str).collect()
    }

    #[test]
    fn the_engines_own_form_is_understood() {
        let profile = of(r#"{
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "archMap": [{"architecture": "SCMP_ARCH_X86_64",
                         "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]}],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW", "args": null,
                 "comment": "", "includes": {}, "excludes": {}},
                {"name": "clone", "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]},
                 "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13, "errno": "EACCES"},
                {"names": ["arm_fadvise64_64"], "action": "SCMP_ACT_ALLOW",
                 "includes": {"arches": ["arm", "arm64"]}},
                {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW",
                 "includes": {"arches": ["amd64", "x32"]}},
                {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
                {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "6.13"}},
                {"names": ["past"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "6.12"}},
                {"names": ["s390"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64"]}}
            ]}"#)
        .unwrap();
        assert_eq!(profile.default_action, SeccompAction::Errno(38));
        assert!(profile.log && !profile.spec_allow);
        assert_eq!(
            names(&profile),
            ["read", "write", "clone", "mount", "arch_prctl", "ptrace"]
        );
        assert_eq!(profile.rules[1].args[0].op, SeccompOp::MaskedEq);
        assert_eq!(profile.rules[1].exclude_capabilities, ["CAP_SYS_ADMIN"]);
        assert_eq!(profile.rules[2].action, SeccompAction::Errno(13));
    }

    #[test]
    fn what_cannot_be_is_named_and_not_quoted() {
        for (text, told) in [
            ("secret", "is no JSON: line 1"),
            (r#"{"defaultAction": "secret"}"#, "defaultAction: must be"),
            (r#"["secret"]"#, "is no seccomp profile: line 1"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "sycalls": "secret"}"#,
                "no seccomp profile",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#,
                "SCMP_ACT_NOTIFY needs",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/secret"}"#,
                "listenerPath:",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG"}]}"#,
                "syscalls[0].names: must be given",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"name": "read", "action": "SCMP_ACT_LOG",
                     "args": [{"index": 1, "value": 0, "op": "secret"}]}]}"#,
                "syscalls[0].args[0].op: must be",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"name": "secret secret", "action": "SCMP_ACT_LOG"}]}"#,
                "must have names",
            ),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(told), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let many = vec![r#"{"name":"read","action":"SCMP_ACT_LOG"}"#; 2000].join(",");
        let many = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{many}]}}"#);
        assert!(of(&many).unwrap_err().contains("at most 1024 rules"));
    }

    #[test]
    fn files_are_read_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profile.json");
        let of = |path: &Path| read_seccomp_profile(path, "6.12");
        let missing = of(&path).unwrap_err();
        assert!(missing.contains("cannot read it"), "{missing}");
        std::fs::write(&path, r#"{"defaultAction": "SCMP_ACT_LOG"}"#).unwrap();
        assert_eq!(of(&path).unwrap().default_action, SeccompAction::Log);
        std::fs::write(&path, vec![b' '; 1 + (1 << 20)]).unwrap();
        assert!(of(&path).unwrap_err().contains("is larger than"));
        assert!(of(dir.path()).unwrap_err().contains("is no regular file"));
    }
}
