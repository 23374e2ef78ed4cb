#!/usr/bin/env bash
# Tests the API over connect-go, with code generated from the .proto file by Go modules alone.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"

# Called by `sdk`: the steps of the README.
# shellcheck disable=SC2317,SC2329
install_sdk() {
    readme_example "$1" go > "$2/main.go"
    cd "$2" && go mod init example.com/project && go mod edit -require=vmm-controlplane@v0.0.0 -replace=vmm-controlplane="$1" &&
        bounded 120 go mod tidy && bounded 120 go run .
}

need go
cd "$CLIENTS/go"
go env GOVERSION > "$WORK/go" 2>&1 || skip "this Go is too old: $(tail -n 1 "$WORK/go")"
use_daemon

step "generating Go from vm.proto (fetches 5 modules at the first run)"
rm -rf gen
bounded 300 go run ./internal/generate "$ROOT/proto" vmm/v1/vm.proto || die "no code could be generated; the reason is above"
step "building the Go client"
bounded 300 go build -o "$WORK/go-client" . || die "the client does not build; the reason is above"
# The client's own code must be clean; the generated code need not.
bounded 120 go vet . ./internal/... || fail "go vet" "see above"
[ -z "$(gofmt -l ./*.go internal)" ] || fail gofmt "run gofmt -w clients/go"

launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
bounded 240 "$WORK/go-client" || fail "clients/go" "exit status $?, see above"
sdk go
finish
