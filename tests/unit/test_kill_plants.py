"""The points at which real/kill_plants.py ends a daemon, and its bugs, name functions that the product has."""

import pytest

from real import kill_plants
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
