#!/usr/bin/env bash
# Checks the API's .proto file with the program buf: its style (buf lint), and that clients of the last release keep working (buf breaking).
#
#   proto/           the API, and in buf.yaml the rules with their exceptions
#   proto-released/  the API at the last release, without comments: the reference that the API is compared with
#
# The reference is text and not a descriptor image, because a reviewer reads its change. Before the first release the reference is the
# API with which this check began. `scripts/check-api.sh --release` writes the reference anew; a release does so, and nothing else.
#
# The script also proves that the comparison works: a copy of the API with one breaking change must be refused, for each kind of change,
# and a copy with an addition must pass.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"
export PATH=$PATH:$TOOLS_DIR
API=vmm/v1/vm.proto

WORK=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-api.XXXXXX")
trap 'rm -rf "$WORK"' EXIT

# Compares a folder of .proto files with the reference.
compare() { buf breaking "$1" --against proto-released; }

# Makes a copy of the API with one line changed: changed WHAT SED-EXPRESSION. The copy is at $WORK/proto.
changed() {
    rm -rf "$WORK/proto"
    cp -r proto "$WORK/proto"
    sed -i "$2" "$WORK/proto/$API"
    ! cmp -s "proto/$API" "$WORK/proto/$API" ||
        die "the copy that should have $1 equals the API" "correct the expression in scripts/check-api.sh"
}

# Fails unless a change is refused with words that name the changed thing: refused WHAT SED-EXPRESSION WORDS.
refused() {
    local found
    changed "$1" "$2"
    if found=$(compare "$WORK/proto" 2>&1) || ! grep -qF "$3" <<< "$found"; then
        die "buf breaking does not find $1; it said: ${found:-nothing}"
    fi
}

[ "${1:-}" != --release ] || {
    grep -v '^ *//' "proto/$API" | cat -s > "proto-released/$API"
    step "proto-released/$API is the API of this release"
    exit 0
}

buf lint proto || die "the API breaks a rule of proto/buf.yaml; the rule is above"
compare proto || die "clients of the last release would stop working; the change is above" \
    "take the change back, and add a field, a message or a method instead (docs/adding-a-field.md)"
refused "another number of a field" 's/int32 vcpu_count = 1;/int32 vcpu_count = 9;/' '"vcpu_count"'
refused "another type of a field" 's/int64 size_bytes = 1;/int32 size_bytes = 1;/' '"size_bytes"'
refused "another name of a field" 's/string kernel_path = 1;/string kernel = 1;/' '"kernel_path"'
refused "one method less" '/rpc PauseVm(/d' '"PauseVm"'
refused "a value of an enum less" '/VM_STATE_PAUSED = 3;/d' 'on enum "VmState"'
refused "another Go package" 's,vmm-controlplane/gen/vmm/v1,example.com/vmm/v1,' '"go_package"'
changed "a new field" 's/\( *\)int32 vcpu_count = 1;/&\n\1int32 vcpu_weight = 999;/'
compare "$WORK/proto" || die "buf breaking refuses an addition; its words are above"
echo "API: the style holds, clients of the last release keep working, and 6 kinds of breaking changes are found"
