//! docker's flags and verbs that have no meaning here, and what to use instead.

const OWN_KERNEL: &str = "a container has a microVM and a kernel of its own";

/// Of `run` and `create`: flag and advice.
const CREATE: &[(&str, &str)] = &[
    (
        "--privileged",
        "a container has a kernel of its own, and --cap-add gives it what it needs there",
    ),
    (
        "--ulimit",
        "Kubernetes has no field for it; set it in the command: sh -c 'ulimit -n 4096; exec PROGRAM'",
    ),
    ("--device", "no device of any host is seen in a container"),
    ("--gpus", "no device of any host is seen in a container"),
    ("--pid", OWN_KERNEL),
    ("--ipc", OWN_KERNEL),
    ("--uts", OWN_KERNEL),
    ("--userns", OWN_KERNEL),
    ("--cgroupns", OWN_KERNEL),
    ("--cgroup-parent", OWN_KERNEL),
    (
        "--runtime",
        "every container has a microVM; --kernel chooses its kernel",
    ),
    ("--isolation", "every container has a microVM"),
    (
        "--link",
        "containers of one network find each other by name; --network chooses it",
    ),
    (
        "--network-alias",
        "use a compose file: its services find each other by name",
    ),
    ("--ip", "addresses are given by the network"),
    ("--ip6", "addresses are given by the network"),
    ("--mac-address", "addresses are given by the network"),
    ("--publish-all", "name the ports: -p HOST:CONTAINER"),
    ("-P", "name the ports: -p HOST:CONTAINER"),
    ("--volumes-from", "name the volumes: -v NAME:PATH"),
    (
        "--volume-driver",
        "volumes are made with `hyper volume create`",
    ),
    ("--storage-opt", "--tmpfs and volumes have sizes"),
    (
        "--log-driver",
        "the node keeps logs; `hyper logs` reads them",
    ),
    ("--log-opt", "the node keeps logs; `hyper logs` reads them"),
    ("--oom-kill-disable", "a memory limit is a limit"),
    ("--oom-score-adj", OWN_KERNEL),
    ("--memory-swap", "there is no swap in a container's VM"),
    (
        "--memory-swappiness",
        "there is no swap in a container's VM",
    ),
    ("--kernel-memory", "--memory limits the whole"),
    ("--cpu-shares", "--cpus limits CPUs"),
    ("--cpu-period", "--cpus limits CPUs"),
    ("--cpu-quota", "--cpus limits CPUs"),
    ("--cpuset-cpus", "--cpus limits CPUs"),
    ("--cpuset-mems", "--memory limits memory"),
    ("--blkio-weight", "Kubernetes has no field for it"),
    (
        "--pids-limit",
        "a container has a kernel of its own; --memory limits what processes can take",
    ),
    ("--domainname", "--hostname names the container"),
    (
        "--disable-content-trust",
        "images are named by digest where content matters",
    ),
    (
        "--device-cgroup-rule",
        "no device of any host is seen in a container",
    ),
    (
        "--health-start-interval",
        "--health-interval is used from the start",
    ),
    ("--blkio-weight-device", "Kubernetes has no field for it"),
    (
        "--device-read-bps",
        "no device of any host is seen in a container",
    ),
    (
        "--device-read-iops",
        "no device of any host is seen in a container",
    ),
    (
        "--device-write-bps",
        "no device of any host is seen in a container",
    ),
    (
        "--device-write-iops",
        "no device of any host is seen in a container",
    ),
    ("--cpu-count", "containers are Linux"),
    ("--cpu-percent", "containers are Linux"),
    ("--io-maxbandwidth", "containers are Linux"),
    ("--io-maxiops", "containers are Linux"),
    ("--cpu-rt-period", "--cpus limits CPUs"),
    ("--cpu-rt-runtime", "--cpus limits CPUs"),
    ("-c", "--cpus limits CPUs"),
    ("--link-local-ip", "addresses are given by the network"),
    (
        "--use-api-socket",
        "a container has no credentials of the cluster; give it a Secret with kubectl",
    ),
];

const SIGNATURES: &str = "images are named by digest where content matters";
const NO_SWARM: &str = "the cluster is a Kubernetes; use kubectl";
const PLUGIN: &str =
    "volumes come from the cluster's storage classes; choose one with -o class=NAME";
const PLAN: &str =
    "addresses, gateways and drivers of a network are the cluster's; --subnet chooses the range";

/// Of other verbs: verb, flag and advice.
const FLAGS: &[(&str, &str, &str)] = &[
    (
        "",
        "--config",
        "the configuration is the kubeconfig: --kubeconfig FILE",
    ),
    ("", "-D", "the server's log says more"),
    ("", "--debug", "the server's log says more"),
    (
        "",
        "-H",
        "the cluster is a context of the kubeconfig: --context NAME",
    ),
    (
        "",
        "--host",
        "the cluster is a context of the kubeconfig: --context NAME",
    ),
    ("", "-l", "the server's log says more"),
    ("", "--log-level", "the server's log says more"),
    ("", "--tls", "certificates are the kubeconfig's"),
    ("", "--tlscacert", "certificates are the kubeconfig's"),
    ("", "--tlscert", "certificates are the kubeconfig's"),
    ("", "--tlskey", "certificates are the kubeconfig's"),
    ("", "--tlsverify", "certificates are the kubeconfig's"),
    (
        "rm",
        "-l",
        "containers of one network find each other by name: there are no links",
    ),
    (
        "rm",
        "--link",
        "containers of one network find each other by name: there are no links",
    ),
    ("restart", "-s", "set it with run --stop-signal"),
    ("restart", "--signal", "set it with run --stop-signal"),
    ("start", "--checkpoint", "a container starts from its image"),
    (
        "start",
        "--checkpoint-dir",
        "a container starts from its image",
    ),
    (
        "images",
        "--tree",
        "one platform of an image is kept: it is linux/amd64",
    ),
    (
        "rmi",
        "--platform",
        "one platform of an image is kept: it is linux/amd64",
    ),
    ("pull", "--disable-content-trust", SIGNATURES),
    ("push", "--disable-content-trust", SIGNATURES),
    (
        "search",
        "-f",
        "a registry has no such marks; `hyper search` lists tags",
    ),
    (
        "search",
        "--filter",
        "a registry has no such marks; `hyper search` lists tags",
    ),
    (
        "context create",
        "--description",
        "a kubeconfig has no place for it; name the context so",
    ),
    ("network create", "--attachable", PLAN),
    ("network create", "--aux-address", PLAN),
    ("network create", "--config-from", PLAN),
    ("network create", "--config-only", PLAN),
    ("network create", "--gateway", PLAN),
    ("network create", "--ingress", PLAN),
    (
        "network create",
        "--internal",
        "an operator says so in the Network's spec.egress",
    ),
    ("network create", "--ip-range", PLAN),
    ("network create", "--ipam-driver", PLAN),
    ("network create", "--ipam-opt", PLAN),
    ("network create", "--ipv4", PLAN),
    ("network create", "--ipv6", PLAN),
    ("network create", "-o", PLAN),
    ("network create", "--opt", PLAN),
    ("network create", "--scope", PLAN),
    ("network inspect", "-v", NO_SWARM),
    ("network inspect", "--verbose", NO_SWARM),
    (
        "system prune",
        "-a",
        "remove images with `hyper image prune -a`",
    ),
    (
        "system prune",
        "--all",
        "remove images with `hyper image prune -a`",
    ),
    (
        "system prune",
        "--volumes",
        "remove volumes with `hyper volume rm`",
    ),
    ("volume ls", "--cluster", NO_SWARM),
    ("volume create", "-d", PLUGIN),
    ("volume create", "--driver", PLUGIN),
    ("volume create", "--availability", NO_SWARM),
    ("volume create", "--group", NO_SWARM),
    ("volume create", "--limit-bytes", "-o size=10Gi is its size"),
    (
        "volume create",
        "--required-bytes",
        "-o size=10Gi is its size",
    ),
    ("volume create", "--scope", NO_SWARM),
    ("volume create", "--secret", NO_SWARM),
    ("volume create", "--sharing", NO_SWARM),
    ("volume create", "--topology-preferred", NO_SWARM),
    ("volume create", "--topology-required", NO_SWARM),
    ("volume create", "--type", NO_SWARM),
];

/// Verbs and groups of them.
const VERBS: &[(&str, &str)] = &[
    ("swarm", NO_SWARM),
    ("service", NO_SWARM),
    ("stack", NO_SWARM),
    ("node", NO_SWARM),
    ("secret", NO_SWARM),
    ("config", NO_SWARM),
    (
        "buildx",
        "build with another tool, push into a registry, then run",
    ),
    (
        "builder",
        "build with another tool, push into a registry, then run",
    ),
    ("plugin", "it is the registry's or the operator's"),
    ("trust", "it is the registry's or the operator's"),
    ("manifest", "it is the registry's or the operator's"),
    (
        "checkpoint",
        "a container that stands still for a while is paused: `hyper pause`",
    ),
    (
        "context export",
        "copy the kubeconfig: kubectl config view --minify --flatten",
    ),
    (
        "context import",
        "merge kubeconfigs with KUBECONFIG=FILE:FILE",
    ),
    (
        "context update",
        "make another with `hyper context create --from`",
    ),
    ("volume update", NO_SWARM),
    ("volume prune", "remove them by name with `hyper volume rm`"),
    (
        "network prune",
        "remove them by name with `hyper network rm`",
    ),
];

/// Other names of verbs, and the names that the tables above use.
const SAME: &[(&str, &str)] = &[
    ("container ls", "ps"),
    ("container list", "ps"),
    ("container ps", "ps"),
    ("image ls", "images"),
    ("image list", "images"),
    ("image rm", "rmi"),
    ("image remove", "rmi"),
    ("network list", "network ls"),
    ("volume list", "volume ls"),
    ("system events", "events"),
    ("system info", "info"),
];

/// The name of a verb that is used for it, whatever it was called by.
pub(crate) fn canonical(path: &[String]) -> String {
    let joined = path.join(" ");
    if let Some((_, name)) = SAME.iter().find(|(other, _)| *other == joined) {
        return (*name).to_owned();
    }
    match path {
        [group, verb] if group == "container" && verb != "prune" => verb.clone(),
        [group, verb] if group == "image" && !matches!(verb.as_str(), "inspect" | "prune") => {
            verb.clone()
        }
        _ => joined,
    }
}

/// What to use instead of a flag of docker's.
pub(crate) fn advice(path: &[String], flag: &str) -> Option<&'static str> {
    let verb = canonical(path);
    if verb == "run" || verb == "create" {
        let found = CREATE.iter().find(|(name, _)| *name == flag);
        return found.map(|(_, advice)| *advice);
    }
    FLAGS
        .iter()
        .find(|(of, name, _)| *of == verb && *name == flag)
        .map(|(_, _, advice)| *advice)
}

/// What to use instead of a verb of docker's.
pub(crate) fn verb(path: &[String], word: &str) -> Option<&'static str> {
    let whole = [path, &[word.to_owned()]].concat().join(" ");
    let found = VERBS.iter().find(|(name, _)| *name == whole);
    found.map(|(_, advice)| *advice)
}
