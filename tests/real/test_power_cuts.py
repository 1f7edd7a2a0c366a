# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The power is cut under the real daemon: cache device, index, image and what lies beside it, all at once.

Everything that a daemon writes goes through a file system that keeps a log (`recorder.py`). Guests with libnbd write,
zero, flush and read, an operator flushes, changes modes and kills (`crash_driver.py`). Afterwards, at many records of
the log, the ways are tried in which the machine could have come back had the power gone there (`crash_log.py`), and
the real recovery is asked what is left (`crash_oracle.py`). `planted.py` has the bugs that have to be found.

``FOREBAY_CUT_SECONDS=N`` looks for N seconds instead of the default; ``--seed N`` begins elsewhere. A failure names
its life: ``FOREBAY_CUT_LIFE=20240229.3`` lives that one alone. Guests and daemon are processes, so that it does not
come out the same to the byte; ``FOREBAY_CUT_KEEP=DIR`` keeps the log of a life in which something was found.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import pytest
import trio

from real.crash_driver import SIZE, Life, Living
from real.crash_ledger import Marks, Phase
from real.crash_log import Replay, read_log
from real.crash_oracle import Broken, Host, Oracle, clock, looking
from real.crash_steps import STEPS
from real.disk_fixture import small_tmpfs
from real.fuse_mount import need_fuse
from real.gateway_process import GatewayProcess
from real.planted import BUGS

SECONDS = float(os.environ.get("FOREBAY_CUT_SECONDS", "9"))
ONE_LIFE = os.environ.get("FOREBAY_CUT_LIFE")
KEEP = os.environ.get("FOREBAY_CUT_KEEP")

LEAST = 100
"""States of one life, however slow the machine is and the time is up."""

STATES = 3000
"""Looked at after one life, at most: then another life finds more."""

WORKERS = 1 if SECONDS < 60 else os.cpu_count() or 1
"""Lives that are looked at side by side."""

WAYS = 5
"""Tried at one record; and as often as not the daemon killed there."""

PLANTED_LIVES = 20
PLANTED_STATES = 800

ROOM = 512 << 20

LIVES = (
    ("write-back", ()),
    ("write-back", ("write-back",)),
    ("write-back", ("write-back", "full-copy")),
    ("write-through", ("write-back", "write-through", "write-around", "none", "full-copy")),
    ("full-copy", ("write-back", "full-copy")),
    ("write-around", ("write-through", "write-around")),
    ("write-through", ("write-through",)),
)
BACK = {"write-back", "full-copy"}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on a memory file system, not below /dev, where a daemon makes no cache file."""
    need_fuse()
    pytest.importorskip(
        "libnbdmod", reason="python3-libnbd is not installed: `make setup` installs it"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(_paths()))
    with (
        tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp") as name,
        small_tmpfs(Path(name) / "fast", ROOM) as directory,
    ):
        yield directory


def _paths() -> list[str]:
    tests = str(Path(__file__).parents[1])
    return [tests, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


@dataclass
class Count:
    """What was looked at so far."""

    cuts: int = 0
    kills: int = 0
    lives: int = 0
    finished: int = 0
    dropped: int = 0
    seconds: float = 0.0  # of the processor, for looking

    def add(self, other: "Count") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def look_at(
    living: Living,
    directory: Path,
    count: Count,
    *,
    states: int = STATES,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Cut the power again and again in one life, about `states` times. Raises Broken."""
    seed = living.life.seed
    rng = random.Random(f"{seed} cuts")
    records = read_log(living.log)
    replay, marks = Replay(records), Marks(records, SIZE)
    modes = {living.life.mode, *living.life.modes}
    host = Host(directory, living.image)
    bug = living.life.bug is not None
    oracle = Oracle(host, rng, one_instant=modes <= BACK, mistrust=bug)
    moments = some_moments(records, replay.first, states // WAYS, rng)

    async def look() -> None:
        for at in moments:
            replay.advance(at)
            ledger = marks.advance(at)
            if ledger.phase is Phase.RESTORING:
                continue  # half a backup: whatever it holds is nobody's fault
            killed = rng.random() < 0.3
            for way in range(WAYS + killed):
                if until():
                    return
                state = replay.killed() if way == WAYS else replay.cut(rng)
                try:
                    await oracle.look(state, ledger, killed=way == WAYS)
                except Exception as error:
                    what = "killed" if way == WAYS else "power cut"
                    if KEEP:
                        shutil.copy(living.log, Path(KEEP) / seed)
                    raise Broken(
                        f"life {seed}, record {at} of {len(records)}, {what}, way {way}: {_first(error)!r}"
                    ) from error
                if way == WAYS:
                    count.kills += 1
                else:
                    count.cuts += 1

    began = time.process_time()
    try:
        with looking(oracle):
            trio.run(look, clock=clock())
    finally:
        count.seconds += time.process_time() - began
        count.finished += oracle.recovered
        count.dropped += oracle.dropped


def some_moments(
    records: list[tuple[Any, ...]], first: int, many: int, rng: random.Random
) -> list[int]:
    """Numbers of records, in order: few from before the disk was attached, and many right behind a sync, where what
    relies on it begins.
    """
    said = (n for n, record in enumerate(records) if record[0] == "mark")
    attached = next(said, len(records))
    synced = [n + 1 for n in range(attached, len(records)) if records[n][0] == "synced"]
    found = rng.sample(range(first, attached), min(attached - first, many // 20))
    found += rng.sample(synced, min(len(synced), many // 2))
    late = range(attached, len(records) + 1)
    return sorted(found + rng.sample(late, min(len(late), many // 2)))


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def live(life: Life, directory: Path) -> Living:
    """A life in `directory`, which is made."""
    directory.mkdir()
    living = Living(directory, life)
    gateway = GatewayProcess()
    try:
        try:
            living.run(gateway)
        except Exception:
            print(gateway.log_text())
            raise
        if KEEP and living.wrong:
            shutil.copy(living.log, Path(KEEP) / life.seed)
        if life.bug is None:
            assert not living.wrong, f"life {life.seed}: {living.wrong}"
            assert not gateway.unexpected_log(), f"life {life.seed}: {gateway.log_text()}"
    finally:
        gateway.remove()
    return living


@contextlib.contextmanager
def fresh(parent: Path) -> Iterator[Path]:
    """A name in `parent`; what is there afterwards is removed."""
    directory = parent / f"{time.monotonic_ns()}"
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def the_life(seed: str) -> Life:
    rng = random.Random(f"{seed} life")
    mode, modes = rng.choice(LIVES)
    return Life(
        seed,
        mode,
        modes,
        operations=rng.choice((20, 60, 120, 200)),
        pause=rng.choice((0.03, 0.1, 0.5)),
        step=rng.choice((*STEPS, "", "", "")),
        device=rng.choices(("", "slow", "hangs"), (12, 3, 1))[0],
    )


def one_life(fast: Path, seed: str, end: float) -> Count:
    """Live it, and look at it until `end` (of the monotonic clock), and at LEAST of its states."""
    count = Count(lives=1)
    with fresh(fast) as directory:
        living = live(the_life(seed), directory)

        def enough() -> bool:
            return not ONE_LIFE and count.cuts >= LEAST and time.monotonic() >= end

        look_at(living, directory / "replay", count, until=enough)
    return count


def lives(fast: Path, seed: int) -> Iterator[Count]:
    """What was looked at in one life after the other, `WORKERS` at once, for `SECONDS`.

    Each has a process of its own: what pytest keeps for the whole of a test, the log and all that hangs on it, would
    fill the memory of an hour's run.
    """
    end = time.monotonic() + SECONDS
    with multiprocessing.get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
        if ONE_LIFE:
            yield pool.apply(one_life, (fast, ONE_LIFE, end))
            return
        numbers = itertools.count()
        running = deque[AsyncResult[Count]]()
        while running or time.monotonic() < end:
            while len(running) < WORKERS and time.monotonic() < end:
                life = f"{seed}.{next(numbers)}"
                running.append(pool.apply_async(one_life, (fast, life, end)))
            yield running.popleft().get()


@pytest.mark.timeout(SECONDS * 2 + 120)
@pytest.mark.expect_log(".*")  # the oracle looks at the log itself
def test_what_was_flushed_survives(
    fast: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    total = Count()
    for count in lives(fast, seed):
        total.add(count)
    with capsys.disabled():
        print(
            f"\nstates checked {total.cuts}, lost 0 ({total.kills} kills besides; {total.lives} lives; "
            f"{total.finished} checkpoints finished, {total.dropped} dropped; "
            f"{(total.cuts + total.kills) / max(total.seconds, 1e-9):.0f} states/s of processor time)"
        )
    assert total.cuts


@pytest.mark.timeout(400)
@pytest.mark.expect_log(".*")
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(
    fast: Path, seed: int, bug: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = Count()
    for number in range(PLANTED_LIVES):
        life = Life(
            f"{seed}.{bug}.{number}",
            BUGS[bug][1],
            (BUGS[bug][1],),
            operations=(40, 100, 200)[number % 3],
            pause=(0.1, 0.3, 1.0)[number % 3],
            restarts=False,
            step=BUGS[bug][2],
            bug=bug,
        )
        with fresh(fast) as directory:
            living = live(life, directory)
            try:
                look_at(living, directory / "replay", count, states=PLANTED_STATES)
            except Broken as found:
                print(f"{bug}: {found}")
                with capsys.disabled():
                    print(
                        f" {bug}: state {count.cuts + count.kills + 1}, {count.seconds:.2f} s ",
                        end="",
                    )
                return
    pytest.fail(f"{count.cuts} states of {PLANTED_LIVES} lives, and nothing was found")
