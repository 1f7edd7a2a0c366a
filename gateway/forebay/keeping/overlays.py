# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What operators do with the changes of an overlay: snapshots, back to one of them, back to the image.

Each is decided by one commit of the index: killed before it, nothing was done; killed after it, all of it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from forebay.catalogue.entries import commit_records
from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.schedule import FREEZE_ROOM
from forebay.checkpoint.snapshots import MOST, Snapshot
from forebay.checkpoint.steps import Progress
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.keeping.compact import compact
from forebay.keeping.kept import Kept, KeptOverlays
from forebay.units import did_you_mean, format_size
from forebay_cache import Cache


class Served(Protocol):
    """A disk that is attached."""

    disk: Disk

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def clients(self) -> int:
        """How many are connected."""
        ...

    def check_serves(self) -> None:
        """Raises ForebayError where a fault has stopped it."""


class Committing(Protocol):
    """See committing.py."""

    async def commit(self, name: str, progress: Progress) -> None:
        """Write the changes of an overlay to its image."""


Turn = Callable[[str], AbstractAsyncContextManager[Served]]
"""Around what changes a disk: no other command does meanwhile. Raises ForebayError where there is no such disk."""


class Overlays:
    """The overlays of a gateway. Everything raises ForebayError (one line: what, and what to do) and OSError."""

    def __init__(
        self,
        cache: Cache,
        index: Path,
        kept: KeptOverlays,
        turn: Turn,
        served: Callable[[], Iterable[Served]],
        committing: Committing,
        is_taken: Callable[[str], bool],
        at_rest: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        """`index` is where the index lies: told where it cannot be written. `is_taken` says whether a disk of that name
        is attached, or about to be. `at_rest` returns the status of each overlay on record that is not served.
        """
        self._is_taken = is_taken
        self._at_rest = at_rest
        self._cache = cache
        self._index = index
        self._kept = kept
        self._turn = turn
        self._served = served
        self._committing = committing

    # -- asking

    def all(self) -> list[dict[str, Any]]:
        """What is told of each overlay, attached or kept, by name."""
        told = [_told_of(one) for one in self._served() if one.disk.overlay]
        told += [
            {
                **{key: one[key] for key in ("name", "image", "size", "private_bytes", "keep")},
                "snapshots": len(self._kept.snapshots(one["name"])),
                "attached": True,
                "served": False,
                "since": None,
            }
            for one in self._at_rest()
        ]
        for name, kept in self._kept.all().items():
            told.append(
                {
                    "name": name,
                    "image": kept.key,
                    "size": kept.record["size"],
                    "private_bytes": self._kept.bytes_of(name),
                    "snapshots": len(self._kept.snapshots(name)),
                    "keep": True,
                    "attached": False,
                    "served": False,
                    "since": kept.since,
                }
            )
        return sorted(told, key=lambda one: str(one["name"]))

    def snapshots(self, name: str) -> list[dict[str, Any]]:
        """What is told of each snapshot of a disk, the oldest first."""
        for one in self._served():
            if one.name == name:
                return _told(one.disk.dirty)
        resting = [one["name"] for one in self._at_rest()]
        if self._kept.get(name) is None and name not in resting:
            known = [*(one.name for one in self._served()), *resting, *self._kept.all()]
            raise ForebayError(
                f"no overlay '{name}'{did_you_mean(name, known)}: see forebay overlays"
            )
        return [{"name": one.name, "created": one.created} for one in self._kept.snapshots(name)]

    # -- changing them

    async def snapshot(self, name: str, snapshot: str) -> dict[str, Any]:
        """Give what the disk shows at this instant a name; what is told of it."""
        async with self._turn(name) as one:
            dirty = self._changeable(one)
            found = dirty.snapshots.all()
            if any(snapshot == known.name for known in found):
                raise ForebayError(
                    f"'{name}' has a snapshot '{snapshot}' already: drop it, or choose another name"
                )
            if len(found) >= MOST:
                raise ForebayError(f"'{name}' has {MOST} snapshots: drop some of them first")
            await self._cache.journal_room(FREEZE_ROOM)
            generation = dirty.freeze_changes()
            await self._cache.make_durable()
            made = Snapshot(snapshot, generation, int(time.time()))
            await self._put(dirty, [*found, made])
            return {"name": made.name, "created": made.created}

    async def rollback(
        self, name: str, snapshot: str, *, drop_newer: bool, force: bool
    ) -> dict[str, Any]:
        """Have the disk show what it showed at a snapshot, which stays; `drop_newer`: newer ones go.

        `force`: although clients are connected. What is told of the overlay then.
        """
        async with self._turn(name) as one:
            dirty = self._changeable(one)
            found = dirty.snapshots.all()
            at = _index_of(found, name, snapshot)
            if found[at + 1 :] and not drop_newer:
                raise ForebayError(
                    f"'{name}' has {len(found) - at - 1} snapshots that are newer than '{snapshot}': "
                    "--drop-newer gives them up"
                )
            _check_unused(one, force)
            await self._cache.journal_room(FREEZE_ROOM)
            await self._go_back(one, found[: at + 1], found[at].generation)
            return _told_of(one)

    async def revert(self, name: str, *, sure: bool, force: bool) -> dict[str, Any]:
        """Give up all changes of an overlay, its snapshots with them; one that is kept is forgotten.

        `sure`: the operator has said that data may be given up. What is told of it.
        """
        if (kept := self._kept.get(name)) is not None and not self._is_taken(name):
            _check_sure(name, self._kept.bytes_of(name), sure)
            gone = {"name": name, "image": kept.key, "freed_bytes": self._kept.bytes_of(name)}
            await self._forget(name, kept)
            return gone
        async with self._turn(name) as one:
            dirty = self._changeable(one)
            freed = dirty.private_bytes
            _check_sure(name, freed, sure)
            _check_unused(one, force)
            await self._cache.journal_room(FREEZE_ROOM)
            await self._go_back(one, [], 0)
            return {"name": name, "image": one.disk.image.key, "freed_bytes": freed}

    async def drop(self, name: str, snapshot: str, progress: Progress) -> dict[str, Any]:
        """Forget a snapshot, and give back the room of what only it held. What is told of the overlay then.

        It is forgotten at once, whoever goes on waiting; what is left of the rest then is done with the next one.
        """
        async with self._turn(name) as one:
            dirty = self._changeable(one)
            found = dirty.snapshots.all()
            at = _index_of(found, name, snapshot)
            await self._put(dirty, found[:at] + found[at + 1 :])
            await compact(self._cache, dirty, progress)
            return _told_of(one)

    async def commit(self, name: str, progress: Progress) -> dict[str, Any]:
        """Write the changes of an overlay to its image, all of them or none. What is told of the overlay then."""
        await self._committing.commit(name, progress)
        async with self._turn(name) as one:
            return _told_of(one)

    async def _go_back(self, one: Served, snapshots: list[Snapshot], generation: int) -> None:
        """Have a disk show what it showed at a generation, with these snapshots. Raises ForebayError."""
        dirty = one.disk.dirty
        before = dirty.snapshots.all()
        async with one.disk.modes.gate.closed():
            dirty.decide(snapshots, generation)
            try:
                await self._commit()
            except BaseException:
                dirty.snapshots.put(before)
                raise
            dirty.go_back()

    async def _forget(self, name: str, kept: Kept) -> None:
        """Give up an overlay that is kept. Raises ForebayError."""
        self._kept.put(name, replace(kept, leaving=True))
        try:
            await self._commit()
        except BaseException:
            self._kept.put(name, kept)
            raise
        self._kept.forget(name)

    def _changeable(self, one: Served) -> Dirty:
        """The layers of an overlay that works. Raises ForebayError for any other disk."""
        one.check_serves()
        check_overlay(one.disk)
        check_stays(one.disk)
        if one.disk.image.conflict is not None:
            raise ForebayError(one.disk.image.conflict)
        return one.disk.dirty

    async def _put(self, dirty: Dirty, snapshots: list[Snapshot]) -> None:
        """Have these snapshots on record, durably. Raises ForebayError; those before are on record then."""
        before = dirty.snapshots.all()
        dirty.snapshots.put(snapshots)
        try:
            await self._commit()
        except BaseException:
            dirty.snapshots.put(before)
            raise

    async def _commit(self) -> None:
        await commit_records(self._cache, self._index)


def check_overlay(disk: Disk) -> None:
    """Raise ForebayError for a disk that writes its image: it has no changes of its own."""
    if not disk.overlay:
        raise ForebayError(
            f"'{disk.name}' is no overlay, its writes are its image's: attach the image with --overlay"
        )


def check_stays(disk: Disk) -> None:
    """Raise ForebayError for an overlay that is about to move with what it has: nothing of that is to change."""
    if disk.overlay and (disk.modes.is_held or disk.source.kept_back):
        raise ForebayError(
            f"'{disk.name}' is being handed over to another host, or from it: 'forebay handover abort {disk.name}' "
            "ends that, if it can be ended"
        )


def _told(dirty: Dirty) -> list[dict[str, Any]]:
    return [{"name": one.name, "created": one.created} for one in dirty.snapshots.all()]


def _told_of(one: Served) -> dict[str, Any]:
    dirty = one.disk.dirty
    return {
        "name": one.name,
        "image": one.disk.image.key,
        "size": one.disk.size,
        "private_bytes": dirty.private_bytes,
        "snapshots": len(dirty.snapshots.all()),
        "keep": one.disk.source.use.keep,
        "attached": True,
        "served": True,
        "since": None,
    }


def _index_of(snapshots: list[Snapshot], disk: str, name: str) -> int:
    """Where among them the one of that name is. Raises ForebayError."""
    names = [one.name for one in snapshots]
    if name not in names:
        raise ForebayError(
            f"'{disk}' has no snapshot '{name}'{did_you_mean(name, names)}: see forebay snapshots {disk}"
        )
    return names.index(name)


def generation_of(dirty: Dirty, disk: str, name: str) -> int:
    """The newest generation of a disk's layers that belongs to its snapshot of that name. Raises ForebayError."""
    found = dirty.snapshots.all()
    return found[_index_of(found, disk, name)].generation


def _check_unused(one: Served, force: bool) -> None:
    """Raise ForebayError while clients are connected: what they know of the disk would be wrong."""
    if one.clients and not force:
        raise ForebayError(
            f"'{one.name}' is in use, and what its VM has in memory would not fit any more: shut the VM down, or "
            "use --force"
        )


def _check_sure(name: str, much: int, sure: bool) -> None:
    if much and not sure:
        raise ForebayError(
            f"{format_size(much)} that only the cache has of '{name}' would be given up: say --yes"
        )
