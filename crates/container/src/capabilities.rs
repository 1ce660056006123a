//! Capability sets: which, and how they are put on.

use std::collections::HashSet;

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};

use crate::spec::CapabilitySpec;

/// What container engines give a process that asks for nothing.
const DEFAULT: [Capability; 14] = [
    Capability::CAP_AUDIT_WRITE,
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_MKNOD,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_NET_RAW,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETUID,
    Capability::CAP_SYS_CHROOT,
];

/// The sets of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Bounding, permitted and effective.
    pub held: CapsHashSet,
    /// Of those, what was asked for by name: a user who is not root keeps it over execve.
    pub added: CapsHashSet,
    /// Of those, what every user keeps over execve, root too.
    pub ambient: CapsHashSet,
}

/// A name that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CapabilityError {
    /// No kernel knows it.
    #[error("unknown capability {0}")]
    Unknown(String),
    /// It would be ambient without being permitted, which the kernel refuses (capabilities(7)).
    #[error("capability {0} cannot be ambient: the container does not have it")]
    NotHeld(String),
}

pub(crate) fn parse(name: &str) -> Result<Capability, CapabilityError> {
    caps::to_canonical(name)
        .parse()
        .map_err(|_unnamed: CapsError| CapabilityError::Unknown(name.into()))
}

/// Works out the sets: `ALL` first, then single additions, then single removals.
pub fn plan(spec: &CapabilitySpec) -> Result<Capabilities, CapabilityError> {
    let all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
    let single = |names: &[String]| {
        names
            .iter()
            .filter(|name| !name.eq_ignore_ascii_case("ALL"))
            .map(|name| parse(name))
            .collect::<Result<HashSet<_>, _>>()
    };
    let (add, drop) = (single(&spec.add)?, single(&spec.drop)?);
    let ambient = |held: &CapsHashSet| -> Result<CapsHashSet, CapabilityError> {
        if all(&spec.ambient) {
            return Ok(held.clone());
        }
        let one = |name: &String| match parse(name)? {
            capability if held.contains(&capability) => Ok(capability),
            _ => Err(CapabilityError::NotHeld(name.clone())),
        };
        spec.ambient.iter().map(one).collect()
    };
    if spec.privileged {
        let held = caps::all();
        return Ok(Capabilities {
            ambient: ambient(&held)?,
            held,
            added: HashSet::new(),
        });
    }
    let mut held: CapsHashSet = if all(&spec.add) {
        caps::all()
    } else if all(&spec.drop) {
        HashSet::new()
    } else {
        DEFAULT.into_iter().collect()
    };
    held.extend(&add);
    held.retain(|capability| !drop.contains(capability));
    let added = add.intersection(&held).copied().collect();
    let ambient = ambient(&held)?;
    Ok(Capabilities {
        held,
        added,
        ambient,
    })
}

impl Capabilities {
    /// Lowers the bounding set. Needs CAP_SETPCAP, so it comes before the user changes.
    pub(crate) fn bound(&self, supported: &CapsHashSet) -> Result<(), CapsError> {
        supported
            .difference(&self.held)
            .try_for_each(|capability| caps::drop(None, CapSet::Bounding, *capability))
    }

    /// Sets the other sets. The permitted set must have been kept over the change of user.
    /// The inheritable set is empty but for what is ambient: programs with file capabilities must
    /// not gain more than they would elsewhere.
    pub(crate) fn apply(&self, supported: &CapsHashSet, root: bool) -> Result<(), CapsError> {
        let held: CapsHashSet = self.held.intersection(supported).copied().collect();
        let mut ambient = self.ambient.clone();
        if !root {
            ambient.extend(&self.added);
        }
        ambient.retain(|capability| supported.contains(capability));
        caps::clear(None, CapSet::Effective)?;
        caps::set(None, CapSet::Inheritable, &ambient)?;
        caps::set(None, CapSet::Permitted, &held)?;
        caps::set(None, CapSet::Effective, &held)?;
        caps::clear(None, CapSet::Ambient)?;
        ambient
            .iter()
            .try_for_each(|capability| caps::raise(None, CapSet::Ambient, *capability))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(add: &[&str], drop: &[&str]) -> Capabilities {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        plan(&CapabilitySpec {
            add: names(add),
            drop: names(drop),
            ..CapabilitySpec::default()
        })
        .unwrap()
    }

    #[test]
    fn additions_and_removals_follow_the_engines() {
        assert_eq!(of(&[], &[]).held.len(), 14);
        assert_eq!(of(&[], &["ALL"]).held.len(), 0);
        assert_eq!(
            of(&["NET_BIND_SERVICE"], &["all"]).held,
            [Capability::CAP_NET_BIND_SERVICE].into()
        );
        assert_eq!(of(&["cap_net_admin"], &[]).held.len(), 15);
        assert_eq!(
            of(&["ALL"], &["CAP_SYS_ADMIN"]).held.len(),
            caps::all().len() - 1
        );
        assert!(of(&["SYS_TIME"], &["SYS_TIME"]).added.is_empty());
        let bad = plan(&CapabilitySpec {
            add: vec!["FLY".into()],
            ..Default::default()
        });
        assert_eq!(bad, Err(CapabilityError::Unknown("FLY".into())));
    }

    #[test]
    fn only_what_is_held_can_be_ambient() {
        let of = |add: &[&str], drop: &[&str], ambient: &[&str], privileged| {
            let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            plan(&CapabilitySpec {
                add: names(add),
                drop: names(drop),
                ambient: names(ambient),
                privileged,
            })
        };
        let bind: CapsHashSet = [Capability::CAP_NET_BIND_SERVICE].into();
        let planned = of(&[], &[], &["net_bind_service"], false).unwrap();
        assert_eq!(planned.ambient, bind);
        let planned = of(&["NET_BIND_SERVICE"], &["ALL"], &["ALL"], false).unwrap();
        assert_eq!(planned.ambient, bind);
        assert_eq!(of(&[], &[], &["SYS_TIME"], true).unwrap().ambient.len(), 1);
        for (drop, ambient, wrong) in [
            (
                &[][..],
                "SYS_TIME",
                CapabilityError::NotHeld("SYS_TIME".into()),
            ),
            (
                &["CHOWN"],
                "CHOWN",
                CapabilityError::NotHeld("CHOWN".into()),
            ),
            (&[], "FLY", CapabilityError::Unknown("FLY".into())),
        ] {
            assert_eq!(of(&[], drop, &[ambient], false), Err(wrong));
        }
    }
}
