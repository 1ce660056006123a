//! No byte of a tenant gets into a template or into a VM that waits for a pod, and VMs that share one cannot write what they share.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is one module"
)]
#![allow(
    clippy::unwrap_used,
    reason = "helpers of a test fail by panic and report by print"
)]

mod memory;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use hypernetes_testkit::{
    Daemon, DaemonOptions, Registry, can_run_pods, eventually, run, workspace_root,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);
/// Where tenants put something: a marker each.
const PLACES: [&str; 7] = ["name", "env", "secret", "config", "image", "exec", "log"];
/// Limits of containers, each of which makes a VM of another size.
const USUAL: Option<&str> = None;
const DURING: Option<&str> = Some("32Mi");
const AFTER: Option<&str> = Some("48Mi");

/// A tenant, and texts that are in this test's pods and nowhere else.
struct Tenant {
    name: &'static str,
    kubeconfig: PathBuf,
    /// How all texts of all tenants begin.
    run: String,
}

impl Tenant {
    fn marker(&self, place: &str) -> String {
        format!("{}-{place}-{}", self.run, self.name)
    }

    fn markers(&self) -> BTreeSet<String> {
        PLACES.iter().map(|place| self.marker(place)).collect()
    }

    /// Something to be found again, though pages of a guest lie anywhere: more than once.
    fn text(&self, place: &str) -> String {
        [self.marker(place).as_str(); 5].join(" ")
    }

    fn pod(&self, number: usize) -> String {
        format!("{}-{number}", self.marker("name"))
    }

    fn apply(&self, daemon: &Daemon, objects: &[Value]) {
        let path = daemon.dir().join("objects.json");
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        fs::write(&path, list.to_string()).unwrap();
        let file = path.display().to_string();
        run(&mut daemon.kubectl_as(&self.kubeconfig, &["apply", "-f", &file]));
    }

    /// Runs a pod that has its markers in its memory, and returns the process of its VM.
    fn start(&self, daemon: &Daemon, image: &str, number: usize, limit: Option<&str>) -> u32 {
        let before = vms(daemon, true);
        let name = self.pod(number);
        let program = "cat /etc/marker /secret/text /config/text > /dev/shm/read; \
                       echo $(cat /log/text); exec sleep infinity";
        let resources =
            limit.map_or_else(|| json!({}), |limit| json!({"limits": {"memory": limit}}));
        self.apply(
            daemon,
            &[json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "main", "image": image, "command": ["sh", "-c", program],
                        "env": [{"name": "MARKER", "value": self.text("env")}],
                        "resources": resources,
                        "volumeMounts": [
                            {"name": "secret", "mountPath": "/secret"},
                            {"name": "config", "mountPath": "/config"},
                            {"name": "log", "mountPath": "/log"},
                        ],
                    }],
                    "volumes": [
                        {"name": "secret", "secret": {"secretName": "marker"}},
                        {"name": "config", "configMap": {"name": "marker"}},
                        {"name": "log", "configMap": {"name": "log"}},
                    ],
                },
            })],
        );
        let pod = format!("pod/{name}");
        let wait = ["wait", "--for=condition=Ready", &pod, "--timeout=240s"];
        run(&mut daemon.kubectl_as(&self.kubeconfig, &wait));
        let exec = [
            "exec",
            "-i",
            &name,
            "--",
            "sh",
            "-c",
            "cat > /dev/shm/given",
        ];
        let mut given = daemon
            .kubectl_as(&self.kubeconfig, &exec)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        given
            .stdin
            .take()
            .unwrap()
            .write_all(self.text("exec").as_bytes())
            .unwrap();
        assert!(given.wait().unwrap().success());
        eventually("the pod's log", PATIENCE, || {
            let log = daemon
                .kubectl_as(&self.kubeconfig, &["logs", &name])
                .output();
            let log = String::from_utf8_lossy(&log.unwrap().stdout).into_owned();
            log.contains(&self.marker("log")).then_some(()).ok_or(log)
        });
        let mut new = vms(daemon, true);
        new.retain(|pid| !before.contains(pid));
        assert_eq!(new.len(), 1, "the pod has a VM of its own");
        new[0]
    }
}

/// VMMs of pods, or of VMs that wait for one: those are counted to nobody.
fn vms(daemon: &Daemon, of_pods: bool) -> Vec<u32> {
    let mut found = daemon.vmm_processes();
    found.retain(|pid| {
        // One that ends meanwhile is neither.
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"));
        groups.is_ok_and(|groups| groups.contains("/hypernetes-") == of_pods)
    });
    found
}

/// An image like the usual one with a file of its own. Returns its reference.
fn push_image(registry: &Registry, name: &str, text: &str) -> String {
    let script = "import sys, tempfile; sys.path.insert(0, sys.argv[1]); import build_images as b\n\
                  layer = b.Layer(); layer.file('etc/marker', sys.argv[4])\n\
                  layers = [b.base_layer(), b.busybox_layer(), layer.bytes()]\n\
                  image = b.Image([sys.argv[3]], layers, {'Cmd': ['sh']})\n\
                  with tempfile.TemporaryDirectory() as out:\n    \
                      b.Registry('http://' + sys.argv[2], None, None).push(b.write_layout(image, out), out)\n";
    let name = format!("{name}:1");
    run(Command::new("python3")
        .args(["-c", script])
        .arg(workspace_root().join("tests/images"))
        .args([registry.address(), &name, text])
        .env("PYTHONDONTWRITEBYTECODE", "1"));
    registry.image(&name)
}

/// Waits until this many templates have been made since the beginning, over all lives of the daemon.
fn wait_templates(daemon: &Daemon, count: usize) {
    eventually("templates are made", PATIENCE, || {
        let made = daemon.log_text().matches("a template is ready").count();
        (made >= count)
            .then_some(())
            .ok_or(format!("{made} templates"))
    });
}

/// No template that the daemon has knows anything of any tenant.
fn assert_nothing_in_templates(daemon: &Daemon, run: &str, at_least: usize) {
    let files = memory::templates(daemon.pid());
    assert!(
        files.len() >= at_least,
        "{} templates, not {at_least}",
        files.len()
    );
    for file in &files {
        let found = memory::find_in_file(file, run.as_bytes());
        assert!(
            found.is_empty(),
            "in the memory of a template: {}",
            show(&found)
        );
        // The search sees what is there: every template has booted HyperKernel.
        assert!(!memory::find_in_file(file, b"hyperstart").is_empty());
    }
    let states = memory::device_states(daemon.pid());
    assert!(states.len() >= files.len(), "{} states", states.len());
    for state in &states {
        assert!(memchr::memmem::find(state, b"virtio").is_some());
        assert!(
            memchr::memmem::find(state, run.as_bytes()).is_none(),
            "in the state of devices"
        );
    }
}

fn show(found: &[Vec<u8>]) -> String {
    let texts = found
        .iter()
        .map(|text| String::from_utf8_lossy(text).into_owned());
    texts.collect::<Vec<_>>().join("; ")
}

/// VMs that wait for a pod, of whichever template, know nothing of any tenant.
fn assert_nothing_in_waiting_vms(daemon: &Daemon, tenants: [&Tenant; 2]) {
    // One that is still starting has nothing in its memory that could be found.
    let waiting = eventually("a VM waits for a pod", PATIENCE, || {
        let mut found = vms(daemon, false);
        found.retain(|pid| {
            let guest = memory::Mapping::is_guest;
            !memory::find_in_process(*pid, b"hyperstart", guest).is_empty()
        });
        (!found.is_empty())
            .then_some(found)
            .ok_or("none".to_owned())
    });
    for pid in waiting {
        assert_eq!(markers_in_vm(pid, tenants), BTreeSet::new());
    }
}

/// Which markers of which tenants are in the memory of a VM.
fn markers_in_vm(pid: u32, tenants: [&Tenant; 2]) -> BTreeSet<String> {
    let found = memory::find_in_process(pid, tenants[0].run.as_bytes(), memory::Mapping::is_guest);
    let all = tenants.iter().flat_map(|tenant| tenant.markers());
    all.filter(|marker| found.iter().any(|text| text.starts_with(marker.as_bytes())))
        .collect()
}

/// VMs of one template map it privately, have copies of what they wrote, and share nothing writable.
fn assert_private(vms: &[u32]) {
    let mut templates = BTreeSet::new();
    let mut writable: Vec<BTreeSet<(String, u64)>> = Vec::new();
    for pid in vms {
        let all = memory::mappings(*pid);
        let guest: Vec<_> = all.iter().filter(|mapping| mapping.is_guest()).collect();
        assert!(!guest.is_empty(), "VMM {pid} has no guest memory");
        for mapping in &guest {
            assert_eq!(mapping.permissions, "rw-p", "{mapping:?}");
            templates.insert(mapping.file.clone());
        }
        let own: u64 = guest.iter().map(|mapping| mapping.private_dirty_kib).sum();
        assert!(own > 512, "VMM {pid} has {own} KiB of its own");
        let shared = all.iter().filter(|mapping| mapping.is_shared_writable());
        writable.push(shared.map(|mapping| mapping.file.clone()).collect());
    }
    assert_eq!(
        templates.len(),
        1,
        "they are of one template: {templates:?}"
    );
    for (number, of_one) in writable.iter().enumerate() {
        for of_other in &writable[number + 1..] {
            let both: Vec<_> = of_one.intersection(of_other).collect();
            assert!(both.is_empty(), "two VMMs can write {both:?}");
        }
    }
}

/// The file is sealed against everybody, and no process has a way to write it from before.
fn assert_sealed(file: &File) {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let mut writer = File::options().write(true).open(path).unwrap();
    let refused = writer.write(b"x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
}

fn random_hex() -> String {
    let mut bytes = [0; 6];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn delete_pods(daemon: &Daemon, kubeconfig: &Path) {
    let delete = [
        "delete",
        "pods",
        "--all",
        "--grace-period=0",
        "--force",
        "--timeout=120s",
    ];
    run(&mut daemon.kubectl_as(kubeconfig, &delete));
}

#[test]
fn no_template_knows_anything_of_a_tenant() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut daemon = Daemon::start(DaemonOptions {
        args: vec!["--pool".into(), "1".into()],
        ..DaemonOptions::default()
    });
    let begin = format!("m{}", random_hex());
    let tenants =
        [("acme", "10.71.0.0/24"), ("globex", "10.71.0.0/24")].map(|(name, cidr)| Tenant {
            name,
            kubeconfig: daemon.tenant(name, cidr),
            run: begin.clone(),
        });
    let [acme, globex] = &tenants;
    let both = [acme, globex];
    let images = both.map(|tenant| push_image(&registry, tenant.name, &tenant.text("image")));
    for tenant in both {
        tenant.apply(
            &daemon,
            &[
                json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "marker"},
                   "stringData": {"text": tenant.text("secret")}}),
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "marker"},
                   "data": {"text": tenant.text("config")}}),
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "log"},
                   "data": {"text": tenant.text("log")}}),
            ],
        );
    }

    // Before: made when no pod had been. Pods of both tenants start from it.
    wait_templates(&daemon, 1);
    assert_nothing_in_waiting_vms(&daemon, both);
    let first = [0, 1].map(|at| both[at].start(&daemon, &images[at], 0, USUAL));
    assert!(
        !daemon.log_text().contains("from_template=false"),
        "both are of the template"
    );
    assert_private(&first);
    for file in memory::templates(daemon.pid()) {
        assert_sealed(&file);
    }
    assert_nothing_in_templates(&daemon, &begin, 1);

    // What is searched for can be found: in the pod's own VM, and in no other.
    for (vm, tenant) in first.iter().zip(both) {
        assert_eq!(
            markers_in_vm(*vm, both),
            tenant.markers(),
            "of {}",
            tenant.name
        );
    }

    // During: of a shape that two pods have come with, while all of them run.
    for at in [0, 1] {
        both[at].start(&daemon, &images[at], 1, DURING);
    }
    wait_templates(&daemon, 2);
    assert_nothing_in_templates(&daemon, &begin, 2);

    // And by another daemon, which has found them running.
    daemon.kill();
    daemon.start_again();
    wait_templates(&daemon, 3);
    assert_eq!(vms(&daemon, true).len(), 4, "all pods run on");
    assert_nothing_in_waiting_vms(&daemon, both);
    assert_nothing_in_templates(&daemon, &begin, 1);

    // After: when those pods' memory, users and files have gone to others.
    for tenant in both {
        delete_pods(&daemon, &tenant.kubeconfig);
    }
    for at in [0, 1] {
        both[at].start(&daemon, &images[at], 2, AFTER);
    }
    wait_templates(&daemon, 4);
    assert_nothing_in_templates(&daemon, &begin, 2);
    assert_nothing_in_waiting_vms(&daemon, both);
}
