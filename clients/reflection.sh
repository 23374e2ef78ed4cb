# shellcheck shell=bash
# The part that the tests of buf curl and grpcurl have in common. Both programs know nothing of the API but what the daemon's reflection
# service tells. The file is sourced, never run. The test defines
#
#   call METHOD JSON   makes one call and prints the answers as JSON. A failure goes to standard error, with a status other than 0.
#
# and each check has a name of one program and one protocol.

# expect NAME METHOD JSON CONDITION: the call succeeds, and its answer satisfies a jq condition.
expect() {
    if ! call "$2" "$3" > "$WORK/answer" 2> "$WORK/error"; then
        fail "$1" "$(cat "$WORK/error")"
        return 1
    elif ! jq -e "$4" "$WORK/answer" > /dev/null 2>&1; then
        fail "$1" "not so: $4: $(cat "$WORK/answer")"
        return 1
    fi
}

# refused NAME METHOD JSON CODE: the call fails, and the failure names the code, in the spelling of either program.
refused() {
    if call "$2" "$3" > "$WORK/answer" 2> "$WORK/error"; then
        fail "$1" "$2 was accepted; $4 was expected"
        return 1
    elif ! tr -d '_' < "$WORK/error" | grep -qi "code.*${4//_/}"; then
        fail "$1" "$4 was expected: $(cat "$WORK/error")"
        return 1
    fi
}

# Takes one VM from its creation to its deletion, by the steps of the other clients: lifecycle NAME VM_ID
lifecycle() {
    local name=$1 id="{\"vm_id\": \"$2\"}" force="{\"vm_id\": \"$2\", \"force\": true}" state=".state == \"VM_STATE_"
    expect "$name" CreateVm "{\"vm_id\": \"$2\", \"config\": {\"cpu\": {\"vcpu_count\": 1}, \"memory\": {\"size_bytes\": 134217728},
            \"boot\": {\"kernel_path\": \"$KERNEL\"}, \"metadata\": {\"made_by\": \"$2\"}}}" ".vmId == \"$2\" and ${state}CREATED\"" &&
        refused "$name" PauseVm "$id" failed_precondition &&
        expect "$name" BootVm "$id" ".success and ${state}RUNNING\"" &&
        expect "$name" BootVm "$id" ".success and ${state}RUNNING\"" &&
        expect "$name" PauseVm "$id" ".success and ${state}PAUSED\"" &&
        expect "$name" ResumeVm "$id" ".success and ${state}RUNNING\"" &&
        expect "$name" RebootVm "$force" ".success and ${state}RUNNING\"" &&
        expect "$name" ShutdownVm "$force" ".success and ${state}SHUTDOWN\"" &&
        expect "$name" GetVmInfo "$id" "${state}SHUTDOWN\" and .config.memory.sizeBytes == \"134217728\"" &&
        expect "$name" ListVms "{\"metadata_filter\": {\"made_by\": \"$2\"}}" ".totalCount == 1 and .vms[0].vmId == \"$2\"" &&
        expect "$name" BootVm "$id" ".success and ${state}RUNNING\"" &&
        refused "$name" DeleteVm "$id" failed_precondition &&
        expect "$name" DeleteVm "$force" .success &&
        refused "$name" GetVmInfo "$id" not_found &&
        ok "$name"
}

# open_stream METHOD JSON: starts a call whose answers `until_seen` reads from the file $STREAM.
open_stream() {
    STREAM=$WORK/stream
    call "$1" "$2" > "$STREAM" 2> "$WORK/error" &
    STREAM_PID=$!
}

# Waits until a jq condition holds for one answer of the stream. An answer that is written only in part is no JSON yet.
until_seen() {
    # shellcheck disable=SC2317,SC2329  # called by wait_for
    seen() { jq -n -e "first(inputs | select($1))" < "$STREAM" > /dev/null 2>&1; }
    wait_for 30 seen "$1"
}

# Ends a stream that the server does not end.
close_stream() {
    kill "$STREAM_PID" 2> /dev/null || true
    wait "$STREAM_PID" 2> /dev/null || true
}

# Reads a watch up to the event that ends the present states: watch NAME
watch() {
    open_stream WatchVms '{}'
    if until_seen '.type == "synced"'; then ok "$1"; else fail "$1" "no event was \"synced\": $(cat "$STREAM" "$WORK/error")"; fi
    close_stream
}

# Reads the console of a guest from its first message on, types a line, and reads the guest's echo. The stream must end without an error
# when the VM is deleted: console NAME VM_ID
console() {
    local name=$1 status=0 id="{\"vm_id\": \"$2\"}" text='[inputs.data // "" | @base64d] | add // ""'
    # shellcheck disable=SC2317,SC2329  # called by wait_for
    shown() { jq -n -r "$text" < "$STREAM" 2> /dev/null | grep -qF "$1"; }
    expect "$name" CreateVm "{\"vm_id\": \"$2\", \"config\": {\"cpu\": {\"vcpu_count\": 1}, \"memory\": {\"size_bytes\": 134217728},
        \"boot\": {\"kernel_path\": \"$VMCP_TEST_ECHO_KERNEL\"}}}" ".vmId == \"$2\"" || return 0
    expect "$name" BootVm "$id" .success || return 0
    open_stream StreamConsole "{\"vm_id\": \"$2\", \"follow\": true}"
    if ! wait_for 30 shown kind=echo; then
        fail "$name" "no first message: $(cat "$STREAM" "$WORK/error")"
    elif expect "$name" WriteConsole "{\"vm_id\": \"$2\", \"data\": \"$(printf 'hello from %s\r' "$2" | base64 -w 0)\"}" 'true'; then
        wait_for 30 shown "hello from $2" || fail "$name" "no echo: $(cat "$STREAM" "$WORK/error")"
    fi
    expect "$name" DeleteVm "{\"vm_id\": \"$2\", \"force\": true}" .success || close_stream
    wait "$STREAM_PID" || status=$?
    if [ "$status" = 0 ]; then ok "$name"; else fail "$name" "the stream ended with status $status: $(cat "$WORK/error")"; fi
}
