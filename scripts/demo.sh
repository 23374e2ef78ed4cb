#!/usr/bin/env bash
# Boots a real guest through the API and shows its console: `make demo`.
#
#   daemon up ──► CreateVm, BootVm ──► console until the guest says that it is up ──► what to try next ──► Ctrl-C: all gone
#
# Environment:
#   VMCP_DEMO_PORT   port of the daemon on 127.0.0.1 (8080)
#   VMCP_DAEMON      the daemon to start (./vmm-controlplane)
#   VMCP_CLIENT      the command line, which shows the console (./vmcp)
#   ONCE=1           ends when the guest is up; the exit status is 0 only if the guest came up
#
# Everything that the script makes is in one temporary folder, which is removed at every end of the script.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

PORT=${VMCP_DEMO_PORT:-8080}
# The path is short, because the daemon makes Unix sockets below it and their paths have at most 107 bytes.
WORK=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-demo.XXXXXX")
CONSOLE=$WORK/console.log
VM_ID=
VMM_PID=
CONSOLE_PID=
VMCP=${VMCP_CLIENT:-$ROOT/vmcp}

cleanup() {
    local status=$?
    trap - EXIT
    trap '' INT TERM
    [ -z "$CONSOLE_PID" ] || kill "$CONSOLE_PID" 2> /dev/null || true
    if [ -n "$VM_ID" ]; then
        step "deleting $VM_ID"
        if ! api DeleteVm "{\"vm_id\": \"$VM_ID\", \"force\": true}" > "$WORK/deleted"; then
            echo "error: DeleteVm failed: $(cat "$WORK/deleted")" >&2
            status=1
        fi
    fi
    if [ -n "${DAEMON_PID:-}" ]; then
        step "stopping the daemon"
        stop_daemon
    fi
    kill_leftover_vmm "$VMM_PID"
    rm -rf "$WORK"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

need_daemon
need_linux_guest
[ -x "$VMCP" ] || die "there is no $VMCP" "run 'make build', or name the program with VMCP_CLIENT"
! port_taken "$PORT" || die "port $PORT on 127.0.0.1 is taken by another program" \
    "choose another one: VMCP_DEMO_PORT=8090 make demo"

# Prints the migration guide's 2 GiB, or 256 MiB if this machine has less memory free.
memory_bytes() {
    local available_kib
    available_kib=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo)
    if [ "$available_kib" -gt $((2560 * 1024)) ]; then echo 2147483648; else
        step "only $((available_kib / 1024)) MiB of memory are free: the guest gets 256 MiB instead of 2 GiB"
        echo 268435456
    fi
}

# The configuration of the migration guide, with an initrd and a console added and this machine's paths filled in.
config() {
    jq -n --arg kernel "$GUEST_DIR/vmlinuz" --arg initrd "$GUEST_DIR/initramfs.cpio.gz" --arg disk "$WORK/vm.img" \
        --argjson memory "$(memory_bytes)" '{config: {
            cpu: {vcpu_count: 2, max_vcpu_count: 4},
            memory: {size_bytes: $memory},
            boot: {kernel_path: $kernel, initrd_path: $initrd, kernel_args: "console=ttyS0 root=/dev/vda1"},
            storage: [{path: $disk, is_root_device: true}],
            console: {enabled: true}}}'
}

guest_is_up() { grep -aq '^vmcp-guest: ready' "$CONSOLE" 2> /dev/null; }
guest_is_up_or_over() { guest_is_up || [ "$(vm_state)" != VM_STATE_RUNNING ]; }
vm_state() { api GetVmInfo "{\"vm_id\": \"$VM_ID\"}" | jq -r .state; }

step "starting the daemon on http://127.0.0.1:$PORT (backend qemu, log $WORK/daemon.log)"
# The demo starts its own hypervisor, even if the caller's environment has an endpoint.
unset UNKEY_VMCP_QEMU_ENDPOINT VMCP_QEMU_ENDPOINT
start_daemon qemu "$PORT"
jq -c . <(curl -s "$BASE_URL/_/health")

step "creating a VM: 2 vCPUs, a disk of 16 MiB, the configuration of the migration guide"
truncate -s 16M "$WORK/vm.img"
CONFIG=$(config)
CREATED=$(api CreateVm "$CONFIG") || die "CreateVm failed: $CREATED"
jq -c . <<< "$CREATED"
VM_ID=$(jq -r .vm_id <<< "$CREATED")

step "booting $VM_ID (about 5 to 20 seconds on an emulated CPU); its console:"
BOOTED=$(api BootVm "{\"vm_id\": \"$VM_ID\"}") || die "BootVm failed: $BOOTED"
VMM_PID=$(vmm_pid "$VM_ID")
# The copy in a file is searched for the guest's messages.
"$VMCP" --server "$BASE_URL" console "$VM_ID" --no-input 2> /dev/null > >(tee "$CONSOLE" | sed -u 's/^/    | /') &
CONSOLE_PID=$!
wait_for 120 guest_is_up_or_over || die "the guest did not come up within two minutes; its console is above"
guest_is_up || die "the guest ended before it was up ($(vm_state)); its console is above"
sleep 0.6
STATE=$(vm_state)
[ "$STATE" = VM_STATE_RUNNING ] || die "the guest came up, but the API reports $STATE"
step "the guest is up: $(grep -a '^vmcp-guest: up' "$CONSOLE" | tr -d '\r')"
[ "${ONCE:-}" != 1 ] || exit 0

cat <<TEXT

Try, in another terminal, in this folder:

  export VMCP_SERVER=$BASE_URL
  ./vmcp list
  ./vmcp console $VM_ID       the guest's console: type "shell" for a shell, and ~. at the start of a line to leave
  ./vmcp get $VM_ID
  ./vmcp pause $VM_ID         and ./vmcp resume $VM_ID
  ./vmcp events $VM_ID
  ./vmcp shutdown $VM_ID      presses the power button, which the guest obeys
  ./vmcp boot $VM_ID

The same without vmcp:

  curl -s $BASE_URL/_/health
  curl -s -X POST -H 'Content-Type: application/json' -d '{}' $BASE_URL/vmm.v1.VmService/ListVms
  curl -s -X POST -H 'Content-Type: application/json' -d '{"vm_id": "$VM_ID"}' $BASE_URL/vmm.v1.VmService/GetVmInfo

Press Ctrl-C here to delete the VM and stop the daemon.
TEXT
wait "$DAEMON_PID" || die "the daemon has ended by itself; the end of its log: $(tail -n 5 "$WORK/daemon.log")"
