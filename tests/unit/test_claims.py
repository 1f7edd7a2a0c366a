# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Claims of the journal: what records say, and which of it holds."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_cache.format import ops
from forebay_cache.format.entry import NO_SLOT, Entry, block_key, pack, pack_second
from forebay_cache.format.geometry import FULL
from forebay_cache.format.records import LayerName
from forebay_cache.offline.claims import Claim, Claimed, Claims, Judge, Verdict

LAYER = 7
KEY = block_key(LAYER, 3)
OLD, NEW = Claim(5, 0, 50), Claim(6, 1, 60)
ZEROS = Claim(NO_SLOT)


def read(*frames: list[bytes]) -> Claims:
    return Claims.read(b"".join(frame) for frame in frames)


def judge(lies: dict[tuple[int, int], int], stored: int = 0, *, survived: bool = True) -> Judge:
    """`lies`: the checksums of what lies at (slot, sector)."""
    return Judge(
        survived,
        lambda slot, sector, checksum: lies.get((slot, sector)) == checksum,
        lambda slot, sector: stored,
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def test_records_become_claims_in_their_order() -> None:
    claims = read(
        [
            ops.layer_made(LAYER, LayerName.of_disk("d", 1, "i")),
            ops.write(0, 0b101, LAYER, 3, 5, [50, 52]),
        ],
        [ops.write_one(1, 0b001, LAYER, 3, 6, 60), ops.zero(0b100, LAYER, 3, 0)],
        [ops.drop(0b11, 2, 9), ops.drop(0b100, 2, 9), ops.hot(2, 1)],
    )
    block = claims.blocks[KEY]
    assert block.sectors == {0: [OLD, NEW], 2: [Claim(5, 0, 52), ZEROS]}
    assert block.mask == 0b101
    assert block.slots == [5, 6]
    assert not block.is_replaced
    assert claims.dropped == {block_key(2, 9): 0b111}
    assert claims.hot == {(2, 1)}
    assert claims.made[LAYER].private
    assert claims.slots == {5: KEY, 6: KEY}
    assert claims.frontier == 7
    assert claims.records == 7
    assert claims.fault is None


def test_a_block_that_was_zeroed_as_a_whole_has_no_slots_of_before() -> None:
    claims = read(
        [ops.write_one(0, 1, LAYER, 3, 5, 50)],
        [ops.zero(FULL, LAYER, 3, 0)],
        [ops.write_one(0, 2, LAYER, 3, 8, 80)],
    )
    block = claims.blocks[KEY]
    assert block.is_replaced
    assert block.slots == [8, NO_SLOT]
    assert block.sectors[0] == [OLD, ZEROS]
    assert block.sectors[1] == [ZEROS, Claim(8, 0, 80)]
    assert block.mask == FULL


def test_zeros_that_keep_their_space_are_told_from_others() -> None:
    claims = read([ops.zero(0b11, LAYER, 3, 0, provisioned=True)], [ops.zero(0b10, LAYER, 3, 0)])
    first, second = claims.blocks[KEY].sectors[0][-1], claims.blocks[KEY].sectors[1][-1]
    assert (first.is_zeros, first.is_provisioned) == (True, True)
    assert (second.is_zeros, second.is_provisioned) == (True, False)


def test_only_what_the_last_frame_says_was_not_answered() -> None:
    first = [ops.write(0, 0b11, LAYER, 3, 5, [50, 51])]
    last = [ops.write_one(1, 0b10, LAYER, 3, 6, 61), ops.hot(2, 1)]
    assert read(first).blocks[KEY].unanswered == 0b11
    assert read(first, last).blocks[KEY].unanswered == 0b10
    assert read(first, last, [ops.hot(2, 2)]).blocks[KEY].unanswered == 0


@pytest.mark.parametrize(
    "nonsense",
    [
        ops.HEAD.pack(9, 0, 0, 1, 0, 0),
        ops.HEAD.pack(ops.WRITE, 7, 1, 1, 0, 0) + bytes(4),
        ops.HEAD.pack(ops.WRITE, 0, 3, 1, 0, 0) + bytes(4),
        ops.HEAD.pack(ops.LAYER, 0, 500, 1, 0, 0) + b"short",
        ops.HEAD.pack(ops.LAYER, 0, 1, 1, 0, 0) + b"\xff",
        b"cut",
    ],
)
def test_records_end_at_the_first_that_makes_no_sense(nonsense: bytes) -> None:
    claims = read([ops.hot(2, 1)], [ops.hot(2, 2), nonsense, ops.hot(2, 3)], [ops.drop(1, 2, 9)])
    assert claims.fault is not None
    assert claims.hot == {(2, 1), (2, 2)}
    assert not claims.dropped


# -- the rule ---------------------------------------------------------------------------------------------------------


def claimed(*claims: Claim, answered: bool = True) -> Claimed:
    return Claimed({0: list(claims)}, unanswered=0 if answered else 1)


INDEX = Entry(pack(4, 0, 1))
NOTHING, ZERO_IN_INDEX = Entry(0), Entry(pack(4, 1, 1))
IN_INDEX = {(4, 0): 40}


def test_the_newest_claim_that_fits_holds() -> None:
    both = {(5, 0): 50, (6, 0): 60}
    assert judge(both).verdict(claimed(OLD, NEW), 0, INDEX) == Verdict(NEW, False)
    assert judge({(5, 0): 50}).verdict(claimed(OLD, NEW), 0, INDEX) == Verdict(OLD, False)


def test_zeros_always_hold() -> None:
    assert judge({(5, 0): 50}).verdict(claimed(OLD, ZEROS), 0, INDEX) == Verdict(ZEROS, False)
    assert judge({}).verdict(claimed(ZEROS, NEW), 0, INDEX) == Verdict(ZEROS, False)


@pytest.mark.parametrize("survived", [True, False])
@pytest.mark.parametrize("side", [0, 1])
def test_the_index_holds_where_no_claim_does(side: int, survived: bool) -> None:
    entry = Entry(pack(NO_SLOT, 0, 1), pack_second(4, 1)) if side else INDEX
    found = judge(IN_INDEX, 40, survived=survived).verdict(claimed(OLD), 0, entry)
    assert found == Verdict(None, False)


@pytest.mark.parametrize(
    ("survived", "verdict"), [(True, Verdict(NEW, True)), (False, Verdict(None, True))]
)
def test_where_nothing_holds_the_sector_is_damaged(survived: bool, verdict: Verdict) -> None:
    """What was acknowledged must not be read as something older: the newest claim stays, and reading it fails."""
    found = judge({(4, 0): 41}, 40, survived=survived).verdict(claimed(OLD, NEW), 0, INDEX)
    assert found == verdict


@pytest.mark.parametrize("entry", [NOTHING, ZERO_IN_INDEX])
def test_that_there_was_nothing_holds_only_before_the_first_answer(entry: Entry) -> None:
    assert judge({}).verdict(claimed(NEW), 0, entry) == Verdict(NEW, True)
    assert judge({}).verdict(claimed(NEW, answered=False), 0, entry) == Verdict(None, False)
    assert judge({}, survived=False).verdict(claimed(NEW), 0, entry) == Verdict(None, False)


def test_an_entry_that_names_no_slot_does_not_hold() -> None:
    lies: Callable[[int, int, int], bool] = lambda slot, sector, checksum: slot != 6  # noqa: E731
    found = Judge(True, lies, lambda slot, sector: 0).verdict(
        claimed(NEW), 0, Entry(pack(NO_SLOT, 0, 1))
    )
    assert found == Verdict(NEW, True)


@given(
    st.lists(st.sampled_from([OLD, NEW, ZEROS, Claim(8, 0, 80)]), min_size=1, max_size=6),
    st.sets(st.sampled_from([4, 5, 6, 8])),
    st.sampled_from([INDEX, NOTHING, ZERO_IN_INDEX]),
    st.booleans(),
    st.booleans(),
)
def test_a_start_and_a_check_agree(
    claims: list[Claim], good: set[int], entry: Entry, survived: bool, answered: bool
) -> None:
    """Damaged for a check is what reads as an error, or does not fit the index, after a start; nothing else is."""
    lies = {(slot, 0): slot * 10 for slot in good}
    found = judge(lies, 40, survived=survived).verdict(
        claimed(*claims, answered=answered), 0, entry
    )
    if found.claim is not None:
        fits = found.claim.is_zeros or found.claim.slot in good
        newer = itertools.takewhile(lambda claim: claim != found.claim, reversed(claims))
        assert not fits or not any(claim.is_zeros or claim.slot in good for claim in newer)
    else:
        fits = not entry.data or 4 in good
    assert found.is_damaged == (not fits)
