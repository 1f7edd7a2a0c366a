# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import select
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

_Buffer: TypeAlias = bytes | bytearray | memoryview

bugs: frozenset[str]
has_plants: bool

def write_by_python(wanted: bool) -> None: ...
def checksum(sector: _Buffer, *, portable: bool = False) -> int: ...
def crc32(data: _Buffer, crc: int = 0) -> int: ...

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
    ) -> None: ...
    def run(self, layer: Any, writes: list[tuple[int, memoryview]]) -> int: ...

WAIT: int
YIELD: int
OTHER: int
UNSENT: int
GONE: int

class Turn:
    may_flush: bool
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
    ) -> None: ...
    def may_receive(self) -> bool: ...
    def poll(self, seconds: float) -> bool: ...
    def run(self, turn_ends: float) -> int: ...
    def take_flush(self) -> tuple[int, Any] | None: ...

class Wait:
    def __init__(self, loops: select.epoll) -> None: ...
    def add(self, turn: Turn, woken: Callable[[int | Exception], None]) -> None: ...
    def remove(self, turn: Turn) -> None: ...
    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]: ...
