//! A sandbox on the host: what its containers share.

use std::{
    fs, io,
    path::Path,
    sync::{Arc, PoisonError},
};

use hypernetes_runtime::{
    DnsConfig, Failure, HostPod, RuntimeError, SandboxConfig, check_sandbox, network_request,
};
use hypernetes_telemetry::chain;
use hypernetes_types::SandboxId;
use nix::mount::{MsFlags, mount};

use crate::{
    cgroup::Hierarchies,
    container,
    namespaces::{self, Scope, Wanted},
    pause,
    process::Process,
    records::{Place, SandboxPhase, SandboxRecord, blocking, invalid, state},
    rootfs::{remove_directory, unmount},
    runtime::{Inner, Sandbox},
};

/// Shared memory of a pod, as other engines have it.
const SHM: &str = "mode=1777,size=65536k";

fn host_of(config: &SandboxConfig) -> Result<&HostPod, RuntimeError> {
    let host = config.host.as_ref();
    host.ok_or_else(|| invalid("host", "must be given for a pod on the host"))
}

/// Group of the process that holds a shared process namespace.
fn pause_cgroup(record: &SandboxRecord) -> String {
    format!("{}/hypernetes-pause-{}", record.cgroup(), record.id)
}

/// Refuses what cannot be, before anything is done.
fn check(config: &SandboxConfig) -> Result<(), RuntimeError> {
    let host = host_of(config)?;
    check_sandbox(config)?;
    if config.user_namespace.is_some() {
        return Err(invalid("user_namespace", "is not for a pod on the host"));
    }
    for name in config.sysctls.keys() {
        let refused = |rule: &str| Err(invalid(format!("sysctls[{name}]"), rule));
        match namespaces::scope(name) {
            Scope::Host => return refused("counts for all of the host, not for a pod"),
            Scope::Net | Scope::Uts if config.network.is_none() => {
                return refused("cannot be set for a pod in the host's network");
            }
            Scope::Ipc if host.host_ipc => {
                return refused("cannot be set for a pod with the host's IPC");
            }
            Scope::Net | Scope::Uts | Scope::Ipc => {}
        }
    }
    Ok(())
}

/// Makes a sandbox, or finds the one of the same uid and attempt.
pub(crate) async fn run(
    inner: &Arc<Inner>,
    config: SandboxConfig,
) -> Result<SandboxId, RuntimeError> {
    check(&config)?;
    loop {
        let (sandbox, work) = {
            let mut all = inner
                .sandboxes
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let wanted = &config.metadata;
            let found = all.values().find(|sandbox| {
                let known = sandbox.record().config.metadata;
                known.uid == wanted.uid && known.attempt == wanted.attempt
            });
            if let Some(sandbox) = found {
                (Arc::clone(sandbox), None)
            } else {
                let record = SandboxRecord::new(config.clone(), inner.boot.clone());
                let id = record.id.clone();
                let sandbox = Sandbox::new(record);
                let work = Arc::clone(&sandbox.work).try_lock_owned().ok();
                all.insert(id, Arc::clone(&sandbox));
                (sandbox, work)
            }
        };
        if work.is_some() {
            let made = make(inner, &sandbox).await;
            let id = sandbox.record().id;
            if let Err(error) = made {
                if let Err(left) = remove(inner, &sandbox).await {
                    tracing::error!(sandbox = %id, error = %chain(&left), "cannot undo the start of a sandbox");
                }
                return Err(error);
            }
            return Ok(id);
        }
        let _settled = sandbox.work.lock().await;
        let record = sandbox.record();
        if inner.sandbox(&record.id).is_err() {
            // Its start failed and was undone meanwhile: this one tries anew.
            continue;
        }
        if record.phase == SandboxPhase::Ready && record.failure.is_none() {
            return Ok(record.id);
        }
        let phase = format!("{:?}", record.phase).to_lowercase();
        return Err(state("run", "sandbox", &record.id, phase));
    }
}

async fn make(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Result<(), RuntimeError> {
    let record = sandbox.record();
    let (group, log_directory) = (record.cgroup(), record.config.log_directory.clone());
    let (made_cgroup, owns_log_directory) = blocking("look at the host's cgroups", move || {
        Ok((
            Hierarchies::read()?.first_missing(&group),
            !log_directory.exists(),
        ))
    })
    .await?;
    // What was made for another pod and is above this one too goes with the last of them.
    let others = inner.all_sandboxes();
    let above = others
        .iter()
        .filter_map(|other| other.record().made_cgroup)
        .filter(|made| Path::new(&record.cgroup()).starts_with(made));
    let made_cgroup = above.chain(made_cgroup).min_by_key(String::len);
    let record = inner
        .change_sandbox(sandbox, |record| {
            record.made_cgroup = made_cgroup;
            record.owns_log_directory = owns_log_directory;
        })
        .await?;
    let record = match &record.config.network {
        None => record,
        Some(network) => {
            let request = network_request(&record.config);
            let driver = &inner.config.network;
            let joined = driver.join(&record.id, network, &request).await?;
            let place = Place {
                namespace: joined.namespace,
                lease: joined.lease,
            };
            let placed = |record: &mut SandboxRecord| record.place = Some(place);
            inner.change_sandbox(sandbox, placed).await?
        }
    };
    let directory = inner.sandbox_dir(&record.id);
    let (work, place) = (record.clone(), directory.clone());
    blocking("set the sandbox up", move || set_up(&work, &place)).await?;
    if record.config.share_process_namespace {
        let (program, place) = (inner.config.pause.clone(), directory.clone());
        let (id, group) = (record.id.clone(), pause_cgroup(&record));
        let child = blocking("share a process namespace", move || {
            let child = pause::start(&program, &id, &group, &place.join("pid"))?;
            fs::write(place.join("pause.pid"), child.id().to_string())?;
            Ok(child)
        })
        .await?;
        watch_pause(inner, sandbox, child.id(), Some(child));
    }
    let ready = |record: &mut SandboxRecord| record.phase = SandboxPhase::Ready;
    inner.change_sandbox(sandbox, ready).await.map(drop)
}

/// Notes the end of a pod's shared process namespace, which takes all of its containers along.
pub(crate) fn watch_pause(
    inner: &Arc<Inner>,
    sandbox: &Arc<Sandbox>,
    pid: u32,
    child: Option<std::process::Child>,
) {
    let id = sandbox.record().id;
    let process = Process::find(pid, &[id.as_str()]).ok().flatten();
    let (inner, sandbox) = (Arc::downgrade(inner), Arc::downgrade(sandbox));
    tokio::spawn(async move {
        if let Some(process) = process {
            process.ended().await;
        }
        if let Some(mut child) = child {
            drop(tokio::task::spawn_blocking(move || child.wait()).await);
        }
        let (Some(inner), Some(sandbox)) = (inner.upgrade(), sandbox.upgrade()) else {
            return;
        };
        let _work = sandbox.work.lock().await;
        let record = sandbox.record();
        if record.phase != SandboxPhase::Ready || record.failure.is_some() {
            return;
        }
        let failure = Failure {
            reason: "PauseDied".to_owned(),
            message: "the first process of the shared process namespace ended".to_owned(),
        };
        let noted = inner.change_sandbox(&sandbox, |record| record.failure = Some(failure));
        if let Err(error) = noted.await {
            tracing::error!(sandbox = %id, error = %chain(&error), "cannot note the end of a sandbox");
        }
    });
}

fn set_up(record: &SandboxRecord, directory: &Path) -> io::Result<()> {
    let config = &record.config;
    let host = config.host.unwrap_or_default();
    fs::create_dir_all(&config.log_directory)?;
    fs::create_dir_all(directory)?;
    let hosts = match record.host_network() {
        true => fs::read_to_string("/etc/hosts").unwrap_or_default(),
        false => hosts(record),
    };
    fs::write(
        directory.join("hostname"),
        format!("{}\n", record.hostname()),
    )?;
    fs::write(directory.join("hosts"), hosts)?;
    let resolver = match (&config.dns, &record.place) {
        (dns, _) if *dns != DnsConfig::default() => resolv_conf(dns),
        // The network's own, if it has any.
        (_, Some(place)) if !place.lease.dns.is_empty() => resolv_conf(&DnsConfig {
            servers: place.lease.dns.iter().map(ToString::to_string).collect(),
            searches: place.lease.search.clone(),
            options: Vec::new(),
        }),
        _ => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    fs::write(directory.join("resolv.conf"), resolver)?;
    if !host.host_ipc {
        let shm = directory.join("shm");
        fs::create_dir_all(&shm)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(SHM))?;
    }
    let wanted = Wanted {
        hostname: (!record.host_network()).then(|| config.hostname.clone()),
        ipc: !host.host_ipc,
        netns: record.netns(),
        sysctls: config.sysctls.clone().into_iter().collect(),
    };
    namespaces::make(&wanted, directory)
}

fn hosts(record: &SandboxRecord) -> String {
    let config = &record.config;
    let mut lines = vec![
        "127.0.0.1\tlocalhost".to_owned(),
        "::1\tlocalhost ip6-localhost ip6-loopback".to_owned(),
    ];
    if let Some(Place { lease, .. }) = &record.place {
        let all = [lease.address].into_iter().chain(lease.more_addresses());
        lines.extend(all.map(|address| format!("{address}\t{}", config.hostname)));
    }
    for alias in &config.hosts {
        lines.push(format!("{}\t{}", alias.address, alias.names.join(" ")));
    }
    lines.join("\n") + "\n"
}

fn resolv_conf(dns: &DnsConfig) -> String {
    let servers = dns
        .servers
        .iter()
        .map(|server| format!("nameserver {server}\n"));
    let mut text: String = servers.collect();
    for (keyword, words) in [("search", &dns.searches), ("options", &dns.options)] {
        if !words.is_empty() {
            text.push_str(&format!("{keyword} {}\n", words.join(" ")));
        }
    }
    text
}

/// Ends what runs and lets go of what is shared. Call with the work lock.
pub(crate) async fn stop(inner: &Arc<Inner>, sandbox: &Sandbox) -> Result<(), RuntimeError> {
    let record = sandbox.record();
    if record.phase == SandboxPhase::Stopped {
        return Ok(());
    }
    if record.phase != SandboxPhase::Removing {
        let stopping = |record: &mut SandboxRecord| record.phase = SandboxPhase::Stopping;
        inner.change_sandbox(sandbox, stopping).await?;
    }
    let containers = inner.containers_of(Some(&record.id));
    let stops = containers
        .iter()
        .map(|container| container::stop(inner, container, std::time::Duration::ZERO));
    for stopped in futures::future::join_all(stops).await {
        stopped?;
    }
    release(inner, &record).await?;
    if sandbox.record().phase != SandboxPhase::Removing {
        let stopped = |record: &mut SandboxRecord| record.phase = SandboxPhase::Stopped;
        inner.change_sandbox(sandbox, stopped).await?;
    }
    Ok(())
}

/// Takes away what the containers shared. Idempotent.
async fn release(inner: &Inner, record: &SandboxRecord) -> Result<(), RuntimeError> {
    let cgroups = blocking("find the host's cgroups", Hierarchies::read).await?;
    let group = pause_cgroup(record);
    cgroups.kill(&group, inner.config.patience).await?;
    let directory = inner.sandbox_dir(&record.id);
    blocking("let go of what a sandbox shared", move || {
        namespaces::unpin(&directory)?;
        unmount(&directory.join("shm"))?;
        cgroups.remove(&group)?;
        remove_directory(&directory)
    })
    .await?;
    if record.config.network.is_some() {
        inner.config.network.detach(&record.id).await?;
    }
    Ok(())
}

/// Stops and forgets a sandbox with its containers. Call with the work lock.
pub(crate) async fn remove(inner: &Arc<Inner>, sandbox: &Sandbox) -> Result<(), RuntimeError> {
    let record = sandbox.record();
    if inner.sandbox(&record.id).is_err() {
        return Ok(());
    }
    let removing = |record: &mut SandboxRecord| record.phase = SandboxPhase::Removing;
    let record = inner.change_sandbox(sandbox, removing).await?;
    stop(inner, sandbox).await?;
    for container in inner.containers_of(Some(&record.id)) {
        container::remove(inner, &container).await?;
    }
    let (group, made) = (record.cgroup(), record.made_cgroup.clone());
    let logs = record
        .owns_log_directory
        .then(|| record.config.log_directory.clone());
    blocking("clear a sandbox away", move || {
        if let Some(made) = made {
            Hierarchies::read()?.remove_up_to(&group, &made);
        }
        if let Some(logs) = logs {
            // Only if nothing of others is in it.
            match fs::remove_dir(&logs) {
                Ok(()) => {}
                Err(error) => {
                    tracing::debug!(path = %logs.display(), %error, "a log directory stays");
                }
            }
        }
        Ok(())
    })
    .await?;
    inner.records.delete_sandbox(&record.id).await?;
    inner.forget_sandbox(&record.id);
    Ok(())
}

/// Writes down that a sandbox did not survive a boot of the host.
pub(crate) async fn lose(inner: &Inner, sandbox: &Sandbox) -> Result<(), RuntimeError> {
    let failure = Failure {
        reason: "NodeRestarted".to_owned(),
        message: "the host was booted anew".to_owned(),
    };
    let record = inner
        .change_sandbox(sandbox, |record| record.failure = Some(failure))
        .await?;
    let directory = inner.sandbox_dir(&record.id);
    blocking("clear a lost sandbox away", move || {
        namespaces::unpin(&directory)?;
        unmount(&directory.join("shm"))?;
        remove_directory(&directory)
    })
    .await?;
    if record.config.network.is_some() {
        inner.config.network.detach(&record.id).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_network_are_as_asked() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.local".into(), "local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns),
            "nameserver 10.0.0.10\nsearch a.local local\noptions ndots:5\n"
        );
    }
}
