# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which disks there are: those that are served, those on record that are not, and those on their way."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import trio

from forebay.config.model import Config
from forebay.daemon.attached import Absent, Attached
from forebay.daemon.record import DiskRecord, difference
from forebay.disk.state import DiskState
from forebay.errors import ForebayError
from forebay.events.telling import SUBJECTS
from forebay.handover.phase import Phase
from forebay.image.source import Source
from forebay.units import did_you_mean, format_size

Attach = Callable[[str, DiskRecord], Awaitable[Attached]]
"""Serves an image as a disk of that name, as `Arrivals.attach`."""

WAIT_SECONDS = 60.0
"""How long an attach waits for another one, or for a detach, of that name: a store may be away."""

MOST_NAMED = 5
"""Disks that an error names, at most."""


@dataclass(eq=False)
class _Coming:
    """An attach on its way, or (`is_alone`) something else that is done to an image."""

    source: Source
    ended: trio.Event = field(default_factory=trio.Event)
    is_alone: bool = False


@dataclass(eq=False)
class Request:
    """An attach that is being worked on, from before its image is known."""

    wanted: DiskRecord
    ended: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False)
class _Reading:
    """Work that reads an image without being a disk."""

    source: Source
    why_busy: Callable[[], str | None]
    """Why nobody may write the image now, in one line; None if somebody may, which ends the work."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


def _never_busy() -> str | None:
    return None


def _exclude(one: Source, other: Source) -> bool:
    """True if only one of the two can be served: both are of one image, and one of them writes it."""
    return (one.use.writes or other.use.writes) and one.is_same_image(other)


def _bars(coming: _Coming, source: Source) -> bool:
    """True if the image of that source must not be read without a disk until `coming` has ended."""
    if coming.is_alone:
        return coming.source.is_same_image(source)
    return _exclude(coming.source, source)


class Disks:
    """All disks by name. A name, and an image that is written, belong to one disk at a time."""

    def __init__(self) -> None:
        self._known: dict[str, Attached | Absent] = {}
        self._requests: dict[str, Request] = {}
        self._coming: dict[str, _Coming] = {}
        self._alone: list[_Coming] = []
        self._readings: set[_Reading] = set()

    # -- asking

    def __iter__(self) -> Iterator[Attached | Absent]:
        """Those that are served, or at least on record, in the order of their names."""
        return iter([self._known[name] for name in sorted(self._known)])

    def names(self) -> set[str]:
        """Of all, those on their way included."""
        return {*self._known, *self._coming}

    def find(self, name: str) -> Attached | Absent:
        """The disk of that name. Raises ForebayError where there is none."""
        found = self._known.get(name)
        if found is None:
            hint = did_you_mean(name, self._known)
            raise ForebayError(f"no disk '{name}'{hint}: see forebay status")
        return found

    def known(self, name: str) -> Attached | Absent | None:
        """The disk of that name, served or only on record; None where there is none."""
        return self._known.get(name)

    def coming(self) -> Iterator[tuple[str, str]]:
        """Name and image, as it was written, of each disk that is on its way."""
        return iter([(name, one.source.label) for name, one in self._coming.items()])

    def request(self, name: str) -> Request | None:
        """The attach of that name that is being worked on, if there is one."""
        return self._requests.get(name)

    def attached(self, name: str) -> Attached:
        """The disk of that name, which is attached. Raises ForebayError where it is not."""
        found = self.find(name)
        if isinstance(found, Absent):
            raise ForebayError(f"'{name}' is not served: {found.why}")
        return found

    def all_attached(self) -> list[Attached]:
        """Those that are attached, in the order in which they came."""
        return [one for one in self._known.values() if isinstance(one, Attached)]

    def is_attached(self, name: str) -> bool:
        """True if there is such a disk, or one is on its way."""
        return isinstance(self._known.get(name), Attached) or name in self._coming

    # -- coming and going

    def add(self, disk: Attached | Absent) -> None:
        """Make it a disk of the gateway."""
        self._known[disk.name] = disk
        SUBJECTS[disk.name] = _Subject(disk)

    @contextlib.contextmanager
    def requested(self, name: str, wanted: DiskRecord) -> Iterator[None]:
        """Around an attach, which whoever wants the same waits for."""
        request = self._requests[name] = Request(wanted)
        try:
            yield
        finally:
            del self._requests[name]
            request.ended.set()

    def remove(self, disk: Attached | Absent) -> None:
        """Have it be none any more. Another one that has its name by now stays."""
        if self._known.get(disk.name) is disk:
            del self._known[disk.name]
            SUBJECTS.pop(disk.name, None)

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[Attached | Absent]:
        """Around each command that changes a disk: the disk of that name, which no other one changes meanwhile.

        Raises ForebayError where there is none, and where it went while this waited for its turn: what was said of one
        disk is never done to another one that has the name by then.
        """
        found = self.find(name)
        async with found.busy:
            if self._known.get(name) is not found:
                raise ForebayError(
                    f"'{name}' was detached while this waited, and nothing was done: see forebay status"
                )
            yield found

    @contextlib.asynccontextmanager
    async def turn_attached(self, name: str) -> AsyncIterator[Attached]:
        """The same for a disk that has to be attached."""
        async with self.turn(name):
            yield self.attached(name)

    def check_name_free(self, name: str) -> None:
        """Raises ForebayError where a disk has that name, or is about to have it."""
        if name in self._known or name in self._coming:
            raise ForebayError(
                f"there is a disk '{name}' already: detach it, or choose another name"
            )

    @contextlib.asynccontextmanager
    async def arriving(
        self, name: str, source: Source, give_way: Callable[[Attached], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Hold name and image against another attach meanwhile. Raises ForebayError where either is taken.

        Another one that is on its way to the same image has to come to its end first: it may fail. `give_way` detaches
        a reader's disk that is not to keep this one out; what reads the image without a disk is ended, unless it is
        busy.
        """
        while others := [one for one in self._coming.values() if _exclude(one.source, source)]:
            await others[0].ended.wait()
        self.check_name_free(name)
        coming = self._coming[name] = _Coming(source)
        try:
            self._check_readings(coming)
            for reader in self.all_attached():
                if reader.record.gives_way and _exclude(reader.source, source):
                    await give_way(reader)
            await self._end_readings(coming)
            self.check_alone(source)
            yield
        finally:
            del self._coming[name]
            coming.ended.set()

    @contextlib.asynccontextmanager
    async def reading(
        self, source: Source, why_busy: Callable[[], str | None] = _never_busy
    ) -> AsyncIterator[Attached | None]:
        """Around work that reads an image without being a disk; gives the disk that writes the image, if there is one.

        The work has to go through that disk then, and ends with it; otherwise it ends when a disk comes that writes the
        image, which waits for that end. Raises ForebayError where it was ended so. Such a disk is refused as long as
        `why_busy` says why, in one line.
        """
        while busy := [x for x in (*self._coming.values(), *self._alone) if _bars(x, source)]:
            await busy[0].ended.wait()
        for disk in self.all_attached():
            if _exclude(disk.source, source):
                disk.check_serves()
                with disk.used():
                    yield disk
                return
        reading = _Reading(source, why_busy)
        self._readings.add(reading)
        try:
            with reading.scope:
                yield None
        finally:
            self._readings.discard(reading)
            reading.ended.set()
        if reading.scope.cancelled_caught:
            raise ForebayError(
                f"{source.key} was wanted by a disk meanwhile: what was read until then is kept, try again for the rest"
            )

    @contextlib.asynccontextmanager
    async def alone(self, source: Source) -> AsyncIterator[None]:
        """Around what takes down all disks on an image: what reads it without a disk is ended, and does not begin."""
        alone = _Coming(source, is_alone=True)
        self._alone.append(alone)
        try:
            await self._end_readings(alone)
            yield
        finally:
            self._alone.remove(alone)
            alone.ended.set()

    def _check_readings(self, coming: _Coming) -> None:
        """Raise ForebayError where work that reads the image has to have it as it is."""
        busy = (x.why_busy() for x in self._readings if _bars(coming, x.source))
        if why := next((why for why in busy if why), None):
            raise ForebayError(why)

    async def _end_readings(self, coming: _Coming) -> None:
        """End the work that reads the image without a disk, which is not to be read now."""
        for reading in [x for x in self._readings if _bars(coming, x.source)]:
            reading.scope.cancel()
            await reading.ended.wait()

    def check_alone(self, source: Source) -> None:
        """Within this gateway an image has one writing disk, or any number of others; and none comes while a commit, or
        a resolve, writes it. Raises ForebayError.
        """
        if writer := self._writer_of(source):
            raise ForebayError(
                f"{source.key} is being written by a commit or a resolve of disk '{writer}': wait until that has ended"
            )
        others = [one.source for one in self.all_attached()]
        others += [one.source for one in self._coming.values()]
        for other in others:
            if other is source or not _exclude(other, source):
                continue
            if other.use.writes:
                raise ForebayError(
                    f"{source.key} is written by disk '{other.use.disk}': detach that first"
                )
            raise ForebayError(
                f"{source.key} is in use by disk '{other.use.disk}', which needs it unchanged: "
                "detach that first, or attach with --overlay or --read-only"
            )

    def _writer_of(self, source: Source) -> str | None:
        """The disk whose commit or resolve is writing the image of that source, or is to be gone on with."""
        found = [x.source.use.disk for x in self._alone if x.source.is_same_image(source)]
        resting = (x for x in self._known.values() if isinstance(x, Absent))
        found += [x.name for x in resting if x.record.committing and x.record.key == source.key]
        return found[0] if found else None

    def coming_to(self, source: Source) -> list[str]:
        """The disks that are on their way to the image of that source."""
        return [name for name, one in self._coming.items() if one.source.is_same_image(source)]


class _Subject:
    """A disk, as events tell of it."""

    def __init__(self, disk: Attached | Absent) -> None:
        self._disk = disk
        self.image = disk.record.key or disk.record.image
        self.store = ""
        if isinstance(disk, Attached):
            self.store = disk.source.address.store or ""

    def state(self) -> str:
        if isinstance(self._disk, Absent):
            return str(self._disk.status()["state"])
        if self._disk.fault is not None:
            return DiskState.STOPPED.value
        return self._disk.disk.report.state().value

    def reason(self) -> str:
        return self._disk.status().get("reason") or ""


def still_dirty(disks: list[dict[str, Any]], timeout: float | None) -> ForebayError:
    """The error for disks, by their status, that were not written back in that many seconds: it tells what is left."""
    left = {one["name"]: one["dirty_bytes"] for one in disks if one["dirty_bytes"]}
    most = sorted(left, key=lambda name: -left[name])[:MOST_NAMED]
    named = ", ".join(f"{name} {format_size(left[name])}" for name in most)
    others = f" and {len(left) - len(most)} more disks" if len(left) > len(most) else ""
    return ForebayError(
        f"{format_size(sum(left.values()))} are still dirty after {timeout:g} s ({named or 'being written'}{others}): "
        "give it more time; what is dirty stays in the cache"
    )


# -- the same attach once more: scripts repeat themselves


async def attach_once(
    config: Config, disks: Disks, attach: Attach, name: str, wanted: DiskRecord
) -> tuple[Attached, bool]:
    """The disk of that name, and True if it was there already, the same in all that was asked for.

    An attach of the same that is on its way, or a detach, is waited for first. Raises ForebayError where something else
    has the name, or the same is there and cannot be used, or is on its way for too long; and what `attach` raises.
    """
    with trio.move_on_after(WAIT_SECONDS) as scope:
        while (wait := _reason_to_wait(config, disks, name, wanted)) is not None:
            await wait()
    if scope.cancelled_caught:
        raise ForebayError(
            f"'{name}' is being attached, detached or changed, for {WAIT_SECONDS:g} s already: see forebay status, "
            "and try again"
        )
    if (found := disks.known(name)) is not None:
        return _usable(found), True
    with disks.requested(name, wanted):
        return await attach(name, wanted), False


def _reason_to_wait(
    config: Config, disks: Disks, name: str, wanted: DiskRecord
) -> Callable[[], Awaitable[None]] | None:
    """Waits for what decides whether the disk is there; None: it is known now.

    Raises ForebayError where something else has the name.
    """
    request, found = disks.request(name), disks.known(name)
    there = request.wanted if request is not None else found.record if found is not None else None
    if there is None:
        return None
    if what := difference(config, there, wanted):
        raise ForebayError(
            f"there is a disk '{name}' already, {what}: detach it, or choose another name"
        )
    if request is not None:
        return request.ended.wait
    return _turn_of(found) if found is not None and found.busy.locked() else None


def _turn_of(disk: Attached | Absent) -> Callable[[], Awaitable[None]]:
    """Waits until nothing changes the disk as a whole: it may be gone then."""

    async def wait() -> None:
        async with disk.busy:
            pass

    return wait


def _usable(disk: Attached | Absent) -> Attached:
    """The disk, which can be used. Raises ForebayError, which says why it cannot."""
    if isinstance(disk, Absent):
        raise ForebayError(f"'{disk.name}' is attached already, and is not served: {disk.why}")
    disk.check_serves()
    if (why := disk.disk.image.conflict) is not None:
        raise ForebayError(f"'{disk.name}' is attached already, and is in conflict: {why}")
    if disk.handover is not None and disk.handover.phase is Phase.RELEASED:
        why = disk.source.withheld or disk.source.kept_back
        raise ForebayError(
            f"'{disk.name}' is attached already, and {why}: 'forebay detach {disk.name}' first"
        )
    return disk
