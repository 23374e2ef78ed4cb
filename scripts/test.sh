#!/usr/bin/env bash
# Runs every check and every test: `make test`. All of them run even if one fails. The last line is
#
#   N passed, N failed, N skipped
#
# and the exit status is 0 only if nothing failed. A check counts as one; `cargo test` counts by test. A test that cannot
# run on this machine appends `SKIPPED: <test>: <why>` to the file named by VMCP_SKIP_LOG and returns; it then counts as
# skipped, not as passed.
set -uo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT" || exit 1

WORK=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-test.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
export VMCP_SKIP_LOG=$WORK/skipped CARGO_TERM_COLOR=never
: > "$VMCP_SKIP_LOG"
# The tools that scripts/setup.sh installed for the tests.
export PATH=$PATH:$TOOLS_DIR
PASSED=0 FAILED=0 SKIPPED=0
FAILURES=()

passed() { PASSED=$((PASSED + 1)); }
failed() { FAILED=$((FAILED + 1)) && FAILURES+=("$1"); }
skipped() { SKIPPED=$((SKIPPED + 1)) && echo "SKIPPED: $1: $2"; }

# check NAME COMMAND...: one check, passed if the command succeeds. Exit status 77 means skipped.
check() {
    local name=$1 status=0
    shift
    step "$name"
    "$@" || status=$?
    case $status in
        0) passed ;;
        77) skipped "$name" "the check gave the reason above" ;;
        *) failed "$name" ;;
    esac
}

# check_with TOOL NAME COMMAND...: a check that is skipped where its tool is not installed.
check_with() {
    local tool=$1
    shift
    if command -v "$tool" > /dev/null; then check "$@"; else skipped "$1" "$tool is not installed"; fi
}

# Checks and builds the libvirt helper, which is no member of the workspace and needs libvirt-dev. The tests of the daemon use it.
libvirt_helper() {
    local manifest=crates/vmm-libvirt-helper/Cargo.toml name="libvirt helper"
    if ! pkg-config --exists libvirt libvirt-qemu 2> /dev/null; then
        skipped "$name" "libvirt-dev or pkg-config is not installed; 'make setup' installs them"
        return
    fi
    local where=(--manifest-path "$manifest" --target-dir "${CARGO_TARGET_DIR:-target}/libvirt-helper")
    check "$name: cargo fmt" cargo fmt --manifest-path "$manifest" --check
    check "$name: cargo clippy" cargo clippy "${where[@]}" --all-targets --quiet -- -D warnings
    check "$name: build" cargo build "${where[@]}" --quiet
    check "$name: tests" cargo test "${where[@]}" --quiet
    check_with cargo-deny "$name: licences, bans and sources" cargo deny --manifest-path "$manifest" check licenses bans sources
}

# Runs all Rust tests and adds up the counts of their programs. Tests that were skipped at run time were counted as passed there.
rust_tests() {
    local log=$WORK/cargo-test status=0 ok bad ignored at_run_time
    step "cargo test --workspace (builds first; some minutes)"
    cargo test --workspace --no-fail-fast 2>&1 | tee "$log" || status=$?
    ok=$(sum_of passed "$log")
    bad=$(sum_of failed "$log")
    ignored=$(sum_of ignored "$log")
    at_run_time=$(sort -u "$VMCP_SKIP_LOG" | grep -c '^SKIPPED: ')
    sort -u "$VMCP_SKIP_LOG"
    PASSED=$((PASSED + ok - at_run_time))
    SKIPPED=$((SKIPPED + ignored + at_run_time))
    FAILED=$((FAILED + bad))
    [ "$bad" = 0 ] || FAILURES+=("cargo test: $bad, see 'failures:' above")
    # The tests did not build, or a test program died before its count.
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then failed "cargo test: exit status $status"; fi
}

# sum_of WORD LOG: adds up the numbers before WORD in the `test result:` lines.
sum_of() {
    sed -n "s/^test result: .* \([0-9]*\) $1;.*/\1/p" "$2" | awk '{ sum += $1 } END { print sum + 0 }'
}

# Clients in other languages: each folder under clients/ that has an executable test.sh.
client_tests() {
    local script
    for script in clients/*/test.sh; do
        [ ! -x "$script" ] || check "$script" "$script"
    done
}

check "cargo fmt" cargo fmt --all --check
check "cargo clippy" cargo clippy --workspace --all-targets --quiet -- -D warnings
check "direction of imports" scripts/check-imports.sh
check "commit messages" scripts/check-commits.sh
check_with shellcheck "shell scripts" shellcheck -x .ci/run scripts/*.sh clients/*.sh clients/*/*.sh
check_with cargo-deny "licences, bans and sources" cargo deny check licenses bans sources
check_with buf "API: style and compatibility" scripts/check-api.sh
check "same steps in every client" clients/compare-steps.sh
libvirt_helper
rust_tests
check "Debian package" scripts/test-deb.sh
client_tests

if [ "$FAILED" != 0 ]; then
    echo
    echo "failed:"
    printf '  %s\n' "${FAILURES[@]}"
fi
echo "$PASSED passed, $FAILED failed, $SKIPPED skipped"
[ "$FAILED" = 0 ]
