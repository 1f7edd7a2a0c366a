# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How writes slow down, against a store and a guest that follow a clock of the test's own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from forebay.checkpoint.pace import HIGH, LOW, SLACK, Amount, Pace, share

MB = 10**6
MOST = 200 * MB
PIECE = 64_000
SLOTS = 1 << 40  # so many that they do not count
DEVICE = 10_000.0  # pieces a second that the cache takes


@dataclass
class Pass:
    """What a run of a guest against a store gives back."""

    longest: float = 0.0
    """Seconds between two writes."""
    dirtiest: int = 0
    rates: list[float] = field(default_factory=list)
    """Bytes a second of the guest, over each second."""


def play(
    seconds: float,
    store: Callable[[float], float],
    *,
    plateau: int = 1,
    dirty_at_first: int = 0,
    slots_most: int = SLOTS,
    slots_per_piece: int = 1,
) -> Pass:
    """A guest that writes all the time. `store(now)`: bytes a second that write-back does at that time.

    Passes begin at LOW and end when all is done; they tell how far they are each `plateau` bytes.
    """
    pace, got = Pace(), Pass()
    now = last = told = 0.0
    opened, frozen, done, written = dirty_at_first, 0, 0.0, 0

    def dirty() -> Amount:
        total = opened + frozen
        return Amount(total, total // PIECE * slots_per_piece)

    while now < seconds:
        step = 1 / DEVICE
        wait = pace.seconds_to_wait(now)
        if wait > SLACK:
            step = wait
        elif dirty().bytes + PIECE <= MOST and dirty().slots + slots_per_piece <= slots_most:
            got.longest = max(got.longest, now - last)
            last = now
            opened += PIECE
            written += PIECE
            got.dirtiest = max(got.dirtiest, dirty().bytes)
            if share(dirty(), most(slots_most)) > LOW:
                added = Amount(PIECE, slots_per_piece)
                pace.charge(now, pace.seconds_to_add(now, added, dirty(), most(slots_most)))
        if frozen:
            done += store(now) * step
            pace.advance(min(1.0, done // plateau * plateau / frozen))
            if done >= frozen:
                pace.end_pass(now, whole=True)
                frozen = 0
        if not frozen and share(dirty(), most(slots_most)) >= LOW:
            opened, frozen, done = 0, opened, 0.0
            pace.begin_pass(now, Amount(frozen, frozen // PIECE * slots_per_piece))
        now += step
        if now - told >= 1:
            got.rates.append(written / (now - told))
            told, written = now, 0
    got.longest = max(got.longest, now - last)
    return got


def most(slots: int) -> Amount:
    return Amount(MOST, slots)


@pytest.mark.parametrize("plateau", [1, 16 * MB])
@pytest.mark.parametrize("rate", [4 * MB, 40 * MB, 400 * MB])
def test_a_guest_that_is_faster_than_the_store_gets_its_speed(rate: int, plateau: int) -> None:
    """No stall, never at the limit, and evenly once it has settled."""
    seconds = max(20, 4 * MOST // rate)
    got = play(seconds, lambda _now: rate, plateau=plateau)
    assert got.longest < 0.6
    assert got.dirtiest < 0.9 * MOST
    settled = got.rates[len(got.rates) // 2 :]
    assert 0.8 * rate < sum(settled) / len(settled) < 1.2 * rate
    assert min(settled) > (0.4 if plateau == 1 else 0.2) * rate


@pytest.mark.parametrize("before", [400 * MB, 100 * MB])
def test_a_store_that_becomes_ten_times_slower(before: int) -> None:
    got = play(60, lambda now: before if now < 20 else before / 10)
    assert got.longest < 0.6
    assert got.dirtiest < MOST
    assert min(got.rates[40:]) > 0.3 * before / 10


def test_a_store_that_comes_back_when_nearly_all_is_dirty_that_may_be() -> None:
    """Until its first pass has ended little more may become dirty: that lasts."""
    got = play(100, lambda _now: 4 * MB, dirty_at_first=int(0.9 * MOST))
    assert got.longest < 0.6
    assert got.dirtiest < MOST


def test_a_store_that_scatters() -> None:
    got = play(60, lambda now: 40 * MB * (0.3 if int(now) % 7 in (2, 3) else 1.3))
    assert got.longest < 0.6
    assert got.dirtiest < 0.95 * MOST


def test_slots_count_where_they_are_what_is_short() -> None:
    """Each piece takes a slot, and the cache has few of them."""
    slots = 400
    got = play(30, lambda _now: 2 * MB, slots_most=slots)
    assert got.longest < 0.6
    assert got.dirtiest < 0.95 * slots * PIECE
    settled = got.rates[10:]
    assert 0.8 * 2 * MB < sum(settled) / len(settled) < 1.2 * 2 * MB


def test_a_store_that_stands_still_lets_less_and_less_through() -> None:
    got = play(40, lambda now: 40 * MB if now < 20 else 0.0)
    assert got.dirtiest <= MOST
    assert got.rates[-1] < 1 * MB


def test_what_a_write_takes_grows_with_what_is_dirty() -> None:
    pace, added, limit = Pace(), Amount(PIECE, 0), Amount(MOST, SLOTS)
    pace.begin_pass(0.0, Amount(MOST // 4, 1))
    pace.end_pass(5.0, whole=True)  # 10 MB/s
    shares = (0.1, LOW, 0.3, 0.35, 0.375, 0.45, HIGH)
    taken = [pace.seconds_to_add(9.0, added, Amount(int(s * MOST), 0), limit) for s in shares]
    assert taken[:2] == [0, 0]
    assert all(a < b for a, b in pairwise(taken[1:]))
    assert taken[4] == pytest.approx(PIECE / (10 * MB), rel=0.01)


def test_nobody_waits_long_for_a_slow_store_and_nobody_for_one_that_caught_up() -> None:
    pace = Pace()
    pace.charge(100.0, 3600.0)
    assert pace.seconds_to_wait(100.0) == 0.5
    pace.relieve()
    assert pace.seconds_to_wait(100.0) == 0
