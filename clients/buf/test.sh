#!/usr/bin/env bash
# Tests the API with buf curl, over Connect, gRPC and gRPC-Web.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=clients/reflection.sh
. "$CLIENTS/reflection.sh"

# Makes one call in $PROTOCOL. Reflection is a stream in both directions, so that buf asks for HTTP/2.
call() {
    buf curl --http2-prior-knowledge --protocol "$PROTOCOL" -d "$2" "$BASE_URL/vmm.v1.VmService/$1"
}

need buf
use_daemon
launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
methods=$(bounded 60 buf curl --http2-prior-knowledge --list-methods "$BASE_URL") || fail "buf: list the methods" "exit status $?"
if grep -qx vmm.v1.VmService/CreateVm <<< "$methods"; then ok "buf: list the methods"; else fail "buf: list the methods" "$methods"; fi
for PROTOCOL in connect grpc grpcweb; do
    lifecycle "buf curl: lifecycle over $PROTOCOL" "buf-$PROTOCOL"
    watch "buf curl: a watch over $PROTOCOL"
    console "buf curl: a console over $PROTOCOL" "buf-console-$PROTOCOL"
done
finish
