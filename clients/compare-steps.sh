#!/usr/bin/env bash
# Fails unless lifecycle, watch and console have the same numbered steps in every language, so that a reader can compare them.
set -euo pipefail
cd "$(dirname "$0")"

# Prints the steps of a part, in the order of a language's files.
steps() { sed -nE 's/^[[:space:]]*(\/\/|#) (Step [0-9]+: .*)$/\2/p' "$1"; }

different=0
for part in lifecycle watch console; do
    wanted=$(steps "go/$part.go")
    [ -n "$wanted" ] || { echo "go/$part.go has no steps" && different=1; }
    for file in "node/$part.ts" "python/$part.py" "rust/src/$part.rs"; do
        diff --label "go/$part.go" --label "$file" -u <(echo "$wanted") <(steps "$file") || different=1
    done
done
[ "$different" = 0 ] || { echo "error: the steps differ; write the same steps in each language" && exit 1; }
echo "the clients in 4 languages have the same steps"
