"""`python -m real.planted BUG -m forebay serve ...`: the daemon with a bug in it that loses data when the power goes.

For the tests only, to show that they would find it. The daemon itself has no switch for such a thing.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import lmdb
import trio

import forebay.policies
import forebay.writeback
import forebay_cache.private
from forebay import redo
from forebay.image import Image
from forebay.owner import Marker
from forebay_cache.cache import Cache
from forebay_cache.device import Device
from forebay_cache.syncer import Syncer


def _index_before_data() -> None:
    async def commit(self: Cache) -> None:
        if self.changed():
            changes, succeeded, failed = self.snapshot()
            try:
                await self.index.commit(changes)
                await self.sync()
            except BaseException:
                failed()
                raise
            succeeded()

    _replace(Cache, "_commit", commit)


def _slots_reused_early() -> None:
    forget = Cache._forget_slot

    def forget_and_release(self: Cache, slot: int) -> None:
        forget(self, slot)
        self._freed.remove(slot)
        self._leaving -= 1
        self.placement.release(slot)

    _replace(Cache, "_forget_slot", forget_and_release)


def _no_data_sync() -> None:
    async def sync(self: Syncer) -> None:
        await trio.lowlevel.checkpoint()

    _replace(Syncer, "__call__", sync)
    _replace(Syncer, "now", lambda self: True)
    _replace(Device, "sync", lambda self: None)


def _overwritten_in_place() -> None:
    def target(word: int, second: int, mask: int, opened: int) -> int:
        return second & mask & word & 0xFFFF

    _replace(forebay_cache.private, "_target", target)


def _journal_committed_early() -> None:
    """Renamed before its data is durable."""

    def commit(self: redo.Redo) -> None:
        with self._file as fd:
            redo._write(fd, redo._record(redo.END, self._records, self._bytes, []), self._end)
        os.rename(redo.UNFINISHED, redo.NAME, src_dir_fd=self._sidecar, dst_dir_fd=self._sidecar)
        os.fsync(self._sidecar)
        with self._file as fd:
            os.fsync(fd)
        self.close()

    _replace(redo.Redo, "commit", commit)


def _journal_removed_early() -> None:
    """Before the image is durable."""
    commit = redo.Redo.commit

    def commit_and_remove(self: redo.Redo) -> None:
        sidecar = os.dup(self._sidecar)
        commit(self)
        redo.remove(sidecar)
        os.close(sidecar)

    _replace(redo.Redo, "commit", commit_and_remove)


def _image_not_synced() -> None:
    """What was written back counts as clean before it is durable."""

    async def flush(self: Image, *, times: bool = False) -> None:
        await trio.lowlevel.checkpoint()

    _replace(Image, "flush", flush)


def _marked_late() -> None:
    """The marker says that the image has everything while it lacks something."""
    _replace(Marker, "set_state", lambda self, state: None)


def _no_region_log() -> None:
    async def mark_hot(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    _replace(forebay.policies, "mark_hot", mark_hot)


def _index_not_synced() -> None:
    opened = lmdb.open

    def unsynced(*args: Any, **settings: Any) -> lmdb.Environment:
        return opened(*args, **{**settings, "sync": False})

    _replace(lmdb, "open", unsynced)


def _replace(target: object, name: str, value: object) -> None:
    assert hasattr(target, name), f"{target!r} has no {name} any more: this plants nothing"
    setattr(target, name, value)


#: The bug, and the mode in which it does harm.
BUGS: dict[str, tuple[Callable[[], None], str]] = {
    "index-before-data": (_index_before_data, "write-back"),
    "slots-reused-early": (_slots_reused_early, "write-back"),
    "no-data-sync": (_no_data_sync, "write-back"),
    "overwritten-in-place": (_overwritten_in_place, "write-back"),
    "journal-committed-early": (_journal_committed_early, "write-back"),
    "journal-removed-early": (_journal_removed_early, "write-back"),
    "image-not-synced": (_image_not_synced, "write-back"),
    "marked-late": (_marked_late, "write-back"),
    "no-region-log": (_no_region_log, "write-through"),
    "index-not-synced": (_index_not_synced, "write-back"),
}


def main() -> int:
    bug, _, _, *arguments = sys.argv[1:]  # between them: -m forebay
    BUGS[bug][0]()
    from forebay.cli import main as forebay_main

    sys.argv = ["forebay", *arguments]
    return forebay_main()


if __name__ == "__main__":
    sys.exit(main())
