#!/usr/bin/env bash
# Installs Prometheus 2 from Debian, Prometheus 3 built from the pinned module, each with its promtool, and Alertmanager from
# Debian. Prints PROMETHEUS2=…, PROMTOOL2=…, PROMETHEUS3=… and PROMTOOL3=… on stdout, and everything else on stderr.
#
# The programs are cached under a name with a hash of their pinned versions.
set -euo pipefail
exec 3>&1 1>&2
cd "$(dirname "$0")"

source ../packages.sh
lock_cache lock-prometheus

need prometheus prometheus
need prometheus-alertmanager prometheus-alertmanager
need promtool prometheus
install_missing

built="$cache/prometheus-$(cat go.mod go.sum | sha256sum | cut -c1-16)"
if [ ! -d "$built" ]; then
  command -v go >/dev/null || { echo "missing: go (1.26 or later)"; exit 1; }
  echo "building prometheus and promtool"
  # Without service discovery, which is most of the code and which no test uses.
  go build -tags remove_all_sd -o "$built.new/" github.com/prometheus/prometheus/cmd/{prometheus,promtool}
  mv "$built.new" "$built"
fi

cat >&3 <<EOF
PROMETHEUS2=$(command -v prometheus)
PROMTOOL2=$(command -v promtool)
PROMETHEUS3=$built/prometheus
PROMTOOL3=$built/promtool
EOF
