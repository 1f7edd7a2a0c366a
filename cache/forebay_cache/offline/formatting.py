# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Making an empty cache of a device and an index."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from forebay_cache.device.files import open_device, size_of
from forebay_cache.device.superblock import is_blank, read_superblock, write_format
from forebay_cache.errors import CacheError
from forebay_cache.format.geometry import BLOCK
from forebay_cache.index.index import Index, create

DEFAULT_SIZE = 20 << 30
"""Bytes of a file that is made for a cache whose size nobody has said."""


def format_device(
    path: Path,
    index: Path,
    *,
    size: int | None = None,
    force: bool = False,
    ident: uuid.UUID | None = None,
    opened: int | None = None,
) -> None:
    """Make an empty cache, device and index, with that uuid or one of its own.

    ``opened`` is the descriptor that ``open_device`` returned, for a caller who may open more; it is closed.

    Raises :class:`CacheError` when something would be lost, unless forced.
    """
    fd = open_device(path, create_size=size or DEFAULT_SIZE) if opened is None else opened
    try:
        if not force:
            _refuse_loss(fd, path, index)
        shutil.rmtree(index, ignore_errors=True)
        create(index, ident)
        fresh = Index(index, size_of(fd) // BLOCK)
        ident = uuid.UUID(fresh.meta.uuid)
        fresh.close()
        write_format(fd, path, ident)
    finally:
        os.close(fd)


def _refuse_loss(fd: int, path: Path, index: Path) -> None:
    if not is_blank(fd):
        what = "a Forebay cache" if read_superblock(fd, path) else "data that is not Forebay's"
        raise CacheError(f"{path}: holds {what}; use --force to overwrite it")
    if index.exists() and not _is_fresh(index):
        raise CacheError(f"{index}: an index that is in use; use --force to drop it")


def _is_fresh(index: Path) -> bool:
    opened = Index(index, 0)
    opened.close()
    return opened.meta.fresh
