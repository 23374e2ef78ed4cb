#!/usr/bin/env bash
# Generates the API's packages for Go, TypeScript and Python, which install as they are: `make sdk`.
#
#   proto/vmm/v1/vm.proto ──► target/sdk/go          a module with the import paths of the migration guide
#                         ──► target/sdk/typescript  an npm package with types, and packed as vmm-controlplane-VERSION.tgz
#                         ──► target/sdk/python      a project for pip, and built as a wheel in dist/
#
# Usage: scripts/sdk.sh [go|typescript|python]…; without a language all three. The packages are not committed, because the .proto file
# tells all that they have. Each has a README, whose example the tests under clients/ run.
#
# Environment:
#   VMCP_SDK_DIR   the folder for the packages, instead of target/sdk
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
export PATH=$PATH:$TOOLS_DIR
SDK=${VMCP_SDK_DIR:-$ROOT/target/sdk}
VERSION=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml")

# Called by install.sh of a language where its tools are missing.
skip() { die "$*, so that no package can be generated"; }

# Makes the folder of a package anew, with the files that are written by hand: begin LANGUAGE FOLDER-OF-THE-CLIENT
begin() {
    local file
    step "generating $SDK/$1"
    rm -rf "${SDK:?}/$1"
    mkdir -p "$SDK/$1"
    cp "$ROOT/LICENSE" "$SDK/$1/"
    for file in "$ROOT/clients/$2/sdk"/*; do
        sed "s/@VERSION@/$VERSION/g" "$file" > "$SDK/$1/$(basename "$file")"
    done
}

# The client's go.sum has more than the package needs, which Go ignores.
make_go() {
    command -v go > /dev/null || skip "go is not installed"
    begin go go
    (cd "$ROOT/clients/go" && rm -rf gen && go run ./internal/generate "$ROOT/proto" vmm/v1/vm.proto && cp -r gen "$SDK/go/")
    cp "$ROOT/clients/go/go.sum" "$SDK/go/"
    cat > "$SDK/go/go.mod" << END
module vmm-controlplane

go $(cd "$ROOT/clients/go" && go list -m -f '{{.GoVersion}}')

require (
	connectrpc.com/connect $(cd "$ROOT/clients/go" && go list -m -f '{{.Version}}' connectrpc.com/connect)
	google.golang.org/protobuf $(cd "$ROOT/clients/go" && go list -m -f '{{.Version}}' google.golang.org/protobuf)
)
END
}

make_typescript() {
    # shellcheck source=clients/node/install.sh
    . "$ROOT/clients/node/install.sh"
    need_node
    command -v buf > /dev/null || skip "buf is not installed ('make setup' installs it)"
    install_packages
    begin typescript node
    local plugin=$ROOT/clients/node/node_modules/@bufbuild/protoc-gen-es/bin/protoc-gen-es
    buf generate "$ROOT/proto" --path "$ROOT/proto/vmm" --path "$ROOT/proto/google" --template '{"version": "v2", "plugins": [{
        "local": ["node", "'"$plugin"'"], "out": "'"$SDK/typescript/dist"'", "opt": ["target=js+dts", "import_extension=js"]}]}'
    printf 'export * from "./vmm/v1/vm_pb.js";\nexport * from "./google/rpc/error_details_pb.js";\n' |
        tee "$SDK/typescript/dist/index.js" > "$SDK/typescript/dist/index.d.ts"
    (cd "$SDK/typescript" && npm pack --silent > /dev/null)
}

make_python() {
    # shellcheck source=clients/python/install.sh
    . "$ROOT/clients/python/install.sh"
    need_python
    install_packages
    begin python python
    local venv=$ROOT/clients/python/.venv
    "$venv/bin/python" -m grpc_tools.protoc -I "$ROOT/proto" --python_out="$SDK/python" --pyi_out="$SDK/python" \
        --grpc_python_out="$SDK/python" vmm/v1/vm.proto
    touch "$SDK/python/vmm/__init__.py" "$SDK/python/vmm/v1/__init__.py" "$SDK/python/vmm/py.typed"
    "$venv/bin/pip" wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w "$SDK/python/dist" "$SDK/python"
    rm -rf "$SDK/python/build" "$SDK/python"/*.egg-info
}

[ $# -gt 0 ] || set -- go typescript python
for language; do
    case $language in
        go | typescript | python) ;;
        *) die "there is no package for $language" "the languages are go, typescript and python" ;;
    esac
done
if [ $# = 1 ]; then
    "make_$1"
    step "$SDK/$1 is complete; its README tells how to install it"
    exit
fi
# Each language is made by a script of its own, so that the others are made where one cannot be.
failed=()
for language; do
    "${BASH_SOURCE[0]}" "$language" || failed+=("$language")
done
[ ${#failed[@]} = 0 ] || die "no package was generated for: ${failed[*]}; the reasons are above"
