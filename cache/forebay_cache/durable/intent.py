# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Intent records: what is noted here is in the journal before a request is answered.

A record says what the index is going to say from the next commit on. Whoever changes a page notes a record with it;
:meth:`Intent.publish` writes all that was noted as one frame of the journal. From then on the kernel has them, so that
a killed daemon has lost nothing; a sync of the device makes them durable.

This is also where it is known of which private sectors the newest data is not durable: *open* are those written since
the last sync began, *syncing* those that a sync under way is making durable.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from functools import partial
from typing import NamedTuple, Protocol

from forebay_cache.device import pace as timing
from forebay_cache.device.device import Device
from forebay_cache.device.failure import Failure
from forebay_cache.device.pace import Pace
from forebay_cache.durable.journal import Frame, Journal, JournalFull, Position
from forebay_cache.format.checksum import checksums
from forebay_cache.format.geometry import SECTOR, SECTORS
from forebay_cache.index.changes import Changes, Share
from forebay_cache.index.sums import Sums
from forebay_cache.slots.ready import ReadyMap

_SLACK = 256
"""Bytes of records that a request may note besides those that go with its length."""
_KEPT_FREE = 32
"""Requests do not take the last part, one of so many, of the journal: it is for records that cannot wait for room."""
MOST_PAGES = 8192
MOST_SUMS = 8192
"""So many pages, and groups of checksums, a commit takes in at most, in one step of the event loop: less than 20 ms.

Whoever would change more waits for it. It is begun with half of that.
"""


class Late(NamedTuple):
    """Data to be written behind the records of a frame."""

    slot: int
    mask: int  # its sectors
    at: int  # where it goes on the device, bytes
    data: memoryview
    before: list[int]  # the checksums of what it overwrites


class LateRun(Protocol):
    """Some of these, in order, as the compiled core keeps them; one is more of them as long as nothing is published."""

    def write(self) -> None:
        """Write all of them. Raises OSError."""

    def pieces(self) -> list[Late]:
        """Each of them."""


class _LateOne:
    """One of them."""

    def __init__(self, device: Device, late: Late) -> None:
        self._device = device
        self._late = late

    def write(self) -> None:
        self._device.write(self._late.at, self._late.data)

    def pieces(self) -> list[Late]:
        return [self._late]


class Intent:
    """The records that wait to be published, and the sectors that wait for a sync. A participant of each commit."""

    def __init__(
        self,
        device: Device,
        journal: Journal,
        failure: Failure,
        pace: Pace,
        sums: Sums,
        ready: ReadyMap,
        dirty_pages: Sized,
        want_commit: Callable[[], None],
    ) -> None:
        """``dirty_pages``: one for each page that the next commit stores."""
        self.journal = journal
        self.open_sectors: dict[int, int] = {}
        """By key of the block: sectors that were written since the last sync began. Their place may be overwritten."""
        self.syncing: dict[int, int] = {}
        """The same of sectors that a sync under way makes durable. They must not be touched."""
        self._device = device
        self._failure = failure
        self._pace = pace
        self._sums = sums
        self._ready = ready
        self._dirty_pages = dirty_pages
        self._want_commit = want_commit
        self._ops: list[bytes] = []
        self._ops_bytes = 0
        self._in_commit = (
            0  # so many of them, the first ones, had no room and are in the commit under way
        )
        self._taken_pages = self._taken_sums = 0  # how many the commit under way has
        self._slack = _SLACK + journal.size // _KEPT_FREE
        self._late: list[LateRun] = []

    @property
    def noted_bytes(self) -> int:
        """Bytes of the records that wait to be published. Whoever notes many asks :meth:`has_room` first, so that they
        are never more than the journal holds.
        """
        return self._ops_bytes

    # -- noting -----------------------------------------------------------------------------------------------

    def has_room(self, length: int) -> bool:
        """True if the journal has room for the records of a write of ``length`` bytes, and the next commit for what it
        changes. Note them without an await.
        """
        pages, sums = len(self._dirty_pages), len(self._sums.unstored)
        if pages > MOST_PAGES // 2 or sums > MOST_SUMS // 2:
            self._want_commit()
        if pages + self._taken_pages >= MOST_PAGES or sums + self._taken_sums >= MOST_SUMS:
            return False
        return self.journal.fits(self._ops_bytes + self._slack + (length >> 7))

    def is_crowded(self) -> bool:
        """True if the next commit has as much to store as it takes in, should the one under way fail."""
        pages = len(self._dirty_pages) + self._taken_pages
        return pages >= MOST_PAGES or len(self._sums.unstored) + self._taken_sums >= MOST_SUMS

    def note(self, op: bytes) -> None:
        """Add a record to the frame that the next :meth:`publish` writes."""
        self._ops.append(op)
        self._ops_bytes += len(op)

    def write_later(self, slot: int, mask: int, at: int, data: memoryview) -> None:
        """Have :meth:`publish` write ``data`` at ``at``, behind the records: it overwrites acknowledged data in place.

        ``mask`` is that of its sectors, all of one slot. There must be no await before the publish: ``data`` may be a
        buffer that is used again. After a kill in between, replay finds the old checksum and the new, and one fits.
        """
        first = (at - self._device.at(slot)) // SECTOR + slot * SECTORS
        before = self._sums.values[first : first + len(data) // SECTOR].tolist()
        self._late.append(_LateOne(self._device, Late(slot, mask, at, data, before)))

    def write_run_later(self, late: LateRun) -> None:
        """The same of several pieces, which may still become more before the publish."""
        self._late.append(late)

    # -- publishing -------------------------------------------------------------------------------------------

    @property
    def has_unpublished(self) -> bool:
        """True if there are records that were noted and not published."""
        return bool(self._ops)

    def publish(self) -> None:
        """Hand the records, then the late data, to the kernel: from now on a killed daemon has them.

        The loop does that itself: only for a device that is quick, or was so when the records were noted. Who can wait
        uses ``publish.Publisher``.

        Raises OSError. The records are dropped if the device has failed by it. If the journal is full (JournalFull)
        they are kept, and wait for a commit, which stores what they say and is asked for here; no record that is
        noted later is published before that.
        """
        if not self._ops:
            return
        late, self._late = self._late, []
        began = timing.clock()
        try:
            frame = self._next_frame()
            self.journal.write(frame)
            for one in late:
                one.write()
        except JournalFull:
            self._undo(late)
            raise
        except OSError as error:
            self._undo(late)
            self._failure.fail(error, taken=True)
            raise
        took = timing.clock() - began
        if took > timing.SLOW_SECONDS:
            self._pace.note_write_of_loop(took)

    def take_frame(self) -> Frame | None:
        """The frame of all records that were noted, for a thread to write before any other; None: there are none.

        Raises OSError as :meth:`publish`. If the frame cannot be written the device has failed.
        """
        if not self._ops:
            return None
        assert not self._late, "late data is published by the loop, with no await before"
        return self._next_frame()

    def _next_frame(self) -> Frame:
        """The frame of the records. Raises OSError: they are dropped if the device has failed, and kept where the
        journal is full.
        """
        journal = self.journal
        try:
            if self._failure.error is not None:
                self._failure.check()
            frame = journal.place(b"".join(self._ops))
        except JournalFull:
            self._want_commit()
            raise
        except OSError:
            # What they say is in memory, for whoever takes the device back.
            self._forget_records()
            raise
        self._forget_records()
        if journal.used * 2 > journal.size:
            self._want_commit()
        return frame

    def _forget_records(self) -> None:
        self._ops.clear()
        self._ops_bytes = self._in_commit = 0

    def _undo(self, late: list[LateRun]) -> None:
        """Late data was not written, or not all of it: give back the checksums of what still lies there.

        That is acknowledged data. The rest is what its checksum says, or damaged.
        """
        pieces = [piece for one in late for piece in one.pieces()]
        for slot, mask, at, data, before in reversed(pieces):
            self._ready.masks[slot] &= ~mask
            first = (at - self._device.at(slot)) // SECTOR + slot * SECTORS
            try:
                found = checksums(self._device.read(at, len(data)))
            except OSError:
                continue
            for n, value in enumerate(before):
                if found[n] == value:
                    self._sums.values[first + n] = value

    # -- syncs ------------------------------------------------------------------------------------------------

    def begin_sync(self) -> None:
        """A sync begins: it takes in everything written so far."""
        self.syncing, self.open_sectors = self.open_sectors, {}

    def end_sync(self) -> None:
        """No sync is under way any more, whether it was a good one or not."""
        self.syncing = {}

    def take_back_sync(self) -> None:
        """What :meth:`begin_sync` announced was not begun."""
        self.open_sectors = self.syncing

    def note_durable(self) -> None:
        """All that was written is durable where it is."""
        self.open_sectors, self.syncing = {}, {}

    # -- commits ----------------------------------------------------------------------------------------------

    def has_changes(self) -> bool:
        """True if the journal holds anything, or is going to: a commit makes that superfluous."""
        return bool(self._ops or self.journal.used)

    def contribute(self, changes: Changes) -> Share:
        """Publish, and have a commit say that replay begins behind that. When it has succeeded the journal is trimmed.

        Has to be the first participant that is asked: publishing may fail the device, which changes other parts.
        Records that have no room in the journal stay noted: this commit stores what they say, so that they are
        superfluous when it has succeeded, and wait for the next one when it has not. So do those that were noted since
        a thread was last given a frame, where the device is slow.
        """
        try:
            if self._pace.is_slow and self._failure.error is None:
                self._in_commit = len(self._ops)
            else:
                self.publish()
        except JournalFull:
            self._in_commit = len(self._ops)
        except OSError:
            pass  # the device has failed: the sync of this commit is going to say so
        self._taken_pages, self._taken_sums = len(self._dirty_pages), len(self._sums.unstored)
        mark = self.journal.mark()
        assert changes.meta is not None
        changes.meta.journal_offset, changes.meta.journal_sequence = (
            mark[0].offset,
            mark[0].sequence,
        )
        return Share(partial(self._committed, mark), self._not_committed)

    def _committed(self, mark: tuple[Position, int]) -> None:
        """The index has, durably, all that was published before the mark, and the records that had no room."""
        self.journal.trim(mark)
        self._taken_pages = self._taken_sums = 0
        if self._in_commit:
            del self._ops[: self._in_commit]
            self._ops_bytes = sum(map(len, self._ops))
            self._in_commit = 0

    def _not_committed(self) -> None:
        self._in_commit = self._taken_pages = self._taken_sums = 0
