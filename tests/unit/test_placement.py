# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The placement of blocks: whose slot may be given to whom, and what it costs to find one."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from forebay_cache.slots.placement import MAIN, PROBATION, TOUCHED, Placement

TERABYTE = 1 << 24  # slots
TINY = (1, 2, 3, 4, 8)


def fill(placement: Placement, keys: Iterator[int] | range, *, held: bool = False) -> list[int]:
    """Insert blocks until the keys or the free slots run out."""
    slots = []
    for key in keys:
        slot = placement.take()
        if slot is None:
            break
        placement.insert(slot, key, held=held)
        slots.append(slot)
    return slots


def touch(placement: Placement, slots: list[int]) -> None:
    for slot in slots:
        placement.state[slot] |= TOUCHED


def replace(placement: Placement, keys: range) -> list[int]:
    """Insert blocks one by one, each in the place of one victim; the victims."""
    victims = []
    for key in keys:
        (victim,) = placement.victims(1)
        placement.release(victim)
        fill(placement, range(key, key + 1))
        victims.append(victim)
    return victims


@pytest.mark.parametrize("slots", TINY)
def test_every_slot_is_given_once(slots: int) -> None:
    placement = Placement(slots)
    given = [placement.take() for _ in range(slots)]
    assert sorted(slot for slot in given if slot is not None) == list(range(slots))
    assert placement.take() is None
    assert placement.free == placement.evictable() == 0
    assert placement.victims(8) == []


@pytest.mark.parametrize("slots", TINY)
def test_a_tiny_cache_goes_round(slots: int) -> None:
    placement = Placement(slots)
    fill(placement, range(slots))
    for key in range(100, 200):
        touch(placement, list(range(slots)))
        (victim,) = placement.victims(1)
        assert placement.evictable() == slots - 1
        placement.evicted(victim, key)
        placement.release(victim)
        assert fill(placement, range(key, key + 2)) == [victim]


@pytest.mark.parametrize("slots", TINY)
def test_all_may_leave_at_once(slots: int) -> None:
    placement = Placement(slots)
    fill(placement, range(slots))
    touch(placement, list(range(0, slots, 2)))
    assert sorted(placement.victims(slots + 1)) == list(range(slots))
    assert placement.evictable() == placement.free == 0


@pytest.mark.parametrize("slots", [*TINY, 100])
def test_held_blocks_stay(slots: int) -> None:
    placement = Placement(slots)
    blocks = fill(placement, range(slots))
    for slot in blocks[: slots // 2]:
        placement.hold(slot)
    touch(placement, blocks)
    assert sorted(placement.victims(slots)) == blocks[slots // 2 :]
    assert placement.victims(1) == []
    assert placement.evictable() == 0


def test_a_block_inserted_held_leaves_only_after_unhold() -> None:
    placement = Placement(4)
    (slot,) = fill(placement, range(1), held=True)
    placement.hold(slot)  # holds do not nest
    assert placement.victims(1) == []
    placement.unhold(slot)
    placement.unhold(slot)
    assert placement.evictable() == 1
    assert placement.victims(2) == [slot]


def test_new_blocks_leave_in_the_order_they_came() -> None:
    placement = Placement(100)
    blocks = fill(placement, range(100))
    assert placement.victims(90) == blocks[:90]


def test_a_touched_block_outlives_those_that_came_once() -> None:
    placement = Placement(100)
    wanted = fill(placement, range(100))[10:20]
    touch(placement, wanted)
    victims = replace(placement, range(1000, 2000))
    assert not set(victims) & set(wanted)


def test_a_touched_block_is_passed_over_while_others_can_be_had() -> None:
    placement = Placement(100)
    blocks = fill(placement, range(100))
    replace(placement, range(1000, 1010))
    touch(placement, blocks[90:])
    replace(placement, range(1010, 1080))
    assert not set(placement.victims(20)) & set(blocks[90:])


def test_a_touch_counts_after_a_hold_too() -> None:
    placement = Placement(100)
    blocks = fill(placement, range(100))
    for slot in blocks[:10]:
        placement.hold(slot)
    touch(placement, blocks[:10])
    for slot in blocks[:10]:
        placement.unhold(slot)
    victims = replace(placement, range(1000, 1300))
    assert not set(victims) & set(blocks[:10])


def test_what_is_touched_when_it_comes_in_counts_as_one_use() -> None:
    """A scan by small requests touches each block several times at once."""
    placement = Placement(400)
    wanted = fill(placement, range(400))[:200]
    touch(placement, wanted)
    for key in range(1000, 3000):
        (victim,) = placement.victims(1)
        assert victim not in wanted
        placement.release(victim)
        touch(placement, fill(placement, range(key, key + 1)))


def test_a_block_asked_for_again_soon_after_it_left_goes_to_main() -> None:
    placement = Placement(100)
    blocks = fill(placement, range(100))
    touch(placement, blocks[50:])
    left = placement.victims(20)
    for slot in left:
        placement.evicted(slot, slot)
        placement.release(slot)
    returned = fill(placement, iter(left[-5:]))
    fill(placement, range(1000, 1015))
    victims = replace(placement, range(2000, 2060))
    assert not set(victims) & set(returned)


def evict_key(placement: Placement, key: int) -> None:
    """Have the key come and go, on probation."""
    (slot,) = fill(placement, iter([key]))
    placement.quarantine(slot)
    placement.evicted(slot, key)
    placement.release(slot)


def test_ghosts_are_forgotten_in_the_end() -> None:
    placement = Placement(400)
    for key in range(100):
        evict_key(placement, key)
    for key in range(1000, 1202):  # two generations, of a quarter of the slots each
        evict_key(placement, key)
    slots = fill(placement, range(100))
    assert all(placement.state[slot] & PROBATION for slot in slots)


def test_a_block_that_main_let_go_is_no_ghost() -> None:
    placement = Placement(4)
    placement.adopt(0, held=False)
    assert placement.victims(1) == [0]
    placement.evicted(0, 77)
    placement.release(0)
    (slot,) = fill(placement, iter([77]))
    assert placement.state[slot] & PROBATION


def test_keys_of_any_size_can_be_ghosts() -> None:
    placement = Placement(64)
    for key in (0, 1, 1 << 40, (1 << 64) - 1, 1 << 100):
        evict_key(placement, key)
        (again,) = fill(placement, iter([key]))
        assert placement.state[again] == MAIN, f"{key:#x} was not remembered"


# Slots that leave


def test_a_quarantined_slot_is_not_reused_before_its_release() -> None:
    placement = Placement(2)
    blocks = fill(placement, range(2))
    (victim,) = placement.victims(1)
    (other,) = set(blocks) - {victim}
    placement.hold(other)
    placement.quarantine(other)  # whether held or not: its owner says that it is gone
    assert placement.take() is None
    assert placement.victims(2) == []
    placement.release(other)
    assert placement.take() == other
    assert placement.take() is None


def test_a_victim_that_could_not_be_removed_stays() -> None:
    placement = Placement(8)
    blocks = fill(placement, range(8))
    for slot in placement.victims(8):
        placement.keep(slot)
    assert placement.evictable() == 8
    assert sorted(placement.victims(8)) == blocks


def test_a_taken_slot_can_be_given_back_unused() -> None:
    placement = Placement(1)
    slot = placement.take()
    assert slot == 0
    assert placement.victims(1) == []
    placement.release(slot)
    assert (placement.free, placement.take()) == (1, 0)


def test_free_slots_are_all_found_however_many_were_released() -> None:
    placement = Placement(40_000)
    blocks = fill(placement, range(40_000))
    for slot in reversed(blocks):
        placement.quarantine(slot)
        placement.release(slot)
    assert sorted(fill(placement, range(50_000))) == blocks


@pytest.mark.parametrize("call", ["release", "insert", "hold", "unhold", "quarantine", "keep"])
def test_a_slot_without_a_block_is_refused(call: str) -> None:
    placement = Placement(1)
    with pytest.raises(ValueError, match="slot 0"):
        _call(placement, call)
    assert (placement.free, placement.evictable(), placement.take()) == (1, 0, 0)


@pytest.mark.parametrize("call", ["insert", "hold", "unhold", "quarantine"])
def test_a_quarantined_slot_is_refused(call: str) -> None:
    placement = Placement(1)
    fill(placement, range(1))
    placement.victims(1)
    with pytest.raises(ValueError, match="slot 0"):
        _call(placement, call)
    assert (placement.free, placement.evictable()) == (0, 0)


@pytest.mark.parametrize("call", ["release", "insert", "keep"])
def test_a_block_in_place_is_not_freed_or_replaced(call: str) -> None:
    placement = Placement(1)
    fill(placement, range(1))
    with pytest.raises(ValueError, match="slot 0"):
        _call(placement, call)
    assert (placement.free, placement.evictable()) == (0, 1)


def _call(placement: Placement, call: str) -> None:
    if call == "insert":
        placement.insert(0, 1, held=False)
    else:
        getattr(placement, call)(0)


@pytest.mark.parametrize(("slots", "frontier"), [(0, 0), (-1, 0), (4, 5), (4, -1)])
def test_impossible_sizes_are_refused(slots: int, frontier: int) -> None:
    with pytest.raises(ValueError, match="slots"):
        Placement(slots, frontier=frontier)


# Recovery


def test_while_recovery_scans_only_slots_above_the_frontier_are_given() -> None:
    placement = Placement(10, frontier=6)
    assert placement.free == 4
    assert sorted(fill(placement, range(10))) == [6, 7, 8, 9]
    placement.adopt(1, held=False)
    placement.adopt(4, held=True)
    assert placement.take() is None
    placement.scanned()
    placement.scanned()
    assert placement.free == 4
    assert sorted(fill(placement, range(10))) == [0, 2, 3, 5]
    assert 4 not in placement.victims(10)


def test_without_a_frontier_what_is_not_adopted_is_free() -> None:
    placement = Placement(4)
    placement.adopt(2, held=False)
    assert placement.free == 3
    assert sorted(fill(placement, range(4))) == [0, 1, 3]


def test_a_slot_adopted_after_its_release_is_not_given() -> None:
    placement = Placement(2)
    slot = placement.take()
    assert slot is not None
    placement.release(slot)
    placement.adopt(slot, held=False)
    assert placement.take() == 1 - slot
    assert placement.take() is None


def test_a_scan_that_is_behind_does_not_bring_back_what_has_changed() -> None:
    placement = Placement(8, frontier=4)
    placement.quarantine(0)  # dropped before the scan came to it
    placement.adopt(0, held=False)
    placement.release(0)
    placement.adopt(0, held=False)
    placement.hold(1)  # written to before the scan came to it
    placement.adopt(1, held=False)
    placement.adopt(2, held=True)
    placement.unhold(2)
    placement.adopt(2, held=True)
    placement.unhold(3)  # written back before the scan came to it
    placement.adopt(3, held=True)
    assert placement.free == 5
    assert placement.victims(8) == [2, 3]
    assert placement.take() in {0, 4, 5, 6, 7}


def test_a_hit_before_the_scan_counts() -> None:
    placement = Placement(8, frontier=8)
    placement.state[3] |= TOUCHED
    for slot in range(8):
        placement.adopt(slot, held=False)
    assert placement.victims(7) == [0, 1, 2, 4, 5, 6, 7]


def test_a_touch_of_a_slot_without_a_block_does_no_harm() -> None:
    placement = Placement(6, frontier=3)
    touch(placement, list(range(6)))
    placement.adopt(1, held=True)
    assert sorted(slot for slot in (placement.take() for _ in range(4)) if slot is not None) == [
        3,
        4,
        5,
    ]
    touch(placement, [3, 4, 5])
    placement.insert(3, 3, held=False)
    placement.release(4)
    placement.scanned()
    touch(placement, list(range(6)))
    given = [placement.take() for _ in range(4)]
    assert sorted(slot for slot in given if slot is not None) == [0, 2, 4]


# Cost, as bytes of `state` looked at, on a terabyte of slots


def test_one_evictable_block_in_a_terabyte_is_found_in_its_region() -> None:
    placement = Placement(TERABYTE, frontier=TERABYTE)
    random = Random(1)
    for slot in random.sample(range(TERABYTE), 50):
        placement.adopt(slot, held=False)
        before = placement.examined
        assert placement.victims(64) == [slot]
        assert placement.examined - before <= 3 * 4096
        assert placement.victims(64) == []  # nothing to look for, so nothing looked at
        assert placement.examined - before <= 3 * 4096


def test_when_all_of_a_terabyte_is_in_use_victims_come_after_a_bounded_search() -> None:
    placement = Placement(TERABYTE, frontier=TERABYTE)
    blocks = list(
        range(17, TERABYTE, 4096)
    )  # one in each region: the hand finds little, the rest is held
    for slot in blocks:
        placement.adopt(slot, held=False)
    for _ in range(20):
        touch(placement, blocks)
        before = placement.examined
        victims = placement.victims(64)
        assert len(victims) == 64
        assert placement.examined - before <= (256 + 64 + 1) * 4096
        for slot in victims:
            placement.keep(slot)


def test_a_scan_through_a_full_cache_examines_little_per_block() -> None:
    placement = Placement(1 << 16)
    blocks = fill(placement, range(1 << 16))
    touch(placement, blocks[1 << 14 :])
    replace(placement, range(1 << 20, (1 << 20) + (1 << 14)))  # sets up main
    before = placement.examined
    for key in range(1 << 21, (1 << 21) + 256):
        for slot in placement.victims(64):
            placement.release(slot)
        fill(placement, range(key << 10, (key << 10) + 64))
    assert placement.examined - before <= 256 * 64 * 256


def test_free_slots_are_found_without_going_round_for_each() -> None:
    placement = Placement(TERABYTE, frontier=TERABYTE - 1000)
    fill(placement, range(1000))
    placement.scanned()
    assert len(fill(placement, range(1000))) == 1000
    assert placement.examined <= 3 * TERABYTE


def test_released_slots_are_found_without_a_search() -> None:
    placement = Placement(TERABYTE, frontier=TERABYTE)
    slots = Random(2).sample(range(TERABYTE), 1000)
    for slot in slots:
        placement.adopt(slot, held=False)
        placement.quarantine(slot)
        placement.release(slot)
    assert [placement.take() for _ in slots] == slots
    assert placement.examined == 0


def test_counts_that_went_wrong_are_an_error_and_not_an_endless_search() -> None:
    placement = Placement(100)
    fill(placement, range(100))
    placement.state[:] = bytes(100)
    with pytest.raises(AssertionError, match="counted"):
        placement.victims(1)


# Against a model


class PlacementMachine(RuleBasedStateMachine):
    """Any order of calls that the cache may make: every slot is in one place, and what is held stays."""

    @initialize(slots=st.sampled_from([*TINY, 40, 300]), data=st.data())
    def start(self, slots: int, data: st.DataObject) -> None:
        frontier = data.draw(st.integers(0, slots))
        self.placement = Placement(slots, frontier=frontier)
        self.unscanned = set(range(frontier))
        self.free = set(range(frontier, slots))
        self.taken: set[int] = set()
        self.leaving: set[int] = set()
        self.blocks: dict[int, int] = {}
        self.held: set[int] = set()
        self.scanning = True

    def _some(self, slots: set[int] | dict[int, int], data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(slots)))

    @rule()
    def take(self) -> None:
        slot = self.placement.take()
        assert (slot is None) == (not self.free)
        if slot is not None:
            self.free.remove(slot)
            self.taken.add(slot)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), key=st.integers(0, 500), held=st.booleans())
    def insert(self, data: st.DataObject, key: int, held: bool) -> None:
        slot = self._some(self.taken, data)
        self.placement.insert(slot, key, held=held)
        self.taken.remove(slot)
        self.blocks[slot] = key
        if held:
            self.held.add(slot)

    @rule(count=st.integers(1, 300))
    def fill(self, count: int) -> None:
        for slot in fill(self.placement, range(count)):
            self.free.remove(slot)
            self.blocks[slot] = slot

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.integers(0, self.placement.slots - 1), max_size=50))
        touch(self.placement, slots)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        slot = self._some(self.blocks, data)
        self.placement.hold(slot)
        self.held.add(slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        slot = self._some(self.held, data)
        self.placement.unhold(slot)
        self.held.remove(slot)

    @rule(count=st.integers(0, 400))
    def victims(self, count: int) -> None:
        victims = self.placement.victims(count)
        evictable = self.blocks.keys() - self.held
        assert len(victims) == len(set(victims)) == min(count, len(evictable))
        assert set(victims) <= evictable
        for slot in victims:
            self.placement.evicted(slot, self.blocks.pop(slot))
        self.leaving |= set(victims)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        slot = self._some(self.blocks, data)
        self.placement.quarantine(slot)
        del self.blocks[slot]
        self.held.discard(slot)
        self.leaving.add(slot)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        slot = self._some(self.leaving, data)
        self.placement.keep(slot)
        self.leaving.remove(slot)
        self.blocks[slot] = slot

    @precondition(lambda self: self.leaving or self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = self._some(self.leaving | self.taken, data)
        self.placement.release(slot)
        self.leaving.discard(slot)
        self.taken.discard(slot)
        self.free.add(slot)

    @precondition(lambda self: self.leaving)
    @rule()
    def release_all(self) -> None:
        for slot in self.leaving:
            self.placement.release(slot)
        self.free |= self.leaving
        self.leaving.clear()

    @precondition(lambda self: self.scanning and self.unscanned)
    @rule(data=st.data(), held=st.booleans())
    def adopt(self, data: st.DataObject, held: bool) -> None:
        slot = self._some(self.unscanned, data)
        self.placement.adopt(slot, held=held)
        self.unscanned.remove(slot)
        self.blocks[slot] = slot
        if held:
            self.held.add(slot)

    @precondition(lambda self: self.scanning and self.unscanned)
    @rule(data=st.data(), call=st.sampled_from(["hold", "unhold", "quarantine"]))
    def use_before_the_scan(self, data: st.DataObject, call: str) -> None:
        slot = self._some(self.unscanned, data)
        getattr(self.placement, call)(slot)
        self.placement.adopt(slot, held=call == "unhold")  # the scan, which is behind
        self.unscanned.remove(slot)
        if call == "quarantine":
            self.leaving.add(slot)
        else:
            self.blocks[slot] = slot
        if call == "hold":
            self.held.add(slot)

    @precondition(lambda self: self.scanning)
    @rule()
    def scanned(self) -> None:
        self.placement.scanned()
        self.scanning = False
        self.free |= self.unscanned
        self.unscanned.clear()

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "placement"):
            assert self.placement.free == len(self.free)
            assert self.placement.evictable() == len(self.blocks.keys() - self.held)


TestPlacementMachine = PlacementMachine.TestCase
TestPlacementMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
