#!/usr/bin/env bash
# Tests the API from Python: requests, urllib, and grpcio with stubs generated from the .proto file.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=clients/python/install.sh
. "$CLIENTS/python/install.sh"

# Called by `sdk`: the steps of the README, into a folder instead of an environment.
# shellcheck disable=SC2317,SC2329
install_sdk() {
    readme_example "$1" python > "$2/main.py"
    bounded 120 .venv/bin/pip install -q --disable-pip-version-check --no-input --only-binary :all: --target "$2/site" "$1"/dist/*.whl &&
        PYTHONPATH=$2/site bounded 60 python3 "$2/main.py"
}

need_python
cd "$CLIENTS/python"
use_daemon
install_packages

step "generating Python from vm.proto"
rm -rf gen
mkdir gen
bounded 60 .venv/bin/python -m grpc_tools.protoc -I "$ROOT/proto" --python_out=gen --grpc_python_out=gen vmm/v1/vm.proto ||
    die "no code could be generated; the reason is above"

launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
PYTHONPATH=gen PYTHONDONTWRITEBYTECODE=1 bounded 240 .venv/bin/python main.py || fail "clients/python" "exit status $?, see above"
sdk python
finish
