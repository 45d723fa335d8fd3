#!/usr/bin/env bash
# Installs Chromium and its driver from Debian, and a Python environment with Selenium, pytest and axe-core. Prints CHROMIUM=…,
# CHROMEDRIVER=… and PYTHON=… on stdout, and everything else on stderr.
#
# The environment is cached under a name with a hash of its pinned versions.
set -euo pipefail
exec 3>&1 1>&2
cd "$(dirname "$0")"

cache="${XDG_CACHE_HOME:-$HOME/.cache}/livekit-canary"
mkdir -p "$cache"
# Only one run at a time may build into the folder.
exec 9>"$cache/lock-browser"
flock 9

source ../packages.sh
need chromium chromium
need chromedriver chromium-driver
# Without a font, every text is boxes.
[ -n "$(fc-list 2>/dev/null)" ] || missing+=(fontconfig fonts-dejavu-core)
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
install_missing

venv="$cache/browser-$( (python3 -VV; cat requirements.txt) | sha256sum | cut -c1-16)"
if [ ! -e "$venv/complete" ]; then
  echo "installing selenium, pytest and axe-core"
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
  touch "$venv/complete"
fi

cat >&3 <<EOF
CHROMIUM=$(command -v chromium)
CHROMEDRIVER=$(command -v chromedriver)
PYTHON=$venv/bin/python
EOF
