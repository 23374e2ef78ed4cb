#!/usr/bin/env python3
"""Refuses every import between the project's crates that the house does not have.

    vmm-controlplane ──► vmm-service, vmm-backends, vmm-store, vmm-host, vmm-proto ──► vmm-core
                              └────────────┴──► vmm-host ──► vmm-core

    (tests) ──► vmm-testkit ──► vmm-service, vmm-host, vmm-core

vmm-service, vmm-backends and vmm-store never import each other, so each can be read, tested and replaced alone; only the
daemon knows them all, and nobody imports the daemon. The manifests are read through `cargo metadata`; a crate can use
nothing that its manifest does not list, so this is the whole check. Exits 1 and names every wrong arrow.
"""

import json
import subprocess
import sys

# crate → the crates of this workspace that it may import.
ALLOWED = {
    "vmm-core": set(),
    "vmm-proto": {"vmm-core"},
    "vmm-host": {"vmm-core"},
    "vmm-store": {"vmm-core"},
    "vmm-service": {"vmm-core", "vmm-host"},
    "vmm-backends": {"vmm-core", "vmm-host", "vmm-libvirt-wire"},
    # What the daemon and its libvirt helper say to each other. The helper itself is no member of the workspace.
    "vmm-libvirt-wire": set(),
    # Its backend suite drives a backend through the service, as clients do.
    "vmm-testkit": {"vmm-core", "vmm-host", "vmm-service"},
    "vmm-controlplane": {"vmm-service", "vmm-backends", "vmm-store", "vmm-host", "vmm-proto", "vmm-core"},
    "vmcp": {"vmm-proto"},
}
# What any crate may import for its tests. (A test of the daemon may use all that the daemon uses.)
TEST_ONLY = {"vmm-testkit"}


def violations(packages):
    """Yields one sentence per wrong arrow in the packages of `cargo metadata`."""
    names = {package["name"] for package in packages}
    for package in packages:
        name = package["name"]
        if name not in ALLOWED:
            yield f"{name} is not in the table of scripts/check-imports.py; add it there, with what it may import"
            continue
        for dependency in package["dependencies"]:
            target = dependency["name"]
            if target not in names:
                continue
            allowed = ALLOWED[name] | (TEST_ONLY if dependency["kind"] == "dev" else set())
            if target not in allowed:
                kind = f"{dependency['kind']}-dependency" if dependency["kind"] else "dependency"
                may = ", ".join(sorted(allowed)) or "nothing of this workspace"
                yield f"{name} imports {target} ({kind}); it may import {may}"


def main():
    command = ["cargo", "metadata", "--no-deps", "--format-version", "1"]
    packages = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["packages"]
    found = list(violations(packages))
    for sentence in found:
        print(f"error: {sentence}", file=sys.stderr)
    if not found:
        print(f"imports: {len(packages)} crates, every arrow as Cargo.toml draws it")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
