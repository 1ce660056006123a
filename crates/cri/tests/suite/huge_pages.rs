//! Huge pages: promised to a container, limited to it, and the VM's again when it is gone.

use std::{fs, path::Path};

use hypernetes_cri::v1;
use hypernetes_testkit::{Node, Registry, can_run_pods};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::client::{Client, end, sandbox, shell};

const MIB: u64 = 1 << 20;

/// An emptyDir with `medium: HugePages` as a kubelet makes it: a file system of the host's.
struct HugeDir(std::path::PathBuf);

impl HugeDir {
    fn mount(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = Some(c"pagesize=2M");
        mount("nodev", path, "hugetlbfs", MountFlags::empty(), options).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for HugeDir {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).ok();
    }
}

fn promised(name: &str, image: &str, script: &str, bytes: u64) -> v1::ContainerConfig {
    let mut config = shell(name, image, script);
    // As a kubelet has it: every size that the host has.
    let limit = |page_size: &str, limit| v1::HugepageLimit {
        page_size: page_size.into(),
        limit,
    };
    config.linux = Some(v1::LinuxContainerConfig {
        resources: Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            hugepage_limits: vec![limit("2MB", bytes), limit("1GB", 0)],
            ..Default::default()
        }),
        ..Default::default()
    });
    config
}

async fn pages(client: &mut Client, id: &str) -> String {
    let script = "cat /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    client.exec(id, script).await.0.trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_are_promised_limited_and_given_back() {
    if !can_run_pods() {
        return;
    }
    let registry = Registry::start();
    let mut node = Node::start("10.89.11.0/24", "");
    let mut client = Client::of(&node).await;
    let image = client.pull(&registry.image("busybox:1")).await;
    let config = sandbox(&node, "huge");
    let volumes = node.kubelet_dir().join("pods/uid-huge/volumes");
    let volume = HugeDir::mount(&volumes.join("kubernetes.io~empty-dir/pages"));
    let pod = client.run(&config).await;

    // More than the VM has: refused before anything is made, with the setting that would help.
    let large = promised("large", &image, "sleep 1000", 1 << 30);
    let refused = client.try_create(&pod, &config, &large).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused:?}");
    let text = refused.message();
    assert!(
        text.contains("hugepage_limits") && text.contains("vm.resizeMemoryMiB"),
        "{text}"
    );
    // No whole number of pages.
    let odd = promised("odd", &image, "sleep 1000", 3 * MIB);
    let refused = client.try_create(&pod, &config, &odd).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused:?}");

    let mut owner = promised("owner", &image, "sleep 1000", 8 * MIB);
    owner.mounts.push(v1::Mount {
        container_path: "/pages".into(),
        host_path: volume.0.to_str().unwrap().into(),
        ..Default::default()
    });
    let owner = client.create(&pod, &config, &owner).await;
    client.start(&owner).await;
    assert_eq!(pages(&mut client, &owner).await, "4");
    let (fits, code) = client
        .exec(&owner, "fallocate -l 8388608 /pages/a && df -m /pages")
        .await;
    assert_eq!(code, 0, "{fits}");
    let (_, code) = client
        .exec(&owner, "fallocate -l 2097152 /pages/b 2>/dev/null")
        .await;
    assert_ne!(code, 0, "more than was promised");
    let usage = "cat /sys/fs/cgroup/hugetlb.2MB.current /sys/fs/cgroup/hugetlb.2MB.max";
    assert_eq!(client.exec(&owner, usage).await.0, "8388608\n8388608\n");

    // A container that was promised none has none, though there are some.
    let mut guest = shell("guest", &image, "sleep 1000");
    guest.mounts.push(v1::Mount {
        container_path: "/pages".into(),
        host_path: volume.0.to_str().unwrap().into(),
        ..Default::default()
    });
    let guest = client.create(&pod, &config, &guest).await;
    client.start(&guest).await;
    client.exec(&owner, "rm /pages/a").await;
    let (_, code) = client
        .exec(&guest, "fallocate -l 2097152 /pages/c 2>/dev/null")
        .await;
    assert_ne!(code, 0, "another container's pages");

    // What is gone is the VM's memory again.
    let request = v1::RemoveContainerRequest {
        container_id: owner,
    };
    client.runtime.remove_container(request).await.unwrap();
    assert_eq!(pages(&mut client, &guest).await, "0");
    end(&mut node, client, &pod).await;
}
