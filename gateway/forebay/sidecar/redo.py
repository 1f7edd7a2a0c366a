# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

r"""The redo journal beside an image: a checkpoint, whole and durable, before any of it goes into the image (promise 5).

It is written as `redo.new` in the directory of its owner (tenure.py). Made durable, it is renamed to `redo`: with that
the checkpoint is committed. Then it is applied to the image, the image is made durable, and the journal is removed.
Whoever comes after that owner, on whatever host, applies a `redo` that is found (as often as need be: the result is the
same) and drops a `redo.new`; either way the image is as it was at one instant.

The file, little endian::

    header   4096 bytes: b"FBREDO\0\0", JSON padded with zeros, XXH3-64 of what comes before in the last 8 bytes
    records  magic u32 | kind u32 | offset u64 | length u64 | checksum u64 | data, where kind is DATA

Kinds: DATA; ZEROS, a range that reads as zeros and may be a hole; PROVISIONED, one that must not; END, whose offset and
length are the number of records before it and the sum of the lengths of their data. A record's checksum is XXH3-64 of
the 24 bytes before it and its data. Behind END stands how far it is applied (applying.py), once that was begun.
Format 1 had neither that nor the image's times, format 2 no token. A journal without PROVISIONED is of format 3.

Everything here blocks, raises OSError, and belongs in a thread.
"""

import contextlib
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from xxhash import xxh3_64

from forebay.errors import ForebayError
from forebay.origin.calls import SystemCalls
from forebay.origin.threads import Descriptor
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files, redo_header
from forebay.sidecar.applying import (
    BEGUN,
    Before,
    Place,
    Places,
    apply,
    has_changed,
    write_all,
    write_before,
    write_note,
)
from forebay.sidecar.own_files import DoesNotCountError
from forebay.sidecar.record import (
    ChangedError,
    Owner,
)
from forebay.sidecar.redo_header import FORMAT, PLAIN, SUM, Checkpoint
from forebay_cache.blocks.frozen import Range
from forebay_cache.format.geometry import Buffer

NAME, UNFINISHED = "redo", "redo.new"
DATA, ZEROS, END, PROVISIONED = 1, 2, 3, 4

_RECORD = struct.Struct("<IIQQ")
_HEAD = _RECORD.size + SUM.size
_RECORD_MAGIC = 0x52424652  # "RFBR"
_PIECE = 4 << 20
_SYNC_EVERY = 64 << 20
"""Bytes after which a journal is made durable in between, so that no single call takes long enough to be given up."""


class RedoFile:
    """The file of a journal that is being written. `add` and `add_all` may run in several threads at once."""

    def __init__(self, sidecar: int, checkpoint: Checkpoint) -> None:
        """Make `redo.new`, with a header, in the open directory `sidecar`, which stays the caller's. Raises OSError."""
        self._sidecar = sidecar
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        # A new file: a write that hung may still come, to the old one.
        self._file = Descriptor(own_files.make(sidecar, UNFINISHED, 0o600))
        self._end = redo_header.LENGTH
        self._records = 0
        self._bytes = 0
        self._unsynced = 0
        self._provisions = False
        self._places = Places()
        try:
            with self._file as fd:
                write_all(fd, [redo_header.packed(checkpoint)], 0)
        except BaseException:
            self.drop()
            raise

    @property
    def length(self) -> int:
        """Bytes of data so far."""
        return self._bytes

    def add(self, offset: int, length: int, data: Sequence[Buffer] | None) -> None:
        """Add one range of the image; with `data` None it reads as zeros, and may be a hole."""
        self.add_all([Range(offset, length, None if data is None else b"".join(data))])

    def add_all(self, ranges: Sequence[Range]) -> None:
        """Add several ranges at once."""
        records: list[Buffer] = []
        for part in ranges:
            zeros = PROVISIONED if part.is_provisioned else ZEROS
            kind, data = (zeros, []) if part.data is None else (DATA, [part.data])
            records += _record(kind, part.offset, part.length, data)
        self._append(records, ranges)

    def _append(self, records: list[Buffer], ranges: Sequence[Range]) -> None:
        """Write the records of the ranges at the end of the file."""
        stored = sum(part.length for part in ranges if part.data is not None)
        with self._lock:
            at = self._end
            self._end += len(ranges) * _HEAD + stored
            self._records += len(ranges)
            self._bytes += stored
            self._unsynced += stored
            self._provisions |= any(part.is_provisioned for part in ranges)
            if sync := self._unsynced >= _SYNC_EVERY:
                self._unsynced = 0
            behind = at
            for part in ranges:
                behind += _HEAD
                if part.data is not None:
                    self._places.add(part.offset, part.length, behind)
                    behind += part.length
        with self._file as fd:
            write_all(fd, records, at)
            if sync:
                syscalls.fdatasync(fd)

    def note_times(self, mtime_ns: int, ctime_ns: int) -> None:
        """Say in the header what the image's times are; before `commit`."""
        version = FORMAT if self._provisions else PLAIN
        found = replace(self._checkpoint, mtime_ns=mtime_ns, ctime_ns=ctime_ns, format=version)
        self._checkpoint = found
        with self._file as fd:
            write_all(fd, [redo_header.packed(self._checkpoint)], 0)

    @property
    def places(self) -> list[Place]:
        """Some places of it, of which it is good to know what the image held before."""
        return self._places.chosen

    def note_applied(self, below: int, before: Before = (), *, durable: bool = False) -> None:
        """Note in the committed journal that below that byte the image has all of it; 0, durable: before the first.

        `before`, with the first note of all, is what the image held at some `places`.
        """
        fd = _open_to_note(self._sidecar)
        try:
            if before:
                write_before(fd, self._end + _HEAD, before)
            write_note(fd, self._end + _HEAD, below, durable=durable)
        finally:
            syscalls.close(fd)

    def commit(self) -> None:
        """Make it durable and rename it: from now on whoever finds it applies it."""
        with self._file as fd:
            write_all(fd, _record(END, self._records, self._bytes, []), self._end)
            syscalls.fsync(fd)
        own_files.rename(self._sidecar, UNFINISHED, NAME)
        syscalls.fsync(self._sidecar)
        self.close()

    def drop(self) -> None:
        """Remove it: it is not to be committed."""
        self.close()  # first: what is removed while it is open stays in its directory, on NFS
        with contextlib.suppress(OSError):
            syscalls.unlink(UNFINISHED, dir_fd=self._sidecar)

    def close(self) -> None:
        """Close the file. The second call does nothing."""
        self._file.close()


def remove(sidecar: int) -> None:
    """Remove a committed journal, if there is one: the image has all of it, durably, or it is given up.

    Durable when this returns.
    """
    own_files.remove(sidecar, NAME)
    syscalls.fsync(sidecar)


def recover(
    sidecar: int,
    image: int,
    label: str,
    calls: SystemCalls,
    owner: Owner | None = None,
    *,
    sure: bool = False,
    place: str = NAME,
) -> Checkpoint | None:
    """Apply a committed journal in the open directory `sidecar` to the open `image`; it stays, for `remove`.

    What the journal said; None if no committed one was there, or it is not the `owner`'s: then it is no checkpoint of
    this image. Nothing is written unless all of the journal is good: raises ForebayError, which names the image by
    `label` and the journal by its `place` beside it, for one that is not; ChangedError, unless the operator is `sure`,
    where the image is another file than the one at the commit, or was changed since.
    """
    try:
        fd = own_files.open_existing(sidecar, NAME, syscalls.fstat(image))
    except FileNotFoundError:
        return None
    except DoesNotCountError as why:
        raise ForebayError(
            f"{label}: its redo journal is {why}: if a gateway wrote it, have it belong to the image's owner; else "
            f"remove {place} from the directory beside it"
        ) from None
    try:
        checkpoint, end = _checked(fd, label, place)
        if owner is not None and not checkpoint.is_of(owner):
            return None
        _check_size(checkpoint, image, label, place)
        if not sure:
            _check_image(fd, end, checkpoint, image, label, place)
        note = _open_to_note(sidecar)
        try:
            write_note(note, end, BEGUN, durable=True)
        finally:
            syscalls.close(note)
        for kind, offset, length, at in _records(fd, checkpoint.size):
            found = at if kind == DATA else None
            apply(fd, image, calls, offset, length, found, kind == ZEROS)
        syscalls.fsync(image)
    finally:
        syscalls.close(fd)
    return checkpoint


def _open_to_note(sidecar: int) -> int:
    """A new descriptor of the committed journal, to note in it how far it is applied."""
    return syscalls.open(NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=sidecar)


def _checked(fd: int, label: str, place: str) -> tuple[Checkpoint, int]:
    """What the header of a journal says, all of which is good, and the byte behind its last record.

    Raises ForebayError for one that is not good.
    """
    end = redo_header.LENGTH
    try:
        checkpoint = redo_header.read(fd)
        for kind, _offset, length, at in _records(fd, checkpoint.size):
            end = at + (length if kind == DATA else 0)
    except ValueError as fault:
        raise ForebayError(
            f"{label}: its redo journal cannot be read ({fault}), so the image may hold part of a checkpoint: "
            f"bring the gateway that wrote it back, or remove {place} from the directory beside it"
        ) from None
    return checkpoint, end + _HEAD


def _check_image(
    fd: int, end: int, checkpoint: Checkpoint, image: int, label: str, place: str
) -> None:
    """Raise ChangedError unless the open image is the file that it was at the commit, and nobody changed it since.

    `fd` is the journal, `end` the byte behind its last record.
    """
    status = syscalls.fstat(image)
    if (status.st_size, status.st_ino) != (checkpoint.size, checkpoint.inode):
        what = (
            f"is not the one of the redo journal beside it, which belongs to another file ({checkpoint.size} bytes, "
            f"inode {checkpoint.inode})"
        )
    elif checkpoint.mtime_ns and has_changed(
        fd, image, checkpoint.mtime_ns, end, _data_of(fd, checkpoint.size)
    ):
        what = "was changed by somebody else after the checkpoint that lies beside it was begun"
    else:
        return
    raise ChangedError(
        f"{label} {what}: if it is a copy of that image, 'forebay recover {label} --yes' finishes the checkpoint; if "
        f"it was restored, whole, 'forebay detach DISK --discard' drops it, or remove {place} beside it",
        f"{label} {what}",
    )


def _data_of(fd: int, image_size: int) -> Iterator[tuple[int, int, int]]:
    """(offset, length, the byte of the journal at which the data lies) of each record that has data."""
    for kind, offset, length, at in _records(fd, image_size):
        if kind == DATA:
            yield offset, length, at


def _check_size(checkpoint: Checkpoint, image: int, label: str, place: str) -> None:
    """Raise ChangedError where the image has another size than the one of the checkpoint, however sure one is."""
    size = syscalls.fstat(image).st_size
    if size != checkpoint.size:
        what = f"has {size} bytes, and the redo journal beside it belongs to a file of {checkpoint.size}"
        raise ChangedError(
            f"{label} {what}: put that file back, or give the checkpoint up: 'forebay detach DISK --discard' drops "
            f"it, or remove {place} from the directory beside it",
            f"{label} {what}",
        )


def _record(kind: int, offset: int, length: int, data: Sequence[Buffer]) -> list[Buffer]:
    """The buffers of one record: its head, and its data."""
    head = _RECORD.pack(_RECORD_MAGIC, kind, offset, length)
    total = xxh3_64(head)
    for buffer in data:
        total.update(buffer)
    return [head + SUM.pack(total.intdigest()), *data]


def _records(fd: int, image_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(kind, offset, length, the byte of the journal at which its data lies) of each record, checked.

    Raises ValueError where the journal is damaged or incomplete, or has a record beyond `image_size` bytes: the
    checksum is no signature, and whoever may write beside the image may have written this.
    """
    at, records, size = redo_header.LENGTH, 0, 0
    while True:
        raw = syscalls.pread(fd, _HEAD, at)
        if len(raw) < _HEAD:
            raise ValueError("it ends early")
        magic, kind, offset, length = _RECORD.unpack_from(raw)
        (found,) = SUM.unpack_from(raw, _RECORD.size)
        at += _HEAD
        total = xxh3_64(raw[: _RECORD.size])
        if magic != _RECORD_MAGIC or kind not in (DATA, ZEROS, END, PROVISIONED):
            raise ValueError(f"no record at byte {at - _HEAD}")
        if kind != END and offset + length > image_size:
            raise ValueError(f"a record beyond the end of the image, at byte {at - _HEAD}")
        stored = length if kind == DATA else 0
        for start in range(0, stored, _PIECE):
            part = syscalls.pread(fd, min(_PIECE, stored - start), at + start)
            if not part:
                raise ValueError("it ends early")
            total.update(part)
        if total.intdigest() != found:
            raise ValueError(f"damaged record at byte {at - _HEAD}")
        if kind == END:
            if (offset, length) != (records, size):
                raise ValueError("records are missing")
            return
        yield kind, offset, length, at
        at += stored
        records, size = records + 1, size + stored
