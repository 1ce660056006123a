//! Subresources of pods: logs, exec, attach, port-forward, binding, eviction.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use hyper::upgrade::OnUpgrade;
use hypernetes_apimachinery::{Status, kinds, meta};
use hypernetes_streaming::{
    LogRequest, LogSource, PodStreams, ProcessRequest, Target, Wire, negotiate_port_forward,
    negotiate_process, port_forward, remote_command,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    body::{self, ApiBody},
    engine::{Call, DeleteOptions, Deleted, Engine, Expected, decode_body, dry_run},
    query::Query,
    rbac::Action,
    service::Slot,
    status::{self, Result},
};

/// What the subresources of pods work with.
pub(crate) struct Pods<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) streams: Option<&'a Arc<dyn PodStreams>>,
    pub(crate) call: &'a Call,
}

impl Pods<'_> {
    fn streams(&self) -> Result<Arc<dyn PodStreams>> {
        self.streams
            .cloned()
            .ok_or_else(|| Status::unavailable("this API server has no node to stream from"))
    }

    fn pod(&self) -> Result<Value> {
        let info = &self.call.info;
        self.engine
            .find(self.call.kind, &info.namespace, &info.name)
            .map(|(_, pod)| pod)
    }

    fn target(&self, pod: &Value, container: String) -> Target {
        Target {
            namespace: self.call.info.namespace.clone(),
            pod: self.call.info.name.clone(),
            uid: meta::uid(pod).unwrap_or_default().to_owned(),
            container,
        }
    }

    /// `log`.
    pub(crate) async fn log(&self, slot: Slot) -> Result<Response<ApiBody>> {
        let pod = self.pod()?;
        let request = log_request(&self.call.query, &self.call.info.name)?;
        let container = container_of(&pod, self.call.query.get("container").unwrap_or_default())?;
        if pod["spec"]["nodeName"]
            .as_str()
            .unwrap_or_default()
            .is_empty()
        {
            // Upstream: a pod without a node has an empty log.
            return Ok(body::text(200, ""));
        }
        let target = self.target(&pod, container);
        let log = self
            .streams()?
            .logs(&target, request)
            .await
            .map_err(|error| status::of_stream(&error, &self.call.info.name))?;
        let shutdown = self.engine.shutdown.clone();
        Ok(body::stream(
            "text/plain; charset=utf-8",
            log,
            shutdown,
            slot,
        ))
    }

    /// `exec` and `attach`.
    pub(crate) async fn process(
        &self,
        request: &mut Request<()>,
        slot: Slot,
    ) -> Result<Response<ApiBody>> {
        self.check_connect()?;
        let pod = self.pod()?;
        let query = &self.call.query;
        let exec = self.call.info.subresource == "exec";
        let process = process_request(query, exec, &self.call.info.name)?;
        let container = container_of(&pod, query.get("container").unwrap_or_default())?;
        has_node(&pod)?;
        let wire = negotiate_process(request.headers()).map_err(|error| rejected(&error))?;
        let on_upgrade = upgrade_of(request)?;
        self.engine.admit_connect(self.call, &pod)?;
        let target = self.target(&pod, container);
        let streams = self.streams()?;
        let session = if exec {
            streams.exec(&target, process.clone()).await
        } else {
            streams.attach(&target, process.clone()).await
        };
        let session = session.map_err(|error| status::of_stream(&error, &self.call.info.name))?;
        let response = switched(&wire);
        let shutdown = self.engine.shutdown.clone();
        self.engine.tasks.spawn(async move {
            let _open = slot;
            tokio::select! {
                () = remote_command::serve(on_upgrade, wire, process, session) => {}
                () = shutdown.cancelled() => {}
            }
        });
        Ok(response)
    }

    /// `portforward`.
    pub(crate) async fn port_forward(
        &self,
        request: &mut Request<()>,
        slot: Slot,
    ) -> Result<Response<ApiBody>> {
        self.check_connect()?;
        let pod = self.pod()?;
        has_node(&pod)?;
        let wire = negotiate_port_forward(request.headers()).map_err(|error| rejected(&error))?;
        let mut ports = Vec::new();
        for text in self
            .call
            .query
            .all("ports")
            .flat_map(|ports| ports.split(','))
        {
            let port: u16 = text.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
                Status::bad_request(format!("unable to parse {text:?} as a port"))
            })?;
            ports.push(port);
        }
        let on_upgrade = upgrade_of(request)?;
        self.engine.admit_connect(self.call, &pod)?;
        let target = self.target(&pod, String::new());
        let streams = self.streams()?;
        let connect: port_forward::Connect = Arc::new(move |port| {
            let (streams, target) = (Arc::clone(&streams), target.clone());
            Box::pin(async move { streams.port_forward(&target, port).await })
        });
        let response = switched(&wire);
        let shutdown = self.engine.shutdown.clone();
        self.engine.tasks.spawn(async move {
            let _open = slot;
            tokio::select! {
                () = port_forward::serve(on_upgrade, wire, ports, connect) => {}
                () = shutdown.cancelled() => {}
            }
        });
        Ok(response)
    }

    /// A WebSocket comes as GET, but it does what `create` stands for (as upstream since 1.35).
    fn check_connect(&self) -> Result<()> {
        let action = Action {
            verb: "create",
            ..Action::of(&self.call.info)
        };
        self.engine.authorizer.check(&self.call.user, &action)
    }

    /// `binding`.
    pub(crate) async fn bind(&self, bytes: &Bytes) -> Result<Response<ApiBody>> {
        let call = self.call;
        let expected = Expected {
            group: "",
            version: "v1",
            kind: "Binding",
        };
        let (binding, _) = decode_body(bytes, &call.headers, &call.query, expected)?;
        let node = binding["target"]["name"].as_str().unwrap_or_default();
        if node.is_empty() {
            return Err(Status::bad_request("target.name is required"));
        }
        let now = meta::format_time((self.engine.clock)());
        loop {
            let (entry, mut pod) =
                self.engine
                    .find(call.kind, &call.info.namespace, &call.info.name)?;
            let bound = pod["spec"]["nodeName"].as_str().unwrap_or_default();
            if !bound.is_empty() {
                return Err(Status::conflict(
                    "",
                    "pods/binding",
                    &call.info.name,
                    &format!(
                        "pod {} is already assigned to node {bound:?}",
                        call.info.name
                    ),
                ));
            }
            pod["spec"]["nodeName"] = node.into();
            let condition = json!({"type": "PodScheduled", "status": "True",
                "lastProbeTime": null, "lastTransitionTime": now});
            match pod["status"]["conditions"].as_array_mut() {
                Some(conditions) => {
                    conditions.retain(|c| c["type"] != "PodScheduled");
                    conditions.push(condition);
                }
                None => pod["status"]["conditions"] = json!([condition]),
            }
            let dry = dry_run(call.query.all("dryRun"))?;
            if self.engine.overwrite(call, &entry, &pod, dry).await? {
                return Ok(success());
            }
        }
    }

    /// `eviction`.
    pub(crate) async fn evict(&self, bytes: &Bytes) -> Result<Response<ApiBody>> {
        let call = self.call;
        let expected = Expected {
            group: "policy",
            version: "v1",
            kind: "Eviction",
        };
        let (eviction, _) = decode_body(bytes, &call.headers, &call.query, expected)?;
        let mut options = DeleteOptions::of_value(&eviction["deleteOptions"])?;
        options.dry_run |= call.is_dry_run()?;
        self.engine.disrupt(call, &options).await?;
        match self
            .engine
            .delete_object(call, &call.info.namespace, &call.info.name, &options)
            .await?
        {
            Deleted::Gone(_) | Deleted::Lives(_) => Ok(success()),
        }
    }
}

fn success() -> Response<ApiBody> {
    body::json_value(
        201,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    )
}

fn rejected(error: &hypernetes_streaming::Rejected) -> Status {
    Status::bad_request(error.to_string())
}

fn upgrade_of(request: &mut Request<()>) -> Result<OnUpgrade> {
    request
        .extensions_mut()
        .remove::<OnUpgrade>()
        .ok_or_else(|| Status::bad_request("unable to upgrade: the connection does not allow it"))
}

fn switched(wire: &Wire) -> Response<ApiBody> {
    wire.response().map(|()| body::full(""))
}

fn has_node(pod: &Value) -> Result<()> {
    if pod["spec"]["nodeName"]
        .as_str()
        .unwrap_or_default()
        .is_empty()
    {
        let name = meta::name(pod).unwrap_or_default();
        return Err(Status::bad_request(format!(
            "pod {name} does not have a host assigned"
        )));
    }
    Ok(())
}

fn names(pod: &Value, field: &str) -> Vec<String> {
    let containers = pod["spec"][field].as_array().into_iter().flatten();
    containers
        .filter_map(|c| c["name"].as_str())
        .map(str::to_owned)
        .collect()
}

/// The container that is meant; without a name the only one.
fn container_of(pod: &Value, asked: &str) -> Result<String> {
    let name = meta::name(pod).unwrap_or_default();
    let main = names(pod, "containers");
    let init = names(pod, "initContainers");
    let ephemeral = names(pod, "ephemeralContainers");
    if !asked.is_empty() {
        if [&main, &init, &ephemeral]
            .into_iter()
            .flatten()
            .any(|c| c == asked)
        {
            return Ok(asked.to_owned());
        }
        return Err(Status::bad_request(format!(
            "container {asked} is not valid for pod {name}"
        )));
    }
    if let ([only], true, true) = (main.as_slice(), init.is_empty(), ephemeral.is_empty()) {
        return Ok(only.clone());
    }
    let mut message = format!(
        "a container name must be specified for pod {name}, choose one of: [{}]",
        main.join(" ")
    );
    for (list, what) in [
        (&init, "init containers"),
        (&ephemeral, "ephemeral containers"),
    ] {
        if !list.is_empty() {
            message.push_str(&format!(" or one of the {what}: [{}]", list.join(" ")));
        }
    }
    Err(Status::bad_request(message))
}

fn process_request(query: &Query, exec: bool, pod: &str) -> Result<ProcessRequest> {
    let request = ProcessRequest {
        command: if exec {
            query.all("command").map(str::to_owned).collect()
        } else {
            Vec::new()
        },
        stdin: query.flag("stdin"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
        tty: query.flag("tty"),
    };
    let kind = if exec {
        "PodExecOptions"
    } else {
        "PodAttachOptions"
    };
    let invalid = |text: &str| {
        let mut status = Status::invalid("", kind, pod, &[]);
        status.message = format!("{kind} {pod:?} is invalid: {text}");
        Err(status)
    };
    if exec && request.command.is_empty() {
        return invalid("command: Required value");
    }
    if !request.stdin && !request.stdout && !request.stderr {
        return invalid("at least one of stdin, stdout or stderr is required");
    }
    if request.tty && request.stderr {
        return invalid("tty and stderr cannot both be true");
    }
    Ok(request)
}

fn log_request(query: &Query, pod: &str) -> Result<LogRequest> {
    let invalid = |field: &str, value: String, text: &str| {
        let mut status = Status::invalid("", "PodLogOptions", pod, &[]);
        status.message =
            format!("PodLogOptions {pod:?} is invalid: {field}: Invalid value: {value}: {text}");
        status
    };
    let number = |field: &str, least: i64| -> Result<Option<u64>> {
        let Some(value) = query.number::<i64>(field).map_err(Status::bad_request)? else {
            return Ok(None);
        };
        match u64::try_from(value) {
            Ok(number) if value >= least => Ok(Some(number)),
            _ => {
                let text = match least {
                    0 => "must be greater than or equal to 0",
                    _ => "must be greater than 0",
                };
                Err(invalid(field, value.to_string(), text))
            }
        }
    };
    let since_unix_nanos = match query.text("sinceTime") {
        None => None,
        Some(text) => {
            let time: Timestamp = text.parse().map_err(|_error| {
                invalid("sinceTime", format!("{text:?}"), "must be an RFC 3339 time")
            })?;
            i64::try_from(time.as_nanosecond()).ok()
        }
    };
    let source = match query.text("stream") {
        None | Some("" | "All") => None,
        Some("Stdout") => Some(LogSource::Stdout),
        Some("Stderr") => Some(LogSource::Stderr),
        Some(other) => {
            let mut status = Status::invalid("", "PodLogOptions", pod, &[]);
            status.message = format!(
                "PodLogOptions {pod:?} is invalid: stream: Unsupported value: {other:?}: supported \
                 values: \"All\", \"Stderr\", \"Stdout\""
            );
            return Err(status);
        }
    };
    let request = LogRequest {
        source,
        follow: query.flag("follow"),
        previous: query.flag("previous"),
        timestamps: query.flag("timestamps"),
        tail_lines: number("tailLines", 0)?,
        since_seconds: number("sinceSeconds", 1)?,
        since_unix_nanos,
        limit_bytes: number("limitBytes", 1)?,
    };
    if request.since_seconds.is_some() && request.since_unix_nanos.is_some() {
        let mut status = Status::invalid("", "PodLogOptions", pod, &[]);
        status.message = format!(
            "PodLogOptions {pod:?} is invalid: sinceSeconds: Forbidden: at most one of sinceTime or \
             sinceSeconds may be specified"
        );
        return Err(status);
    }
    if request.source.is_some() && request.tail_lines.is_some() {
        let mut status = Status::invalid("", "PodLogOptions", pod, &[]);
        status.message = format!(
            "PodLogOptions {pod:?} is invalid: tailLines: Forbidden: `tailLines` and specific \
             `stream` are mutually exclusive for now"
        );
        return Err(status);
    }
    Ok(request)
}

/// The table's entry for pods.
pub(crate) fn is_pod(kind: &kinds::ResourceKind) -> bool {
    kind.group.is_empty() && kind.plural == "pods"
}

/// How long the node may take to begin a stream.
pub(crate) const BEGIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_container_is_found_or_the_choice_named() {
        let one = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}]}});
        assert_eq!(container_of(&one, "").unwrap(), "a");
        assert_eq!(
            container_of(&one, "x").unwrap_err().message,
            "container x is not valid for pod p"
        );
        let two = json!({"metadata": {"name": "p"},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]}});
        assert_eq!(
            container_of(&two, "").unwrap_err().message,
            "a container name must be specified for pod p, choose one of: [a b] or one of the init \
             containers: [i]"
        );
        assert_eq!(container_of(&two, "i").unwrap(), "i");
    }

    #[test]
    fn options_of_logs_are_checked() {
        let ask = |query: &str| log_request(&Query::parse(query), "p");
        let request =
            ask("follow=true&tailLines=0&limitBytes=5&sinceTime=1970-01-01T00:00:01Z").unwrap();
        assert_eq!(
            (request.follow, request.tail_lines, request.since_unix_nanos),
            (true, Some(0), Some(1_000_000_000))
        );
        assert_eq!(
            ask("tailLines=-1").unwrap_err().message,
            "PodLogOptions \"p\" is invalid: tailLines: Invalid value: -1: must be greater than or \
             equal to 0"
        );
        for bad in [
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceTime=x",
            "sinceSeconds=1&sinceTime=1970-01-01T00:00:01Z",
            "stream=stdout",
            "stream=Stdout&tailLines=1",
        ] {
            assert_eq!(ask(bad).unwrap_err().code, 422, "{bad}");
        }
    }
}
