# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The boot of one disk: replayed ahead of it, recorded, and told in its status."""

import logging
from typing import Any

import trio

from forebay.boot.boots import Boots, NoTraceError
from forebay.boot.files import Found
from forebay.boot.recording import MOST_SECONDS, QUIET_SECONDS
from forebay.checkpoint.steps import Progress
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.image.boundary import breaks_the_cache
from forebay.origin.addresses import is_scratch
from forebay.units import Mode
from forebay_cache.format.geometry import BLOCK_SHIFT

log = logging.getLogger("forebay.boot")

LOOK_SECONDS = 10.0
"""How often it is looked whether the boot is over."""

QUIET_BYTES = 1 << 20
"""A disk that reads no more in QUIET_SECONDS has booted."""

ELSEWHERE = 64
"""So many reads may miss what the trace does not have, whatever else is read ..."""
ELSEWHERE_SHARE = 2
"""... and one read in so many at most from then on: else the guest has gone elsewhere, and the replay ends."""


class DiskBoot:
    """Made with the disk; `run` is one of its tasks."""

    def __init__(self, boots: Boots, disk: Disk) -> None:
        self._boots = boots
        self._disk = disk
        self._booting = boots.join(disk.image, disk.source.address)
        self._began = trio.Event()
        self._waited = 0
        """Bytes that its clients had to wait for."""
        self._before = 0
        """Bytes that its clients had read when the boot began."""
        self._read: int | None = None
        """Bytes that they read in the boot, once that is over."""
        self._usual: frozenset[int] | None = None
        """The blocks that are being replayed."""
        self._elsewhere = 0
        """Reads that missed, of blocks that are not in the trace, since the replay began."""
        self._has_left = False
        self._trace = "none"
        """What became of the trace: one of the words in docs/traces.md, or why it is not replayed."""
        if not disk.source.resumed:
            disk.on_opened = self._begin
        disk.reads.on_miss = self._note_miss

    def leave(self) -> None:
        """The disk has gone. The second call does nothing."""
        if not self._has_left:
            self._has_left = True
            self._boots.leave(self._booting)

    def _begin(self) -> None:
        """A client is there."""
        if self._began.is_set():
            return
        self._began.set()
        self._before = self._disk.view.read_bytes
        if not self._disk.source.use.writes and self._disk.view.clean is not None:
            self._boots.begin(self._booting)

    def _note_miss(self, offset: int, length: int) -> None:
        if self._read is None:
            self._waited += length
            if self._began.is_set() and self._booting.recording is not None:
                self._booting.recording.note_miss(offset, length)
        if self._usual is not None and offset >> BLOCK_SHIFT not in self._usual:
            self._elsewhere += 1

    async def run(self) -> None:
        """Replay the trace, if it is to be, and see how the boot goes, until cancelled or both are done."""
        try:
            async with trio.open_nursery() as nursery:
                if self._disk.settings.preload == "trace":
                    nursery.start_soon(self._replay_at_attach)
                if not self._disk.source.resumed:
                    nursery.start_soon(self._watch)
        except Exception as fault:
            if breaks_the_cache(fault):
                raise
            log.exception("%s: its boot is neither recorded nor replayed", self._disk.name)

    async def _watch(self) -> None:
        """Take down what was read when the boot is over."""
        await self._began.wait()
        view = self._disk.view
        began = since = trio.current_time()
        read = self._before
        while (now := trio.current_time()) < min(began + MOST_SECONDS, since + QUIET_SECONDS):
            if view.read_bytes > read + QUIET_BYTES:
                read, since = view.read_bytes, now
            elif read == self._before:
                since = now  # it has not begun to boot: a VM may be paused there
            await trio.sleep(LOOK_SECONDS)
        self._read = view.read_bytes - self._before

    # ------------------------------------------------------------------------------------------------------- replay

    async def _replay_at_attach(self) -> None:
        disk = self._disk
        if disk.mode is Mode.NONE:
            return
        try:
            if disk.image.origin is None:
                await disk.image.reach.wait(disk.settings.origin_timeout)
            async with self._booting.turn:
                if self._booting.is_replayed:
                    self._trace = "replayed"
                    return
                await self.replay(_silent)
        except NoTraceError:
            return
        except (OSError, ForebayError) as fault:
            text = getattr(fault, "strerror", None) or str(fault)
            self._trace = f"not replayed: {text}"
            log.info("%s: the boot trace is not replayed: %s", disk.name, text)

    async def replay(self, progress: Progress) -> None:
        """Bring in what boots read. Raises ForebayError where there is no trace of the image, or no room; OSError."""
        disk = self._disk
        asked = disk.view.hits + disk.view.misses
        self._elsewhere = 0

        def ends(found: Found) -> str:
            self._usual, self._trace = found.usual, "replaying"
            since = disk.view.hits + disk.view.misses - asked
            if self._elsewhere > max(ELSEWHERE, since // ELSEWHERE_SHARE):
                return "the guest reads something else"
            return ""

        try:
            why = await self._boots.replay(
                disk.image, disk.source.address, disk.counters, progress, ends=ends
            )
        except BaseException:
            self._trace = "none"
            raise
        finally:
            self._usual = None
        self._trace = f"not all replayed: {why}" if why else "replayed"
        if not why:
            self._booting.note_replayed()

    # ------------------------------------------------------------------------------------------------------- status

    def status(self) -> dict[str, Any]:
        """The key `boot` of the disk's status: bytes, and how much of them was there before the guest asked."""
        began, over = self._began.is_set(), self._read is not None
        read = self._disk.view.read_bytes - self._before if self._read is None else self._read
        read = read if began else 0
        waited = min(self._waited, read)
        return {
            "boot": {
                "trace": self._trace,
                "state": "over" if over else "booting" if began else "not begun",
                "read_bytes": read,
                "waited_bytes": waited,
                "ready_percent": round(100 * (read - waited) / read, 1) if read else None,
            }
        }


def boot_of(disk: Disk, boots: Boots | None) -> DiskBoot | None:
    """The boot of a disk; None where nobody records boots, or there is no image."""
    return None if boots is None or is_scratch(disk.source.key) else DiskBoot(boots, disk)


def _silent(_done: int, _total: int) -> None:
    pass
