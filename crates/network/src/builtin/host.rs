//! What all networks share on the host: forwarding, the table that keeps them apart, transit links.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

use super::{Inner, lock, system};
use crate::{
    NetworkError, firewall,
    links::with_links,
    netns,
    plan::{HOST_LINK_PREFIX, host_link_prefix, host_ruleset, host_table},
    record::HostRecord,
    sysctl,
};

const IP_FORWARD: &str = "ipv4/ip_forward";

/// What is known of the host.
#[derive(Debug, Default)]
pub(super) struct HostState {
    /// This process has made it as it should be.
    applied: bool,
}

/// The first /31 of `pool` that neither another network has nor an address of the host is in.
/// Where the search begins depends on the instance, so that two daemons seldom want the same.
pub(super) fn choose_transit(
    pool: Ipv4Net,
    instance: &str,
    taken: &BTreeSet<Ipv4Net>,
    in_use: &[Ipv4Net],
) -> Option<Ipv4Net> {
    let first = u32::from(pool.network());
    let count = 1_u32 << (31 - u32::from(pool.prefix_len()).min(31));
    let digest = Sha256::digest(instance);
    let start = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) % count;
    (0..count)
        .map(|step| (start + step) % count)
        .map(|index| Ipv4Net::new_assert(Ipv4Addr::from(first + index * 2), 31))
        .find(|link| {
            !taken.contains(link)
                && !in_use
                    .iter()
                    .any(|net| net.contains(link) || link.contains(net))
        })
}

impl Inner {
    /// Networks that the host has an address in.
    pub(super) fn host_addresses(&self) -> Result<Vec<Ipv4Net>, NetworkError> {
        let addresses = with_links(&self.host, async |links| links.addresses().await)
            .map_err(system("list the host's addresses"))?;
        Ok(addresses
            .into_iter()
            .filter_map(|(address, length)| Ipv4Net::new(address, length).ok())
            .map(|net| net.trunc())
            .collect())
    }

    /// Makes the host route between networks and the outside, and nothing else.
    pub(super) fn ensure_host(&self) -> Result<(), NetworkError> {
        let mut state = lock(&self.host_gate);
        if state.applied {
            return Ok(());
        }
        let record = || {
            if self.records.host()?.is_none() {
                self.records.put_host(&HostRecord {
                    ip_forward: sysctl::get(&self.host, IP_FORWARD)?,
                    netns_dir: netns::dir_state()?,
                })?;
            }
            Ok(())
        };
        record().map_err(system("record how the host was"))?;
        netns::ensure_dir().map_err(system(format!("prepare {}", netns::NETNS_DIR)))?;
        // Rules before routing.
        firewall::apply(
            &self.host,
            &host_ruleset(
                &self.config.instance,
                self.config.transit,
                &self.known_forwards(),
            ),
        )
        .map_err(system("load the host's rules"))?;
        sysctl::set(&self.host, IP_FORWARD, "1").map_err(system("enable IPv4 forwarding"))?;
        state.applied = true;
        Ok(())
    }

    /// Makes the host as it was, if there is no network.
    pub(super) fn release_host(&self) -> Result<(), NetworkError> {
        let mut state = lock(&self.host_gate);
        if !lock(&self.tables).networks.is_empty() {
            return Ok(());
        }
        state.applied = false;
        let table = host_table(&self.config.instance);
        if firewall::has_table(&self.host, "inet", &table).map_err(system("list nft tables"))? {
            firewall::apply(&self.host, &format!("delete table inet {table}\n"))
                .map_err(system(format!("delete nft table {table}")))?;
        }
        let Some(record) = self
            .records
            .host()
            .map_err(system("read how the host was"))?
        else {
            return Ok(());
        };
        let others = with_links(&self.host, async |links| links.list(HOST_LINK_PREFIX).await)
            .map_err(system("list the host's links"))?;
        // Another daemon's networks still need it.
        if others.is_empty() {
            sysctl::set(&self.host, IP_FORWARD, &record.ip_forward)
                .map_err(system("restore IPv4 forwarding"))?;
        }
        netns::restore_dir(record.netns_dir)
            .map_err(system(format!("restore {}", netns::NETNS_DIR)))?;
        self.records
            .remove_host()
            .map_err(system("forget how the host was"))
    }

    /// Removes links of this instance that are not in `known`.
    pub(super) fn sweep_links(&self, known: &BTreeSet<&str>) -> Result<(), NetworkError> {
        let prefix = host_link_prefix(&self.config.instance);
        with_links(&self.host, async |links| {
            for name in links.list(&prefix).await? {
                if !known.contains(name.as_str()) {
                    tracing::info!(link = name, "removing an unknown link");
                    links.delete(&name).await?;
                }
            }
            Ok(())
        })
        .map_err(system("remove unknown links of the host"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transit_links_are_distinct_and_not_the_hosts() {
        let pool: Ipv4Net = "100.64.0.0/29".parse().unwrap();
        let host = ["100.64.0.2/32".parse().unwrap()];
        let mut taken = BTreeSet::new();
        for _link in 0..3 {
            let link = choose_transit(pool, "ab12", &taken, &host).unwrap();
            assert!(pool.contains(&link) && !link.contains(&host[0]), "{link}");
            assert!(taken.insert(link));
        }
        assert_eq!(choose_transit(pool, "ab12", &taken, &host), None);
        assert_eq!(
            choose_transit(pool, "ab12", &BTreeSet::new(), &[pool.supernet().unwrap()]),
            None
        );
    }
}
