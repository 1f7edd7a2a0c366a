# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The files of an overlay that moves, where another host changes them at that moment, and the curtain of its disk."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import trio
import trio.testing

from forebay.carrying.beside import FREE, Beside
from forebay.carrying.curtain import Curtain
from forebay.carrying.notes import COPYING, Asked, Offer
from forebay.disk.disk import Disk
from forebay.origin.addresses import FileAddress
from forebay.origin.worker import syscalls

MOVE = "0123456789abcdef"


@pytest.fixture
def beside(tmp_path: Path) -> Beside:
    (tmp_path / "vm.img").write_bytes(bytes(4096))
    found = Beside(FileAddress("images", tmp_path, "vm.img"), "d", "g1")
    found.begin(MOVE)
    found.put(MOVE, 0, [b"data"], durably=False)
    found.write(Asked("g2", "h2", "d", sync=1))
    found.write(Offer("g1", "h1", "d", "g2", MOVE, COPYING))
    return found


LOOKS: dict[str, Callable[[Beside], object]] = {
    "asked": lambda x: x.asked(),
    "offer": lambda x: x.offer(),
    "token": lambda x: x.token(MOVE),
    "data": lambda x: x.get(MOVE, 0, 4),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("call", ["open", "pread", "listdir"])
def test_what_another_host_replaces_while_it_is_read_is_read_anew(
    beside: Beside, monkeypatch: pytest.MonkeyPatch, look: Callable[[Beside], object], call: str
) -> None:
    whole = look(beside)
    assert whole is not None
    plain, stale = getattr(syscalls, call), [errno.ESTALE] * 3

    def planted(*arguments: Any, **more: Any) -> Any:
        if stale:
            raise OSError(stale.pop(), "Stale file handle")
        return plain(*arguments, **more)

    monkeypatch.setattr(syscalls, call, planted)
    assert look(beside) == whole


def test_a_token_that_is_renamed_while_it_is_looked_for_is_not_gone(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, missed = syscalls.listdir, [True]

    def listdir(fd: int) -> list[str]:
        if missed:
            missed.pop()
            return [name for name in plain(fd) if not name.endswith(".at-g1")]
        return plain(fd)

    monkeypatch.setattr(syscalls, "listdir", listdir)
    found = beside.token(MOVE)
    assert found is not None
    assert found.where == beside.mine
    free = beside.hand_on(MOVE, found, FREE)
    assert beside.token(MOVE) == free
    assert beside.token("f" * 16) is None


async def test_an_overlay_that_another_host_had_is_waited_for_again_when_it_leaves_once_more(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    disk = MagicMock(settings=SimpleNamespace(origin_timeout=5.0))
    disk.modes.put_behind = lambda veil: setattr(disk.modes, "veil", veil)
    curtain = Curtain(cast("Disk", disk), lambda: None)
    read = MagicMock()
    curtain.draw("it is on its way", read)
    curtain.fail("another host has it")
    with pytest.raises(OSError, match="another host has it"):
        await curtain.arrive()
    curtain.lift()
    curtain.draw("it is on its way", read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(curtain.arrive)
        await trio.sleep(1)
        assert curtain.is_waited_for
        curtain.lift()
