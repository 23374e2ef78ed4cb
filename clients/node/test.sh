#!/usr/bin/env bash
# Tests the API over connect-es, with code generated from the daemon's reflection service.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=clients/node/install.sh
. "$CLIENTS/node/install.sh"

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
finish
