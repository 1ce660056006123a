use clap::Parser as _;
use serde_json::{Value, json};

use super::*;
use crate::cli::{Cli, Command, ContainerCommand};

fn parse(args: &[&str]) -> Result<Plan> {
    let cli = Cli::try_parse_from(["hyper", "run"].iter().chain(args)).map_err(Failure::usage)?;
    let Command::Container(command) = cli.command else {
        panic!("run")
    };
    let ContainerCommand::Run(run) = *command else {
        panic!("run")
    };
    let identity = Identity {
        name: run
            .create
            .name
            .clone()
            .unwrap_or_else(|| "calm_turing".to_owned()),
        id: "0123456789abcdef".repeat(4),
        created: "2026-01-02T03:04:05Z".parse().unwrap(),
        detached: run.detach,
    };
    plan(&run.create, &identity)
}

/// What a part of the pod is for a command line.
fn at(args: &[&str], pointer: &str) -> Value {
    let plan = parse(args).unwrap_or_else(|error| panic!("{args:?}: {error}"));
    plan.pod.pointer(pointer).cloned().unwrap_or(Value::Null)
}

#[test]
fn a_plain_container_is_a_plain_pod() {
    let plan = parse(&["busybox", "echo", "-n", "hi"]).unwrap();
    assert_eq!(
        plan.pod,
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "calm-turing",
                "labels": {"hyper.hypernetes.io/name": "calm_turing"},
                "annotations": {
                    "hyper.hypernetes.io/id": "0123456789abcdef".repeat(4),
                    "hyper.hypernetes.io/created": "2026-01-02T03:04:05Z",
                    "hyper.hypernetes.io/restart": "no",
                },
            },
            "spec": {
                "restartPolicy": "Never", "terminationGracePeriodSeconds": 10, "hostname": "0123456789ab",
                "automountServiceAccountToken": false, "enableServiceLinks": false,
                "containers": [{"name": "calm-turing", "image": "busybox", "imagePullPolicy": "IfNotPresent", "args": ["echo", "-n", "hi"]}],
            },
        })
    );
}

#[test]
fn every_flag_has_its_field() {
    const C: &str = "/spec/containers/0";
    let container = |field: &str| format!("{C}/{field}");
    for (flags, pointer, value) in [
        (
            &["-e", "A=1", "-e", "B=$(x)"][..],
            container("env"),
            json!([{"name": "A", "value": "1"}, {"name": "B", "value": "$$(x)"}]),
        ),
        (&["-w", "/srv"], container("workingDir"), json!("/srv")),
        (&["-i", "-t"], container("stdinOnce"), json!(true)),
        (&["-dit"], container("stdinOnce"), json!(false)),
        (&["-t"], container("tty"), json!(true)),
        (
            &["--entrypoint", "/bin/x"],
            container("command"),
            json!(["/bin/x"]),
        ),
        (
            &["-u", "1000:100"],
            container("securityContext"),
            json!({"runAsUser": 1000, "runAsGroup": 100}),
        ),
        (
            &["--read-only"],
            container("securityContext"),
            json!({"readOnlyRootFilesystem": true}),
        ),
        (
            &["--cap-add", "cap_net_admin", "--cap-drop", "ALL"],
            container("securityContext/capabilities"),
            json!({"add": ["NET_ADMIN"], "drop": ["ALL"]}),
        ),
        (
            &["--security-opt", "no-new-privileges"],
            container("securityContext"),
            json!({"allowPrivilegeEscalation": false}),
        ),
        (
            &["--security-opt", "seccomp=unconfined"],
            container("securityContext"),
            json!({"seccompProfile": {"type": "Unconfined"}}),
        ),
        (
            &["-m", "64m", "--cpus", "1.5"],
            container("resources/limits"),
            json!({"memory": "67108864", "cpu": "1500m"}),
        ),
        (
            &["--memory-reservation", "1g"],
            container("resources/requests"),
            json!({"memory": "1073741824"}),
        ),
        (
            &["--pull", "always"],
            container("imagePullPolicy"),
            json!("Always"),
        ),
        (
            &["--pull", "never"],
            container("imagePullPolicy"),
            json!("Never"),
        ),
        (
            &["--expose", "80"],
            container("ports"),
            json!([{"containerPort": 80, "protocol": "TCP"}]),
        ),
        (
            &["-p", "8080:80"],
            container("ports"),
            json!([{"containerPort": 80, "protocol": "TCP"}]),
        ),
        (
            &["--stop-signal", "quit"],
            container("lifecycle"),
            json!({"stopSignal": "SIGQUIT"}),
        ),
        (
            &["--health-cmd", "true", "--health-interval", "5s"],
            container("readinessProbe"),
            json!({"exec": {"command": ["/bin/sh", "-c", "true"]}, "periodSeconds": 5, "timeoutSeconds": 30, "initialDelaySeconds": 0, "failureThreshold": 3}),
        ),
        (
            &["-v", "/data"],
            "/spec/volumes".to_owned(),
            json!([{"name": "volume-0", "emptyDir": {}}]),
        ),
        (
            &["-v", "data:/data:ro"],
            "/spec/volumes".to_owned(),
            json!([{"name": "volume-0", "persistentVolumeClaim": {"claimName": "data"}}]),
        ),
        (
            &["-v", "data:/data:ro"],
            container("volumeMounts"),
            json!([{"name": "volume-0", "mountPath": "/data", "readOnly": true}]),
        ),
        (
            &["--tmpfs", "/run:size=1m"],
            "/spec/volumes".to_owned(),
            json!([{"name": "volume-0", "emptyDir": {"medium": "Memory", "sizeLimit": "1048576"}}]),
        ),
        (
            &["--mount", "type=tmpfs,dst=/t,tmpfs-size=1m"],
            "/spec/volumes".to_owned(),
            json!([{"name": "volume-0", "emptyDir": {"medium": "Memory", "sizeLimit": "1048576"}}]),
        ),
        (
            &["--shm-size", "1m"],
            container("volumeMounts"),
            json!([{"name": "volume-0", "mountPath": "/dev/shm"}]),
        ),
        (
            &["--restart", "always"],
            "/spec/restartPolicy".to_owned(),
            json!("Always"),
        ),
        (
            &["--restart", "unless-stopped"],
            "/spec/restartPolicy".to_owned(),
            json!("Always"),
        ),
        (
            &["--restart", "on-failure:3"],
            "/spec/restartPolicy".to_owned(),
            json!("OnFailure"),
        ),
        (
            &["--restart", "on-failure:3"],
            "/metadata/annotations/hypernetes.io~1max-restarts".to_owned(),
            json!("3"),
        ),
        (
            &["--rm"],
            "/metadata/annotations/hyper.hypernetes.io~1auto-remove".to_owned(),
            json!("true"),
        ),
        (
            &["--network", "blue"],
            "/metadata/annotations/hypernetes.io~1network".to_owned(),
            json!("blue"),
        ),
        (
            &["--kernel", "debian"],
            "/metadata/annotations/hypernetes.io~1kernel".to_owned(),
            json!("debian"),
        ),
        (
            &["-l", "app=web", "-l", "say=two words"],
            "/metadata/labels".to_owned(),
            json!({"app": "web", "hyper.hypernetes.io/name": "calm_turing"}),
        ),
        (
            &["-l", "say=two words"],
            "/metadata/annotations/hyper.hypernetes.io~1labels".to_owned(),
            json!("{\"say\":\"two words\"}"),
        ),
        (&["-h", "box"], "/spec/hostname".to_owned(), json!("box")),
        (
            &["--name", "My_Box"],
            "/metadata/name".to_owned(),
            json!("my-box"),
        ),
        (
            &["--stop-timeout", "3"],
            "/spec/terminationGracePeriodSeconds".to_owned(),
            json!(3),
        ),
        (
            &["--init"],
            "/spec/shareProcessNamespace".to_owned(),
            json!(true),
        ),
        (
            &["--dns", "10.0.0.1", "--dns-search", "x"],
            "/spec/dnsConfig".to_owned(),
            json!({"nameservers": ["10.0.0.1"], "searches": ["x"]}),
        ),
        (
            &["--add-host", "db:10.0.0.5"],
            "/spec/hostAliases".to_owned(),
            json!([{"ip": "10.0.0.5", "hostnames": ["db"]}]),
        ),
        (
            &["--sysctl", "net.ipv4.tcp_syncookies=1", "--group-add", "5"],
            "/spec/securityContext".to_owned(),
            json!({"sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}], "supplementalGroups": [5]}),
        ),
    ] {
        let mut args = flags.to_vec();
        args.push("busybox");
        assert_eq!(at(&args, &pointer), value, "{flags:?}");
    }
}

#[test]
fn what_has_no_meaning_is_refused_by_name() {
    for (flags, said) in [
        (
            &["-v", "/etc:/x"][..],
            "hyper: -v /etc:/x is not supported: no part of any host",
        ),
        (
            &["--mount", "type=bind,src=/a,dst=/b"],
            "hyper: --mount type=bind,src=/a,dst=/b is not supported",
        ),
        (
            &["--network", "host"],
            "hyper: --network host is not supported",
        ),
        (
            &["-u", "www-data"],
            "hyper: --user www-data is not supported: Kubernetes takes numbers only",
        ),
        (
            &["--restart", "always", "--rm"],
            "hyper: conflicting options: cannot specify both --restart and --rm",
        ),
        (
            &["--restart", "often"],
            "Error response from daemon: invalid restart policy: unknown policy 'often'",
        ),
        (
            &["--restart", "on-failure:x"],
            "hyper: invalid restart policy format: maximum retry count must be an integer",
        ),
        (
            &["-m", "1m"],
            "Error response from daemon: Minimum memory limit allowed is 6MB",
        ),
        (
            &["-w", "srv"],
            "Error response from daemon: the working directory 'srv' is invalid, it needs to be an absolute path",
        ),
        (&["--pull", "often"], "hyper: invalid pull option: 'often'"),
        (
            &["--security-opt", "apparmor=x"],
            "hyper: --security-opt apparmor=x is not supported",
        ),
        (
            &["--platform", "linux/arm64"],
            "hyper: --platform linux/arm64 is not supported",
        ),
        (
            &["--tmpfs", "/t:mode=700"],
            "hyper: option mode=700 of tmpfs /t:mode=700 is not supported",
        ),
        (
            &["-v", "/a", "--tmpfs", "/a"],
            "Error response from daemon: Duplicate mount point: /a",
        ),
        (&["--hostname", "a.b"], "hyper: invalid hostname 'a.b'"),
    ] {
        let mut args = flags.to_vec();
        args.push("busybox");
        let error = parse(&args).expect_err(said);
        assert!(
            error.message.starts_with(said),
            "{flags:?}: {}",
            error.message
        );
        assert_eq!(error.code, 125, "{flags:?}");
    }
}

#[test]
fn flags_end_at_the_image() {
    assert_eq!(
        at(&["busybox", "-d", "--name", "x"], "/spec/containers/0/args"),
        json!(["-d", "--name", "x"])
    );
    assert!(parse(&["--bogus", "busybox"]).is_err());
}
