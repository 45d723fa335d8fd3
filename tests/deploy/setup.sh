#!/usr/bin/env bash
# Installs the programs that the tests of deploy/ call: from Debian, a kube-apiserver with its etcd, both built from pinned modules,
# the types of prometheus-operator for it, and cargo-deb. Prints KUBE_APISERVER=…, ETCD=…, CRDS=… and CARGO_DEB=… on stdout, and
# everything else on stderr.
#
# What takes long to build is cached under a name with a hash of its pinned versions.
set -euo pipefail
exec 3>&1 1>&2
cd "$(dirname "$0")"

source ../packages.sh
lock_cache lock-deployment

need amtool prometheus-alertmanager
need buildah buildah
need podman podman
need prometheus prometheus
need runc runc
need systemd-analyze systemd
install_missing

hash_of() { cat "$@" | sha256sum | cut -c1-16; }

cluster="$cache/kubernetes-$(hash_of apiserver/go.mod apiserver/go.sum)"
if [ ! -d "$cluster" ]; then
  echo "building kube-apiserver and etcd"
  (cd apiserver && go build -ldflags "-s -w" -o "$cluster.new/" k8s.io/kubernetes/cmd/kube-apiserver go.etcd.io/etcd/server/v3)
  mv "$cluster.new" "$cluster"
fi

crds="$cache/crds-$(hash_of go.mod go.sum)"
if [ ! -d "$crds" ]; then
  echo "generating the resource types of prometheus-operator"
  types=github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1
  go tool controller-gen crd "paths=$types" "output:crd:dir=$crds.new"
  mv "$crds.new" "$crds"
fi

deb="$cache/cargo-deb-3.8.0"
[ -x "$deb/bin/cargo-deb" ] || cargo install cargo-deb@3.8.0 --locked --quiet --root "$deb"

cat >&3 <<EOF
KUBE_APISERVER=$cluster/kube-apiserver
ETCD=$cluster/server
CRDS=$crds
CARGO_DEB=$deb/bin
EOF
