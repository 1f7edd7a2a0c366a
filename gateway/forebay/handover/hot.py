# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A warm handover: what the host has cached that a VM leaves, for the one that it comes to: `IMAGE.forebay/hot`.

It has numbers of blocks, the hot ones first, in the form of a boot trace, which is checked as such: whoever may write
beside an image may write that, too. It says what to read of the image and nothing of what is in it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import trio

from forebay.boot.encoding import LONGEST, BadTraceError, decoded, encoded
from forebay.boot.files import Found
from forebay.boot.replay import Replay, check_room
from forebay.boot.trace import MOST_BLOCKS, WINDOW_MS, Read, Trace
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay.image.source import Source
from forebay.origin.addresses import FileAddress
from forebay.origin.threads import bounded
from forebay.origin.worker import syscalls
from forebay.sidecar import own_files
from forebay.sidecar.files import Sidecar
from forebay_cache.errors import IndexFault
from forebay_cache.format.entry import entry_at
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.slots.placement import MAIN, TOUCHED

log = logging.getLogger("forebay.handover")

T = TypeVar("T")

NAME, NEW = "hot", "hot.new"

SECONDS = 30.0
"""How long a store may take to write or read the list."""


async def leave(disk: Disk) -> None:
    """Write the list beside the image. What fails is told in the log, and costs nothing but a cold start."""
    with _as_a_hint(disk, "left"):
        image = disk.image
        hot, others = await _cached(image)
        await _in_thread(
            disk.source,
            lambda address: _write(address, encoded(_listed(image.size, hot, others), image.key)),
        )


async def forget(source: Source) -> None:
    """Remove the list, if there is one: nobody comes to read it. Raises OSError."""
    await _in_thread(source, lambda address: _take(address) and None)


async def warm(disk: Disk) -> None:
    """Bring in what the list names, behind guests' misses, and remove it. What fails is told in the log."""
    with _as_a_hint(disk, "read"):
        found = await _in_thread(disk.source, lambda address: _found(address, disk.size))
        if found is None or disk.view.clean is None:
            return
        check_room(disk.image, found)
        began = time.monotonic()
        await Replay(disk.image, found, disk.counters).run(lambda _done, _total: None)
        took = time.monotonic() - began
        log.info("%s: %d blocks were brought in in %.1f s", disk.name, len(found.usual), took)


@contextlib.contextmanager
def _as_a_hint(disk: Disk, what: str) -> Iterator[None]:
    """Around what may fail without any harm."""
    try:
        yield
    except (OSError, ForebayError, BadTraceError, IndexFault) as fault:
        why = getattr(fault, "strerror", None) or str(fault)
        log.info("%s: its list of hot blocks was not %s: %s", disk.name, what, why)


async def _cached(image: Image) -> tuple[list[int], list[int]]:
    """The blocks of the image that the cache has, at most MOST_BLOCKS each: those that were read again, and others."""
    state, pages = image.cache.slots.placement.state, image.layer.pages
    hot: list[int] = []
    others: list[int] = []
    for number in await pages.numbers():
        await pages.load([number])
        page = pages.page(number)
        for i in range(PAGE_BLOCKS):
            entry = entry_at(page, i)
            if entry.valid:
                of_slots = [state[slot] for slot, _ in entry.places()]
                is_hot = any(one & (TOUCHED | MAIN) for one in of_slots)
                (hot if is_hot else others).append(number * PAGE_BLOCKS + i)
        await trio.lowlevel.checkpoint()
        if len(hot) >= MOST_BLOCKS:
            break
        del others[MOST_BLOCKS:]
    return hot[:MOST_BLOCKS], others


def _listed(size: int, hot: list[int], others: list[int]) -> Trace:
    """The list, of an image of `size` bytes: the hot ones first, and of the others what there is room for."""
    blocks = {n: Read(0, 1, 1) for n in hot}
    blocks |= {n: Read(WINDOW_MS, 1, 1) for n in others[: MOST_BLOCKS - len(hot)]}
    return Trace(size, boots=1, recorded=int(time.time()), blocks=blocks)


async def _in_thread(source: Source, do: Callable[[FileAddress], T]) -> T:
    """What it returns of the image's address, called in a thread. Raises OSError."""
    address = source.address
    assert isinstance(address, FileAddress), "only files are handed over"
    with bounded(SECONDS, f"the list of hot blocks of {source.key}"):
        return await source.threads.run(lambda: do(address), background=True)
    raise AssertionError("bounded() raises")


def _write(address: FileAddress, data: bytes) -> None:
    with Sidecar(address) as sidecar:
        sidecar.open()
        fd = own_files.make(sidecar.fd, NEW, 0o644)
        try:
            syscalls.pwrite_all(fd, data, 0)
        finally:
            syscalls.close(fd)
        own_files.rename(sidecar.fd, NEW, NAME)


def _take(address: FileAddress) -> bytes | None:
    """What is in the list, which is removed; None if there is none, or it does not count."""
    with Sidecar(address) as sidecar, contextlib.suppress(FileNotFoundError):
        sidecar.open()
        try:
            data = own_files.read(sidecar.fd, NAME, sidecar.look_beside(), LONGEST + 1)
        except own_files.DoesNotCountError:
            return None
        own_files.remove(sidecar.fd, NEW)
        own_files.remove(sidecar.fd, NAME)
        return data
    return None


def _found(address: FileAddress, size: int) -> Found | None:
    """What the list says, which is removed: of an image of `size` bytes. As `_take`; raises BadTraceError, too."""
    data = _take(address)
    if data is None:
        return None
    trace = decoded(data)
    if trace.size != size:
        raise BadTraceError("of an image of another size")
    return Found.of(address.key, trace, NAME, None)
