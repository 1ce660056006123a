//! One network and its pods: what is done under the network's lock.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use hypernetes_types::{NetworkId, SandboxId};

use super::{Inner, Network, api::ApiListener, lock, ports::node_ports, system};
use crate::{
    Attachment, Lease, NameRecord, NetworkError, NetworkSpec, ParkedPlace, PodNetworkRequest,
    dns::{DnsServer, Zone},
    firewall, ipam,
    links::with_links,
    netns::{self, Namespace},
    plan::{
        NetworkPlan, PodPlan, ServiceTable, UPLINK, mac, network_ruleset, pod_removal_rules,
        pod_rules, tap_name,
    },
    record::NetworkRecord,
    shaping, sysctl, tap,
};

/// A network as this process knows it.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) record: NetworkRecord,
    progress: Progress,
    last: Option<Ipv4Addr>,
    dns: Option<DnsServer>,
    /// The services that the kernel has; `None`: unknown.
    pub(super) table: Option<ServiceTable>,
    pub(super) api: Option<ApiListener>,
}

/// How far a network has come in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Not on disk.
    New,
    /// On disk; what the kernel has is unknown.
    Recorded,
    /// The kernel has it as recorded.
    Applied,
    /// Neither on disk nor in the kernel, and not in the tables.
    Gone,
}

impl Live {
    /// A network that is not on disk yet.
    pub(super) fn new(record: NetworkRecord) -> Self {
        Self {
            record,
            progress: Progress::New,
            last: None,
            dns: None,
            table: None,
            api: None,
        }
    }

    /// A network that was found on disk; its latest address was `last`.
    pub(super) fn recorded(record: NetworkRecord, last: Option<Ipv4Addr>) -> Self {
        Self {
            record,
            progress: Progress::Recorded,
            last,
            dns: None,
            table: None,
            api: None,
        }
    }

    pub(super) fn record(&self) -> &NetworkRecord {
        &self.record
    }

    pub(super) fn is_gone(&self) -> bool {
        self.progress == Progress::Gone
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.record.deleting
    }

    pub(super) fn existing_spec(&self) -> Option<NetworkSpec> {
        self.exists().then(|| self.record.spec.clone())
    }

    pub(super) fn check_exists(&self, id: &NetworkId) -> Result<(), NetworkError> {
        if self.exists() {
            Ok(())
        } else {
            Err(NetworkError::NoNetwork(id.clone()))
        }
    }

    fn exists(&self) -> bool {
        matches!(self.progress, Progress::Recorded | Progress::Applied) && !self.record.deleting
    }

    fn zone(&self) -> Zone {
        let spec = &self.record.spec;
        let services = &self.record.services;
        Zone::new(&spec.domain, spec.cidr, &self.record.names, services)
    }
}

impl Inner {
    pub(super) fn ensure_live(
        &self,
        network: &Network,
        live: &mut Live,
        spec: &NetworkSpec,
    ) -> Result<(), NetworkError> {
        if live.exists() && live.record.spec == *spec && self.is_applied(network, live) {
            return Ok(());
        }
        let was_new = live.progress == Progress::New;
        let moved = live.record.spec.cidr != spec.cidr || live.record.spec.gateway != spec.gateway;
        if live.record.deleting || (moved && !was_new) {
            let pods = lock(&self.tables).of(&spec.id).count();
            if pods > 0 {
                return Err(NetworkError::InUse {
                    network: spec.id.clone(),
                    pods,
                });
            }
            self.tear_down(network, live)?;
            live.record.deleting = false;
            live.last = None;
        }
        live.record.spec = spec.clone();
        live.progress = Progress::Recorded;
        let result = self
            .put_record(network, live)
            .and_then(|()| self.apply(network, live));
        if let (Err(error), true) = (&result, was_new)
            && let Err(cleanup) = self.remove_live(network, live)
        {
            tracing::warn!(%error, %cleanup, network = %spec.id, "cannot undo a failed network");
        }
        result
    }

    /// Makes a known network as recorded, whatever the kernel has of it.
    pub(super) fn repair_live(
        &self,
        network: &Network,
        live: &mut Live,
    ) -> Result<(), NetworkError> {
        live.progress = Progress::Recorded;
        self.apply(network, live)
    }

    /// Removes the network from kernel, disk and tables.
    pub(super) fn remove_live(
        &self,
        network: &Network,
        live: &mut Live,
    ) -> Result<(), NetworkError> {
        let id = live.record.spec.id.clone();
        live.record.deleting = true;
        self.put_record(network, live)?;
        self.forward_services(network, &id, BTreeSet::new())
            .map_err(system(format!("close ports of the node to network {id}")))?;
        self.tear_down(network, live)?;
        self.records
            .remove_network(&network.names.hash)
            .map_err(system(format!("forget network {id}")))?;
        live.progress = Progress::Gone;
        lock(&self.tables).networks.remove(&id);
        self.release_host()
    }

    pub(super) fn set_live_names(
        &self,
        network: &Network,
        live: &mut Live,
        names: Vec<NameRecord>,
    ) -> Result<(), NetworkError> {
        if live.record.names == names {
            return Ok(());
        }
        live.record.names = names;
        self.put_record(network, live)?;
        self.tell_names(live);
        Ok(())
    }

    pub(super) fn tell_names(&self, live: &Live) {
        if let Some(dns) = &live.dns {
            dns.set(live.zone(), self.upstream(live));
        }
    }

    pub(super) fn put_record(&self, network: &Network, live: &Live) -> Result<(), NetworkError> {
        self.records
            .put_network(&network.names.hash, &live.record)
            .map_err(system(format!("record network {}", live.record.spec.id)))
    }

    /// Whether this process has applied the network and nobody has removed it since.
    pub(super) fn is_applied(&self, network: &Network, live: &Live) -> bool {
        live.progress == Progress::Applied
            && live.dns.as_ref().is_some_and(DnsServer::is_running)
            && matches!(Namespace::open(&network.names.namespace), Ok(Some(_)))
    }

    pub(super) fn plan(&self, live: &Live) -> Result<NetworkPlan, NetworkError> {
        NetworkPlan::new(&live.record.spec, self.config.transit, live.record.transit)
    }

    /// Servers for names outside the network: none without egress, because names can carry data.
    fn upstream(&self, live: &Live) -> Option<&[SocketAddr]> {
        live.record
            .spec
            .egress
            .then_some(self.config.upstream_dns.as_slice())
    }

    pub(super) fn apply(&self, network: &Network, live: &mut Live) -> Result<(), NetworkError> {
        let plan = self.plan(live)?;
        self.ensure_host()?;
        let id = &live.record.spec.id;
        let names = &network.names;
        let namespace = Namespace::ensure(&names.namespace).map_err(system(format!(
            "make network namespace {}",
            names.namespace
        )))?;
        let pods = lock(&self.tables).pods(id);
        self.apply_inside(&plan, &namespace, &pods)
            .map_err(system(format!("set up network {id}")))?;
        self.take_over_services(&plan, &namespace, live)
            .map_err(system(format!(
                "set the services of network {}",
                network.names.namespace
            )))?;
        self.listen_for_api(&plan, &namespace, live)
            .map_err(system(format!(
                "listen for the API server in {}",
                network.names.namespace
            )))?;
        let id = &live.record.spec.id;
        self.apply_uplink(&plan, network, &namespace)
            .map_err(system(format!("join network {id} to the host")))?;
        if !lock(&self.tables).held(id).is_empty() {
            self.allow_loopback(network)
                .map_err(system(format!("open ports of the node to network {id}")))?;
        }
        let ports = live.table.as_ref().map(node_ports).unwrap_or_default();
        self.forward_services(network, id, ports)
            .map_err(system(format!("forward ports of the node to network {id}")))?;
        let (zone, upstream) = (live.zone(), self.upstream(live));
        match &live.dns {
            Some(dns) if dns.is_running() => dns.set(zone, upstream),
            _ => {
                live.dns = Some(
                    DnsServer::start(&namespace, plan.gateway, zone, upstream)
                        .map_err(system(format!("serve DNS for network {id}")))?,
                );
            }
        }
        live.progress = Progress::Applied;
        Ok(())
    }

    /// All of the namespace but its uplink. Rules come before any link is up.
    fn apply_inside(
        &self,
        plan: &NetworkPlan,
        namespace: &Namespace,
        pods: &[PodPlan],
    ) -> io::Result<()> {
        sysctl::apply(namespace, &plan.sysctls())?;
        for pod in pods {
            let exists =
                with_links(namespace, async |links| links.index(&pod.device).await)?.is_some();
            if !exists {
                drop(tap::open(namespace, &pod.device)?);
            }
        }
        firewall::apply(namespace, &network_ruleset(plan, pods))?;
        with_links(namespace, async |links| {
            links.set_up("lo").await?;
            // DNS listens there before the first tap comes and after the last has gone.
            links.ensure_address("lo", plan.gateway, 32).await?;
            links.ensure_unreachable(plan.cidr).await
        })?;
        pods.iter().try_for_each(|pod| apply_pod(namespace, pod))
    }

    fn apply_uplink(
        &self,
        plan: &NetworkPlan,
        network: &Network,
        namespace: &Namespace,
    ) -> io::Result<()> {
        let outside = network.names.host_link.as_str();
        let on_host = with_links(&self.host, async |links| links.index(outside).await)?;
        let inside = with_links(namespace, async |links| links.index(UPLINK).await)?;
        if on_host.is_none() || inside.is_none() {
            with_links(&self.host, async |links| links.delete(outside).await)?;
            with_links(namespace, async |links| {
                links.create_veth(UPLINK, outside, &self.host).await
            })?;
        }
        sysctl::apply(&self.host, &plan.host_sysctls(outside))?;
        with_links(&self.host, async |links| {
            links.set_mtu(outside, plan.mtu).await?;
            links
                .ensure_address(outside, plan.transit_host(), 31)
                .await?;
            links.set_up(outside).await
        })?;
        with_links(namespace, async |links| {
            links.set_mtu(UPLINK, plan.mtu).await?;
            links
                .ensure_address(UPLINK, plan.transit_inside(), 31)
                .await?;
            links.set_up(UPLINK).await?;
            links.ensure_default_route(plan.transit_host()).await
        })?;
        if plan.node_access {
            // It goes with the link.
            with_links(&self.host, async |links| {
                links.ensure_route(plan.cidr, plan.transit_inside()).await
            })?;
        }
        Ok(())
    }

    /// Removes what the kernel has of the network.
    fn tear_down(&self, network: &Network, live: &mut Live) -> Result<(), NetworkError> {
        live.dns = None;
        live.api = None;
        live.table = None;
        live.progress = Progress::Recorded;
        let names = &network.names;
        with_links(&self.host, async |links| {
            links.delete(&names.host_link).await
        })
        .map_err(system(format!("delete link {}", names.host_link)))?;
        netns::delete(&names.namespace).map_err(system(format!(
            "delete network namespace {}",
            names.namespace
        )))
    }

    pub(super) fn attach(
        &self,
        sandbox: &SandboxId,
        id: &NetworkId,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, NetworkError> {
        let (tap, lease) = self.attach_with(sandbox, id, request, tap::open)?;
        Ok(Attachment { tap, lease })
    }

    pub(super) fn attach_parked(
        &self,
        sandbox: &SandboxId,
        id: &NetworkId,
        request: &PodNetworkRequest,
        place: ParkedPlace,
    ) -> Result<Lease, NetworkError> {
        let unpark = |namespace: &Namespace, name: &str| tap::unpark(place, namespace, name);
        let ((), lease) = self.attach_with(sandbox, id, request, unpark)?;
        Ok(lease)
    }

    /// Gives the sandbox an address, and the tap that `provide` makes be there.
    fn attach_with<T>(
        &self,
        sandbox: &SandboxId,
        id: &NetworkId,
        request: &PodNetworkRequest,
        provide: impl FnOnce(&Namespace, &str) -> io::Result<T>,
    ) -> Result<(T, Lease), NetworkError> {
        let network = self
            .network(id)
            .ok_or_else(|| NetworkError::NoNetwork(id.clone()))?;
        let mut live = lock(&network.gate);
        live.check_exists(id)?;
        if !self.is_applied(&network, &live) {
            self.apply(&network, &mut live)?;
        }
        let (lease, is_new) = self.reserve(&mut live, sandbox, request)?;
        let result = self.connect(&network, &lease, is_new, provide);
        match result {
            Ok(tap) => Ok((tap, lease)),
            Err(error) => {
                if is_new && let Err(cleanup) = self.disconnect(&network, &lease) {
                    tracing::warn!(%error, %cleanup, %sandbox, "cannot undo a failed attachment");
                }
                Err(error)
            }
        }
    }

    /// The lease of `sandbox` in memory, and whether it is new.
    fn reserve(
        &self,
        live: &mut Live,
        sandbox: &SandboxId,
        request: &PodNetworkRequest,
    ) -> Result<(Lease, bool), NetworkError> {
        let requested = request.address;
        let plan = self.plan(live)?;
        let spec = &live.record.spec;
        let mut tables = lock(&self.tables);
        let refuse = |address, reason| NetworkError::Address {
            address,
            network: spec.id.clone(),
            reason,
        };
        if let Some(lease) = tables.leases.get(sandbox) {
            if lease.network != spec.id {
                return Err(refuse(
                    lease.address,
                    "the sandbox has it on another network",
                ));
            }
            return match requested {
                Some(address) if address != lease.address => {
                    Err(refuse(address, "the sandbox has another one"))
                }
                _ => Ok((lease.clone(), false)),
            };
        }
        let wanted = match requested {
            Some(IpAddr::V4(address)) => Some(address),
            Some(address @ IpAddr::V6(_)) => return Err(refuse(address, "the network is IPv4")),
            None => None,
        };
        let host_ports = tables.hold(&spec.id, &request.host_ports, &self.config.node_ports)?;
        let taken = tables.taken(&spec.id);
        let address = ipam::choose(plan.cidr, plan.gateway, &taken, live.last, wanted).map_err(
            |refusal| match (refusal, requested) {
                (ipam::Refusal::Address(reason), Some(address)) => refuse(address, reason),
                _ => NetworkError::Exhausted(spec.id.clone()),
            },
        )?;
        if wanted.is_none() {
            live.last = Some(address);
        }
        let lease = Lease {
            sandbox: sandbox.clone(),
            network: spec.id.clone(),
            address: address.into(),
            gateway: plan.gateway.into(),
            mac: mac(sandbox),
            device: tap_name(sandbox),
            mtu: plan.mtu,
            dns: vec![plan.gateway.into()],
            search: vec![format!("svc.{}", spec.domain), spec.domain.clone()],
            prefixes: Vec::new(),
            routes: Vec::new(),
            host_ports,
            bandwidth: request.bandwidth,
        };
        tables.leases.insert(sandbox.clone(), lease.clone());
        Ok((lease, true))
    }

    fn connect<T>(
        &self,
        network: &Network,
        lease: &Lease,
        is_new: bool,
        provide: impl FnOnce(&Namespace, &str) -> io::Result<T>,
    ) -> Result<T, NetworkError> {
        let sandbox = &lease.sandbox;
        if is_new {
            self.records
                .put_lease(lease)
                .map_err(system(format!("record the lease of sandbox {sandbox}")))?;
        }
        let connect = || {
            let namespace = open_namespace(network)?;
            let pod = pod_plan(lease)?;
            let tap = provide(&namespace, &pod.device)?;
            firewall::apply(&namespace, &pod_rules(&pod))?;
            apply_pod(&namespace, &pod)?;
            self.open_ports(network, &namespace, lease)?;
            Ok(tap)
        };
        connect().map_err(system(format!(
            "attach sandbox {sandbox} to network {}",
            lease.network
        )))
    }

    pub(super) fn detach(&self, sandbox: &SandboxId) -> Result<(), NetworkError> {
        let find = || lock(&self.tables).leases.get(sandbox).cloned();
        let Some(lease) = find() else { return Ok(()) };
        let Some(network) = self.network(&lease.network) else {
            return self.forget(&lease);
        };
        let _live = lock(&network.gate);
        // Another call may have been first.
        match find() {
            Some(lease) => self.disconnect(&network, &lease),
            None => Ok(()),
        }
    }

    fn disconnect(&self, network: &Network, lease: &Lease) -> Result<(), NetworkError> {
        let disconnect = || {
            self.close_ports(network, lease)?;
            let Some(namespace) = Namespace::open(&network.names.namespace)? else {
                return Ok(());
            };
            let pod = pod_plan(lease)?;
            // The link first: without its rules it must not be up.
            with_links(&namespace, async |links| {
                links.delete(&pod.device).await?;
                links.delete(&pod.outlet()).await
            })?;
            if firewall::has_table(&namespace, "netdev", "pods")? {
                firewall::apply(&namespace, &pod_removal_rules(&pod))?;
            }
            Ok(())
        };
        disconnect().map_err(system(format!("detach sandbox {}", lease.sandbox)))?;
        self.forget(lease)
    }

    fn forget(&self, lease: &Lease) -> Result<(), NetworkError> {
        self.records.remove_lease(lease).map_err(system(format!(
            "forget the lease of sandbox {}",
            lease.sandbox
        )))?;
        lock(&self.tables).leases.remove(&lease.sandbox);
        Ok(())
    }
}

pub(super) fn open_namespace(network: &Network) -> io::Result<Namespace> {
    let name = &network.names.namespace;
    Namespace::open(name)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name} does not exist")))
}

fn pod_plan(lease: &Lease) -> io::Result<PodPlan> {
    PodPlan::new(lease).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the lease is not of this driver",
        )
    })
}

/// Sets a pod's tap up, behind its limits. Its rules must be there.
fn apply_pod(namespace: &Namespace, pod: &PodPlan) -> io::Result<()> {
    with_links(namespace, async |links| {
        links.set_mtu(&pod.device, pod.mtu).await?;
        links.ensure_address(&pod.device, pod.gateway, 32).await?;
        shaping::apply(links, pod).await?;
        links.set_up(&pod.device).await?;
        links
            .ensure_neighbour(&pod.device, pod.address, pod.gateway, pod.mac)
            .await
    })
}
