//! A guest for tests: the kernel that `kernel/build` made, and an initramfs with a tiny init.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use hypernetes_types::SandboxId;
use hypernetes_vmm::{
    Disk, GuestKernel, Machine, Origin, Vm, VmSpec,
    qemu::{Launcher, QemuConfig, QemuDriver},
};

/// Everything that a test needs to start VMs.
pub(crate) struct Bench {
    pub(crate) temp: tempfile::TempDir,
    pub(crate) driver: QemuDriver,
    /// The test guest's only program.
    pub(crate) init: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

/// Room for a loaded machine: boots take one second on an idle one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

impl Bench {
    /// `None`, with the reason printed, where VMs cannot be tested.
    pub(crate) async fn new() -> Option<Self> {
        let skip = |reason: &str| {
            println!("SKIP: {reason}");
            None
        };
        if !rustix::process::geteuid().is_root() {
            return skip("starting VMs takes root");
        }
        let Some(kernel) = hyperkernel() else {
            return skip("no HyperKernel is built (make kernel)");
        };
        let temp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(temp.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let init = temp.path().join("init");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/init.c");
        let built = Command::new("cc")
            .args(["-static", "-O1", "-o"])
            .arg(&init)
            .arg(source)
            .status();
        if !built.is_ok_and(|status| status.success()) {
            return skip("no C compiler, or no static libc, for the test guest");
        }
        let initrd = temp.path().join("initrd");
        write_initrd(&initrd, &std::fs::read(&init).unwrap());
        let driver = match QemuDriver::detect(config(temp.path())).await {
            Ok(driver) => driver,
            Err(e) => return skip(&format!("no VM can run here: {e}")),
        };
        Some(Self {
            temp,
            driver,
            init,
            kernel,
            initrd,
        })
    }

    /// A VM that does `role`.
    pub(crate) fn spec(&self, role: &str) -> VmSpec {
        let sandbox = SandboxId::random();
        VmSpec {
            kernel: GuestKernel {
                kernel: self.kernel.clone(),
                initrd: self.initrd.clone(),
                machine: Machine::Microvm,
                extra_cmdline: format!("role={role}"),
            },
            origin: Origin::Kernel,
            vcpus: 1,
            memory_mib: 64,
            extras: hypernetes_vmm::VmExtras::default(),
            net: None,
            disks: Vec::new(),
            run_dir: self.temp.path().join(sandbox.short()),
            uid: 61_000 + u32::from(std::process::id() as u16 % 1000),
            cgroup: Some(format!("hypernetes-test/{}", sandbox.short())),
            ephemeral: false,
            sandbox,
        }
    }

    /// A disk image that starts with 16 bytes of `text`.
    pub(crate) fn image(&self, text: &str) -> PathBuf {
        let path = self.temp.path().join(format!("{text}.img"));
        let mut file = File::create(&path).unwrap();
        file.write_all(format!("{text:<16}").as_bytes()).unwrap();
        file.set_len(1 << 20).unwrap();
        path
    }
}

pub(crate) fn config(state: &Path) -> QemuConfig {
    let mut config = QemuConfig::new(state.to_owned());
    config.launcher = Launcher {
        program: env!("CARGO_BIN_EXE_vmm-launch").into(),
        args: Vec::new(),
    };
    config.launch_deadline = PATIENCE;
    config.command_deadline = PATIENCE;
    config
}

pub(crate) fn disk(slot: u32, path: &Path, read_only: bool) -> Disk {
    let file = File::options()
        .read(true)
        .write(!read_only)
        .open(path)
        .unwrap();
    Disk {
        slot,
        file,
        read_only,
    }
}

/// Waits until the console shows `text`.
pub(crate) async fn console(vm: &dyn Vm, text: &str) {
    until(
        &format!("console shows {text:?}"),
        || vm.console_tail().contains(text),
        || format!("{}\nexit: {:?}", vm.console_tail(), vm.exit()),
    )
    .await;
}

/// Waits until `holds`.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool, state: impl Fn() -> String) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "never: {what}\n{}",
            state()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn hyperkernel() -> Option<PathBuf> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernel/build");
    let cache = std::env::var_os("HYPERNETES_KERNEL").map(PathBuf::from);
    if let Some(kernel) = cache {
        return Some(kernel);
    }
    // Only a cached kernel: a test does not build one for ten minutes.
    let home = PathBuf::from(std::env::var_os("HOME")?);
    let cache = std::env::var_os("HYPERNETES_CACHE")
        .map_or_else(|| home.join(".cache/hypernetes"), PathBuf::from);
    std::fs::read_dir(cache.join("kernel"))
        .ok()?
        .flatten()
        .find(|e| e.path().join("vmlinux").is_file())?;
    let mut child = Command::new(script)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .ok()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take()?)
        .read_line(&mut line)
        .ok()?;
    let ok = child.wait().ok()?.success();
    ok.then(|| Path::new(line.trim()).join("vmlinux"))
}

/// A newc archive of /init and /dev/console.
fn write_initrd(path: &Path, init: &[u8]) {
    let mut out = Vec::new();
    let mut entry = |name: &str, mode: u32, data: &[u8], rdev: (u32, u32)| {
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            rdev.0,
            rdev.1,
            name.len() as u32 + 1,
            0,
        ];
        out.extend_from_slice(b"070701");
        for field in fields {
            out.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    entry("dev", 0o040_755, b"", (0, 0));
    entry("dev/console", 0o020_600, b"", (5, 1));
    entry("init", 0o100_755, init, (0, 0));
    entry("TRAILER!!!", 0, b"", (0, 0));
    std::fs::write(path, out).unwrap();
}
