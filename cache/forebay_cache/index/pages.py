# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The pages of one layer in memory.

A page says of 64 blocks where they lie (see ``format.entry``). A page is *loaded* when it is here; then it is as the
index has it, or newer. A lookup gives the page, or None where it has to be loaded first; :data:`EMPTY` is a page that
is loaded and has nothing. There is no other way to say that something is not there.
"""

from __future__ import annotations

import mmap
import sys
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol, TypeAlias

import trio

from forebay_cache.errors import IndexFault
from forebay_cache.format.entry import NO_SLOT, block_key, block_of_key, slot_of
from forebay_cache.format.geometry import PAGE_BLOCKS
from forebay_cache.index.place import Place

assert sys.byteorder == "little", "pages are stored as they lie in memory: little endian"

Page: TypeAlias = "array[int]"
"""64 words, or 128 of a private layer: see ``format.entry``."""

EMPTY: Page = array("Q", bytes(16 * PAGE_BLOCKS))
"""Stands for every page that has nothing: each lookup in it is a miss. It is never written to."""


NUMBERED = 1 << 17
"""The compiled core finds pages with a lower number, those of the first 512 GiB of an image, in a flat table."""
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_LISTED_AT_ONCE = 1024
"""Pages that are read from the index in one go to find out which there are."""
_LOOKED_AT_ONCE = 1024
"""Pages in memory that are looked through between two turns of others: less than half a millisecond."""
_AT_HAND = 1 << 15
"""So many pages of a layer are in one dict, which are all of most layers: when that grows it takes 2 ms at most."""


class _Index(Protocol):
    """See index.Index."""

    place: Place

    def page(self, layer: int, number: int) -> bytes | None: ...

    def pages(self, layer: int, after: int, limit: int) -> list[tuple[int, bytes]]: ...

    def page_numbers(self, layer: int, first: int, end: int, limit: int) -> list[int]: ...


class _Pages(dict[int, Page]):
    """The loaded pages of one layer, by number. Lookups are those of a dict; KeyError: it is not loaded.

    Only so many are in the dict itself, the others in small ones: to make a dict of a million grow takes 30 ms.
    """

    __slots__ = ("_others", "complete")

    def __init__(self, *, complete: bool) -> None:
        """``complete``: a page that is not here has nothing, and is EMPTY once it was looked for."""
        super().__init__()
        self.complete = complete
        self._others: dict[int, dict[int, Page]] = {}  # by number // _LOOKED_AT_ONCE

    def __missing__(self, number: int) -> Page:
        page = self._elsewhere(number).get(number)
        if page is None:
            if not self.complete:
                raise KeyError(number)
            page = EMPTY
            self.put(number, page)
        return page

    def _elsewhere(self, number: int) -> Mapping[int, Page]:
        return self._others.get(number // _LOOKED_AT_ONCE, _NONE)

    def find(self, number: int) -> Page | None:
        """The page, None where it is not here."""
        page = self.get(number)
        return self._elsewhere(number).get(number) if page is None else page

    def put(self, number: int, page: Page) -> bool:
        """Have it here, in the place of another one of that number if there is one. True if it is not in the dict."""
        is_elsewhere = number in self._elsewhere(number)
        if number in self or (len(self) < _AT_HAND and not is_elsewhere):
            self[number] = page
            return False
        self._others.setdefault(number // _LOOKED_AT_ONCE, {})[number] = page
        return True

    def drop(self, number: int) -> None:
        """Have none of that number here."""
        if self.pop(number, None) is None and (part := self._others.get(number // _LOOKED_AT_ONCE)):
            part.pop(number, None)
            if not part:
                del self._others[number // _LOOKED_AT_ONCE]

    def parts(self) -> list[dict[int, Page]]:
        """All of them, in dicts none of which is large."""
        return [self, *self._others.values()]


_NONE: Mapping[int, Page] = {}


class PageTable:
    """The pages of one layer that are loaded, and which of them the index does not have as they are.

    ``complete`` says that the index has nothing of the layer yet, so that no page ever has to be loaded. Pages of such
    a layer must not be shed.
    """

    __slots__ = (
        "_index",
        "_is_private",
        "_layer",
        "_loading",
        "_words",
        "addresses",
        "by_number",
        "dirty",
        "first_key",
        "look",
    )

    def __init__(
        self, index: _Index, layer: int, dirty: set[int], *, private: bool, complete: bool
    ) -> None:
        self._index = index
        self._layer = layer
        self._is_private = private
        self._words = (2 if private else 1) * PAGE_BLOCKS
        self.by_number = _Pages(complete=complete)
        """The loaded pages. Others only look a number up in it: KeyError says that the page is not loaded."""
        self._loading: dict[int, trio.Event] = {}
        self.dirty = dirty
        """Keys of the pages that the next commit stores, of all layers: ``first_key | number``."""
        self.first_key = block_key(layer, 0)
        self.look: Callable[[int], Page | None] = (
            self.by_number.__getitem__ if complete else self.by_number.get
        )
        """``look(number)``: the page, or None where it is not loaded."""
        self.addresses: memoryview | None = None
        """See :meth:`table_of_addresses`; None until the core has asked for it: there may be many layers at rest."""

    def __contains__(self, number: int) -> bool:
        return self.look(number) is not None

    def __len__(self) -> int:
        return sum(map(len, self.by_number.parts()))

    def table_of_addresses(self) -> memoryview:
        """By number, below NUMBERED: where the words of the page in ``by_number`` lie in memory; 0: look there.

        The core fills it in. It stays where it is, and takes memory only for what is used.
        """
        if self.addresses is None:
            self.addresses = memoryview(mmap.mmap(-1, 8 * NUMBERED, flags=_FLAGS)).cast("Q")
        return self.addresses

    def _has_changed(self, numbers: Iterable[int]) -> None:
        """Other pages than before have these numbers in ``by_number``, or none."""
        if self.addresses is None:
            return
        for number in numbers:
            if number < NUMBERED:
                self.addresses[number] = 0

    def held(self) -> Iterator[tuple[int, Page]]:
        """(number, page) of the loaded pages that are not EMPTY. No page may be loaded or made in between."""
        return (
            (n, page)
            for part in self.by_number.parts()
            for n, page in part.items()
            if page is not EMPTY
        )

    def loaded(self) -> Iterator[list[int]]:
        """The numbers of the pages that are loaded by then, in lists none of which is long."""
        return (list(part) for part in self.by_number.parts())

    def from_hand(self, hand: int, most: int) -> list[int]:
        """The numbers of some loaded pages, at most so many: those behind the first ``hand`` ones, and after the
        last one the first ones again.
        """
        count = len(self)
        if not count:
            return []
        first, found = hand % count, list[int]()
        for part in (*self.by_number.parts(), *self.by_number.parts()):
            found += islice(part, first, first + most - len(found))
            first = max(0, first - len(part))
            if len(found) >= min(most, count):
                break
        return found[: min(most, count)]

    async def numbers(self) -> list[int]:
        """The numbers of all pages that hold anything, in order, whether they are loaded or not. Raises IndexFault.

        Of those that are made meanwhile some may be missing.
        """
        found: dict[
            int, set[int]
        ] = {}  # by part of the image, so that they can be sorted in slices
        after = 0
        while not self.by_number.complete:
            read = self._index.pages
            listed = await trio.to_thread.run_sync(read, self._layer, after, _LISTED_AT_ONCE)
            for number, _ in listed:
                found.setdefault(number // _LOOKED_AT_ONCE, set()).add(number)
            if len(listed) < _LISTED_AT_ONCE:
                break
            after = listed[-1][0] + 1
        for loaded in self.loaded():
            for start in range(0, len(loaded), _LOOKED_AT_ONCE):
                for number in loaded[start : start + _LOOKED_AT_ONCE]:
                    if self._has(number):
                        found.setdefault(number // _LOOKED_AT_ONCE, set()).add(number)
                await trio.lowlevel.checkpoint()
        numbers: list[int] = []
        for part in sorted(found):
            numbers += sorted(found[part])
            await trio.lowlevel.checkpoint()
        return numbers

    def _has(self, number: int) -> bool:
        """True if the page is loaded and is not EMPTY."""
        page = self.by_number.find(number)
        return page is not None and page is not EMPTY

    def _held_in(self, first: int, end: int) -> set[int]:
        """The numbers of the loaded pages in a range of numbers that are not EMPTY."""
        if end - first < len(self):
            return {n for n in range(first, end) if self._has(n)}
        return {n for n, page in self.held() if first <= n < end}

    async def numbers_in(self, first: int, end: int, most: int) -> tuple[list[int], int]:
        """The numbers of the pages from ``first`` on and before ``end`` that hold anything, and up to where.

        They are all that there are before the number that is returned second; if there are more than about ``most``,
        that is less than ``end``. The range must not be much larger than what can be looked through at once. Raises
        IndexFault.
        """
        found = self._held_in(first, end)
        if not self.by_number.complete:
            listed = await trio.to_thread.run_sync(
                self._index.page_numbers, self._layer, first, end, most
            )
            found.update(listed)
            found |= self._held_in(first, end)  # what was made while the index was asked
            if len(listed) == most:
                end = listed[-1] + 1
        return sorted(n for n in found if n < end), end

    async def load_all(self, numbers: Iterable[int]) -> None:
        """As :meth:`load`, with one thread for all of them instead of one for each."""
        wanted = [n for n in numbers if self.look(n) is None]
        missing = [n for n in wanted if n not in self._loading]
        if missing:
            event = trio.Event()
            self._loading.update(dict.fromkeys(missing, event))
            try:
                for number, raw in zip(
                    missing, await trio.to_thread.run_sync(self._read, missing), strict=True
                ):
                    self.adopt(number, raw)
            finally:
                for number in missing:
                    del self._loading[number]
                event.set()
        await self.load(wanted)

    def _read(self, numbers: list[int]) -> list[bytes | None]:
        """What the index has of these pages; runs in a thread."""
        return [self.ask(number) for number in numbers]

    def ask(self, number: int) -> bytes | None:
        """What the index has of a page. Raises IndexFault. One of a clean layer has nothing where the index is lost."""
        try:
            return self._index.page(self._layer, number)
        except IndexFault:
            if self._is_private or not self._index.place.is_lost:
                raise
            return None

    async def load(self, numbers: Iterable[int]) -> None:
        """Have pages loaded. Raises IndexFault. A page that somebody else is loading is waited for.

        When this returns, the last one is loaded; others may have been shed while it was: see :meth:`page`.
        """
        for number in numbers:
            while self.look(number) is None:
                waiting = self._loading.get(number)
                if waiting is not None:
                    await waiting.wait()
                    continue
                self._loading[number] = event = trio.Event()
                try:
                    raw = await trio.to_thread.run_sync(self.ask, number)
                    self.adopt(number, raw)
                finally:
                    del self._loading[number]
                    event.set()

    def page(self, number: int) -> Page:
        """The page, at once. Raises IndexFault.

        For a page that was loaded not long ago: should it have been shed since, the index has it as it was, and little
        further away than memory.
        """
        page = self.look(number)
        if page is None:
            page = self.adopt(number, self.ask(number))
        return page

    def adopt(self, number: int, raw: bytes | None) -> Page:
        """Take a page as the index has it (None: it has none), unless a newer one is loaded. Returns the newest."""
        page = self.by_number.find(number)
        if page is None:
            page = EMPTY if raw is None else array("Q", raw)
            self._put(number, page)
        return page

    def _put(self, number: int, page: Page) -> None:
        if self.by_number.put(number, page) and not self.by_number.complete:
            self.look = self.by_number.find

    def writable(self, number: int) -> Page:
        """The page, which must be loaded, to be changed by the caller; the next commit stores it."""
        page = self.by_number[number]
        if page is EMPTY:
            page = array("Q", bytes(8 * self._words))
            self._put(number, page)
            self._has_changed([number])
        self.dirty.add(self.first_key | number)
        return page

    def stored(self, keys: Iterable[int]) -> list[tuple[bytes, bytes]]:
        """(key, words) of pages that are loaded, as the index stores them. ``keys`` are those of ``dirty``."""
        pages = self.by_number
        return [(key.to_bytes(8, "big"), pages[block_of_key(key)].tobytes()) for key in keys]

    def names_no_more(self, key: int, raw: bytes | None) -> bool:
        """True if a loaded page of a clean layer names no slot that ``raw`` does not name for the same block.

        ``key`` is that of ``dirty``; ``raw`` is what the index has of the page, None: nothing.
        """
        page = self.by_number[block_of_key(key)]
        before = array("Q", raw or bytes(8 * PAGE_BLOCKS))
        return all(
            slot_of(word) in (NO_SLOT, slot_of(was)) for word, was in zip(page, before, strict=True)
        )

    def shed(self, most: int) -> int:
        """Forget up to ``most`` pages that the index has as they are. Returns how many. Not during a commit."""
        dirty, first = self.dirty, self.first_key
        clean = (n for part in self.by_number.parts() for n in part if first | n not in dirty)
        numbers = list(islice(clean, most))
        for number in numbers:
            self.by_number.drop(number)
        self._has_changed(numbers)
        return len(numbers)

    def forget(self, numbers: Collection[int]) -> None:
        """Forget pages of a dead layer that have nothing any more, in the index neither."""
        for number in numbers:
            self.by_number.drop(number)
        self._has_changed(numbers)
