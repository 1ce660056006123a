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
    api::{DeleteParams, Patch, PatchParams, PostParams},
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
    let want = |address: &str| json!({"clusterIP": address});
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
