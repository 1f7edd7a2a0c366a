# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Giving images back whose disks are gone: at once where their store lets us, else again and again until it is done.

What is owed is on record in the index, from the commit that forgets the disk until the image is given back: otherwise
a daemon that is killed in between would leave a marker that keeps all other hosts out of an image which nobody uses.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from forebay.errors import ForebayError
from forebay.image.source import Source
from forebay.origin.threads import bounded

log = logging.getLogger("forebay.daemon")

RETURN_SECONDS = 10.0
"""How long a store may take to take an image back, each time."""

RETRY_SECONDS = 1.0
"""How soon it is tried again; doubled each time, up to RETRY_MOST."""
RETRY_MOST = 30.0


KIND = "return"
"""Kind of the record of what is owed; its name is made of the image's key, which may be too long for one."""


class Records(Protocol):
    """Those of the cache's index."""

    def all(self, kind: str) -> dict[str, dict[str, Any]]:
        """All of a kind, by name."""
        ...

    def put(self, kind: str, name: str, value: dict[str, Any] | None) -> None:
        """Store one, or (None) remove it, durably with the next commit."""


@dataclass(frozen=True)
class Owed:
    """An image that a process before this one did not give back."""

    disk: str
    record: Mapping[str, Any]
    """What was on record of the disk."""
    drop_checkpoint: bool


@dataclass(eq=False)
class _Return:
    """One that is tried again in the background."""

    source: Source
    drop_checkpoint: bool
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Returns:
    """The images that are on their way back: what nobody uses is not left locked, nor with a marker, for long."""

    def __init__(self, nursery: trio.Nursery, records: Records) -> None:
        """`nursery` outlives every disk; what it has not done when it ends is `owed` at the next start."""
        self._nursery = nursery
        self._records = records
        self._under_way: list[_Return] = []

    def owe(
        self, source: Source, record: Mapping[str, Any], *, drop_checkpoint: bool = False
    ) -> None:
        """Note that an image is to be given back. Durable with the commit that forgets its disk, which had `record`."""
        value = {"disk": source.use.disk, "record": record, "drop_checkpoint": drop_checkpoint}
        self._records.put(KIND, _name_of(source), value)

    def owed(self) -> list[Owed]:
        """What is on record, which at the start nobody is about to do."""
        return [Owed(**value) for value in self._records.all(KIND).values()]

    def _paid(self, source: Source) -> None:
        self._records.put(KIND, _name_of(source), None)

    async def give_back(self, source: Source, *, drop_checkpoint: bool = False) -> None:
        """Have the image given back, by the time this returns if its store lets us. Raises nothing that is expected.

        `drop_checkpoint` as in `Source.release`.
        """
        why = None
        with self._ended_by_call_off(self._begun(source, drop_checkpoint)):
            why = await _try(source, drop_checkpoint)
            if why is None:
                self._paid(source)
        if why is not None:
            log.warning(
                "%s: its owner marker stays for now, and is tried again: %s", source.use.disk, why
            )
            self.give_back_later(source, drop_checkpoint=drop_checkpoint, pause=RETRY_SECONDS)

    def _begun(self, source: Source, drop_checkpoint: bool) -> _Return:
        """From now on it is under way, whether or not its task runs by then."""
        one = _Return(source, drop_checkpoint)
        self._under_way.append(one)
        return one

    @contextlib.contextmanager
    def _ended_by_call_off(self, one: _Return) -> Iterator[None]:
        """Around what gives an image back: `call_off` cancels it, and waits for its end."""
        try:
            with one.scope:
                yield
        finally:
            self._under_way.remove(one)
            one.ended.set()

    def give_back_later(
        self, source: Source, *, drop_checkpoint: bool = False, pause: float = 0.0
    ) -> None:
        """The same in the background, for as long as it takes; the first time after `pause` seconds."""
        self._nursery.start_soon(self._go_on, self._begun(source, drop_checkpoint), pause)

    async def _go_on(self, one: _Return, pause: float) -> None:
        with self._ended_by_call_off(one):
            await trio.sleep(pause)
            while await _try(one.source, one.drop_checkpoint) is not None:
                pause = min(2 * pause or RETRY_SECONDS, RETRY_MOST)
                await trio.sleep(pause)
            self._paid(one.source)
            log.info("%s: its image was given back", one.source.use.disk)

    async def call_off(self, source: Source) -> None:
        """Let the image be opened by a new disk. One that only reads it does not give it back: that goes on later."""
        for one in [x for x in self._under_way if x.source.is_same_image(source)]:
            one.scope.cancel()
            await one.ended.wait()
            if one.source.claim is not None:
                try:
                    with bounded(RETURN_SECONDS, "letting the image go"):
                        await one.source.leave()
                except OSError as error:
                    log.warning("%s: %s", source.key, error.strerror)
            if not source.use.writes:
                self.give_back_later(
                    one.source, drop_checkpoint=one.drop_checkpoint, pause=RETRY_MOST
                )

    def take_over(self, source: Source) -> None:
        """A disk that writes the image has it now, and what was left beside it; nothing is owed any more.

        Durable with the commit that puts the disk on record.
        """
        if source.use.writes:
            self._paid(source)


def _name_of(source: Source) -> str:
    return hashlib.sha256(source.key.encode("utf-8", "surrogateescape")).hexdigest()[:40]


async def _try(source: Source, drop_checkpoint: bool) -> str | None:
    """Give the image back. None if that is done, else why it is not."""
    try:
        with bounded(RETURN_SECONDS, "giving the image back"):
            await source.release(drop_checkpoint=drop_checkpoint)
    except OSError as fault:
        return fault.strerror or str(fault)
    except ForebayError as fault:
        return str(fault)
    except Exception:
        log.exception("%s: a fault of Forebay itself when its image was given back", source.key)
    return None
