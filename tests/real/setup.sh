#!/usr/bin/env bash
# Installs the real stack: livekit-server and upstream's programmable mock of it, both built from the pinned module; a Python
# environment with the pinned agent worker; the agent of the benchmark; and the system tools that the scenarios use. Prints
# LIVEKIT_SERVER=…, TEST_SERVER=…, TALKER=… and PYTHON=… on stdout, and everything else on stderr.
#
# The programs are cached under names with a hash of their pinned versions. Every step checks what is missing, so that an
# incomplete cache leads to the same stack.
set -euo pipefail
exec 3>&1 1>&2
cd "$(dirname "$0")"

source ../packages.sh
lock_cache lock

hash_of() { cat "$@" | sha256sum | cut -c1-16; }

need espeak-ng espeak-ng
need haproxy haproxy
need ip iproute2
need iptables iptables
need prometheus prometheus
need promtool prometheus
need setpriv util-linux
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
install_missing

# build NAME SOURCES PACKAGE: builds a program from SOURCES if it isn't cached, and prints its path.
build() {
  local program="$cache/$1-$(hash_of $2)"
  if [ ! -x "$program" ]; then
    command -v go >/dev/null || { echo "missing: go (1.26 or later)" >&2; exit 1; }
    echo "building $1" >&2
    go build -o "$program.new" "$3" >&2
    mv "$program.new" "$program"
  fi
  echo "$program"
}
server=$(build livekit-server "go.mod go.sum" github.com/livekit/livekit-server/cmd/server)
mock=$(build test-server "go.mod go.sum" github.com/livekit/livekit-server/cmd/test-server)
talker=$(build talker "go.mod go.sum talker/main.go" ./talker)

python_environment agents

echo "LIVEKIT_SERVER=$server" >&3
echo "TEST_SERVER=$mock" >&3
echo "TALKER=$talker" >&3
echo "PYTHON=$venv/bin/python" >&3
