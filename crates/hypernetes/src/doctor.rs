//! `hypernetes doctor`: whether this machine can run pods, how, and what is missing.

use std::{env, path::Path, process::ExitCode};

use anyhow::Result;
use hypernetes_hostpods::Programs;
use hypernetes_vmm::qemu::{QemuConfig, QemuDriver};
use serde_json::json;

use crate::{
    cli::Doctor, node_config::NodeConfig, parts::HostPodsOptions, paths, paths::Paths, terminal,
};

/// Programs that a node calls, with the package that has them and what they are for.
const PROGRAMS: &[(&str, &str, &str)] = &[
    (
        "nft",
        "nftables",
        "tenant networks: isolation, translation, anti-spoofing",
    ),
    ("mkfs.ext4", "e2fsprogs", "the scratch disks of pods"),
];

/// What the node's records can do with for a while.
const RESERVE_MIB: u64 = 64;

/// One finding.
struct Check {
    ok: bool,
    what: String,
    advice: Option<String>,
}

/// Prints the findings; fails if pods cannot run.
pub(crate) async fn run(paths: &Paths, options: &Doctor) -> Result<ExitCode> {
    let mut checks = vec![
        root(),
        device("/dev/net/tun", "taps of pods"),
        user_namespaces(),
    ];
    for (program, package, purpose) in PROGRAMS {
        checks.push(program_found(program, package, purpose));
    }
    checks.extend(reserve(paths.state()));
    let (accelerator, why) = vmm(paths, &mut checks).await;
    checks.push(guest_file(
        "the guest's program (hyperstart)",
        paths::hyperstart(None).as_deref(),
    ));
    checks.push(guest_file(
        "a built kernel",
        paths::kernel_dir(None).as_deref(),
    ));
    let config = NodeConfig::load(options.config.as_deref())?.host_pods();
    if config.on {
        checks.push(host_pods(&config));
    }
    let able = checks.iter().all(|check| check.ok);
    if options.json {
        let checks: Vec<_> = checks
            .iter()
            .map(|check| json!({"ok": check.ok, "what": check.what, "advice": check.advice}))
            .collect();
        let report =
            json!({"able": able, "accelerator": accelerator, "why": why, "checks": checks});
        terminal::line(&serde_json::to_string_pretty(&report)?);
    } else {
        for check in &checks {
            let mark = if check.ok { "ok " } else { "NO " };
            terminal::line(&format!("{mark} {}", check.what));
            if let Some(advice) = &check.advice {
                terminal::line(&format!("      {advice}"));
            }
        }
        let verdict = if able {
            "This machine can run pods."
        } else {
            "This machine cannot run pods yet."
        };
        terminal::line(verdict);
    }
    Ok(if able {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn root() -> Check {
    let ok = rustix::process::geteuid().is_root();
    Check {
        ok,
        what: "runs as root".to_owned(),
        advice: (!ok).then(|| "pods get user ids, namespaces and taps of their own".to_owned()),
    }
}

fn device(path: &str, purpose: &str) -> Check {
    let ok = Path::new(path).exists();
    Check {
        ok,
        what: format!("{path} ({purpose})"),
        advice: (!ok).then(|| "load the module: modprobe tun".to_owned()),
    }
}

fn user_namespaces() -> Check {
    let ok = Path::new("/proc/self/ns/net").exists();
    Check {
        ok,
        what: "network namespaces".to_owned(),
        advice: None,
    }
}

fn program_found(program: &str, package: &str, purpose: &str) -> Check {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(Into::into);
    let found = env::split_paths(&path)
        .chain(sbin)
        .map(|dir| dir.join(program))
        .find(|p| p.is_file());
    Check {
        ok: found.is_some(),
        what: found.as_ref().map_or_else(
            || format!("{program} ({purpose})"),
            |path| format!("{} ({purpose})", path.display()),
        ),
        advice: found
            .is_none()
            .then(|| format!("apt-get install {package}")),
    }
}

/// What is left to the node's records when guests, whose writes are not root's, have filled the disk.
fn reserve(state: &Path) -> Option<Check> {
    let there = state.ancestors().find(|dir| dir.exists())?;
    let room = rustix::fs::statvfs(there).ok()?;
    let device = rustix::fs::stat(there).ok()?.st_dev;
    let device = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let kept = match is_kept_for_root(&mounts, &device) {
        true => room.f_bfree.saturating_sub(room.f_bavail) * room.f_frsize,
        false => 0,
    };
    Some(reserve_of(state, kept >> 20))
}

/// Whether a file system keeps something for root: ext4 does, unless its mount says otherwise (ext4(5), `resuid`). What
/// others count as not available is not root's either.
fn is_kept_for_root(mountinfo: &str, device: &str) -> bool {
    let mut mounts = mountinfo.lines();
    let mount = mounts.find(|line| line.split(' ').nth(2) == Some(device));
    let Some((_, file_system)) = mount.and_then(|line| line.split_once(" - ")) else {
        return false;
    };
    let mut options = file_system.split([' ', ',']);
    file_system.starts_with("ext")
        && options.all(|option| {
            let user = option.strip_prefix("resuid=");
            user.is_none_or(|user| user == "0")
        })
}

fn reserve_of(state: &Path, kept_mib: u64) -> Check {
    let state = state.display();
    let enough = kept_mib >= RESERVE_MIB;
    let (what, advice) = match enough {
        true => (
            format!("{state} is on a file system that keeps {kept_mib} MiB for root"),
            None,
        ),
        false => (
            "could be better".to_owned(),
            Some(format!(
                "the file system of {state} keeps {kept_mib} MiB for root: when guests have filled it, changes are refused \
                 until there is room; ext4 keeps a part (mkfs.ext4 -m, tune2fs -m)"
            )),
        ),
    };
    Check {
        ok: true,
        what,
        advice,
    }
}

/// The programs that run pods on the node's own kernel.
fn host_pods(options: &HostPodsOptions) -> Check {
    let purpose = "pods on the node's own kernel (hostHandler)";
    match Programs::find(&options.runtime, &options.conmon) {
        Ok(found) => Check {
            ok: true,
            what: format!(
                "{}, {} ({purpose})",
                found.oci.display(),
                found.conmon.display()
            ),
            advice: None,
        },
        Err(error) => Check {
            ok: false,
            what: purpose.to_owned(),
            advice: Some(format!(
                "{}; apt-get install runc conmon",
                hypernetes_telemetry::chain(&error)
            )),
        },
    }
}

fn guest_file(what: &str, found: Option<&Path>) -> Check {
    Check {
        ok: found.is_some(),
        what: found.map_or_else(
            || what.to_owned(),
            |path| format!("{what}: {}", path.display()),
        ),
        advice: found.is_none().then(|| "make build".to_owned()),
    }
}

/// Boots a test guest: the only way to know whether KVM works.
async fn vmm(paths: &Paths, checks: &mut Vec<Check>) -> (String, String) {
    match QemuDriver::detect(QemuConfig::new(paths.state().to_owned())).await {
        Ok(driver) => {
            let probe = driver.probe();
            checks.push(Check {
                ok: true,
                what: format!(
                    "QEMU {} runs guests by {}",
                    probe.version, probe.accelerator
                ),
                advice: Some(probe.why.clone()),
            });
            for missing in &probe.missing {
                checks.push(Check {
                    ok: true,
                    what: "could be better".to_owned(),
                    advice: Some(missing.clone()),
                });
            }
            (probe.accelerator.to_string(), probe.why.clone())
        }
        Err(error) => {
            let text = hypernetes_telemetry::chain(&error).to_string();
            checks.push(Check {
                ok: false,
                what: "virtual machines".to_owned(),
                advice: Some(text.clone()),
            });
            ("none".to_owned(), text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_a_reserve_is_told_of_and_no_failure() {
        let state = Path::new("/var/lib/hypernetes");
        let told = reserve_of(state, 0);
        assert!(told.ok);
        assert!(
            told.advice
                .is_some_and(|advice| advice.contains("keeps 0 MiB for root"))
        );
        let fine = reserve_of(state, RESERVE_MIB);
        assert!(fine.ok && fine.advice.is_none());
        assert!(
            fine.what.ends_with("keeps 64 MiB for root"),
            "{}",
            fine.what
        );
        assert!(reserve(Path::new("/proc/none/such")).is_some());
    }

    #[test]
    fn what_is_kept_for_another_user_is_not_root_s() {
        let mounts = "26 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard,resuid=65534\n\
                      27 1 8:1 / /data rw - ext4 /dev/sda1 rw,errors=remount-ro\n\
                      28 1 8:2 / /more rw - ext4 /dev/sda2 rw,resuid=0,resgid=5\n\
                      29 1 0:40 / /btr rw shared:2 - btrfs /dev/sda3 rw,subvolid=5\n";
        for (device, root) in [
            ("254:0", false),
            ("8:1", true),
            ("8:2", true),
            ("0:40", false),
            ("0:9", false),
        ] {
            assert_eq!(is_kept_for_root(mounts, device), root, "{device}");
        }
    }
}
