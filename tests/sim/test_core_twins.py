# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The compiled core does what Python does: the same history on two caches, one with each, and all of both is compared.

That is: every byte of the device, journal included; pages, sums, ready bits, open sectors, records that wait; the
placement of slots; and what each call returned or raised. Both caches have the same uuid, so their frames are equal to
the byte. Each bug that can be planted in the core is found.
"""

import contextlib
import errno
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import forebay_fast
from forebay_cache.device.pace import QUIET_MOST
from forebay_cache.format.geometry import BLOCK, SECTOR
from sim.fake_loop import Dice, Loop, simulated
from sim.twins import BLOCKS, SECTORS, Op, Side, unlike

pytestmark = pytest.mark.skipif(bool(forebay_fast.missing), reason="no core: make setup")

IN_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None

# -- histories --------------------------------------------------------------------------------------------------------

sectors = st.integers(0, SECTORS - 1)
seeds = st.integers(0, 255)
lengths = st.sampled_from([1, 1, 1, 2, 3, 7, 16, 16, 20, 33])
near = st.sampled_from([0, 1, 2, 3, 14, 15, 16, 17, 30, 31, 32])  # so that writes meet
runs = st.lists(st.tuples(st.one_of(near, near, sectors), lengths, seeds), min_size=1, max_size=8)
writes = st.tuples(st.just("writes"), runs, st.sampled_from([-1] * 9 + [0, 1]))
reads = st.tuples(
    st.just("read"),
    st.one_of(near, near, near, sectors).map(lambda n: n * SECTOR)
    | st.integers(0, SECTORS * SECTOR - 1),
    st.sampled_from([1, 512, SECTOR, SECTOR, 4 * SECTOR, BLOCK, BLOCK, 2 * BLOCK]),
)


KINDS: dict[str, tuple[int, st.SearchStrategy[Op]]] = {
    "writes": (12, writes),
    "read": (12, reads),
    "zero": (2, st.tuples(st.just("zero"), st.one_of(near, sectors), lengths)),
    "fill": (
        4,
        st.tuples(
            st.just("fill"), st.integers(0, BLOCKS - 1), st.integers(1, 3), st.integers(0, 3)
        ),
    ),
    "look_beyond": (1, st.tuples(st.just("look_beyond"), st.sampled_from([0, 1 << 63, 1 << 19]))),
    "by_turns": (
        2,
        st.tuples(st.just("by_turns"), st.integers(0, 2), st.sampled_from([0, 0, 3]), seeds),
    ),
    **{
        name: (often, st.just((name,)))
        for name, often in {
            "begin_sync": 2,
            "end_sync": 2,
            "commit": 4,
            "publish": 1,
            "freeze": 1,
            "forget_ready": 3,
            "forget_sums": 1,
            "load_sums": 2,
            "shed": 1,
            "load": 2,
        }.items()
    },
}
"""How often each operation comes, of so many in all, and what it is like."""

TROUBLE: dict[str, tuple[int, st.SearchStrategy[Op]]] = {
    "fault": (
        4,
        st.tuples(
            st.just("fault"),
            st.integers(0, 6),
            st.sampled_from([errno.ENOSPC, errno.ENOSPC, errno.EIO]),
        ),
    ),
    "slow": (2, st.tuples(st.just("slow"), st.integers(0, 4))),
    "mend": (4, st.just(("mend",))),
    "wait": (3, st.just(("wait",))),
}


def histories(
    kinds: dict[str, tuple[int, st.SearchStrategy[Op]]],
) -> st.SearchStrategy[list[Op]]:
    choice = [strategy for often, strategy in kinds.values() for _ in range(often)]
    return st.lists(st.sampled_from(choice).flatmap(lambda one: one), min_size=25, max_size=60)


def play(history: list[Op], *, by_python: bool) -> None:
    """Do it on both sides; an AssertionError says where they differ."""
    dice = Dice("twins")
    home = Path(tempfile.mkdtemp(prefix="forebay-twins-", dir=IN_MEMORY))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        with mock.patch.object(gc, "collect"):  # a tenth of a second each time
            stack.enter_context(simulated(dice))
        forebay_fast.core.write_by_python(by_python)
        loop = Loop()
        stack.callback(loop.close)
        both: list[Side] = []
        for name in ("python", "core"):
            (home / name).mkdir()
            both.append(Side(home / name, core=name == "core"))
            stack.callback(both[-1].cache.release)
        for n, op in enumerate(history):
            if op[0] == "wait":
                loop.run(trio.sleep, 2 * QUIET_MOST)
                continue
            told = [loop.run(side.do, op) for side in both]
            assert told[0] == told[1], f"step {n}, {op}: {told}"
            found = unlike(*both)
            assert not found, f"step {n}, {op}: not the same {found}"


HISTORIES = int(os.environ.get("FOREBAY_SIM_EXAMPLES", "15"))
"""So many for each test; `FOREBAY_SIM_EXAMPLES=1000` looks longer."""


def quickly(*phases: Phase) -> Callable[..., Any]:
    return settings(
        max_examples=HISTORIES,
        deadline=None,
        derandomize=True,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


@pytest.mark.expect_log("cache device .* failed")
@quickly(Phase.generate, Phase.shrink)
@given(histories(KINDS | TROUBLE))
def test_both_do_the_same_with_faults_and_slow_writes(history: list[Op]) -> None:
    play(history, by_python=True)


@quickly(Phase.generate, Phase.shrink)
@given(histories(KINDS))
def test_both_do_the_same_when_the_core_writes_itself(history: list[Op]) -> None:
    play(history, by_python=False)


@pytest.mark.parametrize(
    "between",
    [
        [("shed",)],
        [("shed",), ("load",)],
        [("shed",), ("fill", 2, 1, 3)],
        [("zero", 0, 1)],
        [("freeze",), ("zero", 0, 1)],
    ],
)
def test_a_page_that_python_made_or_shed_is_looked_up_anew(between: list[Op]) -> None:
    read: Op = ("read", 0, SECTOR)
    history = [("fill", 0, 2, 1), ("commit",), ("writes", [(8, 1, 1)], -1), read, *between, read]
    play(history, by_python=False)
    play([("load",), read, *history], by_python=False)  # looked up when it held nothing


@pytest.mark.parametrize("bug", ["wrong side", "stale ready", "check skipped"])
def test_a_bug_in_the_core_is_found(bug: str) -> None:
    if not forebay_fast.core.has_plants:
        pytest.skip("compiled without plants: make setup")

    @quickly(Phase.generate)
    @given(histories(KINDS))
    def look(history: list[Op]) -> None:
        play(history, by_python=False)

    with (
        mock.patch.object(forebay_fast.core, "bugs", frozenset({bug})),
        pytest.raises(AssertionError, match="not the same|read"),
    ):
        look()
