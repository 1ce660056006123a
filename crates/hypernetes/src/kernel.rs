//! `hypernetes kernel`: the node's guest kernels. It may be used beside a running daemon.

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};
use hypernetes_agent_api::{AgentClient, ConnectOptions};
use hypernetes_kernel::{
    Finding, KernelCatalog, KernelEntry, KernelName, Machine, Origin, Severity, hyperkernel, import,
};
use hypernetes_telemetry::{VERSION, chain};
use hypernetes_types::SandboxId;
use hypernetes_vmm::{
    GuestKernel, Vm, VmSpec, Vmm,
    qemu::{QemuConfig, QemuDriver},
};

use crate::{cli::Kernel, paths, paths::Paths, terminal};

/// How long a kernel may take to boot to HyperStart under emulation on a loaded machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// User of the VMM that `verify` starts.
const VERIFY_UID: u32 = 65_534;

/// Runs one `kernel` verb.
pub(crate) async fn run(paths: &Paths, command: Kernel) -> Result<ExitCode> {
    let catalog = KernelCatalog::open(paths.state()).context("cannot open the kernel catalog")?;
    match command {
        Kernel::Build {
            name,
            source,
            config,
        } => {
            let name: KernelName = name.parse()?;
            let options = hyperkernel::BuildOptions {
                source,
                config,
                ..Default::default()
            };
            let work = paths.state().to_owned();
            let dir = tokio::task::spawn_blocking(move || {
                hyperkernel::build(&work, &options, terminal::note)
            })
            .await??;
            imported(&catalog, &catalog.add_built(&name, &dir)?)?;
        }
        Kernel::Import {
            name,
            path,
            modules,
            config,
        } => {
            let name: KernelName = name.parse()?;
            let entry = tokio::task::block_in_place(|| {
                if path.is_dir() {
                    catalog.add_built(&name, &path)
                } else if path.extension().is_some_and(|extension| extension == "deb") {
                    import::deb(&catalog, &path, Some(name))
                } else {
                    let files = import::Files {
                        kernel: &path,
                        modules: modules.as_deref(),
                        config: config.as_deref(),
                    };
                    import::files(&catalog, files, &name)
                }
            })?;
            imported(&catalog, &entry)?;
        }
        Kernel::Ls { json } => list(&catalog, json)?,
        Kernel::Verify { name, hyperstart } => {
            return verify(paths, &catalog, &name.parse()?, hyperstart).await;
        }
        Kernel::Default { name: Some(name) } => {
            let name: KernelName = name.parse()?;
            catalog.set_default(&name)?;
            terminal::line(&format!("default kernel: {name}"));
        }
        Kernel::Default { name: None } => match catalog.default_name()? {
            Some(name) => terminal::line(name.as_str()),
            None => bail!("no kernel is imported"),
        },
        Kernel::Rm { name } => {
            let name: KernelName = name.parse()?;
            catalog.remove(&name)?;
            terminal::line(&format!("kernel {name} removed"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn imported(catalog: &KernelCatalog, entry: &KernelEntry) -> Result<()> {
    let modules = match entry.modules.len() {
        0 => String::new(),
        n => format!(", {n} modules"),
    };
    terminal::line(&format!(
        "kernel {} imported: {} for {}{modules}",
        entry.name,
        entry.release,
        machine(entry.machine)
    ));
    for finding in catalog.findings(&entry.name)?.unwrap_or_default() {
        terminal::note(&format!("{finding}"));
    }
    Ok(())
}

fn machine(machine: Machine) -> &'static str {
    match machine {
        Machine::Microvm => "microvm",
        Machine::Q35 => "q35",
    }
}

fn list(catalog: &KernelCatalog, json: bool) -> Result<()> {
    let entries = catalog.list()?;
    if json {
        terminal::line(&serde_json::to_string_pretty(&entries)?);
        return Ok(());
    }
    let default = catalog.default_name()?;
    let rows = entries.iter().map(|entry| {
        vec![
            entry.name.to_string(),
            entry.release.clone(),
            machine(entry.machine).to_owned(),
            entry.modules.len().to_string(),
            match &entry.origin {
                Origin::Built => "built".to_owned(),
                Origin::Package(name) | Origin::File(name) => {
                    name.rsplit('/').next().unwrap_or(name).to_owned()
                }
            },
            if default.as_ref() == Some(&entry.name) {
                "*"
            } else {
                ""
            }
            .to_owned(),
        ]
    });
    terminal::table(
        &["NAME", "RELEASE", "MACHINE", "MODULES", "FROM", "DEFAULT"],
        rows,
    );
    Ok(())
}

/// Boots the kernel to HyperStart and says what a pod would miss.
async fn verify(
    paths: &Paths,
    catalog: &KernelCatalog,
    name: &KernelName,
    hyperstart: Option<std::path::PathBuf>,
) -> Result<ExitCode> {
    let hyperstart = paths::hyperstart(hyperstart)
        .context("the guest's program is not beside this binary; give --hyperstart FILE")?;
    let findings = catalog.findings(name)?;
    let essential = |finding: &&Finding| finding.severity == Severity::Essential;
    match &findings {
        None => terminal::line(&format!(
            "{name}: came without a configuration, only booting tells"
        )),
        Some(findings) => {
            for finding in findings {
                let weight = if finding.severity == Severity::Essential {
                    "needed"
                } else {
                    "useful"
                };
                terminal::line(&format!("{name}: {finding} ({weight})"));
            }
        }
    }
    let lacking = findings.iter().flatten().filter(essential).count();
    let prepared = catalog.prepare(name, &hyperstart)?;
    let kernel = GuestKernel {
        kernel: prepared.kernel,
        initrd: prepared.initrd,
        machine: match prepared.machine {
            Machine::Microvm => hypernetes_vmm::Machine::Microvm,
            Machine::Q35 => hypernetes_vmm::Machine::Q35,
        },
        extra_cmdline: String::new(),
    };
    let driver = QemuDriver::detect(QemuConfig::new(paths.state().to_owned())).await?;
    let run_dir = tempfile::Builder::new()
        .prefix("hn-verify-")
        .tempdir_in("/run")?;
    let started = tokio::time::Instant::now();
    let vm = driver
        .launch(VmSpec {
            sandbox: SandboxId::random(),
            kernel,
            origin: hypernetes_vmm::Origin::Kernel,
            vcpus: 1,
            memory_mib: 256,
            extras: hypernetes_vmm::VmExtras::default(),
            net: None,
            disks: Vec::new(),
            run_dir: run_dir.path().join("vm"),
            uid: VERIFY_UID,
            cgroup: None,
            ephemeral: true,
        })
        .await?;
    let answer = meet(vm.as_ref()).await;
    let took = started.elapsed();
    vm.kill().await?;
    match answer {
        Ok(release) => {
            terminal::line(&format!(
                "{name}: boots to HyperStart in {:.1} s, uname -r is {release}",
                took.as_secs_f64()
            ));
        }
        Err(error) => {
            terminal::line(&format!("{name}: does not boot to HyperStart: {error:#}"));
            for line in tail(&vm.console_tail()) {
                terminal::line(&format!("    {line}"));
            }
            return Ok(ExitCode::FAILURE);
        }
    }
    if lacking > 0 {
        terminal::line(&format!(
            "{name}: {lacking} needed options are missing: pods will not run"
        ));
        return Ok(ExitCode::FAILURE);
    }
    terminal::line(&format!("{name}: can run pods"));
    Ok(ExitCode::SUCCESS)
}

/// Waits for the guest's agent; the kernel's release, as the guest says it.
async fn meet(vm: &dyn Vm) -> Result<String> {
    let conversation = async {
        let channel = vm.open_channel().await?;
        let options = ConnectOptions {
            build: VERSION.to_owned(),
            deadline: BOOT_DEADLINE,
        };
        let client = AgentClient::connect(channel, options)
            .await
            .map_err(|error| anyhow::anyhow!("{}", chain(&error)))?;
        Ok(client
            .hello()
            .kernel_release
            .chars()
            .filter(|c| !c.is_control())
            .collect())
    };
    tokio::select! {
        result = conversation => result,
        exit = vm.wait() => bail!("the VM ended: {exit:?}"),
    }
}

fn tail(console: &str) -> Vec<&str> {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(20)..].to_vec()
}

/// Makes sure that pods that name no kernel have one: the built one is imported at first start.
pub(crate) fn ensure_default(catalog: &KernelCatalog, dir: Option<&Path>) -> Result<KernelEntry> {
    if let Some(name) = catalog.default_name()? {
        return Ok(catalog.get(&name)?);
    }
    let dir = dir.context(
        "no kernel is imported: run `hypernetes kernel build`, or give --kernel-dir DIR of a built one",
    )?;
    let name = "hyperkernel".parse().expect("a valid name");
    Ok(catalog.add_built(&name, dir)?)
}
