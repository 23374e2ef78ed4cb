# shellcheck shell=bash
# The common part of the client tests: a daemon of their own with a guest that boots in milliseconds, and its end. Sourced, never run.
#
#   need TOOL… ──► use_daemon ──► launch ──► the clients, at $BASE_URL ──► cleanup (at every end of the script)

set -euo pipefail
CLIENTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHOSEN_DAEMON=${VMCP_DAEMON:-}

# The developer's own settings must not reach the daemon under test.
while read -r name; do unset "$name"; done < <(compgen -e | grep -E '^(UNKEY_VMCP_|VMCP_|CHCP_)' | grep -v '^VMCP_SKIP_LOG$')
# shellcheck source=scripts/lib.sh
. "$CLIENTS/../scripts/lib.sh"
# The tools that scripts/setup.sh installed for the tests.
export PATH=$PATH:$TOOLS_DIR

# Packages may come through a proxy; the daemon is on loopback.
export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"
export NO_PROXY=$no_proxy

DAEMON_PID=
# The path is short, because the daemon makes Unix sockets below it and their paths have at most 107 bytes.
WORK=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-cl.XXXXXX")
FAILURES=0

cleanup() {
    local status=$? pid
    trap - EXIT
    trap '' INT TERM
    end_daemon || true
    for pid in $(left_behind); do kill_leftover_vmm "$pid"; done
    rm -rf "$WORK"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Prints the VMMs that outlived the daemon: the processes that name a file of $WORK. This grep names one too, and has ended by then.
left_behind() { grep -lsF -- "$WORK/" /proc/[0-9]*/cmdline | sed -n 's,^/proc/\([0-9]*\)/cmdline$,\1,p' || true; }

# Deletes the VMs that a failed test left, then stops the daemon.
end_daemon() {
    [ -n "$DAEMON_PID" ] || return 0
    local id
    for id in $(API_TIMEOUT=10 api ListVms '{"page_size": 1000}' 2> /dev/null | jq -r '.vms // [] | .[].vm_id' 2> /dev/null); do
        API_TIMEOUT=10 api DeleteVm "{\"vm_id\": \"$id\", \"force\": true}" > /dev/null 2>&1 || true
    done
    stop_daemon
}

# Ends the script as skipped: skip WHY.
skip() {
    echo "SKIPPED: ${0#"$ROOT"/}: $*"
    exit 77
}

# Skips where a tool is not installed.
need() {
    local tool
    for tool in "$@"; do
        command -v "$tool" > /dev/null || skip "$tool is not installed"
    done
}

# Runs a command for at most $1 seconds, in the foreground, so that Ctrl-C reaches it.
bounded() { timeout --foreground -k 10 "$@"; }

# Builds a program of the workspace. The whole workspace is named, because Cargo would otherwise compile most dependencies anew, with the
# features of one crate instead of those that `cargo test --workspace` used.
build() { (cd "$ROOT" && cargo build -q --workspace --bin "$1"); }

# Finds the daemon and makes the guest. Without VMCP_DAEMON the daemon is built, because an old binary would be tested otherwise.
use_daemon() {
    local built=${CARGO_TARGET_DIR:-$ROOT/target}/debug
    need cargo qemu-system-x86_64 curl jq setsid timeout
    if [ -n "$CHOSEN_DAEMON" ]; then
        DAEMON=$CHOSEN_DAEMON
    else
        step "building the daemon (quick where it is up to date)"
        build vmm-controlplane || die "the daemon does not build; the reason is above"
        DAEMON=$built/vmm-controlplane
    fi
    need_daemon
    build tiny-guests || die "the program that makes the guests does not build; the reason is above"
    "$built/tiny-guests" "$WORK" > /dev/null || die "the tiny guests could not be made"
    KERNEL=$WORK/tiny-idle.elf
}

# Starts the daemon on a free port: launch [NAME=VALUE…] adds to its environment.
launch() {
    local port
    until port=$((20000 + RANDOM % 10000)) && ! port_taken "$port"; do :; done
    # shellcheck disable=SC2163  # the arguments are assignments
    export UNKEY_VMCP_QEMU_KVM=false "$@"
    start_daemon qemu "$port"
    export VMCP_TEST_URL=$BASE_URL VMCP_TEST_KERNEL=$KERNEL VMCP_TEST_ECHO_KERNEL=$WORK/tiny-echo.elf
}

ok() { printf 'ok %s\n' "$1"; }

# Prints a failure: fail NAME WHY
fail() {
    printf 'FAIL %s: %s\n' "$1" "$2"
    FAILURES=$((FAILURES + 1))
}

# Prints the example in the README of a generated package, with the daemon's address: readme_example FOLDER MARK-OF-ITS-BLOCK
readme_example() {
    sed -n "/^\`\`\`$2\$/,/^\`\`\`\$/p" "$1/README.md" | sed "/^\`\`\`/d; s,localhost:8080,${BASE_URL#http://},"
}

# Generates the package of a language, installs it by `install_sdk PACKAGE-FOLDER PROJECT-FOLDER` and runs the example of its README, which
# prints the number of VMs: sdk LANGUAGE
sdk() {
    local output name="the $1 package of make sdk"
    VMCP_SDK_DIR=$WORK/sdk "$ROOT/scripts/sdk.sh" "$1" || { fail "$name" "it could not be generated" && return; }
    api CreateVm "{\"vm_id\": \"sdk\", \"config\": {\"cpu\": {\"vcpu_count\": 1}, \"memory\": {\"size_bytes\": 134217728},
        \"boot\": {\"kernel_path\": \"$KERNEL\"}}}" > "$WORK/created" || fail "$name" "no VM: $(cat "$WORK/created")"
    mkdir "$WORK/project"
    output=$(install_sdk "$WORK/sdk/$1" "$WORK/project" 2>&1) || true
    if [ "$(tail -n 1 <<< "$output")" = "VMs: 1" ]; then ok "$name"; else fail "$name" "$output"; fi
}

# Ends the script with its result, and prints the log of the daemon after a failure.
finish() {
    [ "$FAILURES" = 0 ] && return 0
    echo "the end of the daemon's log:" >&2
    tail -n 5 "$WORK/daemon.log" >&2
    exit 1
}
