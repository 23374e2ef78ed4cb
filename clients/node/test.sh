#!/usr/bin/env bash
# Tests the API over connect-es, with code generated from the daemon's reflection service.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=clients/node/install.sh
. "$CLIENTS/node/install.sh"

# Called by `sdk`: the steps of the README, with the versions that the client was tested with, and a check of the types.
# shellcheck disable=SC2317,SC2329
install_sdk() {
    local version=(-p 'Object.entries(require("./package.json").devDependencies).map((pair) => pair.join("@")).filter((name) => name.startsWith("@connectrpc") || name.startsWith("@types")).join(" ")')
    readme_example "$1" ts > "$2/main.ts"
    echo '{"name": "project", "private": true, "type": "module"}' > "$2/package.json"
    # shellcheck disable=SC2046,SC2086  # a list of packages
    bounded 120 npm install --prefix "$2" --prefer-offline --ignore-scripts --no-audit --no-fund --loglevel=error "$1"/*.tgz $(node "${version[@]}") &&
        (cd "$2" && bounded 60 "$CLIENTS/node/node_modules/.bin/tsc" --strict --skipLibCheck --target es2022 --module nodenext main.ts &&
            bounded 60 node main.js)
}

need_node
cd "$CLIENTS/node"
use_daemon

install_packages

launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
step "generating TypeScript from the daemon's reflection service"
if bounded 60 node generate.mjs; then
    ok "code from reflection"
    rm -rf build
    bounded 120 node_modules/.bin/tsc || die "the client does not compile; the reason is above"
    bounded 240 node build/main.js || fail "clients/node" "exit status $?, see above"
else
    fail "code from reflection" "see above"
fi
if command -v buf > /dev/null; then sdk typescript; else echo "SKIPPED: the typescript package of make sdk: buf is not installed"; fi
finish
