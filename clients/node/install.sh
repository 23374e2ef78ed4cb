# shellcheck shell=bash
# Installs the npm packages of clients/node, which scripts/sdk.sh uses too. The file is sourced after clients/lib.sh or scripts/lib.sh.

# Ends the caller as skipped where Node is missing or too old. The caller defines `skip`.
need_node() {
    command -v node > /dev/null || skip "node is not installed"
    command -v npm > /dev/null || skip "npm is not installed"
    [ "$(node -p 'Number(process.versions.node.split(".")[0]) >= 20')" = true ] || skip "Node $(node --version) is too old: 20 is needed"
}

# Installs the packages once, and again if the lock file or Node changed.
install_packages() {
    local folder=$ROOT/clients/node stamp
    stamp=$(cat "$folder/package-lock.json" <(node --version) | sha256sum)
    [ "$(cat "$folder/node_modules/.stamp" 2> /dev/null)" != "$stamp" ] || return 0
    step "fetching 10 npm packages (once)"
    (cd "$folder" && timeout 300 npm ci --ignore-scripts --no-audit --no-fund --loglevel=error) ||
        die "npm could not install what package-lock.json names"
    echo "$stamp" > "$folder/node_modules/.stamp"
}
