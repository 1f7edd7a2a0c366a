# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The boots of all disks: each is recorded, and the trace of before is replayed ahead of it.

A recording is of an image: it begins with the first client of a disk that was just attached, and the other disks on
that image which boot meanwhile add to it. A replay is of an image as well: of a hundred disks that are attached at once
one has it under way, and the others find what it brought. Nothing of this is allowed to disturb: a trace that cannot be
read, kept or replayed is a line in the log.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from forebay.boot.files import Found, TraceFiles
from forebay.boot.recording import Recording
from forebay.boot.replay import Replay, check_room
from forebay.boot.trace import MOST_BLOCKS, Trace
from forebay.checkpoint.counters import Counters
from forebay.checkpoint.steps import Progress
from forebay.disk.copy import Spend, at_once
from forebay.errors import ForebayError
from forebay.image.boundary import breaks_the_cache
from forebay.image.image import Image
from forebay.origin.addresses import Address
from forebay.origin.protocol import Identity
from forebay.origin.threads import StoreThreads, bounded
from forebay_cache import Layer, watch_uses

log = logging.getLogger("forebay.boot")

T = TypeVar("T")

MOST_RECORDINGS = 16
"""Images that are recorded at the same time."""

MOST_IN_ALL = 1 << 18
"""Blocks that all recordings together have in memory: some 30 MB."""

LOOK_SECONDS = 5.0
"""How often a recording looks at what came in ahead of guests, and whether it is over."""

FILE_SECONDS = 30.0
"""How long a store may take to read or to take a trace."""

FRESH_SECONDS = 60.0
"""How long after a replay another one of the same image would find nothing to do."""

NO_TRACE = "no boot trace of {} is there: attach an overlay of it and boot, or use a size, or 'all'"


class Booting:
    """What the disks on one image share of their boots."""

    def __init__(self, image: Image, address: Address) -> None:
        self.image = image
        self.address = address
        self.disks = 0
        """How many disks are on the image."""
        self.left = trio.Event()
        """Set when the last of them has gone."""
        self.recording: Recording | None = None
        """The one that is under way."""
        self.brought: set[int] = set()
        """Blocks that a replay has brought, until a recording begins."""
        self.turn = trio.Lock()
        """Held by who replays."""
        self._replayed: tuple[Layer, float] | None = None

    def note_ahead(self, blocks: range) -> None:
        """These blocks are being fetched before anybody has asked for them."""
        if self.recording is not None:
            self.recording.note_ahead(blocks)
        elif self.turn.locked() and len(self.brought) < MOST_BLOCKS:
            self.brought.update(blocks)

    def note_replayed(self) -> None:
        """All of the trace was brought in."""
        self._replayed = self.image.layer, trio.current_time()

    @property
    def is_replayed(self) -> bool:
        """True if that was just now."""
        if self._replayed is None:
            return False
        layer, when = self._replayed
        return layer is self.image.layer and trio.current_time() < when + FRESH_SECONDS


class Boots:
    """Recordings and replays of all images."""

    def __init__(
        self,
        files: TraceFiles,
        nursery: trio.Nursery,
        threads_of: Callable[[str], StoreThreads],
    ) -> None:
        """`nursery` is the one long-lived nursery of the process. `threads_of` gives the threads of a store, or of an
        image that lies in none.
        """
        self._files = files
        self._nursery = nursery
        self._threads_of = threads_of
        self._images: dict[Image, Booting] = {}
        self._recordings: set[Recording] = set()
        self.on_known: Callable[[str, Found | None], None] = lambda _key, _found: None
        """Told of what was found, or kept, of an image, by its key; None: no trace of it is there."""

    # -------------------------------------------------------------------------------------------------------- traces

    async def find(self, address: Address, now: Identity | None) -> Found | None:
        """The trace of an image, which need not fit; `now` as `TraceFiles.find` has it. Raises OSError."""
        found = await self._in_thread(address, "reading", partial(self._files.find, address, now))
        self.on_known(address.key, found)
        return found

    async def drop(self, address: Address) -> bool:
        """Remove the trace of an image; True if there was one. Raises OSError."""
        dropped = await self._in_thread(address, "removing", partial(self._files.drop, address))
        self.on_known(address.key, None)
        return dropped

    async def _in_thread(self, address: Address, what: str, do: Callable[[], T]) -> T:
        with bounded(FILE_SECONDS, f"{what} the boot trace of {address.key}"):
            return await self._threads_of(address.store or address.key).run(do)
        raise AssertionError("bounded() raises")

    # -------------------------------------------------------------------------------------------------------- disks

    def join(self, image: Image, address: Address) -> Booting:
        """One disk more is on that image; `leave` ends that."""
        booting = self._images.get(image)
        if booting is None:
            booting = self._images[image] = Booting(image, address)
            image.filler.on_ahead = booting.note_ahead
        booting.disks += 1
        return booting

    def leave(self, booting: Booting) -> None:
        """One disk less is on the image."""
        booting.disks -= 1
        if not booting.disks:
            del self._images[booting.image]
            booting.image.filler.on_ahead = None
            booting.left.set()

    # ----------------------------------------------------------------------------------------------------- recording

    def begin(self, booting: Booting) -> None:
        """A boot begins: have it recorded, unless one of the image is, or too many are."""
        if booting.recording is None and len(self._recordings) < MOST_RECORDINGS:
            booting.recording = recording = Recording(booting.image, booting.brought)
            booting.brought = set()
            self._recordings.add(recording)
            watch_uses(booting.image.cache, self._note_asked)
            self._nursery.start_soon(self._record, booting, recording)

    async def _record(self, booting: Booting, recording: Recording) -> None:
        key = booting.image.key
        try:
            began = await self._look(booting)
            while not (recording.is_over or booting.left.is_set()):
                with trio.move_on_after(LOOK_SECONDS):
                    await booting.left.wait()
                await recording.look()
                brought = (len(one.brought) for one in self._images.values())
                if sum(map(len, self._recordings)) + sum(brought) > MOST_IN_ALL:
                    recording.give_up()
            await self._keep(booting, recording, began)
        except (OSError, ForebayError) as fault:
            log.info("%s: its boot is not recorded: %s", key, fault)
        except Exception as fault:
            if breaks_the_cache(fault):
                raise
            log.exception("%s: its boot is not recorded", key)
        finally:
            booting.recording = None
            self._recordings.discard(recording)
            if not self._recordings:
                watch_uses(booting.image.cache, None)

    def _note_asked(self, layer: int, block: int) -> None:
        for recording in self._recordings:
            recording.note_asked(layer, block)

    async def _look(self, booting: Booting) -> Identity | None:
        """What the image looks like; None where nobody knows. Raises OSError."""
        if booting.image.origin is not None:
            return await booting.image.require_origin().identity()
        look = partial(self._files.identity, booting.address)
        return await self._in_thread(booting.address, "looking for", look)

    async def _keep(self, booting: Booting, recording: Recording, began: Identity | None) -> None:
        """Have what was recorded in the trace of the image, which looked like that when it began. Raises OSError."""
        image, address = booting.image, booting.address
        now = await self._look(booting) or began
        if now is None or began is None or now.content != began.content:
            log.info(
                "%s: it was changed while its boot was recorded, and that is dropped", image.key
            )
            return
        found = await self.find(address, now)
        before = found.trace if found is not None and found.fits else Trace.of_image(now)
        boot = await recording.boot(before)
        if boot is None:
            log.info("%s: what was read of it is no boot, and is not recorded", image.key)
        elif booting.left.is_set() and before.is_hardly(boot):
            log.info("%s: the boot was cut off, and is not recorded", image.key)
        else:
            add = partial(self._files.add, address, before, boot)
            kept = await self._in_thread(address, "keeping", add)
            self.on_known(address.key, kept)
            log.info("%s: boot %d recorded, %d blocks", image.key, kept.trace.boots, len(boot.read))

    # ------------------------------------------------------------------------------------------------------ replaying

    async def replay(
        self,
        image: Image,
        address: Address,
        counters: Counters,
        progress: Progress,
        *,
        ends: Callable[[Found], str] = lambda _found: "",
        spend: Spend = at_once,
    ) -> str:
        """Bring in what boots from an open image read; why not all of it was, empty if it was.

        Raises ForebayError where there is no trace of it as it is now, or the cache is too small for that, and OSError.
        """
        found = await self.find(address, await image.require_origin().identity())
        if found is not None and not found.fits:
            log.info("%s: its boot trace is of before it was changed, and is dropped", image.key)
            await self.drop(address)
            found = None
        if found is None or not found.usual:
            raise NoTraceError(NO_TRACE.format(image.key))
        check_room(image, found)
        replay = Replay(image, found, counters)
        return await replay.run(progress, ends=partial(ends, found), spend=spend)


class NoTraceError(ForebayError):
    """There is no trace of the image as it is now."""
