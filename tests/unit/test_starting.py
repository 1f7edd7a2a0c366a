# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A start that takes long tells how far it is, and asks for more time as long as it goes on."""

import itertools
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from forebay.systemd import LOGGED_SECONDS, MORE_SECONDS, TOLD_SECONDS, Starting
from forebay_cache import LayerName, mark_hot, open_cache
from forebay_cache.blocks.private import prepare, write
from forebay_cache.format.geometry import BLOCK


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listening:
        listening.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def heard(manager: socket.socket) -> list[str]:
    said = []
    while True:
        try:
            said.append(manager.recv(4096).decode())
        except BlockingIOError:
            return said


def test_the_service_manager_is_told_for_as_long_as_it_goes_on(
    manager: socket.socket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    starting = Starting()
    began = starting._told
    times = itertools.count(began, TOLD_SECONDS / 4)
    monkeypatch.setattr(starting, "_clock", lambda: next(times))
    said: list[str] = []
    for done in range(int(4 * 3 * LOGGED_SECONDS)):
        starting.tell("blocks of the journal", done, 1000)
        said += heard(manager)
    assert len(said) == 3 * LOGGED_SECONDS - 1
    assert said[0] == (
        "STATUS=recovering the cache: 4 of 1000 blocks of the journal\n"
        f"EXTEND_TIMEOUT_USEC={MORE_SECONDS}000000"
    )
    assert caplog.messages == [
        f"recovering the cache: {n} of 1000 blocks of the journal" for n in (40, 80)
    ]


def test_a_quick_start_says_nothing(manager: socket.socket) -> None:
    starting = Starting()
    for done in range(1000):
        starting.tell("blocks of the journal", done, 1000)
    assert heard(manager) == []


def test_a_start_tells_of_each_block_of_the_journal_and_of_each_hot_region(tmp_path: Path) -> None:
    device, index = tmp_path / "c.img", tmp_path / "index"
    told: list[tuple[str, int, int]] = []

    async def life() -> None:
        cache = open_cache(device, index, size=16 << 20, boot="a")
        private = cache.layers.make(LayerName.of_disk("d", 1, "i"))
        for block in range(3):
            while not write(cache, private, block * BLOCK, memoryview(bytes(BLOCK))):
                await prepare(cache, private, block * BLOCK, BLOCK)
        cache.intent.publish()
        await mark_hot(cache, cache.layers.make(LayerName.of_image("i")), 0, 8 << 20)
        cache.release()

    trio.run(life)
    open_cache(device, index, boot="b", telling=lambda *one: told.append(one)).release()
    assert told == [
        *(("blocks of the journal", n, 3) for n in range(3)),
        *(("regions whose images were being written", n, 2) for n in range(2)),
    ]
