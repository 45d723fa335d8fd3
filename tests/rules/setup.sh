#!/usr/bin/env bash
# Brings the two promtools that the rules must please: Debian's of Prometheus 2, and one of Prometheus 3 built from the
# pinned module; and Debian's Prometheus and Alertmanager. Prints PROMTOOL2=… and PROMTOOL3=… on stdout, all else on stderr.
#
# The built one stays in a cache folder, under a name that holds a hash of its pins.
set -euo pipefail
exec 3>&1 1>&2
cd "$(dirname "$0")"

cache="${XDG_CACHE_HOME:-$HOME/.cache}/livekit-canary"
mkdir -p "$cache"
# Two runs at the same time must not build into the same file.
exec 9>"$cache/lock-promtool"
flock 9

source ../packages.sh
need prometheus prometheus
need prometheus-alertmanager prometheus-alertmanager
need promtool prometheus
install_missing

promtool="$cache/promtool-$(cat go.mod go.sum | sha256sum | cut -c1-16)"
if [ ! -x "$promtool" ]; then
  command -v go >/dev/null || { echo "missing: go (1.26 or later)"; exit 1; }
  echo "building promtool"
  go build -o "$promtool.new" github.com/prometheus/prometheus/cmd/promtool
  mv "$promtool.new" "$promtool"
fi

echo "PROMTOOL2=$(command -v promtool)" >&3
echo "PROMTOOL3=$promtool" >&3
