//! A system call filter of the owner's own, as it is stored and as the guest gets it.

use hypernetes_agent_api::v1;
use serde::{Deserialize, Serialize};

/// A system call filter. Where several rules match a call, the strictest action holds. It is bounded by
/// [`SeccompProfile::check`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompProfile {
    /// Of calls that no rule matches.
    pub default_action: SeccompAction,
    /// In any order.
    pub rules: Vec<SeccompRule>,
    /// The guest's kernel logs what is not simply allowed.
    pub log: bool,
    /// The mitigation of speculative store bypass is left out.
    pub spec_allow: bool,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompAction {
    /// It is made.
    Allow,
    /// It fails with this error number.
    Errno(u16),
    /// The process is killed.
    KillProcess,
    /// The thread is killed.
    KillThread,
    /// It is made and logged.
    Log,
    /// A tracer is told with this message; without one the call fails.
    Trace(u16),
    /// The process gets SIGSYS.
    Trap,
}

/// Calls and what becomes of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompRule {
    /// Names of system calls. The guest passes over those that it does not know.
    pub names: Vec<String>,
    /// What becomes of them.
    pub action: SeccompAction,
    /// Conditions, all of which must hold; several on one argument are alternatives.
    #[serde(default)]
    pub args: Vec<SeccompArg>,
    /// The rule is there only for a process that has all of these capabilities,
    #[serde(default)]
    pub include_capabilities: Vec<String>,
    /// and none of these.
    #[serde(default)]
    pub exclude_capabilities: Vec<String>,
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompArg {
    /// 0 to 5.
    pub index: u8,
    /// How it is compared.
    pub op: SeccompOp,
    /// With what; of [`SeccompOp::MaskedEq`] the mask.
    pub value: u64,
    /// Of [`SeccompOp::MaskedEq`] what the masked argument must be.
    pub value_two: u64,
}

/// A comparison of 64 bits without sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum SeccompOp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    MaskedEq,
}

impl SeccompProfile {
    /// Most rules.
    pub const MAX_RULES: usize = 1024;
    /// Most names of system calls and capabilities in all rules together.
    pub const MAX_NAMES: usize = 8192;
    /// Most conditions in all rules together.
    pub const MAX_ARGS: usize = 4096;
    /// Longest name in bytes.
    pub const MAX_NAME: usize = 64;

    /// Whether the profile is within the bounds that a guest accepts.
    ///
    /// # Errors
    /// A sentence without a subject: what it must be.
    pub fn check(&self) -> Result<(), String> {
        let all = |rule: &SeccompRule| {
            let names = rule.names.iter().chain(&rule.include_capabilities);
            names.chain(&rule.exclude_capabilities).cloned().collect()
        };
        let names: Vec<Vec<String>> = self.rules.iter().map(all).collect();
        let args: usize = self.rules.iter().map(|rule| rule.args.len()).sum();
        let plain = |name: &String| {
            (1..=Self::MAX_NAME).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        };
        if self.rules.len() > Self::MAX_RULES {
            return Err(format!("must have at most {} rules", Self::MAX_RULES));
        }
        if names.iter().map(Vec::len).sum::<usize>() > Self::MAX_NAMES {
            return Err(format!("must have at most {} names", Self::MAX_NAMES));
        }
        if args > Self::MAX_ARGS {
            return Err(format!("must have at most {} conditions", Self::MAX_ARGS));
        }
        if !names.iter().flatten().all(plain) {
            return Err("must have names of letters, digits and '_', at most 64".to_owned());
        }
        let index = |rule: &SeccompRule| rule.args.iter().any(|arg| arg.index > 5);
        if self.rules.iter().any(index) {
            return Err("must have conditions on arguments 0 to 5".to_owned());
        }
        Ok(())
    }
}

impl From<&SeccompProfile> for v1::SeccompProfile {
    fn from(profile: &SeccompProfile) -> Self {
        let (action, data) = action(profile.default_action);
        Self {
            default_action: action.into(),
            default_data: data,
            rules: profile.rules.iter().map(rule).collect(),
            log: profile.log,
            spec_allow: profile.spec_allow,
        }
    }
}

fn rule(rule: &SeccompRule) -> v1::SeccompRule {
    let (action, data) = action(rule.action);
    let arg = |arg: &SeccompArg| v1::SeccompArg {
        index: arg.index.into(),
        op: op(arg.op).into(),
        value: arg.value,
        value_two: arg.value_two,
    };
    v1::SeccompRule {
        names: rule.names.clone(),
        action: action.into(),
        data,
        args: rule.args.iter().map(arg).collect(),
        include_capabilities: rule.include_capabilities.clone(),
        exclude_capabilities: rule.exclude_capabilities.clone(),
    }
}

fn action(action: SeccompAction) -> (v1::SeccompAction, u32) {
    match action {
        SeccompAction::Allow => (v1::SeccompAction::SeccompAllow, 0),
        SeccompAction::Errno(number) => (v1::SeccompAction::SeccompErrno, number.into()),
        SeccompAction::KillProcess => (v1::SeccompAction::SeccompKillProcess, 0),
        SeccompAction::KillThread => (v1::SeccompAction::SeccompKillThread, 0),
        SeccompAction::Log => (v1::SeccompAction::SeccompLog, 0),
        SeccompAction::Trace(message) => (v1::SeccompAction::SeccompTrace, message.into()),
        SeccompAction::Trap => (v1::SeccompAction::SeccompTrap, 0),
    }
}

fn op(op: SeccompOp) -> v1::SeccompOp {
    match op {
        SeccompOp::Eq => v1::SeccompOp::SeccompEq,
        SeccompOp::Ne => v1::SeccompOp::SeccompNe,
        SeccompOp::Lt => v1::SeccompOp::SeccompLt,
        SeccompOp::Le => v1::SeccompOp::SeccompLe,
        SeccompOp::Gt => v1::SeccompOp::SeccompGt,
        SeccompOp::Ge => v1::SeccompOp::SeccompGe,
        SeccompOp::MaskedEq => v1::SeccompOp::SeccompMaskedEq,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(names: usize, args: usize) -> SeccompRule {
        SeccompRule {
            names: vec!["read".into(); names],
            action: SeccompAction::Errno(13),
            args: vec![
                SeccompArg {
                    index: 1,
                    op: SeccompOp::MaskedEq,
                    value: 6,
                    value_two: 4,
                };
                args
            ],
            include_capabilities: Vec::new(),
            exclude_capabilities: Vec::new(),
        }
    }

    fn profile(rules: Vec<SeccompRule>) -> SeccompProfile {
        SeccompProfile {
            default_action: SeccompAction::Allow,
            rules,
            log: false,
            spec_allow: false,
        }
    }

    #[test]
    fn what_a_guest_would_refuse_is_refused_here() {
        profile(vec![rule(1, 1)]).check().unwrap();
        let bad_name = SeccompRule {
            names: vec!["re ad".into()],
            ..rule(0, 0)
        };
        let mut bad_index = rule(1, 1);
        bad_index.args[0].index = 6;
        for bad in [
            vec![rule(1, 0); SeccompProfile::MAX_RULES + 1],
            vec![rule(SeccompProfile::MAX_NAMES + 1, 0)],
            vec![rule(1, SeccompProfile::MAX_ARGS + 1)],
            vec![bad_name],
            vec![bad_index],
        ] {
            profile(bad).check().unwrap_err();
        }
    }

    #[test]
    fn the_guest_gets_all_of_it() {
        let sent = v1::SeccompProfile::from(&profile(vec![rule(2, 1)]));
        assert_eq!(sent.default_action(), v1::SeccompAction::SeccompAllow);
        let rule = &sent.rules[0];
        assert_eq!(
            (rule.action(), rule.data),
            (v1::SeccompAction::SeccompErrno, 13)
        );
        assert_eq!(rule.args[0].op(), v1::SeccompOp::SeccompMaskedEq);
        assert_eq!((rule.args[0].value, rule.args[0].value_two), (6, 4));
    }
}
