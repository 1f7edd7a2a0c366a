# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Repair of a cache that nobody has open: what a check found wrong leaves the index.

First what would keep a start from reading the index, then a start's own recovery, which brings what the journal holds
into the index, then what is still wrong. Clean blocks are only dropped: the image has them. Private data is dropped
only if told to, for what is read there afterwards is older.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

from forebay_cache.device.extend import Progress
from forebay_cache.device.files import open_device
from forebay_cache.device.superblock import read_superblock, write_superblock
from forebay_cache.errors import CacheError
from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    block_of_key,
    entry_at,
    layer_of_key,
    pack,
    pack_second,
    put_entry,
    side_of,
    slots_in,
    valid_of,
    zeros_only,
)
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.format.records import PAGE_KEY, LayerRecord
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index
from forebay_cache.offline.check import check
from forebay_cache.offline.opening import open_cache
from forebay_cache.offline.report import Fix, Report


@dataclass
class Repaired:
    """What a repair found and did."""

    before: Report
    """What a check found at first ..."""
    after: Report
    """... and what one found at the end: that is private, and stayed because nobody said that it may be dropped."""
    dropped_clean: int = 0
    """Blocks, or whole pages, of clean layers that were dropped."""
    dropped_private: int = 0
    """The same of private layers."""


def repair(
    device: Path,
    index: Path,
    progress: Progress,
    *,
    drop_dirty: bool = False,
    boot: str | None = None,
) -> Repaired:
    """Mend what can be mended; private data is dropped only with ``drop_dirty``.

    ``progress`` is called with (bytes done, bytes in all) of the first check; ``boot`` stands for the kernel's boot id.
    It may be killed at any moment, and run again. Raises CacheError when the cache is in use or beyond repair, and
    OSError.
    """
    before = check(device, index, progress, boot)
    if before.hopeless:
        raise CacheError(before.hopeless)
    done = Repaired(before, before)
    if not before.damaged:
        return done
    if not before.mending.superblocks:
        _write_superblocks(device)
    _mend(index, before, done, drop_dirty=drop_dirty, entries=True)
    if drop_dirty or not _bars_the_start(before):
        open_cache(device, index, boot=boot).release()
    now = check(device, index, lambda _done, _total: None, boot)
    _mend(index, now, done, drop_dirty=drop_dirty, entries=False)
    done.after = check(device, index, lambda _done, _total: None, boot)
    return done


def _bars_the_start(report: Report) -> bool:
    """True if private entries make no sense: then these stay, and so does what the journal holds."""
    entries = any(fix.entry and fix.private for fix in report.mending.fixes.values())
    return entries or any(report.mending.pages.values()) or any(report.mending.entries.values())


def _write_superblocks(path: Path) -> None:
    """Write the superblock and its copy anew, from the one that is whole."""
    fd = open_device(path)
    try:
        layout = read_superblock(fd, path)
        assert layout is not None, "it was there a moment ago"
        write_superblock(fd, layout)
    finally:
        os.close(fd)


def _mend(path: Path, report: Report, done: Repaired, *, drop_dirty: bool, entries: bool) -> None:
    """Change the index, in one commit. ``entries``: only what makes no sense, the device's content is for later."""
    pages = {key: b"" for key, private in report.mending.pages.items() if drop_dirty or not private}
    fixes = {
        key: fix
        for key, fix in report.mending.fixes.items()
        if (drop_dirty or not fix.private) and (fix.entry or not entries)
    }
    forgotten = [
        entry for entry, private in report.mending.entries.items() if drop_dirty or not private
    ]
    if not (pages or fixes or forgotten) and report.mending.totals:
        return
    if any(report.mending.entries.values()) and not drop_dirty:
        return  # nothing can be counted while layers are missing
    index = Index(path, report.slots)
    try:
        index.forget_now(forgotten)
        changes = Changes(index.meta)
        changes.pages = sorted((pages | _mended_pages(index, fixes, done)).items())
        changes.layers = _counted(index, dict(changes.pages))
        if any(table == "records" for table, _ in forgotten):
            changes.layers.update(_without_clean(index))
        index.commit_now(changes)
    finally:
        index.close()
    for key in pages:
        _count(done, private=report.mending.pages[key])
    for entry in forgotten:
        _count(done, private=report.mending.entries[entry])


def _without_clean(index: Index) -> dict[int, LayerRecord | None]:
    """A record says what an image looked like when its blocks were cached: without it nobody knows if it still does."""
    layers = index.layers().items()
    return {ident: replace(record, dead=True) for ident, record in layers if not record.private}


def _count(done: Repaired, *, private: bool) -> None:
    if private:
        done.dropped_private += 1
    else:
        done.dropped_clean += 1


def _mended_pages(index: Index, fixes: dict[int, Fix], done: Repaired) -> dict[bytes, bytes]:
    found: dict[bytes, array[int]] = {}
    for block, fix in fixes.items():
        ident, number = layer_of_key(block), block_of_key(block) // PAGE_BLOCKS
        key = PAGE_KEY.pack(ident, number)
        if key not in found:
            found[key] = array("Q", index.page(ident, number) or b"")
        if found[key]:
            _mend_block(found[key], block_of_key(block) % PAGE_BLOCKS, fix)
            _count(done, private=fix.private)
    return {key: page.tobytes() for key, page in found.items()}


def _mend_block(page: array[int], i: int, fix: Fix) -> None:
    if fix.entry:
        mended = Entry(0)
    elif len(page) == PAGE_BLOCKS:
        mended = Entry(zeros_only(page[i]))
    else:
        mended = _without(entry_at(page, i), fix.sectors)
    put_entry(page, i, mended)


def _without(entry: Entry, sectors: int) -> Entry:
    """What is left of a private entry without these sectors; a slot in which nothing lies any more is not named."""
    first, second = (
        slot if mask & ~sectors else NO_SLOT
        for slot, mask in zip(entry.slots, entry.sides, strict=True)
    )
    valid = entry.valid & ~sectors
    side = side_of(entry.second) if second >= 0 else 0
    second = pack_second(second, side, entry.provisioned & valid)
    return Entry(pack(first, entry.zero & valid, valid), second)


def _counted(index: Index, changed: dict[bytes, bytes]) -> dict[int, LayerRecord | None]:
    """The layers' records with the totals that their pages have, when some of them are changed."""
    known = index.layers()
    totals = {ident: [0, 0] for ident in known}
    start = b""
    while found := index.all_pages(start, 512):
        for key, raw in found:
            ident, _ = PAGE_KEY.unpack(key) if len(key) == PAGE_KEY.size else (-1, 0)
            if ident in totals:
                _add(totals[ident], changed.get(key, raw))
        start = found[-1][0] + b"\0"
    return {
        ident: replace(known[ident], slots=slots, sectors=sectors)
        for ident, (slots, sectors) in totals.items()
        if (known[ident].slots, known[ident].sectors) != (slots, sectors)
    }


def _add(total: list[int], raw: bytes) -> None:
    raw = raw[: len(raw) // 8 * 8]
    total[0] += len(slots_in(raw))
    total[1] += sum(valid_of(word).bit_count() for word in array("Q", raw)[:PAGE_BLOCKS])
