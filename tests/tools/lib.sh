# Shared by the tools: a directory in the cache that is named by the content of what makes it. Sourced, not run.
# shellcheck shell=bash
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
clients=$(cd "$here/../clients" && pwd)
cache=${HYPERNETES_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hypernetes}/clients

# made NAME COMMAND FILE...: sets `place` to a directory that COMMAND has filled, once for each content of the
# files. COMMAND gets the directory to fill; what it leaves half done is thrown away.
made() {
    local name=$1 command=$2 hash work; shift 2
    hash=$(cat "$@" | sha256sum | cut -c1-16)
    place=$cache/$name-$hash
    [ ! -e "$place/.made" ] || return 0
    mkdir -p "$cache"
    # Parallel tests ask at the same time: one makes it, the others wait.
    exec 9> "$cache/.$name.lock"
    flock 9
    if [ ! -e "$place/.made" ]; then
        rm -rf "$place"
        mkdir "$place"
        work=$place
        if ! "$command" "$work" >&2; then
            rm -rf "$place"
            echo "$(basename "$0"): $name cannot be had" >&2
            exit 1
        fi
        touch "$place/.made"
    fi
    exec 9>&-
}

# wheels FILE DIR: installs the pinned and hashed packages of a requirements file into DIR.
wheels() {
    python3 -m venv "$2/venv" &&
        "$2/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --require-hashes --requirement "$1"
}
