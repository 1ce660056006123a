//! What every driver must do, as a test.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed check is a failed test"
)]

use std::net::IpAddr;

use hypernetes_types::{NetworkId, SandboxId};

use crate::{
    Backends, NameRecord, NetworkDriver, NetworkError, NetworkServices, NetworkSpec,
    PodNetworkRequest, Protocol, ServicePort,
};

/// A small network of that name; all have the same addresses.
pub fn spec(id: &str) -> NetworkSpec {
    NetworkSpec {
        id: id.parse().unwrap(),
        cidr: "10.77.0.0/29".parse().unwrap(),
        gateway: "10.77.0.1".parse().unwrap(),
        egress: true,
        node_access: false,
        mtu: 1500,
        domain: "cluster.local".to_owned(),
    }
}

/// A pod that wants nothing in particular.
fn any() -> PodNetworkRequest {
    PodNetworkRequest::default()
}

/// Runs the suite on a driver that has no networks, and leaves it without.
///
/// # Panics
/// When the driver does not conform.
pub async fn check(driver: &dyn NetworkDriver) {
    let (red, blue) = (spec("red.default"), spec("blue.default"));
    assert_eq!(driver.list_networks().await.unwrap(), []);
    unknown_things(driver).await;
    for _again in 0..2 {
        driver.ensure_network(&red).await.unwrap();
    }
    driver.ensure_network(&blue).await.unwrap();
    let listed = driver.list_networks().await.unwrap();
    assert!(
        listed.len() == 2 && listed.contains(&red) && listed.contains(&blue),
        "{listed:?}"
    );

    leases(driver, &red.id, &blue.id).await;
    changes(driver, &red).await;

    let names = vec![NameRecord {
        name: "web.red.svc.cluster.local".to_owned(),
        address: "10.77.0.3".parse().unwrap(),
    }];
    for _again in 0..2 {
        driver.set_names(&red.id, names.clone()).await.unwrap();
    }
    let services = NetworkServices {
        range: Some("10.96.0.0/16".parse().unwrap()),
        ports: vec![ServicePort {
            address: "10.96.0.9".parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            affinity: Some(60),
            backends: Backends::Endpoints(vec!["10.77.0.3:8080".parse().unwrap()]),
            node_port: None,
        }],
        names: Vec::new(),
    };
    for services in [services.clone(), services, NetworkServices::default()] {
        driver.set_services(&red.id, services).await.unwrap();
    }

    let (kept, dead) = (SandboxId::random(), SandboxId::random());
    let lease = driver.attach(&kept, &red.id, &any()).await.unwrap().lease;
    drop(driver.attach(&dead, &red.id, &any()).await.unwrap());
    for _again in 0..2 {
        driver.recover(std::slice::from_ref(&kept)).await.unwrap();
        assert_eq!(driver.lease(&kept).await.unwrap().as_ref(), Some(&lease));
        assert_eq!(driver.lease(&dead).await.unwrap(), None);
    }
    assert!(matches!(
        driver.delete_network(&red.id).await,
        Err(NetworkError::InUse { pods: 1, .. })
    ));
    driver.detach(&kept).await.unwrap();
    for network in [&red.id, &red.id, &blue.id] {
        driver.delete_network(network).await.unwrap();
    }
    assert_eq!(driver.list_networks().await.unwrap(), []);
    driver.recover(&[]).await.unwrap();
}

async fn unknown_things(driver: &dyn NetworkDriver) {
    let (nobody, nowhere) = (SandboxId::random(), "nowhere".parse::<NetworkId>().unwrap());
    driver.detach(&nobody).await.unwrap();
    driver.delete_network(&nowhere).await.unwrap();
    assert_eq!(driver.lease(&nobody).await.unwrap(), None);
    let refused = driver.attach(&nobody, &nowhere, &any()).await;
    assert!(matches!(refused, Err(NetworkError::NoNetwork(id)) if id == nowhere));
    let refused = driver.set_names(&nowhere, Vec::new()).await;
    assert!(matches!(refused, Err(NetworkError::NoNetwork(_))));
    let refused = driver
        .set_services(&nowhere, NetworkServices::default())
        .await;
    assert!(matches!(refused, Err(NetworkError::NoNetwork(_))));
    let mut impossible = spec("impossible");
    impossible.gateway = "10.78.0.1".parse().unwrap();
    let refused = driver.ensure_network(&impossible).await;
    assert!(matches!(
        refused,
        Err(NetworkError::Spec {
            field: "gateway",
            ..
        })
    ));
    assert_eq!(driver.list_networks().await.unwrap(), []);
}

async fn leases(driver: &dyn NetworkDriver, red: &NetworkId, blue: &NetworkId) {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let requested = |text: &str| PodNetworkRequest {
        address: Some(address(text)),
        ..any()
    };
    let pods: Vec<_> = std::iter::repeat_with(SandboxId::random).take(5).collect();
    let first = driver
        .attach(&pods[0], red, &requested("10.77.0.5"))
        .await
        .unwrap();
    assert_eq!(first.lease.address, address("10.77.0.5"));
    let lease = first.lease;
    // The descriptor is given up, as by a VMM that ended.
    drop(first.tap);
    assert_eq!(
        driver.attach(&pods[0], red, &any()).await.unwrap().lease,
        lease
    );
    assert_eq!(driver.lease(&pods[0]).await.unwrap(), Some(lease.clone()));
    for taken in [
        "10.77.0.5",
        "10.77.0.1",
        "10.77.0.0",
        "10.77.0.7",
        "10.78.0.2",
        "fd00::2",
    ] {
        let refused = driver.attach(&pods[1], red, &requested(taken)).await;
        assert!(
            matches!(refused, Err(NetworkError::Address { .. })),
            "{taken}"
        );
        assert_eq!(driver.lease(&pods[1]).await.unwrap(), None);
    }
    assert!(
        driver.attach(&pods[0], blue, &any()).await.is_err(),
        "one network per sandbox"
    );
    let twin = driver
        .attach(&pods[1], blue, &requested("10.77.0.5"))
        .await
        .unwrap();
    assert_eq!(
        twin.lease.address, lease.address,
        "networks have addresses of their own"
    );
    assert_ne!(twin.lease.mac, lease.mac);

    let mut addresses = vec![lease.address];
    for pod in &pods[2..] {
        addresses.push(driver.attach(pod, red, &any()).await.unwrap().lease.address);
    }
    let last = SandboxId::random();
    addresses.push(
        driver
            .attach(&last, red, &any())
            .await
            .unwrap()
            .lease
            .address,
    );
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 5, "{addresses:?}");
    let refused = driver.attach(&SandboxId::random(), red, &any()).await;
    assert!(matches!(refused, Err(NetworkError::Exhausted(_))));
    for pod in pods.iter().chain([&last]) {
        for _again in 0..2 {
            driver.detach(pod).await.unwrap();
        }
        assert_eq!(driver.lease(pod).await.unwrap(), None);
    }
}

async fn changes(driver: &dyn NetworkDriver, red: &NetworkSpec) {
    let pod = SandboxId::random();
    drop(driver.attach(&pod, &red.id, &any()).await.unwrap());
    let mut closed = red.clone();
    closed.egress = false;
    driver.ensure_network(&closed).await.unwrap();
    let mut moved = red.clone();
    moved.gateway = "10.77.0.6".parse().unwrap();
    assert!(matches!(
        driver.ensure_network(&moved).await,
        Err(NetworkError::InUse { .. })
    ));
    driver.detach(&pod).await.unwrap();
    driver.ensure_network(&moved).await.unwrap();
    assert!(driver.list_networks().await.unwrap().contains(&moved));
    driver.ensure_network(red).await.unwrap();
}
