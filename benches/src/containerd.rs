//! Debian's containerd for a measurement, and places to run runtimes in.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use hypernetes_testkit::{eventually, run};
use serde_json::json;

use crate::processes::processes;

const PATIENCE: Duration = Duration::from_secs(60);

/// A network namespace with CNI plugins of its own; ends with the value.
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) conf: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new(kind: &str, subnet: &str) -> Result<Self> {
        let place = Self {
            name: format!("hnbench-{kind}-{}", std::process::id()),
            conf: tempfile::tempdir()?,
        };
        run(Command::new("ip").args(["netns", "add", &place.name]));
        run(Command::new("ip").args(["-n", &place.name, "link", "set", "lo", "up"]));
        let list = json!({"cniVersion": "0.4.0", "name": "pods", "plugins": [{
            "type": "bridge", "bridge": "cni0", "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": place.conf.path().join("ipam"),
                     "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }]});
        fs::write(place.conf.path().join("10-pods.conflist"), list.to_string())?;
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ended = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
        if !ended.is_ok_and(|status| status.success()) {
            println!("network namespace {} is left", self.name);
        }
    }
}

/// Debian's containerd with directories of its own.
pub(crate) struct Containerd {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) child: Child,
}

impl Containerd {
    pub(crate) fn start(place: &Place, pause: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {pause:?}\nrestrict_oom_score_adj = true\n\
             disable_apparmor = true\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = {:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            at("root"),
            at("state"),
            at("c.sock"),
            at("t.sock"),
            place.conf.path().display().to_string(),
            at("opt"),
        );
        fs::write(dir.path().join("config.toml"), config)?;
        let log = fs::File::create(dir.path().join("log"))?;
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", place.name))
            .args(["containerd", "--config"])
            .arg(dir.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd (Debian's package)")?;
        let socket = dir.path().join("c.sock");
        let containerd = Self { dir, child };
        eventually("containerd serves its socket", PATIENCE, || {
            std::os::unix::net::UnixStream::connect(&socket)
                .map(drop)
                .map_err(|error| error.to_string())
        });
        Ok(containerd)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Its pods were removed; what a failed run leaves is named.
        self.child.kill().ok();
        self.child.wait().ok();
        for pid in shims(self.dir.path()) {
            println!("a shim is left: process {pid}");
        }
    }
}

/// Processes of shims of this containerd.
pub(crate) fn shims(dir: &Path) -> Vec<u32> {
    let mark = dir.display().to_string();
    processes(|line| line.contains("containerd-shim") && line.contains(&mark))
}
