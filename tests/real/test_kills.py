"""Promise 1 by SIGKILL at random: the real daemon, guests that remember what was acknowledged, fio that verifies.

The short form of `make soak KILLS=2000`; tests/README.md says how to replay a seed.
"""

import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay_cache import Cache, Layer, clean, invalidate, open_cache
from forebay_cache.geometry import PAGE_BLOCKS
from forebay_cache.layer import SLOT_SHIFT
from real.disk_fixture import MODES
from real.gateway_process import GatewayProcess
from real.kill_checker import Tally
from real.kill_hunt import hunt
from real.kill_plants import BUGS
from real.processes import MIB, need, random_image

SECTOR = 4096

KILLS = 12

MOST_KILLS = 12
"""A planted bug that outlives so many kills was not found."""

HARMLESS = "origin not flushed"
"""A bug that only a power cut can show."""


@pytest.fixture(autouse=True)
def _need_libnbd() -> None:
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed: `make setup` does it")


# ---------------------------------------------------------------------------------------------- the last value of each


def test_nothing_acknowledged_is_lost_to_kills_at_random(
    rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    """All modes and two overlays at once; every block is looked at after every kill, every image at the end."""
    tally = Tally()
    hunt(KILLS, rng.getrandbits(32), tally)
    with capsys.disabled():
        print(f"\n{tally.line()}; {tally.more()}")
    assert not tally.lost, "\n".join(tally.lost[:20])
    assert tally.kills == KILLS
    assert tally.writes > 20 * KILLS
    assert tally.in_flight > KILLS, "nearly every kill comes in the middle of requests"
    assert tally.origins >= len(MODES) + 2


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug != HARMLESS])
def test_a_planted_bug_is_found(bug: str, rng: random.Random) -> None:
    tally = Tally()
    kept = hunt(MOST_KILLS, rng.getrandbits(32), tally, plant={"bug": bug})
    assert tally.lost, f"nothing was lost in {tally.kills} kills"
    assert kept is not None
    assert kept.exists(), "kept for whoever looks into it"
    shutil.rmtree(kept)


# ------------------------------------------------------------------------------------------ what the harness has found


async def test_a_block_that_was_evicted_and_overwritten_does_not_come_back(tmp_path: Path) -> None:
    """A crash undoes an eviction that was not committed: what was there is old if the origin was written since."""

    def opened() -> tuple[Cache, Layer]:
        cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 * MIB, block_size=65536)
        return cache, cache.layer("image:i") or cache.make_layer("image:i", private=False)

    cache, layer = opened()
    with clean.filling(cache, layer, [0]) as cells:
        await clean.store(cache, layer, 0, memoryview(b"o" * 65536), cells)
    await cache.commit()
    slot = (cache.page(layer, 0)[0] >> SLOT_SHIFT) - 1
    cache.placement.quarantine(slot)
    assert cache.evict_slot(layer, 0, 0, slot)
    await invalidate(cache, layer, 3 * SECTOR, SECTOR)  # and the origin is written
    cache.release()  # as a kill does
    cache, layer = opened()
    try:
        await cache.load(layer, [0])
        assert len(layer.pages[0]) == PAGE_BLOCKS
        assert not layer.pages[0][0] >> 3 & 1, "the sector is valid again, and old"
    finally:
        cache.release()
