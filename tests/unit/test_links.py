# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What pages name is there: links lead to files, anchors to headings, and Python files lie where a page says."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bench", "cache", "config", "docs", "gateway", "nbd", "systemd", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))])
LINK = re.compile(r"""\]\(([^)\s]+)|\b(?:src|href)="([^"]+)"|^\[[^\]]+\]:\s*(\S+)""", re.MULTILINE)

WIDTH = 120
"""The most characters of a line of prose; CONTRIBUTING.md says so to those who write."""
NOT_PROSE = (
    r"(?ms)^ *```.*?^ *```$",  # code, and what commands print
    r"(?ms)^<!-- (\w+): begin.*?^<!-- \1: end -->$",  # written by `make bench-readme`
    r"(?m)^ *(\||<).*$",  # tables, HTML
    r"(?m)^ *([-*] )?!?\[[^\]]*\](\([^)\s]*\)|: *\S+)[.,;]?$",  # a line that is one link
)

MODULE = re.compile(r"`([\w/.-]+\.py)(?:::\w+)?`")


def prose(text: str) -> str:
    """The page without its code, in which a bracket is no link and a hash no heading."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^ *```.*?^ *```$", "", text))


def long_lines(text: str) -> list[str]:
    """The lines of prose in a page that are longer than `WIDTH`."""
    for kind in NOT_PROSE:
        text = re.sub(kind, "", text)
    return [line for line in text.splitlines() if len(line) > WIDTH]


def links(text: str) -> Iterator[str]:
    for found in LINK.findall(prose(text)):
        target = "".join(found)
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """What the headings of a page are reached by, as GitHub makes it; code in a heading counts."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^ *```.*?^ *```$", "", text))
    return {re.sub(r"[^\w\- ]", "", one.strip().lower()).replace(" ", "-") for one in headings}


def faults(page: Path, root: Path = ROOT) -> Iterator[str]:
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or not target.is_relative_to(root):
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target.read_text()):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(faults(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_files_are_where_a_page_says(page: Path) -> None:
    found = [p for name in (*FOLDERS, "tools") for p in (ROOT / name).rglob("*.py")]
    there = {f"/{path.relative_to(ROOT)}" for path in found}
    named = MODULE.findall(page.read_text())
    assert [one for one in named if not any(path.endswith(f"/{one}") for path in there)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_not_too_long(page: Path) -> None:
    if page.is_relative_to(ROOT / "bench" / "results"):
        pytest.skip("written by make bench")
    assert long_lines(page.read_text()) == []


def test_long_lines_are_found() -> None:
    words = "word " * 24
    there = f"{words}\n{words}1\n- {words}\n"
    kept = f"| {words}2 |\n<p>{words}</p>\n- [a]({'b' * 120})\n```text\n{words}3\n```\n"
    made = f"<!-- bench: begin, by hand -->\n{words}4\n<!-- bench: end -->\n"
    assert long_lines(there + kept + made) == [f"{words}1", f"- {words}"]


def test_wrong_links_are_found(tmp_path: Path) -> None:
    text = "# A `b`: c\n[x](no.md) [x](#a-b-c) [x](#d)\n```\n# d\n[x](no2.md)\n```\n`[x](no3.md)` https://d/\n"
    assert list(links(text)) == ["no.md", "#a-b-c", "#d"]
    assert anchors(text) == {"a-b-c"}
    (tmp_path / "page.md").write_text(text)
    found = list(faults(tmp_path / "page.md", tmp_path))
    assert found == ["no.md: no such file", "#d: no such heading"]


def test_pages_are_found() -> None:
    assert {ROOT / "README.md", ROOT / "gateway/FAILURES.md", ROOT / "tests/fuzz/README.md"} <= {
        *PAGES
    }
