# shellcheck shell=bash
# Installs the packages of clients/python, which scripts/sdk.sh uses too. The file is sourced after clients/lib.sh or scripts/lib.sh.

# Ends the caller as skipped where Python is missing or too old. The caller defines `skip`.
need_python() {
    command -v python3 > /dev/null || skip "python3 is not installed"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || skip "$(python3 --version) is too old: 3.10 is needed"
    python3 -c 'import venv, ensurepip' 2> /dev/null || skip "Python's venv is not installed (Debian: python3-venv)"
}

# Installs the packages once, and again if the requirements or Python changed.
install_packages() {
    local folder=$ROOT/clients/python stamp
    local venv=$folder/.venv
    stamp=$(cat "$folder/requirements.txt" <(python3 -VV) | sha256sum)
    [ "$(cat "$venv/.stamp" 2> /dev/null)" != "$stamp" ] || return 0
    step "fetching 14 Python packages (once)"
    rm -rf "$venv"
    timeout 120 python3 -m venv "$venv"
    # Wheels only, because compiling grpcio takes half an hour.
    timeout 300 "$venv/bin/pip" install -q --disable-pip-version-check --no-input --only-binary :all: --no-deps -r "$folder/requirements.txt" ||
        die "pip could not install what requirements.txt names"
    "$venv/bin/pip" check -q --disable-pip-version-check || die "requirements.txt contradicts itself; the reason is above"
    echo "$stamp" > "$venv/.stamp"
}
