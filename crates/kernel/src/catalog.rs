//! The kernels of this node, each a directory.
//!
//! ```text
//! STATE/kernels/.default          name of the default kernel
//! STATE/kernels/NAME/entry.json   what it is
//! STATE/kernels/NAME/kernel       what the VMM loads
//! STATE/kernels/NAME/config       its configuration, if it came with one
//! STATE/kernels/NAME/modules/     the modules it needs, uncompressed
//! STATE/kernels/NAME/initrd-HASH  modules and HyperStart, made when it is to boot
//! ```
//! A kernel appears whole or not at all: it is made in a draft directory and renamed. Files are
//! readable by everybody, because VMMs run as users of their own.

use std::{
    collections::HashMap,
    fs::{self, File, Permissions},
    io::{self, BufWriter, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hypernetes_types::{Digest, KernelName};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{Config, Finding, KernelError, check_config, initramfs};

/// How the guest's devices are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// Memory-mapped devices named on the kernel command line: small and fast to boot.
    Microvm,
    /// PCI devices: what distribution kernels can drive.
    Q35,
}

/// Where a kernel came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Built from this project's configuration.
    Built,
    /// Imported from a Debian package of this file name.
    Package(String),
    /// Imported from a kernel file of this path.
    File(String),
}

/// A kernel of the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelEntry {
    /// The name that pods ask for.
    pub name: KernelName,
    /// What `uname -r` says in the guest.
    pub release: String,
    /// Where it came from.
    pub origin: Origin,
    /// Machine that it drives.
    pub machine: Machine,
    /// Checksum of the kernel file.
    pub kernel: Digest,
    /// Modules that are loaded at boot, in order.
    pub modules: Vec<String>,
    /// Checksum over all of them.
    pub modules_digest: Digest,
    /// When it was added, in seconds since 1970.
    pub created: u64,
}

/// What a VMM needs to boot a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedKernel {
    /// vmlinux or bzImage.
    pub kernel: PathBuf,
    /// HyperStart and modules.
    pub initrd: PathBuf,
    /// Machine that the kernel drives.
    pub machine: Machine,
    /// What `uname -r` says in the guest.
    pub release: String,
}

/// Identity of a file without reading it: device, inode, size, times of change.
type Stamp = (u64, u64, u64, i64, i64, i64);

/// The kernels of this node.
#[derive(Debug)]
pub struct KernelCatalog {
    root: PathBuf,
    replace: bool,
    /// Checksums of programs that were packed, so that a launch need not read them again.
    known: Mutex<HashMap<PathBuf, (Stamp, Digest)>>,
}

const DEFAULT: &str = ".default";
const DRAFT: &str = ".draft-";
const ENTRY: &str = "entry.json";

impl KernelCatalog {
    /// Opens the catalog below a state directory.
    pub fn open(state_dir: &Path) -> Result<Self, KernelError> {
        let root = state_dir.join("kernels");
        fs::create_dir_all(&root).map_err(KernelError::io("create", &root))?;
        let catalog = Self {
            root,
            replace: false,
            known: Mutex::default(),
        };
        catalog.remove_stale_drafts()?;
        Ok(catalog)
    }

    /// Makes additions replace a kernel of the same name instead of refusing.
    #[must_use]
    pub fn replacing(mut self) -> Self {
        self.replace = true;
        self
    }

    /// All kernels, by name.
    pub fn list(&self) -> Result<Vec<KernelEntry>, KernelError> {
        let mut entries = Vec::new();
        for name in self.names()? {
            match self.get(&name) {
                Ok(entry) => entries.push(entry),
                // Removed since the names were read.
                Err(KernelError::NotFound { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// The kernel of this name.
    pub fn get(&self, name: &KernelName) -> Result<KernelEntry, KernelError> {
        let path = self.dir(name).join(ENTRY);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(io::Error::from)
                .map_err(KernelError::io("read", path)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(KernelError::NotFound { name: name.clone() })
            }
            Err(e) => Err(KernelError::io("read", path)(e)),
        }
    }

    /// The name of the default kernel, if there is one.
    pub fn default_name(&self) -> Result<Option<KernelName>, KernelError> {
        let path = self.root.join(DEFAULT);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().parse().ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(KernelError::io("read", path)(e)),
        }
    }

    /// The kernel of pods that name none.
    pub fn default_kernel(&self) -> Result<KernelEntry, KernelError> {
        let name = self.default_name()?.ok_or(KernelError::NoDefault)?;
        self.get(&name)
    }

    /// Makes a kernel the default.
    pub fn set_default(&self, name: &KernelName) -> Result<(), KernelError> {
        self.get(name)?;
        let path = self.root.join(DEFAULT);
        let draft = self
            .root
            .join(format!("{DRAFT}default-{}", std::process::id()));
        fs::write(&draft, name.as_str())
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(KernelError::io("write", path))
    }

    /// Removes a kernel. VMs that run it are not concerned. The default can only be the last to go.
    pub fn remove(&self, name: &KernelName) -> Result<(), KernelError> {
        self.get(name)?;
        if self.default_name()?.as_ref() == Some(name) {
            if self.names()?.len() > 1 {
                return Err(KernelError::IsDefault { name: name.clone() });
            }
            let path = self.root.join(DEFAULT);
            fs::remove_file(&path).map_err(KernelError::io("remove", path))?;
        }
        // Renamed first: a half-removed kernel must not look like one.
        let dir = self.dir(name);
        let trash = self.new_draft_path();
        fs::rename(&dir, &trash)
            .and_then(|()| fs::remove_dir_all(&trash))
            .map_err(KernelError::io("remove", dir))
    }

    /// What a kernel lacks by its configuration; `None` if it came without one.
    pub fn findings(&self, name: &KernelName) -> Result<Option<Vec<Finding>>, KernelError> {
        self.get(name)?;
        let path = self.dir(name).join("config");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(check_config(&Config::parse(&text)))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(KernelError::io("read", path)(e)),
        }
    }

    /// Adds a kernel that [`hyperkernel::build`](crate::hyperkernel::build) made: a directory with
    /// `vmlinux`, `config` and `release`.
    pub fn add_built(&self, name: &KernelName, dir: &Path) -> Result<KernelEntry, KernelError> {
        let draft = self.draft(name)?;
        let read = |file: &str| {
            let path = dir.join(file);
            fs::read_to_string(&path).map_err(KernelError::io("read", path))
        };
        let (config, release) = (read("config")?, read("release")?);
        draft.take_file("kernel", &dir.join("vmlinux"))?;
        draft.put("config", config.as_bytes())?;
        let machine = Config::parse(&config).machine();
        draft.finish(release.trim(), Origin::Built, machine, &[])
    }

    /// Makes what a VMM needs to boot the kernel: the initramfs is made anew whenever HyperStart or
    /// the kernel has changed, and otherwise is there.
    pub fn prepare(
        &self,
        name: &KernelName,
        hyperstart: &Path,
    ) -> Result<PreparedKernel, KernelError> {
        let program = self.checksum(hyperstart)?;
        let read = || fs::read(hyperstart).map_err(KernelError::io("read", hyperstart));
        self.prepare_with(name, &program, read)
    }

    /// The same with HyperStart as bytes, which are hashed at each call.
    pub fn prepare_bytes(
        &self,
        name: &KernelName,
        hyperstart: &[u8],
    ) -> Result<PreparedKernel, KernelError> {
        self.prepare_with(name, &digest(hyperstart), || Ok(hyperstart.to_vec()))
    }

    fn prepare_with(
        &self,
        name: &KernelName,
        program: &Digest,
        read: impl FnOnce() -> Result<Vec<u8>, KernelError>,
    ) -> Result<PreparedKernel, KernelError> {
        let entry = self.get(name)?;
        let dir = self.dir(name);
        let key = digest(format!("1 {program} {}", entry.modules_digest).as_bytes());
        let file = format!("initrd-{}", &key.hex()[..16]);
        let initrd = dir.join(&file);
        if !initrd.exists() {
            self.write_initrd(&entry, &initrd, &read()?)?;
            // Those of former HyperStarts. VMs that booted them no longer need them.
            for old in fs::read_dir(&dir)
                .map_err(KernelError::io("list", &dir))?
                .flatten()
            {
                let old_name = old.file_name();
                if old_name.to_string_lossy().starts_with("initrd-") && old_name != *file {
                    drop(fs::remove_file(old.path()));
                }
            }
        }
        Ok(PreparedKernel {
            kernel: dir.join("kernel"),
            initrd,
            machine: entry.machine,
            release: entry.release,
        })
    }

    fn write_initrd(
        &self,
        entry: &KernelEntry,
        path: &Path,
        init: &[u8],
    ) -> Result<(), KernelError> {
        let mut modules = Vec::new();
        for name in &entry.modules {
            let path = self
                .dir(&entry.name)
                .join("modules")
                .join(format!("{name}.ko"));
            let content = fs::read(&path).map_err(KernelError::io("read", path))?;
            modules.push((name.as_str(), content));
        }
        let draft = self.new_draft_path();
        let write = || -> io::Result<()> {
            let mut out = BufWriter::new(File::create(&draft)?);
            initramfs::write(
                &mut out,
                init,
                modules.iter().map(|(name, data)| (*name, data.as_slice())),
            )?;
            out.into_inner()?
                .set_permissions(Permissions::from_mode(0o644))?;
            fs::rename(&draft, path)
        };
        write().map_err(|e| {
            drop(fs::remove_file(&draft));
            KernelError::io("write", path)(e)
        })
    }

    fn checksum(&self, path: &Path) -> Result<Digest, KernelError> {
        let failed = || KernelError::io("read", path);
        let meta = fs::metadata(path).map_err(failed())?;
        let stamp = (
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime_nsec(),
        );
        let known = || self.known.lock().expect("no holder of this lock panics");
        if let Some((of, digest)) = known().get(path)
            && *of == stamp
        {
            return Ok(digest.clone());
        }
        let digest = digest_of(File::open(path).map_err(failed())?).map_err(failed())?;
        known().insert(path.to_owned(), (stamp, digest.clone()));
        Ok(digest)
    }

    fn names(&self) -> Result<Vec<KernelName>, KernelError> {
        let listing = fs::read_dir(&self.root).map_err(KernelError::io("list", &self.root))?;
        // Drafts and the default begin with a dot, which no name does.
        Ok(listing
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect())
    }

    fn dir(&self, name: &KernelName) -> PathBuf {
        self.root.join(name.as_str())
    }

    fn new_draft_path(&self) -> PathBuf {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.root
            .join(format!("{DRAFT}{}-{number}", std::process::id()))
    }

    /// Begins a kernel. It is there once [`Draft::finish`] returns.
    pub(crate) fn draft(&self, name: &KernelName) -> Result<Draft<'_>, KernelError> {
        if !self.replace && self.dir(name).exists() {
            return Err(KernelError::Exists { name: name.clone() });
        }
        let dir = self.new_draft_path();
        fs::create_dir(&dir).map_err(KernelError::io("create", &dir))?;
        Ok(Draft {
            catalog: self,
            name: name.clone(),
            dir,
        })
    }

    /// Another process may be at work on a draft; one of yesterday is left from a crash.
    fn remove_stale_drafts(&self) -> Result<(), KernelError> {
        let listing = fs::read_dir(&self.root).map_err(KernelError::io("list", &self.root))?;
        for entry in listing.flatten() {
            let draft = entry.file_name().to_string_lossy().starts_with(DRAFT);
            let age = entry.metadata().and_then(|meta| meta.modified()).ok();
            let age = age.and_then(|at| SystemTime::now().duration_since(at).ok());
            if draft && age.is_some_and(|age| age > Duration::from_secs(24 * 3600)) {
                let path = entry.path();
                drop(fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)));
            }
        }
        Ok(())
    }
}

/// A kernel in the making. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    catalog: &'a KernelCatalog,
    name: KernelName,
    pub(crate) dir: PathBuf,
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.dir));
    }
}

impl Draft<'_> {
    /// Creates a file of the kernel, by one of our own names.
    pub(crate) fn create(&self, file: &str) -> io::Result<File> {
        let path = self.dir.join(file);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let file = File::create(path)?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        Ok(file)
    }

    pub(crate) fn put(&self, file: &str, content: &[u8]) -> Result<(), KernelError> {
        self.create(file)
            .and_then(|mut out| out.write_all(content))
            .map_err(KernelError::io("write", self.dir.join(file)))
    }

    pub(crate) fn take_file(&self, file: &str, from: &Path) -> Result<(), KernelError> {
        let mut source = File::open(from).map_err(KernelError::io("open", from))?;
        self.create(file)
            .and_then(|mut out| io::copy(&mut source, &mut out))
            .map_err(KernelError::io("copy", from))?;
        Ok(())
    }

    /// Makes the kernel an entry of the catalog; the first one becomes the default.
    pub(crate) fn finish(
        self,
        release: &str,
        origin: Origin,
        machine: Machine,
        modules: &[String],
    ) -> Result<KernelEntry, KernelError> {
        let checksum = |file: &str| {
            let path = self.dir.join(file);
            File::open(&path)
                .and_then(digest_of)
                .map_err(KernelError::io("read", path))
        };
        let mut all = String::new();
        for name in modules {
            all.push_str(&format!(
                "{name} {}\n",
                checksum(&format!("modules/{name}.ko"))?
            ));
        }
        let entry = KernelEntry {
            name: self.name.clone(),
            release: release.to_owned(),
            origin,
            machine,
            kernel: checksum("kernel")?,
            modules: modules.to_vec(),
            modules_digest: digest(all.as_bytes()),
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        };
        let text = serde_json::to_vec_pretty(&entry).map_err(io::Error::from);
        self.put(
            ENTRY,
            &text.map_err(KernelError::io("write", self.dir.join(ENTRY)))?,
        )?;
        let target = self.catalog.dir(&self.name);
        let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
        for file in ["kernel", ENTRY] {
            sync(&self.dir.join(file)).map_err(KernelError::io("write", self.dir.join(file)))?;
        }
        let former = self.catalog.new_draft_path();
        if self.catalog.replace && fs::rename(&target, &former).is_ok() {
            tracing::debug!(kernel = %self.name, "replacing the former kernel of this name");
        }
        match fs::rename(&self.dir, &target) {
            // What cannot be removed is a draft, which is cleared up at some later opening.
            Ok(()) => drop(fs::remove_dir_all(&former)),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) =>
            {
                return Err(KernelError::Exists {
                    name: self.name.clone(),
                });
            }
            Err(e) => return Err(KernelError::io("create", target)(e)),
        }
        sync(&self.catalog.root).map_err(KernelError::io("write", &self.catalog.root))?;
        if self.catalog.default_name()?.is_none() {
            self.catalog.set_default(&self.name)?;
        }
        Ok(entry)
    }
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

fn digest_of(mut file: File) -> io::Result<Digest> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match io::Read::read(&mut file, &mut chunk)? {
            0 => return Ok(Digest::from_sha256(hasher.finalize().into())),
            count => hasher.update(&chunk[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> KernelName {
        text.parse().unwrap()
    }

    fn built(temp: &Path) -> PathBuf {
        let dir = temp.join("built");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("vmlinux"), b"\x7fELF kernel").unwrap();
        fs::write(dir.join("release"), "6.12.1-hyper\n").unwrap();
        let config = "CONFIG_PVH=y\nCONFIG_VIRTIO_MMIO=y\nCONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y\n";
        fs::write(dir.join("config"), config).unwrap();
        dir
    }

    fn left_overs(catalog: &KernelCatalog) -> usize {
        let listing = fs::read_dir(&catalog.root).unwrap().flatten();
        listing
            .filter(|e| e.file_name().to_string_lossy().starts_with(DRAFT))
            .count()
    }

    #[test]
    fn kernels_come_and_go() {
        let temp = tempfile::tempdir().unwrap();
        let catalog = KernelCatalog::open(temp.path()).unwrap();
        assert!(matches!(
            catalog.default_kernel(),
            Err(KernelError::NoDefault)
        ));
        let dir = built(temp.path());
        let one = catalog.add_built(&name("one"), &dir).unwrap();
        assert_eq!(
            (one.release.as_str(), one.machine),
            ("6.12.1-hyper", Machine::Microvm)
        );
        assert!(matches!(
            catalog.add_built(&name("one"), &dir),
            Err(KernelError::Exists { .. })
        ));
        catalog.add_built(&name("two"), &dir).unwrap();

        let again = KernelCatalog::open(temp.path()).unwrap();
        assert_eq!(again.default_kernel().unwrap(), one);
        assert_eq!(again.list().unwrap().len(), 2);
        assert!(matches!(
            again.remove(&name("one")),
            Err(KernelError::IsDefault { .. })
        ));
        again.set_default(&name("two")).unwrap();
        again.remove(&name("one")).unwrap();
        again.remove(&name("two")).unwrap();
        assert!(matches!(
            again.set_default(&name("two")),
            Err(KernelError::NotFound { .. })
        ));
        assert_eq!(again.default_name().unwrap(), None);
        assert_eq!(left_overs(&again), 0);
    }

    #[test]
    fn a_kernel_is_replaced_when_told() {
        let temp = tempfile::tempdir().unwrap();
        let catalog = KernelCatalog::open(temp.path()).unwrap().replacing();
        let dir = built(temp.path());
        catalog.add_built(&name("one"), &dir).unwrap();
        fs::write(dir.join("release"), "6.12.2-hyper").unwrap();
        catalog.add_built(&name("one"), &dir).unwrap();
        assert_eq!(catalog.default_kernel().unwrap().release, "6.12.2-hyper");
        assert_eq!(left_overs(&catalog), 0);
    }

    #[test]
    fn a_failed_addition_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let catalog = KernelCatalog::open(temp.path()).unwrap();
        let dir = built(temp.path());
        fs::remove_file(dir.join("vmlinux")).unwrap();
        assert!(catalog.add_built(&name("one"), &dir).is_err());
        assert_eq!(catalog.list().unwrap(), []);
        assert_eq!(left_overs(&catalog), 0);
    }

    #[test]
    fn the_initramfs_follows_hyperstart() {
        let temp = tempfile::tempdir().unwrap();
        let catalog = KernelCatalog::open(temp.path()).unwrap();
        catalog
            .add_built(&name("one"), &built(temp.path()))
            .unwrap();
        let hyperstart = temp.path().join("hyperstart");
        fs::write(&hyperstart, "first").unwrap();
        let first = catalog.prepare(&name("one"), &hyperstart).unwrap();
        assert_eq!(catalog.prepare(&name("one"), &hyperstart).unwrap(), first);
        assert_eq!(
            catalog.prepare_bytes(&name("one"), b"first").unwrap(),
            first
        );
        for path in [&first.kernel, &first.initrd] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o644);
        }
        fs::write(&hyperstart, "second version").unwrap();
        let second = catalog.prepare(&name("one"), &hyperstart).unwrap();
        assert_ne!(first.initrd, second.initrd);
        assert!(!first.initrd.exists());
        let bytes = fs::read(&second.initrd).unwrap();
        assert!(bytes.windows(14).any(|window| window == b"second version"));
    }

    #[test]
    fn names_cannot_leave_the_catalog() {
        for bad in ["../x", ".default", ".draft-1-1", "a/b", ""] {
            assert!(bad.parse::<KernelName>().is_err(), "{bad}");
        }
    }
}
