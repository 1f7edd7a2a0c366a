# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image on an NBD server.

The connection is made again with back-off when it breaks, for as long as the callers wait, and requests without an
answer are sent again. What the server acknowledged and did not flush before the break is unknown: the next flush says
so (`SyncOrder` in order.py has the same rule), and whoever holds the data writes it again.
"""

import errno
from collections.abc import Sequence
from typing import Self

import trio

from forebay.errors import ForebayError
from forebay.origin.addresses import NbdAddress
from forebay.origin.calls import Buffer
from forebay.origin.nbd_requests import Requests, connect
from forebay.origin.pieces import ZERO_PIECE, check_range, pieces
from forebay.origin.protocol import HOLE, MOST_EXTENTS, ZERO, Identity
from forebay.origin.threads import Background, bounded
from forebay_nbd.client.client import Client
from forebay_nbd.protocol.wire import Flag

_TRIMS = Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES


class NbdOrigin:
    """A raw image that an NBD server has. Implements forebay.origin.protocol.Origin."""

    def __init__(
        self,
        nursery: trio.Nursery,
        address: NbdAddress,
        label: str,
        client: Client,
        *,
        read_only: bool,
        timeout: float,
    ) -> None:
        """Take over a connected client, which `open` makes. `timeout`: seconds that any call may take."""
        self.size = client.size
        self.read_only = read_only
        self.label = label
        self.timeout = timeout
        self._requests = Requests(
            nursery, address, label, client, read_only=read_only, timeout=lambda: self.timeout
        )
        self._refused = False
        """True once the server refused to zero without writing."""

    @classmethod
    async def open(
        cls,
        nursery: trio.Nursery,
        address: NbdAddress,
        label: str,
        *,
        read_only: bool,
        timeout: float,
    ) -> Self:
        """Connect to the server: one attempt. The tasks of connections run in `nursery`.

        Raises ForebayError for what the operator has to change, OSError for a server that does not answer.
        """
        client = await connect(nursery, address, timeout)
        try:
            if client.size == 0:
                raise ForebayError(f"{label}: the server says that it is empty: check the export")
            if client.read_only and not read_only:
                raise ForebayError(
                    f"{label}: its server allows reading only: attach with --read-only or --overlay"
                )
        except BaseException:
            with trio.CancelScope(shield=True):
                await client.aclose()
            raise
        return cls(nursery, address, label, client, read_only=read_only, timeout=timeout)

    # ------------------------------------------------------------------------------------------------- reading

    async def read(self, offset: int, length: int, background: Background = False) -> Buffer:
        """Exactly `length` bytes. What lies beyond the end of the image is zeros. Raises OSError."""
        wanted = min(length, max(0, self.size - offset))
        check_range(self.label, self.size, offset, wanted)
        found: bytearray = await self._requests.ask(
            f"reading {self.label}",
            lambda client: client.pread(offset, wanted),
            offset,
            wanted,
            background,
        )
        return found if wanted == length else found + bytes(length - wanted)

    async def extents(
        self, offset: int, length: int, background: Background = False
    ) -> list[tuple[int, int]]:
        """(length, HOLE | ZERO or 0) of the extents one after the other, covering the range. Raises OSError."""
        check_range(self.label, self.size, offset, length)
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end and len(found) < MOST_EXTENTS:
            part = await self._some_extents(at, end - at, background)
            if not part:
                break
            for size, flags in part:
                _append(found, size, flags & (HOLE | ZERO))
                at += size
        if at < end:
            _append(found, end - at, 0)
        return found

    async def _some_extents(
        self, offset: int, length: int, background: Background
    ) -> list[tuple[int, int]]:
        """The extents at the beginning of the range, from one answer; none if the server cannot say. Raises OSError."""
        first = offset // self._requests.sector * self._requests.sector
        last = -(-(offset + length) // self._requests.sector) * self._requests.sector
        try:
            part: list[tuple[int, int]] = await self._requests.ask(
                f"asking for the holes of {self.label}",
                lambda client: client.block_status(first, last - first),
                offset,
                length,
                background,
            )
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EINVAL):
                return []
            raise
        return _clipped(part, offset - first, length)

    async def identity(self) -> Identity:
        """The size in bytes: no more is known of an image behind NBD."""
        return Identity(self.size)

    # ------------------------------------------------------------------------------------------------- writing

    async def write(self, offset: int, data: Sequence[Buffer], background: bool = False) -> None:
        """Write the buffers one after the other from `offset`. Not durable before `flush`. Raises OSError."""
        self._check_change(offset, sum(memoryview(buffer).nbytes for buffer in data))
        at = offset
        for piece, length in pieces(data):
            await self._write(at, piece[0] if len(piece) == 1 else b"".join(piece), background)
            at += length

    async def write_ranges(
        self, ranges: Sequence[tuple[int, Buffer]], background: bool = False
    ) -> None:
        """Write several (offset, data), one after the other. Raises OSError."""
        for offset, data in ranges:
            await self.write(offset, [data], background)

    async def _write(self, offset: int, data: Buffer, background: bool) -> None:
        """Write one piece. Sectors at its ends that it covers in part are read, changed and written. Raises OSError."""
        sector = self._requests.sector
        end = offset + len(data)
        first, last = offset // sector * sector, -(-end // sector) * sector

        async def write(client: Client) -> None:
            if (first, last) == (offset, end):
                await client.pwrite(offset, data)
                return
            whole = await client.pread(first, last - first)
            whole[offset - first : end - first] = data
            await client.pwrite(first, bytes(whole))

        await self._requests.ask(
            f"writing {self.label}", write, first, last - first, background, kind="change"
        )

    @property
    def punches(self) -> bool | None:
        """True if the server knows TRIM and WRITE_ZEROES, and has not refused yet to zero without writing."""
        return self._requests.flags & _TRIMS == _TRIMS and not self._refused

    async def ask_punches(self) -> bool:
        """The same: there is nothing to ask."""
        return bool(self.punches)

    async def trim(self, offset: int, length: int) -> None:
        """Give space back where the server can; zeros either way, which NBD's TRIM does not promise. Raises OSError."""
        await self.zero(offset, length, may_trim=True)

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make the range read as zeros; with `may_trim` no hole of it gets space. Raises OSError.

        With `may_trim` the server is asked to zero only if that is faster than writing, which it is where it can give
        space back. Where it refuses, what reads as zeros already is left alone.
        """
        self._check_change(offset, length)
        end, sector = offset + length, self._requests.sector
        first = min(end, -(-offset // sector) * sector)
        last = max(first, end // sector * sector)
        if not may_trim:
            await self._zero_in_place(first, last)
        elif not await self._zero_fast(first, last):
            await self._zero_data(first, last)
        await self._write_zeros(offset, first)
        await self._write_zeros(last, end)

    async def _zero_fast(self, first: int, last: int) -> bool:
        """Zero whole sectors and return True; False where the server would have to write zeros. Raises OSError."""
        if self._refused or not self._requests.flags & Flag.SEND_FAST_ZERO:
            return False
        self._refused = not await self._zero(first, last, no_hole=False, fast=True)
        return not self._refused

    async def _zero_data(self, first: int, last: int) -> None:
        """Zero what does not read as zeros of whole sectors; a hole alone need not. Raises OSError."""
        sector, done = self._requests.sector, first
        while done < last:
            parts = await self.extents(done, last - done)
            for size, flags in parts[:MOST_EXTENTS]:
                if not flags & ZERO:
                    at, behind = done // sector * sector, -(-(done + size) // sector) * sector
                    await self._zero_in_place(max(first, at), min(last, behind), no_hole=False)
                done += size

    async def _zero_in_place(self, first: int, last: int, *, no_hole: bool = True) -> None:
        """Zero whole sectors, by the server or by writing. Raises OSError."""
        if not await self._zero(first, last, no_hole=no_hole, fast=False):
            await self._write_zeros(first, last)

    async def _zero(self, first: int, last: int, *, no_hole: bool, fast: bool) -> bool:
        """Have the server zero whole sectors; False, with nothing done, if it does not do that so. Raises OSError."""
        if last == first:
            return True
        try:
            await self._requests.ask(
                f"zeroing {self.label}",
                lambda client: client.zero(first, last - first, no_hole=no_hole, fast=fast),
                first,
                last - first,
                kind="change",
            )
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return False
        return True

    async def _write_zeros(self, offset: int, end: int) -> None:
        while offset < end:
            count = min(ZERO_PIECE, end - offset)
            await self._write(offset, bytes(count), background=False)
            offset += count

    # ------------------------------------------------------------------------------------------ durability, end

    @property
    def sync_failures(self) -> int:
        """How many flushes so far ended without anybody knowing what they made durable."""
        return self._requests.sync_failures

    async def flush(self, *, times: bool = False) -> None:
        """Make durable every change that was acknowledged before. Raises OSError: make all of them again."""
        del times  # an image behind NBD shows none
        await self._requests.flush()

    async def is_dead(self) -> bool:
        """False: a connection that breaks is made again."""
        return False

    async def forget(self) -> None:
        """Nothing to do: nothing of the image is kept on this side."""

    async def quiesce(self) -> None:
        """Wait until no change that was given up can arrive any more. ETIMEDOUT: one still can."""
        with bounded(self.timeout, f"waiting for a hung write to {self.label}"):
            await self._requests.wait_for_range(0, self.size)

    async def close(self) -> None:
        """Disconnect from the server. Implies no flush."""
        await self._requests.close()

    def _check_change(self, offset: int, length: int) -> None:
        """Raise OSError unless the image is open for writing and the range lies in it."""
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.label} is open for reading only")
        check_range(self.label, self.size, offset, length)


def _append(found: list[tuple[int, int]], size: int, flags: int) -> None:
    """Add an extent to the list, or to the last one there if that has the same flags."""
    if found and found[-1][1] == flags:
        found[-1] = (found[-1][0] + size, flags)
    elif size:
        found.append((size, flags))


def _clipped(part: list[tuple[int, int]], skip: int, length: int) -> list[tuple[int, int]]:
    """The extents without their first `skip` bytes, and at most `length` bytes of what follows."""
    found = []
    for size, flags in part:
        cut = min(skip, size)
        left = min(size - cut, length)
        skip -= cut
        length -= left
        if left:
            found.append((left, flags))
    return found
