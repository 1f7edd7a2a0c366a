# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Names of hosts that stage: what is believed while a name server is slow, or away."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from forebay.units import parse_peer

if TYPE_CHECKING:
    from forebay.swarm.stager import Names

Clock = list[float]


class Threads:
    """Have what is asked when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Future[str | None]] = []

    def submit(self, _look_up: Callable[[str], str | None], _host: str) -> "Future[str | None]":
        self.asked.append(Future())
        return self.asked[-1]


@pytest.fixture
def threads() -> Threads:
    pytest.importorskip("libtorrent", reason="make setup installs it where it can be had")
    return Threads()


@pytest.fixture
def clock(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> Clock:
    from forebay.swarm import stager

    now = [0.0]
    monkeypatch.setattr(stager, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def names(threads: Threads) -> "Names":
    from forebay.swarm.stager import Names

    return Names(threads)  # type: ignore[arg-type]


def test_an_address_is_believed_until_there_is_another(
    names: "Names", threads: Threads, clock: Clock
) -> None:
    assert names.address("10.0.0.1") == "10.0.0.1"
    assert names.address("ham1") is None
    threads.asked[0].set_result("10.0.0.7")
    assert names.address("ham1") == "10.0.0.7"
    clock[0] = 100.0
    assert [names.address("ham1") for _ in range(3)] == ["10.0.0.7"] * 3, "a slow name server"
    threads.asked[1].set_result(None)
    assert names.address("ham1") == "10.0.0.7", "a name server that is away"
    clock[0] = 200.0
    names.address("ham1")
    threads.asked[2].set_result("10.0.0.8")
    assert names.address("ham1") == "10.0.0.8"
    assert len(threads.asked) == 3


@pytest.mark.expect_log("'idna' codec failed")
@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_name_that_none_can_be_has_no_address(threads: Threads, host: str) -> None:
    from forebay.swarm import stager

    assert parse_peer(host)[0] == host
    assert stager._address(host) is None
    del threads
