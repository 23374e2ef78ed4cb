#!/usr/bin/env bash
# Tests the migration guide's curl commands as printed, except address and paths, and the other promises of the API's JSON.
# shellcheck disable=SC2016  # the $names in single quotes are jq's
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"

# call NAME STATUS CONDITION CURL-ARGUMENT…: the answer must have this HTTP status and satisfy a jq condition.
call() {
    local name=$1 wanted=$2 condition=$3 status
    shift 3
    status=$(curl -sS --max-time 60 -o "$WORK/answer" -w '%{http_code}' "$@") || { fail "$name" "no answer" && return; }
    if [ "$status" != "$wanted" ]; then
        fail "$name" "HTTP $status, not $wanted: $(cat "$WORK/answer")"
    elif ! jq -e --arg kernel "$KERNEL" --arg disk "$DISK" "$condition" "$WORK/answer" > "$WORK/jq" 2>&1; then
        fail "$name" "not so: $condition: $(cat "$WORK/answer")"
    else
        ok "$name"
    fi
}

# method NAME STATUS CONDITION METHOD JSON: a POST as the guide makes it.
method() {
    call "$1" "$2" "$3" -X POST "$URL/vmm.v1.VmService/$4" -H "Content-Type: application/json" -d "$5"
}

# Prints the id in the last answer.
last_id() { jq -r '.vm_id // "none"' "$WORK/answer"; }

CREATED='.state == "VM_STATE_CREATED" and (.vm_id | startswith("vm-"))'

guide_examples() {
    local id
    method "guide: HTTP client migration" 200 "$CREATED" CreateVm '{
    "config": {
      "cpu": {"vcpu_count": 2},
      "memory": {"size_bytes": 2147483648},
      "boot": {"kernel_path": "'"$KERNEL"'"}
    }
  }'
    cat > "$WORK/your-old-vm-config.json" << END
{
  "config": {
    "cpu": {"vcpu_count": 2, "max_vcpu_count": 4},
    "memory": {"size_bytes": 2147483648},
    "boot": {
      "kernel_path": "$KERNEL",
      "kernel_args": "console=ttyS0 root=/dev/vda1"
    },
    "storage": [{
      "path": "$DISK",
      "is_root_device": true
    }]
  }
}
END
    method "guide: configuration format, from a file" 200 "$CREATED" CreateVm @"$WORK/your-old-vm-config.json"
    id=$(last_id)
    method "it is kept as it was sent" 200 '.config | .cpu == {vcpu_count: 2, max_vcpu_count: 4}
        and .memory.size_bytes == "2147483648" and .boot.kernel_path == $kernel
        and .boot.kernel_args == "console=ttyS0 root=/dev/vda1" and .storage[0].path == $disk
        and .storage[0].is_root_device and (.storage[0].id | length > 0)' GetVmInfo '{"vm_id": "'"$id"'"}'
    method "and it boots" 200 '. == {success: true, state: "VM_STATE_RUNNING"}' BootVm '{"vm_id": "'"$id"'"}'
    method "and is deleted" 200 '. == {success: true}' DeleteVm '{"vm_id": "'"$id"'", "force": true}'
    local enhanced='{
  "config": {
    "cpu": {
      "vcpu_count": 2,
      "max_vcpu_count": 4  // Used by Cloud Hypervisor, ignored by Firecracker
    },
    "memory": {"size_bytes": 2147483648},
    "boot": {
      "kernel_path": "'"$KERNEL"'",
      "kernel_args": "console=ttyS0 root=/dev/vda1"
    }
  }
}'
    method "guide: enhanced options, without the annotation" 200 "$CREATED" CreateVm "${enhanced/\/\/ Used*by Firecracker/}"
    method "the annotation is not JSON" 400 '.code == "invalid_argument"' CreateVm "$enhanced"
    method "without a kernel, the host's default" 200 "$CREATED" CreateVm \
        '{"config": {"cpu": {"vcpu_count": 2}, "memory": {"size_bytes": 2147483648}}}'
    method "which is returned" 200 '.config.boot.kernel_path == $kernel' GetVmInfo '{"vm_id": "'"$(last_id)"'"}'
}

health_and_paths() {
    call "guide: health" 200 '.status == "healthy" and .backend == "qemu" and (.uptime_seconds | type == "number")
        and (.version | type == "string")' "$URL/_/health"
    call "short health" 200 '.status == "healthy"' "$URL/health"
    call "guide: the old service is not found, by GET" 404 '.message | contains("/vmm.v1.VmService/CreateVm")' \
        "$URL/cloudhypervisor.v1.VmService/CreateVm"
    call "guide: the old service is not found, by POST" 404 '.message | contains("/vmm.v1.VmService/BootVm")' \
        -X POST "$URL/cloudhypervisor.v1.VmService/BootVm" -H "Content-Type: application/json" -d '{}'
    call "a method that changes something does not answer GET" 405 '.message | contains("POST")' "$URL/vmm.v1.VmService/CreateVm"
    call "curl's own content type is refused with advice" 415 '.message | contains("application/json")' \
        -X POST "$URL/vmm.v1.VmService/ListVms" -d '{}'
}

spelling() {
    method "snake_case and a number" 200 '.vm_id == "snake" and .state == "VM_STATE_CREATED"' CreateVm '{"vm_id": "snake",
        "config": {"cpu": {"vcpu_count": 1}, "memory": {"size_bytes": 134217728}, "boot": {"kernel_path": "'"$KERNEL"'"},
        "metadata": {"made_by": "curl", "madeBy": "curl too"}}}'
    method "lowerCamelCase and a string" 200 '.vm_id == "camel" and .state == "VM_STATE_CREATED"' CreateVm '{"vmId": "camel",
        "config": {"cpu": {"vcpuCount": 1}, "memory": {"sizeBytes": "134217728"}, "boot": {"kernelPath": "'"$KERNEL"'"},
        "metadata": {"made_by": "curl", "madeBy": "curl too"}}}'
    local expected='.config.memory.size_bytes == "134217728" and .config.boot.kernel_path == $kernel
        and .config.metadata == {made_by: "curl", madeBy: "curl too"}
        and ([paths | .[] | strings | select(test("^[a-z]+[A-Z]"))] | unique - ["madeBy"] == [])'
    method "one answer for both: snake_case" 200 ".vm_id == \"snake\" and $expected" GetVmInfo '{"vm_id": "snake"}'
    method "one answer for both: lowerCamelCase" 200 ".vm_id == \"camel\" and $expected" GetVmInfo '{"vmId": "camel"}'
    method "an unknown field is named" 400 '.code == "invalid_argument" and (.message | contains("config.cpu.vcpus"))' CreateVm \
        '{"config": {"cpu": {"vcpus": 2}, "memory": {"size_bytes": 134217728}}}'
    method "every violation at once" 400 '.code == "invalid_argument" and .details[0].type == "google.rpc.BadRequest"
        and (.message | contains("config.cpu.vcpu_count") and contains("config.memory"))' CreateVm \
        '{"config": {"cpu": {"vcpu_count": -1}, "memory": {"size_bytes": 1000}}}'
}

reads_by_get() {
    call "ListVms by GET" 200 '.total_count >= 2 and ([.vms[].vm_id] | contains(["snake", "camel"]))' -G "$URL/vmm.v1.VmService/ListVms" \
        -d connect=v1 -d encoding=json --data-urlencode 'message={"metadata_filter": {"made_by": "curl"}}'
    call "GetVmInfo by GET" 200 '.vm_id == "snake"' -G "$URL/vmm.v1.VmService/GetVmInfo" \
        -d connect=v1 -d encoding=json --data-urlencode 'message={"vm_id": "snake"}'
}

lifecycle() {
    local id='{"vm_id": "snake"}'
    method "PauseVm is too early" 400 '.code == "failed_precondition" and (.message | contains("BootVm"))' PauseVm "$id"
    method "BootVm" 200 '. == {success: true, state: "VM_STATE_RUNNING"}' BootVm "$id"
    method "PauseVm" 200 '. == {success: true, state: "VM_STATE_PAUSED"}' PauseVm "$id"
    method "ResumeVm" 200 '. == {success: true, state: "VM_STATE_RUNNING"}' ResumeVm "$id"
    method "RebootVm" 200 '. == {success: true, state: "VM_STATE_RUNNING", ended_by: "vmm"}' RebootVm '{"vm_id": "snake", "force": true}'
    method "ShutdownVm asks, then powers off" 200 '.success and .state == "VM_STATE_SHUTDOWN" and (.ended_by | length > 0)' \
        ShutdownVm '{"vm_id": "snake", "timeout_seconds": 1}'
    method "DeleteVm" 200 '. == {success: true}' DeleteVm "$id"
    method "GetVmInfo after it" 404 '.code == "not_found"' GetVmInfo "$id"
    method "ListVmEvents tells of a VM that is gone" 200 '[.events[].type] | first == "created" and last == "deleted"' \
        ListVmEvents "$id"
    method "WaitVm answers at once" 200 '.vm_id == "camel" and .state == "VM_STATE_CREATED"' WaitVm \
        '{"vm_id": "camel", "states": ["VM_STATE_CREATED"], "timeout_seconds": 60}'
}

use_daemon
DISK=$WORK/vm.img
truncate -s 1M "$DISK"
launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
# The id that the guide uses.
URL=${BASE_URL/127.0.0.1/localhost}
guide_examples
health_and_paths
spelling
reads_by_get
lifecycle
finish

end_daemon
unset UNKEY_VMCP_DEFAULT_KERNEL
launch
URL=$BASE_URL
method "without a kernel and without a default, the variable is named" 400 '.code == "invalid_argument"
    and (.message | contains("config.boot.kernel_path") and contains("UNKEY_VMCP_DEFAULT_KERNEL"))' CreateVm \
    '{"config": {"cpu": {"vcpu_count": 2}, "memory": {"size_bytes": 2147483648}}}'
finish
