//! What probes and lifecycle hooks do: run a command in a container, or ask the pod at its address.
//!
//! Requests go from the gateway of the pod's network, in the network's own namespace, to the pod's
//! address and nowhere else. What the pod answers is read with limits; its certificate is not
//! looked at, as with a kubelet.

mod grpc;
mod http;

use std::{net::SocketAddr, time::Duration};

use hypernetes_runtime::{ExecConfig, Output};
use hypernetes_telemetry::chain;
use hypernetes_types::{ContainerId, NetworkId};
use k8s_openapi::{
    api::core::v1::{Container, ExecAction, HTTPGetAction, LifecycleHandler, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use tokio::net::TcpStream;

use crate::steps::Node;

/// Bytes of a command's output that are looked at.
const MAX_OUTPUT: usize = 10 * 1024;
/// How probes name themselves.
const USER_AGENT: &str = "kube-probe/1.36";

/// What came of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Success,
    /// Success with something to say about it.
    Warning(String),
    Failure(String),
    /// It could not be found out.
    Error(String),
}

/// The container that is asked, and where it is.
#[derive(Clone)]
pub(crate) struct Subject<'a> {
    pub(crate) node: &'a Node,
    pub(crate) container: &'a Container,
    pub(crate) id: &'a ContainerId,
    /// Network and address of the pod.
    pub(crate) place: Option<(NetworkId, std::net::IpAddr)>,
}

impl Subject<'_> {
    /// Does what a probe says, within its timeout.
    pub(crate) async fn probe(&self, probe: &Probe) -> Verdict {
        let seconds = probe.timeout_seconds.unwrap_or(1).max(1);
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(1));
        if let Some(exec) = &probe.exec {
            self.exec(exec, limit).await
        } else if let Some(get) = &probe.http_get {
            self.http_get(get, limit).await
        } else if let Some(tcp) = &probe.tcp_socket {
            match self.port(&tcp.port) {
                Ok(port) => self.tcp(port, limit).await,
                Err(message) => Verdict::Error(message),
            }
        } else if let Some(grpc) = &probe.grpc {
            let service = grpc.service.as_deref().unwrap_or_default();
            match u16::try_from(grpc.port) {
                Ok(port) => grpc::check(self, port, service, limit).await,
                Err(_range) => Verdict::Error(format!("invalid port number: {}", grpc.port)),
            }
        } else {
            Verdict::Error(format!(
                "missing probe handler for container {}",
                self.container.name
            ))
        }
    }

    /// Does what a hook says, within `limit`. The error is for the log alone: answers can hold secrets.
    pub(crate) async fn hook(
        &self,
        hook: &LifecycleHandler,
        limit: Duration,
    ) -> Result<(), String> {
        let verdict = if let Some(exec) = &hook.exec {
            self.exec(exec, limit).await
        } else if let Some(get) = &hook.http_get {
            self.http_get(get, limit).await
        } else if let Some(sleep) = &hook.sleep {
            let wanted = Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0));
            tokio::time::sleep(wanted.min(limit)).await;
            return Ok(());
        } else if hook.tcp_socket.is_some() {
            // Deprecated and without effect upstream.
            return Err("TCP hooks are not supported".to_owned());
        } else {
            return Err("invalid handler".to_owned());
        };
        match verdict {
            Verdict::Success | Verdict::Warning(_) => Ok(()),
            Verdict::Failure(message) | Verdict::Error(message) => Err(message),
        }
    }

    async fn exec(&self, exec: &ExecAction, limit: Duration) -> Verdict {
        let command = exec.command.clone().unwrap_or_default();
        let shown = command.join(" ");
        let work = async {
            let config = ExecConfig {
                command,
                tty: false,
                stdin: false,
            };
            let mut session = self.node.runtime.exec(self.id, config).await?;
            let mut text = Vec::new();
            while let Some(Output::Stdout(piece) | Output::Stderr(piece)) =
                session.output.recv().await
            {
                let room = MAX_OUTPUT - text.len();
                text.extend_from_slice(&piece[..piece.len().min(room)]);
            }
            Ok::<_, hypernetes_runtime::RuntimeError>((session.exit.await, text))
        };
        // Dropping the session kills the process.
        match tokio::time::timeout(limit, work).await {
            Err(_late) => Verdict::Failure(format!(
                "command timed out: {shown:?} timed out after {}s",
                limit.as_secs()
            )),
            Ok(Err(error)) => Verdict::Error(chain(&error).to_string()),
            Ok(Ok((Err(_lost), _))) => Verdict::Error("the command's end was lost".to_owned()),
            Ok(Ok((Ok(Err(error)), _))) => Verdict::Error(chain(&error).to_string()),
            Ok(Ok((Ok(Ok(0)), _))) => Verdict::Success,
            Ok(Ok((Ok(Ok(_code)), text))) => {
                Verdict::Failure(String::from_utf8_lossy(&text).into_owned())
            }
        }
    }

    async fn http_get(&self, get: &HTTPGetAction, limit: Duration) -> Verdict {
        match self.port(&get.port) {
            Ok(port) => http::get(self, get, port, limit).await,
            Err(message) => Verdict::Error(message),
        }
    }

    async fn tcp(&self, port: u16, limit: Duration) -> Verdict {
        match tokio::time::timeout(limit, self.dial(port)).await {
            Ok(Ok(_stream)) => Verdict::Success,
            Ok(Err(message)) => Verdict::Failure(message),
            Err(_late) => Verdict::Failure(format!("dial tcp {}: i/o timeout", self.shown(port))),
        }
    }

    /// Opens a connection to the pod; the error is in Go's words.
    async fn dial(&self, port: u16) -> Result<TcpStream, String> {
        let Some((network, address)) = &self.place else {
            return Err("the pod has no address".to_owned());
        };
        let to = SocketAddr::new(*address, port);
        let connected = self.node.networks.dial(network, to).await;
        connected.map_err(|error| {
            let mut cause: &dyn std::error::Error = &error;
            while let Some(next) = cause.source() {
                cause = next;
            }
            let io = cause.downcast_ref::<std::io::Error>();
            let why = match io.map(std::io::Error::kind) {
                Some(std::io::ErrorKind::ConnectionRefused) => "connect: connection refused".into(),
                Some(std::io::ErrorKind::HostUnreachable) => "connect: no route to host".into(),
                _ => cause.to_string(),
            };
            format!("dial tcp {to}: {why}")
        })
    }

    fn shown(&self, port: u16) -> String {
        match &self.place {
            Some((_, address)) => SocketAddr::new(*address, port).to_string(),
            None => format!(":{port}"),
        }
    }

    /// A port by number, or by the name that the container gives it.
    fn port(&self, port: &IntOrString) -> Result<u16, String> {
        let number = match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::String(name) => self
                .container
                .ports
                .iter()
                .flatten()
                .find(|port| port.name.as_deref() == Some(name))
                .map(|port| port.container_port)
                .or_else(|| name.parse().ok()),
        };
        let valid = number.and_then(|number| u16::try_from(number).ok());
        valid.filter(|port| *port > 0).ok_or_else(|| match port {
            IntOrString::Int(number) => format!("invalid port number: {number}"),
            IntOrString::String(name) => format!("couldn't find port: {name}"),
        })
    }
}
