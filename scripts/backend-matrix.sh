#!/usr/bin/env bash
# Runs the backend suite on every column whose program is installed, and writes the results into docs/backend-support.md.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"

# Old results would remain for cases that no longer exist.
rm -rf "${CARGO_TARGET_DIR:-target}/backend-suite"
cargo test --quiet -p vmm-controlplane --test suite --no-run
# With this variable the tests do not compare their results with the document, because the document is about to change.
VMCP_BACKEND_MATRIX=update cargo test -p vmm-controlplane --test suite --no-fail-fast \
    || echo "some cases failed; the matrix names them" >&2
cargo run --quiet -p vmm-testkit --bin backend-matrix
echo "docs/backend-support.md is written; read its changes before you commit it"
