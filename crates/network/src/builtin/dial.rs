//! Connections from a network's gateway to its pods, for whoever looks after them.

use std::net::{IpAddr, SocketAddr};

use hypernetes_types::NetworkId;
use tokio::net::TcpSocket;

use super::{Inner, lock, system};
use crate::{NetworkError, netns::Namespace};

impl Inner {
    /// A socket in the network's namespace that comes from the gateway, for a pod with this address.
    pub(super) fn gateway_socket(
        &self,
        id: &NetworkId,
        address: IpAddr,
    ) -> Result<TcpSocket, NetworkError> {
        let none = || NetworkError::NoNetwork(id.clone());
        let network = self.network(id).ok_or_else(none)?;
        let spec = lock(&network.gate).existing_spec().ok_or_else(none)?;
        // The gateway is the node's own; nothing else is a pod either.
        if !spec.cidr.contains(&address) || address == spec.gateway {
            return Err(NetworkError::Address {
                address,
                network: id.clone(),
                reason: "no pod can have it",
            });
        }
        let action = format!("open a socket in network {id}");
        let namespace = Namespace::open(&network.names.namespace)
            .map_err(system(action.clone()))?
            .ok_or_else(none)?;
        namespace
            .run(|| {
                let socket = if spec.gateway.is_ipv4() {
                    TcpSocket::new_v4()?
                } else {
                    TcpSocket::new_v6()?
                };
                socket.bind(SocketAddr::new(spec.gateway, 0))?;
                Ok(socket)
            })
            .map_err(system(action))
    }
}
