//! A Kubernetes API of recorded objects: what is there is listed, what is posted is kept, and a pod runs as
//! soon as nothing holds it. No node, no containers: for what hyper asks and how it prints answers.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{Method, StatusCode, Uri},
    response::{IntoResponse as _, Response},
};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

const WORLD: &str = include_str!("../golden/world.json");

/// Lines of the log of every container: stream, seconds from now, text.
const LOG: [(&str, i64, &str); 3] = [
    ("Stdout", -200, "hello"),
    ("Stderr", -150, "oops"),
    ("Stdout", -50, "bye"),
];

type Objects = Arc<Mutex<BTreeMap<String, Value>>>;

fn ago(seconds: i64) -> String {
    (Timestamp::now() + SignedDuration::from_secs(seconds))
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string()
}

/// `@-300` is 300 seconds ago.
fn dated(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Some(seconds) = text.strip_prefix('@').and_then(|t| t.parse().ok()) {
                *text = ago(seconds);
            }
        }
        Value::Array(all) => all.iter_mut().for_each(dated),
        Value::Object(map) => map.values_mut().for_each(dated),
        _ => {}
    }
}

/// Serves on loopback until the process ends, and gives the address.
pub(crate) fn serve() -> String {
    let mut world: Value = serde_json::from_str(WORLD).unwrap();
    dated(&mut world);
    let objects: BTreeMap<String, Value> = serde_json::from_value(world).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let app = Router::new()
                .fallback(answer)
                .with_state(Arc::new(Mutex::new(objects)));
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            axum::serve(listener, app).await.unwrap();
        });
    });
    format!("http://{address}")
}

fn status(code: u16, reason: &str, message: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message});
    (StatusCode::from_u16(code).unwrap(), body.to_string()).into_response()
}

fn parameter(uri: &Uri, key: &str) -> Option<String> {
    let pairs = uri.query()?.split('&');
    let found = pairs
        .filter_map(|pair| pair.split_once('='))
        .find(|(name, _)| *name == key)?;
    Some(
        found
            .1
            .replace("%2F", "/")
            .replace("%3D", "=")
            .replace("%3A", ":"),
    )
}

/// Whether an object is asked for by these selectors.
fn selected(object: &Value, uri: &Uri) -> bool {
    let name = parameter(uri, "fieldSelector")
        .and_then(|text| text.strip_prefix("metadata.name=").map(ToOwned::to_owned));
    let labels = parameter(uri, "labelSelector").unwrap_or_default();
    name.is_none_or(|name| object["metadata"]["name"] == name)
        && labels
            .split(',')
            .filter(|term| !term.is_empty())
            .all(|term| match term.split_once('=') {
                Some((key, value)) => object["metadata"]["labels"][key] == value,
                None => object["metadata"]["labels"][term].is_string(),
            })
}

/// The node's part: a pod that nothing holds runs, one with a deadline has ended.
fn live(pod: &mut Value) {
    let gated = pod["spec"]["schedulingGates"]
        .as_array()
        .is_some_and(|gates| !gates.is_empty());
    let over = pod["spec"]["activeDeadlineSeconds"].is_number();
    let (phase, state) = match (gated, over) {
        (true, _) => (
            "Pending",
            json!({"waiting": {"reason": "ContainerCreating"}}),
        ),
        (_, true) => (
            "Failed",
            json!({"terminated": {"exitCode": 137, "startedAt": ago(-2), "finishedAt": ago(0)}}),
        ),
        _ => ("Running", json!({"running": {"startedAt": ago(-2)}})),
    };
    let containers = pod["spec"]["containers"].as_array().unwrap();
    let statuses: Vec<Value> = containers
        .iter()
        .map(|c| json!({"name": c["name"], "image": c["image"], "imageID": "", "ready": phase == "Running", "restartCount": 0, "state": state}))
        .collect();
    pod["status"] = json!({"phase": phase, "containerStatuses": statuses});
    let paused = pod["metadata"]["annotations"]["hypernetes.io/paused"] == "true";
    if paused {
        pod["status"]["conditions"] = json!([{"type": "hypernetes.io/Paused", "status": "True"}]);
    }
}

fn merge(into: &mut Value, change: &Value) {
    match change {
        Value::Object(map) => {
            if !into.is_object() {
                *into = json!({});
            }
            for (key, value) in map {
                if value.is_null() {
                    into.as_object_mut().unwrap().remove(key);
                } else {
                    merge(&mut into[key], value);
                }
            }
        }
        other => *into = other.clone(),
    }
}

fn log(uri: &Uri) -> String {
    let number = |key| parameter(uri, key).and_then(|text| text.parse::<i64>().ok());
    let since: Option<Timestamp> = parameter(uri, "sinceTime").and_then(|t| t.parse().ok());
    let stream = parameter(uri, "stream");
    let mut lines: Vec<String> = LOG
        .iter()
        .filter(|(name, ..)| stream.as_ref().is_none_or(|stream| stream == name))
        .map(|(_, when, text)| (ago(*when), text))
        .filter(|(time, _)| since.is_none_or(|since| time.parse::<Timestamp>().unwrap() >= since))
        .map(|(time, text)| format!("{time} {text}\n"))
        .collect();
    if let Some(tail) = number("tailLines") {
        let from = lines.len().saturating_sub(usize::try_from(tail).unwrap());
        lines.drain(..from);
    }
    lines.concat()
}

async fn answer(State(objects): State<Objects>, method: Method, uri: Uri, body: Bytes) -> Response {
    let path = uri.path().trim_end_matches('/').to_owned();
    if parameter(&uri, "watch").is_some_and(|value| value != "false") {
        // Whoever watches is told to look again.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}});
        return Body::from(format!("{gone}\n")).into_response();
    }
    let mut objects = objects
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let missing = || status(404, "NotFound", &format!("{path} not found"));
    let is_pod = path.contains("/pods");
    match method {
        Method::GET if path.ends_with("/log") => log(&uri).into_response(),
        Method::GET => {
            if let Some(object) = objects.get(&path) {
                return object.to_string().into_response();
            }
            // A collection has a plural name after its namespace.
            if path.split('/').rev().nth(1) != Some("acme") {
                return missing();
            }
            let prefix = format!("{path}/");
            let items: Vec<&Value> = objects
                .iter()
                .filter(|(key, _)| {
                    key.strip_prefix(&prefix)
                        .is_some_and(|rest| !rest.contains('/'))
                })
                .map(|(_, object)| object)
                .filter(|object| selected(object, &uri))
                .collect();
            json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})
                .to_string()
                .into_response()
        }
        Method::POST => {
            let Ok(mut object) = serde_json::from_slice::<Value>(&body) else {
                return status(400, "BadRequest", "no JSON");
            };
            let Some(name) = object["metadata"]["name"].as_str().map(ToOwned::to_owned) else {
                return missing();
            };
            let key = format!("{path}/{name}");
            if objects.contains_key(&key) {
                return status(409, "AlreadyExists", &format!("\"{name}\" already exists"));
            }
            let uid = format!("00000000-0000-4000-8000-{:012}", objects.len());
            object["metadata"]["namespace"] = "acme".into();
            object["metadata"]["uid"] = uid.into();
            object["metadata"]["creationTimestamp"] = ago(-2).into();
            if is_pod {
                live(&mut object);
                objects.insert("/posted".to_owned(), object.clone());
            }
            objects.insert(key, object.clone());
            (StatusCode::CREATED, object.to_string()).into_response()
        }
        Method::PATCH | Method::PUT => {
            let Some(object) = objects.get_mut(&path) else {
                return missing();
            };
            merge(object, &serde_json::from_slice(&body).unwrap());
            if is_pod {
                live(object);
            }
            object.to_string().into_response()
        }
        Method::DELETE => match objects.remove(&path) {
            Some(object) => object.to_string().into_response(),
            None => missing(),
        },
        _ => status(405, "MethodNotAllowed", "not recorded"),
    }
}
