#!/usr/bin/env bash
# Brings the two Prometheus that rules and dashboards must please, each with its promtool: Debian's of version 2, and one of
# version 3 built from the pinned module; and Debian's Alertmanager. Prints PROMETHEUS2=…, PROMTOOL2=…, PROMETHEUS3=… and
# PROMTOOL3=… on stdout, all else on stderr.
#
# What is built stays in a cache folder, under a name that holds a hash of its pins.
set -euo pipefail
exec 3>&1 1>&2
cd "$(dirname "$0")"

cache="${XDG_CACHE_HOME:-$HOME/.cache}/livekit-canary"
mkdir -p "$cache"
# Two runs at the same time must not build into the same file.
exec 9>"$cache/lock-prometheus"
flock 9

source ../packages.sh
need prometheus prometheus
need prometheus-alertmanager prometheus-alertmanager
need promtool prometheus
install_missing

built="$cache/prometheus-$(cat go.mod go.sum | sha256sum | cut -c1-16)"
if [ ! -d "$built" ]; then
  command -v go >/dev/null || { echo "missing: go (1.26 or later)"; exit 1; }
  echo "building prometheus and promtool"
  # Without the ways to find targets in clouds: they are most of what there is to compile, and nobody looks there.
  go build -tags remove_all_sd -o "$built.new/" github.com/prometheus/prometheus/cmd/{prometheus,promtool}
  mv "$built.new" "$built"
fi

cat >&3 <<EOF
PROMETHEUS2=$(command -v prometheus)
PROMTOOL2=$(command -v promtool)
PROMETHEUS3=$built/prometheus
PROMTOOL3=$built/promtool
EOF
