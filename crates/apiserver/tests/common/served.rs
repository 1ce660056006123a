//! A server on loopback, and the real kubectl for it.
#![allow(dead_code, reason = "each test file uses a part")]

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use hypernetes_apiserver::{ApiServerConfig, tls_config};
use hypernetes_identity::{Authority, Kubeconfig};
use tokio::{io::AsyncWriteExt, net::TcpListener, process::Command};
use tokio_util::sync::CancellationToken;

use crate::common::Cluster;

/// The path of a kubectl release, installed if needed. `None`: it cannot be had here.
pub(crate) async fn release(version: &str) -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/tools/kubectl");
    let output = Command::new(script).arg(version).output().await.unwrap();
    if !output.status.success() {
        println!(
            "SKIP: kubectl {version}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        return None;
    }
    Some(String::from_utf8(output.stdout).unwrap().trim().into())
}

pub(crate) struct Kubectl {
    pub(crate) binary: PathBuf,
    pub(crate) home: tempfile::TempDir,
    pub(crate) config: PathBuf,
}

pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Kubectl {
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(args)
            .env("KUBECONFIG", &self.config)
            .env("HOME", self.home.path())
            .current_dir(self.home.path())
            .kill_on_drop(true);
        command
    }

    pub(crate) async fn run(&self, args: &[&str]) -> Said {
        self.run_with(args, "").await
    }

    pub(crate) async fn run_with(&self, args: &[&str], stdin: &str) -> Said {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(stdin.as_bytes())
            .await
            .unwrap();
        let output = tokio::time::timeout(Duration::from_secs(120), child.wait_with_output());
        let output = output.await.expect("kubectl ends").unwrap();
        Said {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Standard output of a command that must succeed.
    #[track_caller]
    pub(crate) fn ok<'a>(&'a self, args: &'a [&'a str]) -> impl Future<Output = String> + 'a {
        self.ok_with(args, "")
    }

    #[track_caller]
    pub(crate) fn ok_with<'a>(
        &'a self,
        args: &'a [&'a str],
        stdin: &'a str,
    ) -> impl Future<Output = String> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let said = self.run_with(args, stdin).await;
            assert_eq!(
                said.code, 0,
                "{caller}: kubectl {args:?}\n{}\n{}",
                said.out, said.err
            );
            assert!(
                !said.err.contains("Warning"),
                "{caller}: kubectl {args:?}\n{}",
                said.err
            );
            said.out.trim_end().to_owned()
        }
    }
}

/// A server on loopback with its kubeconfig for an administrator.
pub(crate) struct Served {
    pub(crate) cluster: Cluster,
    pub(crate) authority: Authority,
    pub(crate) address: String,
    pki: tempfile::TempDir,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Served {
    pub(crate) async fn start(change: impl FnOnce(&mut ApiServerConfig)) -> Self {
        let cluster = Cluster::start_with(change).await;
        let pki = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(&pki.path().join("pki")).unwrap();
        let serving = authority.serving(&[]).unwrap();
        let tls = Arc::new(tls_config(&authority, &serving).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let (server, stop) = (cluster.server.clone(), shutdown.clone());
        let task = tokio::spawn(async move { server.serve_tls(listener, tls, stop).await });
        Self {
            cluster,
            authority,
            address,
            pki,
            shutdown,
            task,
        }
    }

    pub(crate) fn kubectl(
        &self,
        binary: &Path,
        user: &str,
        group: &str,
        namespace: &str,
    ) -> Kubectl {
        let life = Duration::from_secs(3600);
        let credentials = self
            .authority
            .client(user, &[group.to_owned()], life)
            .unwrap();
        let config = self.pki.path().join(format!("{user}.kubeconfig"));
        Kubeconfig {
            server: &format!("https://{}", self.address),
            context: "test",
            user,
            namespace,
            authority: &self.authority,
            credentials: &credentials,
        }
        .write(&config)
        .unwrap();
        Kubectl {
            binary: binary.to_owned(),
            home: tempfile::tempdir().unwrap(),
            config,
        }
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        let stopped = tokio::time::timeout(Duration::from_secs(20), self.task);
        stopped.await.expect("the server stops").unwrap().unwrap();
    }
}
