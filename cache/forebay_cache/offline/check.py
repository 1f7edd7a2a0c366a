# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Check: a cache that nobody has open is read, compared with itself, and left as it is.

Superblock and its copy; LMDB's own structure, by ``lmdb.verify``, which is pure Python, before LMDB itself opens the
file; every entry of the index; slots that two blocks claim; totals; the journal's records; and every sector that
counts, read from the device and compared with its checksum.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from contextlib import ExitStack
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from forebay_cache.cache import boot_id
from forebay_cache.device.device import Device
from forebay_cache.device.extend import Progress
from forebay_cache.device.files import lock, size_of
from forebay_cache.device.superblock import read_superblock
from forebay_cache.errors import CacheError
from forebay_cache.format.records import FORMATS, TABLES, Meta
from forebay_cache.format.superblock import COPY_OFFSET, SUPERBLOCK, Superblock
from forebay_cache.index.place import check_kinds
from forebay_cache.offline.report import Report
from forebay_cache.offline.tables import Tables
from forebay_cache.offline.walk import Walk
from forebay_cache.upkeep.medium import Medium


def check(device: Path, index: Path, progress: Progress, boot: str | None = None) -> Report:
    """Look at everything, and change nothing. ``progress`` is called with (bytes done, bytes in all).

    ``boot`` stands for the kernel's boot id. Raises CacheError when the cache is in use or is none, and OSError.
    """
    report = Report(str(device), str(index))
    with ExitStack() as stack:
        fd = _opened(device)
        stack.callback(os.close, fd)
        layout = _superblocks(fd, device, report)
        if not _is_sane(layout, fd, report) or not _lmdb_is_sound(index, report):
            return report
        own = os.dup(fd)
        opened = Device(own, device, layout)
        stack.callback(opened.close)
        medium = Medium(fd, opened.at)
        stack.callback(medium.close)
        env = lmdb.open(str(index), readonly=True, lock=False, create=False, max_dbs=len(TABLES))
        stack.callback(env.close)
        with env.begin() as txn:
            tables = Tables(env, txn)
            meta = _meta(tables, layout, report)
            if meta is not None:
                Walk(report, tables, meta, opened, medium, boot or boot_id()).run(progress)
    return report


def _opened(path: Path) -> int:
    """A descriptor of the device, to read only, with a lock that keeps daemons away. Raises CacheError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}: correct [cache] device") from None
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
            raise CacheError(f"{path}: a cache device is a block device or a regular file")
        if not lock(fd, fcntl.LOCK_SH):
            raise CacheError(
                f"{path}: a daemon uses this cache: 'forebay cache scrub' checks it meanwhile; or stop the daemon"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _superblocks(fd: int, path: Path, report: Report) -> Superblock:
    layout = read_superblock(fd, path)  # raises where neither is whole
    if layout is None:
        raise CacheError(f"{path}: holds no Forebay cache: correct [cache] device")
    for name, offset in (("superblock", 0), ("the superblock's copy", COPY_OFFSET)):
        if os.pread(fd, SUPERBLOCK, offset) != layout.pack():
            report.mending.superblocks = False
            report.wrong(f"{name} is damaged or out of date; the other one is good", "superblock")
    return layout


def _is_sane(layout: Superblock, fd: int, report: Report) -> bool:
    report.uuid, report.size, report.slots = str(layout.uuid), layout.size, layout.slots
    if layout.size > size_of(fd):
        report.hopeless = (
            f"the device has {size_of(fd)} bytes, and the cache on it {layout.size}: "
            "it was made smaller: give it its size back"
        )
    if report.hopeless:
        report.wrong(report.hopeless, "superblock")
    return not report.hopeless


def _lmdb_is_sound(index: Path, report: Report) -> bool:
    try:
        check_kinds(index)
        problems: list[str] = verify(str(index))  # type: ignore[no-untyped-call]
    except (VerifyError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        report.wrong(problem, "lmdb")
    if problems:
        report.hopeless = (
            f"the index at {index} is damaged, or missing: bring it back from a backup of the same instant, or start "
            "over with 'forebay cache format --force' and lose what only the cache has"
        )
    return not problems


def _meta(tables: Tables, layout: Superblock, report: Report) -> Meta | None:
    """What the index says of itself; None, and a fault in the report, if the check cannot go on with that."""
    try:
        if tables.missing:
            raise ValueError(f"no table '{tables.missing[0]}'")
        state = json.loads(tables.get("meta", b"state") or b"null")
        if not isinstance(state, dict) or state.get("format") not in FORMATS:
            raise ValueError("its state is of no format known here")
        meta = Meta(**state)
    except (TypeError, ValueError) as fault:
        report.hopeless = f"the index makes no sense: {fault}"
        report.wrong(report.hopeless)
        return None
    report.ended = "cleanly" if meta.clean else "not cleanly"
    if meta.uuid != str(layout.uuid):
        report.hopeless = (
            f"the device is cache {layout.uuid}, and the index belongs to {meta.uuid}: "
            "correct 'device' or 'state'"
        )
        report.wrong(report.hopeless)
        return None
    return meta
