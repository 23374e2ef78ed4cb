#!/usr/bin/env bash
# Refuses every import between the project's crates that the house does not have; see check-imports.py for the table.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 scripts/check-imports.py
