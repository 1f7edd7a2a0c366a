# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What one disk has done: requests and bytes, for `forebay stats` and the metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from forebay_fast.latency import ORIGIN_READ, ORIGIN_SYNC, ORIGIN_WRITE, Latency

__all__ = ["ORIGIN_READ", "ORIGIN_SYNC", "ORIGIN_WRITE", "Counters"]


@dataclass(slots=True)
class Counters:
    """Of one disk, since the daemon started or the disk was attached; none of them is ever decreased.

    Reads are counted by the disk's :class:`forebay_cache.View`. A fetch is charged to whoever asked for it, so of
    disks that share an image each has in `origin_read_bytes` what it caused.
    """

    write_hits: int = 0
    """Writes and zeroing requests that the cache took."""
    write_misses: int = 0
    """Writes and zeroing requests that went to the image."""
    written_bytes: int = 0
    """Bytes that guests wrote, wherever they went; zeros that were asked for by length are not counted."""
    origin_read_bytes: int = 0
    origin_written_bytes: int = 0
    """Bytes written to the image, by guests or by write-back."""
    journal_written_bytes: int = 0
    """Bytes written to the redo journal beside the image."""
    trims_ignored: int = 0
    """TRIM requests that were passed over, as the image's store cannot give space back."""
    origin_errors: int = 0
    """Reads, writes, flushes and checkpoints that the image or its store failed, or that could not be asked of it."""

    latency: Latency = field(default_factory=Latency)
    """How long requests of the disk took, and what was asked of the image for it."""

    def note_origin_read(self, seconds: float) -> None:
        """Implements forebay_cache's Tally."""
        self.latency.note(ORIGIN_READ, seconds)

    @contextmanager
    def timed(self, kind: int) -> Iterator[None]:
        """Around one call to the image of that kind; one that fails took its time, too."""
        began = perf_counter()
        try:
            yield
        finally:
            self.latency.note(kind, perf_counter() - began)

    @contextmanager
    def errors_counted(self) -> Iterator[None]:
        """Around what is asked of the image: an OSError is counted, and goes on."""
        try:
            yield
        except OSError:
            self.origin_errors += 1
            raise
