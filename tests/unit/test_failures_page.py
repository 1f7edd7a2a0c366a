# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""gateway/FAILURES.md: every test that it names is there, every row names one, and every state that a disk has."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "gateway/FAILURES.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_what_the_page_names_is_there(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    found = {x.name for x in tree.body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in found


def test_every_row_has_a_test() -> None:
    rows = 0
    for part in PAGE.split("\n## ")[2:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        for line in lines[2:]:
            cells = line.strip("| ").split(" | ")
            assert "::" in cells[-1], line
            rows += 1
    assert rows >= 30
    assert len(NAMED) >= 30


def test_every_state_is_explained() -> None:
    source = (ROOT / "gateway/forebay/disk/state.py").read_text()
    [states] = [
        x for x in ast.parse(source).body if isinstance(x, ast.ClassDef) and x.name == "DiskState"
    ]
    words = [
        str(x.value.value)
        for x in states.body
        if isinstance(x, ast.Assign) and isinstance(x.value, ast.Constant)
    ]
    table = PAGE.split("\n## ")[1]
    assert sorted(words) == sorted(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE))
    assert len(words) >= 9
