# What CI runs.
check:
    .ci/run

# Tests that need a Rust toolchain alone.
test:
    cargo test

# The scenarios on the sandbox and the real stack, all or those whose name contains FILTER. Needs Go, Python and root.
real FILTER="":
    cargo test --test real -- {{FILTER}}

# CPU and memory on the sandbox and the real stack, accuracy on the real one; `just bench --help` tells what else.
bench *ARGS:
    cargo bench --bench load -- {{ARGS}}
