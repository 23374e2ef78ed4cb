#!/usr/bin/env bash
# Takes one VM through its whole life over the API, and prints PASS or FAIL for each step.
#
#   Create ─► Boot ─► Info, List ─► Pause ─► Resume ─► Reboot ─► Shutdown ─► Boot again ─► Delete
#
# Usage: scripts/test-vm-lifecycle.sh --backend cloudhypervisor|firecracker|qemu [--address URL] [--guest linux|tiny]
#
#   --address   a running daemon, such as http://127.0.0.1:8080. Without it, the daemon at UNKEY_VMCP_ADDRESS and _PORT is used
#               if either is set and that daemon answers; else the script starts one on a free port and stops it at the end
#   --guest     linux (the default on qemu) shuts down when asked; tiny (the default on the others) boots in milliseconds and
#               ignores every request, so it exercises the end of the shutdown ladder
#
# If the daemon has an endpoint, the script uses the VMM that another program started there. An operation that needs another VMM is
# then refused, which is a step, and the script runs the command that the refusal names. On Firecracker the tiny guest obeys.
#
# The script checks the state in every answer, the answer of GetVmInfo afterwards, and the guest's output on its console.
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
VM_ID='' VMM_PID='' VMM_SOCKET='' DAEMON_PID='' MODE='' BOOTS=0
OTHER_VMM=() # shells with the VMMs that were started as a refusal said, each with a process group of its own
STEPS_FAILED=0

cleanup() {
    local status=$?
    trap - EXIT
    trap '' INT TERM
    [ -z "$VM_ID" ] || api DeleteVm "{\"vm_id\": \"$VM_ID\", \"force\": true}" > /dev/null || true
    stop_daemon
    [ "$MODE" = attached ] || kill_leftover_vmm "$VMM_PID"
    for pid in "${OTHER_VMM[@]}"; do kill -KILL -- "-$pid" 2> /dev/null || true; done
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
            KERNEL=$GUEST_DIR/vmlinuz INITRD=$GUEST_DIR/initramfs.cpio.gz KERNEL_ARGS='' BANNER='^vmcp-guest: ready' PATIENCE=60
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
            KERNEL=$WORK/tiny-idle.elf INITRD='' KERNEL_ARGS='' BANNER='^vmcp-tiny: up' PATIENCE=1 BOOT_SECONDS=20 MEMORY=134217728
            if [ "$MODE-$BACKEND" = attached-firecracker ]; then # nothing else ends its VM without force
                KERNEL=$WORK/tiny-obey.elf KERNEL_ARGS=' reboot=k' PATIENCE=20
            fi
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

# Whether the daemon starts the VMMs of this backend: managed, attached or libvirt.
find_mode() {
    MODE=$(api ListBackends '{}' | jq -r --arg name "$BACKEND" '.backends[] | select(.name == $name) | .endpoint_mode') || true
    if [ "$MODE-$BACKEND" = attached-qemu ]; then
        die "the daemon is attached to a running QEMU, which is imported: no VM can be created there" \
            "unset UNKEY_VMCP_QEMU_ENDPOINT, or set it to qemu:///system"
    fi
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

# console STEP: the console must show one more boot of the guest.
console() {
    BOOTS=$((BOOTS + 1))
    local wanted=$BOOTS seen
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
        --argjson memory "$MEMORY" --arg more "$KERNEL_ARGS" '{backend: $backend, config: {
            cpu: {vcpu_count: 1}, memory: {size_bytes: $memory},
            boot: ({kernel_path: $kernel, kernel_args: ("console=ttyS0" + $more)} + if $initrd == "" then {} else {initrd_path: $initrd} end),
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
    VMM_SOCKET=$(jq -r '.backend_info.socket // empty' <<< "$answer")
}

# check_list STEP COUNT: ListVms must hold the VM this many times. Tests ask for few VMs, so one page holds them all.
check_list() {
    local answer seen
    answer=$(api ListVms '{"page_size": 1000, "metadata_filter": {"made_by": "test-vm-lifecycle"}}') || true
    seen=$(jq -r --arg id "$VM_ID" '[.vms // [] | .[] | select(.vm_id == $id)] | length' <<< "$answer" 2> /dev/null) || true
    if [ "$seen" = "$2" ]; then pass "$1"; else fail "$1" "$2 expected: ${answer:-no answer}"; fi
}

# Asks a Cloud Hypervisor that was started by somebody else whether its VM runs.
vm_is_live() {
    curl -s --max-time 5 --unix-socket "$VMM_SOCKET" http://localhost/api/v1/vm.info |
        jq -e '.state == "Running" or .state == "Paused"' > /dev/null 2>&1
}

# The answer to a shutdown may only come when the VMM has gone; one of somebody else's may live on without its VM.
check_vmm_gone() {
    if [ "$MODE-$BACKEND" = attached-cloudhypervisor ]; then
        if vm_is_live; then fail "its VMM has no VM" "it still runs in pid $VMM_PID"; else pass "its VMM has no VM"; fi
    elif [ -z "$VMM_PID" ]; then
        fail "the VMM's process has gone" "GetVmInfo named no pid in backend_info"
    elif [ -d "/proc/$VMM_PID" ] && ! grep -q '^State:.*Z' "/proc/$VMM_PID/status" 2> /dev/null; then
        fail "the VMM's process has gone" "pid $VMM_PID is alive after a successful shutdown"
    else
        pass "the VMM's process has gone"
    fi
}

# A boot after a shutdown. Where that takes another VMM the refusal says how to start one, and that is done.
check_boot_again() {
    local answer message told
    if [ "$MODE" = attached ] && ! answer=$(api BootVm "$(request)"); then
        message=$(jq -r '.message // empty' <<< "$answer")
        told=${message##*start one there (}
        if [ "$(jq -r '.code // empty' <<< "$answer")" != unavailable ] || [ "$told" = "$message" ]; then
            fail "BootVm without a VMM" "the code should be unavailable, with the command to run: $answer"
            return
        fi
        pass "BootVm without a VMM → unavailable"
        step "starting another VMM, as told: ${told%)*}"
        setsid sh -c "${told%)*}" > /dev/null 2>&1 < /dev/null &
        OTHER_VMM+=($!)
        # shellcheck disable=SC2317  # called by wait_for
        boots() { api BootVm "$(request)" > /dev/null; }
        wait_for 20 boots || true
    fi
    expect "BootVm after shutdown" BootVm "$(request)" VM_STATE_RUNNING
}

# A reboot; of a VMM that can be used once and is somebody else's, the refusal of it.
check_reboot() {
    if [ "$MODE-$BACKEND" = attached-firecracker ]; then
        refused "RebootVm of a VMM that starts one guest" RebootVm "$(request)" unavailable
        return
    fi
    expect RebootVm RebootVm "$(request "\"timeout_seconds\": $PATIENCE")" VM_STATE_RUNNING
    console "the console shows the second boot"
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
    console "the console shows the boot"
    expect "BootVm again" BootVm "$(request)" VM_STATE_RUNNING
    check_info
    check_list "ListVms has the VM" 1
    expect PauseVm PauseVm "$(request)" VM_STATE_PAUSED
    expect "PauseVm again" PauseVm "$(request)" VM_STATE_PAUSED
    expect ResumeVm ResumeVm "$(request)" VM_STATE_RUNNING
    expect "ResumeVm again" ResumeVm "$(request)" VM_STATE_RUNNING
    check_reboot
    VMM_PID=$(vmm_pid "$VM_ID")
    expect ShutdownVm ShutdownVm "$(request "\"timeout_seconds\": $PATIENCE")" VM_STATE_SHUTDOWN
    check_vmm_gone
    expect "ShutdownVm again" ShutdownVm "$(request)" VM_STATE_SHUTDOWN
    check_boot_again
    console "the console shows the boot after shutdown"
    VMM_PID=$(vmm_pid "$VM_ID")
    refused "DeleteVm while running" DeleteVm "$(request)" failed_precondition
    expect "ShutdownVm with force" ShutdownVm "$(request '"force": true')" VM_STATE_SHUTDOWN
    check_vmm_gone
    check_delete
    refused "GetVmInfo after deletion" GetVmInfo "$(request)" not_found
    check_list "ListVms no longer has the VM" 0
    VM_ID=
}

find_daemon
find_mode
choose_guest
step "lifecycle on $BACKEND at $BASE_URL, guest $GUEST"
lifecycle
if [ "$STEPS_FAILED" != 0 ]; then
    echo "FAIL: $STEPS_FAILED steps failed on $BACKEND"
    exit 1
fi
echo "PASS: all steps passed on $BACKEND"
