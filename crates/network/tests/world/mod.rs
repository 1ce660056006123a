//! A host of its own for each test: a network and mount namespace, an outside to talk to, and
//! guests that are made of hand-written frames.

#![allow(unreachable_pub, dead_code, reason = "a module of test crates")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "only tests use it"
)]

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use hypernetes_network::{Attachment, Lease};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, poll},
    sched::{CloneFlags, setns, unshare},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

pub const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `test` on a host that nothing else is on. Its processes and threads see no other.
pub fn on_own_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
        println!("SKIP: needs root and /dev/net/tun");
        return;
    }
    let host = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        // A new namespace takes the machine's value over.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        sh("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = host.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Output of a shell command that must succeed.
pub fn sh(command: &str) -> String {
    let output = Command::new("bash")
        .args(["-ec", command])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// All that a driver could leave behind.
pub fn host_state(state_dir: &Path) -> String {
    format!(
        "{}{}{}{}{}{:?}",
        sh(
            "ip -o link | sed 's/^[0-9]*: //'; ip -o addr | sed 's/^[0-9]*: //'; ip route show table all"
        ),
        sh(
            "ip netns; ls -d /run/netns 2>/dev/null || true; grep -c /run/netns /proc/self/mounts || true"
        ),
        sh("nft list ruleset"),
        sh("cat /proc/sys/net/ipv4/ip_forward"),
        sh(&format!("cd {} && find . -type f", state_dir.display())),
        fs::read_dir(state_dir).unwrap().count(),
    )
}

/// Waits until `probe` gives `Ok`.
pub async fn eventually<T>(mut probe: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Packets that a named counter has seen. `namespace` empty: the host's.
pub fn counter(namespace: &str, table: &str, name: &str) -> u64 {
    let prefix = if namespace.is_empty() {
        String::new()
    } else {
        format!("ip netns exec {namespace} ")
    };
    let text = sh(&format!("{prefix}nft list counter {table} {name}"));
    let mut words = text.split_whitespace();
    words.find(|word| *word == "packets").unwrap();
    words.next().unwrap().parse().unwrap()
}

/// Makes a namespace `outside` with 10.99.0.2, on a link to the host's 10.99.0.1.
pub fn make_outside() {
    sh("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
        ip netns add outside
        ip link add eth0 type veth peer name eth0 netns outside
        ip addr add 10.99.0.1/24 dev eth0; ip link set eth0 up
        ip -n outside addr add 10.99.0.2/24 dev eth0
        ip -n outside addr add 169.254.169.254/32 dev eth0
        ip -n outside link set lo up; ip -n outside link set eth0 up
        ip route add 169.254.169.254/32 via 10.99.0.2
        # The carrier comes in its own time, and is part of what the host looks like.
        until ip -o link show eth0 | grep -q 'state UP'; do sleep 0.01; done");
}

/// Runs `work` in a named namespace.
pub fn inside<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = fs::File::open(format!("/run/netns/{name}")).unwrap();
    thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
    .join()
    .unwrap()
}

pub fn v4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(_) => panic!("{address}"),
    }
}

/// The length of the virtio-net header before each frame, until a VMM asks for another.
const HEADER: usize = 10;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;

/// A pod's end of a tap. It answers pings; all frames to it can be read.
pub struct Guest {
    tap: Arc<OwnedFd>,
    frames: mpsc::UnboundedReceiver<Vec<u8>>,
    reader: Option<(Arc<AtomicBool>, thread::JoinHandle<()>)>,
    pub lease: Lease,
    pub mac: [u8; 6],
    pub router: [u8; 6],
}

impl Drop for Guest {
    fn drop(&mut self) {
        let (stop, reader) = self.reader.take().unwrap();
        stop.store(true, Ordering::SeqCst);
        // It holds the tap.
        reader.join().unwrap();
    }
}

impl Guest {
    /// Boots, which ends with having found the gateway.
    pub async fn boot(attachment: Attachment) -> Self {
        let Attachment { tap, lease } = attachment;
        fcntl(&tap, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let tap = Arc::new(tap);
        let mut mac = [0; 6];
        for (byte, text) in mac.iter_mut().zip(lease.mac.split(':')) {
            *byte = u8::from_str_radix(text, 16).unwrap();
        }
        let (sender, frames) = mpsc::unbounded_channel();
        let own = v4(lease.address);
        let stop = Arc::new(AtomicBool::new(false));
        let reader = thread::spawn({
            let (tap, stop) = (Arc::clone(&tap), Arc::clone(&stop));
            move || read_frames(&tap, mac, own, &sender, &stop)
        });
        let reader = Some((stop, reader));
        let mut guest = Self {
            tap,
            frames,
            reader,
            lease,
            mac,
            router: [0xff; 6],
        };
        let gateway = v4(guest.lease.gateway);
        guest.send(&arp(mac, own, gateway)).await;
        let reply = guest
            .receive(|frame| frame[12..14] == [8, 6] && frame[21] == 2)
            .await;
        assert_eq!(reply[28..32], gateway.octets());
        guest.router.copy_from_slice(&reply[22..28]);
        guest
    }

    pub fn address(&self) -> Ipv4Addr {
        v4(self.lease.address)
    }

    pub async fn send(&self, frame: &[u8]) {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(frame);
        nix::unistd::write(&self.tap, &bytes).unwrap();
    }

    /// Sends a frame again and again, until it is told to end.
    pub fn flood(&self, frame: Vec<u8>, end: Arc<AtomicBool>) -> thread::JoinHandle<()> {
        let tap = Arc::clone(&self.tap);
        let bytes = [vec![0; HEADER], frame].concat();
        thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                nix::unistd::write(&tap, &bytes).unwrap();
            }
        })
    }

    /// Sends an honest packet.
    pub async fn send_ip(&self, to: Ipv4Addr, protocol: u8, payload: &[u8]) {
        self.send(&ip(
            self.mac,
            self.router,
            self.address(),
            to,
            protocol,
            payload,
        ))
        .await;
    }

    /// The first frame that fits; those before it are lost.
    pub async fn receive(&mut self, fits: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        self.receive_within(PATIENCE, fits)
            .await
            .expect("no such frame came")
    }

    pub async fn receive_within(
        &mut self,
        patience: Duration,
        fits: impl Fn(&[u8]) -> bool,
    ) -> Option<Vec<u8>> {
        timeout(patience, async {
            loop {
                let frame = self.frames.recv().await.expect("the tap is gone");
                if fits(&frame) {
                    return frame;
                }
            }
        })
        .await
        .ok()
    }

    /// All that has come up to and without the echo reply to a ping of `peer`.
    pub async fn frames_until_ping(&mut self, peer: Ipv4Addr) -> Vec<Vec<u8>> {
        let id = rand::random::<u16>();
        self.send_ip(peer, ICMP, &echo(8, id)).await;
        let mut before = Vec::new();
        loop {
            let frame = self.receive(|_| true).await;
            if is_echo(&frame, 0, id) {
                return before;
            }
            before.push(frame);
        }
    }

    pub async fn ping(&mut self, peer: Ipv4Addr) -> bool {
        let id = rand::random::<u16>();
        self.send_ip(peer, ICMP, &echo(8, id)).await;
        self.receive_within(Duration::from_secs(5), |frame| is_echo(frame, 0, id))
            .await
            .is_some()
    }

    /// Asks the gateway's name server over UDP.
    pub async fn dns(&mut self, query: &[u8]) -> Vec<u8> {
        let port = 1024 + rand::random::<u16>() % 60_000;
        let gateway = v4(self.lease.gateway);
        self.send_ip(gateway, UDP, &udp(port, 53, query)).await;
        let reply = self
            .receive(|frame| {
                frame.len() > 42
                    && frame[23] == UDP
                    && frame[34..36] == [0, 53]
                    && frame[36..38] == port.to_be_bytes()
            })
            .await;
        reply[42..].to_vec()
    }
}

fn read_frames(
    tap: &OwnedFd,
    mac: [u8; 6],
    own: Ipv4Addr,
    sender: &mpsc::UnboundedSender<Vec<u8>>,
    stop: &AtomicBool,
) {
    let mut buffer = vec![0; 70_000];
    while !stop.load(Ordering::SeqCst) {
        let mut ready = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, 20_u8).unwrap();
        let length = match nix::unistd::read(tap, &mut buffer) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => continue,
            // The tap was deleted.
            Err(_) => return,
        };
        let frame = buffer[HEADER..length].to_vec();
        let asks_for_us = frame.len() >= 42
            && frame[12..14] == [8, 6]
            && frame[21] == 1
            && frame[38..42] == own.octets();
        if asks_for_us {
            let mut payload = frame[14..42].to_vec();
            payload[7] = 2;
            payload[8..14].copy_from_slice(&mac);
            payload[14..18].copy_from_slice(&own.octets());
            payload[18..28].copy_from_slice(&frame[22..32]);
            let mut answer = vec![0; HEADER];
            answer.extend(ethernet(
                mac,
                frame[6..12].try_into().unwrap(),
                0x0806,
                &payload,
            ));
            let _full = nix::unistd::write(tap, &answer);
        }
        if frame.len() >= 42
            && frame[12..14] == [8, 0]
            && frame[23] == ICMP
            && frame[34] == 8
            && frame[30..34] == own.octets()
        {
            let mut answer = vec![0; HEADER];
            let mut payload = frame[34..].to_vec();
            payload[0] = 0;
            payload[2..4].fill(0);
            let sum = checksum(&payload);
            payload[2..4].copy_from_slice(&sum.to_be_bytes());
            let source = Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]);
            let (to, from) = (
                frame[..6].try_into().unwrap(),
                frame[6..12].try_into().unwrap(),
            );
            answer.extend(ip(to, from, own, source, ICMP, &payload));
            let _full = nix::unistd::write(tap, &answer);
        }
        if sender.send(frame).is_err() {
            return;
        }
    }
}

fn is_echo(frame: &[u8], kind: u8, id: u16) -> bool {
    frame.len() >= 42
        && frame[12..14] == [8, 0]
        && frame[23] == ICMP
        && frame[34] == kind
        && frame[38..40] == id.to_be_bytes()
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub fn ethernet(from: [u8; 6], to: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A request of `from` who has `to`.
pub fn arp(mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut payload = vec![0, 1, 8, 0, 6, 4, 0, 1];
    payload.extend(mac);
    payload.extend(from.octets());
    payload.extend([0; 6]);
    payload.extend(to.octets());
    ethernet(mac, [0xff; 6], 0x0806, &payload)
}

pub fn ip(
    mac: [u8; 6],
    router: [u8; 6],
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![
        0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0,
    ];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    ethernet(mac, router, 0x0800, &packet)
}

pub fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    // Without a checksum, which IPv4 allows.
    let mut packet = [
        from.to_be_bytes(),
        to.to_be_bytes(),
        length.to_be_bytes(),
        [0; 2],
    ]
    .concat();
    packet.extend(payload);
    packet
}

pub fn echo(kind: u8, id: u16) -> Vec<u8> {
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(*b"hypernetes");
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}
