//! The pod's user namespace, and the namespaces that belong to it: network, IPC and UTS.
//!
//! A VM is one pod, so its containers share the guest's own namespaces. A pod with a user namespace
//! needs others, or its root could not open a low port: rights over a network are those in the user
//! namespace that the network belongs to. A child makes them, the pod's devices are moved in, and
//! the agent's first thread, which makes all children and sockets, moves after them.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use hypernetes_agent_api::v1;
use hypernetes_container::{IdMap, Job, PidNamespace, Reply, Spawned, UserMap};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns},
};

use crate::{
    boot::dir,
    disks::blocking,
    error::{Attempt, GuestError},
    net,
    pod::{PREPARE, open_pid},
    reaper::Reaper,
};

/// A user namespace, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Users {
    pub(crate) map: UserMap,
    pub(crate) namespace: OwnedFd,
}

/// Which ids are asked for.
pub(crate) fn map(asked: &v1::UserNamespace) -> Result<UserMap, GuestError> {
    let ids = |what: &str, asked: Option<&v1::IdMapping>| {
        let asked = asked.copied().unwrap_or_default();
        // The last number stands for "no id".
        let fits = asked.first.checked_add(asked.count);
        if asked.count == 0 || fits.is_none() {
            return Err(GuestError::Invalid(format!(
                "the user namespace has no {what}, or more than there are"
            )));
        }
        Ok(IdMap {
            first: asked.first,
            count: asked.count,
        })
    };
    Ok(UserMap {
        uids: ids("users", asked.uids.as_ref())?,
        gids: ids("groups", asked.gids.as_ref())?,
    })
}

/// Makes the namespaces and moves in, with the devices of these interfaces.
pub(crate) async fn move_in(
    reaper: &Reaper,
    map: UserMap,
    interfaces: &[v1::Interface],
) -> Result<Users, GuestError> {
    let (Spawned { pid, control }, _ended) = reaper.spawn(PidNamespace::New)?;
    let child = open_pid(pid)?;
    let (control, answer) = blocking(move || {
        control.set_deadline(PREPARE).map_err(io::Error::other)?;
        control
            .send_job(&Job::Namespaces, &[])
            .map_err(io::Error::other)?;
        let (answer, _) = control.answer().map_err(io::Error::other)?;
        Ok((control, answer))
    })
    .await
    .attempt("make the pod's user namespace")?;
    expect_ready(Some(answer))?;
    for (file, ids) in [("uid_map", map.uids), ("gid_map", map.gids)] {
        let line = format!("0 {} {}\n", ids.first, ids.count);
        fs::write(format!("/proc/{pid}/{file}"), line)
            .attempt(format!("write the user namespace's {file}"))?;
    }
    let (control, answer) = blocking(move || {
        let answer = control.open_gate().map_err(io::Error::other)?;
        Ok((control, answer))
    })
    .await
    .attempt("make the pod's namespaces")?;
    expect_ready(answer)?;

    let open = |kind: &str| {
        fs::File::open(format!("/proc/{pid}/ns/{kind}")).attempt("open the pod's namespaces")
    };
    let (users, network) = (open("user")?, open("net")?);
    for interface in interfaces {
        net::move_device(interface, network.as_fd())?;
    }
    // No pause from here to the end: this is the thread on which all else of the agent happens.
    let flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    setns(child.as_fd(), flags).attempt("enter the pod's namespaces")?;
    mount_sys().attempt("mount the /sys of the pod's network")?;
    net::loopback_up()?;
    drop(control);
    Ok(Users {
        map,
        namespace: users.into(),
    })
}

/// A sysfs shows the network of whoever mounts it.
fn mount_sys() -> io::Result<()> {
    fs::create_dir_all(dir::POD_SYS)?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(
        Some("sysfs"),
        Path::new(dir::POD_SYS),
        Some("sysfs"),
        safe,
        None::<&str>,
    )?;
    Ok(())
}

fn expect_ready(answer: Option<Reply>) -> Result<(), GuestError> {
    match answer {
        Some(Reply::Ready { .. }) => Ok(()),
        Some(Reply::Refused { message, .. }) => Err(GuestError::Internal(message)),
        other => Err(GuestError::Internal(format!(
            "the child that makes the pod's namespaces says {other:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_given_and_fit() {
        let ids = |first, count| Some(v1::IdMapping { first, count });
        let of = |uids, gids| map(&v1::UserNamespace { uids, gids });
        let map = of(ids(1000, 65_536), ids(0, u32::MAX)).unwrap();
        assert_eq!((map.uids.first, map.gids.count), (1000, u32::MAX));
        for bad in [None, ids(1000, 0), ids(1000, u32::MAX)] {
            assert!(matches!(of(bad, ids(0, 1)), Err(GuestError::Invalid(_))));
            assert!(matches!(of(ids(0, 1), bad), Err(GuestError::Invalid(_))));
        }
    }
}
