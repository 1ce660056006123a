//! Real kernels of Debian: what the fabricated packages of the unit tests stand for.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "an integration test is all tests"
)]

use std::{path::PathBuf, process::Command};

use hypernetes_kernel::{
    Config, KernelCatalog, Machine, Severity, hyperkernel, import, requirements,
};

/// The package, or the reason why not is printed: there may be no network and no cache.
fn cloud_kernel(version: &str) -> Option<PathBuf> {
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../kernel/fetch-cloud-kernel"
    );
    let output = Command::new(script).arg(version).output().unwrap();
    if !output.status.success() {
        println!("SKIP: {}", String::from_utf8_lossy(&output.stderr).trim());
        return None;
    }
    Some(PathBuf::from(
        String::from_utf8(output.stdout).unwrap().trim(),
    ))
}

fn imports(version: &str) {
    let Some(package) = cloud_kernel(version) else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let catalog = KernelCatalog::open(temp.path()).unwrap();
    let entry = import::deb(&catalog, &package, None).unwrap();
    assert!(
        entry.release.starts_with(version) && entry.release.ends_with("cloud-amd64"),
        "{entry:?}"
    );
    assert_eq!(entry.machine, Machine::Q35);
    let at = |name: &str| entry.modules.iter().position(|module| module == name);
    if let (Some(bus), Some(driver)) = (at("virtio"), at("virtio_pci")) {
        assert!(bus < driver, "{entry:?}");
    }
    assert!(at("scsi_mod") < at("virtio_scsi"), "{entry:?}");
    let config = temp
        .path()
        .join("kernels")
        .join(entry.name.as_str())
        .join("config");
    let config = Config::parse(&std::fs::read_to_string(config).unwrap());
    for requirement in requirements(entry.machine) {
        let Some(module) = requirement.module else {
            continue;
        };
        assert!(
            at(module).is_some() || config.is_builtin(requirement.option),
            "{module}: {entry:?}"
        );
    }
    let findings = catalog.findings(&entry.name).unwrap().unwrap();
    assert!(
        findings.iter().all(|f| f.severity == Severity::Recommended),
        "{findings:?}"
    );
    let prepared = catalog.prepare_bytes(&entry.name, b"init").unwrap();
    let size = std::fs::metadata(&prepared.initrd).unwrap().len();
    println!(
        "{}: {} modules, initrd {size} bytes, {findings:?}",
        entry.release,
        entry.modules.len()
    );
    assert!(size < 16 << 20);
}

#[test]
fn debian_cloud_6_1() {
    imports("6.1");
}

#[test]
fn debian_cloud_6_12() {
    imports("6.12");
}

#[test]
fn hyperkernel_lacks_nothing() {
    let home = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_default();
    let cache =
        std::env::var_os("HYPERNETES_CACHE").map_or(home.join(".cache/hypernetes"), PathBuf::from);
    let built = std::fs::read_dir(cache.join("kernel"))
        .is_ok_and(|mut dir| dir.any(|e| e.is_ok_and(|e| e.path().join("vmlinux").is_file())));
    if !built {
        println!("SKIP: no HyperKernel is built (make kernel)");
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let dir =
        hyperkernel::build(temp.path(), &hyperkernel::BuildOptions::default(), |_| {}).unwrap();
    let catalog = KernelCatalog::open(temp.path()).unwrap();
    let entry = catalog.add_built(&"hyper".parse().unwrap(), &dir).unwrap();
    assert_eq!(entry.machine, Machine::Microvm);
    assert_eq!(catalog.findings(&entry.name).unwrap(), Some(vec![]));
    let config = Config::parse(&std::fs::read_to_string(dir.join("config")).unwrap());
    assert!(!config.is_builtin("MODULES"));
}
