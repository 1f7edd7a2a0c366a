# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A placement whose device grows: nothing of what was known is lost, and all new slots are used."""

import random

import pytest

from forebay_cache.slots.placement import Placement

REGION = 4096


def fill(placement: Placement, key: int) -> list[int]:
    taken = []
    while (slot := placement.take()) is not None:
        placement.insert(slot, key + slot, held=False)
        taken.append(slot)
    return taken


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), (10, 5000), (REGION - 1, REGION + 1), (REGION, 3 * REGION), (7, 7)],
)
def test_new_slots_are_given_and_old_ones_stay(before: int, after: int) -> None:
    placement = Placement(before)
    state = placement.state
    assert sorted(fill(placement, 1000)) == list(range(before))
    placement.grow(after)
    assert placement.state is state, "the views hold on to it"
    assert placement.free == after - before
    assert sorted(fill(placement, 1000)) == list(range(before, after))
    assert placement.evictable() == after
    assert sorted(placement.victims(after)) == list(range(after))


def test_in_the_middle_of_everything() -> None:
    """Free, held, quarantined and evicted slots, across growth, against plain sets."""
    rng = random.Random(3)
    placement = Placement(50)
    used: set[int] = set()
    leaving: set[int] = set()
    for step in range(5000):
        if step % 500 == 499:
            placement.grow(placement.slots + rng.randrange(3 * REGION))
        choice = rng.random()
        if choice < 0.6 and (slot := placement.take()) is not None:
            assert slot not in used | leaving
            placement.insert(slot, step, held=False)
            used.add(slot)
        elif choice < 0.8:
            victims = set(placement.victims(3))
            assert victims <= used
            used -= victims
            leaving |= victims
        elif leaving:
            slot = leaving.pop()
            placement.release(slot)
        assert placement.free == placement.slots - len(used) - len(leaving)
        assert placement.evictable() == len(used)


def test_while_it_is_not_known_yet_what_is_used() -> None:
    """Recovery of a large index goes on while the device grows."""
    placement = Placement(100, frontier=60)
    placement.adopt(10, held=False)
    placement.grow(200)
    assert placement.free == 140
    placement.adopt(20, held=True)
    placement.scanned()
    assert placement.free == 198
    assert set(fill(placement, 0)) == set(range(200)) - {10, 20}


def test_it_does_not_shrink() -> None:
    with pytest.raises(ValueError, match="cannot become"):
        Placement(10).grow(9)
