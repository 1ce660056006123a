//! An image for pods that need no registry: busybox of this machine.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{run, stdout};

/// A docker-archive in `dir` of `busybox:test`, with this machine's busybox and its libraries in the lower of two
/// layers and the users in the upper one. It runs `sh` as `web`.
pub fn busybox_archive(dir: &Path, passwd: &str, group: &str, stop_signal: &str) -> PathBuf {
    let (root, etc) = (dir.join("root"), dir.join("second"));
    for path in ["bin", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(path)).unwrap();
    }
    add_busybox(&root);
    fs::create_dir_all(etc.join("etc")).unwrap();
    fs::write(etc.join("etc/passwd"), passwd).unwrap();
    fs::write(etc.join("etc/group"), group).unwrap();
    let image = dir.join("image");
    fs::create_dir_all(&image).unwrap();
    let mut diff_ids = Vec::new();
    for (source, name) in [(&root, "one.tar"), (&etc, "two.tar")] {
        let tar = image.join(name);
        pack(source, &tar);
        let sum = stdout(Command::new("sha256sum").arg(&tar));
        diff_ids.push(format!("sha256:{}", sum.split_whitespace().next().unwrap()));
    }
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Env": ["PATH=/bin"], "User": "web", "Cmd": ["sh"], "StopSignal": stop_signal },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    fs::write(image.join("config.json"), config.to_string()).unwrap();
    let manifest = serde_json::json!([
        { "Config": "config.json", "RepoTags": ["busybox:test"], "Layers": ["one.tar", "two.tar"] }
    ]);
    fs::write(image.join("manifest.json"), manifest.to_string()).unwrap();
    let archive = dir.join("image.tar");
    pack(&image, &archive);
    archive
}

fn add_busybox(root: &Path) {
    let busybox = stdout(Command::new("sh").args(["-c", "command -v busybox"]));
    fs::copy(&busybox, root.join("bin/busybox")).unwrap();
    for applet in stdout(Command::new(&busybox).arg("--list"))
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    // A static busybox has no libraries, and ldd fails on it.
    let libraries = Command::new("ldd").arg(&busybox).output();
    let libraries = libraries.map(|output| output.stdout).unwrap_or_default();
    for library in String::from_utf8_lossy(&libraries)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let place = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(library, place).unwrap();
    }
}

/// A tar of what is in a directory, root's whoever has it.
fn pack(source: &Path, tar: &Path) {
    run(Command::new("tar")
        .args(["--owner=0", "--group=0", "-C"])
        .arg(source)
        .arg("-cf")
        .arg(tar)
        .arg("."));
}
