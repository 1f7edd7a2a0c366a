# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How the source is measured: imports between modules, size of classes, shifts of page words. See test_layout.py."""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """One module of a package: its dotted name, its path below the package's folder, and its syntax tree."""

    name: str
    place: str
    lines: int
    tree: ast.Module

    @classmethod
    def read(cls, package: Path, path: Path) -> "Module":
        """The module in the file `path` of the package whose folder is `package`."""
        text = path.read_text()
        place = path.relative_to(package).as_posix()
        parts = place.removesuffix(".py").removesuffix("/__init__").split("/")
        name = package.name if parts == ["__init__"] else ".".join([package.name, *parts])
        return cls(name, place, len(text.splitlines()), ast.parse(text))

    @property
    def room(self) -> str:
        """The folder it lies in, below the package; of a module at the top, and of `__init__`, its own name."""
        folder, _, file = self.place.rpartition("/")
        return folder or file.removesuffix(".py")


def modules_of(package: Path) -> list[Module]:
    """All modules of a package, in order of their paths."""
    return [Module.read(package, path) for path in sorted(package.rglob("*.py"))]


def imports_of(module: Module, known: Mapping[str, Module]) -> set[str]:
    """Names of the known modules that a module imports, at whatever depth, TYPE_CHECKING or not."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(known) or {node.module}
            if inner - set(known):
                found.add(node.module)
    return {name for name in found if name in known and name != module.name}


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, each sorted; empty where there is no circle (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def between_rooms(
    edges: Mapping[str, set[str]], known: Mapping[str, Module]
) -> dict[str, set[str]]:
    """The same edges between the rooms of the modules, without those inside a room."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, others in edges.items():
        for other in others:
            if known[name].room != known[other].room:
                found[known[name].room].add(known[other].room)
    return found


def classes_of(module: Module) -> Iterator[ast.ClassDef]:
    """Every class of a module, wherever in it."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            yield node


def methods_of(cls: ast.ClassDef) -> set[str]:
    """Names of what is defined as a function in the body of the class; a property and its setter are one."""
    return {x.name for x in cls.body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)}


def attributes_of(cls: ast.ClassDef) -> set[str]:
    """Names that the class gives to its instances: what its methods assign to `self`, and its annotated fields.

    Fields of a TypedDict or Protocol, class constants in capitals, and ClassVar are none.
    """
    found = {
        x.target.id
        for x in cls.body
        if isinstance(x, ast.AnnAssign)
        and isinstance(x.target, ast.Name)
        and not x.target.id.isupper()
        and "ClassVar" not in ast.unparse(x.annotation)
    }
    for method in cls.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= _assigned_to_self(method)
    return found


def _assigned_to_self(method: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            found.add(node.attr)
    return found


_WORD_SHIFTS = (16, 32)
_WORD_MASKS = (0xFFFF, 0xFFFFFFFF)


def shifts_of_words(module: Module) -> list[int]:
    """Lines that take a page word or a block's key apart, or pack one: shifts by 16, 32 or a `*_SHIFT` of entry.py.

    A mask of 16 or 32 bits counts as well; that of a checksum is named CRC_MASK.
    """
    return sorted(
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.BinOp) and (_is_word_shift(node) or _is_word_mask(node))
    )


def _is_word_shift(node: ast.BinOp) -> bool:
    by = node.right
    if not isinstance(node.op, ast.LShift | ast.RShift):
        return False
    if isinstance(by, ast.Constant):
        return by.value in _WORD_SHIFTS and not isinstance(node.left, ast.Constant)
    return ast.unparse(by).rpartition(".")[2].lstrip("_") in (
        "SLOT_SHIFT",
        "ZERO_SHIFT",
        "LAYER_SHIFT",
    )


def _is_word_mask(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return isinstance(node.op, ast.BitAnd) and any(
        isinstance(x, ast.Constant) and x.value in _WORD_MASKS for x in sides
    )
