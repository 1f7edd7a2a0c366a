# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`python -m real.planted BUG -m forebay serve ...`: the daemon with a bug in it that loses data when the power goes.

For the tests only, to show that they would find it. The daemon itself has no switch for such a thing.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import lmdb
import trio

from forebay.origin.worker import syscalls
from forebay.sidecar import redo
from forebay.sidecar.applying import write_all
from forebay.sidecar.marker import Marker
from forebay_cache.device.device import Device
from forebay_cache.device.syncer import Syncer
from sim import bugs


def _no_data_sync(replace: bugs.Replace) -> None:
    async def sync(self: Syncer) -> None:
        await trio.lowlevel.checkpoint()

    replace(Syncer, "__call__", sync)
    replace(Syncer, "now", lambda self: True)
    replace(Syncer, "start", lambda self: False)
    replace(Device, "sync", lambda self: None)


def _journal_committed_early(replace: bugs.Replace) -> None:
    """Renamed before its data is durable."""

    def commit(self: redo.RedoFile) -> None:
        with self._file as fd:
            write_all(fd, redo._record(redo.END, self._records, self._bytes, []), self._end)
        there = self._sidecar
        syscalls.rename(redo.UNFINISHED, redo.NAME, src_dir_fd=there, dst_dir_fd=there)
        syscalls.fsync(there)
        with self._file as fd:
            syscalls.fsync(fd)
        self.close()

    replace(redo.RedoFile, "commit", commit)


def _journal_removed_early(replace: bugs.Replace) -> None:
    """Before the image is durable."""
    commit = redo.RedoFile.commit

    def commit_and_remove(self: redo.RedoFile) -> None:
        sidecar = syscalls.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._sidecar)
        commit(self)
        redo.remove(sidecar)
        syscalls.close(sidecar)

    replace(redo.RedoFile, "commit", commit_and_remove)
    replace(redo.RedoFile, "note_applied", lambda self, below, durable=False: None)  # nowhere to


def _marked_late(replace: bugs.Replace) -> None:
    """The marker says that the image has everything while it lacks something."""
    replace(Marker, "set_state", lambda self, state: None)


def _index_not_synced(replace: bugs.Replace) -> None:
    opened = lmdb.open

    def unsynced(*args: Any, **settings: Any) -> lmdb.Environment:
        return opened(*args, **{**settings, "sync": False})

    replace(lmdb, "open", unsynced)


def _written_over_a_backup(replace: bugs.Replace) -> None:
    """A committed journal is applied whatever has become of the image."""
    replace(redo, "has_changed", lambda *_: False)


def _replace(target: object, name: str, value: object) -> None:
    assert hasattr(target, name), f"{target!r} has no {name} any more: this plants nothing"
    setattr(target, name, value)


#: The bug, the mode in which it does harm, and the step (crash_steps.STEPS) that is needed for that.
BUGS: dict[str, tuple[Callable[[bugs.Replace], None], str, str]] = {
    "index-before-data": (bugs.index_before_data, "write-back", ""),
    "slots-reused-early": (bugs.slots_reused_early, "write-back", ""),
    "no-data-sync": (_no_data_sync, "write-back", ""),
    "overwritten-in-place": (bugs.overwritten_in_place, "write-back", ""),
    "journal-committed-early": (_journal_committed_early, "write-back", ""),
    "journal-removed-early": (_journal_removed_early, "write-back", ""),
    "image-not-synced": (bugs.image_not_synced, "write-back", ""),
    "marked-late": (_marked_late, "write-back", ""),
    "no-region-log": (bugs.no_region_log, "write-through", ""),
    "index-not-synced": (_index_not_synced, "write-back", ""),
    "written-over-a-backup": (_written_over_a_backup, "write-back", "restore under a journal"),
}


def main() -> int:
    bug, _, _, *arguments = sys.argv[1:]  # between them: -m forebay
    BUGS[bug][0](_replace)
    from forebay.cli.main import main as forebay_main

    sys.argv = ["forebay", *arguments]
    return forebay_main()


if __name__ == "__main__":
    sys.exit(main())
