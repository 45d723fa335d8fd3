# The WebRTC stack that joins the rooms in `real` and `matrix`: native or libwebrtc. The canary is built with it.
export ENGINE := "native"
features := if ENGINE == "libwebrtc" { "--features libwebrtc" } else { "" }

# List the recipes.
default:
    @just --list

# Run everything that CI runs. Needs Go, Python and root, and takes more than half an hour.
check:
    .ci/run

# Format the Rust and Go code.
fmt:
    cargo fmt --all
    gofmt -w grafana tests/deploy tests/real/talker

# Run clippy on all targets, with the lints of CI.
lint:
    .ci/run lints

# Build the documentation of the crate, private items included; warnings are errors.
doc:
    .ci/run doc

# Run the tests that need nothing but Rust.
test:
    cargo test

# Play years of batches through the state machine of detection, and print the table of docs/operate.md.
simulate:
    cargo test --lib detection::simulation -- --nocapture

# Accept what the snapshot tests print now; look at the difference before you commit it.
snapshots:
    INSTA_UPDATE=always INSTA_FORCE_PASS=1 cargo test
    git status --short '*.snap'

# Write the generated files again: the alert rules for Prometheus and the Grafana dashboards. Needs Go.
regenerate:
    cargo build
    env -i target/debug/livekit-canary rules > target/rules.yml
    mv target/rules.yml deploy/prometheus/livekit-canary.rules.yml
    cd grafana && go run .

# Run the scenarios whose name contains FILTER on the sandbox and on the real stack. Needs Go, Python and root.
real FILTER="":
    cargo test {{features}} --test real -- {{FILTER}}

# Run the fault matrix N times on every stack, and print how often each verdict was right. Needs Go, Python and root.
matrix N="1":
    REPEAT={{N}} cargo test {{features}} --test real -- matrix::

# Check the Grafana dashboards and what their queries find. Needs Go.
dashboards:
    cargo build --release
    tests/rules/setup.sh
    cd grafana && go test -count=1 ./...

# Check the files in deploy/: run the image, install the package, give the chart to an API server. Needs Go, and root on Debian.
deployment:
    cargo rustc --bin livekit-canary -- -C target-feature=+crt-static
    tests/deploy/setup.sh
    cd tests/deploy && go test -count=1 ./...

# Open every page in Chromium, in every state of a daemon; the screenshots are in target/browser. Needs Python, and root or Chromium.
browser:
    cargo build --release
    .ci/run browser

# Make the files of a release in dist/, for all architectures or some. Needs rustup, Zig, cargo-deb and buildah.
release *ARCHITECTURES:
    deploy/release.sh {{ARCHITECTURES}}

# Run the alert rules on Prometheus 2 and 3, and send an alert through Alertmanager to a webhook. Needs Go.
rules FILTER="":
    cargo test --test rules -- {{FILTER}}

# Measure CPU, memory and accuracy on the sandbox and on the real stack; `just bench --help` lists the options.
bench *ARGS:
    cargo bench --bench load -- {{ARGS}}
