//! Makes the VM a pod: identity, clock, entropy, network, disks. And its end.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::{Component, Path},
    time::Duration,
};

use hypernetes_agent_api::{SCRATCH_DIRECTORIES, v1};
use hypernetes_container::{FileBind, UserMap, open_beneath, sys};
use nix::mount::{MsFlags, mount};
use rustix::{
    fs::OFlags,
    io::Errno,
    system::{RebootCommand, reboot, sethostname},
    time::{ClockId, Timespec, clock_settime},
};

use tokio::time::{Instant, sleep};

use crate::{
    boot::dir,
    console::log,
    disks,
    error::{Attempt, GuestError},
    net,
    pod::now,
};

const MAX_FILES: usize = 64;
/// How long a rehearsal may keep its disk busy after its end.
const LET_GO: Duration = Duration::from_secs(5);
/// How long the pod's end waits for the same: nobody reads this disk again.
const AT_THE_END: Duration = Duration::from_millis(500);
/// Nanoseconds from which on a clock is set: making up for it would take minutes. As ntpd(8) does.
const STEP: u64 = 128_000_000;
const DEFAULT_SHM: u64 = 64 * 1024 * 1024;

/// Sets the clock from the node's. Done at every configuration, also of a pod that has one.
pub(crate) fn set_clock(unix_nanos: i64) -> Result<(), GuestError> {
    if unix_nanos <= 0 {
        return Err(GuestError::invalid("the node's clock is missing"));
    }
    let time = Timespec {
        tv_sec: unix_nanos / 1_000_000_000,
        tv_nsec: unix_nanos % 1_000_000_000,
    };
    clock_settime(ClockId::Realtime, time).attempt("set the clock")
}

/// Changes the clock by an amount and tells it. Small amounts are made up for bit by bit, so that time
/// neither jumps nor goes back for programs.
pub(crate) fn adjust_clock(nanos: i64) -> Result<i64, GuestError> {
    let attempt = "change the clock";
    if nanos.unsigned_abs() >= STEP {
        let wanted = i128::from(now()) + i128::from(nanos);
        let wanted = i64::try_from(wanted).ok().filter(|wanted| *wanted > 0);
        let wanted = wanted.ok_or_else(|| GuestError::invalid("there is no such time"))?;
        // What was left of an earlier change was measured before this one.
        sys::slew_clock(0).attempt(attempt)?;
        set_clock(wanted)?;
    } else if nanos != 0 {
        sys::slew_clock(nanos / 1000).attempt(attempt)?;
    }
    Ok(now())
}

/// Mixes the node's entropy in: VMs cloned from one template would else draw the same numbers.
pub(crate) fn add_entropy(seed: &[u8]) -> Result<(), GuestError> {
    let seed = <[u8; 32]>::try_from(seed)
        .map_err(|_wrong| GuestError::invalid("the seed must have 32 bytes"))?;
    sys::add_entropy(seed).attempt("add entropy")
}

/// Everything else, in files of the containers' root. May be repeated after a failure. Returns the files to bind into containers.
pub(crate) async fn configure(
    request: &v1::ConfigureSandboxRequest,
    owner: Option<UserMap>,
) -> Result<Vec<FileBind>, GuestError> {
    set_host_name(&request.hostname)?;
    for interface in &request.interfaces {
        net::configure(interface)?;
    }
    for (name, value) in &request.sysctls {
        set_sysctl(name, value)?;
    }
    mount_scratch(request.scratch_slot).await?;
    mount_shm(request.shm_size)?;
    let files = write_files(&request.files)?;
    let paths = files.iter().map(|file| file.source.as_path());
    for path in paths.chain([Path::new(dir::SHM)]) {
        give(path, owner).attempt("hand the pod's files over")?;
    }
    Ok(files)
}

/// Sets the host name of the pod.
pub(crate) fn set_host_name(hostname: &str) -> Result<(), GuestError> {
    if hostname.is_empty() || hostname.len() > 64 || hostname.contains(char::is_control) {
        return Err(GuestError::Invalid(format!("{hostname:?} is no host name")));
    }
    sethostname(hostname.as_bytes()).attempt("set the host name")
}

/// Makes the containers' root own a file of the agent's. What is made in it follows by itself.
pub(crate) fn give(path: &Path, owner: Option<UserMap>) -> io::Result<()> {
    match owner {
        Some(map) => chown(path, Some(map.uids.first), Some(map.gids.first)),
        None => Ok(()),
    }
}

pub(crate) fn is_mounted(path: &str) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(path))
}

async fn mount_scratch(slot: u32) -> Result<(), GuestError> {
    if !is_mounted(dir::SCRATCH) {
        match slot {
            0 => mount(
                Some("scratch"),
                dir::SCRATCH,
                Some("tmpfs"),
                MsFlags::empty(),
                Some("mode=0755"),
            )
            .attempt("mount the scratch tmpfs")?,
            slot if disks::SLOTS.contains(&slot) => {
                let device = disks::find(slot).await?;
                let flags = MsFlags::MS_NOATIME;
                let options = Some(disks::SPARSE);
                disks::mount_disk(device, dir::SCRATCH.into(), "ext4", flags, options).await?;
            }
            slot => return Err(GuestError::Invalid(format!("there is no slot {slot}"))),
        }
    }
    for name in SCRATCH_DIRECTORIES {
        fs::create_dir_all(Path::new(dir::SCRATCH).join(name))
            .attempt("prepare the scratch disk")?;
    }
    Ok(())
}

fn mount_shm(size: u64) -> Result<(), GuestError> {
    if is_mounted(dir::SHM) {
        return Ok(());
    }
    let size = if size == 0 { DEFAULT_SHM } else { size };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode=1777,size={size}");
    mount(
        Some("shm"),
        dir::SHM,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )
    .attempt("mount the shared memory")
}

/// Sets one kernel parameter of the VM. Only what is below /proc/sys.
fn set_sysctl(name: &str, value: &str) -> Result<(), GuestError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if name.is_empty()
        || !name.chars().all(plain)
        || name.contains("..")
        || name.starts_with(['.', '/'])
    {
        return Err(GuestError::Invalid(format!("{name:?} is no sysctl")));
    }
    // `net/ipv4/conf/eth0.1/x` has slashes where names have dots.
    let path = if name.contains('/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    };
    let set = || -> io::Result<()> {
        let root = fs::File::open("/proc/sys")?;
        let file = open_beneath(&root, &path, OFlags::WRONLY)?;
        io::Write::write_all(&mut fs::File::from(file), value.as_bytes())
    };
    set().attempt(format!("set sysctl {name}"))
}

/// Writes the files that are bound into containers, where they are: those that run see the new content.
pub(crate) fn write_files(files: &[v1::File]) -> Result<Vec<FileBind>, GuestError> {
    if files.len() > MAX_FILES {
        return Err(GuestError::Invalid(format!("more than {MAX_FILES} files")));
    }
    let mut binds = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let mut components = Path::new(&file.path).components();
        let absolute = components.next() == Some(Component::RootDir);
        if !absolute
            || !components.all(|part| matches!(part, Component::Normal(_)))
            || file.path.contains('\0')
        {
            return Err(GuestError::Invalid(format!(
                "file {:?} is not an absolute plain path",
                file.path
            )));
        }
        let source = Path::new(dir::FILES).join(index.to_string());
        fs::write(&source, &file.content).attempt(format!("write {}", file.path))?;
        let mode = if file.mode == 0 {
            0o644
        } else {
            file.mode & 0o777
        };
        fs::set_permissions(&source, PermissionsExt::from_mode(mode))
            .attempt(format!("write {}", file.path))?;
        binds.push(FileBind {
            source,
            destination: file.path.clone(),
        });
    }
    Ok(binds)
}

/// Takes back what [`configure`] has mounted and written, and the content of volumes.
pub(crate) async fn forget() -> Result<(), GuestError> {
    for place in [dir::SCRATCH, dir::SHM] {
        let_go(place, LET_GO)
            .await
            .attempt(format!("unmount {place}"))?;
    }
    for place in [dir::FILES, dir::VOLUMES] {
        disks::blocking(move || {
            for entry in fs::read_dir(place)? {
                let entry = entry?;
                match entry.file_type()?.is_dir() {
                    true => fs::remove_dir_all(entry.path())?,
                    false => fs::remove_file(entry.path())?,
                }
            }
            Ok(())
        })
        .await
        .attempt(format!("empty {place}"))?;
    }
    Ok(())
}

/// Unmounts what is mounted there. What a container wrote is deleted behind its back, and keeps the disk busy
/// meanwhile: that is waited for, as long as `patience` lasts.
async fn let_go(place: &'static str, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    while is_mounted(place) {
        match disks::blocking(move || Ok(nix::mount::umount(place)?)).await {
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
                    && Instant::now() < deadline =>
            {
                sleep(Duration::from_millis(5)).await;
            }
            unmounted => unmounted?,
        }
    }
    Ok(())
}

/// Lets go of the disk, in order.
pub(crate) async fn unmount_scratch() {
    let unmounted = async {
        disks::blocking(|| {
            rustix::fs::sync();
            Ok(())
        })
        .await?;
        let_go(dir::SCRATCH, AT_THE_END).await
    };
    match tokio::time::timeout(Duration::from_secs(5), unmounted).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log!("cannot unmount the scratch disk: {error}"),
        Err(_) => log!("the scratch disk does not answer"),
    }
}

/// Ends the VM: the VMM was told to exit at a reboot, which with `reboot=t` is one fault away.
pub(crate) fn power_off() {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::Restart) {
        log!("cannot reboot: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stay_below_proc_sys() {
        for bad in ["", "..", "a/../../x", "/kernel/x", "kernel..x", "a b", ".x"] {
            assert!(
                matches!(set_sysctl(bad, "1"), Err(GuestError::Invalid(_))),
                "{bad:?}"
            );
        }
    }
}
