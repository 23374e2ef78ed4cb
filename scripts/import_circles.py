"""Finds circles of imports between the files of a crate.

A circle is a set of files of which each imports each other one, directly or through others. No file of a large circle can be
read first. An import is a `use` or a path in the code. A re-exported item counts as an import of the file that defines it. Three kinds of
imports do not count: those of tests, a parent's re-export of its child's items, and the import of the type to which a file adds methods
(`impl Actor` in a child of `actor`), because such a file is a part of the type's definition.

Usage: scripts/import_circles.py   prints every circle of two files or more, the largest first.
"""

import pathlib
import re

# The most files of one circle.
LIMIT = 5


def block_end(text, start):
    """Returns the index of the brace that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def code_of(text):
    """Returns the code of a file without comments, texts and tests. In an inline module, `super` becomes `self`."""
    text = re.sub(r"""//[^\n]*|'(?:\\.|[^'\\])'|"(?:\\.|[^"\\])*\"""", "", text)
    parts, begin = [], 0
    for module in re.finditer(r"(#\[cfg\(test\)\][^{};]*)?\bmod \w+ \{", text):
        if module.start() < begin:
            continue
        end = block_end(text, module.end() - 1)
        parts.append(text[begin : module.start()])
        if not module.group(1):
            parts.append(re.sub(r"(?<!super::)\bsuper::", "self::", text[module.start() : end]))
        begin = end
    return "".join([*parts, text[begin:]])


def expanded(tree):
    """Returns the paths of a tree of imports: `a::{b, c::d}` gives `a::b` and `a::c::d`."""
    brace = tree.find("{")
    if brace < 0:
        return [re.sub(r"\s+as\s+\w+$", "", tree.strip())]
    paths, part, depth = [], "", 0
    for letter in tree[brace + 1 : block_end(tree, brace)] + ",":
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            paths += [tree[:brace].strip() + path for path in expanded(part)] if part.strip() else []
            part = ""
        else:
            part += letter
    return paths


class Crate:
    """The files of one crate and the imports between them. A file is named by the path of its module."""

    def __init__(self, source):
        self.code = {}
        for path in sorted(source.rglob("*.rs")):
            module = path.relative_to(source).with_suffix("").parts
            if module[-1] == "tests" or "fuzzing" in module:
                continue
            if module[-1] in ("lib", "mod") or module == ("main",) and not (source / "lib.rs").exists():
                module = module[:-1]
            self.code[module] = code_of(path.read_text(encoding="utf-8"))
        self.exports = {}
        paths = {module: list(self.paths(module)) for module in self.code}
        self.imports = {module: set(self.imported(module, paths[module])) for module in self.code}

    def paths(self, module):
        """Yields every path in a file, with True for a re-export. Notes the re-exports."""
        uses = re.compile(r"^\s*(pub(?:\([^)]*\))?\s+)?use\s+([^;]+);", re.MULTILINE)
        for public, tree in uses.findall(self.code[module]):
            for path in expanded(tree):
                target = self.absolute(module, path)
                if public and target:
                    self.exports[module, path.split("::")[-1]] = target
                yield target, bool(public)
        for path in re.findall(r"(?<![\w:])(?:\w+::)+\w+", uses.sub("", self.code[module])):
            yield self.absolute(module, path), False

    def absolute(self, module, path):
        """Returns a path from the root of the crate, or None if it leads out of the crate."""
        names = path.strip().split("::")
        if names[0] == "crate":
            return tuple(names[1:])
        if names[0] not in ("self", "super"):
            return module + tuple(names) if module + (names[0],) in self.code else None
        while names and names[0] in ("self", "super"):
            module = module[:-1] if names.pop(0) == "super" else module
        return module + tuple(names)

    def defined_in(self, path, seen=()):
        """Returns the file that defines the item at `path`, and the item's name."""
        for length in range(len(path), -1, -1):
            module, rest = path[:length], path[length:]
            if module not in self.code:
                continue
            export = (module, rest[0]) if rest else None
            if export in self.exports and export not in seen:
                return self.defined_in(self.exports[export] + rest[1:], (*seen, export))
            return module, rest[0] if rest else None
        return None, None

    def imported(self, module, paths):
        """Yields the files that a file imports."""
        own = set(re.findall(r"^impl(?:<[^>]*>)? (\w+)[^;{]*\{", self.code[module], re.MULTILINE))
        for path, public in paths:
            if path is None or public and path[: len(module)] == module:
                continue
            target, item = self.defined_in(path)
            is_part_of = target == module[:-1] and item in own
            if target is not None and target != module and not is_part_of:
                yield target

    def reachable(self, module):
        """Returns the files that a file imports, directly or through others."""
        found, waiting = set(), [module]
        while waiting:
            for target in self.imports[waiting.pop()] - found:
                found.add(target)
                waiting.append(target)
        return found

    def circles(self):
        """Returns every circle, as a sorted list of the paths of its modules."""
        reachable = {module: self.reachable(module) for module in self.code}
        circles = {
            tuple(sorted("::".join(other) or "lib" for other in reached if module in reachable[other]))
            for module, reached in reachable.items()
            if module in reached
        }
        return sorted(circles, key=len, reverse=True)


def crates():
    """Yields the name and the files of every crate."""
    for source in sorted(pathlib.Path("crates").glob("*/src")):
        yield source.parent.name, Crate(source)


def large_circles():
    """Yields one sentence for each circle of more than LIMIT files."""
    for name, crate in crates():
        for circle in crate.circles():
            if len(circle) > LIMIT:
                yield f"{len(circle)} files of {name} import each other in a circle; the most are {LIMIT}: {', '.join(circle)}"


if __name__ == "__main__":
    for name, crate in crates():
        for circle in crate.circles():
            print(f"{name}: {len(circle)} files: {', '.join(circle)}")
