# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""README.md and CONTRIBUTING.md say what is so: commands, targets, modes and figures are those that there are."""

import re
from pathlib import Path

import pytest

from forebay.cli.main import build_parser
from forebay.units import Mode

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/modes.md", "docs/limits.md")


def section(heading: str) -> str:
    return README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_it_can_be_read_at_a_sitting() -> None:
    assert len(README.splitlines()) <= 150


def test_its_figures_are_those_of_the_kept_run() -> None:
    rows = [line.rstrip("|").rstrip() for line in section("How fast").splitlines() if "| " in line]
    whole = (ROOT / "bench/README.md").read_text()
    assert len(rows) >= 5, "a head, a line, and three rows"
    assert [row for row in rows if "---" not in row and row not in whole] == []


def test_every_mode_is_explained() -> None:
    named = set(re.findall(r"(?m)^\| `([a-z-]+)`", section("Modes")))
    assert named == {mode.value for mode in Mode} | {"--overlay"}


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_targets_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    commands = next(a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    said = set(re.findall(r"(?m)(?:^# |^|`|&& )forebay ([a-z][a-z-]+)", text))
    assert said - set(commands) == set()
    targets = set(re.findall(r"(?m)^([a-z -]+):(?: |$)", (ROOT / "Makefile").read_text()))
    made = {word for line in targets for word in line.split()}
    asked = set(re.findall(r"(?m)(?:^# |^|`)make ([a-z-]+)", text))
    assert asked - made - {"test-unit", "test-sim", "test-real"} == set()
