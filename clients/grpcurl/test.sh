#!/usr/bin/env bash
# Tests the API with grpcurl.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=clients/reflection.sh
. "$CLIENTS/reflection.sh"

call() { grpcurl -plaintext -d "$2" "${BASE_URL#http://}" "vmm.v1.VmService/$1"; }

# described NAME SYMBOL TEXT: grpcurl describes a symbol with this text.
described() {
    local found
    found=$(bounded 60 grpcurl -plaintext "${BASE_URL#http://}" describe "$2" 2>&1) || true
    if grep -qF "$3" <<< "$found"; then ok "$1"; else fail "$1" "$found"; fi
}

need grpcurl
use_daemon
launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
services=$(bounded 60 grpcurl -plaintext "${BASE_URL#http://}" list) || fail "grpcurl: list the services" "exit status $?"
if grep -qx vmm.v1.VmService <<< "$services"; then ok "grpcurl: list the services"; else fail "grpcurl: list the services" "$services"; fi
described "grpcurl: describe a method" vmm.v1.VmService.WatchVms "returns ( stream .vmm.v1.VmEvent )"
described "grpcurl: describe a message, with its comments" vmm.v1.CpuConfig "Virtual processors at boot"
lifecycle "grpcurl: lifecycle" grpcurl
watch "grpcurl: a watch"
console "grpcurl: a console" grpcurl-console
finish
