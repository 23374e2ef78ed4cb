#!/usr/bin/env bash
# Refuses every import between the project's crates that the table in check-imports.py does not have.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 scripts/check-imports.py "$@"
