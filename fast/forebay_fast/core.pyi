# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

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
