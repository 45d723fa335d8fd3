#!/usr/bin/env bash
# Installs the programs that the tests of deploy/ call. The Go module has the libraries.
set -euo pipefail

source "$(dirname "$0")/../packages.sh"
need amtool prometheus-alertmanager
need systemd-analyze systemd
install_missing
