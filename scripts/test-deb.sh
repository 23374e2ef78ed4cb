#!/usr/bin/env bash
# Builds the Debian package from target/debug, and checks it: lintian, the unit as systemd reads it, and the programs inside.
# Exit status 77 means that a tool is missing.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"

for tool in dpkg-deb lintian systemd-analyze; do
    command -v $tool > /dev/null || { step "$tool is missing; 'make setup' installs lintian"; exit 77; }
done
WORK=$(mktemp -d "${TMPDIR:-/tmp}/vmcp-deb-test.XXXXXX")
trap 'rm -rf "$WORK"' EXIT

VMCP_DEB_PROGRAMS=${CARGO_TARGET_DIR:-target}/debug VMCP_DEB_COMPRESSION=gzip VMCP_DEB_OUT=$WORK scripts/deb.sh
PACKAGE=$(echo "$WORK"/*.deb)
# The suppressed tag is about the first upload to Debian's archive, where the package is not.
lintian --allow-root --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs "$PACKAGE"

dpkg-deb -x "$PACKAGE" "$WORK/tree"
# systemd looks for the program where the unit says, which is below the folder here.
sed "s|^ExecStart=/|&${WORK#/}/tree/|" "$WORK/tree/usr/lib/systemd/system/vmm-controlplane.service" > "$WORK/vmm-controlplane.service"
systemd-analyze verify --man=no "$WORK/vmm-controlplane.service"
# The lines without which systemd ends VMs with the daemon, or removes their sockets.
for line in KillMode=process OOMPolicy=continue RuntimeDirectoryPreserve=yes Type=notify; do
    grep -qx "$line" "$WORK/tree/usr/lib/systemd/system/vmm-controlplane.service" || die "the unit lacks $line"
done
"$WORK/tree/usr/bin/vmm-controlplane" check-config --config "$WORK/tree/etc/vmm-controlplane/config.toml" > /dev/null
for program in vmm-controlplane vmcp; do
    [ "$("$WORK/tree/usr/bin/$program" --version | cut -d' ' -f1)" = $program ] || die "$program does not start"
done
for page in man8/vmm-controlplane.8 man1/vmcp.1; do
    [ "$(gzip -dc "$WORK/tree/usr/share/man/$page.gz" | grep -c '^\.TH ')" = 1 ] || die "$page is no manual page"
done
