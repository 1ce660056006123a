//! Services of a network: what its namespace's tables and its name server are told.

use std::{io, net::Ipv4Addr, sync::Arc};

use hypernetes_types::NetworkId;
use ipnet::{IpNet, Ipv4Net};
use tokio::sync::mpsc;

use super::{Inner, lock, network::Live, ports::node_ports, system};
use crate::{
    Backends, HeldPort, NetworkError, NetworkServices, conntrack, firewall,
    netns::Namespace,
    plan::{
        NetworkPlan, SERVICES_TABLE, hairpin_element, service_table, services_base,
        services_change, services_takeover,
    },
};

use super::api::{ApiConnection, ApiListener};

/// Connections that wait for the API server.
const WAITING: usize = 64;

impl Inner {
    pub(super) fn set_services(
        &self,
        id: &NetworkId,
        services: NetworkServices,
    ) -> Result<(), NetworkError> {
        let network = self
            .network(id)
            .ok_or_else(|| NetworkError::NoNetwork(id.clone()))?;
        let mut live = lock(&network.gate);
        live.check_exists(id)?;
        if live.record.services == services && live.table.is_some() {
            return Ok(());
        }
        let plan = self.plan(&live)?;
        range_of(&services, &plan, id)?;
        let range_is_new = live.record.services.range != services.range;
        let names_are_new = live.record.services.names != services.names;
        live.record.services = services;
        self.put_record(&network, &live)?;
        if !self.is_applied(&network, &live) {
            return self.apply(&network, &mut live);
        }
        let namespace = super::network::open_namespace(&network)
            .map_err(system(format!("open network {id}")))?;
        let failed = |what: &str| system(format!("{what} of network {id}"));
        if range_is_new || live.table.is_none() {
            self.take_over_services(&plan, &namespace, &mut live)
                .map_err(failed("set the services"))?;
        } else {
            let new = service_table(&plan, &live.record.services.ports);
            let change = services_change(live.table.as_ref().unwrap_or(&new), &new);
            if !change.script.is_empty() {
                // If it fails, what the kernel has is asked of it the next time.
                live.table = None;
                firewall::apply(&namespace, &change.script)
                    .map_err(failed("change the services"))?;
                live.table = Some(new);
            }
            conntrack::forget(&namespace, &change.ended).map_err(failed("end flows"))?;
        }
        self.listen_for_api(&plan, &namespace, &mut live)
            .map_err(failed("listen for the API server"))?;
        let ports = live.table.as_ref().map(node_ports).unwrap_or_default();
        self.forward_services(&network, id, ports)
            .map_err(failed("forward ports of the node to services"))?;
        if names_are_new || range_is_new {
            self.tell_names(&live);
        }
        Ok(())
    }

    /// Makes the namespace's services as recorded, in one transaction, whatever it has.
    pub(super) fn take_over_services(
        &self,
        plan: &NetworkPlan,
        namespace: &Namespace,
        live: &mut Live,
    ) -> io::Result<()> {
        live.table = None;
        let held: Vec<(Ipv4Addr, HeldPort)> = lock(&self.tables).held(&live.record.spec.id);
        let range = match live.record.services.range {
            Some(IpNet::V4(range)) => Some(range),
            _ => None,
        };
        let table = service_table(plan, &live.record.services.ports);
        let mut script = services_base(plan, range, &held);
        let (chains, sets) = firewall::names(namespace, "ip", SERVICES_TABLE)?;
        script.push_str(&services_takeover(&chains, &sets, &table));
        script.push_str("flush set ip services hairpins\n");
        for pod in lock(&self.tables).pods(&live.record.spec.id) {
            script.push_str(&format!(
                "add element ip services hairpins {{ {} }}\n",
                hairpin_element(pod.address)
            ));
        }
        firewall::apply(namespace, &script)?;
        live.table = Some(table);
        Ok(())
    }

    /// Where the API server is among the services, takes connections for it.
    pub(super) fn listen_for_api(
        &self,
        plan: &NetworkPlan,
        namespace: &Namespace,
        live: &mut Live,
    ) -> io::Result<()> {
        let wanted = (live.record.services.ports.iter()).any(|port| port.backends == Backends::Api);
        let Some(sender) = lock(&self.api).clone().filter(|_sender| wanted) else {
            live.api = None;
            return Ok(());
        };
        if live.api.as_ref().is_none_or(|api| !api.is_running()) {
            let id = live.record.spec.id.clone();
            live.api = Some(ApiListener::start(namespace, plan.gateway, id, sender)?);
        }
        Ok(())
    }

    /// Connections of pods to the API server, from now on.
    pub(super) fn api_connections(&self) -> mpsc::Receiver<ApiConnection> {
        let (sender, receiver) = mpsc::channel(WAITING);
        *lock(&self.api) = Some(Arc::new(sender));
        receiver
    }
}

/// The range, if it can be this network's.
fn range_of(
    services: &NetworkServices,
    plan: &NetworkPlan,
    id: &NetworkId,
) -> Result<Option<Ipv4Net>, NetworkError> {
    let invalid = |rule: String| NetworkError::Spec {
        network: id.clone(),
        field: "services.range",
        rule,
    };
    match services.range {
        None => Ok(None),
        Some(IpNet::V6(_)) => Err(invalid("must be IPv4".to_owned())),
        Some(IpNet::V4(range))
            if range.contains(&plan.cidr)
                || plan.cidr.contains(&range)
                || range.contains(&plan.pool)
                || plan.pool.contains(&range) =>
        {
            Err(invalid(format!(
                "{range} must not overlap the network's {} or {}",
                plan.cidr, plan.pool
            )))
        }
        Some(IpNet::V4(range)) => Ok(Some(range)),
    }
}
