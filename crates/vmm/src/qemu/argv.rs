//! The command line of QEMU: one type per group of options, each rendering its own arguments.
//!
//! Every path in it is a number: files, sockets, tap and disks arrive as descriptors. No text of a
//! tenant gets here, and what comes from other rooms (MAC address, extra kernel parameters) is
//! checked in [`check`](super::check_spec) first.

use std::os::fd::RawFd;

use super::disk;
use crate::Machine;

/// Where the server of host directories is plugged.
pub(crate) const SHARE_PORT: &str = "port-share";
/// The device that brings more memory.
pub(crate) const MEMORY_DEVICE: &str = "memory0";

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's emulator.
    Tcg,
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Suffix of the virtio devices on a machine.
fn transport(machine: Machine) -> &'static str {
    match machine {
        Machine::Microvm => "device",
        Machine::Q35 => "pci",
    }
}

/// The whole command line.
#[derive(Debug)]
pub(crate) struct CommandLine {
    pub(crate) name: String,
    pub(crate) machine: MachineArgs,
    /// What boots; a VM from a template waits for its state instead.
    pub(crate) boot: Option<Boot>,
    pub(crate) sockets: Sockets,
    pub(crate) net: Option<Net>,
    pub(crate) disks: Vec<BootDisk>,
}

impl CommandLine {
    pub(crate) fn render(&self) -> Vec<String> {
        let machine = self.machine.machine;
        let mut out = Vec::new();
        let mut push = |args: Vec<String>| out.extend(args);
        push(base(&self.name));
        push(self.machine.args());
        push(match &self.boot {
            Some(boot) => boot.args(self.machine.accelerator),
            None => strings(["-incoming", "defer", "-S"]),
        });
        push(self.sockets.args(machine));
        push(common_devices(machine));
        push(self.machine.later());
        if let Some(net) = &self.net {
            push(net.args(machine));
        }
        for disk in &self.disks {
            push(disk.args());
        }
        push(sandbox());
        out
    }
}

fn strings<const N: usize>(args: [&str; N]) -> Vec<String> {
    args.map(str::to_owned).to_vec()
}

fn base(name: &str) -> Vec<String> {
    let mut args = strings([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    args.extend(["-name".to_owned(), format!("guest={name}")]);
    args
}

/// Machine, accelerator, processor and memory.
#[derive(Debug)]
pub(crate) struct MachineArgs {
    pub(crate) machine: Machine,
    pub(crate) accelerator: Accelerator,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) memory: Memory,
    /// Virtual CPUs, those included that the guest leaves off at first.
    pub(crate) max_vcpus: u32,
    /// MiB that can be added.
    pub(crate) growth_mib: u32,
    /// The file that they are in, if they are not the VMM's own.
    pub(crate) growth: Option<RawFd>,
    /// Whether a server of host directories can be plugged.
    pub(crate) shares: bool,
}

/// What the guest's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// The VMM's own.
    Own,
    /// A file that a template will be made of.
    Savable(RawFd),
    /// A template's file, of which this VM changes a copy.
    Template(RawFd),
    /// A copy of a template's file, which other processes may map.
    Copy(RawFd),
}

impl Memory {
    fn arg(self, mib: u32) -> String {
        match self {
            // memfd: shmem comes in 4 KiB pages unless the host asks for more, whereas anonymous
            // memory gets transparent huge pages by QEMU's own madvise, which costs an idle VM 6 MiB.
            // Shared costs the same as private, and another process may map it.
            Self::Own => format!("memory-backend-memfd,id=ram,size={mib}M,share=on"),
            Self::Savable(fd) | Self::Copy(fd) => Self::file(mib, fd, "on"),
            Self::Template(fd) => Self::file(mib, fd, "off"),
        }
    }

    fn file(mib: u32, fd: RawFd, share: &str) -> String {
        format!("memory-backend-file,id=ram,size={mib}M,mem-path=/proc/self/fd/{fd},share={share}")
    }
}

impl MachineArgs {
    fn args(&self) -> Vec<String> {
        // mem-merge=off: pages merged between tenants are a side channel.
        let common = "memory-backend=ram,mem-merge=off,dump-guest-core=off";
        let machine = match self.machine {
            // With ACPI, QEMU 10 and later put the tables where the initrd is.
            Machine::Microvm => format!("microvm,acpi=off,{common}"),
            Machine::Q35 => format!("q35,{common},usb=off,vmport=off,graphics=off"),
        };
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            // tb-size: the translation cache is memory that each VM pays for, as far as it is used. A
            // pod's start from a template fills 41 MiB of it, with a rehearsal before it 47 MiB; when
            // it is full, all of it is lost and made again, which takes as long as the first time.
            // cx16: QEMU 7.2 gets the flags of cmpxchg16b wrong when an interrupt follows; the
            // kernel's allocator then crashes at random.
            // erms, fsrm: kernel and C library would copy and clear memory by `rep movsb`, which is emulated a
            // byte at a time; without them they take eight bytes, or a vector.
            Accelerator::Tcg => ("tcg,tb-size=64", "max,-cx16,-erms,-fsrm"),
        };
        let memory = self.memory.arg(self.memory_mib);
        let mut args = strings(["-M", &machine, "-accel", accelerator, "-cpu", cpu]);
        args.extend(strings([
            "-smp",
            &self.max_vcpus.max(self.vcpus).to_string(),
        ]));
        let size = match self.growth_mib {
            0 => format!("{}M", self.memory_mib),
            // The slot is the virtio-mem device's. QEMU wants the region aligned to 1 GiB.
            growth => format!(
                "{}M,slots=1,maxmem={}M",
                self.memory_mib,
                u64::from(self.memory_mib) + u64::from(growth) + 1024
            ),
        };
        args.extend(strings(["-m", &size, "-object", &memory]));
        if self.machine == Machine::Microvm {
            // The default is virtio 0.9.
            args.extend(strings(["-global", "virtio-mmio.force-legacy=false"]));
        }
        args
    }
}

impl MachineArgs {
    /// What is there to be used later.
    fn later(&self) -> Vec<String> {
        let mut args = Vec::new();
        if self.shares {
            let port = format!("pcie-root-port,id={SHARE_PORT},chassis=1");
            args.extend(strings(["-device", &port]));
        }
        if self.growth_mib > 0 {
            // Pages of it are there when the guest has them: nothing is set aside.
            let size = self.growth_mib;
            let (kind, path) = match self.growth {
                None => ("memfd", String::new()),
                Some(fd) => ("file", format!("mem-path=/proc/self/fd/{fd},")),
            };
            let backend =
                format!("memory-backend-{kind},id=more,size={size}M,{path}share=on,reserve=off");
            let device = format!("virtio-mem-pci,id={MEMORY_DEVICE},memdev=more,requested-size=0");
            args.extend(strings(["-object", &backend, "-device", &device]));
        }
        args
    }
}

/// Kernel, initrd and kernel parameters.
#[derive(Debug)]
pub(crate) struct Boot {
    pub(crate) kernel: RawFd,
    pub(crate) initrd: RawFd,
    /// Rate of the host's time stamp counter, which is the guest's under TCG.
    pub(crate) tsc_khz: Option<u32>,
    /// CPUs that stay up, if they are not all.
    pub(crate) cpus: Option<u32>,
    pub(crate) extra: String,
}

impl Boot {
    fn args(&self, accelerator: Accelerator) -> Vec<String> {
        // panic=-1 reboots at once, reboot=t by triple fault: with -no-reboot that ends QEMU
        // within milliseconds, both for a panic and for the guest's own reboot(2).
        let mut line = "console=ttyS0 quiet panic=-1 reboot=t".to_owned();
        if accelerator == Accelerator::Tcg {
            // On a loaded host the check that the timer's interrupt arrives comes too late, and the
            // kernel panics: "IO-APIC + timer doesn't work".
            line.push_str(" no_timer_check");
            // What the kernel does against speculation is written for a processor: translated, a
            // retpoline is an indirect jump like any other, and only slower.
            line.push_str(" mitigations=off");
            if let Some(khz) = self.tsc_khz {
                // Calibration against the emulated PIT fails on a loaded host, and the guest crawls.
                line.push_str(&format!(" tsc_early_khz={khz} tsc=reliable"));
            }
        }
        if let Some(cpus) = self.cpus {
            // HyperStart's word. Not the kernel's maxcpus=: a CPU that comes up for the first time later
            // is measured then, for more than a second under emulation.
            line.push_str(&format!(" hyperstart.cpus={cpus}"));
        }
        if !self.extra.is_empty() {
            line.push(' ');
            line.push_str(&self.extra);
        }
        let [kernel, initrd] = [self.kernel, self.initrd].map(|fd| format!("/proc/self/fd/{fd}"));
        strings(["-kernel", &kernel, "-initrd", &initrd, "-append", &line])
    }
}

/// The three listening sockets.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) agent: RawFd,
    pub(crate) qmp: RawFd,
    pub(crate) console: RawFd,
}

impl Sockets {
    fn args(&self, machine: Machine) -> Vec<String> {
        let socket = |id: &str, fd: RawFd| format!("socket,id={id},fd={fd},server=on,wait=off");
        let mut args = Vec::new();
        let Self {
            agent,
            qmp,
            console,
        } = *self;
        args.extend(strings([
            "-chardev",
            &socket("qmp", qmp),
            "-mon",
            "chardev=qmp,mode=control",
        ]));
        args.extend(strings([
            "-chardev",
            &socket("console", console),
            "-serial",
            "chardev:console",
        ]));
        let bus = format!(
            "virtio-serial-{},id=serial0,max_ports=2",
            transport(machine)
        );
        args.extend(strings([
            "-chardev",
            &socket("agent", agent),
            "-device",
            &bus,
        ]));
        args.extend(strings([
            "-device",
            "virtserialport,bus=serial0.0,nr=1,chardev=agent,name=agent.0",
        ]));
        args
    }
}

/// What every VM has: the bus of the disks, entropy, and the way back for memory.
fn common_devices(machine: Machine) -> Vec<String> {
    let transport = transport(machine);
    let scsi = format!("virtio-scsi-{transport},id=scsi0,num_queues=1");
    let rng = format!("virtio-rng-{transport},id=rng0");
    let balloon =
        format!("virtio-balloon-{transport},id=balloon0,free-page-reporting=on,deflate-on-oom=on");
    strings(["-device", &scsi, "-device", &rng, "-device", &balloon])
}

/// The NIC.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) tap: RawFd,
    pub(crate) mac: String,
}

impl Net {
    fn args(&self, machine: Machine) -> Vec<String> {
        let netdev = format!("tap,id=net0,fd={}", self.tap);
        let mut device = format!(
            "virtio-net-{},id=nic0,netdev=net0,mac={}",
            transport(machine),
            self.mac
        );
        if machine == Machine::Q35 {
            // No boot ROM: the guest boots from -kernel.
            device.push_str(",romfile=");
        }
        strings(["-netdev", &netdev, "-device", &device])
    }
}

/// A disk that is there at boot.
#[derive(Debug)]
pub(crate) struct BootDisk {
    pub(crate) slot: u32,
    pub(crate) fd: RawFd,
    pub(crate) read_only: bool,
    pub(crate) kind: disk::Kind,
}

impl BootDisk {
    fn args(&self) -> Vec<String> {
        let fd = format!("fd={},set={}", self.fd, self.slot);
        let blockdev = disk::blockdev(self.slot, self.read_only, self.kind).to_string();
        let device = disk::device(self.slot).to_string();
        strings(["-add-fd", &fd, "-blockdev", &blockdev, "-device", &device])
    }
}

/// QEMU's own seccomp filter.
pub(crate) fn sandbox() -> Vec<String> {
    strings([
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(machine: Machine, accelerator: Accelerator) -> String {
        let line = CommandLine {
            name: "0123456789abcdef0123456789abcdef".to_owned(),
            machine: MachineArgs {
                machine,
                accelerator,
                vcpus: 2,
                memory_mib: 128,
                memory: Memory::Own,
                max_vcpus: 2,
                growth_mib: 0,
                growth: None,
                shares: false,
            },
            boot: Some(Boot {
                kernel: 4,
                initrd: 5,
                tsc_khz: Some(2_600_000),
                cpus: None,
                extra: "x=1".to_owned(),
            }),
            sockets: Sockets {
                agent: 6,
                qmp: 7,
                console: 8,
            },
            net: Some(Net {
                tap: 9,
                mac: "02:00:00:00:00:01".to_owned(),
            }),
            disks: vec![BootDisk {
                slot: 1,
                fd: 10,
                read_only: true,
                kind: disk::Kind::File,
            }],
        };
        line.render().join("\n")
    }

    #[test]
    fn templates_share_their_memory_only_while_they_are_made() {
        assert_eq!(
            Memory::Savable(3).arg(64),
            "memory-backend-file,id=ram,size=64M,mem-path=/proc/self/fd/3,share=on"
        );
        assert_eq!(
            Memory::Template(3).arg(64),
            "memory-backend-file,id=ram,size=64M,mem-path=/proc/self/fd/3,share=off"
        );
    }

    #[test]
    fn what_comes_later_is_planned() {
        let machine = MachineArgs {
            machine: Machine::Q35,
            accelerator: Accelerator::Kvm,
            vcpus: 1,
            memory_mib: 320,
            memory: Memory::Copy(5),
            max_vcpus: 4,
            growth_mib: 768,
            growth: None,
            shares: true,
        };
        let args = machine.args().join(" ");
        assert!(
            args.contains("-smp 4 -m 320M,slots=1,maxmem=2112M"),
            "{args}"
        );
        assert!(args.contains("size=320M,mem-path=/proc/self/fd/5,share=on"));
        assert_eq!(
            machine.later().join(" "),
            "-device pcie-root-port,id=port-share,chassis=1 \
             -object memory-backend-memfd,id=more,size=768M,share=on,reserve=off \
             -device virtio-mem-pci,id=memory0,memdev=more,requested-size=0"
        );
        let boot = Boot {
            kernel: 4,
            initrd: 5,
            tsc_khz: None,
            cpus: Some(1),
            extra: String::new(),
        };
        let line = boot.args(Accelerator::Kvm).pop().unwrap();
        assert!(line.ends_with(" hyperstart.cpus=1"), "{line}");
    }

    #[test]
    fn microvm_under_tcg() {
        insta::assert_snapshot!(line(Machine::Microvm, Accelerator::Tcg), @r#"
        -nodefaults
        -no-user-config
        -display
        none
        -no-reboot
        -name
        guest=0123456789abcdef0123456789abcdef
        -M
        microvm,acpi=off,memory-backend=ram,mem-merge=off,dump-guest-core=off
        -accel
        tcg,tb-size=64
        -cpu
        max,-cx16,-erms,-fsrm
        -smp
        2
        -m
        128M
        -object
        memory-backend-memfd,id=ram,size=128M,share=on
        -global
        virtio-mmio.force-legacy=false
        -kernel
        /proc/self/fd/4
        -initrd
        /proc/self/fd/5
        -append
        console=ttyS0 quiet panic=-1 reboot=t no_timer_check mitigations=off tsc_early_khz=2600000 tsc=reliable x=1
        -chardev
        socket,id=qmp,fd=7,server=on,wait=off
        -mon
        chardev=qmp,mode=control
        -chardev
        socket,id=console,fd=8,server=on,wait=off
        -serial
        chardev:console
        -chardev
        socket,id=agent,fd=6,server=on,wait=off
        -device
        virtio-serial-device,id=serial0,max_ports=2
        -device
        virtserialport,bus=serial0.0,nr=1,chardev=agent,name=agent.0
        -device
        virtio-scsi-device,id=scsi0,num_queues=1
        -device
        virtio-rng-device,id=rng0
        -device
        virtio-balloon-device,id=balloon0,free-page-reporting=on,deflate-on-oom=on
        -netdev
        tap,id=net0,fd=9
        -device
        virtio-net-device,id=nic0,netdev=net0,mac=02:00:00:00:00:01
        -add-fd
        fd=10,set=1
        -blockdev
        {"cache":{"direct":false,"no-flush":false},"discard":"unmap","driver":"raw","file":{"aio":"threads","discard":"unmap","driver":"file","filename":"/dev/fdset/1","locking":"off"},"node-name":"disk-1","read-only":true}
        -device
        {"bus":"scsi0.0","channel":0,"drive":"disk-1","driver":"scsi-hd","id":"scsi-1","lun":0,"scsi-id":1,"serial":"hn-1"}
        -sandbox
        on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
        "#);
    }

    #[test]
    fn q35_under_kvm() {
        insta::assert_snapshot!(line(Machine::Q35, Accelerator::Kvm), @r#"
        -nodefaults
        -no-user-config
        -display
        none
        -no-reboot
        -name
        guest=0123456789abcdef0123456789abcdef
        -M
        q35,memory-backend=ram,mem-merge=off,dump-guest-core=off,usb=off,vmport=off,graphics=off
        -accel
        kvm
        -cpu
        host
        -smp
        2
        -m
        128M
        -object
        memory-backend-memfd,id=ram,size=128M,share=on
        -kernel
        /proc/self/fd/4
        -initrd
        /proc/self/fd/5
        -append
        console=ttyS0 quiet panic=-1 reboot=t x=1
        -chardev
        socket,id=qmp,fd=7,server=on,wait=off
        -mon
        chardev=qmp,mode=control
        -chardev
        socket,id=console,fd=8,server=on,wait=off
        -serial
        chardev:console
        -chardev
        socket,id=agent,fd=6,server=on,wait=off
        -device
        virtio-serial-pci,id=serial0,max_ports=2
        -device
        virtserialport,bus=serial0.0,nr=1,chardev=agent,name=agent.0
        -device
        virtio-scsi-pci,id=scsi0,num_queues=1
        -device
        virtio-rng-pci,id=rng0
        -device
        virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on
        -netdev
        tap,id=net0,fd=9
        -device
        virtio-net-pci,id=nic0,netdev=net0,mac=02:00:00:00:00:01,romfile=
        -add-fd
        fd=10,set=1
        -blockdev
        {"cache":{"direct":false,"no-flush":false},"discard":"unmap","driver":"raw","file":{"aio":"threads","discard":"unmap","driver":"file","filename":"/dev/fdset/1","locking":"off"},"node-name":"disk-1","read-only":true}
        -device
        {"bus":"scsi0.0","channel":0,"drive":"disk-1","driver":"scsi-hd","id":"scsi-1","lun":0,"scsi-id":1,"serial":"hn-1"}
        -sandbox
        on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
        "#);
    }
}
