# shellcheck shell=bash
# The common part of the project's scripts: paths, messages, and calls to the daemon. The file is sourced, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Made by scripts/setup.sh: vmlinuz, initramfs.cpio.gz.
# shellcheck disable=SC2034  # used by the scripts that source this file
GUEST_DIR=$ROOT/.cache/guest
# Made by scripts/setup.sh: cargo-deny, buf, grpcurl, connectconformance.
# shellcheck disable=SC2034
TOOLS_DIR=$ROOT/.cache/tools/bin
# The daemon that the scripts start.
DAEMON=${VMCP_DAEMON:-$ROOT/vmm-controlplane}

# Prints one line of progress.
step() { printf '==> %s\n' "$*" >&2; }

# Prints the error and what to do next, and ends the script.
die() {
    printf 'error: %s\n' "$1" >&2
    shift
    for hint in "$@"; do printf '       %s\n' "$hint" >&2; done
    exit 1
}

need_daemon() {
    [ -x "$DAEMON" ] || die "the daemon is not built: ${DAEMON#"$ROOT"/} does not exist" "run 'make build'"
}

need_linux_guest() {
    if [ ! -e "$GUEST_DIR/vmlinuz" ] || [ ! -e "$GUEST_DIR/initramfs.cpio.gz" ]; then
        die "the guest's kernel is missing" "run 'make setup'"
    fi
}

# Calls one method of the API: api METHOD JSON. The answer goes to standard output; the exit status is 0 only for an HTTP 200.
api() {
    local status
    rm -f "$WORK/answer"
    status=$(curl -sS --max-time "${API_TIMEOUT:-60}" -o "$WORK/answer" -w '%{http_code}' -X POST \
        -H 'Content-Type: application/json' -d "$2" "$BASE_URL/vmm.v1.VmService/$1") || return 1
    cat "$WORK/answer"
    [ "$status" = 200 ]
}

# Succeeds if a program listens on a TCP port of 127.0.0.1.
port_taken() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

# Waits until `$2...` succeeds, for at most $1 seconds.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

# Succeeds if the daemon answers. A 503 means that the daemon runs but its default backend cannot serve, which callers report.
daemon_answers() { curl -s -o /dev/null --max-time 2 "$BASE_URL/_/health"; }
daemon_is_healthy() { curl -sf -o /dev/null --max-time 2 "$BASE_URL/_/health"; }

# Starts the daemon: start_daemon BACKEND PORT. Its state, sockets and log live in $WORK; its pid is $DAEMON_PID.
start_daemon() {
    local backend=$1 port=$2
    BASE_URL=http://127.0.0.1:$port
    mkdir -p "$WORK/state" "$WORK/run"
    # The daemon has a session of its own, because Ctrl-C at the terminal would otherwise end it before its caller has deleted its
    # VMs. setsid does not fork here, so $! is the daemon.
    setsid env UNKEY_VMCP_ADDRESS=127.0.0.1 UNKEY_VMCP_PORT="$port" UNKEY_VMCP_BACKEND="$backend" \
        UNKEY_VMCP_STATE_DIR="$WORK/state" UNKEY_VMCP_RUNTIME_DIR="$WORK/run" \
        UNKEY_VMCP_OTEL_PROMETHEUS_ENABLED=false \
        "$DAEMON" > "$WORK/daemon.log" 2>&1 &
    DAEMON_PID=$!
    # shellcheck disable=SC2317  # called by wait_for
    daemon_answers_or_died() { daemon_answers || ! kill -0 "$DAEMON_PID" 2> /dev/null; }
    wait_for 20 daemon_answers_or_died || true
    if ! kill -0 "$DAEMON_PID" 2> /dev/null || ! daemon_answers; then
        tail -n 20 "$WORK/daemon.log" >&2
        die "the daemon did not come up on $BASE_URL; the end of its log is above"
    fi
    # libvirtd examines QEMU at its first use, which can take half a minute.
    case ${UNKEY_VMCP_QEMU_ENDPOINT:-${VMCP_QEMU_ENDPOINT:-}} in
        qemu*) wait_for 90 daemon_is_healthy || true ;;
    esac
    if ! daemon_is_healthy; then
        curl -s --max-time 2 "$BASE_URL/_/health" >&2
        die "the daemon runs, but its backend $backend cannot serve; the reason is above" \
            "is the hypervisor installed? 'make setup' installs QEMU"
    fi
}

# Stops the daemon that start_daemon started, and no other process.
stop_daemon() {
    [ -n "${DAEMON_PID:-}" ] || return 0
    kill -TERM "$DAEMON_PID" 2> /dev/null || true
    # shellcheck disable=SC2317  # called by wait_for
    daemon_is_gone() { ! kill -0 "$DAEMON_PID" 2> /dev/null; }
    wait_for 15 daemon_is_gone || kill -KILL "$DAEMON_PID" 2> /dev/null || true
    wait "$DAEMON_PID" 2> /dev/null || true
    DAEMON_PID=
}

# Prints the pid of the VMM that serves VM $1, or nothing.
vmm_pid() { api GetVmInfo "{\"vm_id\": \"$1\"}" | jq -r '.backend_info.pid // empty'; }

# Ends a VMM that was left behind because its daemon died: kill_leftover_vmm PID. VMMs outlive the daemon by design, so a
# script that only stopped the daemon would leave its guest running. Another program may have the pid by now, so only a process
# with a file of $WORK in its command line or open is ended.
kill_leftover_vmm() {
    [ -n "$1" ] && [ -d "/proc/$1" ] || return 0
    if tr '\0' ' ' < "/proc/$1/cmdline" | grep -qF "$WORK/" || readlink "/proc/$1/fd/"* 2> /dev/null | grep -qF "$WORK/"; then
        step "ending the VMM that the daemon left behind (pid $1)"
        kill -KILL "$1" 2> /dev/null || true
    fi
}
