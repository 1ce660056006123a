//! The pod's network interfaces.

use std::{
    fs, io,
    net::IpAddr,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use hypernetes_agent_api::v1;

use crate::{
    boot::dir,
    error::{Attempt, GuestError},
    netlink::{Link, Netlink},
};

/// Where the devices of the pod's network are.
pub(crate) fn devices() -> PathBuf {
    let pod = Path::new(dir::POD_SYS).join("class/net");
    match pod.exists() {
        true => pod,
        false => "/sys/class/net".into(),
    }
}

fn connect() -> Result<Netlink, GuestError> {
    Netlink::open().attempt("open a routing socket")
}

fn index_of(name: &str) -> io::Result<u32> {
    let text = fs::read_to_string(devices().join(name).join("ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}

/// Brings `lo` up, on which containers of a pod reach each other.
pub(crate) fn loopback_up() -> Result<(), GuestError> {
    let index = index_of("lo").attempt("find lo")?;
    connect()?.set_link(index, Link::Up).attempt("bring lo up")
}

/// Moves an interface's device to another network namespace. One that is not here is left to
/// [`configure`] to miss.
pub(crate) fn move_device(
    interface: &v1::Interface,
    network: BorrowedFd<'_>,
) -> Result<(), GuestError> {
    let plan = Plan::parse(interface)?;
    for mac in [Some(&plan.mac), plan.device_mac.as_ref()]
        .into_iter()
        .flatten()
    {
        let Some(name) = find(mac).attempt("list the network devices")? else {
            continue;
        };
        let index = index_of(&name).attempt(format!("find {name}"))?;
        return connect()?
            .set_link(index, Link::Namespace(network))
            .attempt(format!("move {name} to the pod's network"));
    }
    Ok(())
}

/// Takes from an interface what [`configure`] gave it: it is down afterwards, without addresses and routes.
/// May be repeated.
pub(crate) fn deconfigure(interface: &v1::Interface) -> Result<(), GuestError> {
    let plan = Plan::parse(interface)?;
    let index = index_of(plan.name).attempt(format!("find {}", plan.name))?;
    let netlink = connect()?;
    // Routes go with it, and addresses of the sixth version.
    netlink
        .set_link(index, Link::Down)
        .attempt(format!("bring down {}", plan.name))?;
    for (address, prefix) in &plan.addresses {
        netlink
            .remove_address(index, *address, *prefix)
            .attempt(format!("remove {address}/{prefix} from {}", plan.name))?;
    }
    Ok(())
}

/// Finds the device by its MAC address and gives it name, MTU, addresses and routes. May be
/// repeated.
pub(crate) fn configure(interface: &v1::Interface) -> Result<(), GuestError> {
    let plan = Plan::parse(interface)?;
    // Under its former address if it has that still: a repeated call finds it under its own.
    let mut name = None;
    for mac in [Some(&plan.mac), plan.device_mac.as_ref()] {
        if let (None, Some(mac)) = (&name, mac) {
            name = find(mac).attempt("list the network devices")?;
        }
    }
    let Some(name) = name else {
        return Err(GuestError::NotFound(format!(
            "no network device has the address {}",
            interface.mac
        )));
    };
    let index = index_of(&name).attempt(format!("find {name}"))?;
    let netlink = connect()?;
    let what = |step: &str| format!("{step} {}", plan.name);
    if name != plan.name {
        // A device that is up keeps its name on older kernels.
        netlink
            .set_link(index, Link::Down)
            .attempt(what("bring down"))?;
        netlink
            .set_link(index, Link::Name(plan.name))
            .attempt(what("name the device"))?;
    }
    if plan.device_mac.is_some() {
        netlink
            .set_link(index, Link::Address(plan.octets))
            .attempt(what("set the MAC address of"))?;
    }
    if plan.mtu > 0 {
        netlink
            .set_link(index, Link::Mtu(plan.mtu))
            .attempt(what("set the MTU of"))?;
    }
    // Kernels without IPv6 lack these files.
    for (knob, value) in [
        ("accept_ra", "0"),
        ("accept_dad", "0"),
        ("dad_transmits", "0"),
    ] {
        drop(fs::write(
            Path::new("/proc/sys/net/ipv6/conf")
                .join(plan.name)
                .join(knob),
            value,
        ));
    }
    netlink
        .set_link(index, Link::Up)
        .attempt(what("bring up"))?;
    for (address, prefix) in &plan.addresses {
        let what = format!("add {address}/{prefix} to {}", plan.name);
        netlink
            .add_address(index, *address, *prefix)
            .attempt(what)?;
    }
    for Route {
        destination,
        gateway,
    } in &plan.routes
    {
        let what = format!("add the route to {}/{}", destination.0, destination.1);
        netlink
            .add_route(index, *destination, *gateway)
            .attempt(what)?;
    }
    Ok(())
}

/// Name of the device with a MAC address.
fn find(mac: &str) -> io::Result<Option<String>> {
    for entry in fs::read_dir(devices())? {
        let entry = entry?;
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim() == mac {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

type Prefix = (IpAddr, u8);

#[derive(Debug, PartialEq, Eq)]
struct Route {
    destination: Prefix,
    gateway: Option<IpAddr>,
}

/// An interface's configuration, checked.
#[derive(Debug, PartialEq, Eq)]
struct Plan<'a> {
    /// In the kernel's spelling.
    mac: String,
    octets: [u8; 6],
    device_mac: Option<String>,
    name: &'a str,
    mtu: u32,
    addresses: Vec<Prefix>,
    /// On-link ones first: they are what gateways are reached by.
    routes: Vec<Route>,
}

impl<'a> Plan<'a> {
    fn parse(interface: &'a v1::Interface) -> Result<Self, GuestError> {
        let v1::Interface {
            mac,
            name,
            addresses,
            routes,
            mtu,
            device_mac,
        } = interface;
        let octets = parse_mac(mac)?;
        let device_mac = match device_mac.as_str() {
            "" => None,
            text => {
                parse_mac(text)?;
                Some(text.to_ascii_lowercase())
            }
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !(1..=15).contains(&name.len()) || !name.chars().all(plain) || name.starts_with('.') {
            return Err(GuestError::Invalid(format!("{name:?} is no device name")));
        }
        let mut routes = routes
            .iter()
            .map(|route| {
                let gateway =
                    match route.gateway.as_str() {
                        "" => None,
                        text => Some(text.parse().map_err(|_bad| {
                            GuestError::Invalid(format!("{text:?} is no gateway"))
                        })?),
                    };
                let destination = prefix(&route.destination)?;
                if gateway
                    .is_some_and(|gateway: IpAddr| gateway.is_ipv4() != destination.0.is_ipv4())
                {
                    return Err(GuestError::Invalid(format!(
                        "{} is of another family than its gateway",
                        route.destination
                    )));
                }
                Ok(Route {
                    destination,
                    gateway,
                })
            })
            .collect::<Result<Vec<_>, GuestError>>()?;
        routes.sort_by_key(|route| route.gateway.is_some());
        let addresses = addresses
            .iter()
            .map(|text| prefix(text))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            mac: mac.to_ascii_lowercase(),
            octets,
            device_mac,
            name,
            mtu: *mtu,
            addresses,
            routes,
        })
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], GuestError> {
    let octet = |part: &str| {
        let hex = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let octets: Option<Vec<u8>> = text.split(':').map(octet).collect();
    octets
        .and_then(|octets| octets.try_into().ok())
        .ok_or_else(|| GuestError::Invalid(format!("{text:?} is no MAC address")))
}

fn prefix(text: &str) -> Result<Prefix, GuestError> {
    let parse = || {
        let (address, length) = text.split_once('/')?;
        let (address, length) = (address.parse::<IpAddr>().ok()?, length.parse::<u8>().ok()?);
        let most = if address.is_ipv4() { 32 } else { 128 };
        (length <= most).then_some((address, length))
    };
    parse().ok_or_else(|| GuestError::Invalid(format!("{text:?} is no CIDR prefix")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> v1::Interface {
        v1::Interface {
            mac: "02:00:0A:00:00:05".into(),
            name: "eth0".into(),
            addresses: vec!["10.0.0.5/32".into(), "fd00::5/128".into()],
            routes: vec![
                v1::Route {
                    destination: "0.0.0.0/0".into(),
                    gateway: "169.254.1.1".into(),
                },
                v1::Route {
                    destination: "169.254.1.1/32".into(),
                    gateway: String::new(),
                },
            ],
            mtu: 1450,
            device_mac: String::new(),
        }
    }

    #[test]
    fn on_link_routes_come_first() {
        let interface = interface();
        let plan = Plan::parse(&interface).unwrap();
        assert_eq!(plan.mac, "02:00:0a:00:00:05");
        assert_eq!((plan.octets[2], plan.device_mac), (0x0a, None));
        assert_eq!(plan.routes[0].gateway, None);
        assert_eq!(plan.routes[1].gateway, Some("169.254.1.1".parse().unwrap()));
    }

    #[test]
    fn nonsense_is_refused() {
        for (mac, name, address) in [
            ("02:00:0a:00:00", "eth0", "10.0.0.5/32"),
            ("02:00:0a:00:00:05", "../x", "10.0.0.5/32"),
            (
                "02:00:0a:00:00:05",
                "a-name-too-long-for-linux",
                "10.0.0.5/32",
            ),
            ("02:00:0a:00:00:05", "eth0", "10.0.0.5/33"),
            ("02:00:0a:00:00:05", "eth0", "10.0.0.5"),
        ] {
            let bad = v1::Interface {
                mac: mac.into(),
                name: name.into(),
                addresses: vec![address.into()],
                ..interface()
            };
            assert!(
                matches!(Plan::parse(&bad), Err(GuestError::Invalid(_))),
                "{mac} {name} {address}"
            );
        }
    }
}
