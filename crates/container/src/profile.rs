//! A system call filter of the owner's, compiled for the kernel.
//!
//! Rules with different actions may meet in one call, and then the strictest holds. The kernel does that with
//! several filters: one that gives the default action to calls that no rule names, and one for each action of the rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

use caps::CapsHashSet;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction as Action, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompRule as Conditions,
};
use syscalls::Sysno;

use crate::{
    capabilities::{self, CapabilityError},
    filter,
    spec::{SeccompAction, SeccompArg, SeccompOp, SeccompProfile, SeccompRule},
};

/// Most distinct actions: each is a filter that every call passes through.
const MAX_ACTIONS: usize = 32;
/// Arguments of a system call.
const ARGUMENTS: u8 = 6;

/// Why a profile cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    #[error("the system call filter has more than {MAX_ACTIONS} different actions")]
    TooManyActions,
    #[error("the system call filter names an {0}")]
    Capability(#[from] CapabilityError),
    #[error("the system call filter has a condition on argument {0}; there are 0 to 5")]
    Argument(u8),
    #[error("the system call filter cannot be compiled: {0}")]
    Compile(#[from] BackendError),
}

/// Rules by number of the call; one without conditions stands for all.
type Table = BTreeMap<u32, Vec<Conditions>>;

/// The filters for a process with these capabilities, to be installed in order.
pub(crate) fn filters(
    profile: &SeccompProfile,
    held: &CapsHashSet,
) -> Result<Vec<BpfProgram>, ProfileError> {
    let mut named = Table::new();
    let mut by_action: BTreeMap<SeccompAction, Table> = BTreeMap::new();
    for rule in &profile.rules {
        if !applies(rule, held)? {
            continue;
        }
        let calls: BTreeSet<u32> = rule.names.iter().filter_map(|name| number(name)).collect();
        let mut tables = vec![&mut named];
        if rule.action != SeccompAction::Allow {
            tables.push(by_action.entry(rule.action).or_default());
        }
        for table in tables {
            for call in &calls {
                add(table, *call, &rule.args)?;
            }
        }
    }
    if by_action.len() > MAX_ACTIONS {
        return Err(ProfileError::TooManyActions);
    }
    let mut programs = Vec::new();
    if profile.default != SeccompAction::Allow {
        programs.push(compile(named, &action(profile.default), &Action::Allow)?);
    }
    for (acted, table) in by_action {
        programs.push(compile(table, &Action::Allow, &action(acted))?);
    }
    Ok(programs)
}

fn applies(rule: &SeccompRule, held: &CapsHashSet) -> Result<bool, CapabilityError> {
    let has = |name: &String| capabilities::parse(name).map(|one| held.contains(&one));
    let all = |names: &[String]| names.iter().map(has).collect::<Result<Vec<_>, _>>();
    let included = all(&rule.include_capabilities)?;
    let excluded = all(&rule.exclude_capabilities)?;
    Ok(included.into_iter().all(|has| has) && !excluded.into_iter().any(|has| has))
}

/// The call's number here. Engines too pass over names that this machine does not have.
fn number(name: &str) -> Option<u32> {
    u32::try_from(Sysno::from_str(name).ok()?.id()).ok()
}

fn add(table: &mut Table, call: u32, args: &[SeccompArg]) -> Result<(), ProfileError> {
    let known = table.contains_key(&call);
    let rules = table.entry(call).or_default();
    if known && rules.is_empty() {
        return Ok(());
    }
    if args.is_empty() {
        rules.clear();
        return Ok(());
    }
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let mut indices = BTreeSet::new();
    if args.iter().all(|arg| indices.insert(arg.index)) {
        rules.push(Conditions::new(conditions)?);
    } else {
        // What libseccomp's callers have done since it could not have two on one argument.
        for condition in conditions {
            rules.push(Conditions::new(vec![condition])?);
        }
    }
    Ok(())
}

fn condition(arg: &SeccompArg) -> Result<SeccompCondition, ProfileError> {
    if arg.index >= ARGUMENTS {
        return Err(ProfileError::Argument(arg.index));
    }
    let (op, value) = match arg.op {
        SeccompOp::Eq => (SeccompCmpOp::Eq, arg.value),
        SeccompOp::Ne => (SeccompCmpOp::Ne, arg.value),
        SeccompOp::Lt => (SeccompCmpOp::Lt, arg.value),
        SeccompOp::Le => (SeccompCmpOp::Le, arg.value),
        SeccompOp::Gt => (SeccompCmpOp::Gt, arg.value),
        SeccompOp::Ge => (SeccompCmpOp::Ge, arg.value),
        SeccompOp::MaskedEq => (SeccompCmpOp::MaskedEq(arg.value), arg.value_two),
    };
    Ok(SeccompCondition::new(
        arg.index,
        SeccompCmpArgLen::Qword,
        op,
        value,
    )?)
}

fn action(action: SeccompAction) -> Action {
    match action {
        SeccompAction::Allow => Action::Allow,
        SeccompAction::Errno(number) => Action::Errno(number.into()),
        SeccompAction::KillProcess => Action::KillProcess,
        SeccompAction::KillThread => Action::KillThread,
        SeccompAction::Log => Action::Log,
        SeccompAction::Trace(message) => Action::Trace(message.into()),
        SeccompAction::Trap => Action::Trap,
    }
}

fn compile(table: Table, mismatch: &Action, matched: &Action) -> Result<BpfProgram, BackendError> {
    let table = table
        .into_iter()
        .map(|(call, rules)| (call, (rules, matched.clone())))
        .collect();
    filter::compile(table, mismatch)
}

#[cfg(test)]
mod tests {
    use caps::Capability;

    use super::*;
    use crate::filter::tests::{ALLOW, ERRNO, KILL, run};

    /// The strictest answer: the kernel compares actions as signed numbers, and the newest filter
    /// wins a draw.
    fn answer(programs: &[BpfProgram], call: i64, args: [u64; 6]) -> u32 {
        let strictness = |answer: &u32| (answer & 0xffff_0000).cast_signed();
        let answers = programs
            .iter()
            .rev()
            .map(|program| run(program, call, &args));
        answers.min_by_key(strictness).unwrap_or(ALLOW)
    }

    fn rule(names: &[&str], action: SeccompAction) -> SeccompRule {
        SeccompRule {
            names: names.iter().map(|&name| name.into()).collect(),
            action,
            args: Vec::new(),
            include_capabilities: Vec::new(),
            exclude_capabilities: Vec::new(),
        }
    }

    fn profile(default: SeccompAction, rules: Vec<SeccompRule>) -> SeccompProfile {
        SeccompProfile {
            default,
            rules,
            log: false,
            spec_allow: false,
        }
    }

    fn arg(index: u8, op: SeccompOp, value: u64, value_two: u64) -> SeccompArg {
        SeccompArg {
            index,
            op,
            value,
            value_two,
        }
    }

    #[test]
    fn a_list_of_what_is_denied() {
        let denied = rule(
            &["chmod", "fchmodat", "no_such_call"],
            SeccompAction::Errno(1),
        );
        let programs = filters(&profile(SeccompAction::Allow, vec![denied]), &caps::all()).unwrap();
        assert_eq!(answer(&programs, libc::SYS_chmod, [0; 6]), ERRNO | 1);
        assert_eq!(answer(&programs, libc::SYS_openat, [0; 6]), ALLOW);
    }

    #[test]
    fn a_list_of_what_is_allowed_with_several_actions() {
        let rules = vec![
            rule(&["read", "write"], SeccompAction::Allow),
            rule(&["clone3"], SeccompAction::Errno(38)),
            rule(&["ptrace"], SeccompAction::KillProcess),
            SeccompRule {
                args: vec![arg(0, SeccompOp::MaskedEq, 0x7e02_0000, 0)],
                ..rule(&["clone"], SeccompAction::Allow)
            },
            SeccompRule {
                args: vec![
                    arg(1, SeccompOp::Eq, 0x1_0000_0005, 0),
                    arg(2, SeccompOp::Gt, 7, 0),
                ],
                ..rule(&["socket"], SeccompAction::Allow)
            },
            SeccompRule {
                args: vec![arg(0, SeccompOp::Eq, 1, 0), arg(0, SeccompOp::Eq, 2, 0)],
                ..rule(&["personality"], SeccompAction::Allow)
            },
        ];
        let programs = filters(&profile(SeccompAction::Errno(1), rules), &caps::all()).unwrap();
        let of = |call, args| answer(&programs, call, args);
        assert_eq!(of(libc::SYS_read, [0; 6]), ALLOW);
        assert_eq!(of(libc::SYS_mount, [0; 6]), ERRNO | 1);
        assert_eq!(of(libc::SYS_clone3, [0; 6]), ERRNO | 38);
        assert_eq!(of(libc::SYS_ptrace, [0; 6]), KILL);
        assert_eq!(of(libc::SYS_clone, [0x11, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(of(libc::SYS_clone, [0x1000_0000, 0, 0, 0, 0, 0]), ERRNO | 1);
        assert_eq!(of(libc::SYS_socket, [0, 0x1_0000_0005, 8, 0, 0, 0]), ALLOW);
        assert_eq!(of(libc::SYS_socket, [0, 5, 8, 0, 0, 0]), ERRNO | 1);
        assert_eq!(
            of(libc::SYS_socket, [0, 0x1_0000_0005, 7, 0, 0, 0]),
            ERRNO | 1
        );
        for (value, allowed) in [(1, true), (2, true), (3, false)] {
            let got = of(libc::SYS_personality, [value, 0, 0, 0, 0, 0]);
            assert_eq!(got == ALLOW, allowed, "{value}");
        }
    }

    #[test]
    fn rules_can_depend_on_capabilities() {
        let admin = || vec!["CAP_SYS_ADMIN".to_owned()];
        let rules = vec![
            SeccompRule {
                include_capabilities: admin(),
                ..rule(&["mount"], SeccompAction::Allow)
            },
            SeccompRule {
                exclude_capabilities: admin(),
                ..rule(&["sync"], SeccompAction::Allow)
            },
        ];
        let profile = profile(SeccompAction::Errno(1), rules);
        let with = filters(&profile, &[Capability::CAP_SYS_ADMIN].into()).unwrap();
        let without = filters(&profile, &CapsHashSet::new()).unwrap();
        assert_eq!(answer(&with, libc::SYS_mount, [0; 6]), ALLOW);
        assert_eq!(answer(&with, libc::SYS_sync, [0; 6]), ERRNO | 1);
        assert_eq!(answer(&without, libc::SYS_mount, [0; 6]), ERRNO | 1);
        assert_eq!(answer(&without, libc::SYS_sync, [0; 6]), ALLOW);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let many = (0..40).map(|number| rule(&["read"], SeccompAction::Errno(number)));
        let many = profile(SeccompAction::Allow, many.collect());
        assert!(matches!(
            filters(&many, &caps::all()),
            Err(ProfileError::TooManyActions)
        ));
        let sixth = SeccompRule {
            args: vec![arg(6, SeccompOp::Eq, 0, 0)],
            ..rule(&["read"], SeccompAction::Errno(1))
        };
        assert!(matches!(
            filters(&profile(SeccompAction::Allow, vec![sixth]), &caps::all()),
            Err(ProfileError::Argument(6))
        ));
        let fly = SeccompRule {
            include_capabilities: vec!["CAP_FLY".into()],
            ..rule(&["read"], SeccompAction::Errno(1))
        };
        assert!(matches!(
            filters(&profile(SeccompAction::Allow, vec![fly]), &caps::all()),
            Err(ProfileError::Capability(_))
        ));
    }
}
