//! Links, addresses, routes and neighbours, over netlink, in whichever namespace the calling
//! thread is. Every `ensure_` may be repeated.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd,
};

use futures::TryStreamExt;
use nix::errno::Errno;
use rtnetlink::{
    Handle, LinkIfb, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute, link::LinkAttribute, neighbour::NeighbourState,
        route::RouteScope, route::RouteType,
    },
};

use crate::netns::Namespace;

/// A netlink socket of one namespace.
#[derive(Debug)]
pub(crate) struct Links(pub(crate) Handle);

/// Runs `work` with a netlink socket of `namespace`.
pub(crate) fn with_links<T, F>(namespace: &Namespace, work: F) -> io::Result<T>
where
    T: Send,
    F: AsyncFnOnce(&Links) -> io::Result<T> + Send,
{
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        runtime.block_on(async {
            let (connection, handle, _messages) = rtnetlink::new_connection()?;
            let connection = tokio::spawn(connection);
            let result = work(&Links(handle)).await;
            connection.abort();
            result
        })
    })
}

/// The kernel's error number and, in words, what was refused.
pub(crate) fn refused(what: String) -> impl FnOnce(rtnetlink::Error) -> io::Error {
    move |error| {
        let kind =
            errno(&error).map_or(io::ErrorKind::Other, |errno| io::Error::from(errno).kind());
        io::Error::new(kind, format!("{what}: {error}"))
    }
}

pub(crate) fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            Some(Errno::from_raw(message.raw_code().saturating_abs()))
        }
        _ => None,
    }
}

fn already_there(error: &rtnetlink::Error) -> bool {
    errno(error) == Some(Errno::EEXIST)
}

impl Links {
    /// The index of a link, if it exists.
    pub(crate) async fn index(&self, name: &str) -> io::Result<Option<u32>> {
        let found = self.0.link().get().match_name(name).execute();
        futures::pin_mut!(found);
        match found.try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if matches!(errno(&error), Some(Errno::ENODEV | Errno::ENOENT)) => Ok(None),
            Err(error) => Err(refused(format!("find link {name}"))(error)),
        }
    }

    /// The index of a link that must be there.
    pub(crate) async fn existing(&self, name: &str) -> io::Result<u32> {
        self.index(name).await?.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("link {name} does not exist"),
            )
        })
    }

    /// Names of links that begin with `prefix`.
    pub(crate) async fn list(&self, prefix: &str) -> io::Result<Vec<String>> {
        let links = self.0.link().get().execute();
        futures::pin_mut!(links);
        let mut names = Vec::new();
        while let Some(link) = links
            .try_next()
            .await
            .map_err(refused("list links".to_owned()))?
        {
            for attribute in link.attributes {
                if let LinkAttribute::IfName(name) = attribute
                    && name.starts_with(prefix)
                {
                    names.push(name);
                }
            }
        }
        Ok(names)
    }

    /// All IPv4 addresses with their prefix lengths.
    pub(crate) async fn addresses(&self) -> io::Result<Vec<(Ipv4Addr, u8)>> {
        let messages = self.0.address().get().execute();
        futures::pin_mut!(messages);
        let mut all = Vec::new();
        while let Some(message) = messages
            .try_next()
            .await
            .map_err(refused("list addresses".to_owned()))?
        {
            for attribute in &message.attributes {
                if let AddressAttribute::Address(IpAddr::V4(address)) = attribute {
                    all.push((*address, message.header.prefix_len));
                }
            }
        }
        Ok(all)
    }

    /// Makes a veth pair with one end, `inside`, in this namespace and the other, `outside`, in
    /// that of `host`.
    pub(crate) async fn create_veth(
        &self,
        inside: &str,
        outside: &str,
        host: &Namespace,
    ) -> io::Result<()> {
        // What a crash between the two steps leaves.
        self.delete(inside).await?;
        self.0
            .link()
            .add(LinkVeth::new(inside, outside).build())
            .execute()
            .await
            .map_err(refused(format!("create veth {inside} and {outside}")))?;
        let message = LinkUnspec::new_with_name(outside)
            .setns_by_fd(std::os::fd::AsFd::as_fd(host).as_raw_fd())
            .build();
        self.0
            .link()
            .set(message)
            .execute()
            .await
            .map_err(refused(format!("move {outside} to the host")))
    }

    /// Makes a link in which packets can wait and go on as from where they came (ifb).
    pub(crate) async fn ensure_ifb(&self, name: &str) -> io::Result<()> {
        match self
            .0
            .link()
            .add(LinkIfb::new(name).build())
            .execute()
            .await
        {
            Err(error) if already_there(&error) => Ok(()),
            other => other.map_err(refused(format!("create link {name} (ifb)"))),
        }
    }

    /// Moves a link to another namespace, where it has another name.
    pub(crate) async fn hand_over(&self, link: &str, to: &Namespace, name: &str) -> io::Result<()> {
        let index = self.existing(link).await?;
        let message = LinkUnspec::new_with_index(index)
            .name(name.to_owned())
            .setns_by_fd(std::os::fd::AsFd::as_fd(to).as_raw_fd())
            .build();
        self.0
            .link()
            .set(message)
            .execute()
            .await
            .map_err(refused(format!("move {link} to be {name}")))
    }

    /// Sets the MTU.
    pub(crate) async fn set_mtu(&self, name: &str, mtu: u32) -> io::Result<()> {
        self.0
            .link()
            .set(LinkUnspec::new_with_name(name).mtu(mtu).build())
            .execute()
            .await
            .map_err(refused(format!("set the MTU of {name}")))
    }

    /// Sets the link up.
    pub(crate) async fn set_up(&self, name: &str) -> io::Result<()> {
        self.0
            .link()
            .set(LinkUnspec::new_with_name(name).up().build())
            .execute()
            .await
            .map_err(refused(format!("set {name} up")))
    }

    /// Removes the link, if it exists.
    pub(crate) async fn delete(&self, name: &str) -> io::Result<()> {
        let Some(index) = self.index(name).await? else {
            return Ok(());
        };
        match self.0.link().del(index).execute().await {
            Err(error) if errno(&error) == Some(Errno::ENODEV) => Ok(()),
            other => other.map_err(refused(format!("delete link {name}"))),
        }
    }

    /// Gives the link an address.
    pub(crate) async fn ensure_address(
        &self,
        name: &str,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> io::Result<()> {
        let index = self.existing(name).await?;
        match self
            .0
            .address()
            .add(index, address.into(), prefix_len)
            .execute()
            .await
        {
            Err(error) if already_there(&error) => Ok(()),
            other => other.map_err(refused(format!("add {address}/{prefix_len} to {name}"))),
        }
    }

    /// Routes one address to a link on which it is a direct neighbour with that MAC, for ever.
    pub(crate) async fn ensure_neighbour(
        &self,
        name: &str,
        address: Ipv4Addr,
        source: Ipv4Addr,
        mac: [u8; 6],
    ) -> io::Result<()> {
        let index = self.existing(name).await?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .pref_source(source)
            .build();
        self.0
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(refused(format!("route {address} to {name}")))?;
        self.0
            .neighbours()
            .add(index, address.into())
            .link_layer_address(&mac)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(refused(format!("set the neighbour {address} of {name}")))
    }

    /// Sends everything without a route of its own to `gateway`.
    pub(crate) async fn ensure_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(gateway)
            .build();
        self.0
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(refused(format!("route by default to {gateway}")))
    }

    /// Sends what is for `net` to `gateway`, a neighbour on a link that is up.
    pub(crate) async fn ensure_route(
        &self,
        net: ipnet::Ipv4Net,
        gateway: Ipv4Addr,
    ) -> io::Result<()> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .gateway(gateway)
            .build();
        match self.0.route().add(route).execute().await {
            // Not replaced: a route of somebody else's would be taken away from them.
            Err(error) if already_there(&error) => Ok(()),
            other => other.map_err(refused(format!("route {net} to {gateway}"))),
        }
    }

    /// Answers packets to addresses of the network that no pod has, so that they do not leave by
    /// the default route.
    pub(crate) async fn ensure_unreachable(&self, net: ipnet::Ipv4Net) -> io::Result<()> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .kind(RouteType::Unreachable)
            .build();
        self.0
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(refused(format!("make the rest of {net} unreachable")))
    }
}
