//! A guest that goes on where another pod's was, and becomes a pod of its own.
//!
//! Nothing of the pod's runs meanwhile: the node has frozen its containers before it took the guest's memory,
//! and lets them go on when all of this is done. So they see the new identity or none.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    sync::Arc,
};

use hypernetes_agent_api::v1;
use hypernetes_container::open_beneath;
use rustix::fs::OFlags;

use super::{Pod, Slot, not_configured};
use crate::{
    console::log, container::Container, disks::blocking, error::GuestError, net, request, sandbox,
};

/// Where programs look for an id of their machine (machine-id(5)).
const MACHINE_ID: &str = "etc/machine-id";

impl Pod {
    /// Replaces the identity that [`Pod::configure`] gave. May be repeated.
    pub(crate) async fn personalize(
        &self,
        request: v1::PersonalizeRequest,
    ) -> Result<(), GuestError> {
        let v1::PersonalizeRequest {
            sandbox: wanted,
            containers,
            machine_id,
        } = request;
        let wanted = wanted.ok_or_else(|| GuestError::invalid("the sandbox is missing"))?;
        check(&containers, &machine_id)?;
        let _one_at_a_time = self.0.configuring.lock().await;
        let known = self.lock().configured.clone();
        let known = known.ok_or_else(not_configured)?;
        sandbox::set_clock(wanted.unix_nanos)?;
        sandbox::add_entropy(&wanted.seed)?;
        sandbox::set_host_name(&wanted.hostname)?;
        for interface in &known.interfaces {
            net::deconfigure(interface)?;
        }
        for interface in &wanted.interfaces {
            net::configure(interface)?;
        }
        let files = sandbox::write_files(&wanted.files)?;
        for container in self.containers() {
            set_machine_id(container, machine_id.clone()).await;
        }
        let mut state = self.lock();
        state.files = files;
        state.configured = Some(v1::ConfigureSandboxRequest {
            unix_nanos: 0,
            seed: Vec::new(),
            ..wanted
        });
        for v1::Renamed { from, to } in &containers {
            match state.containers.remove(from) {
                Some(Slot::There(container)) => {
                    container.rename(to);
                    state.containers.insert(to.clone(), Slot::There(container));
                }
                // An earlier call has done it.
                None => {}
                Some(Slot::Reserved) => {
                    state.containers.insert(from.clone(), Slot::Reserved);
                    let message = format!("container {from} is being made");
                    return Err(GuestError::Precondition(message));
                }
            }
        }
        Ok(())
    }
}

fn check(containers: &[v1::Renamed], machine_id: &str) -> Result<(), GuestError> {
    let names = || containers.iter().flat_map(|it| [&it.from, &it.to]);
    if let Some(bad) = names().find(|name| !request::is_plain_name(name)) {
        return Err(GuestError::Invalid(format!("{bad:?} is no container id")));
    }
    let mut all: Vec<_> = names().collect();
    all.sort_unstable();
    if all.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(GuestError::invalid("an id is named twice"));
    }
    match is_machine_id(machine_id.as_bytes()) {
        true => Ok(()),
        false => Err(GuestError::invalid(
            "the machine id must be 32 hexadecimal digits",
        )),
    }
}

fn is_machine_id(bytes: &[u8]) -> bool {
    bytes.len() == 32 && bytes.iter().all(u8::is_ascii_hexdigit)
}

/// Gives a container whose files name a machine id the new one. One that has none, or cannot be written, has
/// what it had: it is the image's, or the tenant's own.
async fn set_machine_id(container: Arc<Container>, id: String) {
    if !container.is_running() {
        return;
    }
    let root = format!("/proc/{}/root", container.pid());
    let set = blocking(move || replace_machine_id(&File::open(root)?, &id));
    if let Err(error) = set.await
        && error.kind() != io::ErrorKind::NotFound
    {
        log!("container {} keeps its machine id: {error}", container.id());
    }
}

fn replace_machine_id(root: &File, id: &str) -> io::Result<()> {
    // No link, no device, nothing that could keep the agent waiting.
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(open_beneath(root, MACHINE_ID, flags)?);
    if !file.metadata()?.is_file() {
        return Ok(());
    }
    let mut text = Vec::new();
    (&file).take(64).read_to_end(&mut text)?;
    if !is_machine_id(text.trim_ascii_end()) {
        return Ok(());
    }
    file.seek(SeekFrom::Start(0))?;
    // As long as what was there.
    file.write_all(id.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_and_each_is_named_once() {
        let id = "0123456789abcdef0123456789abcdef";
        let renamed = |from: &str, to: &str| v1::Renamed {
            from: from.into(),
            to: to.into(),
        };
        check(&[renamed("a", "b"), renamed("c", "d")], id).unwrap();
        for bad in [
            vec![renamed("a", "../b")],
            vec![renamed("", "b")],
            vec![renamed("a", "b"), renamed("a", "c")],
            vec![renamed("a", "b"), renamed("b", "c")],
            vec![renamed("a", "a")],
        ] {
            assert!(matches!(check(&bad, id), Err(GuestError::Invalid(_))));
        }
        for bad in ["", "x", "0123456789abcdef0123456789abcdeg"] {
            assert!(matches!(check(&[], bad), Err(GuestError::Invalid(_))));
        }
    }

    #[test]
    fn only_a_machine_id_is_replaced() {
        let id = "0123456789abcdef0123456789abcdef";
        let old = "ffffffffffffffffffffffffffffffff";
        let temp = tempfile::tempdir().unwrap();
        let root = File::open(temp.path()).unwrap();
        assert!(replace_machine_id(&root, id).is_err());
        std::fs::create_dir(temp.path().join("etc")).unwrap();
        let path = temp.path().join(MACHINE_ID);
        for (before, after) in [
            (format!("{old}\n"), format!("{id}\n")),
            (old.to_owned(), id.to_owned()),
            (String::new(), String::new()),
            ("uninitialized\n".to_owned(), "uninitialized\n".to_owned()),
            (format!("{old}{old}"), format!("{old}{old}")),
        ] {
            std::fs::write(&path, &before).unwrap();
            replace_machine_id(&root, id).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
        }
        let secret = temp.path().join("secret");
        std::fs::write(&secret, old).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        assert!(replace_machine_id(&root, id).is_err());
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), old);
    }
}
