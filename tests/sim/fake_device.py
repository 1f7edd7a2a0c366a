# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache device whose host loses power, and what is left of it then.

The fault model. Every write to the device is on record, in order, and so is every sync. A sync makes durable what was
written before it was asked for. When the power goes, of all later writes any subset, by 512 bytes, is on the medium,
in any order that keeps what is in one place in order. LMDB is trusted: the index is what it was after the last commit
that ended; a commit under way has happened or has not.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import forebay_cache.blocks.private
import forebay_cache.device.device
import forebay_cache.device.superblock
from forebay_cache.index.changes import Changes
from forebay_cache.index.index import Index
from sim.fake_loop import FakeSyncer

TEAR = 512
Write = tuple[int, bytes]


class Recorder:
    """What one device went through. ``moment`` is called between any two events, with nothing in between."""

    def __init__(self, moment: Callable[[], None]) -> None:
        self.writes: list[Write] = []
        self.durable = 0  # of the writes, how many are
        self.index = b""
        self.base = b""
        self._moment = moment
        self._line: int | None = None
        self._fd = -1

    def watch(self, device: Path, index: Path, fd: int) -> None:
        """Begin: what is there now is durable."""
        self.base = device.read_bytes()
        self.index = (index / "data.mdb").read_bytes()
        self._fd = fd

    def begin(self) -> None:
        """A sync was asked for."""
        self._line = len(self.writes)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        done = os.pwrite(fd, data, offset)
        if fd == self._fd:
            self._moment()
            self.writes.append((offset, bytes(data[:done])))
            self._moment()
        return done

    def fdatasync(self, fd: int) -> None:
        if fd == self._fd:
            self._moment()
            line, self._line = self._line, None
            self.durable = len(self.writes) if line is None else line
            self._moment()

    def commit(self, do: Callable[[Index, Changes], None], index: Index, changes: Changes) -> None:
        self._moment()
        do(index, changes)
        self.index = (index.path / "data.mdb").read_bytes()
        self._moment()

    @contextlib.contextmanager
    def recording(self, syncer: type[FakeSyncer]) -> Iterator[None]:
        """Within it the cache writes through this recorder."""
        commit = Index._commit
        with contextlib.ExitStack() as stack:
            system = _System(self)
            for target, name, value in (
                (forebay_cache.device.device, "os", system),
                (forebay_cache.device.superblock, "os", system),
                (Index, "_commit", lambda index, changes: self.commit(commit, index, changes)),
                (syncer, "begin", staticmethod(self.begin)),
            ):
                stack.enter_context(mock.patch.object(target, name, value))
            yield


class _System:
    """The module os, but for the calls that a recorder wants to see."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        if name in ("pwrite", "fdatasync"):
            return getattr(self._recorder, name)
        return getattr(os, name)


def torn(rng: random.Random, medium: bytearray, writes: list[Write]) -> None:
    """Put some of the writes, or parts of them, on the medium."""
    share = rng.choice((0.0, 1.0, rng.random(), rng.random()))
    tear = rng.choice((0.0, 0.2, 1.0))
    upto = rng.choice((len(writes), rng.randrange(len(writes) + 1)))
    for offset, data in writes[:upto]:
        if rng.random() < tear:
            for start in range(0, len(data), TEAR):
                if rng.random() < share:
                    part = data[start : start + TEAR]
                    medium[offset + start : offset + start + len(part)] = part
        elif rng.random() < share:
            medium[offset : offset + len(data)] = data
