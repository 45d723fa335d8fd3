# Functions for each setup.sh: for the Debian packages that contain the programs it needs, and for what it builds into the cache.

missing=()

# need PROGRAM PACKAGE
need() { command -v "$1" >/dev/null || missing+=("$2"); }

install_missing() {
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing: ${missing[*]}; install them and run this again" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# lock_cache NAME: creates the folder of the cache and sets `cache`. Only one run at a time may build what this lock is for.
lock_cache() {
  cache="${XDG_CACHE_HOME:-$HOME/.cache}/livekit-canary"
  mkdir -p "$cache"
  exec 9>"$cache/$1"
  flock 9
}

# python_environment NAME: installs requirements.txt into an environment in the cache, and sets `venv`. Its name has a hash of
# the pinned versions.
python_environment() {
  venv="$cache/$1-$( (python3 -VV; cat requirements.txt) | sha256sum | cut -c1-16)"
  [ ! -e "$venv/complete" ] || return 0
  echo "installing the Python environment $1"
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
  touch "$venv/complete"
}
