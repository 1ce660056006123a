//! The floor: the same kernel in the same VMM with a guest program that does nothing.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hypernetes_testkit::{release_dir, workspace_root};
use tempfile::TempDir;

/// What a bare boot needs.
pub(crate) struct Bare {
    dir: TempDir,
    qemu: Vec<String>,
}

/// A guest that has said that it is up.
pub(crate) struct BareVm {
    child: Child,
    /// From the start of the process to the guest program's line.
    pub(crate) boot: Duration,
}

impl Bare {
    /// Builds the guest program and takes over the product's own VMM command line, read from a
    /// running VMM, less what hangs on the daemon (network, boot disks by descriptor).
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
        let qemu = adapt(&program, &arguments, Path::new(kernel.trim()), dir.path());
        Ok(Self { dir, qemu })
    }

    /// The command line, for the record.
    pub(crate) fn command_line(&self) -> String {
        self.qemu.join(" ")
    }

    /// Boots once, up to the guest program's line.
    pub(crate) fn boot(&self) -> Result<BareVm> {
        let started = Instant::now();
        let mut child = Command::new(&self.qemu[0])
            .args(&self.qemu[1..])
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let output = child.stdout.take().context("stdout is piped")?;
        for line in BufReader::new(output).lines() {
            if line?.contains("BARE-INIT-READY") {
                return Ok(BareVm {
                    child,
                    boot: started.elapsed(),
                });
            }
        }
        bail!("the bare VM ended before its program ran")
    }
}

impl BareVm {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for BareVm {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Packs the guest program as an initramfs.
fn pack(dir: &Path) -> Result<PathBuf> {
    let packed = Command::new("bash")
        .args(["-c", "mkdir -p root/dev && cp init root/init && mknod -m 600 root/dev/console c 5 1 && cd root && find . | cpio -o -H newc --quiet > ../initrd"])
        .current_dir(dir)
        .status()?;
    if !packed.success() {
        bail!("cannot pack the bare initramfs; is cpio installed?");
    }
    Ok(dir.join("initrd"))
}

/// The product's command line with a serial console on standard output and our own guest program.
fn adapt(program: &Path, arguments: &[String], kernel: &Path, dir: &Path) -> Vec<String> {
    let mut out = vec![program.display().to_string()];
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
                    out.extend([word.clone(), device.clone()]);
                }
            }
            "-kernel" => {
                words.next();
                out.extend([word.clone(), kernel.join("vmlinux").display().to_string()]);
            }
            "-initrd" => {
                words.next();
                out.extend([word.clone(), dir.join("initrd").display().to_string()]);
            }
            _ => out.push(word.clone()),
        }
    }
    out.extend(["-serial".to_owned(), "stdio".to_owned()]);
    out
}
