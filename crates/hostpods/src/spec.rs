//! A container's `config.json`: what was asked for, as the OCI runtime takes it.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Component, Path, PathBuf},
};

use caps::{CapSet, Capability};
use hypernetes_container::{CapabilitySpec, capabilities};
use hypernetes_runtime::{
    ContainerUser, HostContainer, HostLimits, HostMount, HostMountSource, PidNamespace,
    Propagation, RuntimeError, Seccomp, SecurityConfig,
};
use oci_spec::{
    OciSpecError,
    runtime::{
        LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxDeviceCgroup,
        LinuxDeviceCgroupBuilder, LinuxHugepageLimitBuilder, LinuxMemoryBuilder, LinuxNamespace,
        LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, LinuxResourcesBuilder, Mount,
        MountBuilder, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
    },
};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::{
    cgroup::Hierarchies,
    devices,
    records::{ContainerRecord, invalid, storage},
    seccomp,
};

/// What a container is made with besides its own record.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    /// Directory of the container: its root file system, its volumes of images.
    pub(crate) bundle: &'a Path,
    /// Directory of the sandbox, with what its containers share.
    pub(crate) sandbox: &'a Path,
    pub(crate) host_ipc: bool,
    /// `None` = the host's network, and its name.
    pub(crate) netns: Option<PathBuf>,
    /// Process namespace of the container that it joins.
    pub(crate) target_pid: Option<PathBuf>,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) user: &'a ContainerUser,
}

fn built<T>(result: Result<T, OciSpecError>) -> Result<T, RuntimeError> {
    result.map_err(|error| storage("build the container's configuration", error))
}

/// Writes `config.json` into the bundle. Blocks.
pub(crate) fn write(record: &ContainerRecord, place: &Place<'_>) -> Result<(), RuntimeError> {
    let spec = build(record, place)?;
    let action = "write the container's configuration";
    let bytes = serde_json::to_vec(&spec).map_err(|error| storage(action, error))?;
    fs::write(place.bundle.join("config.json"), bytes).map_err(|error| storage(action, error))
}

fn build(record: &ContainerRecord, place: &Place<'_>) -> Result<Spec, RuntimeError> {
    let (config, host) = (&record.config, record.host());
    let security = &config.security;
    let held = capabilities_of(security)?;
    let hierarchies = Hierarchies::read().map_err(|e| storage("find the host's cgroups", e))?;
    let private = hierarchies.is_unified() && !security.privileged;
    let mut resources = resources(&host.limits, &hierarchies, &record.cgroup)?;
    let (devices, rules) = devices_of(&host, security)?;
    resources.set_devices(Some(rules));
    let linux = LinuxBuilder::default()
        .resources(resources)
        .cgroups_path(Path::new("/").join(&record.cgroup))
        .namespaces(namespaces(&host.pid, place, private)?)
        .devices(devices)
        .masked_paths(match (&security.masked_paths, security.privileged) {
            (_, true) => Vec::new(),
            (Some(paths), _) => paths.clone(),
            (None, _) => oci_spec::runtime::get_default_maskedpaths(),
        })
        .readonly_paths(match (&security.readonly_paths, security.privileged) {
            (_, true) => Vec::new(),
            (Some(paths), _) => paths.clone(),
            (None, _) => oci_spec::runtime::get_default_readonly_paths(),
        });
    let mut linux = built(linux.build())?;
    // As the container's own mounts need it: the root must not cut off what they let through.
    let travel = |wanted| host.mounts.iter().any(|mount| mount.propagation == wanted);
    let propagation = match (travel(Propagation::Both), travel(Propagation::FromHost)) {
        (true, _) => "rshared",
        (false, true) => "rslave",
        (false, false) => "rprivate",
    };
    linux.set_rootfs_propagation(Some(propagation.to_owned()));
    if !security.privileged {
        linux.set_seccomp(match &host.seccomp {
            Seccomp::Unconfined => None,
            Seccomp::RuntimeDefault => {
                let names = held.iter().map(ToString::to_string).collect();
                Some(seccomp::runtime_default(&names)?)
            }
            Seccomp::Localhost(path) => Some(seccomp::of_file(path)?),
        });
    }
    let root = RootBuilder::default()
        .path("rootfs")
        .readonly(security.readonly_rootfs);
    let spec = SpecBuilder::default()
        .version("1.0.2")
        .root(built(root.build())?)
        .process(process(record, place, &host, &held)?)
        .mounts(mounts(&host, security, place)?)
        .linux(linux);
    let mut spec = built(spec.build())?;
    // The name is set in the pod's own namespace, or is the host's.
    spec.set_hostname(None);
    Ok(spec)
}

/// What a container holds, which cannot be more than what this process does.
fn capabilities_of(security: &SecurityConfig) -> Result<HashSet<Capability>, RuntimeError> {
    let ours = caps::read(None, CapSet::Bounding)
        .map_err(|error| storage("read our own capabilities", error))?;
    let spec = CapabilitySpec {
        add: security.add_capabilities.clone(),
        drop: security.drop_capabilities.clone(),
        privileged: security.privileged,
        // Judged against what the node itself holds: see `process`.
        ambient: Vec::new(),
    };
    let plan = capabilities::plan(&spec).map_err(|e| invalid("capabilities", e.to_string()))?;
    if let Some(missing) = plan.added.iter().find(|wanted| !ours.contains(wanted)) {
        let rule = format!("{missing} is not to be had: the node itself does not hold it");
        return Err(invalid("capabilities.add_capabilities", rule));
    }
    Ok(plan.held.intersection(&ours).copied().collect())
}

fn of_oci(
    capabilities: &HashSet<Capability>,
) -> Result<oci_spec::runtime::Capabilities, RuntimeError> {
    let convert = |capability: &Capability| {
        let value = serde_json::Value::String(capability.to_string());
        serde_json::from_value(value).map_err(|error| storage("name a capability", error))
    };
    capabilities.iter().map(convert).collect()
}

fn process(
    record: &ContainerRecord,
    place: &Place<'_>,
    host: &HostContainer,
    held: &HashSet<Capability>,
) -> Result<Process, RuntimeError> {
    let security = &record.config.security;
    let ambient = host
        .ambient_capabilities
        .iter()
        .map(|name| {
            let known: Result<Capability, _> = caps::to_canonical(name).parse();
            let rule = "must be capabilities that the container has";
            known
                .ok()
                .filter(|capability| held.contains(capability))
                .ok_or_else(|| invalid("capabilities.add_ambient_capabilities", rule))
        })
        .collect::<Result<HashSet<_>, _>>()?;
    let set = of_oci(held)?;
    let kept = of_oci(&ambient)?;
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(kept.clone())
        .ambient(kept);
    // The primary group is among them, or dropping it would gain what is denied to it (CVE-2022-36109).
    let mut groups = place.user.groups.clone();
    if !groups.contains(&place.user.gid) {
        groups.insert(0, place.user.gid);
    }
    let user = UserBuilder::default()
        .uid(place.user.uid)
        .gid(place.user.gid)
        .additional_gids(groups);
    let process = ProcessBuilder::default()
        .terminal(record.config.tty)
        .user(built(user.build())?)
        .args(place.args.clone())
        .env(place.env.clone())
        .cwd(&place.cwd)
        .capabilities(built(capabilities.build())?)
        .rlimits(Vec::new())
        .no_new_privileges(security.no_new_privs);
    let mut process = built(process.build())?;
    // Limits of processes are ours: nothing asks for others, and raising them may not be ours to do.
    process.set_rlimits(None);
    if let Some(asked) = record.config.resources.oom_score_adj {
        process.set_oom_score_adj(Some(oom_score(asked)?));
    }
    process.set_apparmor_profile(host.apparmor.clone());
    Ok(process)
}

/// As asked, unless it would be lower than our own and we may not lower it.
fn oom_score(asked: i32) -> Result<i32, RuntimeError> {
    let may = caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_RESOURCE)
        .map_err(|error| storage("read our own capabilities", error))?;
    if may {
        return Ok(asked);
    }
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    Ok(asked.max(own.trim().parse().unwrap_or(0)))
}

fn namespaces(
    pid: &PidNamespace,
    place: &Place<'_>,
    private_cgroup: bool,
) -> Result<Vec<LinuxNamespace>, RuntimeError> {
    let namespace = |kind, path: Option<PathBuf>| {
        let mut builder = LinuxNamespaceBuilder::default().typ(kind);
        if let Some(path) = path {
            builder = builder.path(path);
        }
        built(builder.build())
    };
    let mut wanted = vec![namespace(LinuxNamespaceType::Mount, None)?];
    match pid {
        PidNamespace::Own => wanted.push(namespace(LinuxNamespaceType::Pid, None)?),
        PidNamespace::Pod => {
            let path = place.sandbox.join("pid");
            wanted.push(namespace(LinuxNamespaceType::Pid, Some(path))?);
        }
        PidNamespace::Host => {}
        PidNamespace::Container(_) => {
            let path = place.target_pid.clone();
            wanted.push(namespace(LinuxNamespaceType::Pid, path)?);
        }
    }
    if !place.host_ipc {
        let path = place.sandbox.join("ipc");
        wanted.push(namespace(LinuxNamespaceType::Ipc, Some(path))?);
    }
    if let Some(netns) = place.netns.clone() {
        let path = place.sandbox.join("uts");
        wanted.push(namespace(LinuxNamespaceType::Uts, Some(path))?);
        wanted.push(namespace(LinuxNamespaceType::Network, Some(netns))?);
    }
    if private_cgroup {
        wanted.push(namespace(LinuxNamespaceType::Cgroup, None)?);
    }
    Ok(wanted)
}

fn devices_of(
    host: &HostContainer,
    security: &SecurityConfig,
) -> Result<(Vec<oci_spec::runtime::LinuxDevice>, Vec<LinuxDeviceCgroup>), RuntimeError> {
    let all = |allow| {
        let rule = LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .access("rwm");
        built(rule.build())
    };
    let (asked, rules) = devices::asked(&host.devices)?;
    if security.privileged {
        let mut devices = devices::all()?;
        devices.retain(|device| !asked.iter().any(|other| other.path() == device.path()));
        devices.extend(asked);
        return Ok((devices, vec![all(true)?]));
    }
    let mut all_rules = vec![all(false)?];
    all_rules.extend(rules);
    Ok((asked, all_rules))
}

/// Limits as the OCI runtime takes them.
pub(crate) fn resources(
    limits: &HostLimits,
    hierarchies: &Hierarchies,
    cgroup: &str,
) -> Result<LinuxResources, RuntimeError> {
    let mut memory = LinuxMemoryBuilder::default();
    if limits.memory > 0 {
        memory = memory.limit(limits.memory);
    }
    // Where swap is not counted there is nothing to limit.
    if limits.memory_swap > 0 && hierarchies.counts_swap(cgroup) {
        memory = memory.swap(limits.memory_swap);
    }
    let mut cpu = LinuxCpuBuilder::default();
    if limits.cpu_shares > 0 {
        cpu = cpu.shares(limits.cpu_shares.unsigned_abs().clamp(2, 262_144));
    }
    if limits.cpu_quota != 0 {
        cpu = cpu.quota(limits.cpu_quota);
    }
    if limits.cpu_period > 0 {
        cpu = cpu.period(limits.cpu_period.unsigned_abs());
    }
    if !limits.cpuset_cpus.is_empty() {
        cpu = cpu.cpus(limits.cpuset_cpus.clone());
    }
    if !limits.cpuset_mems.is_empty() {
        cpu = cpu.mems(limits.cpuset_mems.clone());
    }
    let mut resources = LinuxResourcesBuilder::default()
        .memory(built(memory.build())?)
        .cpu(built(cpu.build())?);
    if !limits.unified.is_empty() {
        if !hierarchies.is_unified() {
            let rule = "this node has no cgroup version 2 for it";
            return Err(invalid("resources.unified", rule));
        }
        let unified: HashMap<String, String> = limits.unified.clone().into_iter().collect();
        resources = resources.unified(unified);
    }
    // No limit is what a group has at first; the controller may not be there.
    let huge = limits.hugepages.iter().filter(|(_, limit)| **limit > 0);
    let huge = huge
        .map(|(size, limit)| {
            let limit = i64::try_from(*limit).unwrap_or(i64::MAX);
            let builder = LinuxHugepageLimitBuilder::default()
                .page_size(size.clone())
                .limit(limit);
            built(builder.build())
        })
        .collect::<Result<Vec<_>, _>>()?;
    if !huge.is_empty() {
        resources = resources.hugepage_limits(huge);
    }
    built(resources.build())
}

fn mount(
    destination: impl Into<PathBuf>,
    kind: &str,
    source: impl Into<PathBuf>,
    options: &[&str],
) -> Result<Mount, RuntimeError> {
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    let mount = MountBuilder::default()
        .destination(destination)
        .typ(kind)
        .source(source)
        .options(options);
    built(mount.build())
}

fn mounts(
    host: &HostContainer,
    security: &SecurityConfig,
    place: &Place<'_>,
) -> Result<Vec<Mount>, RuntimeError> {
    let system = match security.privileged {
        true => "rw",
        false => "ro",
    };
    let files = match security.readonly_rootfs {
        true => "ro",
        false => "rw",
    };
    let shm = match place.host_ipc {
        true => PathBuf::from("/dev/shm"),
        false => place.sandbox.join("shm"),
    };
    let own = |name: &str| place.sandbox.join(name);
    let bind = ["rbind", "rprivate", files];
    let mut all = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        )?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        )?,
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        )?,
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", system],
        )?,
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", system],
        )?,
        mount(
            "/dev/shm",
            "bind",
            shm,
            &["rbind", "rprivate", "rw", "nosuid", "noexec", "nodev"],
        )?,
        mount("/etc/hosts", "bind", own("hosts"), &bind)?,
        mount("/etc/resolv.conf", "bind", own("resolv.conf"), &bind)?,
        mount("/etc/hostname", "bind", own("hostname"), &bind)?,
    ];
    let mut asked = Vec::new();
    let mut images = 0;
    for (index, wanted) in host.mounts.iter().enumerate() {
        let source = match &wanted.source {
            HostMountSource::Path(path) => host_path(index, wanted, path)?,
            HostMountSource::Image { sub_path, .. } => {
                let root = crate::rootfs::volume_path(place.bundle, images);
                images += 1;
                image_path(index, &root, sub_path)?
            }
        };
        asked.push(bind_mount(index, wanted, source)?);
    }
    // What is asked for takes the place of what is usual, and of all below it.
    all.retain(|usual| {
        let replaced = |mount: &Mount| usual.destination().starts_with(mount.destination());
        !asked.iter().any(replaced)
    });
    // A mount below another one comes after it.
    asked.sort_by_key(|mount| mount.destination().components().count());
    all.extend(asked);
    Ok(all)
}

fn bind_mount(index: usize, wanted: &HostMount, source: PathBuf) -> Result<Mount, RuntimeError> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let path = Path::new(&wanted.destination);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || !path.components().all(plain) || wanted.destination == "/" {
        let rule = "must be an absolute path without .., and not the root";
        return Err(invalid(field("container_path"), rule));
    }
    if wanted.recursive_readonly && (!wanted.readonly || wanted.propagation != Propagation::Private)
    {
        let rule = "needs readonly and private propagation beside it";
        return Err(invalid(field("recursive_read_only"), rule));
    }
    let propagation = match wanted.propagation {
        Propagation::Private => "rprivate",
        Propagation::FromHost => "rslave",
        Propagation::Both => "rshared",
    };
    let mode = match (wanted.recursive_readonly, wanted.readonly) {
        (true, _) => "rro",
        (false, true) => "ro",
        (false, false) => "rw",
    };
    mount(path, "bind", source, &["rbind", propagation, mode])
}

/// The path of the host that is mounted: a directory is made where there is nothing.
fn host_path(index: usize, wanted: &HostMount, path: &Path) -> Result<PathBuf, RuntimeError> {
    let wrong = |rule: String| invalid(format!("mounts[{index}].host_path"), rule);
    if !path.is_absolute() {
        return Err(wrong("must be absolute".to_owned()));
    }
    let unusable = |error: io::Error| wrong(format!("{}: {error}", path.display()));
    let real = match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(unusable)?;
            fs::canonicalize(path).map_err(unusable)?
        }
        other => other.map_err(unusable)?,
    };
    if wanted.propagation != Propagation::Private {
        let table = fs::read_to_string("/proc/self/mountinfo").map_err(unusable)?;
        let (point, shared, slave) = mount_of(&table, &real);
        let fits = shared || (slave && wanted.propagation == Propagation::FromHost);
        if !fits {
            return Err(invalid(
                format!("mounts[{index}].propagation"),
                format!(
                    "{} is on the mount {}, which is not shared: no mount travels there",
                    path.display(),
                    point.display()
                ),
            ));
        }
    }
    Ok(real)
}

/// The mount that a path is on, and whether it is shared or a slave.
fn mount_of(table: &str, path: &Path) -> (PathBuf, bool, bool) {
    let mut best = (PathBuf::from("/"), false, false);
    for line in table.lines() {
        let mut fields = line.split(' ');
        let Some(point) = fields.nth(4).map(unescape).map(PathBuf::from) else {
            continue;
        };
        // Later lines hide earlier ones of the same place.
        let deeper = point.components().count() >= best.0.components().count();
        if path.starts_with(&point) && deeper {
            let optional: Vec<&str> = fields.skip(1).take_while(|field| *field != "-").collect();
            let has = |kind: &str| optional.iter().any(|field| field.starts_with(kind));
            best = (point, has("shared:"), has("master:"));
        }
    }
    best
}

/// mountinfo writes spaces and the like as octal numbers.
fn unescape(text: &str) -> String {
    let codes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    codes.iter().fold(text.to_owned(), |text, (code, plain)| {
        text.replace(code, plain)
    })
}

/// A directory of a mounted image, whose links lead nowhere outside of it.
fn image_path(index: usize, root: &Path, sub_path: &str) -> Result<PathBuf, RuntimeError> {
    if sub_path.is_empty() {
        return Ok(root.to_owned());
    }
    let wrong =
        |rule: String| RuntimeError::ImageVolume(format!("mounts[{index}].image_sub_path: {rule}"));
    let path = Path::new(sub_path);
    let plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    if !path.components().all(plain) {
        return Err(wrong("must be relative and without ..".to_owned()));
    }
    let find = || -> io::Result<PathBuf> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = openat(CWD, root, flags, Mode::empty())?;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found = openat2(&top, path, flags, Mode::empty(), how)?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&found);
        fs::read_link(format!("/proc/self/fd/{number}"))
    };
    find().map_err(|error| {
        wrong(format!(
            "{sub_path:?} is no directory of the image: {error}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_on_the_deepest_mount_above_it() {
        let table = "\
1 0 8:1 / / rw,relatime - ext4 /dev/sda rw
2 1 0:5 / /mnt rw,relatime shared:7 - tmpfs tmpfs rw
3 2 0:6 / /mnt/a\\040b rw,relatime shared:8 master:2 - tmpfs tmpfs rw
4 2 0:7 / /mnt/s rw,relatime master:3 propagate_from:2 - tmpfs tmpfs rw";
        let of = |path: &str| mount_of(table, Path::new(path));
        assert_eq!(of("/etc"), ("/".into(), false, false));
        assert_eq!(of("/mnt/x/y"), ("/mnt".into(), true, false));
        assert_eq!(of("/mnt/a b/c"), ("/mnt/a b".into(), true, true));
        assert_eq!(of("/mnt/s"), ("/mnt/s".into(), false, true));
        assert_eq!(of("/mntx"), ("/".into(), false, false));
    }

    #[test]
    fn what_a_mount_cannot_be_is_refused_by_its_field() {
        let good = HostMount {
            source: HostMountSource::Path("/etc".into()),
            destination: "/x".into(),
            readonly: true,
            recursive_readonly: true,
            propagation: Propagation::Private,
        };
        let options = |mount: Mount| mount.options().clone().unwrap();
        let made = bind_mount(0, &good, "/etc".into()).unwrap();
        assert_eq!(options(made), ["rbind", "rprivate", "rro"]);
        let field = |mount: &HostMount| match bind_mount(3, mount, "/etc".into()).unwrap_err() {
            RuntimeError::Invalid { field, .. } => field,
            other => panic!("{other:?}"),
        };
        for destination in ["x", "/", "/a/../b"] {
            let bad = HostMount {
                destination: destination.into(),
                ..good.clone()
            };
            assert_eq!(field(&bad), "mounts[3].container_path");
        }
        let writable = HostMount {
            readonly: false,
            ..good.clone()
        };
        assert_eq!(field(&writable), "mounts[3].recursive_read_only");
        let relative = host_path(1, &good, Path::new("etc")).unwrap_err();
        assert!(relative.to_string().contains("mounts[1].host_path"));
    }

    #[test]
    fn limits_are_passed_on_as_they_are() {
        let limits = HostLimits {
            cpu_period: 50_000,
            cpu_quota: 75_000,
            cpu_shares: 1,
            memory: 1 << 20,
            cpuset_cpus: "0-1".into(),
            ..Default::default()
        };
        let none = Hierarchies::default();
        let made = resources(&limits, &none, "g").unwrap();
        let cpu = made.cpu().clone().unwrap();
        assert_eq!(
            (cpu.quota(), cpu.period(), cpu.shares()),
            (Some(75_000), Some(50_000), Some(2))
        );
        assert_eq!(cpu.cpus().as_deref(), Some("0-1"));
        assert_eq!(made.memory().unwrap().limit(), Some(1 << 20));
        let unified = HostLimits {
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        assert!(resources(&unified, &none, "g").is_err());
    }

    #[test]
    fn nothing_is_promised_that_the_node_does_not_hold() {
        let ours = caps::read(None, CapSet::Bounding).unwrap();
        let all = SecurityConfig {
            privileged: true,
            ..Default::default()
        };
        assert!(capabilities_of(&all).unwrap().is_subset(&ours));
        if let Some(missing) = caps::all().difference(&ours).next() {
            let named = SecurityConfig {
                add_capabilities: vec![missing.to_string()],
                ..Default::default()
            };
            let error = capabilities_of(&named).unwrap_err().to_string();
            assert!(error.contains(&missing.to_string()), "{error}");
        }
    }
}
