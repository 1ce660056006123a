# Shared by the scripts: paths, the daemon's life, a picture of the host. Sourced, not run.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
bin=${HYPERNETES_BIN:-$target/release}
HYPERNETES_CACHE=${HYPERNETES_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hypernetes}
export HYPERNETES_CACHE

die() { echo "$(basename "$0"): $*" >&2; exit 1; }
now_ms() { echo $(( $(date +%s%N) / 1000000 )); }

# wait_for SECONDS WHAT COMMAND...: until the command succeeds; its last output is shown on failure.
wait_for() {
    local limit=$1 what=$2 out; shift 2
    local end=$(( $(now_ms) + limit * 1000 ))
    until out=$("$@" 2>&1); do
        [ "$(now_ms)" -lt "$end" ] || { echo "$out" >&2; die "$what: not within $limit s"; }
        sleep 0.1
    done
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Process ids of the VMs whose run directories are below $1: they have records of their launch.
vmms() {
    local record pid
    for record in "$1"/vm/*/launch.json; do
        [ -e "$record" ] || continue
        pid=$(jq -r .pid "$record")
        [ ! -e "/proc/$pid/exe" ] || echo "$pid"
    done
}

# What the daemon could leave behind on the host, in a form that can be compared.
host_picture() {
    echo "# links";      ip -o link | awk -F': ' '{print $2}' | sort
    echo "# routes";     ip route | sort
    echo "# namespaces"; { ls /run/netns 2>/dev/null || true; } | sort
    echo "# nft";        nft list ruleset
    echo "# mounts";     awk '{print $2, $3}' /proc/self/mounts | sort
    echo "# cgroups";    find /sys/fs/cgroup -type d -path '*hypernetes*' | sort
    echo "# sysctls";    cat /proc/sys/net/ipv4/ip_forward
}

# start_daemon STATE RUN PORT LOG ARGS...: sets daemon_pid.
start_daemon() {
    local state=$1 run=$2 port=$3 log=$4; shift 4
    "$bin/hypernetes" --state-dir "$state" --log info up --listen "127.0.0.1:$port" --run-dir "$run" "$@" >> "$log" 2>&1 &
    daemon_pid=$!
    wait_for 120 "hypernetes up (log: $log)" daemon_ready "$state"
}

daemon_ready() {
    kill -0 "$daemon_pid" 2>/dev/null || { echo "the daemon has ended"; return 1; }
    [ -s "$1/admin.kubeconfig" ] && "$kubectl" --kubeconfig "$1/admin.kubeconfig" --request-timeout=2s get --raw /readyz
}

stop_daemon() { # pid
    kill -TERM "$1" 2>/dev/null || return 0
    while kill -0 "$1" 2>/dev/null; do sleep 0.05; done
}

# Removes what a daemon that was killed has left on the host. $1: state directory, $2: run directory.
remove_leftovers() {
    local pid instance
    for pid in $(vmms "$2"); do kill -KILL "$pid" 2>/dev/null || true; done
    instance=$(cat "$1/instance" 2>/dev/null) || return 0
    remove_host_objects "$instance"
}

# Namespaces, links, nft table and cgroups of an instance whose daemon and VMs are gone.
remove_host_objects() {
    local name
    for name in $(ls /run/netns 2>/dev/null | grep "^hn-$1-"); do ip netns delete "$name" || true; done
    for name in $(ip -o link | awk -F'[ :@]+' '{print $2}' | grep "^hn$1"); do ip link delete "$name" || true; done
    nft delete table inet "hypernetes_$1" 2>/dev/null || true
    find /sys/fs/cgroup -depth -type d -path "*/hypernetes-$1*" -exec rmdir {} \; 2>/dev/null || true
}
