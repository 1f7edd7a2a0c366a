# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Critical sections: what has to happen between two awaits, so that nobody sees half of it.

A function that is one as a whole is not `async`, and says so: its docstring has the words "critical section", and it
stands in the table "Critical sections" of its package's README. Where a section lies inside an `async` function a
comment begins it: `# no await until NAME`; the next await of that function must be the one that names NAME.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateway/forebay", "cache/forebay_cache", "nbd/forebay_nbd")
MARK = "critical section"
UNTIL = re.compile(r"# no await until `?([\w.()]+)`?")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[tuple[str, str]]:
    """(path from the root, text) of every module."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def functions(text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            yield node


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def awaits(function: Function) -> list[tuple[int, str]]:
    """(line, text) of each place where a function lets others run, in order."""
    found = []
    for node in own_nodes(function):
        if isinstance(node, ast.Await):
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.AsyncWith):
            items = ", ".join(ast.unparse(item) for item in node.items)
            found += [(node.lineno, items), (node.end_lineno or node.lineno, f"end of {items}")]
        elif isinstance(node, ast.AsyncFor):
            found.append((node.lineno, ast.unparse(node.iter)))
        elif isinstance(node, ast.Yield | ast.YieldFrom):
            found.append((node.lineno, "yield"))
    return sorted(found)


def whole(text: str) -> list[Function]:
    """The functions that say of themselves that they are a critical section."""
    return [
        x for x in functions(text) if MARK in " ".join((ast.get_docstring(x) or "").split()).lower()
    ]


def broken(text: str) -> list[str]:
    """What of a source breaks the rules, one line each."""
    wrong = [
        f"{x.name} is a critical section, and {'is async' if isinstance(x, ast.AsyncFunctionDef) else 'yields'}"
        for x in whole(text)
        if isinstance(x, ast.AsyncFunctionDef) or awaits(x)
    ]
    for number, line in enumerate(text.splitlines(), 1):
        if match := UNTIL.search(line):
            wrong += _broken_until(text, number, match[1])
    return wrong


def _broken_until(text: str, number: int, name: str) -> list[str]:
    around = [x for x in functions(text) if x.lineno <= number <= (x.end_lineno or 0)]
    if not around:
        return [f"line {number} lies in no function"]
    following = [(line, what) for line, what in awaits(around[-1]) if line >= number]
    if not following or name not in following[0][1]:
        found = f"line {following[0][0]}: {following[0][1]}" if following else "none"
        return [f"line {number}: the next await should be that of {name}, and is {found}"]
    return []


def documented(page: Path) -> set[str]:
    """The functions in the first column of the table under the heading "Critical sections"."""
    found = re.search(
        r"^#+ Critical sections$(.*?)(?=^#|\Z)", page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, f"{page} has no heading 'Critical sections'"
    return set(re.findall(r"^\| `([\w./:]+)` \|", found[1], re.MULTILINE))


def test_no_critical_section_awaits() -> None:
    assert [f"{path}: {line}" for path, text in sources() for line in broken(text)] == []


@pytest.mark.parametrize("package", ["cache/forebay_cache", "gateway/forebay"])
def test_the_page_lists_them(package: str) -> None:
    said = {
        f"{path.removeprefix(package + '/')}::{x.name}"
        for path, text in sources()
        if path.startswith(package)
        for x in whole(text)
    }
    assert said == documented(ROOT / package.split("/", maxsplit=1)[0] / "README.md")


GOOD = '''
def a():
    """Moves both. A critical section."""
    x = 1

async def b():
    c = 1
    # no await until index.commit
    d = 2
    await self.index.commit(d)
    await other()
'''


def test_what_breaks_a_section_is_found() -> None:
    assert broken(GOOD) == []
    assert broken(GOOD.replace("def a", "async def a"))
    assert broken(GOOD.replace("x = 1", "yield"))
    assert broken(GOOD.replace("d = 2", "await d"))
    assert broken(GOOD.replace("d = 2", "async with d: pass"))
    assert broken(GOOD.replace("    await self.index.commit(d)\n", ""))
