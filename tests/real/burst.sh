#!/usr/bin/env bash
# Opens bursts of rooms in one process, with the sandbox in another. Every room must be ok.
#
#   burst.sh BINARY ROOMS...
#
# BINARY must be a release build. Without optimization, 200 calls that begin at the same time miss their deadlines.
set -euo pipefail
binary=$1
shift
dir=$(mktemp -d)
"$binary" sandbox --port 0 >"$dir/variables" &
sandbox=$!
trap 'kill "$sandbox"; wait "$sandbox" || true; rm -rf "$dir"' EXIT

# The last of the three variables that it prints.
until grep -q LIVEKIT_API_SECRET= "$dir/variables"; do
  kill -0 "$sandbox" || exit 1
  sleep 0.1
done
set -a
# shellcheck source=/dev/null
. "$dir/variables"
set +a

for rooms in "$@"; do
  cat >"$dir/canary.toml" <<TOML
[projects.sandbox]
max_rooms = $rooms
[targets.demo]
agent_name = "demo"
late_agent_window = "1s"
TOML
  status=0
  "$binary" once --config "$dir/canary.toml" --ramp burst --rooms "$rooms" >"$dir/table" 2>"$dir/log" || status=$?
  if [ "$status" != 0 ]; then
    cat "$dir/table" "$dir/log"
    echo "a burst of $rooms rooms: exit $status"
    exit 1
  fi
  echo "a burst of $rooms rooms: all ok"
done
