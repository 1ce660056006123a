//! A pod's network namespace: what plugins have put there, and the way from it into a VM.
//!
//! ```text
//!  cluster ══ eth0 ──── tc redirect ──── tap0 ══ VMM ══ guest's eth0
//!             │  everything  ─────────▶   │             (same MAC, addresses, routes)
//!             │  ◀───────── what has the pod's addresses
//! ```
//! The namespace's own stack sees no packet of either side.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute,
        link::LinkAttribute,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteProtocol, RouteType},
        tc::TcU32Key,
    },
};

use crate::{
    Route, firewall,
    links::{Links, refused, with_links},
    netns::Namespace,
    plan::Sysctl,
    sysctl,
    tc::{self, Ethertype, key, word},
};

/// The pod's interface, as plugins and guest call it.
pub(super) const INTERFACE: &str = "eth0";
/// The VM's end in the namespace.
const TAP: &str = "tap0";
/// The first 64 bits of IPv6 addresses that each device makes for itself.
const LINK_LOCAL: u64 = 0xfe80_0000_0000_0000;

/// What plugins have made of the pod's interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
    pub(super) prefixes: Vec<IpNet>,
    pub(super) routes: Vec<Route>,
}

/// Makes the namespace exist, with `lo` up.
pub(super) fn make(name: &str) -> io::Result<Namespace> {
    let namespace = Namespace::ensure(name)?;
    with_links(&namespace, async |links| links.set_up("lo").await)?;
    Ok(namespace)
}

/// The pod's interface.
pub(super) fn read(namespace: &Namespace) -> io::Result<Interface> {
    with_links(namespace, async |links| {
        let (index, mac, mtu) = links.ethernet(INTERFACE).await?;
        Ok(Interface {
            mac,
            mtu,
            prefixes: links.prefixes(index).await?,
            routes: links.routes(index).await?,
        })
    })
}

/// Joins the interface with the tap that `provide` makes be there, and gives what that gives.
pub(super) fn connect<T>(
    namespace: &Namespace,
    interface: &Interface,
    only_own: bool,
    provide: impl FnOnce(&Namespace, &str) -> io::Result<T>,
) -> io::Result<T> {
    let queue = provide(namespace, TAP)?;
    let mut quiet = vec![quiet(TAP)];
    if interface
        .prefixes
        .iter()
        .all(|prefix| prefix.addr().is_ipv4())
    {
        quiet.push(self::quiet(INTERFACE));
    }
    sysctl::apply(namespace, &quiet)?;
    // Before a packet can come: what no filter takes is nobody's.
    firewall::apply(namespace, &unmatched())?;
    let (filters, mtu) = (from_guest(interface, only_own), interface.mtu);
    with_links(namespace, async |links| {
        let (pod, _mac, _mtu) = links.ethernet(INTERFACE).await?;
        let (guest, _mac, _mtu) = links.ethernet(TAP).await?;
        links.set_mtu(TAP, mtu).await?;
        for index in [pod, guest] {
            links.renew_ingress(index).await?;
        }
        for (at, (protocol, keys)) in (1..).zip(filters) {
            links.redirect(guest, pod, at, protocol, keys).await?;
        }
        links
            .redirect(pod, guest, 1, Ethertype::All, vec![TcU32Key::default()])
            .await?;
        links.set_up(TAP).await
    })?;
    Ok(queue)
}

/// The namespace's own stack shall not speak up beside the guest.
fn quiet(link: &str) -> Sysctl {
    Sysctl {
        path: format!("ipv6/conf/{link}/disable_ipv6"),
        value: "1",
        optional: true,
    }
}

fn unmatched() -> String {
    format!(
        "table netdev hypernetes\n\
         delete table netdev hypernetes\n\
         table netdev hypernetes {{\n\
         \tchain unmatched {{\n\
         \t\ttype filter hook ingress device \"{TAP}\" priority 0; policy drop;\n\
         \t}}\n\
         }}\n"
    )
}

/// The four words of an IPv6 source address.
fn source6(address: Ipv6Addr) -> Vec<TcU32Key> {
    let octets = address.octets();
    let words = octets.chunks(4).map(word);
    (8..)
        .step_by(4)
        .zip(words)
        .map(|(off, word)| key(off, u32::MAX, word))
        .collect()
}

/// What the guest may send: all of it, or what comes from the interface's own addresses. Offsets
/// count from the network header.
fn from_guest(interface: &Interface, only_own: bool) -> Vec<(Ethertype, Vec<TcU32Key>)> {
    if !only_own {
        return vec![(Ethertype::All, vec![TcU32Key::default()])];
    }
    let mac = interface.mac;
    let mut filters = Vec::new();
    let mut add = |protocol, keys: Vec<TcU32Key>| {
        filters.push((
            protocol,
            tc::from_mac(mac).into_iter().chain(keys).collect(),
        ));
    };
    for prefix in &interface.prefixes {
        match prefix.addr() {
            IpAddr::V4(address) => {
                add(Ethertype::V4, vec![tc::from_v4(address)]);
                let address = word(&address.octets());
                // Sender's hardware and protocol address (RFC 826).
                let mut arp = tc::mac_at(8, mac).to_vec();
                arp.push(key(14, u32::MAX, address));
                add(Ethertype::Arp, arp);
            }
            IpAddr::V6(address) => add(Ethertype::V6, source6(address)),
        }
    }
    if interface
        .prefixes
        .iter()
        .any(|prefix| prefix.addr().is_ipv6())
    {
        let [a, b, c, d, e, f] = mac;
        // RFC 4291, appendix A.
        let id = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
        let own = Ipv6Addr::from(u128::from(LINK_LOCAL) << 64 | u128::from(id));
        add(Ethertype::V6, source6(own));
        // Looking for duplicates of an address (RFC 4862, section 5.4.2).
        add(Ethertype::V6, source6(Ipv6Addr::UNSPECIFIED));
    }
    filters
}

impl Links {
    /// Index, MAC address and MTU of a link.
    async fn ethernet(&self, name: &str) -> io::Result<(u32, [u8; 6], u32)> {
        let found = self.0.link().get().match_name(name.to_owned()).execute();
        futures::pin_mut!(found);
        let link = found
            .try_next()
            .await
            .map_err(refused(format!("find link {name}")))?
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no link {name}")))?;
        let (mut mac, mut mtu) = (None, 0);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok(),
                LinkAttribute::Mtu(value) => mtu = *value,
                _other => {}
            }
        }
        let mac = mac.ok_or_else(|| {
            let message = format!("{name} has no MAC address: a VM cannot have its place");
            io::Error::new(io::ErrorKind::Unsupported, message)
        })?;
        Ok((link.header.index, mac, mtu))
    }

    /// The link's addresses, but for those that every device makes for itself.
    async fn prefixes(&self, index: u32) -> io::Result<Vec<IpNet>> {
        let request = self.0.address().get().set_link_index_filter(index);
        let messages: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .map_err(refused("list addresses".to_owned()))?;
        let mut all = Vec::new();
        for message in messages {
            let own = |attribute: &AddressAttribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _other => None,
            };
            let any = |attribute: &AddressAttribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _other => None,
            };
            let attributes = &message.attributes;
            let address = attributes
                .iter()
                .find_map(own)
                .or_else(|| attributes.iter().find_map(any));
            let Some(address) = address else { continue };
            let prefix =
                IpNet::new(address, message.header.prefix_len).map_err(io::Error::other)?;
            if !is_link_local(address) {
                all.push(prefix);
            }
        }
        // A pod is known by its IPv4 address if it has one.
        all.sort_by_key(|prefix| prefix.addr().is_ipv6());
        Ok(all)
    }

    /// The routes that lead out by the link, but for those that come with its addresses.
    async fn routes(&self, index: u32) -> io::Result<Vec<Route>> {
        let mut all = Vec::new();
        let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        for family in [v4, v6] {
            let messages: Vec<_> = self
                .0
                .route()
                .get(family)
                .execute()
                .try_collect()
                .await
                .map_err(refused("list routes".to_owned()))?;
            for message in messages {
                let header = &message.header;
                let ours = header.table == RouteHeader::RT_TABLE_MAIN
                    && header.kind == RouteType::Unicast
                    && header.protocol != RouteProtocol::Kernel;
                let (mut to, mut gateway, mut out) = (None, None, None);
                for attribute in &message.attributes {
                    match attribute {
                        RouteAttribute::Destination(address) => to = address_of(address),
                        RouteAttribute::Gateway(address) => gateway = address_of(address),
                        RouteAttribute::Oif(index) => out = Some(*index),
                        _other => {}
                    }
                }
                if !ours || out != Some(index) {
                    continue;
                }
                let length = header.destination_prefix_length;
                let destination = match to {
                    Some(address) => IpNet::new(address, length).map_err(io::Error::other)?,
                    None if matches!(
                        header.address_family,
                        rtnetlink::packet_route::AddressFamily::Inet6
                    ) =>
                    {
                        Ipv6Net::default().into()
                    }
                    None => Ipv4Net::default().into(),
                };
                if !is_link_local(destination.addr()) && !destination.addr().is_multicast() {
                    all.push(Route {
                        destination,
                        gateway,
                    });
                }
            }
        }
        Ok(all)
    }
}

fn address_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _other => None,
    }
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(prefixes: &[&str]) -> Interface {
        Interface {
            mac: [2, 0, 0, 1, 2, 3],
            mtu: 1500,
            prefixes: prefixes.iter().map(|text| text.parse().unwrap()).collect(),
            routes: Vec::new(),
        }
    }

    #[test]
    fn a_guest_speaks_with_its_own_addresses_only() {
        let filters = from_guest(&interface(&["10.1.0.5/16"]), true);
        let mac = [
            key(-8, u32::MAX, 0x0200_0001),
            key(-4, 0xffff_0000, 0x0203_0000),
        ];
        assert_eq!(filters.len(), 2);
        assert!(matches!(filters[0].0, Ethertype::V4));
        assert_eq!(filters[0].1[..2], mac);
        assert_eq!(filters[0].1[2], key(12, u32::MAX, 0x0a01_0005));
        assert!(matches!(filters[1].0, Ethertype::Arp));
        assert_eq!(filters[1].1[3], key(12, 0xffff_0000, 0x0203_0000));
        assert_eq!(filters[1].1[4], key(14, u32::MAX, 0x0a01_0005));
    }

    #[test]
    fn ipv6_has_its_link_local_address_and_none() {
        let filters = from_guest(&interface(&["fd00::5/64"]), true);
        let first: Vec<_> = filters.iter().map(|(_, keys)| keys[2].val).collect();
        assert_eq!(first, [0xfd00_0000, 0xfe80_0000, 0]);
        assert_eq!(
            filters[1].1[4..],
            [
                key(16, u32::MAX, 0x0000_00ff),
                key(20, u32::MAX, 0xfe01_0203)
            ]
        );
        assert_eq!(from_guest(&interface(&["fd00::5/64"]), false).len(), 1);
    }
}
