# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image on a block device."""

from forebay.origin.blocking import BlockingDevice
from forebay.origin.calls import SystemCalls
from forebay.origin.file import FileOrigin
from forebay.origin.opening import OpenImage
from forebay.origin.threads import StoreThreads


class BlockOrigin(FileOrigin):
    """A raw image on a block device, with 512 or 4096 byte sectors. Implements forebay.origin.protocol.Origin.

    Reads and writes may begin anywhere: the page cache does the sectors. Its identity is its size alone, for nothing
    else about a device says that somebody wrote to it.
    """

    _blocking = BlockingDevice

    def __init__(
        self,
        image: OpenImage,
        label: str,
        *,
        threads: StoreThreads,
        timeout: float,
        calls: SystemCalls | None = None,
    ) -> None:
        """Take over `image` and its descriptor. `timeout`: seconds that any call may take."""
        super().__init__(image, label, threads=threads, timeout=timeout, calls=calls)
        self._sector = image.sector

    async def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """As for a file, for whole sectors only: fallocate refuses others. The ends are written."""
        sector = self._sector
        first = -(-offset // sector) * sector
        last = (offset + length) // sector * sector
        if first >= last or not await super()._allocate(mode, first, last - first):
            return False
        await self._write_zeros(offset, first - offset)
        await self._write_zeros(last, offset + length - last)
        return True
