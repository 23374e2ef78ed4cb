#!/usr/bin/env bash
# Tests the API over connectrpc, with the code that crates/vmm-proto generates from the .proto file.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"

use_daemon
step "building the Rust client (quick where it is up to date)"
build vmm-client-example || die "the client does not build; the reason is above"

launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
bounded 240 "${CARGO_TARGET_DIR:-$ROOT/target}/debug/vmm-client-example" || fail "clients/rust" "exit status $?, see above"
finish
