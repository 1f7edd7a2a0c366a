# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Ranges, masks and journal records: the small change of the cache."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from forebay_cache.format import ops
from forebay_cache.format.geometry import BLOCK, FULL, SECTOR, block_runs, covered, sector_runs
from forebay_cache.format.records import LayerName


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_block_runs_cover_the_range_once_and_cross_no_border(offset: int, length: int) -> None:
    at = offset
    for block, start, part in block_runs(offset, length):
        assert block * BLOCK + start == at
        assert 0 < part <= BLOCK - start
        at += part
    assert at == offset + length


@given(st.integers(0, FULL))
def test_sector_runs_are_the_set_bits(mask: int) -> None:
    runs = sector_runs(mask)
    assert sum(((1 << count) - 1) << first for first, count in runs) == mask
    assert all(a + n < b for (a, n), (b, _) in pairwise(runs))


@given(st.integers(0, BLOCK - 1), st.data())
def test_covered_is_every_sector_touched(start: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, BLOCK - start))
    touched = {b // SECTOR for b in (start, start + length - 1)}
    touched |= set(range(start // SECTOR, (start + length - 1) // SECTOR))
    assert covered(start, length) == sum(1 << s for s in touched)


value = st.integers(0, 2**32 - 1)


@given(st.integers(1, FULL), st.data())
def test_records_come_back_as_they_were_packed(mask: int, data: st.DataObject) -> None:
    sums = data.draw(st.lists(value, min_size=mask.bit_count(), max_size=mask.bit_count()))
    frame = b"".join(
        (
            ops.layer_made(7, LayerName.of_disk("vm1", 3, "i")),
            ops.write(1, mask, 7, 99, 12345, sums),
            ops.write_one(0, 4, 7, 100, 5, sums[0]),
            ops.zero(mask, 7, 98, 3),
            ops.drop(mask, 2, 97),
            ops.hot(2, 11),
        )
    )
    made, written, one, zeroed, dropped, hot = ops.unpack(frame)
    assert (made.kind, made.layer, made.side, made.name) == (
        ops.LAYER,
        7,
        1,
        LayerName.of_disk("vm1", 3, "i"),
    )
    assert (written.side, written.mask, written.a, written.b) == (1, mask, 99, 12345)
    assert list(written.sums) == sums
    assert (one.side, one.mask, one.a, one.b, one.sums) == (0, 4, 100, 5, (sums[0],))
    assert (zeroed.kind, zeroed.mask, zeroed.a, zeroed.b) == (ops.ZERO, mask, 98, 3)
    assert (dropped.kind, dropped.layer, dropped.mask, dropped.a) == (ops.DROP, 2, mask, 97)
    assert (hot.kind, hot.layer, hot.a) == (ops.HOT, 2, 11)
