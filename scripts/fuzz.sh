#!/usr/bin/env bash
# Searches for inputs that break a promise: `make fuzz`. Runs every fuzz target, one after the other, from its seeds and the
# kept inputs. A finding ends the run; fuzz/README.md says what to do then.
#
# Environment:
#   FUZZ_SECONDS   the seconds for each target (600)
#   FUZZ_TARGETS   the targets, by name (all)
#   FUZZ_MINIMISE  1: put the best of the inputs found into fuzz/corpus afterwards, 8 KiB a target (0)
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

SECONDS_EACH=${FUZZ_SECONDS:-600}
FUZZ=$ROOT/fuzz
# An input is small, needs little memory and is handled at once. An input that breaks these limits is a finding.
LIMITS=(-max_len=16384 -rss_limit_mb=1024 -timeout=10)

# cargo-fuzz passes compiler options of nightly. This variable lets the stable compiler accept them.
export RUSTC_BOOTSTRAP=1
# The files of a target are in memory, if there is a file system for that.
[ ! -w /dev/shm ] || export TMPDIR=/dev/shm

# Rust's own checks are enough, because the sanitizers need the standard library of nightly.
cargo_fuzz() { (cd "$FUZZ" && nice -n 19 cargo fuzz "$1" --sanitizer none "${@:2}"); }

install_cargo_fuzz() {
    command -v cargo > /dev/null || die "Rust is not installed" "run 'make setup', which says how to install it"
    command -v c++ > /dev/null || die "a C++ compiler is needed for libFuzzer" "install g++ (Debian: build-essential)"
    cargo fuzz --version > /dev/null 2>&1 || {
        step "installing cargo-fuzz (two minutes)"
        cargo install --locked cargo-fuzz
    }
}

targets() { sed -n 's/^name = "\([a-z_]*\)"$/\1/p' "$FUZZ/Cargo.toml"; }

# Unpacks the kept inputs of a target, and prints the folder.
unpack() {
    local folder=$FUZZ/target/kept/$1
    rm -rf "$folder"
    mkdir -p "$folder"
    [ ! -e "$FUZZ/corpus/$1.tar" ] || tar -xf "$FUZZ/corpus/$1.tar" -C "$folder"
    echo "$folder"
}

# Packs the folder $2 as the kept inputs of target $1. Equal inputs make an equal archive.
pack() {
    mkdir -p "$FUZZ/corpus"
    (cd "$2" && find . -type f -printf '%f\0' | LC_ALL=C sort -z |
        tar --null -T - --owner=0 --group=0 --numeric-owner --mode=0644 --mtime=@0 --format=ustar -cf "$FUZZ/corpus/$1.tar")
}

# Inputs that are found go to a folder of their own, because the archive of kept inputs changes only when it is minimised.
run() {
    local name=$1 found=$FUZZ/target/corpus/$1 log=$FUZZ/target/$1.log kept=()
    mkdir -p "$found"
    for folder in "$FUZZ/seeds/$name" "$(unpack "$name")"; do [ ! -d "$folder" ] || kept+=("$folder"); done
    step "$name: $SECONDS_EACH s (log: ${log#"$ROOT/"})"
    # The build is a step of its own, so that a build that fails is not taken for a finding.
    cargo_fuzz build "$name" > "$log" 2>&1 || {
        grep -A 8 '^error' "$log" >&2 || tail -n 40 "$log" >&2
        die "$name cannot be built; the compiler's errors are above, and its whole output is in ${log#"$ROOT/"}"
    }
    cargo_fuzz run "$name" "$found" "${kept[@]}" -- "${LIMITS[@]}" -max_total_time="$SECONDS_EACH" \
        -print_final_stats=1 > "$log" 2>&1 || {
        tail -n 40 "$log" >&2
        die "$name: a finding; its input is named above" "fuzz/README.md says what to do with it"
    }
    sed -n 's/^stat::number_of_executed_units: *//p' "$log" | sed "s/^/==> $name: inputs tried: /" >&2
    [ "${FUZZ_MINIMISE:-0}" = 0 ] || minimise "$name" "$found"
}

# Keeps the few inputs that reach the most code for their size; see fuzz/keep.py.
minimise() {
    local name=$1 found=$2 control=$FUZZ/target/$1.merge merged
    merged=$(mktemp -d "$FUZZ/target/$name.XXXXXX")
    rm -f "$control"
    cargo_fuzz run "$name" "$merged" "$FUZZ/seeds/$name" "$(unpack "$name")" "$found" -- -merge=1 -set_cover_merge=1 \
        -use_counters=0 -max_len=2048 -merge_control_file="$control" > "$FUZZ/target/$name.merge.log" 2>&1
    rm -rf "$merged"
    # The kept inputs were weighed too, so they are replaced only now.
    merged=$(mktemp -d "$FUZZ/target/$name.XXXXXX")
    python3 "$FUZZ/keep.py" "$control" "$merged" 8192
    pack "$name" "$merged"
    step "$name: $(find "$merged" -type f | wc -l) inputs are kept"
    rm -rf "$merged"
}

install_cargo_fuzz
for name in ${FUZZ_TARGETS:-$(targets)}; do
    grep -qx "$name" < <(targets) || die "there is no fuzz target $name" "the targets are: $(targets | tr '\n' ' ')"
    run "$name"
done
