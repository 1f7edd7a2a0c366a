# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The index: an LMDB environment that says what lies in which slot. Committed in one transaction at a time.

Its tables, keys and values are described in ``format.records``.

Commits are durable (``sync`` and ``metasync``, no writable map), in one thread of their own: LMDB binds a write
transaction to its thread, and a commit takes a millisecond that the event loop does not have. LMDB's own creation is
not crash-atomic, so a new environment is made under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import mmap
import shutil
import threading
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lmdb

from forebay_cache.device.files import sync_directory
from forebay_cache.device.worker import TIMEOUT, Worker
from forebay_cache.errors import CacheError, IndexFault, index_advice
from forebay_cache.format.checksum import GROUP, SIZE, sums_in_group
from forebay_cache.format.records import (
    ALL_OF_GROUP,
    FORMAT,
    FORMATS,
    GROUP_KEY,
    LAYER_KEY,
    NAMES_ARE_TEXT,
    PAGE_KEY,
    TABLES,
    LayerRecord,
    Meta,
    pack_record,
    record_key,
    unpack_record,
)
from forebay_cache.index.changes import Changes, Taken
from forebay_cache.index.place import Place, check_kinds, check_length
from forebay_cache.index.reserve import Reserve

with contextlib.suppress(ImportError):
    # lmdb does that when it opens: by then root's command may be a user who cannot read modules
    importlib.import_module("lmdb._envid")

_MAP_LEAST = 32 << 30
"""Bytes of address space for the index, at least ..."""
_MAP_PER_SLOT = 12288
"""... and bytes of it for each slot.

The worst case is one block in each page: about 700 bytes for a clean slot, twice that for a private one. What is taken
above it is room for a device that grows while the map cannot.
"""
_MAP_NEEDED_PER_SLOT = 1536


def _map_size(slots: int) -> int:
    return max(_MAP_LEAST, slots * _MAP_PER_SLOT)


def _open(path: Path, slots: int) -> lmdb.Environment:
    """Raises lmdb.Error and OSError."""
    check_kinds(path)
    env = lmdb.open(
        str(path),
        map_size=_map_size(slots),
        max_dbs=len(TABLES),
        max_readers=64,
        sync=True,
        metasync=True,
        writemap=False,
        readahead=False,
    )
    try:
        check_length(path, env)
    except BaseException:
        env.close()
        raise
    return env


def create(path: Path, ident: uuid.UUID | None = None) -> None:
    """Make an empty index at ``path``, with that uuid or one of its own, durable when this returns."""
    partial = path.with_name(path.name + ".new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    env = _open(partial, 0)
    try:
        with env.begin(write=True) as txn:
            meta = env.open_db(b"meta", txn=txn)
            for table in TABLES[1:]:
                env.open_db(table.encode(), txn=txn)
            state = Meta(uuid=str(ident or uuid.uuid4()))
            txn.put(b"state", json.dumps(asdict(state)).encode(), db=meta)
        env.sync(True)
    finally:
        env.close()
    sync_directory(partial)
    partial.rename(path)
    sync_directory(path.parent)


def _fault(error: lmdb.Error) -> IndexFault:
    full = isinstance(error, (lmdb.MapFullError, lmdb.DiskError))
    return IndexFault(errno.ENOSPC if full else errno.EIO, f"the index fails: {error}")


class Index:
    """An open index. Reads from any thread; :meth:`commit` hands over to the writer thread.

    What lmdb raises leaves this class as :class:`IndexFault`. After a failure to write the root of its tree lmdb
    refuses everything (MDB_PANIC) until it is opened anew, which finds the last commit that went well: the next
    transaction does that.
    """

    def __init__(self, path: Path, slots: int) -> None:
        try:
            if not path.exists():
                create(path)
            self._open(path, slots)
            with self._env.begin() as txn:
                state = {"format": "unknown"} | self._state(txn)
        except (lmdb.Error, OSError) as error:
            raise CacheError(
                f"{path}: cannot open the index: {error}; {index_advice(str(error))}"
            ) from None
        if state["format"] not in FORMATS:
            self._env.close()
            raise CacheError(
                f"{path}: index format {state['format']}, this version knows only "
                f"{NAMES_ARE_TEXT} to {FORMAT}; "
                "drain it with the version that wrote it"
            )
        self.path = path
        self.reserve = Reserve(path)
        self.place = Place(path)
        self._most_slots = _map_size(slots) // _MAP_NEEDED_PER_SLOT
        self.meta = Meta(**(state | {"format": FORMAT}))
        self._is_current = state["format"] == FORMAT  # else the next commit makes it so
        self._env.reader_check()
        self._slots = slots
        self._users = 0  # transactions under way
        self._idle = threading.Condition()
        self._panicked = False
        self._writer = Worker("index-writer")
        self.timeout = TIMEOUT
        """After how many seconds a commit is given up."""

    def _open(self, path: Path, slots: int) -> None:
        self._env = _open(path, slots)
        self._db = {n: self._env.open_db(n.encode(), create=False) for n in TABLES}

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[lmdb.Transaction[bytes]]:
        """Raises IndexFault. Where it writes: committed at the end, or nothing was done, as far as anybody knows."""
        try:
            with self._begun(write) as txn:
                yield txn
        except lmdb.Error as error:
            raise _fault(error) from None
        finally:
            self._leave()

    def _begun(self, write: bool) -> lmdb.Transaction[bytes]:
        self._enter()
        try:
            return self._env.begin(write=write)
        except lmdb.PanicError:
            self._panicked = True
            self._leave()
            self._enter()
            return self._env.begin(write=write)

    def _enter(self) -> None:
        """One user more, of an environment that works. Raises IndexFault."""
        with self._idle:
            try:
                self.place.check()
                if self._panicked:
                    self._idle.wait_for(lambda: not self._users or not self._panicked)
                if self._panicked:
                    self._env.close()
                    self._open(self.path, self._slots)
                    self._panicked = False
            finally:
                self._users += 1

    def _leave(self) -> None:
        with self._idle:
            self._users -= 1
            self._idle.notify_all()

    def fits(self, slots: int) -> bool:
        """True if the index of a device with so many slots has room in the map, which is as large as it was made."""
        return slots <= self._most_slots

    # -- reading ----------------------------------------------------------------------------------------------

    def page(self, layer: int, number: int) -> bytes | None:
        """The words of one page, or None where the layer has nothing there."""
        with self._transaction() as txn:
            value: bytes | None = txn.get(PAGE_KEY.pack(layer, number), db=self._db["pages"])
            return value

    def sums(self, slots: Collection[int]) -> dict[int, bytes]:
        """Checksums of the slots that have some."""
        with self._transaction() as txn:
            db = self._db["sums"]
            groups = {s // GROUP: b"" for s in slots}
            for group in groups:
                groups[group] = txn.get(GROUP_KEY.pack(group), db=db) or b""
        found = {s: sums_in_group(groups[s // GROUP], s) for s in slots}
        return {slot: value for slot, value in found.items() if value}

    def pages(self, layer: int, after: int, limit: int) -> list[tuple[int, bytes]]:
        """Up to ``limit`` pages of a layer from page number ``after`` on."""
        found: list[tuple[int, bytes]] = []
        with self._transaction() as txn, txn.cursor(db=self._db["pages"]) as cursor:
            if not cursor.set_range(PAGE_KEY.pack(layer, after)):
                return found
            for key, value in cursor:
                owner, number = PAGE_KEY.unpack(key)
                if owner != layer or len(found) == limit:
                    break
                found.append((number, value))
        return found

    def page_numbers(self, layer: int, first: int, end: int, limit: int) -> list[int]:
        """The numbers of a layer's pages from ``first`` on and before ``end``, in order; at most ``limit`` of them."""
        found: list[int] = []
        with self._transaction() as txn, txn.cursor(db=self._db["pages"]) as cursor:
            if not cursor.set_range(PAGE_KEY.pack(layer, first)):
                return found
            for key in cursor.iternext(keys=True, values=False):
                owner, number = PAGE_KEY.unpack(key)
                if owner != layer or number >= end or len(found) == limit:
                    break
                found.append(number)
        return found

    def all_pages(self, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to ``limit`` (key, value) of the whole table from ``start`` on, in key order."""
        found: list[tuple[bytes, bytes]] = []
        with self._transaction() as txn, txn.cursor(db=self._db["pages"]) as cursor:
            if cursor.set_range(start):
                for key, value in cursor:
                    if len(found) == limit:
                        break
                    found.append((key, value))
        return found

    def give_back(self) -> None:
        """Let go of the memory that reading through LMDB's map has taken.

        It is the kernel's cache of the index file, counted as this process's as long as it is mapped in.
        """
        path = str((self.path / "data.mdb").resolve())
        libc = ctypes.CDLL(None, use_errno=True)
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(path):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                libc.madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
                )

    def layers(self) -> dict[int, LayerRecord]:
        """All layers, by number. Raises ValueError where a record of one makes no sense."""
        with self._transaction() as txn:
            return {LAYER_KEY.unpack(k)[0]: v for k, v in self._layers(txn)}

    def _state(self, txn: lmdb.Transaction[bytes]) -> dict[str, Any]:
        """What Meta is made of, as it is stored; {} in an index that has none."""
        found: dict[str, Any] = json.loads(txn.get(b"state", db=self._db["meta"]) or b"{}")
        return found

    def _layers(self, txn: lmdb.Transaction[bytes]) -> list[tuple[bytes, LayerRecord]]:
        state = self._state(txn)
        with txn.cursor(db=self._db["layers"]) as cursor:
            return [(key, LayerRecord.unpack(raw, state["format"])) for key, raw in cursor]

    def records(self) -> dict[tuple[str, str], dict[str, Any]]:
        """All records, by kind and name."""
        found = {}
        with self._transaction() as txn, txn.cursor(db=self._db["records"]) as cursor:
            for key, value in cursor:
                kind, name, record = unpack_record(key, value)
                found[kind, name] = record
        return found

    def hot(self) -> list[tuple[int, int]]:
        """(layer, region) of all regions on record as hot."""
        with self._transaction() as txn, txn.cursor(db=self._db["hot"]) as cursor:
            return [PAGE_KEY.unpack(key) for key, _ in cursor]

    # -- writing ----------------------------------------------------------------------------------------------

    def commit_now(self, changes: Changes) -> None:
        """Commit from the calling thread: only before the event loop runs, or after it ended."""
        self._writer.run_now(lambda: self.reserve.serve(lambda: self._commit(changes)))

    def forget_now(self, entries: Collection[tuple[str, bytes]]) -> None:
        """Remove (table, key), whatever these keys are: for a repair. As :meth:`commit_now`."""
        self._writer.run_now(lambda: self._forget(entries))

    def _forget(self, entries: Collection[tuple[str, bytes]]) -> None:
        with self._transaction(write=True) as txn:
            for table, key in entries:
                txn.delete(key, db=self._db[table])

    async def commit(self, changes: Changes) -> None:
        """Make the changes durable, all or none. Raises IndexFault or OSError; then neither may be assumed.

        Not cancellable: a commit that was begun is waited for, up to :attr:`timeout`. One that is given up may be done
        later; until it has ended every commit fails at once.
        """
        try:
            await self._writer.run(
                lambda: self.reserve.serve(lambda: self._commit(changes)), self.timeout
            )
        except OSError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            raise IndexFault(errno.ETIMEDOUT, f"the index: {error.strerror}") from None

    def _commit(self, changes: Changes) -> None:
        with self._transaction(write=True) as txn:
            db = self._db
            if not self._is_current:
                self._bring_up_to_date(txn)
            empty = [key for key, value in changes.pages if not value.strip(b"\0")]
            for key in empty:
                txn.delete(key, db=db["pages"])
            gone = set(empty)
            with txn.cursor(db=db["pages"]) as cursor:
                cursor.putmulti([item for item in changes.pages if item[0] not in gone])
            for taken in changes.sums:
                _put_sums(txn, db["sums"], taken)
            for layer, record in changes.layers.items():
                packed = record.pack() if record is not None else None
                _put(txn, db["layers"], LAYER_KEY.pack(layer), packed)
            for key, is_hot in changes.hot:
                _put(txn, db["hot"], key, b"" if is_hot else None)
            for (kind, name), value in changes.records.items():
                if value is None:
                    txn.delete(record_key(kind, name), db=db["records"])
                else:
                    txn.put(*pack_record(kind, name, value), db=db["records"])
            if changes.meta is not None:
                txn.put(b"state", json.dumps(asdict(changes.meta)).encode(), db=db["meta"])
        self._is_current = True

    def _bring_up_to_date(self, txn: lmdb.Transaction[bytes]) -> None:
        """Make an index of today's format of an older one, within the first commit: there is never half of each."""
        for key, record in self._layers(txn):
            txn.put(key, record.pack(), db=self._db["layers"])
        state = self._state(txn) | {"format": FORMAT}
        txn.put(b"state", json.dumps(state).encode(), db=self._db["meta"])

    def close(self) -> None:
        """End the writer thread and close the environment, unless a commit hangs."""
        self._writer.close()
        if not self._writer.is_hanging and self.place.is_whole():
            self._env.close()
        self.place.close()


def _put(txn: lmdb.Transaction[bytes], db: Any, key: bytes, value: bytes | None) -> None:
    """Store a value, or (None) remove it if it is there."""
    if value is None:
        txn.delete(key, db=db)
    else:
        txn.put(key, value, db=db)


def _put_sums(txn: lmdb.Transaction, db: Any, taken: Taken) -> None:
    """Store the sums of some slots of a group beside those of the others."""
    key, value = GROUP_KEY.pack(taken.group), taken.raw
    if taken.slots != ALL_OF_GROUP:
        merged = bytearray(txn.get(key, db=db) or len(value))
        for n in range(GROUP):
            if taken.slots >> n & 1:
                merged[n * SIZE : (n + 1) * SIZE] = value[n * SIZE : (n + 1) * SIZE]
        value = bytes(merged)
    txn.put(key, value, db=db)
