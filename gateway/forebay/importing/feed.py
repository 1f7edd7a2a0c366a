# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The bytes of a source on their way: counted and summed in their order, kept beside the image where need be, and made
by another thread while this one writes.
"""

import hashlib
from collections.abc import Generator, Iterator
from itertools import chain
from typing import Any, TypeVar

from forebay.errors import ForebayError
from forebay.importing.ahead import ahead
from forebay.importing.limits import Limits
from forebay.importing.source import Source
from forebay.importing.sparse import SparseFile, in_steps
from forebay.importing.work import SOURCE, Work

CHECKPOINT = 64 << 20
"""Bytes after which what was fetched, or written, is made durable."""

T = TypeVar("T")


class Feed:
    """What comes of one source."""

    def __init__(self, source: Source, work: Work, limits: Limits, sha256: str | None) -> None:
        """`sha256`: the sum that the source is to have; None where nobody knows."""
        self._source = source
        self._work = work
        self._limits = limits
        self._wanted = sha256
        self._hash = hashlib.sha256()
        self.is_summed = sha256 is not None or not source.is_here
        self.consumed = 0
        """Bytes of the source that went in so far."""
        self.kept: SparseFile | None = None
        """The source beside the image, where it is fetched and has to be a file."""
        self.fetched = 0
        """Bytes of that which were written."""
        self._ahead: list[Generator[Any, None, None]] = []

    def from_start(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """All bytes of the source, whose `chunks` go on behind what an earlier run kept.

        A file that is fetched is kept beside the image on the way.
        """
        if self._source.is_here:
            return self.counted(chunks)
        self.fetched = self._work.record.fetched
        self.kept = self._work.file(SOURCE)
        self.kept.cut(self.fetched)
        if self._source.size is not None:
            self._work.check_room(self._source.size - self.fetched)
        return self.counted(chain(self.kept.steps(self.fetched), self._keeping(self.kept, chunks)))

    def _keeping(self, kept: SparseFile, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for part in in_steps(chunks):
            kept.write(self.fetched, part)
            self.fetched += len(part)
            self._limits.check_size(self.fetched)
            if self.fetched - self._work.record.fetched >= CHECKPOINT:
                self.note()
                self._work.check_room()
            yield part
        kept.cut(self.fetched)  # it may end with zeros, which were not written
        self.note()

    def note(self) -> None:
        """Have it durable what is kept, if anything is, and how much that is. Raises OSError."""
        if self.kept is not None:
            fetched = self.fetched
            self.kept.sync()
            self._work.note(fetched=fetched)

    def counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The same chunks, which are the next ones of the source."""
        for chunk in chunks:
            self.count(chunk)
            yield chunk

    def count(self, chunk: bytes) -> None:
        """Count, and sum, the next bytes of the source."""
        self.consumed += len(chunk)
        if self.is_summed:
            self._hash.update(chunk)

    @property
    def sha256(self) -> str | None:
        """The sum of all that was counted; None where nobody summed it."""
        return self._hash.hexdigest() if self.is_summed else None

    def check_sum(self) -> None:
        """Raises ForebayError where the source has another sum than it is to have."""
        if self._wanted is not None and self.sha256 != self._wanted:
            raise ForebayError(
                f"{self._source.name} has the SHA-256 {self.sha256}, which is not the one that was given: nothing was "
                "made of it"
            )

    def in_advance(self, pieces: Iterator[T]) -> Iterator[T]:
        """The same pieces, made by another thread."""
        self._ahead.append(ahead(pieces))
        return self._ahead[-1]

    def stop(self) -> None:
        """Read no more of the source."""
        self._source.close()
        for stream in self._ahead:
            stream.close()
