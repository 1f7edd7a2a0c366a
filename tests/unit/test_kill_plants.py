# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The points at which real/kill_plants.py ends a daemon, its bugs, and fault_plants.py name functions of ours."""

import pytest

from real import kill_plants
from real.fault_plants import PLANTS
from real.kill_plants import BUGS, POINTS, Point, find


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_point_names_a_function(point: Point) -> None:
    find(point.target)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_planted_in_a_function(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted: list[str] = []
    monkeypatch.setattr(kill_plants, "replace", lambda target, _make: planted.append(target))
    BUGS[bug]()
    assert planted
    for target in planted:
        find(target)


@pytest.mark.parametrize("name", PLANTS)
def test_an_exception_is_planted_in_a_function(name: str) -> None:
    find(PLANTS[name].target)
