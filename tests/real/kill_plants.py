# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the tests do to a daemon from inside: end it by SIGKILL at a named point, or take a promise away.

The product knows nothing of this: kill_launcher.py replaces functions in the daemon it has just forked. A point is a
function of the product; a kill comes before its n-th call, or after it has returned and before its caller goes on.
"""

import functools
import importlib
import inspect
import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHARED_BYTES = 4096

_COUNT = struct.Struct("<Q")


class Counters:
    """Shared with the daemon: whether its plant is armed, and how often each side of each point was passed."""

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared

    def _get(self, at: int) -> int:
        return int(_COUNT.unpack_from(self._shared, at)[0])

    def _put(self, at: int, value: int) -> None:
        _COUNT.pack_into(self._shared, at, value)

    def reset(self, *, armed: bool) -> None:
        self._shared[:] = bytes(SHARED_BYTES)
        self.arm(armed)

    def arm(self, armed: bool = True) -> None:
        """From now on passings count."""
        self._put(0, armed)

    @property
    def armed(self) -> bool:
        return bool(self._get(0))

    def passed(self, side: int) -> int:
        """Count one more passing of the side with that number of SIDES; how many there are now."""
        count = self._get(8 + 8 * side) + 1
        self._put(8 + 8 * side, count)
        return count

    def counts(self) -> dict[str, int]:
        """By side, those that were passed."""
        found = {name: self._get(8 + 8 * i) for i, name in enumerate(SIDES)}
        return {name: count for name, count in found.items() if count}


# ----------------------------------------------------------------------------------------------------------- points


@dataclass(frozen=True)
class Point:
    """`target` is `module:function` or `module:Class.method`; `only` says which calls count, by their arguments."""

    name: str
    target: str
    only: Callable[..., bool] | None = None


def _slots(device: Any, offset: int, _data: Any) -> bool:
    return bool(offset >= device.data_offset)


def _disk(_cache: Any, kind: str, *_: Any) -> bool:
    return kind == "disk"


def _image(_cache: Any, kind: str, *_: Any) -> bool:
    return kind == "image"


def _renamed(name: str) -> Callable[..., bool]:
    def only(source: Any, *_: Any, **_options: Any) -> bool:
        return bool(source == name)

    return only


CACHE, GATEWAY = "forebay_cache", "forebay"

POINTS = (
    # the cache device
    Point("data pwrite", f"{CACHE}.device.device:Device.write", _slots),
    Point("intent record append", f"{CACHE}.durable.journal:Journal.write"),
    Point("publish", f"{CACHE}.durable.intent:Intent.publish"),
    Point("fdatasync begun", f"{CACHE}.device.syncer:Syncer._begin"),
    Point("fdatasync ended", f"{CACHE}.device.syncer:Syncer._done_with"),
    # the index
    Point("snapshot", f"{CACHE}.durable.commit:Committer.snapshot"),
    Point("LMDB commit", f"{CACHE}.index.index:Index._commit"),
    Point("journal truncation", f"{CACHE}.durable.journal:Journal.trim"),
    Point("slots given free", f"{CACHE}.slots.quarantine:Quarantine.release"),
    Point("layer made", f"{CACHE}.layers.registry:Layers.make"),
    Point("layer dropped", f"{CACHE}.layers.registry:Layers.drop"),
    Point("layer reclaimed", f"{CACHE}.layers.reclaim:Reclaimer._empty_page"),
    Point("disk record", f"{CACHE}.durable.records:Records.put", _disk),
    Point("image record", f"{CACHE}.durable.records:Records.put", _image),
    # clean blocks
    Point("fill written", f"{CACHE}.blocks.store:_write"),
    Point("fill published", f"{CACHE}.blocks.store:_publish"),
    Point("eviction", f"{CACHE}.layers.removal:Removal.evict"),
    Point("region heated", f"{CACHE}.durable.hot:HotRegions.heat"),
    Point("region cooled", f"{CACHE}.durable.hot:HotRegions.cool"),
    Point("clean sectors dropped", f"{CACHE}.blocks.clean:drop"),
    # write-back
    Point("freeze", f"{GATEWAY}.checkpoint.dirty:Dirty.freeze"),
    Point("shadowed sectors dropped", f"{CACHE}.blocks.settle:_drop_shadowed"),
    Point("settle copied", f"{CACHE}.blocks.settle:_copy_sectors"),
    Point("block handed over", f"{CACHE}.blocks.settle:_hand_over"),
    Point("layer settled", f"{GATEWAY}.checkpoint.dirty:Dirty.remove"),
    # the origin
    Point("origin write", f"{GATEWAY}.origin.calls:SystemCalls.pwritev"),
    Point("origin fallocate", f"{GATEWAY}.origin.calls:SystemCalls.fallocate"),
    Point("origin fdatasync", f"{GATEWAY}.origin.calls:SystemCalls.fdatasync"),
    Point("origin fsync", f"{GATEWAY}.origin.calls:SystemCalls.fsync"),
    # the redo journal
    Point("redo create", f"{GATEWAY}.sidecar.redo:RedoFile.__init__"),
    Point("redo add", f"{GATEWAY}.sidecar.redo:RedoFile._append"),
    Point("redo commit", f"{GATEWAY}.sidecar.redo:RedoFile.commit"),
    Point("redo rename", "os:rename", _renamed("redo.new")),
    Point("redo remove", f"{GATEWAY}.sidecar.redo:remove"),
    Point("redo apply", f"{GATEWAY}.sidecar.redo:apply"),
    # the owner marker
    Point("owner marker", f"{GATEWAY}.sidecar.tenure:Tenure.write"),
    Point("owner token", f"{GATEWAY}.sidecar.files:Sidecar._take_token"),
    Point("owner swept", f"{GATEWAY}.sidecar.tenure:sweep"),
    Point("owner rename", "os:rename", _renamed("owner.new")),
    Point("owner claim", f"{GATEWAY}.sidecar.marker:Marker._begin"),
    Point("owner removal", f"{GATEWAY}.sidecar.files:Sidecar.remove"),
    # attach, detach, change of mode
    Point("attach: origin opened", f"{GATEWAY}.image.source:Source.prepare"),
    Point("attach: disk opened", f"{GATEWAY}.daemon.arrivals:Arrivals._opened"),
    Point("attach: socket", f"{GATEWAY}.doors.accepting:Accepting.open"),
    Point("detach: drained", f"{GATEWAY}.disk.disk:Disk.drain"),
    Point("detach: hung up", f"{GATEWAY}.daemon.departures:Departures._shut"),
    Point("detach: closed", f"{GATEWAY}.disk.disk:Disk.close"),
    Point("detach: released", f"{GATEWAY}.image.source:Source.release"),
    Point("mode: finished", f"{GATEWAY}.checkpoint.schedule:WriteBack.finish"),
    Point("mode: chosen", f"{GATEWAY}.disk.modes:Modes.choose"),
    Point("mode: changed", f"{GATEWAY}.disk.modes:Modes._change"),
    Point("pinned", f"{CACHE}.blocks.pin:pin_layer"),
    # a start
    Point("start: replayed", f"{CACHE}.offline.replay:apply"),
    Point("start: committed", f"{CACHE}.offline.recovery:_commit_start"),
    Point("start: journal of the image", f"{GATEWAY}.sidecar.redo:recover"),
)

SIDES = tuple(f"{side} {point.name}" for point in POINTS for side in ("before", "after"))
"""The named points: each has two sides."""

assert 8 + 8 * len(SIDES) <= SHARED_BYTES


class _Plant:
    """Counts passings, and ends the process at one of them. `side` None: at none."""

    def __init__(self, counters: Counters, side: int | None, nth: int) -> None:
        self.counters, self.side, self.nth = counters, side, nth

    def passing(self, side: int) -> None:
        if self.counters.armed and self.counters.passed(side) == self.nth and side == self.side:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, original: Callable[..., Any], point: Point, number: int) -> Callable[..., Any]:
        before, after = 2 * number, 2 * number + 1

        def counts(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
            return point.only is None or point.only(*arguments, **options)

        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            if not counts(arguments, options):
                return original(*arguments, **options)
            self.passing(before)
            result = original(*arguments, **options)
            self.passing(after)
            return result

        @functools.wraps(original)
        async def call_async(*arguments: Any, **options: Any) -> Any:
            if not counts(arguments, options):
                return await original(*arguments, **options)
            self.passing(before)
            result = await original(*arguments, **options)
            self.passing(after)
            return result

        return call_async if inspect.iscoroutinefunction(original) else call


def find(target: str) -> tuple[Any, str]:
    """The module or class that has the function `target` names, and the function's name in it."""
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *owner_path, name = path.split(".")
    for part in owner_path:
        owner = getattr(owner, part)
    assert callable(owner.__dict__.get(name)), (
        f"{target} is not there any more: this plants nothing"
    )
    return owner, name


def replace(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(function)` in the place of a function of the product, also where it was imported by name."""
    owner, name = find(target)
    original = owner.__dict__[name]
    replacement = make(original)
    setattr(owner, name, replacement)
    if inspect.isclass(owner):
        return
    for found in list(sys.modules.values()):
        if getattr(found, "__name__", "").startswith(("forebay", "forebay_cache")):
            for key, value in list(vars(found).items()):
                if value is original:
                    setattr(found, key, replacement)


def install(plant: Mapping[str, Any]) -> None:
    """In the daemon, before it starts: `kill` (a side of SIDES) at its `nth` passing, or `count` all, or a `bug`."""
    if bug := plant.get("bug"):
        BUGS[bug]()
    side = SIDES.index(plant["kill"]) if plant.get("kill") else None
    if side is None and not plant.get("count"):
        return
    file = os.open(plant["shared"], os.O_RDWR)
    counters = Counters(mmap.mmap(file, SHARED_BYTES))
    os.close(file)
    planted = _Plant(counters, side, plant.get("nth", 1))
    for number, point in enumerate(POINTS):
        if side is None or side // 2 == number:
            replace(point.target, functools.partial(planted.wrap, point=point, number=number))


# ------------------------------------------------------------------------------------------------------------- bugs


def _no_intent_records() -> None:
    """A write is answered when only its data was written: nobody can say after a kill what it was."""

    def make(write: Callable[..., Any]) -> Callable[..., Any]:
        def skip(journal: Any, frame: Any) -> None:
            del journal, frame

        return skip

    replace("forebay_cache.durable.journal:Journal.write", make)


def _journal_truncated_early() -> None:
    """A commit says that the journal begins where it ends now, not where it ended as the commit was put together."""
    journals: list[Any] = []

    def note(mark: Callable[..., Any]) -> Callable[..., Any]:
        def noted(journal: Any) -> Any:
            journals[:] = [journal]
            return mark(journal)

        return noted

    def late(commit: Callable[..., Any]) -> Callable[..., Any]:
        def committed(index: Any, changes: Any) -> None:
            if journals:
                head = journals[0].head
                changes.meta.journal_offset, changes.meta.journal_sequence = (
                    head.offset,
                    head.sequence,
                )
            commit(index, changes)

        return committed

    replace("forebay_cache.durable.journal:Journal.mark", note)
    replace("forebay_cache.index.index:Index._commit", late)


def _drops_forgotten() -> None:
    """The modes that write to the origin do not put it on record that the cached sectors are old."""

    def make(_drop: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _mask, _layer, _block: b""

    replace("forebay_cache.format.ops:drop", make)


def _settled_before_the_origin() -> None:
    """A checkpoint is taken for written while it is only on its way: the image never gets it."""

    def make(_all: Callable[..., Any]) -> Callable[..., Any]:
        async def nothing(_work: Any) -> None:
            return None

        return nothing

    replace("forebay.checkpoint.batches:Batches.put_all", make)


def _disks_not_committed() -> None:
    """A disk that was attached is on record some time later."""

    def make(_commit: Callable[..., Any]) -> Callable[..., Any]:
        async def later(_gateway: Any) -> None:
            return None

        return later

    replace("forebay.daemon.record:DiskRecords.commit", make)


def _flush_of_the_origin_only_said() -> None:
    """Used by nobody but to see that a bug SIGKILL cannot show is not taken for found."""

    def make(_sync: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _calls, _fd: None

    replace("forebay.origin.calls:SystemCalls.fdatasync", make)


BUGS: dict[str, Callable[[], None]] = {
    "no intent records": _no_intent_records,
    "journal truncated before the commit": _journal_truncated_early,
    "drops not recorded": _drops_forgotten,
    "checkpoint taken for written": _settled_before_the_origin,
    "disk record not committed": _disks_not_committed,
    "origin not flushed": _flush_of_the_origin_only_said,
}
