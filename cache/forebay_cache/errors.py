# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What can go wrong in the block cache, told apart by what the caller has to do about it."""

from __future__ import annotations


class CacheError(Exception):
    """The cache cannot be opened or changed as asked. One line: what is wrong and what to do."""


class CacheFull(Exception):
    """No slot can be had, because every one holds data that only the cache has. Nothing was written."""


class IndexFault(OSError):
    """The index cannot be read or written now. ENOSPC: its file system, or the room it was given, is full; else EIO."""
