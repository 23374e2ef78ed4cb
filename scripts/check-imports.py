#!/usr/bin/env python3
"""Refuses every import between the project's crates that is not in the table below.

vmm-service, vmm-backends and vmm-store never import each other, so that each can be read, tested and replaced alone. Only the daemon
imports all of them, and only the tests of the command line import the daemon, because they run it. The manifests are read through
`cargo metadata`. A crate can use only what its manifest lists, so this is the whole check. ARCHITECTURE.md has a drawing of the table,
which is compared too. Inside a crate, a large circle of imports between files is refused; import_circles.py defines it.

Exits 1 and names every wrong import and every large circle. With --draw prints the drawing for ARCHITECTURE.md.
"""

import json
import pathlib
import subprocess
import sys

from import_circles import LIMIT, large_circles

# crate → the crates of this workspace that it may import.
ALLOWED = {
    "vmm-core": set(),
    "vmm-proto": set(),
    "vmm-host": {"vmm-core"},
    "vmm-store": {"vmm-core"},
    "vmm-service": {"vmm-core", "vmm-host"},
    "vmm-backends": {"vmm-core", "vmm-host", "vmm-libvirt-wire"},
    # The messages between the daemon and its libvirt helper. The helper itself is no member of the workspace.
    "vmm-libvirt-wire": set(),
    # Its backend suite drives a backend through the service, as clients do.
    "vmm-testkit": {"vmm-core", "vmm-host", "vmm-service"},
    "vmm-controlplane": {"vmm-service", "vmm-backends", "vmm-store", "vmm-host", "vmm-proto", "vmm-core"},
    # The server that the Connect conformance suite tests. Only tests start it.
    "vmm-conformance": {"vmm-controlplane"},
    # A client like any other: it knows the API and nothing of the daemon.
    "vmcp": {"vmm-proto"},
    # The example for users, in clients/rust.
    "vmm-client-example": {"vmm-proto"},
}
# The crates that every crate may import for its tests. (A test of the daemon may use everything that the daemon uses.)
TEST_ONLY = {"vmm-testkit"}
# crate → the crates that it alone may import for its tests. (The tests of the command line run the daemon.)
TESTED_WITH = {"vmcp": {"vmm-controlplane"}}


def violations(packages):
    """Yields one sentence for each import in the packages of `cargo metadata` that the table does not have."""
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
            for_tests = TEST_ONLY | TESTED_WITH.get(name, set()) if dependency["kind"] == "dev" else set()
            allowed = ALLOWED[name] | for_tests
            if target not in allowed:
                kind = f"{dependency['kind']}-dependency" if dependency["kind"] else "dependency"
                may = ", ".join(sorted(allowed)) or "nothing of this workspace"
                yield f"{name} imports {target} ({kind}); it may import {may}"


def unused(packages):
    """Yields one sentence for each import of the table that no manifest has."""
    for package in packages:
        listed = {dependency["name"] for dependency in package["dependencies"] if dependency["kind"] is None}
        for target in sorted(ALLOWED.get(package["name"], set()) - listed):
            yield f"{package['name']} no longer imports {target}; take it out of the table of scripts/check-imports.py"


def drawing():
    """Returns the table as a Mermaid drawing. An import that another import implies is left out."""
    lines = ["```mermaid", "flowchart TD"]
    for name, targets in ALLOWED.items():
        implied = set().union(*(ALLOWED[target] for target in targets)) if targets else set()
        lines += [f"    {name} --> {target}" for target in sorted(targets - implied)]
    alone = [name for name, targets in ALLOWED.items() if not targets]
    lines += [f"    {name}" for name in alone if not any(name in targets for targets in ALLOWED.values())]
    return "\n".join([*lines, "```", ""])


def stale_drawing():
    """Yields one sentence if ARCHITECTURE.md does not have the drawing of the table."""
    page = pathlib.Path("ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = page.partition("<!-- crates: begin -->\n")[2].partition("<!-- crates: end -->")[0]
    if drawn != drawing():
        yield "the drawing of the crates in ARCHITECTURE.md is old; put in what 'scripts/check-imports.sh --draw' prints"


def main():
    if sys.argv[1:] == ["--draw"]:
        print(drawing(), end="")
        return 0
    command = ["cargo", "metadata", "--no-deps", "--format-version", "1"]
    packages = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["packages"]
    found = [*violations(packages), *unused(packages), *stale_drawing(), *large_circles()]
    for sentence in found:
        print(f"error: {sentence}", file=sys.stderr)
    if not found:
        print(f"imports: {len(packages)} crates, every import is in the table, and no circle has more than {LIMIT} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
