# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Words of pages: what was packed is found again, and what changes one part of a word leaves the others alone."""

from array import array
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from forebay_cache.format.entry import (
    ALL_ZERO,
    MIXED,
    NO_SLOT,
    ZEROS,
    Entry,
    block_key,
    block_of_key,
    bound,
    data_of,
    entry_at,
    has_slot,
    layer_of_key,
    moved,
    pack,
    pack_second,
    provisioned_of,
    put_entry,
    side_of,
    slot_of,
    slots_in,
    valid_of,
    whole_private_slot,
    whole_slot,
    with_data,
    with_slot,
    with_zero_places,
    with_zeros,
    without_slot,
    written,
    zero_of,
    zeros_only,
)
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, SECTORS

MOST = 2**32 - 2
"""The highest slot number that fits: 0 stands for none."""

slots = st.one_of(
    st.sampled_from([NO_SLOT, 0, 1, 2**16 - 1, 2**16, 2**31, MOST]), st.integers(NO_SLOT, MOST)
)
masks = st.one_of(st.sampled_from([0, 1, 1 << 15, FULL]), st.integers(0, FULL))
numbers = st.one_of(st.sampled_from([0, 1, 2**32 - 1]), st.integers(0, 2**32 - 1))


@st.composite
def entries(draw: st.DrawFn, *, private: bool = True) -> Entry:
    """A sound entry: zeros are valid, and what has data has a slot to lie in."""
    valid = draw(masks)
    zero = draw(masks) & valid
    if not private:
        slot = draw(slots.filter(lambda s: s >= 0)) if valid & ~zero else draw(slots)
        return Entry(pack(slot, zero, valid))
    side = draw(masks)
    data = valid & ~zero
    first, second = (
        draw(slots.filter(lambda s: s >= 0) if mask else slots)
        for mask in (data & ~side, data & side)
    )
    return Entry(pack(first, zero, valid), pack_second(second, side, draw(masks)))


def bits(mask: int) -> list[int]:
    return [sector for sector in range(SECTORS) if mask >> sector & 1]


def place(entry: Entry, sector: int) -> object:
    """Where one sector is, found out the long way: a slot, "zero" or None."""
    if not valid_of(entry.word) >> sector & 1:
        return None
    if zero_of(entry.word) >> sector & 1:
        return "zero"
    return slot_of(entry.second if side_of(entry.second) >> sector & 1 else entry.word)


@given(slots, masks, masks)
def test_a_first_word_says_what_was_packed(slot: int, zero: int, valid: int) -> None:
    word = pack(slot, zero, valid)
    assert 0 <= word < 2**64
    assert (slot_of(word), zero_of(word), valid_of(word)) == (slot, zero, valid)
    assert has_slot(word) == (slot >= 0)
    assert data_of(word) == valid & ~zero
    assert word & FULL == valid


@given(slots, masks, masks)
def test_a_second_word_says_what_was_packed(slot: int, side: int, provisioned: int) -> None:
    second = pack_second(slot, side, provisioned)
    assert 0 <= second < 2**64
    assert (slot_of(second), side_of(second)) == (slot, side)
    assert provisioned_of(second) == provisioned
    assert has_slot(second) == (slot >= 0)
    assert second & FULL == side


@given(entries(), masks, masks, st.booleans())
def test_zeros_keep_their_space_or_do_not_as_they_were_made_last(
    entry: Entry, mask: int, sides: int, provisioned: bool
) -> None:
    before = Entry(entry.word, pack_second(slot_of(entry.second), side_of(entry.second), FULL))
    second = with_zero_places(before.second, mask, sides & mask, provisioned=provisioned)
    after = Entry(with_zeros(before.word, mask), second)
    assert after.provisioned & ~mask == before.provisioned & ~mask
    assert after.provisioned & mask == (mask if provisioned else 0)
    assert side_of(second) == side_of(before.second) & ~mask | sides & mask
    assert slot_of(second) == slot_of(before.second)
    word, second = written(*after, mask, 0)
    assert not Entry(word, second).provisioned & mask, "it is data"


def test_an_empty_word_names_nothing() -> None:
    assert pack(NO_SLOT, 0, 0) == pack_second(NO_SLOT, 0) == 0
    assert slot_of(0) == NO_SLOT
    assert not has_slot(0)
    assert not Entry(0).places()
    assert not Entry(0).fault()
    assert has_slot(pack(0, 0, 0)), "slot 0 is one"


@given(slots, slots, masks, masks)
def test_a_slot_is_changed_and_the_masks_stay(old: int, new: int, zero: int, valid: int) -> None:
    word = pack(old, zero, valid)
    assert with_slot(word, new) == pack(new, zero, valid)
    assert without_slot(word) == pack(NO_SLOT, zero, valid)
    second = pack_second(old, valid)
    assert with_slot(second, new) == pack_second(new, valid)
    assert without_slot(second) == pack_second(NO_SLOT, valid)


@given(slots, masks, masks, masks)
def test_masks_are_changed_and_the_slot_stays(slot: int, zero: int, valid: int, mask: int) -> None:
    zero &= valid
    word = pack(slot, zero, valid)
    assert with_data(word, mask) == pack(slot, zero & ~mask, valid | mask)
    assert with_zeros(word, mask) == pack(slot, zero | mask, valid | mask)
    assert zeros_only(word) == pack(NO_SLOT, zero, zero)
    assert pack(NO_SLOT, FULL, FULL) == ZEROS


@given(entries(private=False), st.integers(1, FULL))
def test_whole_slot_is_where_each_of_the_sectors_is(entry: Entry, need: int) -> None:
    places = {place(entry, sector) for sector in bits(need)}
    found = whole_slot(entry.word, need)
    if places == {"zero"}:
        assert found == ALL_ZERO
    elif len(places) == 1 and None not in places:
        assert {found} == places
    else:
        assert found == MIXED


@given(entries(), st.integers(1, FULL))
def test_whole_private_slot_is_where_each_of_the_sectors_is(entry: Entry, need: int) -> None:
    data = valid_of(entry.word) & ~zero_of(entry.word) & need
    one_side = side_of(entry.second) & data in (0, data)
    places = {place(entry, sector) for sector in bits(need)}
    found = whole_private_slot(entry.word, entry.second, need)
    if places == {"zero"}:
        assert found == ALL_ZERO
    elif len(places) == 1 and None not in places and one_side:
        assert {found} == places
    else:
        assert found == MIXED


@given(masks, masks, st.integers(1, FULL))
def test_data_without_a_slot_is_never_taken_for_zeros(zero: int, side: int, need: int) -> None:
    """Such a word is damaged; whoever reads it must not be given zeros."""
    word = pack(NO_SLOT, zero & ~need, FULL)
    assert whole_slot(word, need) == MIXED
    assert whole_private_slot(word, pack_second(NO_SLOT, side), need) == MIXED


@given(entries(), masks, masks)
def test_moved_is_the_rule_sector_by_sector(entry: Entry, mask: int, staying: int) -> None:
    found = moved(entry.word, entry.second, mask, staying)
    assert not found & ~mask
    if entry.slots == (NO_SLOT, NO_SLOT):
        assert not found
        return
    tied = {n: entry.second >> n & 1 for n in bits(entry.data | entry.zero & staying)}
    lies = {n: side ^ (mask & ~staying) >> n & 1 for n, side in tied.items()}
    for sector in bits(mask):
        below, above = ([n for n in lies if n <= sector], [n for n in lies if n > sector])
        nearest = max(below) if below else min(above, default=-1)
        assert found >> sector & 1 == lies.get(nearest, 0)


@given(entries(), masks)
def test_what_is_new_adds_no_run(entry: Entry, staying: int) -> None:
    """A block that is written as a whole is in as few runs as the sectors that have a place of their own leave it."""
    found = moved(entry.word, entry.second, FULL, staying)
    kept = [found >> n & 1 for n in bits(bound(entry.word, staying))]
    if entry.slots != (NO_SLOT, NO_SLOT):
        assert changes(found >> n & 1 for n in range(SECTORS)) == changes(kept)


def changes(sides: Iterable[int]) -> int:
    """How often the side is another one than before."""
    return sum(one != other for one, other in pairwise(sides))


@given(entries(), masks, masks)
def test_written_sectors_have_data_on_their_side(entry: Entry, mask: int, target: int) -> None:
    target &= mask
    word, second = written(entry.word, entry.second, mask, target)
    assert (slot_of(word), slot_of(second)) == entry.slots
    assert valid_of(word) == entry.valid | mask
    assert zero_of(word) == entry.zero & ~mask
    assert side_of(second) == side_of(entry.second) & ~mask | target


@given(entries())
def test_an_entry_says_what_its_words_say(entry: Entry) -> None:
    assert not entry.fault()
    assert (entry.valid, entry.zero, entry.data) == (
        valid_of(entry.word),
        zero_of(entry.word),
        data_of(entry.word),
    )
    first, second = entry.sides
    assert first | second == entry.data
    assert not first & second
    assert entry.side == second
    for slot, mask in entry.places():
        assert slot in entry.slots
        for sector in bits(mask):
            assert place(entry, sector) == slot
    named = [slot for slot, _ in entry.places()]
    assert named == [slot for slot in entry.slots if slot >= 0]


def test_an_entry_that_cannot_be_says_why() -> None:
    assert Entry(pack(3, 2, 1)).fault() == "zeros that are not valid"
    assert Entry(pack(NO_SLOT, 0, 5)).fault() == "sectors 0x0005 lie in no slot"
    lost = Entry(pack(3, 0, 5), pack_second(NO_SLOT, 4))
    assert lost.fault() == "sectors 0x0004 lie in no slot"
    assert lost.places() == [(3, 1), (NO_SLOT, 4)]


@given(st.booleans(), st.lists(st.tuples(st.integers(0, PAGE_BLOCKS - 1), entries())))
def test_entries_come_back_from_a_page(private: bool, put: list[tuple[int, Entry]]) -> None:
    page = array("Q", bytes((16 if private else 8) * PAGE_BLOCKS))
    wanted = {}
    for i, entry in put:
        wanted[i] = entry if private else Entry(entry.word)
        put_entry(page, i, wanted[i])
    for i in range(PAGE_BLOCKS):
        assert entry_at(page, i) == wanted.get(i, Entry(0))
    named = [(i, slot) for i, entry in wanted.items() for slot in entry.slots if slot >= 0]
    assert sorted(slots_in(page)) == sorted(slots_in(page.tobytes())) == sorted(named)


@given(numbers, numbers)
def test_a_key_says_which_layer_and_which_block(layer: int, block: int) -> None:
    key = block_key(layer, block)
    assert 0 <= key < 2**64
    assert (layer_of_key(key), block_of_key(key)) == (layer, block)


@given(numbers, st.integers(0, 2**32 - 2))
def test_keys_of_neighbours_follow_each_other(layer: int, block: int) -> None:
    assert block_key(layer, block) + 1 == block_key(layer, block + 1)
