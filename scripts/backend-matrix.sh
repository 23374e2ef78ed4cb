#!/usr/bin/env bash
# Runs the backend suite on every column whose program is here, and writes what it found into docs/backend-support.md.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"

# Old results would stand for cases that are no longer run.
rm -rf "${CARGO_TARGET_DIR:-target}/backend-suite"
cargo test --quiet -p vmm-controlplane --test suite --no-run
# The variable has the tests find without comparing: the document is about to change.
VMCP_BACKEND_MATRIX=update cargo test -p vmm-controlplane --test suite --no-fail-fast \
    || echo "some cases failed; the matrix says which" >&2
cargo run --quiet -p vmm-testkit --bin backend-matrix
echo "docs/backend-support.md is written; look at what changed before you commit it"
