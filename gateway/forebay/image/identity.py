# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an image is known to look like, and which of our own writes that does not cover: one state, with questions.

The cache keeps clean blocks of an image over restarts, and trusts them as long as the image looks as it did when its
identity was last put on record in the index. Our own writes change the image's times, too. So the identity on record is
withdrawn, durably, before the first of them, and put there anew when all of them are durable. In between the owner
marker keeps others out, and later times at a start are taken for ours. Which file it is, and its times when it was
looked at last, stay on record all the time.

Nothing here awaits: each method is a critical section.
"""

from dataclasses import astuple
from typing import Any

from forebay.origin.protocol import Identity
from forebay_cache import Cache

_AT_ONCE_NS = 10**9
"""Times that differ by less may be of one write."""


class KnownIdentity:
    """The identity on record of one image, and how far our own writes to it are.

    Writes are counted as they end, whether they went well or not; a pass of write-back counts as one. The count only
    grows, so that whoever awaits something may compare before and after.
    """

    def __init__(self, cache: Cache, key: str) -> None:
        """`key` names the image in the index."""
        self._cache = cache
        self._key = key
        self._under_way = 0
        # What an earlier life wrote, and ended before it took note of, may not be durable yet: that counts as one.
        self._ended = int(self.is_withdrawn())
        self._durable = 0
        """How many of the writes that ended are durable in the image."""
        self._noted = 0
        """How many of them the identity on record covers."""
        self._is_withdrawn_durably = False
        self.has_checkpoint = False
        """True while a checkpoint may be committed beside the image, and not all of it in the image."""
        self.is_committing = False
        """True while a start after a crash would take other times than those in the redo journal for somebody else's
        change. A pass sets it to False when the journal says, durably, that the image is being written.
        """

    # ------------------------------------------------------------------------------------------------------ the record

    def _record(self) -> dict[str, Any] | None:
        return self._cache.records.get("image", self._key)

    def is_withdrawn(self) -> bool:
        """True if there is a record that says that we are, or were, writing the image: any identity may be ours."""
        known = self._record()
        return known is not None and known["identity"] is None

    def is_on_record(self) -> bool:
        """True if the record says what the image looks like."""
        known = self._record()
        return known is not None and known["identity"] is not None

    def differs_from(self, identity: Identity) -> bool:
        """True if the record says that the image looked otherwise: somebody else has changed what it holds.

        The time of its last change of status alone tells of no such thing: chmod, chown and links change it, and
        libvirt does that by itself.
        """
        known = self._record()
        if known is None or known["identity"] is None:
            return False
        return Identity(*known["identity"]).content != identity.content

    def is_of_another_file(self, identity: Identity) -> bool:
        """True if the image is another file than the one on record, which a backup that was put in its place is."""
        file = self._last().inode
        return file not in (0, identity.inode)

    def is_of_before(self, identity: Identity) -> bool:
        """True if the image was last written before our own writes that the record does not cover, by its times.

        A backup that is written in place and keeps its time is like that. Its status changed later than what it holds;
        each write of ours changes both times at once.
        """
        last = self._last()
        return identity.mtime_ns <= last.mtime_ns and identity.ctime_ns > max(
            last.ctime_ns, identity.mtime_ns + _AT_ONCE_NS
        )

    def _last(self) -> Identity:
        """What it looked like when that was noted last; only inode and times count. 0 is not known."""
        known = self._record()
        if known is None:
            return Identity(0)
        if known["identity"] is not None:
            return Identity(*known["identity"])
        mtime_ns, ctime_ns = known.get("times", (0, 0))
        return Identity(0, mtime_ns, ctime_ns, known.get("inode", 0))

    def remember(self, identity: Identity) -> None:
        """Put on record what the image looks like, from the next commit on."""
        self._put(list(astuple(identity)))

    def withdraw(self) -> None:
        """Put on record that we are writing the image, from the next commit on: `note_withdrawn` follows that."""
        self._put(None)

    def _put(self, identity: list[int] | None) -> None:
        self._is_withdrawn_durably = False
        value: dict[str, Any] = {"identity": identity}
        if identity is None:
            last = self._last()
            value |= {"inode": last.inode, "times": [last.mtime_ns, last.ctime_ns]}
        if self._record() != value:
            self._cache.records.put("image", self._key, value)

    def note_withdrawn(self) -> None:
        """Say that the record of `withdraw` is durable, so that writes may begin."""
        self._is_withdrawn_durably = True

    def may_write(self) -> bool:
        """True if the identity is withdrawn, durably. If not, `withdraw` comes before the first write."""
        return self._is_withdrawn_durably

    def remove(self) -> None:
        """Remove the record, from the next commit on: nothing is known of the image any more."""
        self._cache.records.put("image", self._key, None)

    # ---------------------------------------------------------------------------------------------------------- writes

    @property
    def writes_ended(self) -> int:
        """How many writes have ended so far."""
        return self._ended

    def begin_write(self) -> None:
        """Count a write as under way: before anything of it reaches the image."""
        self._under_way += 1

    def end_write(self) -> None:
        """Count the write as ended, whether it went well or not."""
        self._under_way -= 1
        self._ended += 1

    def begin_checkpoint(self) -> None:
        """Say that a redo journal is about to be committed beside the image: a start after a crash writes the image."""
        self.has_checkpoint = self.is_committing = True

    def end_checkpoint(self) -> None:
        """Say that no redo journal lies beside the image any more."""
        self.has_checkpoint = self.is_committing = False

    def needs_flush(self) -> bool:
        """True if the image may lack, durably, something that was written."""
        return self._durable != self._ended or self._under_way > 0

    def note_durable(self, ended: int) -> None:
        """Say that the first `ended` writes are durable: a flush went well that began after they had ended."""
        self._durable = max(self._durable, ended)

    def is_being_written(self) -> bool:
        """True while a write is under way."""
        return self._under_way > 0

    def is_at_rest(self) -> bool:
        """True if all writes are durable, none is under way, and the next start makes none: an identity can last."""
        return not (self.needs_flush() or self.has_checkpoint)

    def is_noted(self, ended: int) -> bool:
        """True if the identity on record covers the first `ended` writes and no others."""
        return self._noted == ended

    def note(self, identity: Identity, ended: int) -> None:
        """Put on record what the image looks like after the first `ended` writes, all of which are durable.

        A critical section, with the question whether they still are all.
        """
        self._noted = ended
        self.remember(identity)
