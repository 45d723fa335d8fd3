# The client stack that joins the rooms of `real` and `matrix`: native, or libwebrtc, with which the canary is built then.
ENGINE := "native"
features := if ENGINE == "libwebrtc" { "--features libwebrtc" } else { "" }
export ENGINE

# What CI runs.
check:
    .ci/run

# Tests that need no more than the build does.
test:
    cargo test

# The scenarios on the sandbox and the real stack, all or those whose name contains FILTER. Needs Go, Python and root.
real FILTER="":
    cargo test {{features}} --test real -- {{FILTER}}

# The dashboards: what is generated, and what their queries find. Needs Go and a release build.
dashboards:
    tests/rules/setup.sh
    cd grafana && go test -count=1 ./...

# What deploy/ ships, as far as it can be held against what reads it without a container engine. Needs Go and systemd.
deployment:
    tests/deploy/setup.sh
    cargo build
    cd tests/deploy && go test -count=1 ./...

# What the alert rules do on Prometheus 2 and 3, minute by minute, and the way of an alert to a webhook. Needs Go.
rules FILTER="":
    cargo test --test rules -- {{FILTER}}

# The fault matrix on every stack, N times: each fault with its verdict, and in how many runs that was right.
matrix N="1":
    REPEAT={{N}} cargo test {{features}} --test real -- matrix::

# CPU and memory on the sandbox and the real stack, accuracy on the real one; `just bench --help` tells what else.
bench *ARGS:
    cargo bench --bench load -- {{ARGS}}
