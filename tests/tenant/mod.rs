//! What a tenant does with a daemon by kubectl.

use std::{io::Write as _, path::Path, process::Stdio, time::Duration};

use hypernetes_testkit::{Daemon, eventually, stdout};
use serde_json::{Value, json};

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// One tenant's view of a daemon.
pub(crate) struct Tenant<'a> {
    pub(crate) daemon: &'a Daemon,
    pub(crate) kubeconfig: &'a Path,
}

impl Tenant<'_> {
    pub(crate) fn get(&self, args: &[&str]) -> String {
        stdout(&mut self.daemon.kubectl_as(self.kubeconfig, args))
    }

    pub(crate) fn create(&self, object: &Value) {
        let mut command = self
            .daemon
            .kubectl_as(self.kubeconfig, &["create", "-f", "-"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(object.to_string().as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success());
    }

    pub(crate) fn pod(&self, name: &str) -> Value {
        serde_json::from_str(&self.get(&["get", "pod", name, "-o", "json"])).unwrap()
    }

    /// A clone, by what the API has of its source: the annotation that names the source, and its spec.
    pub(crate) fn clone_of(
        &self,
        (annotation, source): (&str, &str),
        mut spec: Value,
        name: &str,
        change: impl Fn(&mut Value),
    ) {
        spec.as_object_mut().unwrap().remove("nodeName");
        change(&mut spec);
        self.create(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "annotations": {annotation: source}},
            "spec": spec,
        }));
    }

    pub(crate) fn ready(&self, name: &str) {
        let pod = format!("pod/{name}");
        self.get(&["wait", "--for=condition=Ready", &pod, "--timeout=240s"]);
    }

    pub(crate) fn exec(&self, pod: &str, program: &str) -> String {
        self.get(&["exec", pod, "--", "sh", "-c", program])
    }

    pub(crate) fn log(&self, pod: &str) -> Vec<u64> {
        let text = self.get(&["logs", pod]);
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    /// Numbers, each once, and ever more of them.
    pub(crate) fn counts(&self, pod: &str) -> u64 {
        let before = self.log(pod).len();
        eventually("it counts on", PATIENCE, || {
            let now = self.log(pod).len();
            (now > before + 5)
                .then_some(())
                .ok_or(format!("{now} after {before}"))
        });
        let all = self.log(pod);
        let expected: Vec<u64> = (all[0]..).take(all.len()).collect();
        assert_eq!(
            all, expected,
            "no number of {pod} is missing and none comes twice"
        );
        all[0]
    }

    pub(crate) fn waiting(&self, pod: &str) -> Value {
        eventually("why it waits", PATIENCE, || {
            let now = self.pod(pod);
            let waiting = &now["status"]["containerStatuses"][0]["state"]["waiting"];
            match waiting["reason"] == "CloneError" {
                true => Ok(waiting["message"].clone()),
                false => Err(now["status"].to_string()),
            }
        })
    }
}
