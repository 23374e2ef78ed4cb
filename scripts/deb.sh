#!/usr/bin/env bash
# Builds the Debian package from programs that are built: `make deb`.
#
#   vmm-controlplane, vmcp, vmm-libvirt-helper ─┐
#   unit, configuration, maintainer scripts ────┼─► folder ─► dpkg-deb ─► target/deb/vmm-controlplane_VERSION_ARCH.deb
#   manual pages, completions (by vmcp) ────────┘
#
# Environment:
#   VMCP_DEB_PROGRAMS   the folder of the programs, by default the project's own; the tests give target/debug
#   VMCP_DEB_OUT        the folder of the package, by default target/deb
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"

PROGRAMS=${VMCP_DEB_PROGRAMS:-$ROOT}
OUT=${VMCP_DEB_OUT:-${CARGO_TARGET_DIR:-$ROOT/target}/deb}
NAME=vmm-controlplane
MAINTAINER="The authors of vmm-controlplane <maintainers@vmm-controlplane.invalid>"

command -v dpkg-deb > /dev/null || die "dpkg-deb is missing" "build the package on Debian or Ubuntu"
for program in vmm-controlplane vmcp; do
    [ -x "$PROGRAMS/$program" ] || die "$PROGRAMS/$program is missing" "run 'make build'"
done

UPSTREAM=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
VERSION=$UPSTREAM-1
# The time in the package is that of the commit, so that two builds of one commit are alike.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2> /dev/null || date +%s)
export SOURCE_DATE_EPOCH
ARCH=$(dpkg --print-architecture)
TREE=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-deb.XXXXXX")
trap 'rm -rf "$TREE"' EXIT
chmod 755 "$TREE"

# put MODE SOURCE TARGET: copies one file into the tree.
put() { install -D -m "$1" "$2" "$TREE/$3"; }

# compressed TARGET: writes standard input into the tree. A package is the same bytes each time, so that gzip stores no time.
compressed() { mkdir -p "$(dirname "$TREE/$1")" && gzip -9n > "$TREE/$1" && chmod 644 "$TREE/$1"; }

programs() {
    put 755 "$PROGRAMS/vmm-controlplane" usr/bin/vmm-controlplane
    put 755 "$PROGRAMS/vmcp" usr/bin/vmcp
    if [ -x "$PROGRAMS/vmm-libvirt-helper" ]; then
        put 755 "$PROGRAMS/vmm-libvirt-helper" usr/libexec/vmm-controlplane/vmm-libvirt-helper
    fi
    find "$TREE/usr" -type f -exec strip --strip-unneeded {} +
}

service() {
    put 644 packaging/vmm-controlplane.service usr/lib/systemd/system/vmm-controlplane.service
    put 644 packaging/vmm-controlplane.toml etc/vmm-controlplane/config.toml
    put 644 packaging/vmm-controlplane.default etc/default/vmm-controlplane
}

manuals() {
    local page
    mkdir "$TREE/man"
    "$PROGRAMS/vmcp" man --dir "$TREE/man" > /dev/null
    gzip -9n "$TREE"/man/*.1
    for page in "$TREE"/man/*.1.gz; do put 644 "$page" "usr/share/man/man1/$(basename "$page")"; done
    rm -r "$TREE/man"
    "$PROGRAMS/vmm-controlplane" man | compressed usr/share/man/man8/vmm-controlplane.8.gz
}

completions() {
    local shell path
    for shell in bash:bash-completion/completions/vmcp zsh:zsh/vendor-completions/_vmcp fish:fish/vendor_completions.d/vmcp.fish; do
        path=usr/share/${shell#*:}
        mkdir -p "$(dirname "$TREE/$path")"
        "$PROGRAMS/vmcp" completion "${shell%%:*}" > "$TREE/$path"
        chmod 644 "$TREE/$path"
    done
}

papers() {
    put 644 packaging/debian/copyright usr/share/doc/$NAME/copyright
    compressed usr/share/doc/$NAME/changelog.gz < CHANGELOG.md
    compressed usr/share/doc/$NAME/changelog.Debian.gz << END
$NAME ($VERSION) unstable; urgency=medium

  * The changes are in changelog.gz.

 -- $MAINTAINER  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
END
}

# The libraries that the programs link, as Debian names their packages and versions.
libraries() {
    local work=$TREE/shlibdeps
    mkdir -p "$work/debian"
    printf 'Source: %s\n\nPackage: %s\nArchitecture: any\n' "$NAME" "$NAME" > "$work/debian/control"
    (cd "$work" && dpkg-shlibdeps -O -e"$TREE/usr/bin/vmm-controlplane" -e"$TREE/usr/bin/vmcp" 2> /dev/null) |
        sed -n 's/^shlibs:Depends=//p'
    rm -r "$work"
}

control() {
    local depends size
    depends=$(libraries)
    size=$(du -sk --exclude=DEBIAN "$TREE" | cut -f1)
    mkdir "$TREE/DEBIAN"
    cat > "$TREE/DEBIAN/control" << END
Package: $NAME
Version: $VERSION
Architecture: $ARCH
Maintainer: $MAINTAINER
Installed-Size: $size
Depends: ${depends:-libc6}, init-system-helpers (>= 1.54)
Suggests: qemu-system-x86, qemu-utils, libvirt-daemon-system
Section: admin
Priority: optional
Description: one API over Cloud Hypervisor, Firecracker and QEMU
 A daemon that creates, boots, pauses, resumes, reboots, shuts down, inspects,
 lists and deletes virtual machines through one API (Connect, gRPC, gRPC-Web),
 whichever hypervisor runs them. VMs outlive restarts and upgrades of the
 daemon. The package has the command line vmcp as well.
END
    printf '/etc/default/%s\n/etc/%s/config.toml\n' $NAME $NAME > "$TREE/DEBIAN/conffiles"
    install -m 755 packaging/debian/{postinst,prerm,postrm} "$TREE/DEBIAN"
    (cd "$TREE" && find usr -type f -print0 | sort -z | xargs -0 md5sum > DEBIAN/md5sums)
}

programs
service
manuals
completions
papers
control
mkdir -p "$OUT"
dpkg-deb --root-owner-group -Z"${VMCP_DEB_COMPRESSION:-xz}" --build "$TREE" "$OUT/${NAME}_${VERSION}_$ARCH.deb" > /dev/null
step "built ${OUT#"$ROOT"/}/${NAME}_${VERSION}_$ARCH.deb"
