# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A host is emptied: what a disk is when its turn comes decides, not what it was when the command began."""

from contextlib import AbstractContextManager
from typing import Any, cast

import trio

from forebay.errors import ForebayError
from forebay.handover.evacuation import ITS_OWN, Evacuation
from forebay.handover.handover import Handover
from forebay.handover.phase import Phase
from forebay.handover.wishes import Progress, Wishes
from forebay.units import Mode
from real.commands_bed import nothing


class Stays:
    """The handover of a disk for which no host asks."""

    phase = Phase.NONE

    def wish(self, to: str, progress: Progress) -> AbstractContextManager[None]:
        return Wishes().wish("d", to, progress)

    async def prepare(self, to: str, _patience: float, _progress: object) -> None:
        raise ForebayError(f"host {to} does not ask for it")


class Asked(Stays):
    """The same where the VM does not go, although the host asks."""

    async def prepare(self, _to: str, _patience: float, _progress: object) -> None:
        await trio.lowlevel.checkpoint()


class Disk:
    """One that is attached."""

    def __init__(self, handover: Stays | None = None, clients: int = 0, **status: Any) -> None:
        self.name = "d"
        self.handover = cast("Handover | None", handover)
        self.clients = clients
        self.shown = {
            "mode": "write-back",
            "overlay": False,
            "read_only": False,
            "private_bytes": 0,
            "dirty_bytes": 0,
        } | status
        self.after_drain: dict[str, Any] = {}

    def check_serves(self) -> None:
        """It does."""

    def status(self) -> dict[str, Any]:
        return dict(self.shown)

    async def drain(self, _progress: object) -> None:
        self.shown |= self.after_drain


class Host:
    """A host with one disk, and what was done to that."""

    def __init__(self, disk: Disk) -> None:
        self.detached: list[str] = []
        self.modes: list[Mode] = []
        self._disk = disk
        self._evacuation = Evacuation(
            lambda: [disk], lambda: [disk.status() | {"name": "d"}], self._detach, self._set_mode
        )

    async def _detach(self, name: str, **_how: Any) -> None:
        self.detached.append(name)

    async def _set_mode(self, _name: str, mode: Mode, _progress: object) -> None:
        self.modes.append(mode)

    async def emptied(self, to: str = "", patience: float = 30.0) -> dict[str, Any]:
        return await self._evacuation.run(to, patience, nothing)


async def test_an_overlay_that_was_written_to_meanwhile_stays() -> None:
    disk = Disk(overlay=True)
    disk.after_drain = {"private_bytes": 4096}
    host = Host(disk)
    assert (await host.emptied())["left"] == [{"name": "d", "why": ITS_OWN}]
    assert host.detached == []


async def test_an_overlay_without_changes_is_given_back() -> None:
    host = Host(Disk(overlay=True))
    assert (await host.emptied())["released"] == ["d"]
    assert host.detached == ["d"]


async def test_a_disk_that_no_host_asks_for_writes_through_from_then_on() -> None:
    host = Host(Disk(Stays(), clients=1))
    assert "does not ask" in (await host.emptied("ham2"))["left"][0]["why"]
    assert host.modes == [Mode.WRITE_THROUGH]


async def test_a_disk_whose_vm_does_not_go_writes_through_from_then_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    host = Host(Disk(Asked(), clients=1))
    assert "has not gone to host ham2" in (await host.emptied("ham2"))["left"][0]["why"]
    assert host.modes == [Mode.WRITE_THROUGH]


async def test_a_disk_in_write_through_for_a_handover_stays_in_it() -> None:
    host = Host(Disk(Stays(), clients=1, mode="write-through"))
    await host.emptied()
    assert host.modes == [Mode.WRITE_THROUGH], (
        "else the end of the handover would bring write-back back"
    )


async def test_a_mode_without_a_cache_is_left_alone() -> None:
    host = Host(Disk(Stays(), clients=1, mode="none"))
    await host.emptied()
    assert host.modes == []
