# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image made of a source: which way its bytes take, and how far they are.

The bytes of the source are counted and summed in their order. What is packed is unpacked on its way. A raw disk goes
into the image as it comes. A qcow2 image has its tables anywhere, so all of it has to be in a file first: that is the
source itself, or a file beside the image. One that is fetched is kept there as well where it is packed, since unpacking
can begin at the start only.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from forebay.errors import ForebayError
from forebay.formats import qcow2
from forebay.formats.magic import RAW
from forebay.importing import guest_view, other_formats
from forebay.importing.feed import CHECKPOINT, Feed
from forebay.importing.kinds import HEAD, QCOW2, Kind, disk_of, packing_of, parse_kind
from forebay.importing.limits import Limits
from forebay.importing.source import LocalFile, Source
from forebay.importing.sparse import SparseFile, data_of, in_steps
from forebay.importing.unpack import unpack
from forebay.importing.work import INNER, SOURCE, Record, Work
from forebay.units import format_size

ZEROS = 16
"""How many times as many bytes of zeros may come between: they are made again in no time."""

SECTOR = 512
"""An image has whole ones: QEMU would round its size up, too."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, and how many bytes of how many are; the latter is 0 where nobody knows."""

FETCH, WRITE = "fetch", "write"

Pieces = Iterator[tuple[int, bytes]]
"""(offset, data) of an image, in order."""


@dataclass
class Wish:
    """What the operator asked for."""

    source: str
    target: str
    sha256: str | None = None
    kind: Kind | None = None
    limits: Limits = field(default_factory=Limits)
    ca_file: str | None = None
    allow_http: bool = False
    restart: bool = False


@dataclass
class Report:
    """What became of it."""

    image: str
    source: str
    format: str
    size: int
    """Bytes."""
    allocated_bytes: int
    sha256: str | None
    """Of the source, as it was fetched; None where nobody asked for that of a file on this host."""
    resumed_bytes: int
    """Of the source, or of the image, that an earlier run had."""


@dataclass(frozen=True)
class _File:
    """A file that holds an image with tables."""

    read: guest_view.Read
    size: int
    path: Callable[[], Path]


class Making:
    """One image being made, from a source that is open to an image that has its name."""

    def __init__(
        self,
        wish: Wish,
        source: Source,
        work: Work,
        progress: Progress,
        tell: Callable[[str], None],
    ) -> None:
        self._wish = wish
        self._source = source
        self._work = work
        self._progress = progress
        self._tell = tell
        self._feed = Feed(source, work, wish.limits, wish.sha256)
        self._reached = 0
        """Up to where the image was written."""

    def run(self) -> Report:
        """Make it. Raises ForebayError, ValueError that says what the source is, and OSError."""
        self._work.remove_others()
        resumed = self._begin()
        kind, size = self._copy()
        self._source.check_unchanged()
        self._feed.check_sum()
        if size == 0:
            raise ForebayError(f"{self._source.name} is empty: name the file of an image")
        size = -(-size // SECTOR) * SECTOR
        self._work.image.sync()
        allocated = self._work.image.allocated
        self._work.publish(size)
        where, sha256 = self._work.address.key, self._feed.sha256
        return Report(where, self._source.name, str(kind), size, allocated, sha256, resumed)

    def stop(self) -> None:
        """Read no more of the source, whatever happened."""
        self._feed.stop()

    def keep(self) -> bool:
        """Leave what there is for another run; False where that is nothing. Raises nothing."""
        with contextlib.suppress(OSError, ForebayError):
            self._feed.note()
            if self._reached > self._work.record.written:
                self._note_written(self._reached)
        record = self._work.record
        if record.fetched or record.written:
            self._work.keep()
            return True
        self._work.drop()
        return False

    # ------------------------------------------------------------------------------------------------- the beginning

    def _begin(self) -> int:
        """Begin to read, where an earlier run was if its source was this one; how many bytes that had."""
        known = self._known()
        had = known.written if known.format == RAW else known.fetched
        same = self._source.begin(known.source, 0 if self._source.is_here else had)
        done = max(known.fetched, known.written) if same else 0
        self._tell_begin(known, done)
        record = known if same else Record()
        record.source = self._source.identity
        self._work.record = record
        self._work.image.cut(record.written)
        return done

    def _tell_begin(self, known: Record, done: int) -> None:
        """Say what an earlier run was good for, if there was one."""
        if done:
            anew = ", and unpacks anew" if "." in known.format else ""
            self._tell(f"goes on where it was, after {format_size(done)}{anew}")
        elif not (known.fetched or known.written):
            if known.format:
                self._tell("starts over: nothing was made yet that is of use")
        elif self._source.is_here:
            self._tell("starts over: the file was changed since")
        else:
            self._tell(
                "starts over: the server does not go on with what was fetched before, or has another file now"
            )

    def _known(self) -> Record:
        """What an earlier run left, if it is of use to this one."""
        record, asked = self._work.record, self._wish.kind
        try:
            kind = parse_kind(record.format)
        except ValueError:
            return Record()
        return Record() if self._wish.restart or asked not in (None, kind) else record

    # ---------------------------------------------------------------------------------------------------- the two ways

    def _copy(self) -> tuple[Kind, int]:
        """Write the image; what the source was, and how many bytes the image has."""
        record = self._work.record
        kind = self._wish.kind or (parse_kind(record.format) if record.format else None)
        chunks = self._source.chunks()
        if kind is None:
            head, chunks = _peek(chunks)
            packing = packing_of(head)
            disk = "" if packing else disk_of(head)
        else:
            packing, disk = kind.packing, kind.disk
        if disk == RAW and not packing:
            self._has(Kind(RAW))
            return Kind(RAW), self._copy_raw(chunks)
        stream = self._feed.from_start(chunks)
        content = unpack(packing, self._feed.in_advance(stream)) if packing else stream
        if not disk:
            head, content = _peek(content)
            disk = disk_of(head)
        kind = Kind(disk, packing)
        self._has(kind)
        if disk == RAW:
            return kind, self._copy_stream(content, 0)
        return kind, self._copy_tables(disk, self._as_file(content, packing))

    def _has(self, kind: Kind) -> None:
        self._work.note(format=str(kind))

    def _copy_raw(self, chunks: Iterator[bytes]) -> int:
        """A raw disk as it is: how many bytes it has."""
        source, written = self._source, self._work.record.written
        if source.size is not None:
            self._wish.limits.check_size(source.size)
        if isinstance(source, LocalFile) and not self._feed.is_summed:
            self._work.check_room(max(0, source.allocated - written))
            return self._write(self._feed.in_advance(source.pieces(written)), source.size or 0)
        if source.is_here:
            return self._copy_stream(self._feed.in_advance(self._feed.counted(chunks)), 0)
        for part in self._work.image.steps(written):
            self._feed.count(part)
        return self._copy_stream(self._feed.in_advance(self._feed.counted(chunks)), written)

    def _copy_stream(self, content: Iterator[bytes], at: int) -> int:
        """A raw disk whose bytes from `at` on are these: how many bytes it has."""
        end = at

        def pieces() -> Pieces:
            nonlocal end
            for part in in_steps(content):
                end += len(part)
                if end > self._work.record.written:
                    yield end - len(part), part
                self._tell_consumed(WRITE)

        self._write(pieces(), 0)
        return end

    def _copy_tables(self, disk: str, file: "_File") -> int:
        """The disk that a guest sees of an image with tables, in a file: how many bytes it has."""
        self._feed.consumed = file.size
        if disk == QCOW2:
            return self._copy_qcow2(file)
        with other_formats.opened(file.path(), disk, self._source.name) as found:
            self._wish.limits.check_size(found.size)
            pieces = data_of(found.fd, found.size, self._work.record.written)
            return self._write(self._feed.in_advance(pieces), found.size)

    def _copy_qcow2(self, file: "_File") -> int:
        header = qcow2.parse(file.read(0, qcow2.HEAD), file.size)
        guest_view.check(header)
        self._wish.limits.check_size(header.size)
        written = self._work.record.written
        self._work.check_room(guest_view.allocated(file.read, header, written))
        return self._write(
            self._feed.in_advance(guest_view.data(file.read, header, written)), header.size
        )

    # -------------------------------------------------------------------------------------------------------- in a file

    def _as_file(self, content: Iterator[bytes], packing: str) -> "_File":
        """The content in a file."""
        if packing:
            return self._unpacked_file(content)
        if self._feed.is_summed:
            for _ in content:
                self._tell_consumed(FETCH)
        if isinstance(self._source, LocalFile):
            return _File(self._source.read, self._source.size or 0, self._source.path)
        kept = self._feed.kept
        assert kept is not None, "what is fetched, and has to be a file, is kept"
        return _File(kept.read, self._feed.fetched, partial(self._work.path, SOURCE))

    def _unpacked_file(self, content: Iterator[bytes]) -> "_File":
        file = self._work.file(INNER)
        file.cut(0)
        end = 0
        for part in in_steps(content):
            file.write(end, part)
            end += len(part)
            self._check(file, end)
            self._tell_consumed(FETCH)
        file.cut(end)
        return _File(file.read, end, partial(self._work.path, INNER))

    # ------------------------------------------------------------------------------------------------- the image

    def _write(self, pieces: Pieces, size: int) -> int:
        """Write the pieces into the image; `size` again, 0 where that is not known."""
        image, noted = self._work.image, (self._work.image.data, self._work.record.written)
        for at, part in pieces:
            image.write(at, part)
            self._reached = end = at + len(part)
            self._check(image, end)
            if size:
                self._progress(WRITE, end, size)
            if image.data - noted[0] >= CHECKPOINT or end - noted[1] >= ZEROS * CHECKPOINT:
                noted = image.data, end
                self._note_written(end)
        return size

    def _check(self, file: SparseFile, end: int) -> None:
        """Raises ForebayError where a file becomes too large, or too much of too little."""
        self._wish.limits.check_size(end)
        self._wish.limits.check_data(file.data, self._feed.consumed)

    def _note_written(self, end: int) -> None:
        """Have it durable what the image has from its start to `end`."""
        self._work.image.sync()
        self._work.note(written=end)
        self._work.check_room()

    def _tell_consumed(self, what: str) -> None:
        self._progress(what, self._feed.consumed, self._source.size or 0)


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first HEAD bytes, and the same chunks again."""
    taken: list[bytes] = []
    while sum(map(len, taken)) < HEAD and (chunk := next(chunks, None)) is not None:
        taken.append(chunk)
    return b"".join(taken)[:HEAD], chain(taken, chunks)
