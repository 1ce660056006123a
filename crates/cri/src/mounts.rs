//! Mounts: host paths of the request, as volumes that live in the guest.
//!
//! | host path | in the guest |
//! | --- | --- |
//! | `pods/UID/volumes/kubernetes.io~empty-dir/NAME` | an emptyDir, on the scratch disk, in memory or in huge pages |
//! | `pods/UID/volumes/kubernetes.io~{configmap,secret,projected,downward-api}/NAME` | its files |
//! | `pods/UID/etc-hosts` | that file |
//! | `pods/UID/containers/NAME/…` (termination log) | a file of the container's own; see [`crate::termination`] |
//! | `pods/UID/volume-subpaths/VOLUME/…` | the part of the emptyDir, or the file, that is bound there |
//! | what the node's configuration lists | the path itself, or a read-only copy |
//!
//! A mount of an image has no host path: the image's files, read-only.
//!
//! Everything else is refused.

use std::path::{Component, Path, PathBuf};

use hypernetes_runtime::{
    DeviceConfig, HostShare, MountConfig, SHARED_VOLUME, VolumeConfig, VolumeKind,
};

use crate::{
    config::{CriConfig, SharedPath},
    files::{self, Backing, Content, ReadError},
    hostpath,
    lookup::shown,
    status::CriError,
    subpath, v1,
};

/// Name of the setting that an operator changes for a refused path.
const SETTING: &str = "hostPaths.copied";
/// The same, for the path itself.
const SHARED: &str = "hostPaths.shared";

const PRIVATE: v1::MountPropagation = v1::MountPropagation::PropagationPrivate;

/// What a container's mounts need.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Volumes to write into the guest before the container is created.
    pub(crate) volumes: Vec<VolumeConfig>,
    /// Where they appear.
    pub(crate) mounts: Vec<MountConfig>,
    /// Where the container says why it ended; empty = nowhere.
    pub(crate) termination_path: String,
    /// What of the host is to be shared with the guest, and which of `mounts` shows it.
    pub(crate) shares: Vec<(usize, HostShare)>,
    /// Block devices, attached.
    pub(crate) devices: Vec<DeviceConfig>,
}

/// What a host path stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source<'a> {
    EmptyDir(&'a str),
    /// Content, and the name of the guest's volume for it.
    Files(String),
    /// The same, in versions that the kubelet replaces while containers run.
    Versioned(String),
    SubPath(&'a str),
    /// Where the kubelet looks for the termination message.
    TerminationLog,
    /// Nothing that can be carried.
    Foreign,
}

/// Who mounts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) pod_uid: &'a str,
    pub(crate) container: &'a str,
}

/// Whether the kubelet reads a container's termination message from this mount's host path.
pub(crate) fn is_termination_log(mount: &v1::Mount, pod_uid: &str, kubelet: &Path) -> bool {
    let path = Path::new(&mount.host_path);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    !mount.readonly
        && path.components().all(plain)
        && classify(path, pod_uid, kubelet) == Source::TerminationLog
}

/// The guest's volume for a mount whose files the kubelet updates, and where they are. Not a mount
/// with a sub path: that keeps its content, as it does everywhere.
pub(crate) fn versioned(
    mount: &v1::Mount,
    pod_uid: &str,
    kubelet: &Path,
) -> Option<(String, PathBuf)> {
    let path = Path::new(&mount.host_path);
    match classify(path, pod_uid, kubelet) {
        Source::Versioned(name) => Some((name, path.to_owned())),
        _ => None,
    }
}

/// Plans all mounts of a container, reading the host's files. Blocks.
pub(crate) fn plan(
    mounts: &[v1::Mount],
    owner: Owner<'_>,
    node: &CriConfig,
) -> Result<Plan, CriError> {
    let mut plan = Plan::default();
    for (index, mount) in mounts.iter().enumerate() {
        let field = |name: &str| format!("config.mounts[{index}].{name}");
        check(mount, field)?;
        if let Some(image) = &mount.image {
            plan.mounts.push(of_image(mount, image, field)?);
            continue;
        }
        if is_termination_log(mount, owner.pod_uid, &node.kubelet_dir) {
            plan.termination_path.clone_from(&mount.container_path);
            continue;
        }
        if let Some(share) = shared(mount, owner, node, field)? {
            plan.shares.push((plan.mounts.len(), share.0));
            plan.mounts.push(share.1);
            continue;
        }
        let (volume, sub_path) = source(index, mount, owner, node)?;
        plan.mounts.push(MountConfig {
            volume: volume.name.clone(),
            image: String::new(),
            destination: mount.container_path.clone(),
            sub_path,
            readonly: mount.readonly,
        });
        if !plan.volumes.iter().any(|other| other.name == volume.name) {
            plan.volumes.push(volume);
        }
    }
    Ok(plan)
}

/// Refuses what mounts of the guest cannot be.
fn check(mount: &v1::Mount, field: impl Fn(&str) -> String) -> Result<(), CriError> {
    let refused = |name: &str, rule: &str| Err(CriError::invalid(field(name), rule));
    if mount.image.is_some() && !mount.readonly {
        return refused("readonly", "an image can only be mounted read-only");
    }
    if mount.image.is_some() && !mount.host_path.is_empty() {
        return refused("host_path", "must be empty beside an image");
    }
    if mount.image.is_none() && !mount.image_sub_path.is_empty() {
        return refused("image_sub_path", "needs an image beside it");
    }
    if mount.propagation() == v1::MountPropagation::PropagationBidirectional {
        let rule = "what a container mounts is in its microVM and not on the host";
        return refused("propagation", rule);
    }
    if mount.recursive_read_only && mount.propagation() != PRIVATE {
        let rule = "must be PROPAGATION_PRIVATE beside recursive_read_only";
        return refused("propagation", rule);
    }
    // A volume of the guest has no mounts below it: read-only is so to the bottom.
    if mount.recursive_read_only && !mount.readonly {
        return refused("recursive_read_only", "needs readonly beside it");
    }
    if !mount.container_path.starts_with('/') {
        return refused("container_path", "must be absolute");
    }
    if mount.image.is_some() {
        return Ok(());
    }
    let path = Path::new(&mount.host_path);
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || !path.components().all(plain) || mount.host_path.contains('\0') {
        return refused("host_path", "must be an absolute path without ..");
    }
    Ok(())
}

/// A mount of an image, as it was named.
fn of_image(
    mount: &v1::Mount,
    image: &v1::ImageSpec,
    field: impl Fn(&str) -> String,
) -> Result<MountConfig, CriError> {
    if image.image.is_empty() {
        return Err(CriError::invalid(field("image.image"), "must be given"));
    }
    let plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    let sub_path = &mount.image_sub_path;
    if !Path::new(sub_path).components().all(plain) || sub_path.contains('\0') {
        let rule = "must be relative and without ..";
        return Err(CriError::invalid(field("image_sub_path"), rule));
    }
    Ok(MountConfig {
        volume: String::new(),
        image: image.image.clone(),
        destination: mount.container_path.clone(),
        sub_path: sub_path.clone(),
        readonly: true,
    })
}

/// Whether a volume of the pod is one that lives in the guest, or whose files are carried there.
fn is_carried(pod: &Path, volume: &str) -> bool {
    let plugins = [
        "empty-dir",
        "configmap",
        "secret",
        "projected",
        "downward-api",
    ];
    let directory = |plugin| format!("volumes/kubernetes.io~{plugin}/{volume}");
    plugins
        .iter()
        .any(|plugin| pod.join(directory(plugin)).exists())
}

/// What a mount shares of the host, and the mount without the name that the share is given later.
fn shared(
    mount: &v1::Mount,
    owner: Owner<'_>,
    node: &CriConfig,
    field: impl Fn(&str) -> String,
) -> Result<Option<(HostShare, MountConfig)>, CriError> {
    let path = Path::new(&mount.host_path);
    let pod = node.kubelet_dir.join("pods").join(owner.pod_uid);
    match classify(path, owner.pod_uid, &node.kubelet_dir) {
        Source::Foreign | Source::TerminationLog => {}
        Source::SubPath(volume) if node.share_volumes && !is_carried(&pod, volume) => {}
        _ => return Ok(None),
    }
    let mut allowed = node.shared_paths.clone();
    if node.share_volumes {
        // The kubelet has mounted them for this pod. Another pod's are not among them.
        for directory in ["volumes", "volume-subpaths"] {
            let path = pod.join(directory);
            if path.is_dir() {
                allowed.push(SharedPath {
                    path,
                    read_only: false,
                });
            }
        }
    }
    let opened = hostpath::open_share(mount, &allowed);
    let opened = opened.map_err(|error| {
        let rule = hypernetes_telemetry::chain(&error).to_string();
        CriError::invalid(field("host_path"), rule)
    })?;
    Ok(opened.map(|(share, readonly)| {
        let config = MountConfig {
            volume: SHARED_VOLUME.to_owned(),
            image: String::new(),
            destination: mount.container_path.clone(),
            sub_path: String::new(),
            readonly,
        };
        (share, config)
    }))
}

/// The volume that a mount shows, and the path inside it.
fn source(
    index: usize,
    mount: &v1::Mount,
    owner: Owner<'_>,
    node: &CriConfig,
) -> Result<(VolumeConfig, String), CriError> {
    let path = Path::new(&mount.host_path);
    let refused =
        |rule: String| CriError::invalid(format!("config.mounts[{index}].host_path"), rule);
    if mount.propagation() != PRIVATE {
        let rule = format!(
            "only a host path that the node's setting {SHARED} names shows later mounts of the host: \
             otherwise only PROPAGATION_PRIVATE"
        );
        let field = format!("config.mounts[{index}].propagation");
        return Err(CriError::invalid(field, rule));
    }
    let unreadable = |error: ReadError| {
        let rule = hypernetes_telemetry::chain(&error).to_string();
        refused(rule)
    };
    match classify(path, owner.pod_uid, &node.kubelet_dir) {
        Source::EmptyDir(name) => {
            let volume = empty_dir(name, path).map_err(unreadable)?;
            Ok((volume, String::new()))
        }
        Source::Files(name) | Source::Versioned(name) => carried(name, path).map_err(unreadable),
        Source::SubPath(volume) if path.is_dir() => {
            let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            let bound = subpath::bound(&table, path);
            let sub = bound.and_then(|bound| subpath::below_empty_dir(&bound, volume));
            let directory = node
                .kubelet_dir
                .join("pods")
                .join(owner.pod_uid)
                .join("volumes/kubernetes.io~empty-dir")
                .join(volume);
            match sub {
                Some(sub) if directory.is_dir() => {
                    let volume = empty_dir(volume, &directory).map_err(unreadable)?;
                    Ok((volume, sub))
                }
                // A directory of files, bound as it is.
                _ => carried(sub_path_name(index, owner), path).map_err(unreadable),
            }
        }
        Source::SubPath(_) => carried(sub_path_name(index, owner), path).map_err(unreadable),
        Source::TerminationLog | Source::Foreign => {
            let allowed = node
                .copied_paths
                .iter()
                .any(|allowed| path.starts_with(allowed));
            if !allowed {
                return Err(refused(format!(
                    "{} is on the host, whose file system no microVM sees; the node's setting \
                     {SHARED} can allow it, and {SETTING} a read-only copy of it",
                    shown(&mount.host_path)
                )));
            }
            if !mount.readonly {
                return Err(refused(format!(
                    "{} can only be mounted read-only: the guest gets a copy",
                    shown(&mount.host_path)
                )));
            }
            let name = format!("host.{:016x}", fingerprint(&mount.host_path));
            carried(name, path).map_err(unreadable)
        }
    }
}

/// One container's mount with a sub path. The name is the same for each attempt, so that restarts
/// do not pile up volumes.
fn sub_path_name(index: usize, owner: Owner<'_>) -> String {
    plain_name("sub-path", &format!("{}.{index}", owner.container))
}

fn classify<'a>(path: &'a Path, pod_uid: &str, kubelet: &Path) -> Source<'a> {
    let pod = kubelet.join("pods").join(pod_uid);
    let parts: Option<Vec<&str>> = path
        .strip_prefix(&pod)
        .ok()
        .map(|rest| rest.iter().filter_map(|part| part.to_str()).collect());
    match parts.as_deref() {
        Some(["volumes", "kubernetes.io~empty-dir", name]) => Source::EmptyDir(name),
        Some(["volumes", plugin, name]) => match *plugin {
            "kubernetes.io~configmap"
            | "kubernetes.io~secret"
            | "kubernetes.io~projected"
            | "kubernetes.io~downward-api" => Source::Versioned(plain_name(
                plugin.trim_start_matches("kubernetes.io~"),
                name,
            )),
            _ => Source::Foreign,
        },
        Some(["etc-hosts"]) => Source::Files("etc-hosts".to_owned()),
        Some(["containers", _container, _file]) => Source::TerminationLog,
        Some(["volume-subpaths", volume, _, _]) => Source::SubPath(volume),
        _ => Source::Foreign,
    }
}

fn carried(name: String, path: &Path) -> Result<(VolumeConfig, String), ReadError> {
    let Content { files, single, gid } = files::read(path)?;
    let volume = VolumeConfig {
        name,
        kind: VolumeKind::Files { files },
        gid,
    };
    Ok((volume, single.unwrap_or_default()))
}

fn empty_dir(name: &str, path: &Path) -> Result<VolumeConfig, ReadError> {
    let empty = |memory, size_limit| VolumeKind::EmptyDir { memory, size_limit };
    let kind = match files::backing(path)? {
        Backing::Disk => empty(false, 0),
        Backing::Memory { limit } => empty(true, limit),
        Backing::HugePages { page, limit } => VolumeKind::HugePages {
            page_size: page.to_string(),
            size_limit: limit,
        },
    };
    Ok(VolumeConfig {
        name: plain_name("empty-dir", name),
        kind,
        gid: files::shared_group(path)?,
    })
}

/// A name that the guest takes: letters, digits, `.`, `_`, `-`, at most 128.
fn plain_name(kind: &str, name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.len() <= 100 && name.chars().all(plain) {
        format!("{kind}.{name}")
    } else {
        format!("{kind}.{:016x}", fingerprint(name))
    }
}

/// FNV-1a: the same in every run, and a collision shows one pod another file of its own.
fn fingerprint(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Bed {
        temp: tempfile::TempDir,
        node: CriConfig,
    }

    const OWNER: Owner<'static> = Owner {
        pod_uid: "u1",
        container: "c",
    };

    impl Bed {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            let mut node = CriConfig::new(temp.path().join("state"));
            node.kubelet_dir = temp.path().join("kubelet");
            fs::create_dir_all(node.kubelet_dir.join("pods/u1/volumes")).unwrap();
            Self { temp, node }
        }

        fn pod(&self, path: &str) -> std::path::PathBuf {
            self.node.kubelet_dir.join("pods/u1").join(path)
        }

        fn plan(&self, mounts: &[v1::Mount]) -> Result<Plan, CriError> {
            plan(mounts, OWNER, &self.node)
        }
    }

    fn mount(host: &Path, container: &str, readonly: bool) -> v1::Mount {
        v1::Mount {
            host_path: host.to_str().unwrap().to_owned(),
            container_path: container.to_owned(),
            readonly,
            ..Default::default()
        }
    }

    #[test]
    fn what_the_kubelet_makes_is_carried() {
        let bed = Bed::new();
        let empty = bed.pod("volumes/kubernetes.io~empty-dir/work");
        let map = bed.pod("volumes/kubernetes.io~configmap/settings");
        for directory in [&empty, &map, &bed.pod("containers/c")] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::create_dir(map.join("..v1")).unwrap();
        fs::write(map.join("..v1/key"), "value").unwrap();
        std::os::unix::fs::symlink("..v1", map.join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/key", map.join("key")).unwrap();
        fs::write(bed.pod("etc-hosts"), "127.0.0.1 localhost\n").unwrap();
        fs::write(bed.pod("containers/c/0a1b"), "").unwrap();
        let plan = bed
            .plan(&[
                mount(&empty, "/work", false),
                mount(&map, "/etc/settings", true),
                mount(&bed.pod("etc-hosts"), "/etc/hosts", false),
                mount(&bed.pod("containers/c/0a1b"), "/dev/termination-log", false),
                mount(&empty, "/again", true),
            ])
            .unwrap();
        let names: Vec<_> = plan
            .volumes
            .iter()
            .map(|volume| volume.name.as_str())
            .collect();
        assert_eq!(
            names,
            ["empty-dir.work", "configmap.settings", "etc-hosts",]
        );
        assert!(matches!(plan.volumes[0].kind, VolumeKind::EmptyDir { .. }));
        let VolumeKind::Files { files } = &plan.volumes[1].kind else {
            panic!("{:?}", plan.volumes[1]);
        };
        assert_eq!(files["key"].content, "value");
        assert_eq!(plan.mounts[1].sub_path, "");
        assert_eq!(plan.mounts[2].sub_path, "file");
        assert!(plan.mounts[3].readonly && plan.mounts[3].volume == "empty-dir.work");
        assert_eq!(plan.termination_path, "/dev/termination-log");
    }

    #[test]
    fn other_paths_are_refused_with_the_setting() {
        let mut bed = Bed::new();
        let certs = bed.temp.path().join("certs");
        fs::create_dir(&certs).unwrap();
        fs::write(certs.join("ca.pem"), "pem").unwrap();
        let other_pod = bed.node.kubelet_dir.join("pods/u2/etc-hosts");
        for path in [&certs, &other_pod, &bed.pod("plugins/x")] {
            let error = bed.plan(&[mount(path, "/x", true)]).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("config.mounts[0].host_path: "), "{text}");
            assert!(
                text.contains(path.to_str().unwrap()) && text.contains(SETTING),
                "{text}"
            );
        }
        bed.node.copied_paths.push(certs.clone());
        assert!(bed.plan(&[mount(&certs, "/x", false)]).is_err());
        let plan = bed.plan(&[mount(&certs, "/x", true)]).unwrap();
        let VolumeKind::Files { files } = &plan.volumes[0].kind else {
            panic!("{plan:?}");
        };
        assert_eq!(files["ca.pem"].content, "pem");
    }

    #[test]
    fn what_a_mount_cannot_be_is_refused_by_name() {
        let bed = Bed::new();
        fs::write(bed.pod("etc-hosts"), "").unwrap();
        let base = mount(&bed.pod("etc-hosts"), "/x", true);
        for (mount, name) in [
            (
                v1::Mount {
                    propagation: v1::MountPropagation::PropagationBidirectional.into(),
                    ..base.clone()
                },
                "propagation",
            ),
            (
                v1::Mount {
                    propagation: v1::MountPropagation::PropagationHostToContainer.into(),
                    ..base.clone()
                },
                "propagation",
            ),
            (
                v1::Mount {
                    image: Some(v1::ImageSpec::default()),
                    ..base.clone()
                },
                "host_path",
            ),
            (
                v1::Mount {
                    image: Some(v1::ImageSpec::default()),
                    host_path: String::new(),
                    ..base.clone()
                },
                "image.image",
            ),
            (
                v1::Mount {
                    image: Some(v1::ImageSpec {
                        image: "a".into(),
                        ..Default::default()
                    }),
                    host_path: String::new(),
                    image_sub_path: "a/../../b".into(),
                    ..base.clone()
                },
                "image_sub_path",
            ),
            (
                v1::Mount {
                    image_sub_path: "a".into(),
                    ..base.clone()
                },
                "image_sub_path",
            ),
            (
                v1::Mount {
                    image: Some(v1::ImageSpec::default()),
                    readonly: false,
                    ..base.clone()
                },
                "readonly",
            ),
            (
                v1::Mount {
                    recursive_read_only: true,
                    readonly: false,
                    ..base.clone()
                },
                "recursive_read_only",
            ),
            (
                v1::Mount {
                    recursive_read_only: true,
                    propagation: v1::MountPropagation::PropagationHostToContainer.into(),
                    ..base.clone()
                },
                "propagation",
            ),
            (
                v1::Mount {
                    container_path: "x".into(),
                    ..base.clone()
                },
                "container_path",
            ),
            (
                v1::Mount {
                    host_path: "/a/../b".into(),
                    ..base.clone()
                },
                "host_path",
            ),
        ] {
            match bed.plan(&[mount]).unwrap_err() {
                CriError::Invalid { field, .. } => {
                    assert_eq!(field, format!("config.mounts[0].{name}"));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_shared_path_is_seen_and_not_copied() {
        let mut bed = Bed::new();
        let data = bed.temp.path().join("data");
        fs::create_dir(&data).unwrap();
        bed.node.shared_paths.push(crate::config::SharedPath {
            path: data.clone(),
            read_only: false,
        });
        fs::write(bed.pod("etc-hosts"), "").unwrap();
        let hosts = mount(&bed.pod("etc-hosts"), "/etc/hosts", false);
        let plan = bed.plan(&[hosts, mount(&data, "/data", true)]).unwrap();
        let [(1, share)] = plan.shares.as_slice() else {
            panic!("{plan:?}");
        };
        assert!(share.read_only);
        assert_eq!(plan.mounts[1].volume, SHARED_VOLUME);
        assert_eq!(plan.volumes.len(), 1, "nothing is carried for it");
    }

    #[test]
    fn volumes_of_this_pod_s_are_seen_where_the_node_says_so() {
        let mut bed = Bed::new();
        let csi = bed.pod("volumes/kubernetes.io~csi/pv-1/mount");
        let local = bed.pod("volumes/kubernetes.io~local-volume/pv-2");
        let part = bed.pod("volume-subpaths/pv-2/c/0");
        let empty = bed.pod("volumes/kubernetes.io~empty-dir/work");
        let empty_part = bed.pod("volume-subpaths/work/c/1");
        let other = bed
            .node
            .kubelet_dir
            .join("pods/u2/volumes/kubernetes.io~csi/pv/mount");
        for path in [&csi, &local, &part, &empty, &empty_part, &other] {
            fs::create_dir_all(path).unwrap();
        }
        let wanted = |path: &Path| [mount(path, "/x", false)];
        assert!(bed.plan(&wanted(&csi)).is_err());
        bed.node.share_volumes = true;
        for path in [&csi, &local, &part] {
            assert_eq!(bed.plan(&wanted(path)).unwrap().shares.len(), 1, "{path:?}");
        }
        for path in [&empty, &empty_part] {
            assert!(
                bed.plan(&wanted(path)).unwrap().shares.is_empty(),
                "{path:?}"
            );
        }
        assert!(bed.plan(&wanted(&other)).is_err());
        assert!(bed.plan(&wanted(&bed.pod("plugins/x"))).is_err());
    }

    #[test]
    fn a_read_only_mount_is_so_recursively() {
        let bed = Bed::new();
        fs::write(bed.pod("etc-hosts"), "").unwrap();
        let wanted = v1::Mount {
            recursive_read_only: true,
            ..mount(&bed.pod("etc-hosts"), "/etc/hosts", true)
        };
        assert!(bed.plan(&[wanted]).unwrap().mounts[0].readonly);
    }

    #[test]
    fn names_fit_the_guest() {
        assert_eq!(plain_name("secret", "a.b"), "secret.a.b");
        let long = plain_name("secret", &"x".repeat(200));
        assert!(long.len() < 128 && long != plain_name("secret", &"y".repeat(200)));
    }
}
