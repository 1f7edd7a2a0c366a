# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What can go wrong in the block cache, told apart by what the caller has to do about it."""

from __future__ import annotations

import errno
import os

NO_ANSWER = (errno.ETIMEDOUT, errno.ESHUTDOWN)
"""What a store says that does not answer: it is not asked once more for each piece, or by each guest."""


class CacheError(Exception):
    """The cache cannot be opened or changed as asked. One line: what is wrong and what to do."""


class CacheFull(Exception):
    """No slot can be had, because every one holds data that only the cache has. Nothing was written."""


class IndexFault(OSError):
    """The index cannot be read or written now.

    ENOSPC: its file system, or the room it was given, is full. ETIMEDOUT: it has not answered. Else EIO.
    """


_ADVICE = {
    errno.ENOMEM: "it is mapped as a whole: let the process have more address space (ulimit -v, LimitAS)",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EROFS: "its file system is mounted for reading only: mount it for writing",
    errno.EMFILE: "let the process have more descriptors (ulimit -n, LimitNOFILE)",
    errno.EIO: "its file system or disk fails: see the kernel's log",
}
"""Faults that are not the index's own."""


def index_advice(fault: str) -> str:
    """What to do about a fault of opening the index, of which lmdb tells no more than the text."""
    for number, advice in _ADVICE.items():
        if os.strerror(number) in fault:
            return advice
    return "see 'The index is damaged' in RECOVERY.md"
