#!/usr/bin/env bash
# Tests the API over connect-es, with code generated from the daemon's reflection service.
# shellcheck source=clients/lib.sh
. "$(dirname "$0")/../lib.sh"

need node npm
cd "$CLIENTS/node"
[ "$(node -p 'Number(process.versions.node.split(".")[0]) >= 20')" = true ] || skip "Node $(node --version) is too old: 20 is needed"
use_daemon

# The packages are installed once, and again if the lock file or Node changed.
stamp=$(cat package-lock.json <(node --version) | sha256sum)
if [ "$(cat node_modules/.stamp 2> /dev/null)" != "$stamp" ]; then
    step "fetching 7 npm packages (once)"
    bounded 300 npm ci --ignore-scripts --no-audit --no-fund --loglevel=error || die "npm could not install what package-lock.json names"
    echo "$stamp" > node_modules/.stamp
fi

launch UNKEY_VMCP_DEFAULT_KERNEL="$KERNEL"
step "generating JavaScript from the daemon's reflection service"
if bounded 60 node generate.mjs; then
    ok "code from reflection"
    bounded 240 node main.mjs || fail "clients/node" "exit status $?, see above"
else
    fail "code from reflection" "see above"
fi
finish
