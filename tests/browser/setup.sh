#!/usr/bin/env bash
# Installs Chromium and its driver from Debian, and a Python environment with Selenium, pytest and axe-core. Prints CHROMIUM=…,
# CHROMEDRIVER=… and PYTHON=… on stdout, and everything else on stderr.
#
# The environment is cached under a name with a hash of its pinned versions.
set -euo pipefail
exec 3>&1 1>&2
cd "$(dirname "$0")"

source ../packages.sh
lock_cache lock-browser

need chromium chromium
need chromedriver chromium-driver
# Without a font, every text is boxes.
[ -n "$(fc-list 2>/dev/null)" ] || missing+=(fontconfig fonts-dejavu-core)
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
install_missing

python_environment browser

cat >&3 <<EOF
CHROMIUM=$(command -v chromium)
CHROMEDRIVER=$(command -v chromedriver)
PYTHON=$venv/bin/python
EOF
