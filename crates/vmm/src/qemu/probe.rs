//! What this host can run VMs with, found out by trying.
//!
//! `/dev/kvm` that opens is no proof: nested and paravirtual hosts offer one that cannot run a
//! guest. So a guest of 512 bytes is booted with KVM, as the VMM's user, through the launcher: it
//! works if the guest reaches 64-bit mode and says "OK" within the deadline. The answer is kept in
//! the state directory until QEMU, the host's kernel, this boot or `/dev/kvm` changes.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, process::ChildStdout, time::timeout};

use super::{
    QemuConfig, argv,
    argv::Accelerator,
    spawn::{self, Handover},
};
use crate::{launcher::LaunchSpec, process::Process};

const FULL: &str = "qemu-system-x86_64";
/// Debian's small build: KVM and the microvm machine only, a third less memory.
const SLIM: &str = "qemu-system-x86_64-microvm";
const PATH: [&str; 4] = [
    "/usr/bin",
    "/usr/local/bin",
    "/usr/libexec",
    "/opt/qemu/bin",
];

/// A guest on working KVM answers within milliseconds; a loaded host is given time.
const BOOT_DEADLINE: Duration = Duration::from_secs(5);
const EMULATION_DEADLINE: Duration = Duration::from_secs(60);
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// What was found: for `hypernetes doctor`, and for the driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Probe {
    /// What VMs run on.
    pub accelerator: Accelerator,
    /// Why it is that one, in a sentence.
    pub why: String,
    /// Program for [`Machine::Microvm`](crate::Machine::Microvm).
    pub microvm: PathBuf,
    /// Program for [`Machine::Q35`](crate::Machine::Q35), if there is one.
    pub q35: Option<PathBuf>,
    /// Version of QEMU, as it says itself.
    pub version: String,
    /// Rate of the time stamp counter, which emulated guests are told.
    pub tsc_khz: Option<u32>,
    /// Group that lets the VMM open `/dev/kvm`.
    pub kvm_group: Option<u32>,
    /// What is missing or could be better, in sentences.
    pub missing: Vec<String>,
}

/// Why no VM can run here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// There is no QEMU.
    #[error("{wanted} is not installed (Debian: apt-get install qemu-system-x86)")]
    NoQemu {
        /// Program that was looked for.
        wanted: String,
    },
    /// The program that was found does not run.
    #[error("{} does not run", program.display())]
    Broken {
        /// Program.
        program: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The program was built without seccomp, without which no VM is started.
    #[error("{} cannot filter its own system calls (-sandbox): it is not used", program.display())]
    NoSeccomp {
        /// Program.
        program: PathBuf,
    },
    /// Not even an emulated guest boots: something else is in the way.
    #[error("a test guest does not even boot under emulation: {why}")]
    NothingBoots {
        /// What was seen.
        why: String,
    },
    /// KVM was demanded and does not work.
    #[error("KVM was asked for and does not work: {why}")]
    NoKvm {
        /// What was seen.
        why: String,
    },
}

/// What a remembered answer depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    programs: Vec<(PathBuf, u64, i64)>,
    kernel: String,
    boot: String,
    kvm: Option<(u64, u64, u32, u32, i64)>,
    choice: Option<Accelerator>,
    uid: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    key: Key,
    probe: Probe,
}

/// Finds QEMU and decides on the accelerator.
pub async fn probe(config: &QemuConfig) -> Result<Probe, ProbeError> {
    let full = find(config.qemu.as_deref(), FULL);
    let slim = if config.qemu.is_some() {
        None
    } else {
        find(None, SLIM)
    };
    let key = key(config, [&full, &slim]);
    let memory = config.state_dir.join("vmm-probe.json");
    if let Some(known) = fs::read(&memory)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Remembered>(&bytes).ok())
        .filter(|known| known.key == key)
    {
        return Ok(known.probe);
    }
    // Debian 12 builds the small one without seccomp. Isolation is worth more than its 4 MiB.
    let slim = match slim {
        Some(path) if filters_system_calls(&path).await? => Some(path),
        _ => None,
    };
    if let Some(path) = &full
        && !filters_system_calls(path).await?
    {
        return Err(ProbeError::NoSeccomp {
            program: path.clone(),
        });
    }
    let probe = try_out(config, full, slim).await?;
    let remembered = Remembered {
        key,
        probe: probe.clone(),
    };
    let saved = fs::create_dir_all(&config.state_dir)
        .and_then(|()| fs::write(&memory, serde_json::to_vec_pretty(&remembered)?));
    if let Err(e) = saved {
        tracing::warn!(path = %memory.display(), error = %e, "cannot remember what VMs can run with");
    }
    Ok(probe)
}

async fn try_out(
    config: &QemuConfig,
    full: Option<PathBuf>,
    slim: Option<PathBuf>,
) -> Result<Probe, ProbeError> {
    let mut missing = Vec::new();
    let no_qemu = || ProbeError::NoQemu {
        wanted: config
            .qemu
            .as_ref()
            .map_or(FULL.to_owned(), |path| path.display().to_string()),
    };
    let best = slim.clone().or_else(|| full.clone()).ok_or_else(no_qemu)?;
    let kvm_group = kvm_group();

    let kvm = match config.accelerator {
        Some(Accelerator::Tcg) => Err("the configuration asks for emulation".to_owned()),
        _ => try_kvm(config, &best, kvm_group).await,
    };
    let (accelerator, why, microvm) = match kvm {
        Ok(why) => (Accelerator::Kvm, why, best),
        Err(why) if config.accelerator == Some(Accelerator::Kvm) => {
            return Err(ProbeError::NoKvm { why });
        }
        Err(why) => {
            let full = full.clone().ok_or_else(no_qemu)?;
            emulation_works(config, &full).await?;
            (
                Accelerator::Tcg,
                format!("emulation (TCG), because {why}"),
                full,
            )
        }
    };
    if full.is_none() {
        missing.push(format!(
            "{FULL} is not installed: kernels that need the q35 machine cannot run."
        ));
    }
    let tsc_khz = tsc_khz();
    if accelerator == Accelerator::Tcg && tsc_khz.is_none() {
        missing.push(
            "The rate of the time stamp counter is unknown: emulated guests may boot slowly on a \
             loaded host."
                .to_owned(),
        );
    }
    let version = version(&microvm).await?;
    if accelerator == Accelerator::Tcg && translates_anew(&version) {
        missing.push(format!(
            "QEMU {version} emulates a program anew at each of its starts, because its addresses are \
             others then: QEMU 8 or later, which Debian has in its backports, takes a third of the \
             time for it."
        ));
    }
    Ok(Probe {
        accelerator,
        why,
        microvm,
        q35: full,
        version,
        tsc_khz,
        kvm_group,
        missing,
    })
}

/// Boots the probe guest with KVM. Either way the answer says what was seen.
async fn try_kvm(
    config: &QemuConfig,
    program: &Path,
    group: Option<u32>,
) -> Result<String, String> {
    if let Err(e) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Err(match e.kind() {
            io::ErrorKind::NotFound => "this host has no /dev/kvm".to_owned(),
            _ => format!("/dev/kvm cannot be opened ({e})"),
        });
    }
    let for_all = fs::metadata("/dev/kvm").is_ok_and(|meta| meta.mode() & 0o006 == 0o006);
    if group.is_none() && !for_all {
        return Err(
            "/dev/kvm is for root alone, and VMs do not run as root (Debian's own set-up is: \
                    chgrp kvm /dev/kvm; chmod 660 /dev/kvm)"
                .to_owned(),
        );
    }
    match boot(config, program, Accelerator::Kvm, group, BOOT_DEADLINE).await {
        Ok(Boot::Alive) => Ok("KVM, because a test guest booted with it".to_owned()),
        Ok(Boot::Silent) => Err(format!(
            "/dev/kvm opens, but a test guest gave no sign of life within {} s",
            BOOT_DEADLINE.as_secs()
        )),
        Ok(Boot::Died(message)) if message.is_empty() => {
            Err("/dev/kvm opens, but QEMU ended without a word when a test guest booted".to_owned())
        }
        Ok(Boot::Died(message)) => Err(format!(
            "/dev/kvm opens, but cannot run a test guest (\"{message}\")"
        )),
        Err(e) => Err(format!("a test guest could not be started ({e})")),
    }
}

/// Emulation works everywhere, so if it does not, the host forbids VMMs as we start them (no root,
/// no cgroups, no namespaces), and KVM's failure may have had the same cause.
async fn emulation_works(config: &QemuConfig, program: &Path) -> Result<(), ProbeError> {
    let why = match boot(config, program, Accelerator::Tcg, None, EMULATION_DEADLINE).await {
        Ok(Boot::Alive) => return Ok(()),
        Ok(Boot::Silent) => format!("no sign of life within {} s", EMULATION_DEADLINE.as_secs()),
        Ok(Boot::Died(message)) => message,
        Err(e) => e.to_string(),
    };
    Err(ProbeError::NothingBoots { why })
}

/// What became of the probe guest.
#[derive(Debug, PartialEq, Eq)]
enum Boot {
    Alive,
    Silent,
    Died(String),
}

async fn boot(
    config: &QemuConfig,
    program: &Path,
    accelerator: Accelerator,
    group: Option<u32>,
    deadline: Duration,
) -> io::Result<Boot> {
    let mut handover = Handover::default();
    let firmware = handover.add(spawn::memfd("probe-guest", &firmware())?);
    let machine: &[&str] = match accelerator {
        Accelerator::Kvm => &["-accel", "kvm", "-cpu", "host"],
        Accelerator::Tcg => &["-accel", "tcg,tb-size=4", "-cpu", "max,-cx16"],
    };
    let firmware = format!("/proc/self/fd/{firmware}");
    let mut args: Vec<String> = ["-M", "microvm,acpi=off", "-m", "16"]
        .iter()
        .chain(machine)
        .chain(&[
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .chain(&["-serial", "stdio", "-bios", firmware.as_str()])
        .map(|arg| (*arg).to_owned())
        .collect();
    args.extend(argv::sandbox());
    // No Landlock rule for the memfd: it is on no mount that a rule could name, and allowed.
    let spec = LaunchSpec {
        program: program.to_owned(),
        args,
        uid: config.probe_uid,
        groups: group.into_iter().collect(),
        parent: std::process::id(),
        record: None,
        cgroup: None,
        keep: handover.numbers(),
        read_only: spawn::readable(program),
        read_write: vec!["/dev/kvm".into(), "/dev/null".into()],
        keep_holes_out_of: None,
        jail: None,
        ephemeral: true,
    };
    let mut child = spawn::spawn(
        &config.launcher,
        &spec,
        handover,
        Stdio::piped(),
        Stdio::piped(),
    )?;
    let process = Process::open(child.id(), None)?
        .ok_or_else(|| io::Error::other("the launcher vanished"))?;
    let mut stdout = ChildStdout::from_std(child.stdout.take().expect("piped"))?;
    let mut stderr = child.stderr.take().expect("piped");

    let mut said = Vec::new();
    let alive = async {
        let mut chunk = [0; 64];
        while let Ok(count @ 1..) = stdout.read(&mut chunk).await {
            said.extend_from_slice(&chunk[..count]);
            if said.windows(2).any(|pair| pair == b"OK") {
                return true;
            }
            if said.len() > 4096 {
                break;
            }
        }
        false
    };
    let alive = timeout(deadline, alive).await;
    process.kill()?;
    let _status = process.exited().await?;
    Ok(match alive {
        Ok(true) => Boot::Alive,
        Err(_) => Boot::Silent,
        Ok(false) => {
            // Its writers are dead: this ends. The first line names the cause.
            let mut text = String::new();
            drop((&mut stderr).take(4096).read_to_string(&mut text));
            Boot::Died(text.lines().next().unwrap_or_default().to_owned())
        }
    })
}

/// 64 KiB of firmware, of which the last 512 bytes are `probe_guest.S`.
fn firmware() -> Vec<u8> {
    let mut image = vec![0; 64 * 1024];
    image[0xfe00..0xfe00 + CODE.len()].copy_from_slice(&CODE);
    image[0xfff0..0xfff3].copy_from_slice(&RESET);
    image
}

#[rustfmt::skip]
const CODE: [u8; 142] = [
    0xfa, 0xfc, 0x66, 0x31, 0xc0, 0xbf, 0x00, 0x10, 0xb9, 0x00, 0x0c, 0x66, 0xf3, 0xab, 0x66, 0xc7,
    0x06, 0x00, 0x10, 0x03, 0x20, 0x00, 0x00, 0x66, 0xc7, 0x06, 0x18, 0x20, 0x03, 0x30, 0x00, 0x00,
    0x66, 0xc7, 0x06, 0xf8, 0x3f, 0x83, 0x00, 0xe0, 0xff, 0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f,
    0x22, 0xd8, 0x0f, 0x20, 0xe0, 0x66, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0, 0x66, 0xb9, 0x80, 0x00,
    0x00, 0xc0, 0x0f, 0x32, 0x66, 0x0d, 0x00, 0x01, 0x00, 0x00, 0x0f, 0x30, 0x2e, 0x66, 0x0f, 0x01,
    0x16, 0x88, 0xfe, 0x0f, 0x20, 0xc0, 0x66, 0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0x66,
    0xea, 0x67, 0xfe, 0xff, 0xff, 0x08, 0x00, 0x66, 0xba, 0xf8, 0x03, 0xb0, 0x4f, 0xee, 0xb0, 0x4b,
    0xee, 0xb0, 0x0a, 0xee, 0xf4, 0xeb, 0xfd, 0x90, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xaf, 0x00, 0x0f, 0x00, 0x78, 0xfe, 0xff, 0xff,
];
/// The first instruction of the processor: jump to the start of [`CODE`].
const RESET: [u8; 3] = [0xe9, 0x0d, 0xfe];

fn find(configured: Option<&Path>, name: &str) -> Option<PathBuf> {
    match configured {
        Some(path) => path.is_file().then(|| path.to_owned()),
        None => PATH
            .iter()
            .map(|dir| Path::new(dir).join(name))
            .find(|path| path.is_file()),
    }
}

fn key(config: &QemuConfig, programs: [&Option<PathBuf>; 2]) -> Key {
    let line = |path| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    Key {
        programs: programs
            .into_iter()
            .flatten()
            .filter_map(|path| Some((path, fs::metadata(path).ok()?)))
            .map(|(path, meta)| (path.clone(), meta.size(), meta.mtime()))
            .collect(),
        kernel: line("/proc/sys/kernel/osrelease"),
        boot: line("/proc/sys/kernel/random/boot_id"),
        kvm: fs::metadata("/dev/kvm").ok().map(|meta| {
            (
                meta.ino(),
                meta.rdev(),
                meta.mode(),
                meta.gid(),
                meta.ctime(),
            )
        }),
        choice: config.accelerator,
        uid: config.probe_uid,
    }
}

/// The group of `/dev/kvm`, if being in it helps.
fn kvm_group() -> Option<u32> {
    let meta = fs::metadata("/dev/kvm").ok()?;
    (meta.mode() & 0o060 == 0o060 && meta.gid() != 0).then(|| meta.gid())
}

async fn ask(program: &Path, options: &[&str]) -> Result<String, ProbeError> {
    let broken = |source| ProbeError::Broken {
        program: program.to_owned(),
        source,
    };
    let run = tokio::process::Command::new(program)
        .args(options)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(COMMAND_DEADLINE, run)
        .await
        .map_err(|_elapsed| broken(io::ErrorKind::TimedOut.into()))?
        .map_err(broken)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn version(program: &Path) -> Result<String, ProbeError> {
    parse_version(&ask(program, &["--version"]).await?).ok_or_else(|| ProbeError::Broken {
        program: program.to_owned(),
        source: io::Error::other("it does not tell its version"),
    })
}

async fn filters_system_calls(program: &Path) -> Result<bool, ProbeError> {
    // The help names the option in any case; parsing it fails where it was left out.
    Ok(parse_version(&ask(program, &["-sandbox", "off", "--version"]).await?).is_some())
}

fn parse_version(text: &str) -> Option<String> {
    let version = text
        .lines()
        .next()?
        .split_once("version ")?
        .1
        .split_whitespace()
        .next()?;
    Some(version.to_owned())
}

/// Whether what TCG has translated is of use at one virtual address only (before `CF_PCREL` for x86, QEMU
/// 8.0): a program that is loaded somewhere else each time, as most are, is then translated each time.
fn translates_anew(version: &str) -> bool {
    let major = version.split('.').next().and_then(|n| n.parse().ok());
    major.is_some_and(|major: u32| major < 8)
}

/// The rate of the time stamp counter in kHz, from whoever knows it.
fn tsc_khz() -> Option<u32> {
    let sysfs = fs::read_to_string("/sys/devices/system/cpu/cpu0/tsc_freq_khz").ok();
    sysfs
        .and_then(|text| text.trim().parse().ok())
        .or_else(|| tsc_from_log(&kernel_log().unwrap_or_default()))
        .or_else(|| {
            // Without frequency scaling the kernel shows the counter's rate here.
            let fixed = !Path::new("/sys/devices/system/cpu/cpu0/cpufreq").exists();
            let info = fixed
                .then(|| fs::read_to_string("/proc/cpuinfo").ok())
                .flatten()?;
            tsc_from_cpuinfo(&info)
        })
}

/// The whole kernel log. Each read gives one record, none left is EAGAIN.
fn kernel_log() -> io::Result<String> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open("/dev/kmsg")?;
    let mut log = String::new();
    let mut record = [0; 8192];
    for _ in 0..50_000 {
        match file.read(&mut record) {
            Ok(0) => break,
            Ok(count) => log.push_str(&String::from_utf8_lossy(&record[..count])),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            // EPIPE: records were overwritten while we read; go on with the next.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
            Err(e) => return Err(e),
        }
    }
    Ok(log)
}

fn tsc_from_log(log: &str) -> Option<u32> {
    [
        "tsc: Refined TSC clocksource calibration: ",
        "tsc: Detected ",
    ]
    .iter()
    .find_map(|prefix| {
        log.lines()
            .find_map(|line| megahertz(line.split_once(prefix)?.1))
    })
}

fn tsc_from_cpuinfo(info: &str) -> Option<u32> {
    let constant = info
        .lines()
        .any(|line| line.starts_with("flags") && line.contains("constant_tsc"));
    let line = info.lines().find(|line| line.starts_with("cpu MHz"))?;
    constant
        .then(|| megahertz(line.split_once(": ")?.1))
        .flatten()
}

/// "2596.122…" as kHz, exactly.
fn megahertz(text: &str) -> Option<u32> {
    let number = text.split_whitespace().next()?;
    let (whole, fraction) = number.split_once('.')?;
    let fraction = fraction.get(..3)?;
    whole
        .parse::<u32>()
        .ok()?
        .checked_mul(1000)?
        .checked_add(fraction.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_from_every_source() {
        let log = "6,1,0,-;tsc: Detected 2596.122 MHz processor\n\
                   6,2,0,-;tsc: Refined TSC clocksource calibration: 2596.103 MHz\n";
        assert_eq!(tsc_from_log(log), Some(2_596_103));
        assert_eq!(tsc_from_log(log.lines().next().unwrap()), Some(2_596_122));
        assert_eq!(tsc_from_log("tsc: Detected nonsense"), None);
        let info = "cpu MHz\t\t: 3000.000\nflags\t\t: fpu constant_tsc nopl\n";
        assert_eq!(tsc_from_cpuinfo(info), Some(3_000_000));
        assert_eq!(
            tsc_from_cpuinfo("cpu MHz\t\t: 3000.000\nflags : fpu\n"),
            None
        );
    }

    #[test]
    fn versions_are_read() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(parse_version(text).as_deref(), Some("7.2.22"));
        assert_eq!(parse_version(""), None);
        for (version, anew) in [
            ("7.2.22", true),
            ("8.0.0", false),
            ("10.0.2", false),
            ("?", false),
        ] {
            assert_eq!(translates_anew(version), anew, "{version}");
        }
    }
}
