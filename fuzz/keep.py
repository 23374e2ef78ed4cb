#!/usr/bin/env python3
"""Keeps the few inputs of a fuzz target that reach the most code: keep.py CONTROL_FILE FOLDER BYTES.

CONTROL_FILE is what libFuzzer's -merge_control_file leaves with -set_cover_merge=1: for each input the places in the code that
it reaches. What the seeds do not reach is collected: the inputs that add the most places for their size are copied to FOLDER,
up to BYTES in all.
"""

import hashlib
import pathlib
import sys


def read(control):
    """Returns the inputs as (path, size, places)."""
    lines = control.read_text().splitlines()
    count = int(lines[0])
    paths = lines[2 : 2 + count]
    sizes, places = {}, {}
    for line in lines[2 + count :]:
        kind, index, *rest = line.split()
        if kind == "STARTED":
            sizes[int(index)] = int(rest[0])
        elif kind == "FT":
            places[int(index)] = frozenset(rest)
    return [(paths[index], sizes[index], reached) for index, reached in places.items()]


def choose(inputs, budget):
    """Yields paths, the one with the most new places for its size first."""
    seen = set().union(*(places for path, _, places in inputs if "/seeds/" in path))
    while True:
        # A file has a fixed cost, even if it is short.
        gains = [(len(places - seen) / (size + 32), -size, path, places) for path, size, places in inputs if size <= budget]
        best = max(gains, default=(0, 0, None, None))
        if best[0] == 0:
            return
        seen |= best[3]
        budget += best[1]
        yield best[2]


def main():
    control, folder, budget = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    for path in choose(read(control), budget):
        data = pathlib.Path(path).read_bytes()
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


if __name__ == "__main__":
    main()
