# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is on record of each disk, so that it comes back after a restart: in the records of the cache's index."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from forebay.catalogue.entries import commit_records
from forebay.config.fields import PeerRule
from forebay.config.keys import KEYS, RATES
from forebay.config.model import Config, DiskSettings
from forebay.doors.tenant import Rule
from forebay.errors import ForebayError
from forebay.formats.magic import RAW
from forebay.handover.phase import Phase
from forebay.image.source import Source
from forebay.keeping.kept import Kept, KeptOverlays, identity_of
from forebay.origin.addresses import Address, ScratchAddress, resolve
from forebay.origin.protocol import Identity
from forebay_cache import Cache

KIND = "disk"
"""Under which kind of record the index keeps them; the name is that of the disk."""


KINDS = {"read_only": "read-only", "overlay": "an overlay", "gives_way": "one that gives way"}
"""Of a disk, with the words for them."""

SETTINGS = ("mode", "cache_size", "preload", *RATES)
"""What an attach may say of a disk, and its store otherwise."""

LIMITS = ("cache_size", "preload")
"""Of these, what stands in the disk's status as the operator asked for it."""


@dataclass(frozen=True)
class DiskRecord:
    """What the index keeps of a disk: what the operator asked for, not what the configuration adds to it.

    `size` in bytes, as found at attach: a disk comes up without its origin. `mode` and
    `peer` are None where the store's settings hold; `peer_label` and `peer_user` where nobody told.
    """

    image: str
    key: str
    size: int
    read_only: bool = False
    overlay: bool = False
    mode: str | None = None
    peer: PeerRule | None = None
    peer_label: str | None = None
    peer_user: int | None = None
    gives_way: bool = False
    format: str | None = None
    """`raw`: the bytes of the image, whatever format they are of. None: the image has to be a raw disk. Any other: the
    virtual disk in an image of that format."""
    keep: bool = False
    """True if what an overlay has is kept when it is detached."""
    committing: bool = False
    """True while what an overlay has is being written to its image: a start goes on with that."""
    leaving: bool = False
    """True once the disk is being forgotten, whatever comes: a start goes on with that."""
    keeps: str = ""
    """How a conflict was just resolved, `mine` or `image`: until the cache has followed, which a start goes on with."""
    conflict: str = ""
    """Why the disk is kept in conflict, whatever its image looks like: until it is resolved."""
    handover: str = Phase.NONE.value
    """A `Phase`: how far the handover of the image is, where that is not the disk's own."""
    move: str = ""
    """Of an overlay that was prepared to be handed over: which move, as the files beside its image have it."""
    is_behind: bool = False
    """True if other disks have gone on with the image since: what the cache has of that is not this disk's."""
    said: dict[str, Any] = field(default_factory=dict)
    """What was asked for of this disk, by key of KEYS, but for the mode; without those where the store's hold."""

    @classmethod
    def read(cls, found: dict[str, Any]) -> Self:
        """The record that the index has as `found`. Keys of newer versions are left out, what is missing is empty."""
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        said = {key: found.get(key) for key in LIMITS} | known.pop("said", {})
        record = cls(**{"image": "", "key": "", "size": 0, **known})
        return record.with_settings(said)

    def write(self) -> dict[str, Any]:
        """What the index is to keep. LIMITS stand where versions without `said` look for them."""
        return {**asdict(self), **self.own(LIMITS)}

    @property
    def writes(self) -> bool:
        """True if the disk writes its image, be it only now."""
        return not self.read_only and (self.committing or not self.overlay)

    def settings(self, config: Config, store: str | None) -> DiskSettings:
        """The settings of the disk, with what the configuration says now. Raises ForebayError.

        What an overlay's boot reads is brought in, unless anybody has said something else.
        """
        own = self.own()
        is_unsaid = own["preload"] is None and not config.says_preload(store)
        if self.overlay and is_unsaid:
            own["preload"] = "trace"
        return config.disk_settings(store, own)

    def own(self, keys: Iterable[str] = (*KEYS, "peer")) -> dict[str, Any]:
        """What was asked for of this disk, by key; None where the store's settings hold."""
        known = {**self.said, "mode": self.mode, "peer": self.peer}
        return {key: known.get(key) for key in keys}

    def with_settings(self, changes: Mapping[str, Any]) -> Self:
        """The same with other settings, by key of KEYS; None: what the store says."""
        said = {**self.said, **changes}
        mode = said.pop("mode", self.mode)
        return replace(self, mode=mode, said={k: v for k, v in said.items() if v is not None})

    def rule(self, settings: DiskSettings) -> Rule:
        """Which processes may use the disk, by its settings."""
        return Rule(settings.peer, self.peer_label, self.peer_user)

    def with_rule(self, rule: Rule) -> Self:
        """The same for the processes that the rule names."""
        return replace(self, peer=rule.peer, peer_label=rule.label, peer_user=rule.user)

    def of_image(self, key: str, size: int) -> Self:
        """The same of the image that was found; `size` in bytes."""
        return replace(self, key=key, size=size)

    def in_format(self, found: str) -> Self:
        """The same of an image whose format was found; a raw disk is one without being called so."""
        return self if found == "raw" else replace(self, format=found)

    def resolved(self, keeps: str, size: int) -> Self:
        """The same of a disk that goes on with its image as it is now, which has `size` bytes."""
        return replace(self, keeps=keeps, size=size, conflict="")

    def followed(self) -> Self:
        """The same once the cache has followed."""
        return replace(self, keeps="", is_behind=False)

    def in_conflict(self, why: str, *, behind: bool = False) -> Self:
        """The same of a disk that is to stay in conflict."""
        return replace(self, conflict=why, is_behind=self.is_behind or behind)

    def as_committing(self, *, begins: bool) -> Self:
        """The same of an overlay whose changes are being written to its image, or (not `begins`) are there."""
        return replace(self, committing=begins)

    def coming(self, comes: bool) -> Self:
        """The same of a disk whose image another host is to hand over, or (not `comes`) of one that is its own."""
        return replace(self, handover=(Phase.INCOMING if comes else Phase.NONE).value)

    def comes(self, left: int) -> bool:
        """True if another host is to hand it over, to a disk of which the cache has `left` bytes: those of an image are
        its own then, and those of an overlay may be some of it.
        """
        return self.handover == Phase.INCOMING and (self.overlay or not left)

    def as_leaving(self) -> Self:
        """The same of a disk that is being forgotten."""
        return replace(self, leaving=True)


class DiskRecords:
    """The records of all disks. A change is in memory at once, and durable after `commit`."""

    def __init__(self, cache: Cache, index: Path) -> None:
        """`index` is where the index lies: told where it cannot be written."""
        self._cache = cache
        self._index = index

    def all(self) -> dict[str, DiskRecord]:
        """By the disk's name, in the order of the names."""
        known = self._cache.records.all(KIND)
        return {name: DiskRecord.read(known[name]) for name in sorted(known)}

    def keys(self) -> dict[str, str]:
        """By the disk's name, the key of its image."""
        return {name: found.get("key", "") for name, found in self._cache.records.all(KIND).items()}

    def put(self, name: str, record: DiskRecord | None) -> None:
        """Keep a record, or (None) remove that of the disk."""
        self._cache.records.put(KIND, name, None if record is None else record.write())

    async def change(self, name: str, was: DiskRecord, now: DiskRecord) -> None:
        """Have `now` on record, durably, in the place of `was`. Raises ForebayError; `was` is on record then."""
        self.put(name, now)
        try:
            await self.commit()
        except BaseException:
            self.put(name, was)
            raise

    async def remove(self, name: str, was: DiskRecord) -> None:
        """Have no record of the disk, durably. Raises ForebayError; `was` is on record then."""
        self.put(name, None)
        try:
            await self.commit()
        except BaseException:
            self.put(name, was)
            raise

    async def take_over(self, name: str, record: DiskRecord, kept: KeptOverlays) -> None:
        """Have it on record, durably, in the place of what is kept of that name. Raises ForebayError; that is then."""
        before = kept.get(name)
        kept.put(name, None)
        self.put(name, record)
        try:
            await self.commit()
        except BaseException:
            kept.put(name, before)
            self.put(name, None)
            raise

    async def commit(self) -> None:
        """Make all changes durable. Raises ForebayError where the index cannot be written."""
        await commit_records(self._cache, self._index)


async def in_conflict(
    name: str, wanted: DiskRecord, kept: Kept, source: Source, cache: Cache
) -> DiskRecord | None:
    """The record of a kept overlay that is attached again to an image which was changed; None: it was not.

    The image of `source` is open. Raises OSError.
    """
    assert source.prepared is not None, "it was opened just now"
    found = await source.prepared.identity()
    if kept.is_of(found):
        return None
    known = identity_of(cache, source.key)
    others_went_on = known is not None and Identity(*known).content == found.content
    record = wanted.of_image(source.key, kept.record["size"])
    return record.in_conflict(
        f"{source.key} was changed while '{name}' was detached: 'forebay resolve {name}' keeps its changes, or drops "
        "them, or saves them elsewhere",
        behind=others_went_on,
    )


def difference(config: Config, there: DiskRecord, wanted: DiskRecord) -> str:
    """What the disk that is there has otherwise than the one that is wanted, in words; empty if nothing.

    What nobody told of mode and sizes is what the store says; of processes, it is what is there. Raises ForebayError
    for an image that cannot be.
    """
    image = resolve(config, wanted.image)
    if not _is_of(config, there, image):
        return f"of {there.image}"
    if isinstance(image, ScratchAddress):
        wanted = replace(wanted, overlay=True)
    if (there.format == RAW) != (wanted.format == RAW):
        return "which shows its image in another way"
    for key, word in KINDS.items():
        if getattr(there, key) != getattr(wanted, key):
            return f"which is {word}" if getattr(there, key) else f"which is not {word}"
    if wanted.keep and not there.keep:
        return "whose changes are not kept"
    for key in ("peer", "peer_label", "peer_user"):
        if getattr(wanted, key) not in (None, getattr(there, key)):
            return "which is for other processes"
    had, has = (replace(one, peer=None).settings(config, image.store) for one in (there, wanted))
    others = [key for key in SETTINGS if getattr(had, key) != getattr(has, key)]
    return f"with another {others[0].replace('_', ' ')}" if others else ""


def _is_of(config: Config, there: DiskRecord, image: Address) -> bool:
    try:
        return resolve(config, there.image) == image
    except ForebayError:  # its store is not configured any more
        return False
