//! Life in a user namespace.
//!
//! Mounts are made by the guest's root, outside of it, for that takes rights over the file systems;
//! what is made in them belongs to the container's root. Then the child enters the namespace and
//! makes its mount namespace anew, so that the container's root may mount, as far as its
//! capabilities go, and cannot undo what was mounted for it.

use std::os::fd::{AsFd, OwnedFd};

use caps::CapSet;
use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::{Gid, Uid, setfsgid, setfsuid},
};

use crate::{
    child::{Because, Refusal},
    spec::UserMap,
    user::Identity,
};

/// Makes files from here on belong to these ids of the guest's, with all rights to make them.
pub(crate) fn create_as(uid: u32, gid: u32) -> Result<(), Refusal> {
    let failed = "cannot act for the container's root";
    setfsgid(Gid::from_raw(gid));
    setfsuid(Uid::from_raw(uid));
    // Leaving fsuid 0 drops the rights over files (capabilities(7)).
    let permitted = caps::read(None, CapSet::Permitted).or_machine(failed)?;
    caps::set(None, CapSet::Effective, &permitted).or_machine(failed)
}

/// The ids outside of a user inside.
pub(crate) fn outside(users: Option<UserMap>, identity: &Identity) -> Result<(u32, u32), Refusal> {
    let Some(users) = users else {
        return Ok((identity.uid, identity.gid));
    };
    let mapped = |what: &str, map: crate::spec::IdMap, id: u32| {
        map.outside(id).ok_or_else(|| {
            let count = map.count;
            Refusal::invalid(format!(
                "{what} {id} is not in the pod's user namespace, which has 0 to {}",
                count.saturating_sub(1)
            ))
        })
    };
    for group in &identity.groups {
        mapped("group", users.gids, *group)?;
    }
    Ok((
        mapped("user", users.uids, identity.uid)?,
        mapped("group", users.gids, identity.gid)?,
    ))
}

/// Where a process enters a user namespace.
#[derive(Debug)]
pub(crate) enum Door {
    /// The namespace itself. The mount namespace is made anew.
    Namespace(OwnedFd),
    /// That of this process, whose mount namespace has been entered.
    Process(OwnedFd),
}

/// Enters the namespace with all capabilities in it and none outside.
pub(crate) fn enter(door: &Door) -> Result<(), Refusal> {
    let failed = "cannot enter the pod's user namespace";
    let (fd, anew) = match door {
        Door::Namespace(fd) => (fd, true),
        Door::Process(fd) => (fd, false),
    };
    setns(fd.as_fd(), CloneFlags::CLONE_NEWUSER).or_machine(failed)?;
    if anew {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)
            .or_machine("cannot make the container's namespaces its own")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::IdMap;

    #[test]
    fn only_mapped_ids_have_one_outside() {
        let map = IdMap {
            first: 1000,
            count: 10,
        };
        assert_eq!(map.outside(0), Some(1000));
        assert_eq!((map.outside(9), map.outside(10)), (Some(1009), None));
        let users = Some(UserMap {
            uids: map,
            gids: IdMap {
                first: 2000,
                count: 70_000,
            },
        });
        let mut identity = Identity {
            uid: 3,
            gid: 4,
            groups: vec![50_000],
            home: None,
        };
        assert_eq!(outside(users, &identity).unwrap(), (1003, 2004));
        assert_eq!(outside(None, &identity).unwrap(), (3, 4));
        identity.groups = vec![70_000];
        outside(users, &identity).unwrap_err();
        identity.groups.clear();
        identity.uid = 10;
        outside(users, &identity).unwrap_err();
    }
}
