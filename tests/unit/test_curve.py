# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The curve of a cache's size: samples, reuse distances, miniatures, the advisor on top of them, and its file."""

import random
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forebay_cache.curve import advisor
from forebay_cache.curve.advisor import FACTORS, Advisor
from forebay_cache.curve.distances import Distances
from forebay_cache.curve.kept import LARGEST, Kept, load, save
from forebay_cache.curve.miniature import Miniature
from forebay_cache.format.geometry import BLOCK
from forebay_cache.slots.placement import Placement
from forebay_cache.slots.samples import (
    HIT,
    LIMIT,
    MISS,
    MISSES,
    PUT,
    ROOM,
    USED,
    VISITS,
    WHOLE,
    Samples,
    hash_of,
)

Make = Callable[..., Advisor]

# ---------------------------------------------------------------------------------------- samples


def test_a_share_of_the_blocks_is_seen_and_always_the_same_ones() -> None:
    samples = Samples()
    samples.head[LIMIT] = WHOLE // 8
    keys = [layer << 32 | block for layer in (1, 2, 77) for block in range(400)]
    for key in keys[::-1] + keys:
        samples.note(key, MISS)
    seen = [key for key, _, _ in samples.drain()]
    assert 2 * 145 <= len(seen) <= 2 * 155
    assert seen[: len(seen) // 2] == seen[: len(seen) // 2 - 1 : -1]
    assert set(seen) == {key for key in keys if hash_of(key) < WHOLE // 8}


def test_reads_of_one_block_in_a_row_are_one_entry() -> None:
    samples = Samples()
    for key, kind in ((1, MISS), (1, HIT), (1, HIT), (2, HIT), (1, HIT), (3, PUT), (3, HIT)):
        samples.note(key, kind)
    assert samples.drain() == [
        (1, MISS, 3),
        (2, HIT, 1),
        (1, HIT, 1),
        (3, PUT, 1),
        (3, HIT, 1),
    ]
    assert samples.drain() == []


def test_what_is_more_than_there_is_room_for_is_counted_and_lost() -> None:
    samples = Samples()
    for key in range(ROOM + 7):
        samples.note(key, HIT)
        samples.note(key, HIT)
    assert samples.head[USED] == ROOM + 14, "those that were lost are not told apart"
    assert [key for key, _, _ in samples.drain()] == list(range(ROOM))
    assert samples.head[USED] == 0


# -------------------------------------------------------------------------------------- distances


def test_distances_are_the_number_of_other_blocks_in_between() -> None:
    distances = Distances()
    assert [distances.use(key) for key in (1, 2, 3, 1, 1, 3, 2, 4, 1)] == [
        None, None, None, 2, 0, 1, 2, None, 3,
    ]  # fmt: skip
    assert list(distances) == [3, 2, 4, 1]
    distances.forget_oldest()
    assert distances.use(3) is None
    distances.keep(lambda key: key != 4)
    assert distances.use(2) == 2


def lru_misses(trace: Sequence[int], blocks: int) -> int:
    there: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for key in trace:
        misses += key not in there
        there[key] = None
        there.move_to_end(key)
        if len(there) > blocks:
            there.popitem(last=False)
    return misses


def zipf(seed: int, blocks: int, reads: int, skew: float = 0.9) -> list[int]:
    dice = random.Random(seed)
    keys = dice.sample(range(blocks), blocks)
    weights = [1 / rank**skew for rank in range(1, blocks + 1)]
    return dice.choices(keys, weights, k=reads)


def test_the_curve_of_all_blocks_is_that_of_lru() -> None:
    trace = zipf(1, 2000, 20_000)
    distances = Distances()
    for key in trace:
        distances.count(distances.use(key), 1)
    for blocks in (1, 64, 100, 500, 1000, 1999, 5000):
        assert distances.misses(blocks) == pytest.approx(lru_misses(trace, blocks), abs=100)
    assert distances.misses(1 << 60) == len(set(trace)), "the first read of each"


# --------------------------------------------------------------------------------------- advisor


@pytest.fixture
def make() -> Make:
    def made(slots: int, *, held: Callable[[int], bool] = lambda _: False) -> Advisor:
        pool: Any = SimpleNamespace(samples=Samples(), placement=Placement(slots), low=0)
        return Advisor(pool, held)

    return made


def samples_of(one: Advisor) -> Samples:
    return one._samples


async def play(one: Advisor, trace: Sequence[int], kinds: Sequence[int] | None = None) -> None:
    """Have readers ask for these blocks; by themselves they are all missed."""
    samples = samples_of(one)
    for n, key in enumerate(trace):
        kind = kinds[n] if kinds else MISS
        samples.head[VISITS] += kind != PUT
        samples.head[MISSES] += kind == MISS
        samples.note(key, kind)
        if samples.head[USED] >= ROOM - 1:
            await one.drain()
    await one.drain()


def ratios(one: Advisor, key: str = "hit_ratio") -> list[float]:
    return [size[key] for size in one.report()["sizes"]]


async def test_each_size_is_told_what_the_real_policy_and_lru_would_find_there(make: Make) -> None:
    trace = zipf(2, 10_000, 30_000)
    one = make(1600)
    samples_of(one).head[LIMIT] = WHOLE // 4
    await play(one, trace)
    assert one.share == pytest.approx(0.25), "what was sampled was taken in time"
    for factor, found, lru in zip(FACTORS, ratios(one), ratios(one, "lru_hit_ratio"), strict=True):
        whole = Miniature(1600 * factor)
        exact = sum(whole.read(key) for key in trace) / len(trace)
        assert found == pytest.approx(exact, abs=0.02), factor
        assert lru == pytest.approx(
            1 - lru_misses(trace, int(1600 * factor)) / len(trace), abs=0.02
        )
    assert one.report()["reads"] == 30_000


async def test_too_many_blocks_halve_the_share_and_the_figures_stay(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advisor, "MOST", 1500)
    trace = zipf(3, 10_000, 30_000)
    one = make(1500)
    assert one.share == 1
    await play(one, trace)
    assert one.share <= 0.5
    assert len(one._distances) <= 1500
    whole = Miniature(1500)
    exact = sum(whole.read(key) for key in trace) / len(trace)
    assert ratios(one)[1] == pytest.approx(exact, abs=0.04)


async def test_lost_samples_halve_the_share_when_it_goes_on_and_are_no_hits(make: Make) -> None:
    one = make(4000)
    samples = samples_of(one)
    for turn in range(5):
        assert one.share == 1
        for key in range(4 * ROOM):
            samples.head[VISITS] += 1
            samples.head[MISSES] += 1
            samples.note(turn << 32 | key, MISS)
        await one.drain()
    assert one.share == pytest.approx(0.5)
    assert one.report()["reads"] == 5 * ROOM, "of four in all only one was seen"
    assert ratios(one) == [0.0] * len(FACTORS)


async def test_a_hit_of_a_block_that_came_before_the_first_look_counts_for_nothing(
    make: Make,
) -> None:
    one = make(1000)
    await play(one, [1, 2, 3, 1], [HIT, HIT, MISS, HIT])
    report = one.report()
    assert (report["reads"], report["hit_ratio"], report["sampled_reads"]) == (2, 0.5, 2)
    assert ratios(one) == [0.5] * len(FACTORS)


async def test_what_is_read_ahead_or_written_is_there_when_it_is_read(make: Make) -> None:
    one = make(1000)
    await play(one, [1, 2, 1, 2], [PUT, PUT, HIT, HIT])
    assert one.report()["reads"] == 2
    assert ratios(one) == [1.0] * len(FACTORS)


async def test_reads_of_what_is_never_evicted_are_hits_at_all_sizes(make: Make) -> None:
    one = make(1000, held=lambda key: key < 10)
    await play(one, [1, 2, 100, 101], [HIT, HIT, MISS, MISS])
    assert ratios(one) == [0.5] * len(FACTORS)


async def test_too_few_reads_are_said_to_be_too_few(make: Make) -> None:
    one = make(1000)
    assert not one.report()["enough"]
    assert one.report()["hit_ratio"] is None
    await play(one, list(range(advisor.ENOUGH - 1)))
    assert not one.report()["enough"]
    await play(one, [1])
    assert one.report()["enough"]


async def test_yesterday_counts_for_half(make: Make) -> None:
    one = make(1000)
    await play(one, [1, 2, 3, 4])
    one.fade(0.5)
    await play(one, [1, 2], [HIT, HIT])
    assert one.report()["reads"] == 4
    assert ratios(one) == [0.5] * len(FACTORS)


async def test_held_blocks_leave_less_room_to_the_others(make: Make) -> None:
    one = make(1000)
    placement = one._slots.placement
    for key in range(600):
        slot = placement.take()
        assert slot is not None
        placement.insert(slot, key, held=True)
    trace = list(range(1000, 1500)) * 10
    await play(one, trace)
    half, now, *_, largest = ratios(one)
    assert half == 0.0, "half of it is less than what is held"
    assert now < 0.6, "of 500 blocks it has room for 400"
    assert largest == pytest.approx(0.9)


# ----------------------------------------------------------------------------------- over a restart


async def test_a_restart_goes_on_where_it_was(make: Make, tmp_path: Path) -> None:
    trace = zipf(4, 5000, 20_000)
    first, second = make(1000), make(1000)
    await play(first, trace)
    save(tmp_path / "advice", await first.kept("u"))
    await second.restore(load(tmp_path / "advice"))
    assert second.report() == first.report()
    assert (tmp_path / "advice").stat().st_mode & 0o777 == 0o600
    for one in (first, second):
        await play(one, zipf(5, 5000, 20_000))
    assert ratios(second) == pytest.approx(ratios(first), abs=0.02)


async def kept_of(make: Make) -> Kept:
    one = make(1000)
    await play(one, list(range(50)))
    return await one.kept("u")


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:-8],
        lambda data: data + b"x",
        lambda data: data.replace(b'"format": 1', b'"format": 2'),
        lambda data: data.replace(b'"reads": 50', b'"reads": -1'),
        lambda data: data.replace(b'"reads": 50.0', b'"reads": NaN'),
        lambda data: data.replace(b'"order": 50', b'"order": -1'),
        lambda data: data.replace(b'"numbers"', b'"others"'),
        lambda data: b"[1]\n" + data.partition(b"\n")[2],
        lambda data: data + bytes(LARGEST),
        lambda data: b"{" * 100_000 + b"\n",
    ],
)
async def test_a_file_that_is_not_what_was_written_is_refused(
    make: Make, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "advice"
    save(path, await kept_of(make))
    before = path.read_bytes()
    path.write_bytes(harm(before))
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match=r"."):
        load(path)


async def test_counters_of_another_kind_are_refused(make: Make) -> None:
    kept = await kept_of(make)
    wrong = Kept("u", 0.0, 0, kept.numbers, kept.counts, kept.keys)
    with pytest.raises(ValueError, match="counters"):
        await make(1000).restore(wrong)
    wrong = Kept("u", 0.0, 1, kept.numbers, array("d", (1.0,)), kept.keys)
    with pytest.raises(ValueError, match="counters"):
        await make(1000).restore(wrong)
    keys = {"order": array("Q", range(advisor.MOST + 1))}
    with pytest.raises(ValueError, match="too many"):
        await make(1000).restore(Kept("u", 0.0, WHOLE, kept.numbers, kept.counts, keys))


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    (tmp_path / "advice.new").symlink_to(other)
    kept = Kept("u", 0.0, 1, {}, array("d"), {})
    with pytest.raises(OSError, match="symbolic"):
        save(tmp_path / "advice", kept)
    assert other.read_bytes() == b"kept"


async def test_sizes_are_in_bytes_and_in_order(make: Make) -> None:
    sizes = [size["size"] for size in make(1000).report()["sizes"]]
    assert sizes == [round(1000 * factor) * BLOCK for factor in sorted(FACTORS)]
