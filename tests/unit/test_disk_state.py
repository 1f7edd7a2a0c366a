# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The state of a disk: which one counts where several would fit, and which are final."""

from dataclasses import replace

import pytest

from forebay.disk.state import MOVES, DiskState, Facts, state_of
from forebay_cache.states import IllegalMove, Machine

ALL_WRONG = Facts(
    has_conflict=True,
    cache_has_failed=True,
    has_private=True,
    is_coming=True,
    is_given=True,
    is_away=True,
    has_failed_pass=True,
    is_copying=True,
    is_incomplete=False,
)

REACHED = replace(ALL_WRONG, is_coming=False, is_given=False, is_away=False)

IN_ORDER = [
    (DiskState.CONFLICT, "has_conflict"),
    (DiskState.BROKEN, "has_private"),
    (DiskState.PASS_THROUGH, "cache_has_failed"),
    (DiskState.INCOMING, "is_coming"),
    (DiskState.HANDED_OVER, "is_given"),
    (DiskState.DEGRADED, "is_away"),
    (DiskState.LAGGING, "has_failed_pass"),
    (DiskState.COPYING, "is_copying"),
    (DiskState.READY, ""),
]
"""Each state, and the fact that has to go for the next one to count."""


def test_of_several_states_the_first_counts() -> None:
    facts = ALL_WRONG
    for state, fact in IN_ORDER:
        assert state_of(facts) is state
        if fact:
            facts = replace(facts, **{fact: False})
    told = [state for state, _ in IN_ORDER]
    assert [state for state in DiskState if state in told] == told


def test_a_copy_that_lacks_only_what_cannot_be_read_is_incomplete() -> None:
    facts = replace(REACHED, has_conflict=False, cache_has_failed=False)
    facts = replace(facts, has_failed_pass=False, is_incomplete=True)
    assert state_of(facts) is DiskState.INCOMPLETE
    assert state_of(replace(facts, has_failed_pass=True)) is DiskState.LAGGING


def test_dirty_data_alone_is_no_trouble() -> None:
    facts = replace(REACHED, has_conflict=False, cache_has_failed=False)
    assert state_of(replace(facts, has_failed_pass=False, is_copying=False)) is DiskState.READY


@pytest.mark.parametrize("state", [DiskState.CONFLICT, DiskState.STOPPED, DiskState.FAILED])
def test_a_final_state_does_not_pass(state: DiskState) -> None:
    disk = Machine(MOVES, state, "disk 'd'")
    for other in DiskState:
        if other is not state and (state, other) != (DiskState.CONFLICT, DiskState.STOPPED):
            with pytest.raises(IllegalMove):
                disk.become(other)


def test_what_passes_may_follow_in_any_order() -> None:
    passing = [state for state, _ in IN_ORDER if state is not DiskState.CONFLICT]
    passing.append(DiskState.INCOMPLETE)
    for state in passing:
        assert all(Machine(MOVES, state, "d").may_become(other) for other in passing)
