//! What every driver must do, as functions that a driver's tests call.
//!
//! `spec` gives the specification of a new VM each time, whose guest does nothing or echoes;
//! `file` gives a new, writable image of at least 4 KiB. A failed expectation panics.

use std::{fs::File, sync::Arc};

use tokio::{
    io::AsyncReadExt,
    time::{Duration, timeout},
};

use crate::{Disk, Origin, Suspended, Vm, VmEvent, VmSpec, Vmm, VmmError};

/// Makes specifications.
pub type Specs<'a> = &'a (dyn Fn() -> VmSpec + Sync);
/// Makes images.
pub type Files<'a> = &'a (dyn Fn() -> File + Sync);

const PATIENCE: Duration = Duration::from_secs(90);

/// Runs all of it.
pub async fn all(vmm: &dyn Vmm, spec: Specs<'_>, file: Files<'_>) {
    ends_are_told(vmm, spec).await;
    disks_come_and_go(vmm, spec, file).await;
    one_channel_at_a_time(vmm, spec).await;
    running_vms_are_adopted(vmm, spec, file).await;
    the_directory_is_enough_to_destroy(vmm, spec).await;
    templates_are_gone_on_with(vmm, spec, file).await;
    suspended_vms_are_resumed(vmm, spec, file).await;
    running_vms_are_copied(vmm, spec, file).await;
}

async fn launch(vmm: &dyn Vmm, spec: VmSpec) -> Box<dyn Vm> {
    vmm.launch(spec).await.expect("a valid VM is launched")
}

/// Killing is idempotent, and everybody learns of the end: waiting, listening or asking later.
pub async fn ends_are_told(vmm: &dyn Vmm, spec: Specs<'_>) {
    let vm = launch(vmm, spec()).await;
    let record = vm.record();
    assert_eq!(record.driver, vmm.name());
    assert_eq!(vm.exit(), None);
    let mut events = vm.events();
    vm.kill().await.expect("a running VM is killed");
    vm.kill().await.expect("a dead VM is killed again");
    let exit = timeout(PATIENCE, vm.wait()).await.expect("the end is told");
    assert_eq!(vm.exit(), Some(exit.clone()));
    let event = timeout(PATIENCE, events.recv())
        .await
        .expect("in time")
        .expect("an event");
    assert_eq!(event, VmEvent::Exited(exit));
    assert!(matches!(vm.list_disks().await, Err(VmmError::Gone { .. })));
    assert!(matches!(
        vm.open_channel().await.err(),
        Some(VmmError::Gone { .. })
    ));
    vmm.destroy(&record.run_dir)
        .await
        .expect("nothing is left to destroy");
}

/// Slots are taken, refused, freed and taken again; unplugging is idempotent.
pub async fn disks_come_and_go(vmm: &dyn Vmm, spec: Specs<'_>, file: Files<'_>) {
    let disk = |slot, read_only| Disk {
        slot,
        file: file(),
        read_only,
    };
    let mut with_disk = spec();
    with_disk.disks.push(disk(2, true));
    let vm = launch(vmm, with_disk).await;
    vm.plug_disk(disk(254, false)).await.expect("the last slot");
    vm.plug_disk(disk(1, true)).await.expect("the first slot");
    assert_eq!(vm.list_disks().await.expect("a list"), [1, 2, 254]);
    for bad in [0, 255] {
        let refused = vm.plug_disk(disk(bad, false)).await;
        assert!(
            matches!(refused, Err(VmmError::Spec { .. })),
            "slot {bad}: {refused:?}"
        );
    }
    assert!(
        vm.plug_disk(disk(2, false)).await.is_err(),
        "an occupied slot was given away"
    );
    vm.unplug_disk(2).await.expect("unplugged");
    vm.unplug_disk(2).await.expect("unplugged twice");
    assert_eq!(vm.list_disks().await.expect("a list"), [1, 254]);
    vm.plug_disk(disk(2, false)).await.expect("a freed slot");
    vm.kill().await.expect("killed");

    let mut twice = spec();
    twice.disks.extend([disk(3, true), disk(3, true)]);
    assert!(matches!(
        vmm.launch(twice).await,
        Err(VmmError::Spec { .. })
    ));
}

/// Opening a channel ends the one before.
pub async fn one_channel_at_a_time(vmm: &dyn Vmm, spec: Specs<'_>) {
    let vm = launch(vmm, spec()).await;
    let mut first = vm.open_channel().await.expect("a channel");
    let _second = vm.open_channel().await.expect("another channel");
    let end = timeout(PATIENCE, first.read(&mut [0; 1]))
        .await
        .expect("the first ends");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    vm.kill().await.expect("killed");
}

/// A record finds a running VM with its disks, and only that one.
pub async fn running_vms_are_adopted(vmm: &dyn Vmm, spec: Specs<'_>, file: Files<'_>) {
    let vm = launch(vmm, spec()).await;
    vm.plug_disk(Disk {
        slot: 5,
        file: file(),
        read_only: false,
    })
    .await
    .expect("plugged");
    let record = vm.record();
    drop(vm);
    let mut other = record.clone();
    other.start_time += 1;
    let vm = vmm.adopt(&record).await.expect("a running VM is adopted");
    assert_eq!(vm.record(), record);
    assert_eq!(vm.list_disks().await.expect("a list"), [5]);
    vm.kill().await.expect("killed");
    assert!(matches!(
        vmm.adopt(&record).await,
        Err(VmmError::Gone { .. })
    ));
    assert!(matches!(
        vmm.adopt(&other).await,
        Err(VmmError::Gone { .. })
    ));
}

/// A VM that nobody holds dies by its directory; a directory that never had one is no error.
pub async fn the_directory_is_enough_to_destroy(vmm: &dyn Vmm, spec: Specs<'_>) {
    let vm = launch(vmm, spec()).await;
    let record = vm.record();
    drop(vm);
    vmm.destroy(&record.run_dir).await.expect("destroyed");
    assert!(matches!(
        vmm.adopt(&record).await,
        Err(VmmError::Gone { .. })
    ));
    vmm.destroy(&record.run_dir).await.expect("destroyed twice");
    vmm.destroy(&spec().run_dir).await.expect("never existed");
}

/// A savable VM becomes a template once, and VMs of its shape start from it, with their own disks.
pub async fn templates_are_gone_on_with(vmm: &dyn Vmm, spec: Specs<'_>, file: Files<'_>) {
    let plain = launch(vmm, spec()).await;
    assert!(matches!(plain.save().await, Err(VmmError::Spec { .. })));
    let vm = launch(
        vmm,
        VmSpec {
            origin: Origin::Savable,
            ..spec()
        },
    )
    .await;
    let template = Arc::new(vm.save().await.expect("a savable VM is saved"));
    assert!(vm.exit().is_some(), "a saved VM has ended");
    let from = || Origin::Template(Arc::clone(&template));
    let misfit = VmSpec {
        origin: from(),
        memory_mib: spec().memory_mib + 1,
        ..spec()
    };
    assert!(matches!(
        vmm.launch(misfit).await,
        Err(VmmError::Spec {
            field: "origin",
            ..
        })
    ));
    for _ in 0..2 {
        let mut clone = spec();
        clone.origin = from();
        clone.disks.push(Disk {
            slot: 9,
            file: file(),
            read_only: true,
        });
        let vm = launch(vmm, clone).await;
        assert_eq!(vm.list_disks().await.expect("a list"), [9]);
        let record = vm.record();
        drop(vm);
        let vm = vmm.adopt(&record).await.expect("it is adopted like any");
        assert!(matches!(vm.save().await, Err(VmmError::Spec { .. })));
        vm.kill().await.expect("killed");
    }
}

/// A VM is suspended with its disks, by whoever has adopted it too, and goes on from the file, or where
/// it stands.
pub async fn suspended_vms_are_resumed(vmm: &dyn Vmm, spec: Specs<'_>, file: Files<'_>) {
    const LIMIT: u64 = 1 << 30;
    let state = || tempfile();
    let first = spec();
    let (sandbox, uid) = (first.sandbox.clone(), first.uid);
    let vm = launch(vmm, first).await;
    let image = file();
    let disk = || Disk {
        slot: 7,
        file: image.try_clone().expect("a descriptor"),
        read_only: false,
    };
    vm.plug_disk(disk()).await.expect("plugged");
    vm.suspend(state(), 3)
        .await
        .expect_err("more than the limit was written");
    let kept = state();
    vm.suspend(kept.try_clone().expect("a descriptor"), LIMIT)
        .await
        .expect("suspended");
    assert_eq!(vm.exit(), None, "a suspended VM still stands there");
    let record = vm.record();
    drop(vm);
    let vm = vmm
        .adopt(&record)
        .await
        .expect("it is adopted as it stands");
    vm.resume().await.expect("it goes on");
    vm.resume().await.expect("it goes on already");
    let kept_last = state();
    vm.suspend(kept_last.try_clone().expect("a descriptor"), LIMIT)
        .await
        .expect("suspended again");
    vm.kill().await.expect("killed");
    let suspended = Suspended::open(kept_last).expect("a suspended VM");
    let suspended = Arc::new(suspended);
    let resumed = |disks: Vec<Disk>| {
        let origin = Origin::Suspended(Arc::clone(&suspended));
        let (sandbox, disks) = (sandbox.clone(), disks);
        VmSpec {
            origin,
            sandbox,
            uid,
            disks,
            ..spec()
        }
    };
    vmm.launch(resumed(Vec::new()))
        .await
        .expect_err("a VM went on without its disk");
    for _ in 0..2 {
        let vm = launch(vmm, resumed(vec![disk()])).await;
        assert_eq!(vm.list_disks().await.expect("a list"), [7]);
        vm.resume().await.expect("it goes on");
        vm.unplug_disk(7).await.expect("unplugged");
        vm.plug_disk(disk()).await.expect("plugged again");
        vm.kill().await.expect("killed");
    }
    let torn = state();
    Suspended::open(torn).expect_err("an empty file is no VM");
}

/// A VM that was written to a file goes on, and so does another one from the file, with disks of its own.
pub async fn running_vms_are_copied(vmm: &dyn Vmm, spec: Specs<'_>, file: Files<'_>) {
    const LIMIT: u64 = 1 << 30;
    let disk = || Disk {
        slot: 7,
        file: file(),
        read_only: false,
    };
    let vm = launch(vmm, spec()).await;
    vm.plug_disk(disk()).await.expect("plugged");
    let kept = tempfile();
    vm.suspend(kept.try_clone().expect("a descriptor"), LIMIT)
        .await
        .expect("written");
    vm.resume().await.expect("it goes on");
    let suspended = Arc::new(Suspended::open(kept).expect("a suspended VM"));
    let mut copies = Vec::new();
    for _ in 0..2 {
        let copy = VmSpec {
            origin: Origin::Suspended(Arc::clone(&suspended)),
            disks: vec![disk()],
            ..spec()
        };
        let copy = launch(vmm, copy).await;
        copy.resume().await.expect("it goes on");
        assert_eq!(copy.list_disks().await.expect("a list"), [7]);
        copies.push(copy);
    }
    // Each is a VM of its own: what happens to one happens to no other.
    vm.unplug_disk(7).await.expect("unplugged");
    copies.pop().expect("a copy").kill().await.expect("killed");
    let left = copies.pop().expect("a copy");
    assert_eq!(left.list_disks().await.expect("a list"), [7]);
    for vm in [vm, left] {
        assert_eq!(vm.exit(), None);
        let _channel = vm.open_channel().await.expect("a channel");
        vm.kill().await.expect("killed");
    }
}

fn tempfile() -> File {
    let name = format!("hypernetes-vmm-{}", hypernetes_types::SandboxId::random());
    let path = std::env::temp_dir().join(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .expect("a temporary file");
    std::fs::remove_file(path).expect("removed");
    file
}
