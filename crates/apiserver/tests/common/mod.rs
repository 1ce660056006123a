//! A server in memory and a client that speaks HTTP to it without a socket.
#![allow(dead_code, reason = "each test file uses a part")]

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hypernetes_apiserver::{ApiBody, ApiServer, ApiServerConfig, ApiService};
use hypernetes_identity::User;
use hypernetes_store::{Store, StoreConfig};
use serde_json::{Value, json};
use tower::Service as _;

/// A server in memory.
pub(crate) struct Cluster {
    pub(crate) server: ApiServer,
    pub(crate) store: Store,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut ApiServerConfig)) -> Self {
        let store = Store::in_memory(StoreConfig::default()).unwrap();
        let mut config = ApiServerConfig::new(store.clone());
        change(&mut config);
        let server = ApiServer::new(config).await.unwrap();
        Self { server, store }
    }

    /// Somebody who may do everything.
    pub(crate) fn admin(&self) -> Client {
        self.client(User::system("admin"))
    }

    pub(crate) fn client(&self, user: User) -> Client {
        Client {
            service: self.server.service_as(user),
        }
    }

    /// Somebody without credentials.
    pub(crate) fn nobody(&self) -> Client {
        Client {
            service: self.server.service(),
        }
    }

    /// A namespace of a tenant with its role bindings, as the tenant controller makes them.
    pub(crate) async fn tenant(&self, name: &str) {
        let admin = self.admin();
        admin
            .create(
                "/api/v1/namespaces",
                &json!({"metadata": {"name": name, "labels": {"hypernetes.io/tenant": name}}}),
            )
            .await
            .expect(201);
        for role in ["admin", "edit", "view"] {
            let binding = json!({
                "metadata": {"name": format!("hypernetes-tenant-{role}")},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                    "name": format!("hypernetes-tenant-{role}")},
                "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io",
                    "name": format!("hypernetes:tenant:{name}:{role}")}],
            });
            let path = format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{name}/rolebindings");
            admin.create(&path, &binding).await.expect(201);
        }
    }

    /// A member of a tenant.
    pub(crate) fn member(&self, tenant: &str, role: &str) -> Client {
        let group = format!("hypernetes:tenant:{tenant}:{role}");
        self.client(User::authenticated(format!("{tenant}-{role}"), [group]))
    }
}

#[derive(Clone)]
pub(crate) struct Client {
    service: ApiService,
}

/// An answer that has been read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
    pub(crate) value: Value,
}

impl Answer {
    /// Panics unless the code is this.
    #[track_caller]
    pub(crate) fn expect(self, code: u16) -> Value {
        assert_eq!(self.code, code, "{}", self.text);
        self.value
    }

    /// Panics unless this is a failure with this code, reason and message.
    #[track_caller]
    pub(crate) fn refused(self, code: u16, reason: &str, message: &str) {
        assert_eq!(
            (
                self.code,
                self.value["reason"].as_str(),
                self.value["message"].as_str()
            ),
            (code, Some(reason), Some(message)),
            "{}",
            self.text
        );
        assert_eq!(self.value["kind"], "Status");
        assert_eq!(self.value["status"], "Failure");
    }
}

impl Client {
    pub(crate) async fn send(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Response<ApiBody> {
        let mut request = Request::builder()
            .method(method.parse::<Method>().unwrap())
            .uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        match self.service.clone().call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }

    pub(crate) async fn ask(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let response = self.send(method, target, headers, body).await;
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let value = serde_json::from_str(&text).unwrap_or_default();
        Answer {
            code: parts.status.as_u16(),
            headers: parts.headers,
            text,
            value,
        }
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        self.ask("GET", target, &[], "").await
    }

    pub(crate) async fn create(&self, target: &str, object: &Value) -> Answer {
        self.ask(
            "POST",
            target,
            &[("content-type", "application/json")],
            object.to_string(),
        )
        .await
    }

    pub(crate) async fn put(&self, target: &str, object: &Value) -> Answer {
        self.ask(
            "PUT",
            target,
            &[("content-type", "application/json")],
            object.to_string(),
        )
        .await
    }

    pub(crate) async fn delete(&self, target: &str) -> Answer {
        self.ask("DELETE", target, &[], "").await
    }

    /// A patch; `form` is `merge`, `json` or `strategic-merge`.
    pub(crate) async fn patch(&self, target: &str, form: &str, patch: &Value) -> Answer {
        let media_type = match form {
            "apply" => "application/apply-patch+yaml".to_owned(),
            form => format!("application/{form}-patch+json"),
        };
        self.ask(
            "PATCH",
            target,
            &[("content-type", &media_type)],
            patch.to_string(),
        )
        .await
    }

    /// Opens a watch.
    pub(crate) async fn watch(&self, target: &str) -> Events {
        self.watch_as(target, &[]).await
    }

    pub(crate) async fn watch_as(&self, target: &str, headers: &[(&str, &str)]) -> Events {
        let response = self.send("GET", target, headers, "").await;
        assert_eq!(response.status(), StatusCode::OK);
        Events {
            body: response.into_body(),
            waiting: Vec::new(),
        }
    }
}

/// The lines of a watch.
pub(crate) struct Events {
    body: ApiBody,
    waiting: Vec<u8>,
}

impl Events {
    /// The next event; panics when none comes.
    pub(crate) async fn next(&mut self) -> Value {
        self.next_or_end().await.expect("the watch goes on")
    }

    /// The next event; `None` at the end of the watch.
    pub(crate) async fn next_or_end(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.waiting.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.waiting.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = tokio::time::timeout(std::time::Duration::from_secs(20), self.body.frame());
            let frame = frame.await.expect("an event comes in time")?;
            if let Ok(data) = frame.unwrap().into_data() {
                self.waiting.extend_from_slice(&data);
            }
        }
    }

    /// Type and name of the next event.
    pub(crate) async fn next_name(&mut self) -> (String, String) {
        let event = self.next().await;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (
            text(&event["type"]),
            text(&event["object"]["metadata"]["name"]),
        )
    }
}

pub(crate) fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": value}})
}

pub(crate) fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "a", "image": "example.org/a:1"}]}})
}
