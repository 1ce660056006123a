//! The five requests to the kernel's routing socket (rtnetlink(7)) that a pod's network takes.
//!
//! Written out here because the crates that know all of rtnetlink are a fifth of the program, and
//! the program is in every VM's memory. Only requests are encoded; of answers just the error code
//! is read. The kernel answers in the call that sends, so nothing here waits.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
};

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_NET_NS_FD: u16 = 28;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;

const HEADER: usize = 16;

/// A change to a network device.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Link<'a> {
    Up,
    Down,
    Name(&'a str),
    Address([u8; 6]),
    Mtu(u32),
    /// Moves it to this network namespace.
    Namespace(BorrowedFd<'a>),
}

/// An open routing socket.
#[derive(Debug)]
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        Ok(Self(socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?))
    }

    /// Changes a device.
    pub(crate) fn set_link(&self, index: u32, link: Link<'_>) -> io::Result<()> {
        self.request(&link_message(index, link))
    }

    /// Adds an address to a device. One that is there is no error.
    pub(crate) fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        there_is_fine(self.request(&address_message(RTM_NEWADDR, index, address, prefix)))
    }

    /// Takes an address off a device. One that is not there is no error.
    pub(crate) fn remove_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let removed = self.request(&address_message(RTM_DELADDR, index, address, prefix));
        match removed {
            Err(error) if error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => {
                Ok(())
            }
            removed => removed,
        }
    }

    /// Adds a route by a device, through a gateway that is on its link. One that is there is no error.
    pub(crate) fn add_route(
        &self,
        index: u32,
        to: (IpAddr, u8),
        gateway: Option<IpAddr>,
    ) -> io::Result<()> {
        there_is_fine(self.request(&route_message(index, to, gateway)))
    }

    fn request(&self, message: &[u8]) -> io::Result<()> {
        send(&self.0, message, SendFlags::empty())?;
        let mut answer = [0; 4096];
        let (count, _) = recv(&self.0, &mut answer, RecvFlags::empty())?;
        error_of(answer.get(..count).unwrap_or_default())
    }
}

fn there_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => Ok(()),
        result => result,
    }
}

/// The error code of an acknowledgement: `struct nlmsgerr` starts with it, negated.
fn error_of(answer: &[u8]) -> io::Result<()> {
    let kind = answer
        .get(4..6)
        .map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    let code = answer
        .get(HEADER..HEADER + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
    }
}

/// A message under construction: header, fixed part, then attributes.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[&[u8]]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        fixed.iter().for_each(|part| bytes.extend_from_slice(part));
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length =
            u16::try_from(value.len() + 4).expect("our attributes are addresses and names");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn address(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).expect("a few hundred bytes");
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    u8::try_from(family.as_raw()).expect("2 or 10")
}

/// `struct ifinfomsg`: family, padding, type, index, flags, mask of changed flags.
fn link_message(index: u32, link: Link<'_>) -> Vec<u8> {
    let (flags, change) = match link {
        Link::Up => (IFF_UP, IFF_UP),
        Link::Down => (0, IFF_UP),
        Link::Name(_) | Link::Address(_) | Link::Mtu(_) | Link::Namespace(_) => (0, 0),
    };
    let fixed: [&[u8]; 4] = [
        &[0; 4],
        &index.to_ne_bytes(),
        &flags.to_ne_bytes(),
        &change.to_ne_bytes(),
    ];
    let message = Message::new(RTM_NEWLINK, 0, &fixed);
    match link {
        Link::Up | Link::Down => message,
        Link::Name(name) => message.attribute(IFLA_IFNAME, &[name.as_bytes(), &[0]].concat()),
        Link::Address(address) => message.attribute(IFLA_ADDRESS, &address),
        Link::Mtu(mtu) => message.attribute(IFLA_MTU, &mtu.to_ne_bytes()),
        Link::Namespace(fd) => message.attribute(IFLA_NET_NS_FD, &fd.as_raw_fd().to_ne_bytes()),
    }
    .finish()
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index.
fn address_message(kind: u16, index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    // Addresses are given, never probed for.
    let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
    let fixed = [family(address), prefix, flags, RT_SCOPE_UNIVERSE];
    let how = match kind {
        RTM_NEWADDR => NLM_F_CREATE | NLM_F_EXCL,
        _ => 0,
    };
    Message::new(kind, how, &[&fixed, &index.to_ne_bytes()])
        .address(IFA_LOCAL, address)
        .address(IFA_ADDRESS, address)
        .finish()
}

/// `struct rtmsg`: family, both prefix lengths, tos, table, protocol, scope, type, flags.
fn route_message(
    index: u32,
    (destination, prefix): (IpAddr, u8),
    gateway: Option<IpAddr>,
) -> Vec<u8> {
    let (scope, flags) = match gateway {
        // The gateway need not be in any subnet of ours: routed taps have none.
        Some(_) => (RT_SCOPE_UNIVERSE, RTNH_F_ONLINK),
        None => (RT_SCOPE_LINK, 0),
    };
    let fixed = [
        family(destination),
        prefix,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_STATIC,
        scope,
        RTN_UNICAST,
    ];
    let mut message = Message::new(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_EXCL,
        &[&fixed, &flags.to_ne_bytes()],
    );
    if prefix > 0 {
        message = message.address(RTA_DST, destination);
    }
    if let Some(gateway) = gateway {
        message = message.address(RTA_GATEWAY, gateway);
    }
    message.attribute(RTA_OIF, &index.to_ne_bytes()).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_laid_out_as_the_kernel_reads_them() {
        let name = link_message(2, Link::Name("eth0"));
        assert_eq!(name.len(), 16 + 16 + 4 + 8);
        assert_eq!(name[..8], [44, 0, 0, 0, 16, 0, 5, 0]);
        assert_eq!(name[32..], [9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0]);
        let gone = address_message(RTM_DELADDR, 7, "10.0.0.5".parse().unwrap(), 32);
        assert_eq!(gone[..8], [40, 0, 0, 0, 21, 0, 5, 0]);
        assert_eq!(gone[16..24], [2, 32, 0, 0, 7, 0, 0, 0]);
        let route = route_message(
            7,
            ("0.0.0.0".parse().unwrap(), 0),
            Some("169.254.1.1".parse().unwrap()),
        );
        assert_eq!(route[16..28], [2, 0, 0, 0, 254, 4, 0, 1, 4, 0, 0, 0]);
        assert_eq!(
            route[28..],
            [8, 0, 5, 0, 169, 254, 1, 1, 8, 0, 4, 0, 7, 0, 0, 0]
        );
    }

    #[test]
    fn answers_give_their_error() {
        let mut answer = vec![0; 36];
        answer[4] = 2;
        error_of(&answer).unwrap();
        answer[16..20].copy_from_slice(&(-17i32).to_ne_bytes());
        assert_eq!(error_of(&answer).unwrap_err().raw_os_error(), Some(17));
        assert!(error_of(&answer[..10]).is_err());
        assert!(error_of(&[]).is_err());
    }
}
