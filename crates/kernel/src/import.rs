//! Takes a distribution's kernel into the catalog.
//!
//! The kernel file is kept as it is: VMMs boot a bzImage. Of the modules only those are kept that a
//! pod's machine needs and that are not built in, with what they depend on. Names in a package
//! choose nothing on the host: files are written under our own names.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, BufReader, Read},
    path::Path,
};

use hypernetes_types::KernelName;

use crate::{
    Config, Finding, KernelCatalog, KernelEntry, KernelError, Machine, Origin, Severity,
    archive::{ArchiveError, copy_bounded, decompress, read_bounded, visit_deb},
    catalog::Draft,
    error::Findings,
    module::{self, ModuleInfo},
    requirements,
};

const MAX_KERNEL: u64 = 256 << 20;
const MAX_MODULE: u64 = 64 << 20;
const MAX_MODULES: u64 = 2 << 30;
const MAX_LIST: u64 = 8 << 20;
const MAX_DEPTH: usize = 16;

/// Trees of modules that nothing a VM needs depends on: most of a general-purpose kernel's bytes.
const NOT_FOR_VMS: &[&str] = &[
    "sound/",
    "drivers/gpu/",
    "drivers/media/",
    "drivers/infiniband/",
    "drivers/net/ethernet/",
    "drivers/net/wireless/",
    "drivers/usb/",
    "drivers/iio/",
    "drivers/staging/",
];

/// Loaded before the rest if they are there: ext4 of older kernels asks for the checksum by an
/// alias, which names no module.
const CHECKSUMS: &[&str] = &["crc32c_intel", "crc32c_generic", "libcrc32c"];

/// Imports the kernel of a Debian package. Without a name it gets the kernel's release.
pub fn deb(
    catalog: &KernelCatalog,
    path: &Path,
    name: Option<KernelName>,
) -> Result<KernelEntry, KernelError> {
    let file = File::open(path).map_err(KernelError::io("open", path))?;
    let bad = |why: String| KernelError::BadPackage {
        path: path.to_owned(),
        why,
    };
    let draft_name = match name {
        Some(name) => name,
        None => release_in(path)?
            .parse()
            .map_err(|_cause| bad("its release is no name: give one".to_owned()))?,
    };
    let draft = catalog.draft(&draft_name)?;
    let mut found = Found::default();
    visit_deb(BufReader::new(file), |name, content| {
        found.take(&draft, name, content)
    })
    .map_err(|e| match e {
        ArchiveError::Format(why) => bad(why.to_owned()),
        ArchiveError::Read(e) if e.kind() == io::ErrorKind::FileTooLarge => bad(e.to_string()),
        ArchiveError::Read(e) => KernelError::io("read", path)(e),
    })?;
    let file_name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let release = found
        .release
        .clone()
        .ok_or_else(|| bad("it holds no boot/vmlinuz".to_owned()))?;
    settle(draft, &found, &release, Origin::Package(file_name))
}

/// A kernel as files: the way for kernels that are in no package.
#[derive(Debug, Clone, Copy)]
pub struct Files<'a> {
    /// vmlinuz (bzImage) or vmlinux.
    pub kernel: &'a Path,
    /// Its modules: `/lib/modules/RELEASE`. None, if everything is built in.
    pub modules: Option<&'a Path>,
    /// Its configuration. Without it only modules can be checked, and the machine is q35.
    pub config: Option<&'a Path>,
}

/// Imports a kernel from files.
pub fn files(
    catalog: &KernelCatalog,
    files: Files<'_>,
    name: &KernelName,
) -> Result<KernelEntry, KernelError> {
    let bad = |why: &str| KernelError::BadPackage {
        path: files.kernel.to_owned(),
        why: why.to_owned(),
    };
    let draft = catalog.draft(name)?;
    let mut found = Found::default();
    let read_failed = |path: &Path| KernelError::io("read", path.to_owned());
    {
        let kernel = File::open(files.kernel).map_err(KernelError::io("open", files.kernel))?;
        let mut out = draft.create("kernel").map_err(read_failed(files.kernel))?;
        copy_bounded(&mut &kernel, &mut out, MAX_KERNEL).map_err(read_failed(files.kernel))?;
    }
    let release = release_of_file(files.kernel)
        .map_err(read_failed(files.kernel))?
        .ok_or_else(|| bad("it is neither a bzImage nor a vmlinux"))?;
    if let Some(path) = files.config {
        let file = File::open(path).map_err(KernelError::io("open", path))?;
        let bytes = read_bounded(&mut decompress(file).map_err(read_failed(path))?, MAX_LIST)
            .map_err(read_failed(path))?;
        found.config = Some(String::from_utf8_lossy(&bytes).into_owned());
    }
    if let Some(root) = files.modules {
        walk(root, "", &mut |relative, file| {
            found.take_module(&draft, relative, &mut BufReader::new(file))
        })
        .map_err(read_failed(root))?;
    }
    settle(
        draft,
        &found,
        &release,
        Origin::File(files.kernel.display().to_string()),
    )
}

/// What was found of a kernel; the modules are in the draft's directory `all`.
#[derive(Debug, Default)]
struct Found {
    release: Option<String>,
    config: Option<String>,
    builtin: BTreeSet<String>,
    modules: BTreeMap<String, ModuleInfo>,
    module_bytes: u64,
}

impl Found {
    /// Takes a file of a package, if it is of use.
    fn take(&mut self, draft: &Draft<'_>, name: &str, content: &mut dyn Read) -> io::Result<()> {
        if let Some(release) = name.strip_prefix("boot/vmlinuz-") {
            if self.release.is_none() && is_release(release) {
                copy_bounded(content, &mut draft.create("kernel")?, MAX_KERNEL)?;
                self.release = Some(release.to_owned());
            }
        } else if name.starts_with("boot/config-") {
            let bytes = read_bounded(content, MAX_LIST)?;
            self.config = Some(String::from_utf8_lossy(&bytes).into_owned());
        } else if let Some(rest) = name
            .strip_prefix("usr/")
            .unwrap_or(name)
            .strip_prefix("lib/modules/")
            && let Some((_release, relative)) = rest.split_once('/')
        {
            self.take_module(draft, relative, content)?;
        }
        Ok(())
    }

    /// Takes a file below `/lib/modules/RELEASE`, if it is of use.
    fn take_module(
        &mut self,
        draft: &Draft<'_>,
        path: &str,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        let file = path.rsplit('/').next().unwrap_or(path);
        if path == "modules.builtin" {
            let list = read_bounded(content, MAX_LIST)?;
            let list = String::from_utf8_lossy(&list);
            let names = list
                .lines()
                .filter_map(|line| module::name_of_file(line.rsplit('/').next()?));
            self.builtin.extend(names);
            return Ok(());
        }
        let relative = path.strip_prefix("kernel/").unwrap_or(path);
        let Some(name) = module::name_of_file(file) else {
            return Ok(());
        };
        if NOT_FOR_VMS.iter().any(|tree| relative.starts_with(tree))
            || self.modules.contains_key(&name)
        {
            return Ok(());
        }
        let elf = read_bounded(&mut decompress(content)?, MAX_MODULE)?;
        self.module_bytes += elf.len() as u64;
        if self.module_bytes > MAX_MODULES {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "its modules are too large",
            ));
        }
        // What is no module is left out, and missed by name if it was needed.
        if let Some(info) = module::read(&elf) {
            io::Write::write_all(&mut draft.create(&format!("all/{name}.ko"))?, &elf)?;
            self.modules.insert(name, info);
        }
        Ok(())
    }
}

/// Chooses the modules, checks that nothing essential is missing, and makes the entry.
fn settle(
    draft: Draft<'_>,
    found: &Found,
    release: &str,
    origin: Origin,
) -> Result<KernelEntry, KernelError> {
    let config = found.config.as_deref().map(Config::parse);
    let machine = config.as_ref().map_or(Machine::Q35, Config::machine);
    let mut wanted: Vec<&str> = CHECKSUMS.to_vec();
    let mut missing = Vec::new();
    for requirement in requirements(machine) {
        let builtin = config
            .as_ref()
            .is_some_and(|config| config.is_builtin(requirement.option))
            || requirement
                .module
                .is_some_and(|module| found.builtin.contains(module));
        match requirement.module {
            _ if builtin => {}
            Some(module) if found.modules.contains_key(module) => wanted.push(module),
            // Without a configuration nobody knows about options that make no module.
            None if config.is_none() => {}
            _ if requirement.severity == Severity::Essential => {
                missing.push(Finding::of(&requirement));
            }
            _ => tracing::debug!(
                option = requirement.option,
                "kernel lacks a recommended option"
            ),
        }
    }
    if !missing.is_empty() {
        return Err(KernelError::Unfit {
            release: release.to_owned(),
            findings: Findings(missing),
        });
    }
    let modules = module::order(&wanted, &found.modules);
    for name in &modules {
        let from = draft.dir.join("all").join(format!("{name}.ko"));
        draft.take_file(&format!("modules/{name}.ko"), &from)?;
    }
    let all = draft.dir.join("all");
    match fs::remove_dir_all(&all) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(KernelError::io("remove", all)(e));
        }
        _ => {}
    }
    if let Some(config) = &found.config {
        draft.put("config", config.as_bytes())?;
    }
    draft.finish(release, origin, machine, &modules)
}

/// Letters that a kernel release has.
fn is_release(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_digit())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'+' | b'~'))
}

/// The release by the kernel that a package holds, as a name for the catalog.
fn release_in(path: &Path) -> Result<String, KernelError> {
    let file = File::open(path).map_err(KernelError::io("open", path))?;
    let mut release = None;
    let result = visit_deb(BufReader::new(file), |name, _| {
        match name.strip_prefix("boot/vmlinuz-") {
            Some(found) if is_release(found) => {
                release = Some(found.to_owned());
                // Found: no need to read on.
                Err(io::ErrorKind::Interrupted.into())
            }
            _ => Ok(()),
        }
    });
    let why = match (release, result) {
        // '+' and '~' are in releases but not in names.
        (Some(release), _) => return Ok(release.replace(['+', '~'], "_")),
        (None, Err(e)) => e.to_string(),
        (None, Ok(())) => "it holds no boot/vmlinuz".to_owned(),
    };
    Err(KernelError::BadPackage {
        path: path.to_owned(),
        why,
    })
}

/// The release that a kernel file tells. `None` if it is no kernel.
fn release_of_file(path: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_KERNEL).read_to_end(&mut bytes)?;
    Ok(release_of_bzimage(&bytes).or_else(|| release_of_vmlinux(&bytes)))
}

/// vmlinux tells in the banner that it prints: `Linux version RELEASE (…`.
fn release_of_vmlinux(bytes: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    if !bytes.starts_with(b"\x7fELF") {
        return None;
    }
    let at = bytes
        .windows(BANNER.len())
        .position(|window| window == BANNER)?
        + BANNER.len();
    let text = &bytes[at..bytes.len().min(at + 128)];
    let word = std::str::from_utf8(text.split(|b| *b == b' ').next()?).ok()?;
    is_release(word).then(|| word.to_owned())
}

/// bzImage tells in the boot protocol's `kernel_version` (kernel
/// `Documentation/arch/x86/boot.rst`).
fn release_of_bzimage(start: &[u8]) -> Option<String> {
    if start.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let at = 0x200 + usize::from(u16::from_le_bytes([*start.get(0x20e)?, *start.get(0x20f)?]));
    let text = start.get(at..start.len().min(at + 128))?;
    let word = text.split(|b| matches!(b, 0 | b' ')).next()?;
    let word = std::str::from_utf8(word).ok()?;
    is_release(word).then(|| word.to_owned())
}

/// Calls `visit` with each regular file below `root`. Links are not followed.
fn walk(
    root: &Path,
    below: &str,
    visit: &mut dyn FnMut(&str, File) -> io::Result<()>,
) -> io::Result<()> {
    if below.split('/').count() > MAX_DEPTH {
        return Ok(());
    }
    let mut entries: Vec<_> = fs::read_dir(root.join(below))?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let relative = if below.is_empty() {
            name.to_owned()
        } else {
            format!("{below}/{name}")
        };
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(root, &relative, visit)?;
        } else if kind.is_file() {
            visit(&relative, File::open(entry.path())?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{archive::tests as ar, module::tests::elf};

    fn catalog() -> (tempfile::TempDir, KernelCatalog) {
        let temp = tempfile::tempdir().unwrap();
        let catalog = KernelCatalog::open(temp.path()).unwrap();
        (temp, catalog)
    }

    /// A configuration with everything, drivers as modules as in a distribution.
    fn config(without: &str) -> String {
        let line = |r: &crate::Requirement| {
            let kind = if r.module.is_some() && r.option != "EXT4_FS" {
                'm'
            } else {
                'y'
            };
            format!("CONFIG_{}={kind}\n", r.option)
        };
        requirements(Machine::Q35)
            .iter()
            .filter(|r| r.option != without)
            .map(line)
            .collect()
    }

    fn modules(without: &str) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<(String, Vec<u8>)> = requirements(Machine::Q35)
            .iter()
            .filter_map(|r| r.module)
            .filter(|module| *module != without && *module != "ext4")
            .map(|module| {
                let depends: &[u8] = match module {
                    "virtio_pci" => b"depends=virtio_ring,virtio\0",
                    "virtio_net" => b"depends=net_failover\0",
                    _ => b"depends=\0",
                };
                (
                    format!(
                        "./lib/modules/6.1.0-t/kernel/x/{}.ko",
                        module.replace("_rng", "-rng")
                    ),
                    elf(depends),
                )
            })
            .collect();
        for (path, depends) in [
            ("virtio", b"".as_slice()),
            ("virtio_ring", b"depends=virtio\0"),
            ("net_failover", b""),
            ("unrelated", b""),
        ] {
            files.push((
                format!("./lib/modules/6.1.0-t/kernel/y/{path}.ko.xz"),
                ar::xz(&elf(depends)),
            ));
        }
        files.push((
            "./lib/modules/6.1.0-t/kernel/sound/loud.ko".to_owned(),
            elf(b""),
        ));
        files
    }

    fn package(files: Vec<(String, Vec<u8>)>, config: &str) -> Vec<u8> {
        let mut all = vec![
            ("./boot/vmlinuz-6.1.0-t".to_owned(), b"kernel".to_vec()),
            (
                "./boot/config-6.1.0-t".to_owned(),
                config.as_bytes().to_vec(),
            ),
        ];
        all.extend(files);
        let all: Vec<(&str, &[u8])> = all
            .iter()
            .map(|(n, d)| (n.as_str(), d.as_slice()))
            .collect();
        ar::deb(&all, ".zst", ar::zst)
    }

    fn import(
        catalog: &KernelCatalog,
        temp: &Path,
        package: &[u8],
    ) -> Result<KernelEntry, KernelError> {
        let path = temp.join("linux-image.deb");
        fs::write(&path, package).unwrap();
        deb(catalog, &path, None)
    }

    #[test]
    fn a_package_is_taken_with_the_modules_it_needs() {
        let (temp, catalog) = catalog();
        let entry = import(&catalog, temp.path(), &package(modules(""), &config(""))).unwrap();
        assert_eq!(
            (entry.name.as_str(), entry.release.as_str()),
            ("6.1.0-t", "6.1.0-t")
        );
        assert_eq!(entry.machine, Machine::Q35);
        let at = |name: &str| entry.modules.iter().position(|m| m == name).unwrap();
        assert!(at("virtio") < at("virtio_ring") && at("virtio_ring") < at("virtio_pci"));
        assert!(at("net_failover") < at("virtio_net"));
        assert!(
            !entry
                .modules
                .iter()
                .any(|m| ["unrelated", "loud", "ext4"].contains(&m.as_str()))
        );
        assert_eq!(catalog.findings(&entry.name).unwrap(), Some(vec![]));
        let kernel = temp.path().join("kernels/6.1.0-t");
        let mut files: Vec<_> = fs::read_dir(&kernel)
            .unwrap()
            .flatten()
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["config", "entry.json", "kernel", "modules"]);
        let prepared = catalog.prepare_bytes(&entry.name, b"init").unwrap();
        let initrd = fs::read(prepared.initrd).unwrap();
        assert!(initrd.windows(15).any(|w| w == b"virtio_pci.ko\nv"));
    }

    #[test]
    fn what_is_essential_and_missing_is_named() {
        let (temp, catalog) = catalog();
        let error = import(
            &catalog,
            temp.path(),
            &package(modules("overlay"), &config("OVERLAY_FS")),
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel 6.1.0-t cannot run pods: lacks CONFIG_OVERLAY_FS: container root file systems need it"
        );
        // Configured as a module that is not in the package.
        let error = import(
            &catalog,
            temp.path(),
            &package(modules("sd_mod"), &config("")),
        )
        .unwrap_err();
        assert!(error.to_string().contains("CONFIG_BLK_DEV_SD"), "{error}");
        // Recommended is not essential.
        import(
            &catalog,
            temp.path(),
            &package(modules("af_packet"), &config("PACKET")),
        )
        .unwrap();
        assert_eq!(catalog.list().unwrap().len(), 1);
    }

    #[test]
    fn hostile_packages_write_nothing_outside() {
        let (temp, catalog) = catalog();
        let mut files = modules("");
        for path in [
            "../../../../tmp/evil.ko",
            "/etc/evil.ko",
            "./boot/vmlinuz-../../evil",
            "./lib/modules/../../evil/kernel/evil.ko",
            "./lib/modules/6.1.0-t/kernel/..ko",
        ] {
            files.insert(0, (path.to_owned(), elf(b"")));
        }
        import(&catalog, temp.path(), &package(files, &config(""))).unwrap();
        let evil = |dir: &Path| {
            let mut found = Vec::new();
            walk(dir, "", &mut |path, _| {
                found.push(path.to_owned());
                Ok(())
            })
            .unwrap();
            found
                .into_iter()
                .filter(|path| path.contains("evil"))
                .count()
        };
        assert_eq!(evil(temp.path()), 0);
    }

    #[test]
    fn what_is_no_kernel_package_is_refused() {
        let (temp, catalog) = catalog();
        for junk in [
            b"junk".to_vec(),
            ar::deb(&[("./usr/bin/x", b"x")], ".xz", ar::xz),
        ] {
            let error = import(&catalog, temp.path(), &junk).unwrap_err();
            assert!(matches!(error, KernelError::BadPackage { .. }), "{error}");
        }
        assert_eq!(catalog.list().unwrap(), []);
    }

    #[test]
    fn kernels_tell_their_release() {
        let vmlinux = b"\x7fELF....Linux version 6.12.1-hyper (x@y) (gcc) #1\n";
        assert_eq!(release_of_vmlinux(vmlinux).as_deref(), Some("6.12.1-hyper"));
        assert_eq!(release_of_vmlinux(b"\x7fELF Linux version ../x (x"), None);
        assert_eq!(release_of_vmlinux(b"Linux version 6.12.1 ("), None);
        assert_eq!(release_of_bzimage(&[0; 0x210]), None);
        let mut image = vec![0xff; 0x210];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(release_of_bzimage(&image), None);
    }

    #[test]
    fn files_are_imported_too() {
        let (temp, catalog) = catalog();
        let kernel = temp.path().join("vmlinuz");
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        image[0x300..0x300 + 24].copy_from_slice(b"6.1.0-t (builder) #1 SMP");
        fs::write(&kernel, &image).unwrap();
        let tree = temp.path().join("6.1.0-t");
        for (path, data) in modules("") {
            let path = tree.join(path.strip_prefix("./lib/modules/6.1.0-t/").unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, data).unwrap();
        }
        // A loop of links ends, because links are not followed.
        std::os::unix::fs::symlink(&tree, tree.join("build")).unwrap();
        fs::write(tree.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let name = "mine".parse().unwrap();
        let given = Files {
            kernel: &kernel,
            modules: Some(&tree),
            config: None,
        };
        let entry = files(&catalog, given, &name).unwrap();
        assert_eq!(
            (entry.release.as_str(), entry.machine),
            ("6.1.0-t", Machine::Q35)
        );
        assert_eq!(catalog.findings(&name).unwrap(), None);
        // Without modules.builtin, ext4 is missing.
        fs::remove_file(tree.join("modules.builtin")).unwrap();
        let error = files(&catalog, given, &"other".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("CONFIG_EXT4_FS"), "{error}");
    }
}
