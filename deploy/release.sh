#!/usr/bin/env bash
# Makes the files of a release in dist/: for each architecture the static binary in an archive, a Debian package and an image, and
# for all of them the Helm chart and the checksums. It publishes nothing.
#
#   deploy/release.sh                        for amd64 and arm64
#   deploy/release.sh amd64                  for one of them
#   deploy/release.sh --binary FILE          for amd64, from a static binary that is already built
#
# It needs cargo-deb, and buildah for the images. To compile it also needs rustup, and Zig as the C compiler and linker:
#
#   cargo install --locked cargo-deb
#   pip install cargo-zigbuild==0.24.0 ziglang==0.17.0
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
revision=$(git rev-parse --short=12 HEAD)
# Archives have the time of the commit, so that two releases of one commit are alike.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
dist=$PWD/dist
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

main() {
  rm -rf "$dist"
  mkdir "$dist"
  if [ "${1:-}" = --binary ]; then
    package amd64 "$2"
  else
    [ $# -gt 0 ] || set -- amd64 arm64
    for architecture in "$@"; do compile "$architecture"; done
  fi
  archive livekit-canary-chart-"$version".tgz deploy/helm livekit-canary
  cd "$dist"
  sha256sum -- *.tgz *.deb *.tar >SHA256SUMS
  ls -l
}

# compile ARCHITECTURE
compile() {
  case "$1" in
    amd64) target=x86_64-unknown-linux-musl ;;
    arm64) target=aarch64-unknown-linux-musl ;;
    *) echo "no release for the architecture $1: use amd64 or arm64" >&2; exit 2 ;;
  esac
  rustup target list --installed | grep -qx "$target" || rustup target add "$target"
  LIVEKIT_CANARY_REVISION=$revision cargo zigbuild --locked --release --target "$target"
  package "$1" "${CARGO_TARGET_DIR:-target}/$target/release/livekit-canary"
}

# package ARCHITECTURE BINARY
package() {
  if readelf --program-headers "$2" | grep -q INTERP; then
    echo "$2 is not static: it would need the libraries of this machine" >&2
    exit 1
  fi
  local files="$dist/image/$1"
  mkdir -p "$files/folders/var/lib/livekit-canary" "$files/folders/tmp"
  chmod 1777 "$files/folders/tmp"
  cp "$2" "$files/livekit-canary"

  local folder="livekit-canary-$version-$1"
  mkdir -p "$dist/archive/$folder"
  cp LICENSE CHANGELOG.md config/canary.toml deploy/systemd/livekit-canary.service deploy/prometheus/livekit-canary.rules.yml \
    "$dist/archive/$folder"
  cp "$2" "$dist/archive/$folder/livekit-canary"
  archive "$folder.tgz" "$dist/archive" "$folder"

  debian "$1" "$2"
  image "$1"
}

# archive NAME PARENT FOLDER: links are replaced by the files that they lead to.
archive() {
  tar --create --gzip --dereference --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" \
    --file "$dist/$1" --directory "$2" "$3"
}

# debian ARCHITECTURE BINARY: cargo-deb takes the binary from where a build leaves it.
debian() {
  local target=x86_64-unknown-linux-musl
  [ "$1" = amd64 ] || target=aarch64-unknown-linux-musl
  local built="${CARGO_TARGET_DIR:-target}/$target/release/livekit-canary"
  mkdir -p "$(dirname "$built")"
  [ "$2" -ef "$built" ] || cp "$2" "$built"
  cargo deb --no-build --no-strip --quiet --target "$target" --output "$dist/livekit-canary_${version}_$1.deb"
}

# image ARCHITECTURE: an archive that `docker load` and `podman load` read. The stages go into a storage of their own, which ends with
# the script, so that this machine keeps none of them.
image() {
  local name="livekit-canary:$version-$1"
  local storage=(--root "$scratch/storage" --runroot "$scratch/run" --storage-driver vfs)
  buildah "${storage[@]}" build --isolation chroot --quiet --layers=false --platform "linux/$1" --timestamp "$SOURCE_DATE_EPOCH" \
    --build-arg BINARY=given --build-arg TARGETARCH="$1" --build-arg VERSION="$version" --build-arg REVISION="$revision" \
    --format docker --ignorefile deploy/Dockerfile.dockerignore --file deploy/Dockerfile --tag "$name" .
  buildah "${storage[@]}" push --quiet "$name" "docker-archive:$dist/livekit-canary-image-$version-$1.tar:$name"
}

main "$@"
