# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a recorder's log allows a machine to come back with after a power cut at any record of it.

The fault model, that of POSIX on a journaling file system and no more:

* a file's bytes are durable once a sync of that file, asked for after they were written, was answered. Of what was
  written later nothing, all, the first part or any subset by 512 bytes is there; what lies in one place keeps its order
* what happened to names in a directory is durable once a sync of that directory was answered. Of what came later the
  first part is there, of all directories together or of each on its own. A rename happened or did not; that a name is
  there says nothing about the content of the file
* times are those of the last `fsync` (not `fdatasync`) or of any change after it

A killed process leaves everything.
"""

import bisect
import marshal
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEAR = 512
FRAME = b"FBJL"
"""What a frame of the cache's journal begins with."""
ROOT = 1
WHOLE = -1
"""Length of a change that a truncate made."""

Tree = dict[int, dict[bytes, int]]


@dataclass
class File:
    """One file: what is durable, and what was done since, with the numbers of the records."""

    base: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the records in `pending`
    times: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    hardened: list[tuple[int, int]] = field(default_factory=list)  # where `base` was changed so far

    def change(self, number: int, offset: int, data: bytes | None, times: tuple[int, int]) -> None:
        """A write; `data` None: cut off, or made longer, to `offset` bytes."""
        self.pending.append((number, offset, data))
        self.numbers.append(number)
        self.times.append((number, times))

    def harden(self, before: int, *, data_only: bool) -> None:
        """A sync was answered that had been asked for at record `before`."""
        count = bisect.bisect_left(self.numbers, before)
        for _, offset, data in self.pending[:count]:
            put(self.base, offset, data)
            self.hardened.append((offset, WHOLE if data is None else len(data)))
        del self.pending[:count], self.numbers[:count]
        if not data_only:
            earlier = bisect.bisect_left(self.times, before, key=lambda found: found[0])
            del self.times[: max(0, earlier - 1)]


def put(content: bytearray, offset: int, data: bytes | None) -> None:
    """Do to the content what a write or a truncate does; where `data` lies behind the end, zeros come before it."""
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


@dataclass
class Content:
    """What one file holds: what is durable of it, and what was added in this state."""

    file: File
    added: list[tuple[int, bytes | None]]

    def whole(self) -> bytearray:
        """All of it."""
        content = bytearray(self.file.base)
        for offset, data in self.added:
            put(content, offset, data)
        return content


@dataclass
class State:
    """What a machine comes back with. `files` by path; `times` (mtime, ctime in ns) by path."""

    files: dict[str, Content] = field(default_factory=dict)
    times: dict[str, tuple[int, int]] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)


class Replay:
    """Goes through a log once; :meth:`cut` and :meth:`killed` say what would be left right before record `at`."""

    def __init__(self, records: list[tuple[Any, ...]]) -> None:
        self.records = records
        self.at = 0
        self._files: dict[int, File] = {}
        self._tree: Tree = {ROOT: {}}
        self._names: list[tuple[int, int, tuple[Any, ...]]] = []  # number, directory, record
        self._syncs: dict[int, tuple[int, int, bool]] = {}
        while self.at == 0 or records[self.at - 1][0] != "begin":
            self.advance(self.at + 1)
        self.first = self.at
        self._harden_names(None, self.at)
        for file in self._files.values():
            file.harden(self.at, data_only=False)

    # -- going through ----------------------------------------------------------------------------------------

    def advance(self, to: int) -> None:
        """Take in the records before number `to`."""
        for number in range(self.at, to):
            record = self.records[number]
            kind = record[0]
            if kind == "write":
                self._files[record[1]].change(number, record[2], record[3], record[4:])
            elif kind == "truncate":
                self._files[record[1]].change(number, record[2], None, record[3:])
            elif kind in ("create", "unlink", "rename"):
                self._note_name(number, record)
            elif kind == "sync":
                self._syncs[record[1]] = number, record[2], record[3]
            elif kind == "synced":
                self._synced(*self._syncs.pop(record[1]))
        self.at = max(self.at, to)

    def _note_name(self, number: int, record: tuple[Any, ...]) -> None:
        if record[0] == "create" and not record[4]:
            self._files[record[3]] = File()
        assert record[0] != "rename" or record[1] == record[3], "a rename between two directories"
        self._names.append((number, record[1], record))

    def _synced(self, before: int, node: int, data_only: bool) -> None:
        if node in self._files:
            self._files[node].harden(before, data_only=data_only)
        else:
            self._harden_names(node, before)

    def _harden_names(self, directory: int | None, before: int) -> None:
        left = []
        for number, where, record in self._names:
            if number < before and directory in (None, where):
                _apply(self._tree, record)
            else:
                left.append((number, where, record))
        self._names = left

    # -- what is left -----------------------------------------------------------------------------------------

    def killed(self) -> State:
        """The process was killed: nothing of what it wrote is lost."""
        tree = {number: dict(names) for number, names in self._tree.items()}
        for _, _, record in self._names:
            _apply(tree, record)
        return self._collect(tree, None)

    def cut(self, rng: random.Random) -> State:
        """The power was cut: one of the ways in which that may end."""
        return self._collect(self._some_names(rng), rng)

    def _some_names(self, rng: random.Random) -> Tree:
        tree = {number: dict(names) for number, names in self._tree.items()}
        upto = rng.choice((0, len(self._names), rng.randint(0, len(self._names))))
        one_journal = rng.random() < 0.5
        stopped: set[int] = set()
        for n, (_, where, record) in enumerate(self._names):
            if one_journal and n >= upto:
                break
            if not one_journal and (where in stopped or rng.random() < 0.4):
                stopped.add(where)
                continue
            _apply(tree, record)
        return tree

    def _collect(self, tree: Tree, rng: random.Random | None) -> State:
        found = State()
        for path, node in _walk(tree, ROOT, ""):
            if node in tree or node not in self._files:
                found.directories.append(path)
                continue
            file = self._files[node]
            found.files[path] = _everything(file) if rng is None else _some(file, rng)
            if file.times:
                durable = file.times[-1] if rng is None else rng.choice(file.times)
                found.times[path] = durable[1]
        return found


def _apply(tree: Tree, record: tuple[Any, ...]) -> None:
    kind, directory, name = record[:3]
    names = tree.setdefault(directory, {})
    if kind == "create":
        names[name] = record[3]
        if record[4]:
            tree.setdefault(record[3], {})
    elif kind == "unlink":
        names.pop(name, None)
    else:
        names[record[4]] = names.pop(name)


def _walk(tree: Tree, directory: int, prefix: str) -> Iterator[tuple[str, int]]:
    for name, node in tree[directory].items():
        path = prefix + name.decode()
        yield path, node
        if node in tree:
            yield from _walk(tree, node, path + "/")


def _everything(file: File) -> Content:
    return Content(file, [(offset, data) for _, offset, data in file.pending])


def _some(file: File, rng: random.Random) -> Content:
    found = Content(file, [])
    if not file.pending:
        return found
    share = rng.choice((0.0, 1.0, rng.random(), rng.random()))
    tear = rng.choice((0.0, 0.2, 1.0))
    upto = rng.choice((len(file.pending), rng.randint(0, len(file.pending))))
    for _, offset, data in file.pending[:upto]:
        if data is None:
            found.added.append((offset, None))
        elif rng.random() < tear:
            for start, part in _torn(offset, data):
                if rng.random() < share:
                    found.added.append((start, part))
        elif rng.random() < share:
            found.added.append((offset, data))
    return found


def _torn(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """What of a write lies in each 512 bytes of the medium."""
    at = 0
    while at < len(data):
        part = data[at : at + TEAR - (offset + at) % TEAR]
        yield offset + at, part
        at += len(part)


def read_log(path: Path) -> list[tuple[Any, ...]]:
    """All records, but for the last one where the recorder did not live to write the whole of it."""
    found: list[tuple[Any, ...]] = []
    with path.open("rb") as file:
        while True:
            try:
                found.append(marshal.load(file))
            except (EOFError, ValueError):
                _join(found)
                return found


def _join(records: list[tuple[Any, ...]]) -> None:
    """Put writes together again that the kernel cut where a page of the writer's memory ends, inside of 512 bytes.

    FUSE does that where the next page is not in memory yet. What a medium writes whole must not fall apart by it. A
    frame of the journal that lies right behind another one was written by a call of its own.
    """
    begun: dict[
        int, list[int]
    ] = {}  # by file: the parts so far of a write that ends inside of 512 bytes
    for n, record in enumerate(records):
        if record[0] == "sync":
            begun.pop(record[2], None)
        if record[0] not in ("write", "truncate"):
            continue
        parts = begun.pop(record[1], [])
        if record[0] == "truncate":
            continue
        offset, data = record[2], record[3]
        if parts and _end(records[parts[-1]]) == offset and not data.startswith(FRAME):
            parts.append(n)
        elif offset % TEAR == 0:
            parts = [n]
        else:
            continue
        if (offset + len(data)) % TEAR:
            begun[record[1]] = parts
        elif len(parts) > 1:
            whole = b"".join(records[part][3] for part in parts)
            start = records[parts[0]][2]
            for part in parts:
                records[part] = ("joined",)
            records[n] = ("write", record[1], start, whole, *record[4:])


def _end(record: tuple[Any, ...]) -> int:
    return int(record[2] + len(record[3]))
