# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""State machines: legal moves, illegal ones, and the same tables in the READMEs."""

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from forebay.daemon import attached
from forebay.disk import state as disk_state
from forebay.handover import phase as handover
from forebay.image import reach
from forebay.storage import record
from forebay_cache.layers import layer
from forebay_cache.states import STRICT, IllegalMove, Machine, Table, rows
from forebay_nbd.server import phase

ROOT = Path(__file__).resolve().parents[2]


class Lamp(Enum):
    OFF = "off"
    ON = "on"
    BROKEN = "broken"


MOVES: Table[Lamp] = {
    Lamp.OFF: {Lamp.ON: "switched on"},
    Lamp.ON: {Lamp.OFF: "switched off", Lamp.BROKEN: "dropped"},
    Lamp.BROKEN: {},
}

TABLES: list[tuple[str, str, Table[Any]]] = [
    ("gateway/README.md", "States of a disk", disk_state.MOVES),
    ("gateway/README.md", "States of an image", reach.MOVES),
    ("gateway/README.md", "The phases of a handover", handover.MOVES),
    ("gateway/README.md", "The life of an attached disk", attached.LIFE),
    ("gateway/STORAGE.md", "States of a volume", record.MOVES),
    ("cache/README.md", "States of a layer", layer.MOVES),
    ("nbd/README.md", "The phases of a connection", phase.MOVES),
]
"""(README, its heading, the table in code) of every kind of thing that has one."""


def test_legal_moves_are_made() -> None:
    lamp = Machine(MOVES, Lamp.OFF, "the lamp")
    lamp.become(Lamp.OFF)
    lamp.become(Lamp.ON)
    lamp.become(Lamp.BROKEN)
    assert lamp.state is Lamp.BROKEN
    assert not lamp.may_become(Lamp.ON)


def test_an_illegal_move_raises_in_tests() -> None:
    lamp = Machine(MOVES, Lamp.OFF, "the lamp")
    with pytest.raises(IllegalMove, match="the lamp: off must not become broken"):
        lamp.become(Lamp.BROKEN)
    assert lamp.state is Lamp.OFF


def test_an_illegal_move_is_logged_and_made_in_the_field(
    monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    monkeypatch.delenv(STRICT)
    expect_log("the lamp: off must not become broken")
    lamp = Machine(MOVES, Lamp.OFF, "the lamp")
    lamp.become(Lamp.BROKEN)
    assert lamp.state is Lamp.BROKEN


def documented(page: Path, heading: str) -> list[tuple[str, str, str]]:
    """The rows of the first table of three columns below a heading of a page."""
    text = page.read_text()
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no heading '{heading}'"
    lines = [line for line in found[1].splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip(" `") for cell in line.strip("| ").split(" | ")) for line in lines]
    return [(row[0], row[1], row[2]) for row in cells[2:] if len(row) == 3]


@pytest.mark.parametrize(("page", "heading", "table"), TABLES)
def test_the_table_of_the_page_is_that_of_the_code(
    page: str, heading: str, table: Table[Any]
) -> None:
    assert documented(ROOT / page, heading) == rows(table)


@pytest.mark.parametrize(("page", "heading", "table"), TABLES)
def test_every_state_has_its_moves(page: str, heading: str, table: Table[Any]) -> None:
    kind: type[Enum] = type(next(iter(table)))
    assert list(table) == list(kind)
