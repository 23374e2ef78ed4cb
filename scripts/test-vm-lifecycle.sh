#!/usr/bin/env bash
# Takes one VM through its whole life over the API, and says PASS or FAIL by step.
#
#   Create ─► Boot ─► Info, List ─► Pause ─► Resume ─► Reboot ─► Shutdown ─► Boot again ─► Delete
#
# Usage: scripts/test-vm-lifecycle.sh --backend cloudhypervisor|firecracker|qemu [--address URL] [--guest linux|tiny]
#
#   --address   a running daemon, such as http://127.0.0.1:8080. Without it, the daemon at UNKEY_VMCP_ADDRESS and _PORT is used
#               if either is set and it answers; else one is started here, on a free port, and stopped at the end
#   --guest     linux (the default on qemu) shuts down when asked to; tiny (the default on the others) boots in milliseconds
#               and never does what it is asked, so it exercises the end of the shutdown ladder
#
# Every answer's state is checked, as is what GetVmInfo says afterwards and that the guest really printed to its console.
# The exit status is 0 if every step passed, 1 if one failed, 2 if the arguments are wrong.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

usage() {
    echo "usage: $0 --backend cloudhypervisor|firecracker|qemu [--address URL] [--guest linux|tiny]" >&2
    exit 2
}

BACKEND='' ADDRESS='' GUEST=''
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
        --backend) BACKEND=$2 ;;
        --address) ADDRESS=${2%/} ;;
        --guest) GUEST=$2 ;;
        *) usage ;;
    esac
    shift 2
done
case $BACKEND in
    qemu) GUEST=${GUEST:-linux} ;;
    cloudhypervisor | firecracker) GUEST=${GUEST:-tiny} ;;
    *) usage ;;
esac

WORK=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-life.XXXXXX")
CONSOLE=$WORK/console.log
VM_ID='' VMM_PID='' DAEMON_PID=''
STEPS_FAILED=0

cleanup() {
    local status=$?
    trap - EXIT
    trap '' INT TERM
    [ -z "$VM_ID" ] || api DeleteVm "{\"vm_id\": \"$VM_ID\", \"force\": true}" > /dev/null || true
    stop_daemon
    kill_leftover_vmm "$VMM_PID"
    rm -rf "$WORK"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Chooses the guest: kernel, how it announces a boot, and how long a polite shutdown of it may take.
choose_guest() {
    case $GUEST in
        linux)
            KERNEL=$GUEST_DIR/vmlinuz INITRD=$GUEST_DIR/initramfs.cpio.gz BANNER='^vmcp-guest: ready' PATIENCE=60
            BOOT_SECONDS=120 MEMORY=268435456
            need_linux_guest
            [ "$BACKEND" != firecracker ] || die "Firecracker boots no compressed kernel" "use --guest tiny"
            ;;
        tiny)
            if [ -n "${VMCP_TINY_GUESTS:-}" ]; then # a program that makes them, already built
                "$VMCP_TINY_GUESTS" "$WORK" > /dev/null
            else
                step "making the tiny guest (builds a small program first)"
                (cd "$ROOT" && cargo run -q -p vmm-testkit --bin tiny-guests -- "$WORK") > /dev/null
            fi
            KERNEL=$WORK/tiny-idle.elf INITRD='' BANNER='^vmcp-tiny: up' PATIENCE=1 BOOT_SECONDS=20 MEMORY=134217728
            ;;
        *) usage ;;
    esac
}

# Finds a running daemon, or starts one.
find_daemon() {
    local host=${UNKEY_VMCP_ADDRESS:-127.0.0.1} port
    if [ -n "$ADDRESS" ]; then
        BASE_URL=$ADDRESS
        daemon_answers || die "no daemon answers at $BASE_URL/_/health" "start it, or leave --address out: one is started here"
        return
    fi
    # A daemon bound to every address is asked on the loopback one.
    [ "$host" != 0.0.0.0 ] || host=127.0.0.1
    BASE_URL=http://$host:${UNKEY_VMCP_PORT:-8080}
    if [ -n "${UNKEY_VMCP_ADDRESS:-}${UNKEY_VMCP_PORT:-}" ] && daemon_answers; then return; fi
    need_daemon
    port=18080
    while port_taken "$port"; do port=$((port + 1)); done
    step "starting a daemon with backend $BACKEND on port $port"
    start_daemon "$BACKEND" "$port"
}

pass() { printf 'PASS  %s\n' "$1"; }

# fail STEP WHY: what follows is tried all the same, so that one run shows everything that is wrong.
fail() {
    printf 'FAIL  %s: %s\n' "$1" "$2"
    STEPS_FAILED=$((STEPS_FAILED + 1))
}

# The request that names the VM, with more members where given: request '"force": true'.
request() { printf '{"vm_id": "%s"%s}' "$VM_ID" "${1:+, $1}"; }

state_now() { api GetVmInfo "$(request)" | jq -r '.state // empty'; }

# expect STEP METHOD JSON STATE: calls, and checks success, the answer's state and the state read back.
expect() {
    local name=$1 method=$2 body=$3 state=$4 answer now
    if ! answer=$(API_TIMEOUT=$((PATIENCE + 60)) api "$method" "$body"); then
        fail "$name" "${answer:-no answer}"
        return
    fi
    now=$(state_now)
    if [ "$(jq -r .success <<< "$answer")" != true ]; then
        fail "$name" "the answer has no success: $answer"
    elif [ "$(jq -r .state <<< "$answer")" != "$state" ]; then
        fail "$name" "state should be $state in $answer"
    elif [ "$now" != "$state" ]; then
        fail "$name" "the answer says $state, GetVmInfo says $now"
    else
        pass "$name → ${state#VM_STATE_}$(jq -r 'if .ended_by then " (ended by " + .ended_by + ")" else "" end' <<< "$answer")"
    fi
}

# refused STEP METHOD JSON CODE: the call must fail with this Connect code.
refused() {
    local name=$1 answer
    if answer=$(api "$2" "$3"); then
        fail "$name" "it was accepted: $answer"
    elif [ "$(jq -r '.code // empty' <<< "$answer")" != "$4" ]; then
        fail "$name" "the code should be $4: ${answer:-no answer}"
    else
        pass "$name → $4"
    fi
}

boots_seen() { grep -ac "$BANNER" "$CONSOLE" 2> /dev/null || true; }

# console STEP N: the console must show the guest's N-th boot.
console() {
    local wanted=$2 seen
    # shellcheck disable=SC2317  # called by wait_for
    shows_boot() { seen=$(boots_seen) && [ "${seen:-0}" -ge "$wanted" ]; }
    if wait_for "$BOOT_SECONDS" shows_boot; then
        pass "$1"
    else
        fail "$1" "$BANNER should be there $wanted times, not $(boots_seen); it ends: $(tail -c 200 "$CONSOLE" 2>&1 | tr -d '\r')"
    fi
}

check_create() {
    local config answer
    config=$(jq -n --arg backend "$BACKEND" --arg kernel "$KERNEL" --arg initrd "$INITRD" --arg console "$CONSOLE" \
        --argjson memory "$MEMORY" '{backend: $backend, config: {
            cpu: {vcpu_count: 1}, memory: {size_bytes: $memory},
            boot: ({kernel_path: $kernel, kernel_args: "console=ttyS0"} + if $initrd == "" then {} else {initrd_path: $initrd} end),
            console: {enabled: true, output: $console}, metadata: {made_by: "test-vm-lifecycle"}}}')
    if ! answer=$(api CreateVm "$config"); then
        fail CreateVm "${answer:-no answer}"
        return 1
    fi
    VM_ID=$(jq -r '.vm_id // empty' <<< "$answer")
    [ -n "$VM_ID" ] || { fail CreateVm "no vm_id in $answer" && return 1; }
    if [ "$(jq -r .state <<< "$answer")" = VM_STATE_CREATED ] && [ "$(state_now)" = VM_STATE_CREATED ]; then
        pass "CreateVm → CREATED ($VM_ID)"
    else
        fail CreateVm "state should be VM_STATE_CREATED in $answer and in GetVmInfo"
    fi
}

check_info() {
    local answer
    answer=$(api GetVmInfo "$(request)") || true
    if jq -e --arg id "$VM_ID" --arg memory "$MEMORY" --arg kernel "$KERNEL" '.vm_id == $id and .state == "VM_STATE_RUNNING"
        and .config.cpu.vcpu_count == 1 and (.config.memory.size_bytes | tostring) == $memory
        and .config.boot.kernel_path == $kernel' <<< "$answer" > /dev/null 2>&1; then
        pass "GetVmInfo has the configuration as sent"
    else
        fail GetVmInfo "${answer:-no answer}"
    fi
    VMM_PID=$(vmm_pid "$VM_ID")
}

# check_list STEP COUNT: ListVms must hold the VM this many times. Tests ask for few VMs, so one page holds them all.
check_list() {
    local answer seen
    answer=$(api ListVms '{"page_size": 1000, "metadata_filter": {"made_by": "test-vm-lifecycle"}}') || true
    seen=$(jq -r --arg id "$VM_ID" '[.vms // [] | .[] | select(.vm_id == $id)] | length' <<< "$answer" 2> /dev/null) || true
    if [ "$seen" = "$2" ]; then pass "$1"; else fail "$1" "$2 expected: ${answer:-no answer}"; fi
}

# The answer to a shutdown may only come when the VMM has gone.
check_vmm_gone() {
    if [ -z "$VMM_PID" ]; then
        fail "the VMM's process has gone" "GetVmInfo named no pid in backend_info"
    elif [ -d "/proc/$VMM_PID" ] && ! grep -q '^State:.*Z' "/proc/$VMM_PID/status" 2> /dev/null; then
        fail "the VMM's process has gone" "pid $VMM_PID is alive after a successful shutdown"
    else
        pass "the VMM's process has gone"
    fi
}

check_delete() {
    local answer
    if answer=$(api DeleteVm "$(request)") && [ "$(jq -r .success <<< "$answer")" = true ]; then
        pass DeleteVm
    else
        fail DeleteVm "${answer:-no answer}"
    fi
}

lifecycle() {
    check_create || return 0
    refused "PauseVm before boot" PauseVm "$(request)" failed_precondition
    expect BootVm BootVm "$(request)" VM_STATE_RUNNING
    console "the console shows the boot" 1
    expect "BootVm again" BootVm "$(request)" VM_STATE_RUNNING
    check_info
    check_list "ListVms has the VM" 1
    expect PauseVm PauseVm "$(request)" VM_STATE_PAUSED
    expect "PauseVm again" PauseVm "$(request)" VM_STATE_PAUSED
    expect ResumeVm ResumeVm "$(request)" VM_STATE_RUNNING
    expect "ResumeVm again" ResumeVm "$(request)" VM_STATE_RUNNING
    expect RebootVm RebootVm "$(request "\"timeout_seconds\": $PATIENCE")" VM_STATE_RUNNING
    console "the console shows the second boot" 2
    VMM_PID=$(vmm_pid "$VM_ID")
    expect ShutdownVm ShutdownVm "$(request "\"timeout_seconds\": $PATIENCE")" VM_STATE_SHUTDOWN
    check_vmm_gone
    expect "ShutdownVm again" ShutdownVm "$(request)" VM_STATE_SHUTDOWN
    expect "BootVm after shutdown" BootVm "$(request)" VM_STATE_RUNNING
    console "the console shows the third boot" 3
    VMM_PID=$(vmm_pid "$VM_ID")
    refused "DeleteVm while running" DeleteVm "$(request)" failed_precondition
    expect "ShutdownVm with force" ShutdownVm "$(request '"force": true')" VM_STATE_SHUTDOWN
    check_vmm_gone
    check_delete
    refused "GetVmInfo after deletion" GetVmInfo "$(request)" not_found
    check_list "ListVms no longer has the VM" 0
    VM_ID=
}

choose_guest
find_daemon
step "lifecycle on $BACKEND at $BASE_URL, guest $GUEST"
lifecycle
if [ "$STEPS_FAILED" != 0 ]; then
    echo "FAIL: $STEPS_FAILED steps failed on $BACKEND"
    exit 1
fi
echo "PASS: all steps passed on $BACKEND"
