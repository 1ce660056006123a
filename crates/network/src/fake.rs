//! A driver without effects, for the tests of its users.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::OpenOptions,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use hypernetes_types::{NetworkId, SandboxId};
use ipnet::Ipv4Net;

use crate::{
    Attachment, HeldPort, Lease, NameRecord, NetworkDriver, NetworkError, NetworkServices,
    NetworkSpec, Parked, ParkedPlace, PodNetworkRequest, ipam,
    plan::{NetworkPlan, mac, tap_name},
};

/// Keeps networks and leases in memory; its taps are `/dev/null`.
#[derive(Debug, Default)]
pub struct FakeDriver {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    networks: BTreeMap<NetworkId, (NetworkSpec, Vec<NameRecord>, Option<Ipv4Addr>)>,
    services: BTreeMap<NetworkId, NetworkServices>,
    leases: BTreeMap<SandboxId, Lease>,
    pods_listen_at: Option<SocketAddr>,
}

impl FakeDriver {
    /// A driver without networks.
    pub fn new() -> Self {
        Self::default()
    }

    /// The names that were set for a network.
    pub fn names(&self, id: &NetworkId) -> Vec<NameRecord> {
        self.lock()
            .networks
            .get(id)
            .map(|network| network.1.clone())
            .unwrap_or_default()
    }

    /// The services that were set for a network.
    pub fn services(&self, id: &NetworkId) -> NetworkServices {
        self.lock().services.get(id).cloned().unwrap_or_default()
    }

    /// Where connections to pods go instead; without it they are refused.
    pub fn set_pods_listen_at(&self, address: Option<SocketAddr>) {
        self.lock().pods_listen_at = address;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn plan(spec: &NetworkSpec) -> Result<NetworkPlan, NetworkError> {
    let pool = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 16);
    NetworkPlan::new(spec, pool, Ipv4Net::new_assert(pool.network(), 31))
}

fn null() -> Result<OwnedFd, NetworkError> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = open.map_err(|source| NetworkError::System {
        action: "open /dev/null".to_owned(),
        source: Box::new(source),
    })?;
    Ok(null.into())
}

impl State {
    fn pods(&self, id: &NetworkId) -> usize {
        self.leases
            .values()
            .filter(|lease| lease.network == *id)
            .count()
    }
}

#[async_trait]
impl NetworkDriver for FakeDriver {
    async fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), NetworkError> {
        plan(spec)?;
        let mut state = self.lock();
        let pods = state.pods(&spec.id);
        match state.networks.get_mut(&spec.id) {
            Some((old, ..)) => {
                if (old.cidr != spec.cidr || old.gateway != spec.gateway) && pods > 0 {
                    return Err(NetworkError::InUse {
                        network: spec.id.clone(),
                        pods,
                    });
                }
                *old = spec.clone();
            }
            None => {
                state
                    .networks
                    .insert(spec.id.clone(), (spec.clone(), Vec::new(), None));
            }
        }
        Ok(())
    }

    async fn delete_network(&self, id: &NetworkId) -> Result<(), NetworkError> {
        let mut state = self.lock();
        let pods = state.pods(id);
        if pods > 0 {
            return Err(NetworkError::InUse {
                network: id.clone(),
                pods,
            });
        }
        state.networks.remove(id);
        state.services.remove(id);
        Ok(())
    }

    async fn list_networks(&self) -> Result<Vec<NetworkSpec>, NetworkError> {
        Ok(self
            .lock()
            .networks
            .values()
            .map(|network| network.0.clone())
            .collect())
    }

    async fn attach(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, NetworkError> {
        let requested = request.address;
        let mut state = self.lock();
        let refuse = |address, reason| NetworkError::Address {
            address,
            network: network.clone(),
            reason,
        };
        let (spec, _names, last) = state
            .networks
            .get(network)
            .ok_or_else(|| NetworkError::NoNetwork(network.clone()))?;
        let lease = if let Some(lease) = state.leases.get(sandbox) {
            if lease.network != *network {
                return Err(refuse(
                    lease.address,
                    "the sandbox has it on another network",
                ));
            }
            if let Some(address) = requested.filter(|address| *address != lease.address) {
                return Err(refuse(address, "the sandbox has another one"));
            }
            lease.clone()
        } else {
            let plan = plan(spec)?;
            let wanted = match requested {
                Some(IpAddr::V4(address)) => Some(address),
                Some(address) => return Err(refuse(address, "the network is IPv4")),
                None => None,
            };
            let taken = state
                .leases
                .values()
                .filter(|lease| lease.network == *network)
                .filter_map(|lease| match lease.address {
                    IpAddr::V4(address) => Some(address),
                    IpAddr::V6(_) => None,
                })
                .collect::<BTreeSet<_>>();
            let address = ipam::choose(plan.cidr, plan.gateway, &taken, *last, wanted).map_err(
                |refusal| match (refusal, requested) {
                    (ipam::Refusal::Address(reason), Some(address)) => refuse(address, reason),
                    _ => NetworkError::Exhausted(network.clone()),
                },
            )?;
            Lease {
                sandbox: sandbox.clone(),
                network: network.clone(),
                address: address.into(),
                gateway: plan.gateway.into(),
                mac: mac(sandbox),
                device: tap_name(sandbox),
                mtu: plan.mtu,
                dns: vec![plan.gateway.into()],
                search: vec![format!("svc.{}", spec.domain), spec.domain.clone()],
                prefixes: Vec::new(),
                routes: Vec::new(),
                host_ports: request
                    .host_ports
                    .iter()
                    .map(|port| HeldPort {
                        port: port.clone(),
                        relay: port.host_port,
                    })
                    .collect(),
                bandwidth: request.bandwidth,
            }
        };
        let tap = null()?;
        if let (Some(network), IpAddr::V4(address), None) =
            (state.networks.get_mut(network), lease.address, requested)
        {
            network.2 = Some(address);
        }
        state.leases.insert(sandbox.clone(), lease.clone());
        Ok(Attachment { tap, lease })
    }

    async fn ready(&self, _network: &NetworkId) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn lease(&self, sandbox: &SandboxId) -> Result<Option<Lease>, NetworkError> {
        Ok(self.lock().leases.get(sandbox).cloned())
    }

    async fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        self.lock().leases.remove(sandbox);
        Ok(())
    }

    async fn park(&self) -> Result<Parked, NetworkError> {
        Ok(Parked {
            tap: null()?,
            place: ParkedPlace(null()?),
        })
    }

    async fn attach_parked(
        &self,
        sandbox: &SandboxId,
        network: &NetworkId,
        request: &PodNetworkRequest,
        _place: ParkedPlace,
    ) -> Result<Lease, NetworkError> {
        let attachment = self.attach(sandbox, network, request).await?;
        Ok(attachment.lease)
    }

    async fn set_names(&self, id: &NetworkId, names: Vec<NameRecord>) -> Result<(), NetworkError> {
        let mut state = self.lock();
        let network = state
            .networks
            .get_mut(id)
            .ok_or_else(|| NetworkError::NoNetwork(id.clone()))?;
        network.1 = names;
        Ok(())
    }

    async fn set_services(
        &self,
        id: &NetworkId,
        services: NetworkServices,
    ) -> Result<(), NetworkError> {
        let mut state = self.lock();
        if !state.networks.contains_key(id) {
            return Err(NetworkError::NoNetwork(id.clone()));
        }
        state.services.insert(id.clone(), services);
        Ok(())
    }

    async fn dial(
        &self,
        _network: &NetworkId,
        address: SocketAddr,
    ) -> Result<tokio::net::TcpStream, NetworkError> {
        let refused = |source: std::io::Error| NetworkError::System {
            action: format!("connect to {address}"),
            source: Box::new(source),
        };
        let at = self.lock().pods_listen_at;
        let at = at.ok_or_else(|| refused(std::io::ErrorKind::ConnectionRefused.into()))?;
        tokio::net::TcpStream::connect(at).await.map_err(refused)
    }

    async fn recover(&self, alive: &[SandboxId]) -> Result<(), NetworkError> {
        self.lock()
            .leases
            .retain(|sandbox, _lease| alive.contains(sandbox));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn fake_conforms() {
        crate::conformance::check(&FakeDriver::new()).await;
    }
}
