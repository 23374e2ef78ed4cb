#!/usr/bin/env bash
# Tests the API from Python: requests, urllib, and grpcio with stubs generated from the .proto file.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"

need python3
cd "$CLIENTS/python"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || skip "$(python3 --version) is too old: 3.10 is needed"
python3 -c 'import venv, ensurepip' 2> /dev/null || skip "Python's venv is not installed (Debian: python3-venv)"
use_daemon

# The packages are installed once, and again if the requirements or Python changed.
stamp=$(cat requirements.txt <(python3 -VV) | sha256sum)
if [ "$(cat .venv/.stamp 2> /dev/null)" != "$stamp" ]; then
    step "fetching 14 Python packages (once)"
    rm -rf .venv
    bounded 120 python3 -m venv .venv
    # Wheels only, because compiling grpcio takes half an hour.
    bounded 300 .venv/bin/pip install -q --disable-pip-version-check --no-input --only-binary :all: --no-deps -r requirements.txt ||
        die "pip could not install what requirements.txt names"
    .venv/bin/pip check -q --disable-pip-version-check || die "requirements.txt contradicts itself; the reason is above"
    echo "$stamp" > .venv/.stamp
fi

step "generating Python from vm.proto"
rm -rf gen
mkdir gen
bounded 60 .venv/bin/python -m grpc_tools.protoc -I "$ROOT/proto" --python_out=gen --grpc_python_out=gen vmm/v1/vm.proto ||
    die "no code could be generated; the reason is above"

launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
PYTHONPATH=gen PYTHONDONTWRITEBYTECODE=1 bounded 240 .venv/bin/python main.py || fail "clients/python" "exit status $?, see above"
finish
