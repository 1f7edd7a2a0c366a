# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Sizes beyond what a field of a format holds are refused where they enter."""

import uuid
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay_cache import CacheError
from forebay_cache.format import ops
from forebay_cache.format.entry import (
    LARGEST_DISK,
    LAST_LAYER,
    LAST_SLOT,
    block_key,
    block_of_key,
    layer_of_key,
    pack,
    slot_of,
)
from forebay_cache.format.geometry import BLOCK, FULL
from forebay_cache.format.records import PAGE_KEY
from forebay_cache.format.superblock import plan

LAST_BLOCK = LARGEST_DISK // BLOCK - 1


@pytest.mark.parametrize("size", [LARGEST_DISK + 1, 300 << 40, 32 << 50, (1 << 63) - 1, 1 << 64])
def test_an_image_beyond_what_block_numbers_hold_is_refused(size: int) -> None:
    source = cast("Any", SimpleNamespace(size=size, key="images:h.raw"))
    with pytest.raises(ForebayError, match="at most 256T"):
        trio.run(Disk.open, cast("Any", None), source, cast("Any", None))


def test_an_image_of_that_size_is_not() -> None:
    class Images:
        async def acquire(self, source: object) -> None:
            raise InterruptedError

    source = cast("Any", SimpleNamespace(size=LARGEST_DISK, key="images:h.raw"))
    with pytest.raises(InterruptedError):
        trio.run(Disk.open, cast("Any", Images()), source, cast("Any", None))


def test_the_last_of_each_number_has_room_in_every_field() -> None:
    key = block_key(LAST_LAYER, LAST_BLOCK)
    assert (layer_of_key(key), block_of_key(key)) == (LAST_LAYER, LAST_BLOCK)
    assert key < 1 << 64, "the owner of a slot is kept in 64 bits"
    word = pack(LAST_SLOT, 0, FULL)
    assert slot_of(word) == LAST_SLOT
    assert word < 1 << 64
    PAGE_KEY.pack(LAST_LAYER, LAST_BLOCK // 64)
    for made in (
        ops.write_one(1, 1, LAST_LAYER, LAST_BLOCK, LAST_SLOT, 7),
        ops.zero(FULL, LAST_LAYER, LAST_BLOCK, FULL),
        ops.drop(FULL, LAST_LAYER, LAST_BLOCK),
    ):
        (op,) = ops.unpack(made)
        assert (op.layer, op.a) == (LAST_LAYER, LAST_BLOCK)


def test_a_cache_of_more_slots_than_can_be_numbered_is_refused() -> None:
    largest = LAST_SLOT * BLOCK
    layout = plan(largest, uuid.UUID(int=1))
    assert layout.slots - 1 <= LAST_SLOT
    for size in (largest + BLOCK, 1 << 60):
        with pytest.raises(CacheError, match="too large"):
            plan(size, uuid.UUID(int=1))
        with pytest.raises(CacheError, match="too large"):
            layout.grown(size)
