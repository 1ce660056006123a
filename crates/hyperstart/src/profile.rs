//! A system call filter of the owner's, out of a request.

use hypernetes_agent_api::v1;
use hypernetes_container::{
    SeccompAction, SeccompArg, SeccompOp, SeccompProfile, SeccompRule, SeccompSpec,
};

use crate::error::GuestError;

const MAX_RULES: usize = 1024;
const MAX_NAMES: usize = 8192;
const MAX_ARGS: usize = 4096;
const MAX_NAME: usize = 64;

/// Which filter a process asks for.
pub(crate) fn seccomp(process: &v1::Process) -> Result<SeccompSpec, GuestError> {
    match (&process.seccomp, process.seccomp_default) {
        (Some(_), true) => Err(GuestError::invalid(
            "the default system call filter and one of the owner's are asked for",
        )),
        (Some(asked), false) => Ok(SeccompSpec::Profile(profile(asked)?)),
        (None, true) => Ok(SeccompSpec::EngineDefault),
        (None, false) => Ok(SeccompSpec::Unconfined),
    }
}

fn profile(asked: &v1::SeccompProfile) -> Result<SeccompProfile, GuestError> {
    let sum = |of: fn(&v1::SeccompRule) -> usize| asked.rules.iter().map(of).sum::<usize>();
    let names = sum(|rule| {
        rule.names.len() + rule.include_capabilities.len() + rule.exclude_capabilities.len()
    });
    if asked.rules.len() > MAX_RULES || names > MAX_NAMES || sum(|rule| rule.args.len()) > MAX_ARGS
    {
        return Err(GuestError::Invalid(format!(
            "the system call filter has more than {MAX_RULES} rules, {MAX_NAMES} names or \
             {MAX_ARGS} conditions"
        )));
    }
    Ok(SeccompProfile {
        default: action(asked.default_action(), asked.default_data)?,
        rules: asked.rules.iter().map(rule).collect::<Result<_, _>>()?,
        log: asked.log,
        spec_allow: asked.spec_allow,
    })
}

fn rule(asked: &v1::SeccompRule) -> Result<SeccompRule, GuestError> {
    let names = [
        &asked.names,
        &asked.include_capabilities,
        &asked.exclude_capabilities,
    ];
    if names
        .into_iter()
        .flatten()
        .any(|name| name.len() > MAX_NAME)
    {
        return Err(GuestError::Invalid(format!(
            "a name in the system call filter is longer than {MAX_NAME} bytes"
        )));
    }
    Ok(SeccompRule {
        names: asked.names.clone(),
        action: action(asked.action(), asked.data)?,
        args: asked.args.iter().map(arg).collect::<Result<_, _>>()?,
        include_capabilities: asked.include_capabilities.clone(),
        exclude_capabilities: asked.exclude_capabilities.clone(),
    })
}

fn action(action: v1::SeccompAction, data: u32) -> Result<SeccompAction, GuestError> {
    let data = u16::try_from(data).map_err(|_large| {
        GuestError::invalid("a system call filter's error number is larger than 65535")
    })?;
    Ok(match action {
        v1::SeccompAction::SeccompUnknown => {
            return Err(GuestError::invalid(
                "unknown action of a system call filter",
            ));
        }
        v1::SeccompAction::SeccompAllow => SeccompAction::Allow,
        v1::SeccompAction::SeccompErrno => SeccompAction::Errno(data),
        v1::SeccompAction::SeccompKillProcess => SeccompAction::KillProcess,
        v1::SeccompAction::SeccompKillThread => SeccompAction::KillThread,
        v1::SeccompAction::SeccompLog => SeccompAction::Log,
        v1::SeccompAction::SeccompTrace => SeccompAction::Trace(data),
        v1::SeccompAction::SeccompTrap => SeccompAction::Trap,
    })
}

fn arg(asked: &v1::SeccompArg) -> Result<SeccompArg, GuestError> {
    let op = match asked.op() {
        v1::SeccompOp::Unknown => {
            return Err(GuestError::invalid(
                "unknown comparison of a system call filter",
            ));
        }
        v1::SeccompOp::SeccompEq => SeccompOp::Eq,
        v1::SeccompOp::SeccompNe => SeccompOp::Ne,
        v1::SeccompOp::SeccompLt => SeccompOp::Lt,
        v1::SeccompOp::SeccompLe => SeccompOp::Le,
        v1::SeccompOp::SeccompGt => SeccompOp::Gt,
        v1::SeccompOp::SeccompGe => SeccompOp::Ge,
        v1::SeccompOp::SeccompMaskedEq => SeccompOp::MaskedEq,
    };
    Ok(SeccompArg {
        index: u8::try_from(asked.index).unwrap_or(u8::MAX),
        op,
        value: asked.value,
        value_two: asked.value_two,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(rules: Vec<v1::SeccompRule>) -> v1::Process {
        v1::Process {
            seccomp: Some(v1::SeccompProfile {
                default_action: v1::SeccompAction::SeccompErrno.into(),
                default_data: 1,
                rules,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn rule(names: usize, args: usize) -> v1::SeccompRule {
        v1::SeccompRule {
            names: vec!["read".into(); names],
            action: v1::SeccompAction::SeccompAllow.into(),
            args: vec![
                v1::SeccompArg {
                    op: v1::SeccompOp::SeccompEq.into(),
                    ..Default::default()
                };
                args
            ],
            ..Default::default()
        }
    }

    #[test]
    fn a_filter_is_taken_whole_or_not_at_all() {
        let SeccompSpec::Profile(profile) = seccomp(&asks(vec![rule(2, 1)])).unwrap() else {
            panic!("no profile");
        };
        assert_eq!(profile.default, SeccompAction::Errno(1));
        assert_eq!(profile.rules[0].names, ["read", "read"]);
        let refused = |process: &v1::Process| {
            assert!(matches!(seccomp(process), Err(GuestError::Invalid(_))));
        };
        refused(&asks(vec![rule(1, 0); MAX_RULES + 1]));
        refused(&asks(vec![rule(MAX_NAMES + 1, 0)]));
        refused(&asks(vec![rule(1, MAX_ARGS + 1)]));
        refused(&asks(vec![v1::SeccompRule {
            names: vec!["x".repeat(MAX_NAME + 1)],
            ..rule(0, 0)
        }]));
        refused(&asks(vec![v1::SeccompRule::default()]));
        refused(&asks(vec![v1::SeccompRule {
            data: 65_536,
            ..rule(1, 0)
        }]));
        refused(&v1::Process {
            seccomp_default: true,
            ..asks(Vec::new())
        });
    }
}
