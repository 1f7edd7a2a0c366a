# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The house: which package, room and module may import which, how large a class, module and room may become.

Four numbers are held: MOST_METHODS and MOST_ATTRIBUTES of a class, MOST_LINES of a module, MOST_MODULES beside each
other in a room, and no page word taken apart outside one module. Each rule is also tried on a source that breaks it.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from unit.layout_rules import (
    Module,
    attributes_of,
    between_rooms,
    circles,
    classes_of,
    imports_of,
    methods_of,
    modules_of,
    shifts_of_words,
)

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "forebay": "gateway",
    "forebay_nbd": "nbd",
    "forebay_cache": "cache",
    "forebay_fast": "fast",
}
MAY_IMPORT = {
    "forebay": {"forebay_nbd", "forebay_cache", "forebay_fast"},
    "forebay_nbd": {"forebay_fast"},
    "forebay_cache": {"forebay_fast"},
    "forebay_fast": set[str](),
}
# what a package of the data path has no business with: the cache knows nothing of NBD's clients,
# the protocol nothing of the cache's index, and neither of the control API
FOREIGN = {
    "forebay": set[str](),
    "forebay_nbd": {"lmdb", "pydantic", "h11", "rich", "nbd"},
    "forebay_cache": {"nbd", "pydantic", "h11", "rich"},
    "forebay_fast": {"lmdb", "nbd", "pydantic", "h11", "rich"},
}


def imported(source: str) -> Iterator[str]:
    """Top-level names of all modules that `source` imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / PACKAGES[package] / package).rglob("*.py"))


def test_imports_are_found_at_any_depth() -> None:
    source = "import a.b, c\ndef f():\n    from d.e import g\n    from . import h\n"
    assert set(imported(source)) == {"a", "c", "d"}


@pytest.mark.parametrize("package", PACKAGES)
def test_import_direction(package: str) -> None:
    forbidden = (set(PACKAGES) - MAY_IMPORT[package] - {package}) | FOREIGN[package]
    assert modules(package), f"no module found for {package}: this test looks in the wrong place"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(path.read_text())
        if name in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("root", PACKAGES.values())
def test_a_source_root_is_no_package(root: str) -> None:
    # with one, the folder nbd/ would hide libnbd's `nbd` from everything that runs in this directory
    assert (ROOT / root).is_dir()
    assert not (ROOT / root / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_types(package: str) -> None:
    path = ROOT / PACKAGES[package] / package
    assert (path / "__init__.py").is_file()
    assert (path / "py.typed").is_file()


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "manager", "misc"])
def test_modules_have_names_that_say_something(word: str) -> None:
    named = [path for package in PACKAGES for path in modules(package) if path.stem == word]
    assert named == []


# ------------------------------------------------------------------------------------------------------------ the rooms

MOST_METHODS = 25
MOST_ATTRIBUTES = 20
MOST_LINES = 400
MOST_MODULES = 14

WORDS = "forebay_cache.format.entry"
"""The one module that packs page words and block keys, and takes them apart."""

ORDER: dict[str, list[str]] = {
    "forebay": [
        "errors units systemd client __init__",
        "config formats http events",
        "latency",
        "origin/worker origin/sharing",
        "origin",
        "origin/virtual",
        "sidecar",
        "image",
        "checkpoint",
        "disk/rates",
        "disk",
        "boot",
        "handover",
        "catalogue",
        "keeping",
        "carrying",
        "doors history",
        "control/prometheus",
        "doors/fuse storage control libvirt importing stores",
        "doors/fuse storage control libvirt importing overview",
        "staging swarm page",
        "daemon/figures",
        "daemon",
        "process",
        "doctor",
        "cli/terminal",
        "cli/hosts cli/latency",
        "cli",
        "cli/staging cli/settings cli/events cli/watching",
        "__main__",
    ],
    "forebay_cache": [
        "errors states turns",
        "format",
        "device",
        "index",
        "slots",
        "durable",
        "layers",
        "cache",
        "blocks",
        "read",
        "curve",
        "upkeep",
        "offline",
        "__init__",
    ],
    "forebay_nbd": ["protocol", "throttle", "server client", "__init__"],
    "forebay_fast": ["__init__", "latency", "loop"],
}
"""Rooms, and modules that lie in none, of each package, lowest first. A room imports what stands above it in the list,
and nothing of those beside it in its line, unless BESIDE says so."""

BESIDE = {
    ("client", "errors"),  # it raises them
    ("units", "errors"),
    ("states", "errors"),
}
"""(who, whom): the exceptions within one line of ORDER."""


@cache
def of_package(package: str) -> dict[str, Module]:
    """The modules of a package by their dotted names."""
    found = modules_of(ROOT / PACKAGES[package] / package)
    return {module.name: module for module in found}


def edges_of(known: Mapping[str, Module]) -> dict[str, set[str]]:
    return {name: imports_of(module, known) for name, module in known.items()}


def ranks(package: str) -> dict[str, int]:
    return {room: rank for rank, line in enumerate(ORDER[package]) for room in line.split()}


def upward(package: str, known: Mapping[str, Module]) -> list[str]:
    """Imports that go up, or to the side, one line each."""
    rank = ranks(package)
    wrong = []
    for name, others in edges_of(known).items():
        for other in sorted(others):
            here, there = known[name].room, known[other].room
            allowed = here == there or rank[there] < rank[here] or (here, there) in BESIDE
            if not allowed:
                wrong.append(f"{known[name].place} imports {other}")
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_its_place_in_the_order(package: str) -> None:
    assert {module.room for module in of_package(package).values()} == set(ranks(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down(package: str) -> None:
    assert upward(package, of_package(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package: str) -> None:
    known = of_package(package)
    edges = edges_of(known)
    assert circles(edges) == []
    assert circles(between_rooms(edges, known)) == []


def test_the_command_imports_nothing_before_it_is_needed() -> None:
    early = {"errors", "units", "cli", "cli/terminal", "__init__"}
    wrong = []
    for module in of_package("forebay").values():
        if module.room not in ("cli", "cli/terminal"):
            continue
        at_once: list[ast.stmt] = [
            x for x in module.tree.body if isinstance(x, ast.Import | ast.ImportFrom)
        ]
        shallow = Module(module.name, module.place, 0, ast.Module(at_once, []))
        known = of_package("forebay")
        wrong += [
            f"{module.place} imports {name}"
            for name in imports_of(shallow, known)
            if known[name].room not in early
        ]
    assert wrong == []


# ---------------------------------------------------------------------------------------------------------- the numbers


def too_large(module: Module) -> list[str]:
    """What of a module is beyond the numbers, one line each."""
    found = []
    if module.lines > MOST_LINES:
        found.append(f"{module.place} has {module.lines} lines")
    for cls in classes_of(module):
        methods, attributes = len(methods_of(cls)), len(attributes_of(cls))
        if methods > MOST_METHODS:
            found.append(f"{module.place}: {cls.name} has {methods} methods")
        if attributes > MOST_ATTRIBUTES:
            found.append(f"{module.place}: {cls.name} has {attributes} attributes")
    return found


def crowded(known: Mapping[str, Module]) -> list[str]:
    """Rooms with more modules beside each other than there may be; `__init__` is not counted."""
    count: dict[str, int] = {}
    for module in known.values():
        folder, _, file = module.place.rpartition("/")
        count[folder] = count.get(folder, 0) + (file != "__init__.py")
    return [f"{folder or '.'} has {n} modules" for folder, n in count.items() if n > MOST_MODULES]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_class_and_no_module_is_too_large(package: str) -> None:
    assert [line for module in of_package(package).values() for line in too_large(module)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_is_crowded(package: str) -> None:
    assert crowded(of_package(package)) == []


def test_page_words_are_taken_apart_in_one_place() -> None:
    wrong = [
        f"{module.place}:{line}"
        for name, module in of_package("forebay_cache").items()
        if name != WORDS
        for line in shifts_of_words(module)
    ]
    assert wrong == []


# --------------------------------------------------------------------------------------- each rule finds what breaks it


def written(text: str, place: str = "room/module.py") -> Module:
    name = "package." + place.removesuffix(".py").replace("/", ".")
    return Module(name, place, len(text.splitlines()), ast.parse(text))


def of_class(body: str) -> Module:
    return written("class Large:\n" + body)


def test_a_class_that_is_too_large_is_found() -> None:
    methods = "".join(f"    def m{n}(self): ...\n" for n in range(MOST_METHODS))
    assert too_large(of_class(methods)) == []
    assert too_large(of_class(methods + "    async def one_more(self): ...\n"))
    fields = "".join(f"    f{n}: int\n" for n in range(MOST_ATTRIBUTES))
    assert too_large(of_class(fields)) == []
    assert too_large(of_class(fields + "    def m(self):\n        self.one_more = 1\n"))
    assert too_large(of_class(fields + "    def m(self):\n        a, self.one_more = 1, 2\n"))
    assert too_large(of_class("    CONSTANT: int = 1\n" + fields)) == []


def test_a_long_module_is_found() -> None:
    assert too_large(written("x = 1\n" * MOST_LINES)) == []
    assert too_large(written("x = 1\n" * (MOST_LINES + 1)))


def test_a_crowded_room_is_found() -> None:
    some = [written("", f"room/m{n}.py") for n in range(MOST_MODULES)] + [
        written("", "room/__init__.py")
    ]
    assert crowded({module.name: module for module in some}) == []
    some.append(written("", "room/one_more.py"))
    assert crowded({module.name: module for module in some}) == ["room has 15 modules"]


@pytest.mark.parametrize(
    "text",
    [
        "slot = (word >> 32) - 1",
        "key = layer << 32 | block",
        "zero = word >> entry._ZERO_SHIFT & need",
        "block = key & 0xFFFFFFFF",
        "valid = word & 0xFFFF",
        "word |= (slot + 1) << SLOT_SHIFT",
    ],
)
def test_a_word_taken_apart_is_found(text: str) -> None:
    assert shifts_of_words(written(text)) == [1]


@pytest.mark.parametrize("text", ["at = slot << BLOCK_SHIFT", "most = 1 << 32", "x = offset >> 12"])
def test_other_shifts_are_none(text: str) -> None:
    assert shifts_of_words(written(text)) == []


def test_circles_and_imports_for_types_are_found() -> None:
    a = written(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.b import c\n",
        "a/x.py",
    )
    b = written("def f():\n    import package.a.x\n", "b/c.py")
    known = {module.name: module for module in (a, b)}
    edges = edges_of(known)
    assert circles(edges) == [["package.a.x", "package.b.c"]]
    assert circles(between_rooms(edges, known)) == [["a", "b"]]


def test_an_import_that_goes_up_is_found() -> None:
    low = written("from forebay.disk import disk", "image/low.py")
    high = written("", "disk/disk.py")
    known = {"forebay.image.low": low, "forebay.disk.disk": high}
    assert upward("forebay", known) == ["image/low.py imports forebay.disk.disk"]
