# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A virtual disk off the event loop: as an image in a file, but that it is alive as long as its server is."""

from dataclasses import replace

from xxhash import xxh3_64_intdigest

from forebay.origin.blocking import BlockingFile
from forebay.origin.file import FileOrigin
from forebay.origin.opening import look
from forebay.origin.protocol import Identity
from forebay.origin.worker import process


class BlockingVirtual(BlockingFile):
    """The calls on one virtual disk."""

    def identity(self) -> Identity:
        """Size of the disk; times and inode of its file. Where that lies on others, the inode stands for all of them.

        Raises OSError as for a file, and where one of the others is gone.
        """
        found = super().identity()
        if not self._image.backing:
            return found
        seen: list[object] = [found.inode]
        for below in self._image.backing:
            status = look(below.address, self._calls)
            seen += [status.device, status.inode, status.size, status.mtime_ns]
        return replace(found, inode=xxh3_64_intdigest(repr(seen).encode()) >> 1)

    def is_dead(self) -> bool:
        """True if its server has ended: it is started again with the files opened anew."""
        with self.descriptor as fd:
            return not process.is_held(fd)


class VirtualOrigin(FileOrigin):
    """The virtual disk of an image in some format. Implements forebay.origin.protocol.Origin.

    What was acknowledged and not flushed may be lost where its server ends unexpectedly, as with an NBD server.
    """

    _blocking = BlockingVirtual
