# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Promise 1 at every named point: the daemon ends itself by SIGKILL before or after it, in every mode.

`make test` takes a part of the points, another one with each seed; `make soak POINTS=1`, or FOREBAY_KILL_POINTS=1 here,
takes all, in all modes.
"""

import os
import random

import pytest

from real.kill_checker import Tally
from real.kill_plants import POINTS, SIDES
from real.kill_steps import LIVES, SHARE, Steps, kill_everywhere

ALL = bool(os.environ.get("FOREBAY_KILL_POINTS"))


@pytest.fixture(autouse=True)
def _need_libnbd() -> None:
    pytest.importorskip("libnbdmod", reason="python3-libnbd is not installed: `make setup` does it")


def test_points_have_names_of_their_own() -> None:
    assert len({point.name for point in POINTS}) == len(POINTS)
    assert len(SIDES) == 2 * len(POINTS)


@pytest.mark.timeout(3600 if ALL else 120)
@pytest.mark.parametrize("life", LIVES)
def test_nothing_is_lost_to_a_kill_at_a_named_point(
    life: str, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = Tally()
    share = 1.0 if ALL else SHARE
    reached, _ = kill_everywhere(life, rng.getrandbits(32), tally, share=share, more=int(ALL))
    with capsys.disabled():
        print(f"\n{life}: {len(reached)} points; {tally.line()}")
    assert not tally.lost, "\n".join(tally.lost[:20])
    assert reached


def test_what_a_start_finishes_is_not_taken_for_somebody_elses(rng: random.Random) -> None:
    """A committed journal is applied to the image by the start after a kill, which changes the image's times."""
    tally = Tally()
    steps = Steps("write-back", rng.getrandbits(32), tally)
    try:
        steps.begin()
        for side in ("after redo commit", "after origin fdatasync", "before redo remove"):
            assert steps.kill_at(side, 1), f"{side}: not passed"
            assert not tally.lost, tally.lost[:3]
        steps.end()
    finally:
        steps.gateway.remove()
