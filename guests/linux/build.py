#!/usr/bin/env python3
"""Builds the initramfs of the project's Linux guest.

    kernel tree (lib/modules/<release>)  ─┐
    busybox-static                       ─┼──►  initramfs.cpio.gz
    guests/linux/init                    ─┘

The archive is written here and not by cpio(1), because that way it needs neither root (for the device node) nor a
staging folder, and the same input gives the same bytes.

Usage: build.py --modules DIR --busybox FILE --init FILE --output FILE
"""

import argparse
import gzip
import lzma
import os
import re
import stat
import sys
from pathlib import Path

# The modules for the guest's disks, network cards and power button, and for the report of a panic. A module that the kernel has built in is
# skipped. The dependencies are added, as the modules themselves name them.
WANTED = ["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "evdev", "button", "pvpanic_mmio", "pvpanic_pci"]


class Archive:
    """A cpio archive in the "newc" format, which Linux unpacks as its first root file system."""

    def __init__(self):
        self._out = bytearray()
        self._inode = 0

    def add(self, name, mode, data=b"", device=(0, 0)):
        """Appends one entry; `mode` includes the file type, `device` is (major, minor)."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = [self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0]
        self._out += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self._pad()
        self._out += data
        self._pad()

    def directory(self, name):
        self.add(name, stat.S_IFDIR | 0o755)

    def executable(self, name, data):
        self.add(name, stat.S_IFREG | 0o755, data)

    def _pad(self):
        self._out += b"\0" * (-len(self._out) % 4)

    def finish(self):
        self.add("TRAILER!!!", 0)
        return bytes(self._out)


def module_key(path):
    """Returns the kernel's name of a module: no folder, no suffix, and _ for -."""
    return re.sub(r"\.ko(\.xz|\.gz)?$", "", os.path.basename(path)).replace("-", "_")


def read_module(path):
    """Returns a module's bytes, unpacked, because the guest's insmod does not unpack."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return data


def dependencies(data):
    """Reads the names of a module's dependencies from its .modinfo strings."""
    match = re.search(rb"\0depends=([^\0]*)\0", data)
    names = match.group(1).decode() if match else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def load_order(folder):
    """Returns [(file name, bytes)] of the wanted modules and their dependencies, each after its dependencies."""
    files = {module_key(path): path for path in folder.rglob("*.ko*")}
    builtin_list = folder / "modules.builtin"
    builtin = {module_key(line) for line in builtin_list.read_text().split()} if builtin_list.exists() else set()
    order = {}

    def visit(name):
        if name in order or name in builtin:
            return
        if name not in files:
            sys.exit(f"build.py: the kernel under {folder} has no module {name}, neither built in nor as a file")
        data = read_module(files[name])
        for needed in dependencies(data):
            visit(needed)
        order[name] = data

    for name in WANTED:
        visit(name)
    return [(f"{name}.ko", data) for name, data in order.items()]


def build(modules, busybox, init):
    """Returns the bytes of the (uncompressed) archive and the names of the modules in it."""
    archive = Archive()
    for folder in ("bin", "dev", "etc", "lib", "lib/modules"):
        archive.directory(folder)
    # Without this node the kernel gives init no standard output, so its messages are lost.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.executable("bin/busybox", busybox.read_bytes())
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    ordered = load_order(modules)
    for name, data in ordered:
        archive.add(f"lib/modules/{name}", stat.S_IFREG | 0o644, data)
    listing = "".join(f"/lib/modules/{name}\n" for name, _ in ordered)
    archive.add("etc/modules", stat.S_IFREG | 0o644, listing.encode())
    archive.executable("init", init.read_bytes())
    return archive.finish(), [name for name, _ in ordered]


def main():
    parser = argparse.ArgumentParser(description="Builds the initramfs of the project's Linux guest.")
    parser.add_argument("--modules", type=Path, required=True, help="lib/modules/<release> of the kernel")
    parser.add_argument("--busybox", type=Path, required=True, help="a statically linked busybox")
    parser.add_argument("--init", type=Path, required=True, help="the script that becomes /init")
    parser.add_argument("--output", type=Path, required=True, help="where the archive goes")
    options = parser.parse_args()
    raw, names = build(options.modules, options.busybox, options.init)
    partial = options.output.with_name(options.output.name + ".partial")
    partial.write_bytes(gzip.compress(raw, compresslevel=9, mtime=0))
    partial.replace(options.output)
    print(f"{options.output.name}: {options.output.stat().st_size // 1024} KiB, modules: {', '.join(names)}")


if __name__ == "__main__":
    main()
