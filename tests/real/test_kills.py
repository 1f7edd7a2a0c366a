# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Promise 1 by SIGKILL at random: the real daemon, guests that remember what was acknowledged, fio that verifies.

The short form of `make soak KILLS=2000`; tests/README.md says how to replay a seed. FOREBAY_KILL_POINTS=1 plants all of
the bugs instead of three.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from forebay_cache import Cache, Layer, invalidate, open_cache
from forebay_cache.blocks import store
from forebay_cache.format.entry import slot_of
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.format.records import LayerName
from real.disk_fixture import MODES
from real.kill_checker import Tally
from real.kill_daemon import KillableGateway
from real.kill_hunt import Ground, hunt
from real.kill_plants import BUGS
from real.processes import MIB, need, random_image

SECTOR = 4096

KILLS = 10

MOST_KILLS = 12
"""A planted bug that outlives so many kills was not found."""

FIO_TIMEOUT = 60.0

HARMLESS = "origin not flushed"
"""A bug that only a power cut can show."""

LONG = bool(os.environ.get("FOREBAY_KILL_POINTS"))

PLANTED = [bug for bug in BUGS if bug != HARMLESS][: None if LONG else 3]


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


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, rng: random.Random) -> None:
    tally = Tally()
    kept = hunt(MOST_KILLS, rng.getrandbits(32), tally, plant={"bug": bug})
    assert tally.lost, f"nothing was lost in {tally.kills} kills"
    assert kept is not None
    assert kept.exists(), "kept for whoever looks into it"
    shutil.rmtree(kept)


# ----------------------------------------------------------------------------------------------------- fio's own state


def fio(directory: Path, words: list[str], timeout: float = FIO_TIMEOUT) -> tuple[int, str]:
    """Run it there, where it keeps its verify state: its exit code, and what it reports as JSON.

    It is killed after `timeout` seconds: raises subprocess.TimeoutExpired.
    """
    report = directory / "fio.json"
    report.unlink(missing_ok=True)
    command = ["fio", "--output-format=json", f"--output={report}", *words]
    done = subprocess.run(command, cwd=directory, capture_output=True, check=False, timeout=timeout)
    text = report.read_text()
    return done.returncode, text[text.index("{") :]


@pytest.mark.parametrize("bug", [None, "no intent records"] if LONG else [None])
def test_fio_verifies_what_was_written_before_a_kill(bug: str | None, rng: random.Random) -> None:
    """One job a mode. fio keeps on record what was acknowledged, then has the daemon killed in the middle of it."""
    need("fio")
    plant = {"bug": bug} if bug else None
    gateway = KillableGateway({"defaults": {"max_lag": "1h" if bug else "200ms"}})
    try:
        gateway.launch(plant=plant)
        assert gateway.ready(), gateway.log_text()
        # One request at a time: fio takes it that of more only those begun last can be unanswered, which is not so
        # where one waits and others need not. What stands behind a job's name is of that job alone.
        jobs = ["--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--size=8M", "--iodepth=1"]
        jobs += ["--verify=crc32c", f"--randseed={rng.getrandbits(31)}"]
        for mode in MODES:
            random_image(gateway.images / f"{mode}.raw", 8 * MIB, rng.getrandbits(32))
            gateway.attach_disk(mode, f"images:{mode}.raw", mode=mode)
            jobs += [f"--name={mode}", f"--uri={gateway.uri(mode)}"]
        options = ["--verify_state_save=1", "--do_verify=0", "--rate_iops=500"]
        options += ["--trigger-timeout=1", f"--trigger=kill -9 {gateway.pid}"]
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # its engine may wait for a server that is gone
            fio(gateway.directory, [*options, *jobs], timeout=20.0)
        gateway.kill()  # where fio was through before it looked at the clock
        assert gateway.code == -9
        assert len(list(gateway.directory.glob("*-verify.state"))) == len(MODES)
        gateway.start()
        code, report = fio(gateway.directory, ["--verify_only", "--verify_state_load=1", *jobs])
        if bug:
            assert code != 0, "what was lost is not found"
            return
        assert code == 0, report
        verified = {job["jobname"]: job["read"]["total_ios"] for job in json.loads(report)["jobs"]}
        assert set(verified) == set(MODES)
        assert min(verified.values()) > 0, verified
        assert sum(verified.values()) > 100, verified
    finally:
        gateway.remove()


# ------------------------------------------------------------------------------------------ what the harness has found


async def test_a_block_that_was_evicted_and_overwritten_does_not_come_back(tmp_path: Path) -> None:
    """A crash undoes an eviction that was not committed: what was there is old if the origin was written since."""

    def opened() -> tuple[Cache, Layer]:
        cache = open_cache(tmp_path / "cache", tmp_path / "index", size=16 * MIB, block_size=65536)
        return cache, cache.layers.clean_of("i") or cache.layers.make(LayerName.of_image("i"))

    cache, layer = opened()
    with cache.in_flight.filling(layer, [0]) as cells:
        await store.store(cache, layer, 0, memoryview(b"o" * 65536), cells)
    await cache.commit()
    slot = slot_of(layer.pages.page(0)[0])
    cache.slots.placement.quarantine(slot)
    assert cache.removal.evict(layer, 0, 0, slot)
    await invalidate(cache, layer, 3 * SECTOR, SECTOR)  # and the origin is written
    cache.release()  # as a kill does
    cache, layer = opened()
    try:
        await layer.pages.load([0])
        assert len(layer.pages.page(0)) == PAGE_BLOCKS
        assert not layer.pages.page(0)[0] >> 3 & 1, "the sector is valid again, and old"
    finally:
        cache.release()


@pytest.mark.parametrize(
    ("path", "body"), [("mode", {"mode": "write-through"}), ("flush", None)], ids=["mode", "flush"]
)
def test_who_waits_for_a_pass_does_not_wait_as_long_as_it_may_take(
    path: str, body: dict[str, str] | None, rng: random.Random
) -> None:
    """A pass that nobody waits for is spread over a good part of max_lag while guests are served."""
    settings = {"defaults": {"max_lag": "1h", "max_dirty": "1 GiB"}}
    ground = Ground(
        rng.getrandbits(32), Tally(), modes=["write-back"], overlays=[], settings=settings
    )
    tally = ground.tally
    try:
        ground.begin()
        ground.until(lambda: tally.writes >= 100)
        asked = threading.Thread(
            target=ground.gateway.ask, args=("POST", f"/disks/write-back/{path}", body)
        )
        asked.start()
        assert ground.until(lambda: not asked.is_alive(), 45)
        asked.join()
        ground.finish()
        assert not tally.lost
    finally:
        ground.gateway.remove()
