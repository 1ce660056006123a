//! Which address a pod gets.
//!
//! Addresses are handed out in turn, so that one that was freed is not given to the next pod
//! while peers still have it in their caches.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

/// Why an address cannot be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A reason for the asker.
    Address(&'static str),
    /// All are taken.
    Exhausted,
}

/// Chooses an address of `cidr`: `requested` if it is free, or else the first free one after
/// `last`, which is where the previous choice was.
pub(crate) fn choose(
    cidr: Ipv4Net,
    gateway: Ipv4Addr,
    taken: &BTreeSet<Ipv4Addr>,
    last: Option<Ipv4Addr>,
    requested: Option<Ipv4Addr>,
) -> Result<Ipv4Addr, Refusal> {
    let (first, end) = (u32::from(cidr.network()) + 1, u32::from(cidr.broadcast()));
    if let Some(address) = requested {
        if !cidr.contains(&address) {
            return Err(Refusal::Address("it is outside the network"));
        }
        if !(first..end).contains(&u32::from(address)) {
            return Err(Refusal::Address(
                "it is the network's own or broadcast address",
            ));
        }
        if address == gateway {
            return Err(Refusal::Address("it is the gateway's"));
        }
        if taken.contains(&address) {
            return Err(Refusal::Address("it is taken"));
        }
        return Ok(address);
    }
    let start = last
        .map(|address| u32::from(address) + 1)
        .filter(|next| (first..end).contains(next))
        .unwrap_or(first);
    (start..end)
        .chain(first..start)
        .map(Ipv4Addr::from)
        // Ends after at most `taken.len() + 2` steps, however large the network.
        .find(|address| *address != gateway && !taken.contains(address))
        .ok_or(Refusal::Exhausted)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

    fn cidr() -> Ipv4Net {
        "10.0.0.0/29".parse().unwrap()
    }

    #[test]
    fn freed_address_comes_last() {
        let mut taken = BTreeSet::new();
        let mut last = None;
        for host in 2..=6 {
            let address = choose(cidr(), GATEWAY, &taken, last, None).unwrap();
            assert_eq!(address, Ipv4Addr::new(10, 0, 0, host));
            taken.insert(address);
            last = Some(address);
            if host == 3 {
                taken.remove(&Ipv4Addr::new(10, 0, 0, 2));
            }
        }
        assert_eq!(
            choose(cidr(), GATEWAY, &taken, last, None),
            Ok(Ipv4Addr::new(10, 0, 0, 2))
        );
        taken.insert(Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!(
            choose(cidr(), GATEWAY, &taken, last, None),
            Err(Refusal::Exhausted)
        );
    }

    #[test]
    fn requested_address_is_honoured_or_refused() {
        let taken = BTreeSet::from([Ipv4Addr::new(10, 0, 0, 5)]);
        let ask = |host| {
            choose(
                cidr(),
                GATEWAY,
                &taken,
                None,
                Some(Ipv4Addr::new(10, 0, 0, host)),
            )
        };
        assert_eq!(ask(6), Ok(Ipv4Addr::new(10, 0, 0, 6)));
        for host in [0, 1, 5, 7, 9] {
            assert!(matches!(ask(host), Err(Refusal::Address(_))), "{host}");
        }
    }

    proptest! {
        #[test]
        fn choice_is_always_free_and_inside(hosts in proptest::collection::btree_set(0u8..32, 0..32),
                                            last in proptest::option::of(any::<u32>())) {
            let cidr: Ipv4Net = "10.0.0.0/27".parse().unwrap();
            let taken: BTreeSet<_> = hosts.iter().map(|h| Ipv4Addr::new(10, 0, 0, *h)).collect();
            match choose(cidr, GATEWAY, &taken, last.map(Ipv4Addr::from), None) {
                Ok(address) => {
                    prop_assert!(!taken.contains(&address) && address != GATEWAY);
                    prop_assert!(cidr.contains(&address));
                    prop_assert!(address != cidr.network() && address != cidr.broadcast());
                }
                Err(_) => prop_assert!((2..31).all(|h| taken.contains(&Ipv4Addr::new(10, 0, 0, h)))),
            }
        }
    }
}
