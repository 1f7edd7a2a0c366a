# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is on record of each image that this host knows, beside its blocks: in the records of the cache's index.

An entry is made when the image is first used, by a disk or by a warm. It goes with the image's blocks, unless the
operator has said something about the image: a tag and a pin are of the name, and outlive purge, an image that was
replaced, and one that is gone, since an image of that name may come back.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import lmdb

from forebay.errors import ForebayError
from forebay_cache import Cache, CacheError

KIND = "known"
"""Under which kind of record the index keeps them; the name is the key of the image."""

MOST_MARKED = 4096
"""Images that may have tags or a pin: their entries stay until somebody takes these away."""

MOST_TAGS = 32
"""Tags of one image."""

NOTED_AGAIN = 60
"""Seconds after which the use of an image is noted anew: a hundred attaches are not to store a hundred entries."""


@dataclass(frozen=True)
class Entry:
    """What the index keeps of an image. The names of the fields are part of the format."""

    size: int | None = None
    """Bytes, when it was used last; None where nobody has opened it since entries are kept."""
    allocated: int | None = None
    """Bytes that it took in its store then; None where that cannot be told."""
    format: str | None = None
    """The format that its first bytes were of then; None where nobody has looked."""
    pinned: bool = False
    tags: list[str] = field(default_factory=list)
    """Sorted."""
    trace: dict[str, Any] | None = None
    """What was known of its boot trace when that was looked at last: some keys of `Found.told`."""
    used: int = 0
    """When a disk or a warm used it last, seconds since the epoch."""

    @classmethod
    def read(cls, found: dict[str, Any]) -> Self:
        """The entry that the index has as `found`. Keys of newer versions are left out, what is missing is empty."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    @property
    def is_marked(self) -> bool:
        """True if the operator has said something about the image: then the entry stays, whatever the cache has."""
        return self.pinned or bool(self.tags)


class Entries:
    """The entries of all images. A change is in memory at once, and durable after `commit`."""

    def __init__(self, cache: Cache, index: Path) -> None:
        """`index` is where the index lies: told where it cannot be written."""
        self._cache = cache
        self._index = index

    def get(self, key: str) -> Entry | None:
        """That of the image with this key; None where there is none."""
        found = self._cache.records.get(KIND, key)
        return None if found is None else Entry.read(found)

    def keys(self) -> set[str]:
        """The keys of the images that have one."""
        return set(self._cache.records.all(KIND))

    def is_pinned(self, key: str) -> bool:
        """True if the operator has pinned the image."""
        entry = self.get(key)
        return entry is not None and entry.pinned

    def pinned(self) -> list[str]:
        """The keys of the images that are pinned."""
        known = self._cache.records.all(KIND)
        return [key for key, found in known.items() if found.get("pinned")]

    def marked(self) -> set[str]:
        """The keys of the images of which the operator has said something."""
        known = self._cache.records.all(KIND)
        return {key for key, found in known.items() if found.get("pinned") or found.get("tags")}

    def put(self, key: str, entry: Entry | None) -> None:
        """Keep an entry, or (None) remove that of the image. Raises ForebayError where too many have tags or a pin."""
        was = self.get(key)
        is_new = entry is not None and entry.is_marked and not (was and was.is_marked)
        if is_new and len(self.marked()) >= MOST_MARKED:
            raise ForebayError(
                f"{MOST_MARKED} images have tags or are pinned: take these from others first, "
                "with forebay untag and forebay unpin"
            )
        self._cache.records.put(KIND, key, None if entry is None else asdict(entry))

    def note_used(
        self,
        key: str,
        size: int | None = None,
        allocated: int | None = None,
        image_format: str | None = None,
    ) -> None:
        """Note that the image is in use now, and how large it is, where that is known, and of which format."""
        was = self.get(key) or Entry()
        entry = replace(
            was,
            size=was.size if size is None else size,
            allocated=was.allocated if size is None else allocated,
            format=image_format or was.format,
        )
        now = int(time.time())
        if entry != was or not 0 <= now - was.used < NOTED_AGAIN:
            self._cache.records.put(KIND, key, asdict(replace(entry, used=now)))

    def forget_unmarked(self, key: str) -> None:
        """Remove the entry of an image of which the cache has nothing, unless the operator has said something of it."""
        entry = self.get(key)
        if entry is not None and not entry.is_marked:
            self.put(key, None)

    async def change(self, key: str, was: Entry, now: Entry) -> None:
        """Have `now` on record, durably, in the place of `was`. Raises ForebayError; what the operator has said of the
        image is then as in `was`, unless somebody has said something else of it meanwhile.
        """
        self.put(key, now)
        try:
            await commit_records(self._cache, self._index)
        except BaseException:
            found = self.get(key)
            if found is not None and (found.pinned, found.tags) == (now.pinned, now.tags):
                self.put(key, replace(found, pinned=was.pinned, tags=was.tags))
            raise

    async def commit(self) -> None:
        """Make all changes durable. Raises ForebayError where the index cannot be written."""
        await commit_records(self._cache, self._index)


def tagged(entry: Entry, tags: Iterable[str]) -> Entry:
    """The entry with these tags more. Raises ForebayError for too many."""
    wanted = sorted({*entry.tags, *tags})
    if len(wanted) > MOST_TAGS:
        raise ForebayError(f"an image has at most {MOST_TAGS} tags: take others away first")
    return replace(entry, tags=wanted)


def untagged(entry: Entry, tags: Iterable[str]) -> Entry:
    """The entry without these tags; those that it does not have are passed over."""
    return replace(entry, tags=sorted({*entry.tags} - {*tags}))


async def commit_records(cache: Cache, index: Path) -> None:
    """Make what was put on record durable. Raises ForebayError where the index, which lies there, cannot be written."""
    try:
        await cache.commit.records()
    except (OSError, CacheError, lmdb.Error) as fault:
        raise ForebayError(f"{index} cannot be written ({fault}): make room there") from fault
