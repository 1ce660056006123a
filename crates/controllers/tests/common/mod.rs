//! A server in memory with the controllers of workloads, and a node that is none: it says of pods
//! what a test wants of them.

use std::{sync::Arc, time::Duration};

use hypernetes_apimachinery::usage::UsageBoard;
use hypernetes_apiserver::{ApiServer, ApiServerConfig};
use hypernetes_controllers::ControllersConfig;
use hypernetes_identity::{User, WORKLOAD_CONTROLLERS};
use hypernetes_store::{Store, StoreConfig};
use hypernetes_volume::LocalVolumes;
use kube::Client;
use serde_json::{Value, json};
use tokio::{sync::Mutex, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) usage: UsageBoard,
    /// Keeps volumes, 1 GiB at most.
    pub(crate) driver: LocalVolumes,
    _dir: tempfile::TempDir,
    server: ApiServer,
    controllers: Mutex<(CancellationToken, JoinHandle<()>)>,
    node: JoinHandle<()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.node.abort();
    }
}

fn start_controllers(
    server: &ApiServer,
    driver: LocalVolumes,
) -> (CancellationToken, JoinHandle<()>) {
    let stop = CancellationToken::new();
    let client = |name: &str, group: &str| {
        let user = User::authenticated(name, [group.to_owned()]);
        Client::new(server.service_as(user), "default")
    };
    let config = ControllersConfig {
        client: client("system:controllers", "system:masters"),
        networks: None,
        workloads: Some(client("system:workloads", WORKLOAD_CONTROLLERS)),
        volumes: Some(Arc::new(driver)),
        ca_pem: "ca".into(),
    };
    let token = stop.clone();
    let task = tokio::spawn(async move { hypernetes_controllers::run(config, token).await });
    (stop, task)
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let store = Store::in_memory(StoreConfig::default()).unwrap();
        let mut config = ApiServerConfig::new(store);
        config.node_name = Some("n1".into());
        let usage = config.usage.clone();
        let server = ApiServer::new(config).await.unwrap();
        let client = Client::new(server.service_as(User::system("test")), "default");
        let dir = tempfile::tempdir().unwrap();
        let driver = LocalVolumes::open(dir.path().join("volumes"), Some(1 << 30))
            .await
            .unwrap();
        let controllers = Mutex::new(start_controllers(&server, driver.clone()));
        let node = tokio::spawn(node(client.clone()));
        let cluster = Self {
            client,
            usage,
            driver,
            _dir: dir,
            server,
            controllers,
            node,
        };
        let node = json!({"metadata": {"name": "n1"}});
        cluster.create("/api/v1/nodes", &node).await;
        cluster
    }

    /// Ends the controllers wherever they are, and begins with new ones.
    pub(crate) async fn restart(&self) {
        let mut controllers = self.controllers.lock().await;
        controllers.1.abort();
        *controllers = start_controllers(&self.server, self.driver.clone());
    }

    async fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> kube::Result<Value> {
        let media_type = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", media_type)
            .body(body.into_bytes())
            .unwrap();
        self.client.request(request).await
    }

    pub(crate) async fn try_create(&self, path: &str, object: &Value) -> kube::Result<Value> {
        self.ask("POST", path, Some(object)).await
    }

    pub(crate) async fn create(&self, path: &str, object: &Value) -> Value {
        self.try_create(path, object).await.unwrap()
    }

    pub(crate) async fn patch(&self, path: &str, patch: &Value) -> Value {
        self.ask("PATCH", path, Some(patch)).await.unwrap()
    }

    pub(crate) async fn delete(&self, path: &str) {
        self.ask("DELETE", path, None).await.unwrap();
    }

    /// The object; null if it is not there.
    pub(crate) async fn get(&self, path: &str) -> Value {
        match self.ask("GET", path, None).await {
            Ok(object) => object,
            Err(kube::Error::Api(status)) if status.code == 404 => Value::Null,
            Err(error) => panic!("{path}: {error}"),
        }
    }

    pub(crate) async fn list(&self, path: &str) -> Vec<Value> {
        let list = self.get(path).await;
        list["items"].as_array().cloned().unwrap_or_default()
    }

    /// Waits until the object is as wanted; panics with what it is when it does not become so.
    #[track_caller]
    pub(crate) fn wait<'a>(
        &'a self,
        path: &'a str,
        wanted: impl Fn(&Value) -> bool + 'a,
    ) -> impl Future<Output = Value> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let end = tokio::time::Instant::now() + PATIENCE;
            loop {
                let is = self.get(path).await;
                if wanted(&is) {
                    return is;
                }
                assert!(
                    tokio::time::Instant::now() < end,
                    "{caller}: {path} is {is:#}"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Waits until a list has so many objects.
    #[track_caller]
    pub(crate) fn wait_count<'a>(
        &'a self,
        path: &'a str,
        many: usize,
    ) -> impl Future<Output = Vec<Value>> + 'a {
        let waiting = self.wait(path, move |list| {
            list["items"].as_array().map_or(0, Vec::len) == many
        });
        async move { waiting.await["items"].as_array().unwrap().clone() }
    }
}

pub(crate) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

pub(crate) fn names(objects: &[Value]) -> Vec<&str> {
    objects.iter().map(name).collect()
}

/// Makes every pod run at once, unless its annotation `test/phase` says something else; and lets go what is to end.
async fn node(client: Client) {
    let client = Arc::new(client);
    loop {
        let request = http::Request::get("/api/v1/pods").body(Vec::new()).unwrap();
        if let Ok(list) = client.request::<Value>(request).await {
            for pod in list["items"].as_array().into_iter().flatten() {
                settle(&client, pod).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn settle(client: &Client, pod: &Value) {
    let path = format!(
        "/api/v1/namespaces/{}/pods/{}",
        pod["metadata"]["namespace"].as_str().unwrap(),
        name(pod)
    );
    if pod["metadata"]["deletionTimestamp"].is_string() {
        if pod["metadata"]["deletionGracePeriodSeconds"] != 0 {
            let body = json!({"gracePeriodSeconds": 0}).to_string().into_bytes();
            let request = http::Request::delete(&path)
                .header("content-type", "application/json")
                .body(body)
                .unwrap();
            drop(client.request::<Value>(request).await);
        }
        return;
    }
    let wanted = pod["metadata"]["annotations"]["test/phase"]
        .as_str()
        .unwrap_or("Running");
    if pod["status"]["phase"] == wanted {
        return;
    }
    let ready = if wanted == "Running" { "True" } else { "False" };
    let patch = json!({"status": {"phase": wanted, "conditions": [
        {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    let request = http::Request::patch(format!("{path}/status"))
        .header("content-type", "application/merge-patch+json")
        .body(patch.to_string().into_bytes())
        .unwrap();
    drop(client.request::<Value>(request).await);
}
