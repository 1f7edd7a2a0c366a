# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How many writes of the device a write to one block takes, by Python and by the core: one for each run of sectors."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import forebay_fast
from forebay_cache.format.entry import entry_at
from sim.fake_loop import Dice, Loop, simulated
from sim.twins import Side

BLOCK = 3
WHOLE = range(16)


class Block:
    """One block of a private layer, written to at once."""

    def __init__(self, home: Path, *, core: bool) -> None:
        self.side = Side(home, core=core)
        self.order = ""
        """Of the last write: what was written of data (d) and journal (j)."""

    def write(self, sectors: range) -> int:
        """Write these sectors in one go. Returns how often the device was written to, frames of the journal aside."""
        with mock.patch.object(self.side, "write", wraps=self.side.write) as write:
            assert self.side.do_writes([(BLOCK * 16 + sectors.start, len(sectors), 1)], -1) == 1
        slots = self.side.cache.device.data_offset
        self.order = "".join("dj"[call.args[0] < slots] for call in write.call_args_list)
        return self.order.count("d")

    def zero(self, sectors: range) -> None:
        assert self.side.do_zero(BLOCK * 16 + sectors.start, len(sectors))

    def sync(self) -> None:
        """What was written is durable where it lies now."""
        self.side.cache.intent.note_durable()

    @property
    def slots(self) -> int:
        """How many slots it has."""
        return sum(slot >= 0 for slot in self.named)

    @property
    def named(self) -> tuple[int, int]:
        """Both of them."""
        page = self.side.view.private[0].pages.by_number[0]
        return entry_at(page, BLOCK).slots


@pytest.fixture(params=["python", "core"])
def block(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Block]:
    core = request.param == "core"
    if core and forebay_fast.missing:
        pytest.skip("no core: make setup")
    with contextlib.ExitStack() as stack:
        with mock.patch.object(gc, "collect"):  # a tenth of a second each time
            stack.enter_context(simulated(Dice("runs")))
        if core:
            forebay_fast.core.write_by_python(True)
        loop = Loop()
        stack.callback(loop.close)
        made = Block(tmp_path, core=core)
        stack.callback(made.side.cache.release)
        yield made


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_block_written_in_part_stays_in_one_run(block: Block, every: int) -> None:
    for sector in WHOLE[::every]:
        assert block.write(range(sector, sector + 1)) == 1
    for _ in range(3):
        block.sync()
        assert block.write(WHOLE) == 1


def test_a_sector_that_is_new_lies_where_the_others_are(block: Block) -> None:
    block.write(range(8))
    block.sync()
    block.write(range(8))
    block.sync()
    block.write(range(12, 14))
    block.write(range(8, 12))
    block.sync()
    assert block.write(WHOLE) == 1


def test_a_block_that_was_zeroed_is_written_into_one_slot(block: Block) -> None:
    block.write(WHOLE)
    block.zero(WHOLE)
    block.sync()
    for sector in WHOLE:
        assert block.write(range(sector, sector + 1)) == 1
    assert block.slots == 1
    block.sync()
    assert block.write(WHOLE) == 1


def test_zeros_that_are_durable_are_written_with_the_rest(block: Block) -> None:
    block.write(WHOLE)
    block.sync()
    block.zero(range(4, 9))
    block.sync()
    assert block.write(WHOLE) == 1


def test_zeros_that_are_not_durable_keep_what_was_there(block: Block) -> None:
    """Before the sync the data of before is what a power cut leaves, so it is not overwritten."""
    block.write(WHOLE)
    block.sync()
    block.zero(range(4, 9))
    before = block.side.cache.device.map.tobytes()
    block.write(range(4, 9))
    page = block.side.view.private[0].pages.by_number[0]
    entry = entry_at(page, BLOCK)
    assert entry.side == 0b111110000
    at = block.side.cache.device.at(entry.slots[0])
    assert block.side.cache.device.map[at : at + 65536] == before[at : at + 65536]


def by_turns(block: Block) -> None:
    """Have the sectors of a block lie on both sides by turns, durably: either place of each may be the durable one."""
    block.write(WHOLE)
    block.sync()
    for sector in WHOLE[::2]:
        block.write(range(sector, sector + 1))
    block.sync()


def test_a_whole_block_over_sectors_on_both_sides_goes_to_a_new_slot(block: Block) -> None:
    by_turns(block)
    before = block.named
    assert block.write(WHOLE) == 1
    assert block.named[0] != before[0]
    assert block.named[1] == before[1]
    assert block.side.cache.quarantine._freed == [before[0]]
    for _ in range(2):
        block.sync()
        assert block.write(WHOLE) == 1
    assert block.slots == 2


def test_what_was_written_since_the_sync_goes_to_the_new_slot_as_well(block: Block) -> None:
    by_turns(block)
    for sector in WHOLE[::3]:
        block.write(range(sector, sector + 1))
    assert block.write(WHOLE) == 1
    assert block.order == "dj", "nothing was there that a record has to come before"
    assert block.write(WHOLE) == 1
    assert block.order == "jd"
    assert block.named[0] not in block.side.cache.quarantine._freed


@pytest.mark.parametrize("few", [11, 0])
def test_where_few_slots_are_free_a_block_keeps_its_two(block: Block, few: int) -> None:
    by_turns(block)
    before = block.named
    while block.side.cache.slots.placement.free > few:
        block.side.cache.slots.take(0, held=True)
    for _ in range(2):
        assert block.write(WHOLE) == 16
        block.sync()
    assert block.named == before
