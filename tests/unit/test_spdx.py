# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Every source file says at its top who holds the copyright and which licence it has, in SPDX's words."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_found = importlib.util.spec_from_file_location("spdx", ROOT / "tools/spdx.py")
assert _found is not None
assert _found.loader is not None
spdx = importlib.util.module_from_spec(_found)
_found.loader.exec_module(spdx)


def test_every_source_file_names_its_licence() -> None:
    files = list(spdx.sources())
    assert len(files) > 25, "this test looks in the wrong place"
    lacking = [
        str(path.relative_to(ROOT))
        for path in files
        if not spdx.has_lines(path.read_text(), spdx.licence(path))
    ]
    assert lacking == [], "run tools/spdx.py"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "# C\n# L\n"),
        ('"""Doc."""\n', '# C\n# L\n\n"""Doc."""\n'),
        ("# why\nx = 1\n", "# C\n# L\n#\n# why\nx = 1\n"),
        ("#!/bin/sh\n# why\n", "#!/bin/sh\n# C\n# L\n#\n# why\n"),
        ("#!/bin/sh\nexit 1\n", "#!/bin/sh\n# C\n# L\n\nexit 1\n"),
    ],
)
def test_the_lines_go_below_a_shebang_and_only_once(before: str, after: str) -> None:
    after = after.replace("C\n", f"{spdx.COPYRIGHT}\n").replace("L\n", f"{spdx.LICENCE}\n")
    once = spdx.with_lines(before, "# ", "")
    assert once == after
    assert spdx.with_lines(once, "# ", "") == once


def test_a_licence_further_down_does_not_count() -> None:
    assert not spdx.has_lines("\n" * 5 + f"# {spdx.COPYRIGHT}\n# {spdx.LICENCE}\n")


def test_xml_takes_comments_of_its_own() -> None:
    made = spdx.with_lines('<?xml version="1.0"?>\n<a/>\n', "<!-- ", " -->")
    assert made.splitlines()[:2] == ['<?xml version="1.0"?>', f"<!-- {spdx.COPYRIGHT} -->"]
    assert made.endswith("\n\n<a/>\n")
