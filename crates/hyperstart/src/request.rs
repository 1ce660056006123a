//! From what the node asks for to what the container's child is told, with everything checked that
//! can be checked before something is made.

use std::path::{Component, Path, PathBuf};

use hypernetes_agent_api::v1::{self, mount::Source};
use hypernetes_container::{
    CapabilitySpec, FileBind, InitSpec, MountSource, MountSpec, ProcessSpec, RlimitSpec,
    RootfsSpec, UserSpec,
    cgroup::{self, Limits},
};

use crate::{boot::dir, disks, error::GuestError, hugepages, profile, volume::Volumes};

const MAX_LAYERS: usize = 128;
const MAX_MOUNTS: usize = 512;
const MAX_DEVICES: usize = 64;

/// Whether a text can be a file name of ours.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain)
}

/// A path in the container: absolute, without `..`.
fn check_path(what: &str, path: &str) -> Result<(), GuestError> {
    let plain = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::RootDir));
    if path.starts_with('/') && plain && !path.contains('\0') && path.len() < 4096 {
        return Ok(());
    }
    Err(GuestError::Invalid(format!(
        "{what} {path:?} is not an absolute plain path"
    )))
}

/// A path in the container that something can be mounted on.
fn check_place(what: &str, path: &str) -> Result<(), GuestError> {
    check_path(what, path)?;
    let place: PathBuf = Path::new(path).components().collect();
    if place == Path::new("/") || place.starts_with("/proc") {
        // What the agent itself reads and writes there must be the kernel's.
        return Err(GuestError::Invalid(format!(
            "nothing can be mounted on {path}"
        )));
    }
    Ok(())
}

fn check_slots(slots: &[u32]) -> Result<(), GuestError> {
    match slots.iter().find(|slot| !disks::SLOTS.contains(slot)) {
        Some(slot) => Err(GuestError::Invalid(format!("there is no slot {slot}"))),
        None => Ok(()),
    }
}

fn names(slots: &[u32]) -> Vec<String> {
    slots.iter().map(|slot| disks::layer_name(*slot)).collect()
}

/// The slots of all layers that a container shows: its root's and those of images that it mounts.
pub(crate) fn slots(request: &v1::CreateContainerRequest) -> Vec<u32> {
    let mounted = request.mounts.iter().flat_map(|mount| match &mount.source {
        Some(Source::Image(layers)) => layers.slots.as_slice(),
        _ => &[],
    });
    let mut slots: Vec<u32> = request.layer_slots.iter().chain(mounted).copied().collect();
    slots.sort_unstable();
    slots.dedup();
    slots
}

/// A path inside what is mounted.
fn check_sub_path(path: &str) -> Result<(), GuestError> {
    let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    if Path::new(path).components().all(inside) && !path.contains('\0') {
        return Ok(());
    }
    Err(GuestError::Invalid(format!(
        "sub path {path:?} leads out of its volume"
    )))
}

/// Where one container keeps its own things.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// Upper and work directory of the overlay.
    pub(crate) writable: PathBuf,
    /// Its mount point.
    pub(crate) root: PathBuf,
    /// What it says of its end; beside the writable layer, and gone with it.
    pub(crate) termination: PathBuf,
}

impl Places {
    pub(crate) fn of(id: &str) -> Self {
        let writable = Path::new(dir::SCRATCH).join("containers").join(id);
        Self {
            termination: writable.join("termination"),
            writable,
            root: Path::new(dir::ROOTS).join(id),
        }
    }
}

/// The child's job for a container.
pub(crate) fn init(
    request: &v1::CreateContainerRequest,
    places: &Places,
    volumes: &Volumes,
    files: &[FileBind],
) -> Result<InitSpec, GuestError> {
    let layers = &request.layer_slots;
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(GuestError::Invalid(format!(
            "a container needs 1 to {MAX_LAYERS} layers"
        )));
    }
    check_slots(layers)?;
    if request.mounts.len() > MAX_MOUNTS {
        return Err(GuestError::Invalid(format!(
            "more than {MAX_MOUNTS} mounts"
        )));
    }
    let termination = match request.termination_path.as_str() {
        "" => None,
        path => {
            check_place("termination message path", path)?;
            Some(FileBind {
                source: places.termination.clone(),
                destination: path.to_owned(),
            })
        }
    };
    if request.devices.len() > MAX_DEVICES {
        return Err(GuestError::Invalid(format!(
            "more than {MAX_DEVICES} devices"
        )));
    }
    for device in &request.devices {
        check_place("device", &device.destination)?;
        check_slots(&[device.slot])?;
    }
    for path in request.masked_paths.iter().chain(&request.readonly_paths) {
        check_path("masked or read-only path", path)?;
    }
    let spec = request
        .process
        .as_ref()
        .ok_or_else(|| GuestError::invalid("no process"))?;
    Ok(InitSpec {
        rootfs: RootfsSpec {
            layers_dir: dir::LAYERS.into(),
            layers: names(layers),
            writable: places.writable.clone(),
            target: places.root.clone(),
            readonly: request.readonly_rootfs,
        },
        mounts: request
            .mounts
            .iter()
            .map(|spec| mount(spec, volumes))
            .collect::<Result<_, _>>()?,
        files: files
            .iter()
            .map(|file| FileBind {
                source: file.source.clone(),
                destination: file.destination.clone(),
            })
            .chain(termination)
            .collect(),
        devices: Vec::new(),
        shm: dir::SHM.into(),
        masked_paths: request.masked_paths.clone(),
        readonly_paths: request.readonly_paths.clone(),
        privileged: request.privileged,
        process: process(spec, request.privileged)?,
    })
}

fn mount(spec: &v1::Mount, volumes: &Volumes) -> Result<MountSpec, GuestError> {
    let destination = spec.destination.clone();
    check_place("mount destination", &destination)?;
    let mut readonly = spec.readonly;
    let source = match &spec.source {
        Some(Source::Volume(name)) => {
            check_sub_path(&spec.sub_path)?;
            readonly |= volumes.is_read_only(name);
            let directory = volumes.directory(name);
            let directory = directory
                .ok_or_else(|| GuestError::Invalid(format!("there is no volume {name}")))?;
            MountSource::Volume {
                directory: directory.to_owned(),
                sub_path: spec.sub_path.clone(),
            }
        }
        Some(Source::Image(layers)) => {
            check_sub_path(&spec.sub_path)?;
            check_slots(&layers.slots)?;
            if layers.slots.is_empty() || layers.slots.len() > MAX_LAYERS {
                return Err(GuestError::Invalid(format!(
                    "the image on {destination} needs 1 to {MAX_LAYERS} layers"
                )));
            }
            MountSource::Image {
                layers: names(&layers.slots),
                sub_path: spec.sub_path.clone(),
            }
        }
        Some(Source::Tmpfs(tmpfs)) => MountSource::Tmpfs {
            size: tmpfs.size,
            mode: tmpfs.mode,
        },
        None => {
            return Err(GuestError::Invalid(format!(
                "the mount on {destination} has no source"
            )));
        }
    };
    Ok(MountSpec {
        destination,
        source,
        readonly,
    })
}

/// A process of a container.
pub(crate) fn process(spec: &v1::Process, privileged: bool) -> Result<ProcessSpec, GuestError> {
    if spec.args.is_empty() {
        return Err(GuestError::invalid("the process has no arguments"));
    }
    if spec
        .args
        .iter()
        .chain(&spec.env)
        .any(|text| text.contains('\0'))
    {
        return Err(GuestError::invalid(
            "an argument or variable holds a zero byte",
        ));
    }
    if !spec.cwd.is_empty() {
        check_path("working directory", &spec.cwd)?;
    }
    let size = |value: u32, default: u16| match value {
        0 => default,
        value => u16::try_from(value).unwrap_or(u16::MAX),
    };
    let user = spec.user.clone().unwrap_or_default();
    let capabilities = spec.capabilities.clone().unwrap_or_default();
    Ok(ProcessSpec {
        args: spec.args.clone(),
        env: spec.env.clone(),
        cwd: spec.cwd.clone(),
        user: UserSpec {
            uid: user.uid,
            gid: user.gid,
            additional_gids: user.additional_gids,
            username: Some(user.username).filter(|name| !name.is_empty()),
            run_as_group: user.run_as_group,
            only_additional_gids: user.only_additional_gids,
        },
        tty: spec
            .tty
            .then(|| (size(spec.width, 80), size(spec.height, 24))),
        capabilities: CapabilitySpec {
            add: capabilities.add,
            drop: capabilities.drop,
            ambient: capabilities.ambient,
            privileged,
        },
        no_new_privs: spec.no_new_privs,
        rlimits: spec
            .rlimits
            .iter()
            .map(|limit| RlimitSpec {
                name: limit.name.clone(),
                soft: limit.soft,
                hard: limit.hard,
            })
            .collect(),
        seccomp: profile::seccomp(spec)?,
        oom_score_adj: spec.oom_score_adj.unwrap_or(0),
        // The pod's, which the request does not tell.
        users: None,
    })
}

/// cgroup limits.
pub(crate) fn limits(resources: Option<&v1::Resources>) -> Result<Limits, GuestError> {
    let Some(resources) = resources else {
        return Ok(Limits::default());
    };
    // The kernel's interfaces have -1 for "no limit", as callers may.
    let positive = |value: i64| u64::try_from(value).unwrap_or(0);
    if resources.cpu_period != 0 && !(1000..=1_000_000).contains(&resources.cpu_period) {
        return Err(GuestError::invalid("the CPU period must be 1 ms to 1 s"));
    }
    for (file, value) in &resources.unified {
        if !cgroup::is_limit(file) || value.contains('\0') || value.len() > 256 {
            return Err(GuestError::Invalid(format!(
                "{file:?} is no limit of a cgroup"
            )));
        }
    }
    Ok(Limits {
        huge_pages: hugepages::limits(&resources.huge_pages)?,
        memory: positive(resources.memory_limit),
        cpu_quota: positive(resources.cpu_quota),
        cpu_period: resources.cpu_period,
        cpu_shares: resources.cpu_shares,
        pids: positive(resources.pids_limit),
        unified: resources.unified.clone().into_iter().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::CreateContainerRequest {
        v1::CreateContainerRequest {
            id: "c".into(),
            layer_slots: vec![2],
            process: Some(v1::Process {
                args: vec!["sh".into()],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn refused(request: &v1::CreateContainerRequest) -> bool {
        matches!(
            init(request, &Places::of("c"), &Volumes::default(), &[]),
            Err(GuestError::Invalid(_))
        )
    }

    #[test]
    fn requests_that_cannot_be_are_refused_by_name() {
        assert!(!refused(&request()));
        assert!(refused(&v1::CreateContainerRequest {
            layer_slots: vec![],
            ..request()
        }));
        assert!(refused(&v1::CreateContainerRequest {
            layer_slots: vec![0],
            ..request()
        }));
        assert!(refused(&v1::CreateContainerRequest {
            process: None,
            ..request()
        }));
        assert!(refused(&v1::CreateContainerRequest {
            devices: vec![v1::Device {
                destination: "/proc/x".into(),
                slot: 3,
            }],
            ..request()
        }));
        assert!(refused(&v1::CreateContainerRequest {
            masked_paths: vec!["/proc/../x".into()],
            ..request()
        }));
        let tmpfs = || Some(Source::Tmpfs(v1::Tmpfs::default()));
        for (destination, source) in [
            ("/", tmpfs()),
            ("/proc", tmpfs()),
            ("/proc/self", tmpfs()),
            ("//proc/", tmpfs()),
            ("relative", tmpfs()),
            ("/a/../b", tmpfs()),
            ("/a", None),
            ("/a", Some(Source::Image(v1::Layers::default()))),
            ("/a", Some(Source::Image(v1::Layers { slots: vec![0] }))),
            ("/a", Some(Source::Volume("unknown".into()))),
        ] {
            let mounts = vec![v1::Mount {
                destination: destination.into(),
                source,
                ..Default::default()
            }];
            assert!(
                refused(&v1::CreateContainerRequest {
                    mounts,
                    ..request()
                }),
                "{destination}"
            );
        }
    }

    #[test]
    fn a_termination_message_has_a_file_of_the_container_s_own() {
        let asks = |path: &str| v1::CreateContainerRequest {
            termination_path: path.into(),
            ..request()
        };
        let plan = |path| init(&asks(path), &Places::of("c"), &Volumes::default(), &[]);
        assert!(plan("").unwrap().files.is_empty());
        let files = plan("/dev/termination-log").unwrap().files;
        assert_eq!(files[0].destination, "/dev/termination-log");
        assert_eq!(
            files[0].source,
            Path::new("/scratch/containers/c/termination")
        );
        for bad in ["/", "/proc/x", "relative", "/a/../b"] {
            assert!(refused(&asks(bad)), "{bad}");
        }
    }

    #[test]
    fn layers_of_mounted_images_are_a_container_s_too() {
        let image = |slots: &[u32], sub_path: &str| v1::Mount {
            destination: "/image".into(),
            source: Some(Source::Image(v1::Layers {
                slots: slots.to_vec(),
            })),
            sub_path: sub_path.into(),
            readonly: true,
        };
        let request = v1::CreateContainerRequest {
            layer_slots: vec![3, 2],
            mounts: vec![image(&[5, 2], "etc"), image(&[4], "")],
            ..request()
        };
        assert_eq!(slots(&request), [2, 3, 4, 5]);
        let spec = init(&request, &Places::of("c"), &Volumes::default(), &[]).unwrap();
        let MountSource::Image { layers, sub_path } = &spec.mounts[0].source else {
            panic!("{spec:?}");
        };
        assert_eq!(
            (layers.as_slice(), sub_path.as_str()),
            (&names(&[5, 2])[..], "etc")
        );
        assert!(refused(&v1::CreateContainerRequest {
            mounts: vec![image(&[5], "../etc")],
            ..request
        }));
        assert_eq!(
            hypernetes_agent_api::IMAGE_VOLUME_FAILED,
            hypernetes_container::IMAGE_VOLUME_FAILED
        );
    }

    #[test]
    fn names_are_plain() {
        for name in ["", ".", "..", "a/b", "a b", ".hidden", "a\n"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
        assert!(is_plain_name("web-0_1.x"));
    }
}
