//! The floors: the same kernel in the same VMM with a guest program that does nothing, by booting it and by
//! restoring it from a paused one.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::MetadataExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt, FdMapping};
use hypernetes_testkit::{release_dir, workspace_root};
use serde_json::json;
use tempfile::TempDir;

use crate::qmp::Qmp;

/// Numbers of the monitor's and the console's socket and of the state in the VMM.
const QMP: i32 = 3;
const CONSOLE: i32 = 4;
const STATE: i32 = 5;
/// Part of the path of a bare template's memory.
pub(crate) const MEMORY: &str = "hnbench-guest-memory";

/// What a bare boot needs.
pub(crate) struct Bare {
    dir: TempDir,
    program: PathBuf,
    /// What boots and restores have in common.
    common: Vec<String>,
    /// The memory of a VM that boots, and its size as QEMU has it.
    memory: String,
    size: String,
    boot: Vec<String>,
}

/// A guest that has said that it is up.
pub(crate) struct BareVm {
    child: Child,
    qmp: UnixStream,
    console: BufReader<UnixStream>,
    /// From the start of the process to the guest program's line.
    pub(crate) took: Duration,
}

/// A paused bare VM to restore others from. The memory is a file on a tmpfs.
pub(crate) struct BareTemplate {
    bare: Bare,
    memory: TempDir,
    state: Vec<u8>,
}

impl Bare {
    /// Builds the guest program and takes over the product's own VMM command line, read from a
    /// running VMM that has booted, less what hangs on the daemon (network, boot disks by descriptor).
    pub(crate) fn prepare(vmm_pid: u32) -> Result<Self> {
        let dir = TempDir::new()?;
        let init = dir.path().join("init");
        let source = workspace_root().join("benches/init.c");
        let built = Command::new("gcc")
            .args(["-static", "-O2", "-s", "-o"])
            .arg(&init)
            .arg(source)
            .status()
            .context("gcc")?;
        if !built.success() {
            bail!("cannot build benches/init.c");
        }
        pack(dir.path())?;
        let cmdline = fs::read(format!("/proc/{vmm_pid}/cmdline"))?;
        let arguments: Vec<String> = cmdline
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let program = fs::read_link(format!("/proc/{vmm_pid}/exe"))?;
        let kernel = fs::read_to_string(release_dir().join("kernel-path"))?;
        let kernel = Path::new(kernel.trim()).join("vmlinux");
        let mut bare = Self {
            dir,
            program,
            common: Vec::new(),
            memory: String::new(),
            size: String::new(),
            boot: Vec::new(),
        };
        bare.adapt(&arguments, &kernel);
        if bare.size.is_empty() || bare.boot.len() != 6 {
            bail!("the VMM {vmm_pid} has not booted: {}", arguments.join(" "));
        }
        Ok(bare)
    }

    /// The product's command line with consoles of our own and our own guest program.
    fn adapt(&mut self, arguments: &[String], kernel: &Path) {
        let mut words = arguments.iter().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                // What is bound to the daemon's descriptors, sockets or files.
                "-netdev" | "-chardev" | "-qmp" | "-mon" | "-add-fd" | "-blockdev" | "-drive"
                | "-pidfile" | "-D" | "-serial" | "-sandbox" | "-runas" | "-name" => {
                    words.next();
                }
                "-device" => {
                    let Some(device) = words.next() else { break };
                    let bound = ["virtio-net", "virtserialport", "scsi-hd", "scsi-disk"];
                    if !bound.iter().any(|kind| device.contains(kind)) {
                        self.common.extend([word.clone(), device.clone()]);
                    }
                }
                "-object" => {
                    let Some(object) = words.next() else { break };
                    if object.contains("id=ram,") {
                        let size = object
                            .split(',')
                            .find_map(|word| word.strip_prefix("size="));
                        self.size = size.unwrap_or_default().to_owned();
                        self.memory.clone_from(object);
                    } else {
                        self.common.extend([word.clone(), object.clone()]);
                    }
                }
                "-kernel" | "-initrd" | "-append" => {
                    let Some(value) = words.next() else { break };
                    let value = match word.as_str() {
                        "-kernel" => kernel.display().to_string(),
                        "-initrd" => self.dir.path().join("initrd").display().to_string(),
                        _ => value.clone(),
                    };
                    self.boot.extend([word.clone(), value]);
                }
                _ => self.common.push(word.clone()),
            }
        }
        self.common.extend(
            [
                "-chardev",
                &format!("socket,id=qmp,fd={QMP}"),
                "-mon",
                "chardev=qmp,mode=control",
                "-chardev",
                &format!("socket,id=console,fd={CONSOLE}"),
                "-serial",
                "chardev:console",
            ]
            .map(str::to_owned),
        );
    }

    /// The command line, for the record.
    pub(crate) fn command_line(&self) -> String {
        let words = [&self.common[..], &self.boot[..]].concat();
        format!(
            "{} -object {} {}",
            self.program.display(),
            self.memory,
            words.join(" ")
        )
    }

    fn spawn(&self, memory: &str, more: &[String], state: Option<OwnedFd>) -> Result<BareVm> {
        let (qmp, their_qmp) = UnixStream::pair()?;
        let (console, their_console) = UnixStream::pair()?;
        let mut mappings = vec![
            (OwnedFd::from(their_qmp), QMP),
            (their_console.into(), CONSOLE),
        ];
        mappings.extend(state.map(|state| (state, STATE)));
        let mappings = mappings
            .into_iter()
            .map(|(parent_fd, child_fd)| FdMapping {
                parent_fd,
                child_fd,
            })
            .collect();
        let child = Command::new(&self.program)
            .args(["-object", memory])
            .args(&self.common)
            .args(more)
            .env_clear()
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .fd_mappings(mappings)?
            .spawn()?;
        Ok(BareVm {
            child,
            qmp,
            console: BufReader::new(console),
            took: Duration::ZERO,
        })
    }

    /// Boots once, up to the guest program's line.
    pub(crate) fn boot(&self) -> Result<BareVm> {
        self.boot_in(&self.memory)
    }

    fn boot_in(&self, memory: &str) -> Result<BareVm> {
        let started = Instant::now();
        let mut vm = self.spawn(memory, &self.boot, None)?;
        vm.expect("BARE-INIT-READY")?;
        vm.took = started.elapsed();
        Ok(vm)
    }

    /// Boots one and saves it.
    pub(crate) fn into_template(self) -> Result<BareTemplate> {
        let memory = tempfile::Builder::new()
            .prefix(MEMORY)
            .tempdir_in("/dev/shm")?;
        let state = self.dir.path().join("state");
        let vm = self.boot_in(&backend(&self.size, memory.path(), "on"))?;
        let mut qmp = Qmp::open(vm.qmp.try_clone()?)?;
        qmp.execute("stop", &json!({}))?;
        qmp.prepare_migration()?;
        let uri = format!("exec:cat > {}", state.display());
        qmp.execute("migrate", &json!({"uri": uri}))?;
        qmp.migrated()?;
        drop(vm);
        let state = fs::read(state)?;
        Ok(BareTemplate {
            bare: self,
            memory,
            state,
        })
    }
}

fn backend(size: &str, dir: &Path, share: &str) -> String {
    let path = dir.join("ram");
    format!(
        "memory-backend-file,id=ram,size={size},mem-path={},share={share}",
        path.display()
    )
}

impl BareTemplate {
    /// Restores one, up to the guest program's answer.
    pub(crate) fn restore(&self) -> Result<BareVm> {
        let started = Instant::now();
        let (reader, mut writer) = std::io::pipe()?;
        let memory = backend(&self.bare.size, self.memory.path(), "off");
        let wait = ["-incoming", "defer", "-S"].map(str::to_owned);
        let mut vm = self.bare.spawn(&memory, &wait, Some(reader.into()))?;
        let mut qmp = Qmp::open(vm.qmp.try_clone()?)?;
        qmp.prepare_migration()?;
        qmp.execute("migrate-incoming", &json!({"uri": format!("fd:{STATE}")}))?;
        writer.write_all(&self.state)?;
        drop(writer);
        qmp.migrated()?;
        qmp.execute("cont", &json!({}))?;
        vm.console.get_mut().write_all(b"\n")?;
        vm.expect("BARE-INIT-ANSWER")?;
        vm.took = started.elapsed();
        Ok(vm)
    }

    /// Memory that the template takes by itself, in KiB.
    pub(crate) fn kib(&self) -> Result<u64> {
        Ok(fs::metadata(self.memory.path().join("ram"))?.blocks() / 2)
    }
}

impl BareVm {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn expect(&mut self, text: &str) -> Result<()> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.console.read_line(&mut line)? == 0 {
                bail!("the bare VM ended before it said {text}");
            }
            if line.contains(text) {
                return Ok(());
            }
        }
    }
}

impl Drop for BareVm {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Packs the guest program as an initramfs.
fn pack(dir: &Path) -> Result<()> {
    let packed = Command::new("bash")
        .args(["-c", "mkdir -p root/dev && cp init root/init && mknod -m 600 root/dev/console c 5 1 && cd root && find . | cpio -o -H newc --quiet > ../initrd"])
        .current_dir(dir)
        .status()?;
    if !packed.success() {
        bail!("cannot pack the bare initramfs; is cpio installed?");
    }
    Ok(())
}
