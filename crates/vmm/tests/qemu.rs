//! Real VMs: what the driver promises, seen from the guest's console and from `/proc`.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::panic,
    clippy::cast_possible_wrap,
    clippy::cast_possible_truncation,
    reason = "an integration test is all tests; sizes here are small"
)]

mod support;

use std::{fs, path::Path, sync::Arc, time::Duration};

use hypernetes_kernel::{KernelCatalog, import};
use hypernetes_vmm::{
    Machine, Origin, Suspended, Vm, VmEvent, VmExit, VmExtras, VmSpec, Vmm, VmmError,
};
use support::{Bench, PATIENCE, console, disk, until};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::{Instant, timeout},
};

fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|text| !text.contains(") Z "))
}

fn cgroups_named(name: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for root in fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = root.path().join(name);
        if path.exists() {
            found.push(path);
        }
    }
    let unified = Path::new("/sys/fs/cgroup").join(name);
    if unified.exists() {
        found.push(unified);
    }
    found
}

#[tokio::test]
async fn a_vm_boots_talks_and_takes_disks() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let (layer, data) = (bench.image("layer"), bench.image("data"));
    let mut spec = bench.spec("echo");
    spec.disks.push(disk(1, &layer, true));
    let vm = bench.driver.launch(spec).await.unwrap();
    console(&*vm, "GUEST READY echo").await;
    console(&*vm, "DISK+ 1 ro layer").await;

    // The channel, and that a new one ends the former.
    let mut first = vm.open_channel().await.unwrap();
    first.write_all(b"ping").await.unwrap();
    let mut word = [0; 4];
    timeout(PATIENCE, first.read_exact(&mut word))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&word, b"ping");
    let mut second = vm.open_channel().await.unwrap();
    assert_eq!(
        timeout(PATIENCE, first.read(&mut word))
            .await
            .unwrap()
            .unwrap(),
        0
    );
    second.write_all(b"pong").await.unwrap();
    timeout(PATIENCE, second.read_exact(&mut word))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&word, b"pong");

    // Hot-plug: seen, written through, named once.
    vm.plug_disk(disk(7, &data, false)).await.unwrap();
    console(&*vm, "DISK+ 7 rw data").await;
    assert_eq!(vm.list_disks().await.unwrap(), [1, 7]);
    let bytes = fs::read(&data).unwrap();
    assert!(bytes[512..1024].iter().all(|b| *b == b'G'));
    assert!(fs::read(&layer).unwrap()[512..1024].iter().all(|b| *b == 0));
    let occupied = vm.plug_disk(disk(7, &layer, true)).await.unwrap_err();
    assert!(occupied.to_string().contains("occupied"), "{occupied}");

    // A plug that fails on the way leaves the slot free: this image is locked by slot 7.
    vm.plug_disk(disk(9, &data, false)).await.unwrap_err();
    assert_eq!(vm.list_disks().await.unwrap(), [1, 7]);
    vm.plug_disk(disk(9, &layer, true)).await.unwrap();
    console(&*vm, "DISK+ 9 ro layer").await;

    vm.unplug_disk(7).await.unwrap();
    vm.unplug_disk(7).await.unwrap();
    vm.unplug_disk(1).await.unwrap();
    console(&*vm, "DISK- 7").await;
    console(&*vm, "DISK- 1").await;
    assert_eq!(vm.list_disks().await.unwrap(), [9]);
    vm.plug_disk(disk(7, &data, false)).await.unwrap();
    assert_eq!(vm.list_disks().await.unwrap(), [7, 9]);

    let record = vm.record();
    let group = record.cgroup.clone().unwrap();
    assert!(!cgroups_named(&group).is_empty());
    vm.kill().await.unwrap();
    vm.kill().await.unwrap();
    assert!(!alive(record.pid));
    assert!(matches!(vm.exit(), Some(VmExit::VmmDied { status }) if status.contains("signal 9")));
    assert!(matches!(
        vm.open_channel().await.err(),
        Some(VmmError::Gone { .. })
    ));
    assert!(matches!(
        vm.plug_disk(disk(3, &data, false)).await,
        Err(VmmError::Gone { .. })
    ));
    assert_eq!(cgroups_named(&group), [] as [std::path::PathBuf; 0]);
    let left: Vec<_> = fs::read_dir(&record.run_dir)
        .unwrap()
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert_eq!(left, ["console.log"]);
}

/// Boots `spec` and uses channel and disks.
async fn works(bench: &Bench, mut spec: VmSpec) {
    let label = spec.kernel.kernel.display().to_string();
    let image = bench.image("boot");
    spec.disks.push(disk(2, &image, true));
    spec.memory_mib = 128;
    let started = Instant::now();
    let vm = bench.driver.launch(spec).await.unwrap();
    console(&*vm, "GUEST READY echo").await;
    println!("{label}: ready after {:?}", started.elapsed());
    console(&*vm, "DISK+ 2 ro boot").await;
    vm.plug_disk(disk(3, &bench.image("hot"), false))
        .await
        .unwrap();
    console(&*vm, "DISK+ 3 rw hot").await;
    vm.unplug_disk(3).await.unwrap();
    console(&*vm, "DISK- 3").await;
    let mut channel = vm.open_channel().await.unwrap();
    channel.write_all(b"ping").await.unwrap();
    let mut word = [0; 4];
    timeout(PATIENCE, channel.read_exact(&mut word))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&word, b"ping");
    assert!(
        !vm.console_tail().contains("MODULE"),
        "{}",
        vm.console_tail()
    );
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn q35_works_like_microvm() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let mut spec = bench.spec("echo");
    spec.kernel.machine = Machine::Q35;
    works(&bench, spec).await;
}

/// Debian's kernels, imported and packed with `init`.
fn debian_specs(bench: &Bench, init: &Path) -> Vec<VmSpec> {
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../kernel/fetch-cloud-kernel"
    );
    let mut specs = Vec::new();
    for version in ["6.1", "6.12"] {
        let output = std::process::Command::new(script)
            .arg(version)
            .output()
            .unwrap();
        if !output.status.success() {
            println!("SKIP: {}", String::from_utf8_lossy(&output.stderr).trim());
            continue;
        }
        let package = String::from_utf8(output.stdout).unwrap();
        let catalog = KernelCatalog::open(bench.temp.path()).unwrap();
        let entry = import::deb(&catalog, Path::new(package.trim()), None).unwrap();
        let prepared = catalog.prepare(&entry.name, init).unwrap();
        let mut spec = bench.spec("echo");
        assert_eq!(prepared.machine, hypernetes_kernel::Machine::Q35);
        spec.kernel.machine = Machine::Q35;
        spec.kernel.kernel = prepared.kernel;
        spec.kernel.initrd = prepared.initrd;
        specs.push(spec);
    }
    specs
}

#[tokio::test]
async fn debian_kernels_work() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    for spec in debian_specs(&bench, &bench.init) {
        works(&bench, spec).await;
    }
}

/// The first bytes of a session with HyperStart (agent-api, `sync`), for a nonce of zeros.
fn sync_line(tag: &str) -> String {
    let check = (0..16).fold(0x811c_9dc5_u32, |hash, _| hash.wrapping_mul(0x0100_0193));
    format!("\x1eHN{tag} {} {check:08x}\n", "0".repeat(32))
}

#[tokio::test]
async fn debian_kernels_reach_hyperstart() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let Some(hyperstart) = std::env::var_os("HYPERNETES_HYPERSTART") else {
        println!("SKIP: HYPERNETES_HYPERSTART does not name the guest's program");
        return;
    };
    for spec in debian_specs(&bench, Path::new(&hyperstart)) {
        let vm = bench
            .driver
            .launch(VmSpec {
                memory_mib: 128,
                ..spec
            })
            .await
            .unwrap();
        let mut channel = vm.open_channel().await.unwrap();
        let mut heard = Vec::new();
        let started = Instant::now();
        while !String::from_utf8_lossy(&heard).contains(&sync_line("ECHO2")) {
            assert!(
                vm.exit().is_none() && started.elapsed() < PATIENCE,
                "{}",
                vm.console_tail()
            );
            channel
                .write_all(sync_line("SYNC1").as_bytes())
                .await
                .unwrap();
            let read = channel.read_buf(&mut heard);
            drop(timeout(Duration::from_secs(1), read).await);
        }
        println!(
            "HyperStart answers after {:?}\n{}",
            started.elapsed(),
            vm.console_tail()
        );
        vm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_captured_vmm_cannot_open_files_of_the_host() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let vm = bench.driver.launch(bench.spec("echo")).await.unwrap();
    let record = vm.record();
    drop(vm);
    // The world may read these; the VMM may read the first, which is among its libraries.
    let mut control = BufReader::new(connect(&record.run_dir.join("qmp.sock")).await);
    let mut ask = async |command: String| {
        control
            .get_mut()
            .write_all(command.as_bytes())
            .await
            .unwrap();
        loop {
            let mut line = String::new();
            control.read_line(&mut line).await.unwrap();
            let answer: serde_json::Value = serde_json::from_str(&line).unwrap();
            if answer.get("return").is_some() || answer.get("error").is_some() {
                return answer;
            }
        }
    };
    ask("{\"execute\": \"qmp_capabilities\"}".to_owned()).await;
    let open = |path: &str| {
        serde_json::json!({"execute": "blockdev-add", "arguments": {
            "driver": "file", "filename": path, "node-name": "x", "read-only": true}})
        .to_string()
    };
    for path in ["/etc/hostname", "/var/lib/dpkg/status", "/proc/1/status"] {
        let answer = ask(open(path)).await;
        let text = answer["error"]["desc"].as_str().unwrap_or_default();
        assert!(text.contains("Permission denied"), "{path}: {answer}");
    }
    let answer = ask(open("/usr/share/common-licenses/Apache-2.0")).await;
    assert!(answer.get("return").is_some(), "{answer}");
    drop(control);
    bench.driver.destroy(&record.run_dir).await.unwrap();
}

async fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).await.unwrap()
}

#[tokio::test]
async fn the_vmm_may_do_nothing() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let spec = bench.spec("echo");
    let uid = spec.uid;
    let vm = bench.driver.launch(spec).await.unwrap();
    console(&*vm, "GUEST READY").await;
    let pid = vm.record().pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..]
            .trim_start_matches(':')
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    let me = uid.to_string();
    assert_eq!(field("Uid"), [me.as_str(); 4].join(" "));
    assert_eq!(field("Gid"), [me.as_str(); 4].join(" "));
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    for namespace in ["net", "ipc", "uts"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let net = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert_eq!(
        net.lines()
            .skip(2)
            .filter(|line| !line.trim().starts_with("lo:"))
            .count(),
        0,
        "{net}"
    );
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap(),
        Path::new("/")
    );
    assert_eq!(
        fs::read(format!("/proc/{pid}/environ")).unwrap(),
        b"LC_ALL=C\0"
    );
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let cores = limits
        .lines()
        .find(|line| line.starts_with("Max core"))
        .unwrap();
    assert_eq!(cores.split_whitespace().nth(4), Some("0"));

    // No descriptor of ours leaked: only sockets, pipes, anonymous inodes, memfds, kernel, initrd.
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let text = target.to_string_lossy();
        let fine = [
            "socket:",
            "pipe:",
            "anon_inode:",
            "/memfd:",
            "/dev/null",
            "/dev/urandom",
            "/dev/kvm",
        ]
        .iter()
        .any(|prefix| text.starts_with(prefix))
            || ["vmlinux", "initrd", "vmm.err"]
                .iter()
                .any(|name| text.ends_with(name));
        assert!(fine, "{text}");
    }
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_panic_is_told_within_seconds() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let vm = bench.driver.launch(bench.spec("panic")).await.unwrap();
    let mut events = vm.events();
    console(&*vm, "Kernel panic").await;
    let seen = Instant::now();
    let exit = timeout(Duration::from_secs(5), vm.wait()).await.unwrap();
    println!("panic to exit: {:?}", seen.elapsed());
    let VmExit::Panic { console_tail } = &exit else {
        panic!("{exit:?}")
    };
    assert!(
        console_tail.contains("Attempted to kill init"),
        "{console_tail}"
    );
    assert_eq!(events.recv().await.unwrap(), VmEvent::Exited(exit));
}

#[tokio::test]
async fn a_reboot_is_a_shutdown() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let vm = bench.driver.launch(bench.spec("reboot")).await.unwrap();
    assert_eq!(
        timeout(PATIENCE, vm.wait()).await.unwrap(),
        VmExit::Shutdown
    );
}

#[tokio::test]
async fn a_killed_vmm_is_noticed_within_a_second() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let vm = bench.driver.launch(bench.spec("echo")).await.unwrap();
    console(&*vm, "GUEST READY").await;
    let pid = rustix::process::Pid::from_raw(vm.record().pid as i32).unwrap();
    let killed = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let exit = timeout(Duration::from_secs(5), vm.wait()).await.unwrap();
    assert!(matches!(exit, VmExit::VmmDied { .. }), "{exit:?}");
    println!("death to exit: {:?}", killed.elapsed());
}

#[tokio::test]
async fn a_vm_outlives_its_driver_and_is_adopted() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let vm = bench.driver.launch(bench.spec("echo")).await.unwrap();
    console(&*vm, "GUEST READY").await;
    let record = vm.record();
    drop(vm);
    let text = serde_json::to_string(&record).unwrap();
    let record = serde_json::from_str(&text).unwrap();
    let vm = bench.driver.adopt(&record).await.unwrap();
    vm.plug_disk(disk(4, &bench.image("late"), false))
        .await
        .unwrap();
    console(&*vm, "DISK+ 4 rw late").await;
    let mut channel = vm.open_channel().await.unwrap();
    channel.write_all(b"again").await.unwrap();
    let mut word = [0; 5];
    timeout(PATIENCE, channel.read_exact(&mut word))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&word, b"again");
    vm.kill().await.unwrap();
    assert!(matches!(
        bench.driver.adopt(&record).await,
        Err(VmmError::Gone { .. })
    ));
    let mut stranger = record.clone();
    stranger.pid = std::process::id();
    assert!(matches!(
        bench.driver.adopt(&stranger).await,
        Err(VmmError::Gone { .. })
    ));
    assert!(alive(std::process::id()));
}

#[tokio::test]
async fn an_orphan_is_destroyed_by_its_directory() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let vm = bench.driver.launch(bench.spec("echo")).await.unwrap();
    let record = vm.record();
    drop(vm);
    assert!(alive(record.pid));
    bench.driver.destroy(&record.run_dir).await.unwrap();
    assert!(!alive(record.pid));
    assert!(cgroups_named(&record.cgroup.unwrap()).is_empty());
    bench.driver.destroy(&record.run_dir).await.unwrap();
    bench
        .driver
        .destroy(Path::new("/nonexistent/run"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_cancelled_launch_leaves_no_process() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let spec = bench.spec("echo");
    let run_dir = spec.run_dir.clone();
    let launch = timeout(Duration::from_millis(15), bench.driver.launch(spec)).await;
    assert!(
        launch.is_err(),
        "the launch was faster than its cancellation"
    );
    until(
        "run directory is clean",
        || !run_dir.join("qmp.sock").exists(),
        String::new,
    )
    .await;
    let name = run_dir.file_name().unwrap().to_string_lossy().into_owned();
    let ours = fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read_to_string(entry.path().join("cmdline")).is_ok_and(|line| line.contains(&name))
    });
    assert!(!ours);
}

#[tokio::test]
async fn a_console_flood_is_bounded_and_harmless() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let vm = bench.driver.launch(bench.spec("chatter")).await.unwrap();
    let log = vm.record().run_dir.join("console.log.1");
    until(
        "the log has been rotated",
        || log.exists(),
        || vm.console_tail().len().to_string(),
    )
    .await;
    let tail = vm.console_tail();
    assert!(tail.len() <= 64 * 1024 && !tail.contains('\x1b'));
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn launch_errors_say_what_is_wrong() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let mut spec = bench.spec("echo");
    spec.uid = 0;
    assert!(matches!(
        bench.driver.launch(spec).await,
        Err(VmmError::Spec { field: "uid", .. })
    ));

    // A kernel that is none: QEMU's own words arrive.
    let mut spec = bench.spec("echo");
    let nonsense = bench.temp.path().join("nonsense");
    fs::write(&nonsense, b"not a kernel").unwrap();
    spec.kernel.kernel = nonsense;
    let run_dir = spec.run_dir.clone();
    let error = bench.driver.launch(spec).await.unwrap_err();
    let VmmError::EarlyExit { output, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(output.contains("kernel"), "{output}");
    assert_eq!(fs::read_dir(run_dir).unwrap().count(), 0);

    let mut spec = bench.spec("echo");
    spec.cgroup = Some("../escape".to_owned());
    let error = bench.driver.launch(spec).await.unwrap_err();
    let VmmError::EarlyExit { output, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(output.contains("cgroup"), "{output}");
}

#[tokio::test]
async fn the_probe_decides_by_booting_and_remembers() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let probe = bench.driver.probe();
    println!("{probe:#?}");
    assert!(
        !probe.why.contains("vmm-launch"),
        "the launcher itself failed: {}",
        probe.why
    );
    assert!(!probe.version.is_empty());
    let started = Instant::now();
    let again = hypernetes_vmm::qemu::QemuDriver::detect(support::config(bench.temp.path()))
        .await
        .unwrap();
    assert_eq!(again.probe(), probe);
    assert!(started.elapsed() < Duration::from_millis(500));
}

/// Seccomp filters of a process.
fn filters(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp_filters:"));
    line.unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn vms_go_on_from_a_template_on_both_machines() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    for machine in [Machine::Microvm, Machine::Q35] {
        let spec = |origin| {
            let mut spec = bench.spec("echo");
            spec.kernel.machine = machine;
            spec.memory_mib = 128;
            spec.origin = origin;
            spec
        };
        let vm = bench.driver.launch(spec(Origin::Savable)).await.unwrap();
        console(&*vm, "GUEST READY echo").await;
        let template = Arc::new(vm.save().await.unwrap());
        assert!(vm.exit().is_some());
        let mut seen = Vec::new();
        for name in ["first", "second", "third"] {
            let mut spec = spec(Origin::Template(Arc::clone(&template)));
            spec.disks.push(disk(3, &bench.image(name), true));
            let vm = bench.driver.launch(spec).await.unwrap();
            console(&*vm, &format!("DISK+ 3 ro {name}")).await;
            assert!(!vm.console_tail().contains("GUEST READY"), "it booted");
            let mut channel = vm.open_channel().await.unwrap();
            channel.write_all(b"ping").await.unwrap();
            let mut word = [0; 4];
            timeout(PATIENCE, channel.read_exact(&mut word))
                .await
                .unwrap()
                .unwrap();
            assert_eq!(&word, b"ping");
            seen.push(filters(vm.record().pid));
            vm.kill().await.unwrap();
        }
        // The first VM shows where the memory is; holes in it are caught from the second on.
        assert_eq!(seen[1..], [seen[0] + 1, seen[0] + 1], "{machine:?}");
    }
}

/// The numbers that the guest has counted to, as far as the console still has them.
fn counts(vm: &dyn Vm) -> Vec<u32> {
    let tail = vm.console_tail();
    let lines = tail
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let number = |line: &str| line.trim().strip_prefix("COUNT ")?.parse().ok();
    lines.filter_map(number).collect()
}

async fn counts_beyond(vm: &dyn Vm, least: u32) {
    let last = || counts(vm).last().copied();
    let state = || format!("{}\nexit: {:?}", vm.console_tail(), vm.exit());
    until("it counts", || last().is_some_and(|n| n > least), state).await;
}

/// KiB of memory that others may share, which is where a guest's is.
fn shared_memory_kib(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |line: &str| {
        line.strip_prefix("Pss_Shmem:")?
            .trim()
            .strip_suffix(" kB")?
            .parse()
            .ok()
    };
    rollup.lines().find_map(field).unwrap()
}

#[tokio::test]
async fn suspended_vms_go_on_counting_on_both_machines() {
    const LIMIT: u64 = 1 << 30;
    let Some(bench) = Bench::new().await else {
        return;
    };
    let grown = VmExtras {
        max_vcpus: 2,
        max_memory_mib: 256,
        shares: true,
    };
    for (name, extras, templated) in [
        ("booted", VmExtras::default(), false),
        ("templated", VmExtras::default(), true),
        ("grown", grown, false),
    ] {
        let spec = |origin| {
            let mut spec = bench.spec("count");
            spec.memory_mib = 128;
            spec.extras = extras;
            spec.origin = origin;
            spec
        };
        let mut first = spec(Origin::Kernel);
        if templated {
            let vm = bench.driver.launch(spec(Origin::Savable)).await.unwrap();
            counts_beyond(&*vm, 0).await;
            first.origin = Origin::Template(Arc::new(vm.save().await.unwrap()));
        }
        let (sandbox, run_dir) = (first.sandbox.clone(), first.run_dir.clone());
        let vm = bench.driver.launch(first).await.unwrap();
        let image = bench.image(name);
        vm.plug_disk(disk(9, &image, false)).await.unwrap();
        console(&*vm, &format!("DISK+ 9 rw {name}")).await;
        if name == "grown" {
            assert_eq!(vm.set_extra_memory(128).await.unwrap(), 128);
        }
        counts_beyond(&*vm, counts(&*vm).last().copied().unwrap_or(0) + 3).await;
        let path = bench.temp.path().join(format!("{name}.state"));
        let file = || {
            fs::File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
        };
        vm.suspend(file().unwrap(), LIMIT).await.unwrap();
        let pid = vm.record().pid;
        vm.kill().await.unwrap();
        assert!(!alive(pid));
        let last = counts(&*vm).last().copied().unwrap();
        drop(vm);
        // Empty memory takes no room in it.
        let size = fs::metadata(&path).unwrap().len();
        assert!(size < 96 << 20, "{name}: {size}");

        let resumed = |path: &Path| {
            let suspended = Suspended::open(fs::File::open(path).unwrap()).unwrap();
            let mut spec = spec(Origin::Suspended(Arc::new(suspended)));
            spec.sandbox = sandbox.clone();
            spec.run_dir = run_dir.clone();
            spec.disks.push(disk(9, &image, false));
            spec
        };
        let torn = bench.temp.path().join("torn.state");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() - 1000;
        bytes[middle] ^= 1;
        fs::write(&torn, bytes).unwrap();
        let error = bench.driver.launch(resumed(&torn)).await.unwrap_err();
        println!("{name}: {}", causes(&error));
        assert!(!run_dir.join("launch.json").exists());

        let vm = bench.driver.launch(resumed(&path)).await.unwrap();
        // It stands still until it is told.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(counts(&*vm), [0; 0]);
        let memory = shared_memory_kib(vm.record().pid);
        assert!(memory < 96 << 10, "{name}: {memory} KiB");
        vm.resume().await.unwrap();
        counts_beyond(&*vm, last + 3).await;
        let seen = counts(&*vm);
        assert!(
            seen[0] == last + 1 || seen[0] == last + 2,
            "{last}, then {seen:?}"
        );
        assert!(!vm.console_tail().contains("GUEST READY"), "it booted");
        let slots = vm.list_disks().await.unwrap();
        assert_eq!(slots, [9]);
        vm.unplug_disk(9).await.unwrap();
        console(&*vm, "DISK- 9").await;
        if name == "grown" {
            assert_eq!(vm.set_extra_memory(0).await.unwrap(), 0);
        }
        vm.kill().await.unwrap();
    }
}

/// An error with its causes.
fn causes(error: &VmmError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[test]
fn an_ephemeral_vm_dies_with_whoever_started_it() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    // The kernel watches the thread: its end is that of a process of one thread.
    let pids = std::thread::spawn(move || {
        runtime().block_on(async {
            let bench = Bench::new().await?;
            let mut spec = bench.spec("echo");
            spec.ephemeral = true;
            let vm = bench.driver.launch(spec).await.unwrap();
            let other = bench.driver.launch(bench.spec("echo")).await.unwrap();
            let pids = (vm.record().pid, other.record().pid);
            assert!(alive(pids.0) && alive(pids.1));
            Some((pids, other.record().run_dir, bench))
        })
    });
    let Some(((ephemeral, other), run_dir, bench)) = pids.join().unwrap() else {
        return;
    };
    runtime().block_on(async {
        until(
            "the ephemeral VM is dead",
            || !alive(ephemeral),
            String::new,
        )
        .await;
        assert!(alive(other), "the other one runs on");
        bench.driver.destroy(&run_dir).await.unwrap();
    });
}
