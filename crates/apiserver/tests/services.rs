//! Addresses of services.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: an integration test is one module, and failures panic"
)]

use std::collections::BTreeSet;

use hypernetes_apiserver::{ApiServer, ApiServerConfig};
use hypernetes_identity::{MASTERS, User};
use hypernetes_store::{Store, StoreConfig};
use k8s_openapi::api::core::v1::{Namespace, Service};
use kube::{
    Api, Client,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams,
    },
};
use serde_json::{Value, json};

async fn client(store: &Store) -> Client {
    let mut config = ApiServerConfig::new(store.clone());
    // Fourteen addresses: one is the API server's.
    config.service_cidr = "10.96.0.0/28".parse().unwrap();
    let server = ApiServer::new(config).await.unwrap();
    let user = User::authenticated("test", [MASTERS.to_owned()]);
    Client::new(server.service_as(user), "default")
}

async fn namespace(client: &Client, name: &str, tenant: bool) {
    let labels = match tenant {
        true => json!({"hypernetes.io/tenant": name}),
        false => json!({}),
    };
    let object: Namespace =
        serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap();
    let api = Api::<Namespace>::all(client.clone());
    api.create(&PostParams::default(), &object).await.unwrap();
}

async fn create(
    client: &Client,
    namespace: &str,
    name: &str,
    spec: &Value,
) -> Result<String, String> {
    let mut spec = spec.clone();
    if spec["ports"].is_null() && spec["type"] != "ExternalName" {
        spec["ports"] = json!([{"port": 80}]);
    }
    let service: Service =
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap();
    let api = Api::<Service>::namespaced(client.clone(), namespace);
    match api.create(&PostParams::default(), &service).await {
        Ok(made) => Ok(made.spec.unwrap().cluster_ip.unwrap_or_default()),
        Err(kube::Error::Api(status)) => Err(status.message.clone()),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn an_address_is_one_service_s_in_its_network() {
    let store = Store::in_memory(StoreConfig::default()).unwrap();
    let client = self::client(&store).await;
    for (name, tenant) in [
        ("acme", true),
        ("globex", true),
        ("one", false),
        ("two", false),
    ] {
        namespace(&client, name, tenant).await;
    }
    // Nobody's namespace with a network of its own.
    namespace(&client, "own", false).await;
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(
        "hypernetes.io",
        "v1alpha1",
        "Network",
    ));
    let network = DynamicObject::new("default", &resource)
        .data(json!({"spec": {"subnets": [{"cidr": "10.1.0.0/24"}]}}));
    let networks = Api::<DynamicObject>::namespaced_with(client.clone(), "own", &resource);
    let made = networks.create(&PostParams::default(), &network).await;
    made.unwrap();
    let want = |address: &str| json!({"clusterIP": address});
    create(&client, "own", "a", &want("10.96.0.5"))
        .await
        .unwrap();
    create(&client, "acme", "a", &want("10.96.0.5"))
        .await
        .unwrap();
    create(&client, "globex", "a", &want("10.96.0.5"))
        .await
        .unwrap();
    create(&client, "one", "a", &want("10.96.0.5"))
        .await
        .unwrap();
    for (namespace, address, why) in [
        ("acme", "10.96.0.5", "provided IP is already allocated"),
        // Namespaces without a tenant share a network.
        ("two", "10.96.0.5", "provided IP is already allocated"),
        ("acme", "10.96.0.1", "provided IP is already allocated"),
        ("acme", "10.96.0.0", "is not in the valid range"),
        (
            "acme",
            "10.97.0.5",
            "The range of valid IPs is 10.96.0.0/28",
        ),
    ] {
        let refused = create(&client, namespace, "b", &want(address)).await;
        let message = refused.unwrap_err();
        assert!(
            message.contains(&format!("failed to allocate IP {address}")) && message.contains(why),
            "{namespace} {address}: {message}"
        );
    }
    // It is free when its service is gone.
    let services = Api::<Service>::namespaced(client.clone(), "acme");
    services
        .delete("a", &DeleteParams::default())
        .await
        .unwrap();
    create(&client, "acme", "b", &want("10.96.0.5"))
        .await
        .unwrap();
    // And when its service is another's name now.
    let patch = json!({"spec": {"type": "ExternalName", "externalName": "x.org"}});
    let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
    let patched = services.patch("b", &params, &patch).await.unwrap();
    assert_eq!(patched.spec.unwrap().cluster_ip, None);
    create(&client, "acme", "c", &want("10.96.0.5"))
        .await
        .unwrap();
    let back = Patch::Merge(json!({"spec": {"type": "ClusterIP", "externalName": null}}));
    let patched = services.patch("b", &params, &back).await.unwrap();
    let address = patched.spec.unwrap().cluster_ip.unwrap();
    assert!(
        address.starts_with("10.96.0.") && address != "10.96.0.5",
        "{address}"
    );
}

#[tokio::test]
async fn a_port_of_the_node_is_one_service_s() {
    let store = Store::in_memory(StoreConfig::default()).unwrap();
    let client = self::client(&store).await;
    for (name, tenant) in [("acme", true), ("one", false), ("two", false)] {
        namespace(&client, name, tenant).await;
    }
    let want =
        |number: u16| json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": number}]});
    create(&client, "one", "a", &want(30080)).await.unwrap();
    for (namespace, spec, why) in [
        (
            "two",
            want(30080),
            "spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated",
        ),
        ("two", want(80), "The range of valid ports is 30000-32767"),
        (
            "two",
            json!({"type": "LoadBalancer", "ports": [{"port": 80, "nodePort": 30081}]}),
            "use type NodePort",
        ),
        (
            "acme",
            want(30081),
            "its object says how many: spec.nodePorts",
        ),
    ] {
        let message = create(&client, namespace, "b", &spec).await.unwrap_err();
        assert!(message.contains(why), "{namespace} {spec}: {message}");
    }
    let services = Api::<Service>::namespaced(client.clone(), "one");
    let node_ports = |service: &Service| -> Vec<Option<i32>> {
        let ports = service.spec.as_ref().unwrap().ports.as_ref().unwrap();
        ports.iter().map(|port| port.node_port).collect()
    };
    // Both protocols of a port have one number, another port another.
    let both = json!({"type": "NodePort", "ports": [
        {"name": "t", "port": 53, "protocol": "TCP"}, {"name": "u", "port": 53, "protocol": "UDP"},
        {"name": "w", "port": 80}]});
    create(&client, "one", "dns", &both).await.unwrap();
    let made = node_ports(&services.get("dns").await.unwrap());
    assert_eq!(made[0], made[1]);
    assert!(made[2].is_some() && made[2] != made[0], "{made:?}");
    // It stays over changes that do not know it, and is free when the type or the service goes.
    let params = PatchParams::default();
    let patch = |spec: Value| Patch::Merge(json!({"spec": spec}));
    let patched = services
        .patch(
            "a",
            &params,
            &patch(json!({"ports": [{"port": 80, "targetPort": 8080}]})),
        )
        .await
        .unwrap();
    assert_eq!(node_ports(&patched), [Some(30080)]);
    let patched = services
        .patch("a", &params, &patch(json!({"type": "ClusterIP"})))
        .await
        .unwrap();
    assert_eq!(node_ports(&patched), [None]);
    create(&client, "two", "b", &want(30080)).await.unwrap();
    let two = Api::<Service>::namespaced(client.clone(), "two");
    two.delete("b", &DeleteParams::default()).await.unwrap();
    let patched = services
        .patch("a", &params, &patch(want(30080)))
        .await
        .unwrap();
    assert_eq!(node_ports(&patched), [Some(30080)]);
}

#[tokio::test]
async fn many_at_once_get_different_addresses_until_none_is_left() {
    let store = Store::in_memory(StoreConfig::default()).unwrap();
    let client = self::client(&store).await;
    namespace(&client, "acme", true).await;
    let names: Vec<String> = (0..20).map(|number| format!("s{number}")).collect();
    let nothing = json!({});
    let made = names
        .iter()
        .map(|name| create(&client, "acme", name, &nothing));
    let results = futures::future::join_all(made).await;
    let addresses: BTreeSet<String> = results.iter().flatten().cloned().collect();
    assert_eq!(addresses.len(), 13, "{results:?}");
    let refused: Vec<_> = results
        .iter()
        .filter_map(|result| result.as_ref().err())
        .collect();
    assert_eq!(refused.len(), 7);
    assert!(refused[0].contains("range is full"), "{refused:?}");
    // Another server of the same store sees the same, and headless services need none.
    let client = self::client(&store).await;
    assert!(create(&client, "acme", "more", &nothing).await.is_err());
    let headless = create(&client, "acme", "more", &json!({"clusterIP": "None"})).await;
    assert_eq!(headless.unwrap(), "None");
    let api = Api::<Service>::default_namespaced(client);
    let spec = api.get("kubernetes").await.unwrap().spec.unwrap();
    assert_eq!(spec.cluster_ip.as_deref(), Some("10.96.0.1"));
}
