"""The source roots: which package may import which, and what must not lie in them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"forebay": "gateway", "forebay_nbd": "nbd", "forebay_cache": "cache"}
MAY_IMPORT = {
    "forebay": {"forebay_nbd", "forebay_cache"},
    "forebay_nbd": set[str](),
    "forebay_cache": set[str](),
}
# what a package of the data path has no business with: the cache knows nothing of NBD's clients,
# the protocol nothing of the cache's index, and neither of the control API
FOREIGN = {
    "forebay": set[str](),
    "forebay_nbd": {"lmdb", "pydantic", "hypercorn", "starlette", "rich", "nbd"},
    "forebay_cache": {"nbd", "pydantic", "hypercorn", "starlette", "rich"},
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
