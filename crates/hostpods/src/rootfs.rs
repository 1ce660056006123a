//! Root file systems: layers of images as mounts, and an overlay of them for each container.
//!
//! A layer is the store's own erofs file, made by this project's converter out of what a registry
//! sent, and mounted read-only once for all containers that need it. What a container writes goes to
//! a directory of its own below the state directory, which only root may enter.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use hypernetes_image::Image;
use hypernetes_runtime::RuntimeError;
use hypernetes_types::{ContainerId, Digest};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use crate::records::{ContainerRecord, LayerMount, invalid};

/// mount(2) takes one page of options.
const MAX_OPTIONS: usize = 4095;

/// Which layers are mounted, and for whom.
#[derive(Debug, Default)]
pub(crate) struct Layers(BTreeMap<u32, (Digest, BTreeSet<ContainerId>)>);

impl Layers {
    /// As the records say.
    pub(crate) fn of<'a>(records: impl IntoIterator<Item = &'a ContainerRecord>) -> Self {
        let mut layers = Self::default();
        for record in records {
            for layer in record.all_layers() {
                let entry = layers.0.entry(layer.slot);
                let (_, users) = entry.or_insert_with(|| (layer.diff_id.clone(), BTreeSet::new()));
                users.insert(record.id.clone());
            }
        }
        layers
    }

    /// Reserves the mounts of an image's layers for a container, lowest first.
    pub(crate) fn reserve(&mut self, image: &Image, id: &ContainerId) -> Vec<LayerMount> {
        let mut reserved = Vec::new();
        for layer in &image.layers {
            let known = self
                .0
                .iter()
                .find(|(_, (diff_id, _))| *diff_id == layer.diff_id)
                .map(|(slot, _)| *slot);
            let free = || (0..).find(|slot| !self.0.contains_key(slot)).unwrap_or(0);
            let slot = known.unwrap_or_else(free);
            let entry = self.0.entry(slot);
            let (_, users) = entry.or_insert_with(|| (layer.diff_id.clone(), BTreeSet::new()));
            users.insert(id.clone());
            reserved.push(LayerMount {
                diff_id: layer.diff_id.clone(),
                slot,
            });
        }
        reserved
    }

    /// The mounts that nobody needs once this container does not.
    pub(crate) fn unneeded_without(&self, id: &ContainerId) -> Vec<u32> {
        let alone = |users: &BTreeSet<ContainerId>| users.len() == 1 && users.contains(id);
        self.0
            .iter()
            .filter(|(_, (_, users))| alone(users))
            .map(|(slot, _)| *slot)
            .collect()
    }

    /// Forgets what a container needs.
    pub(crate) fn release(&mut self, id: &ContainerId) {
        for (_, users) in self.0.values_mut() {
            users.remove(id);
        }
        self.0.retain(|_, (_, users)| !users.is_empty());
    }

    pub(crate) fn is_used(&self, slot: u32) -> bool {
        self.0.contains_key(&slot)
    }
}

/// Where the layers' mounts are. Short: an overlay's options name each of them.
pub(crate) fn layer_path(run_dir: &Path, slot: u32) -> PathBuf {
    run_dir.join("l").join(slot.to_string())
}

/// Whether something is mounted on this very path.
pub(crate) fn is_mount(path: &Path) -> io::Result<bool> {
    match statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty()) {
        Ok(status) => Ok(status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Takes everything away that is mounted on this path. Nothing there is no error.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    while is_mount(path)? {
        umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    Ok(())
}

/// Removes a directory in which nothing may be mounted any more.
pub(crate) fn remove_directory(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Mounts a layer unless it is mounted. Blocks.
pub(crate) fn mount_layer(disk: &Path, target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    if is_mount(target)? {
        return Ok(());
    }
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    match mount(Some(disk), target, Some("erofs"), flags, None::<&str>) {
        Ok(()) => Ok(()),
        // Kernels before 6.12 mount no file: mount(8) gives it a loop device that goes with it.
        Err(Errno::ENOTBLK) => {
            let output = Command::new("mount")
                .args(["-t", "erofs", "-o", "loop,ro,nodev,noatime"])
                .args([disk, target])
                .output()?;
            match output.status.success() {
                true => Ok(()),
                false => Err(io::Error::other(crate::oci::message(&output.stderr))),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn mount_layers(image: &Image, layers: &[LayerMount], run_dir: &Path) -> io::Result<()> {
    for (layer, mounted) in image.layers.iter().zip(layers) {
        mount_layer(&layer.disk, &layer_path(run_dir, mounted.slot))?;
    }
    Ok(())
}

/// The lower directories of an overlay, uppermost first.
fn lower(layers: &[LayerMount], run_dir: &Path, empty: &Path) -> String {
    let paths: Vec<String> = match layers {
        [] => vec![empty.display().to_string()],
        layers => layers
            .iter()
            .rev()
            .map(|layer| layer_path(run_dir, layer.slot).display().to_string())
            .collect(),
    };
    paths.join(":")
}

fn overlay(options: &str, target: &Path, flags: MsFlags) -> io::Result<()> {
    mount(
        Some("overlay"),
        target,
        Some("overlay"),
        flags,
        Some(options),
    )
    .map_err(Into::into)
}

/// Refuses what could not be mounted, before anything is.
pub(crate) fn check(
    layers: &[LayerMount],
    run_dir: &Path,
    bundle: &Path,
) -> Result<(), RuntimeError> {
    let fixed = "lowerdir=,upperdir=,workdir=".len() + 2 * bundle.as_os_str().len() + 32;
    if lower(layers, run_dir, bundle).len() + fixed > MAX_OPTIONS {
        let rule = format!("has {} layers, more than an overlay can name", layers.len());
        return Err(invalid("image", rule));
    }
    // An overlay's options are split at these.
    for path in [run_dir, bundle] {
        let text = path.display().to_string();
        if text.contains([',', ':', '\\']) {
            return Err(invalid(
                "path",
                format!("{text} must not contain ',', ':' or '\\'"),
            ));
        }
    }
    Ok(())
}

/// The root file system of a container, at `<bundle>/rootfs`. Blocks.
pub(crate) fn prepare(
    image: &Image,
    layers: &[LayerMount],
    run_dir: &Path,
    bundle: &Path,
) -> io::Result<()> {
    mount_layers(image, layers, run_dir)?;
    let (target, empty) = (bundle.join("rootfs"), bundle.join("empty"));
    let (upper, work) = (bundle.join("upper"), bundle.join("work"));
    for directory in [&target, &empty, &upper, &work] {
        fs::create_dir_all(directory)?;
    }
    if is_mount(&target)? {
        return Ok(());
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower(layers, run_dir, &empty),
        upper.display(),
        work.display()
    );
    overlay(&options, &target, MsFlags::empty())
}

/// An image as a read-only volume, at `<bundle>/volumes/<index>`. Blocks.
pub(crate) fn prepare_volume(
    image: &Image,
    layers: &[LayerMount],
    run_dir: &Path,
    bundle: &Path,
    index: usize,
) -> io::Result<PathBuf> {
    mount_layers(image, layers, run_dir)?;
    let (target, empty) = (volume_path(bundle, index), bundle.join("empty"));
    fs::create_dir_all(&target)?;
    fs::create_dir_all(&empty)?;
    if !is_mount(&target)? {
        // An overlay that cannot be written needs two directories.
        let lower = match layers.len() {
            0 | 1 => format!("{}:{}", lower(layers, run_dir, &empty), empty.display()),
            _ => lower(layers, run_dir, &empty),
        };
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        overlay(&format!("lowerdir={lower}"), &target, flags)?;
    }
    Ok(target)
}

pub(crate) fn volume_path(bundle: &Path, index: usize) -> PathBuf {
    bundle.join("volumes").join(index.to_string())
}

/// Unmounts everything of a container and removes its directory. Blocks.
pub(crate) fn clear(bundle: &Path) -> io::Result<()> {
    unmount(&bundle.join("rootfs"))?;
    match fs::read_dir(bundle.join("volumes")) {
        Ok(volumes) => {
            for volume in volumes {
                unmount(&volume?.path())?;
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    remove_directory(bundle)
}

/// Unmounts a layer that nobody needs. Blocks.
pub(crate) fn unmount_layer(run_dir: &Path, slot: u32) -> io::Result<()> {
    let path = layer_path(run_dir, slot);
    unmount(&path)?;
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(names: &[char]) -> Image {
        let digest = |name: &char| {
            let hex: String = std::iter::repeat_n(*name, 64).collect();
            format!("sha256:{hex}").parse::<Digest>().unwrap()
        };
        let layer = |name: &char| hypernetes_image::Layer {
            diff_id: digest(name),
            blob: digest(name),
            disk: "/disk".into(),
            disk_size: 1,
        };
        Image {
            id: digest(&'f'),
            manifest: digest(&'f'),
            tags: Vec::new(),
            digests: Vec::new(),
            config: hypernetes_image::ImageConfig::default(),
            layers: names.iter().map(layer).collect(),
            size: 1,
            created: None,
            architecture: "amd64".into(),
        }
    }

    #[test]
    fn a_layer_is_mounted_once_and_for_as_long_as_somebody_needs_it() {
        let (one, two) = (ContainerId::random(), ContainerId::random());
        let mut layers = Layers::default();
        let slots = |reserved: Vec<LayerMount>| -> Vec<u32> {
            reserved.iter().map(|layer| layer.slot).collect()
        };
        assert_eq!(slots(layers.reserve(&image(&['a', 'b']), &one)), [0, 1]);
        assert_eq!(slots(layers.reserve(&image(&['a', 'c']), &two)), [0, 2]);
        assert_eq!(layers.unneeded_without(&one), [1]);
        layers.release(&one);
        assert!(layers.is_used(0) && !layers.is_used(1));
        assert_eq!(slots(layers.reserve(&image(&['d']), &one)), [1]);
        assert_eq!(layers.unneeded_without(&two), [0, 2]);
    }

    #[test]
    fn the_uppermost_layer_is_named_first_and_too_many_are_refused() {
        let id = ContainerId::random();
        let mut layers = Layers::default();
        let reserved = layers.reserve(&image(&['a', 'b']), &id);
        let run = Path::new("/run/h");
        assert_eq!(
            lower(&reserved, run, Path::new("/e")),
            "/run/h/l/1:/run/h/l/0"
        );
        assert_eq!(lower(&[], run, Path::new("/e")), "/e");
        assert!(check(&reserved, run, Path::new("/state/c")).is_ok());
        assert!(check(&reserved, run, Path::new("/state,c")).is_err());
        let many: Vec<LayerMount> = (0..600)
            .map(|slot| LayerMount {
                slot,
                ..reserved[0].clone()
            })
            .collect();
        assert!(check(&many, run, Path::new("/state/c")).is_err());
    }
}
