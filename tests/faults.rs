//! Pods are made, used and deleted while daemon, VMMs and guests die: rounds that are drawn from a seed.
//!
//! `HYPERNETES_SEED` draws the same again, `HYPERNETES_SCHEDULES` is the number of rounds.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "helpers of a test fail by panic, and the random moment is its input"
)]

use std::{collections::BTreeMap, path::PathBuf, thread::sleep, time::Duration};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, run,
    seeded::{Random, schedules},
    stdout,
};
use rustix::process::{Pid, Signal, kill_process};

const FAULTS: [Fault; 6] = [
    Fault::DaemonDies,
    Fault::DaemonDies,
    Fault::VmmDies,
    Fault::GuestPanics,
    Fault::VmmHangs,
    Fault::EverythingDies,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// SIGKILL, and a new one.
    DaemonDies,
    /// SIGKILL of any VMM.
    VmmDies,
    /// A kernel panic in a pod that is up.
    GuestPanics,
    /// A VMM stands still for a while: its guest does not answer.
    VmmHangs,
    /// Daemon, VMMs and what the kernel had, as when the machine's power fails; files stay.
    EverythingDies,
}

/// What the tenant was told of a pod.
#[derive(Debug, Default)]
struct Pod {
    /// It was seen ready.
    ready: bool,
    /// Its VM has ended for certain.
    dead: bool,
}

struct Bed {
    daemon: Daemon,
    tenant: PathBuf,
    image: String,
    random: Random,
    pods: BTreeMap<String, Pod>,
    deleted: Vec<String>,
    made: u32,
    /// How many VMs have ended at most, of which it is not known whose they were.
    strays: usize,
}

impl Bed {
    fn asked(&self, args: &[&str]) -> bool {
        let output = self.daemon.kubectl_as(&self.tenant, args).output();
        output.is_ok_and(|output| output.status.success())
    }

    fn create(&mut self) {
        let name = format!("p{}", self.made);
        self.made += 1;
        let overrides = r#"{"apiVersion":"v1","spec":{"terminationGracePeriodSeconds":1}}"#;
        let command = ["--", "sh", "-c", "while :; do date; sleep 1; done"];
        let mut args = vec!["run", &name, "--image", &self.image, "--restart=Never"];
        args.extend(["--privileged", "--overrides", overrides]);
        args.extend(command);
        if self.asked(&args) {
            self.pods.insert(name, Pod::default());
        }
    }

    fn delete(&mut self) {
        let names: Vec<String> = self.pods.keys().cloned().collect();
        let Some(name) = self.random.pick(&names).cloned() else {
            return;
        };
        if self.asked(&["delete", "pod", &name, "--wait=false"]) {
            self.pods.remove(&name);
            self.deleted.push(name);
        }
    }

    /// A pod that was seen ready and that nothing has happened to.
    fn unharmed(&mut self) -> Option<String> {
        let pods = self.pods.iter().filter(|(_, pod)| pod.ready && !pod.dead);
        let names: Vec<String> = pods.map(|(name, _)| name.clone()).collect();
        self.random.pick(&names).cloned()
    }

    fn exec(&mut self) {
        let Some(name) = self.unharmed() else { return };
        let number = self.random.below(1000).to_string();
        let mut exec = self
            .daemon
            .kubectl_as(&self.tenant, &["exec", &name, "--", "echo", &number]);
        let output = exec.output().unwrap();
        // A stray death may have been its VM's.
        if self.strays == 0 {
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(said.trim(), number, "in {name}: {output:?}");
        }
    }

    fn vmm(&mut self) -> Option<Pid> {
        let vmms = self.daemon.vmm_processes();
        let pid = *self.random.pick(&vmms)?;
        Pid::from_raw(i32::try_from(pid).ok()?)
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::DaemonDies => {
                self.daemon.kill();
                self.daemon.start_again();
            }
            Fault::VmmDies => {
                if let Some(pid) = self.vmm() {
                    // It may have ended just now.
                    kill_process(pid, Signal::KILL).ok();
                    self.strays += 1;
                }
            }
            Fault::GuestPanics => {
                let Some(name) = self.unharmed() else { return };
                let panic = "echo c > /proc/sysrq-trigger";
                let args = [
                    "--request-timeout=10s",
                    "exec",
                    &name,
                    "--",
                    "sh",
                    "-c",
                    panic,
                ];
                // The answer is lost with the VM.
                self.daemon.kubectl_as(&self.tenant, &args).output().ok();
                self.pods.get_mut(&name).unwrap().dead = true;
            }
            Fault::VmmHangs => {
                if let Some(pid) = self.vmm() {
                    kill_process(pid, Signal::STOP).ok();
                    sleep(Duration::from_millis(500 + self.random.below(1500)));
                    kill_process(pid, Signal::CONT).ok();
                }
            }
            Fault::EverythingDies => {
                self.daemon.lose_power();
                for pod in self.pods.values_mut().filter(|pod| pod.ready) {
                    pod.dead = true;
                }
                // Those that were coming up may have been up.
                self.strays += self.pods.values().filter(|pod| !pod.ready).count();
                self.daemon.start_again();
            }
        }
    }

    fn phases(&self) -> BTreeMap<String, String> {
        let columns = "jsonpath={range .items[*]}{.metadata.name} {.status.phase} \
                       {.status.containerStatuses[0].ready} \
                       {.status.containerStatuses[0].restartCount}{\"\\n\"}{end}";
        let list = ["get", "pods", "-o", columns];
        let text = stdout(&mut self.daemon.kubectl_as(&self.tenant, &list));
        let line = |line: &str| line.split_once(' ').map(|(a, b)| (a.into(), b.into()));
        text.lines().filter_map(line).collect()
    }

    /// What was acknowledged is true, sooner or later.
    fn settled(&mut self) {
        let seen = eventually(
            "the pods are as they must be",
            Duration::from_secs(120),
            || {
                let phases = self.phases();
                let mut failed = 0;
                for (name, pod) in &self.pods {
                    let phase = phases.get(name).ok_or_else(|| format!("{name} is lost"))?;
                    match phase.split(' ').next() {
                        Some("Failed") => failed += usize::from(!pod.dead),
                        Some("Running") if phase == "Running true 0" && !pod.dead => {}
                        _ => return Err(format!("{name} is {phase:?}, {pod:?}")),
                    }
                }
                let strays = self.strays;
                if failed > strays {
                    return Err(format!(
                        "{failed} pods have failed, {strays} may have: {phases:?}"
                    ));
                }
                let back = self.deleted.iter().find(|name| phases.contains_key(*name));
                match back {
                    Some(name) => Err(format!("{name} was deleted and is there")),
                    None => Ok(phases),
                }
            },
        );
        for (name, pod) in &mut self.pods {
            pod.ready |= seen[name].starts_with("Running");
            if seen[name].starts_with("Failed") && !pod.dead {
                pod.dead = true;
            }
        }
        // Whoever it was is known now.
        self.strays = 0;
    }
}

#[test]
fn whatever_dies_what_tenants_were_told_stays_true_and_nothing_is_left() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let daemon = Daemon::start(DaemonOptions::default());
    // The operator: a guest panics by what tenants may not do.
    let tenant = daemon.admin_kubeconfig();
    let mut bed = Bed {
        image: registry.image("busybox:1"),
        daemon,
        tenant,
        random: Random::new("rounds of faults"),
        pods: BTreeMap::new(),
        deleted: Vec::new(),
        made: 0,
        strays: 0,
    };
    bed.create();
    for round in 0..schedules(6) {
        if bed.pods.values().filter(|pod| !pod.dead).count() < 3 {
            bed.create();
        }
        if bed.random.below(3) == 0 {
            bed.delete();
        }
        bed.exec();
        sleep(Duration::from_millis(bed.random.below(1500)));
        let fault = *bed.random.pick(&FAULTS).unwrap();
        println!("round {round}: {fault:?} with {:?}", bed.pods);
        bed.fault(fault);
        if bed.random.below(2) == 0 {
            bed.settled();
        }
    }
    bed.settled();
    while bed.unharmed().is_some() {
        bed.exec();
        let name = bed.unharmed().unwrap();
        bed.pods.get_mut(&name).unwrap().dead = true;
    }
    let Bed { daemon, tenant, .. } = &mut bed;
    run(&mut daemon.kubectl_as(tenant, &["delete", "pods", "--all", "--grace-period=1"]));
    eventually("the host is clean", Duration::from_secs(60), || {
        let picture = daemon.host_picture();
        match picture.is_clean() {
            true => Ok(()),
            false => Err(format!("{picture:?}")),
        }
    });
    let panics = daemon.log_text().matches("panicked at").count();
    assert_eq!(panics, 0, "the daemon has panicked");
    daemon.stop();
    let files = daemon.pod_files();
    assert!(files.is_empty(), "files left: {files:?}");
}
