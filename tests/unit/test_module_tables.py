# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Each package's README has a table of its modules: all of them, and no others."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = {"gateway": "forebay", "nbd": "forebay_nbd", "cache": "forebay_cache"}
"""By the folder of the README: the package of which it has a complete table."""


def named(text: str) -> list[str]:
    """The modules in the first column of all tables below the heading "Modules", up to the next one of its level."""
    heading = re.search(r"^(#+) Modules$", text, re.MULTILINE)
    assert heading, "no heading 'Modules'"
    rest = text[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
    rows = re.findall(r"^\| (.*?) \|", rest[: end.start() if end else None], re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)]


def there(package: Path) -> set[str]:
    """The modules of a package, by their path in it."""
    return {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }


@pytest.mark.parametrize("folder", PACKAGES)
def test_the_tables_name_the_modules_that_there_are(folder: str) -> None:
    names = named((ROOT / folder / "README.md").read_text())
    assert len(names) == len(set(names)), "named twice"
    assert set(names) == there(ROOT / folder / PACKAGES[folder])


def test_tables_are_read_up_to_the_next_heading_of_their_level() -> None:
    text = (
        "# A\n| `no.py` | x |\n## Modules\n| module | what |\n| --- | --- |\n| `a.py`, `b/c.py` | `d.py` |\n"
        "### More\n| `e.py` | x |\n## End\n| `f.py` | x |\n"
    )
    assert named(text) == ["a.py", "b/c.py", "e.py"]
