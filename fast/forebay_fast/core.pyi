# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import select
from array import array
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

_Buffer: TypeAlias = bytes | bytearray | memoryview

bugs: frozenset[str]
has_plants: bool

def write_by_python(wanted: bool) -> None: ...
def checksum(sector: _Buffer, *, portable: bool = False) -> int: ...
def crc32(data: _Buffer, crc: int = 0) -> int: ...
def note_latency(counts: array[int], kind: int, seconds: float, times: int) -> None: ...
def admit(words: array[float], length: int, now: float) -> bool: ...

class Reads:
    def __init__(self, view: Any) -> None: ...
    def read_now(self, offset: int, length: int) -> _Buffer | None: ...

class Writes:
    def __init__(
        self,
        failure: Any,
        threads: Any,
        publisher: Any,
        intent: Any,
        sums: Any,
        ready: Any,
        slots: Any,
        device: Any,
        *,
        timing: ModuleType,
        empty: Any,
        late: Any,
    ) -> None: ...
    def run(self, layer: Any, writes: list[tuple[int, memoryview]]) -> int: ...

WAIT: int
YIELD: int
OTHER: int
UNSENT: int
GONE: int

class Rest:
    def run(self, turn_ends: float) -> int: ...

class Turn(Rest):
    may_flush: bool
    @property
    def waits(self) -> bool: ...
    @property
    def since(self) -> float: ...
    def __init__(
        self,
        reader: Any,
        export: Any,
        out: Any,
        sock: int,
        limits: Any,
        *,
        structured: bool,
        refusal: Callable[[int, OSError], bytes],
        polling: ModuleType,
    ) -> None: ...
    def may_receive(self) -> bool: ...
    def poll(self, seconds: float) -> bool: ...
    def take_flush(self) -> tuple[int, Any, float] | None: ...

class Wait:
    def __init__(self, loops: select.epoll) -> None: ...
    def add(self, turn: Rest, woken: Callable[[int | Exception], None]) -> None: ...
    def remove(self, turn: Rest) -> None: ...
    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]: ...

class FuseFile:
    unflushed: bool
    def __init__(
        self,
        connection: DiskConnection | None,
        size: int,
        writable: bool,
        touched: Callable[[], None],
    ) -> None: ...

class FuseDevice(Rest):
    files: dict[int, FuseFile]
    attributes: dict[int, bytes]
    others: deque[bytes]
    def __init__(self, fd: int, others: deque[bytes], complain: Callable[[int], None]) -> None: ...
    def opened(self, number: int, file: FuseFile) -> None: ...
    def closed(self, number: int) -> bool: ...
    def end(self) -> None: ...

class DiskConnection(Rest):
    why: str | None
    heard: float
    answers: int
    @property
    def owed(self) -> int: ...
    def __init__(self, device: FuseDevice) -> None: ...
    def begin(self, sock: int, flags: int) -> None: ...
    def refuse(self, error: int) -> None: ...
    def give_up(self, why: str) -> None: ...

def relay(source: int, device: int) -> None: ...
