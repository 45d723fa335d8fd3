#!/usr/bin/env bash
# Brings the programs that the tests of deploy/ call; the libraries come with the Go module.
set -euo pipefail

source "$(dirname "$0")/../packages.sh"
need amtool prometheus-alertmanager
need systemd-analyze systemd
install_missing
