# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`python isolation_daemon.py FOLDER -m forebay serve ...`: the daemon, with short pauses and exceptions on command.

What the daemon does by itself every few seconds it does several times a second, so that a row of the matrix takes a
second and not ten. A function of TASKS raises once it is called on behalf of a disk whose name stands in the file
FOLDER/TASK, if the byte in FOLDER/armed is not 0; the file is gone then. For the tests only: the daemon itself has no
switch for such a thing.
"""

import functools
import importlib
import inspect
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from real.kill_plants import replace

TASKS = {
    "write-back": "forebay.checkpoint.schedule:WriteBack.checkpoint",
    "frozen": "forebay.checkpoint.dirty:Dirty.freeze",
    "pass": "forebay.checkpoint.passes:Pass.run",
    "watch": "forebay.image.image:Image.look",
    "full copy": "forebay.disk.copy:FullCopy._is_complete",
    "fetch": "forebay_cache.read.fill:Filler._store",
    "listener": "forebay.doors.tenant:Tenant.may_connect",
    "status": "forebay.disk.status:Status.keys",
    "read": "forebay.disk.disk:Disk.read",
    "write": "forebay.disk.disk:Disk.write",
    "trim": "forebay.disk.disk:Disk.trim",
    "flush": "forebay.disk.disk:Disk.flush",
    "begin flush": "forebay.disk.disk:Disk.begin_flush",
    "block status": "forebay.disk.disk:Disk.extents",
    "change of mode": "forebay.disk.modes:Modes._change",
    "preload": "forebay.disk.disk:Disk.preload",
    "drain": "forebay.disk.disk:Disk.drain",
    "close": "forebay.disk.disk:Disk.close",
    "release": "forebay.sidecar.marker:Marker.release",
    "attach": "forebay.image.source:Source.prepare",
    "open": "forebay.disk.disk:Disk._bring_up",
}
"""By what fails, the function."""

ARMED = "armed"

PAUSES = {
    "forebay.image.reach:WATCH_SECONDS": 0.2,
    "forebay.disk.watch:WATCH_SECONDS": 0.2,
    "forebay.image.reach:RETRY_SECONDS": 0.1,
    "forebay.image.reach:RETRY_MOST": 0.3,
    "forebay.disk.copy:RETRY_SECONDS": 0.2,
    "forebay_cache.read.fill:FAILED_SECONDS": 0.2,
    "forebay.checkpoint.schedule:RETRY_MOST": 0.3,
    "forebay.daemon.departures:CLIENTS_SECONDS": 1.0,
    "forebay.checkpoint.schedule:IDLE_SECONDS": 0.5,
}
"""Seconds, instead of several."""


def names_of(found: object, depth: int = 4) -> set[str]:
    """The texts in an object and in what it is made of: the name of its disk, or of its image, is among them."""
    if isinstance(found, str):
        return {found}
    if depth == 0 or not type(found).__module__.startswith("forebay"):
        return set()
    names = [*getattr(found, "__dict__", ()), *getattr(type(found), "__slots__", ())]
    parts = [getattr(found, name, None) for name in names]
    return set().union(*(names_of(part, depth - 1) for part in parts))


def raises_on_command(folder: Path, any_armed: mmap.mmap, task: str, target: str) -> None:
    """Have the function raise where a file of that name says for which disk."""
    armed = folder / task

    def passing(arguments: tuple[Any, ...]) -> None:
        if not any_armed[0]:  # all but free: this is called for each request
            return
        try:
            disk = armed.read_text()
        except FileNotFoundError:
            return
        if any(disk in name for one in arguments for name in names_of(one)):
            armed.unlink()
            raise RuntimeError(f"planted in {task}")

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            passing(arguments)
            return original(*arguments, **options)

        @functools.wraps(original)
        async def call_async(*arguments: Any, **options: Any) -> Any:
            passing(arguments)
            return await original(*arguments, **options)

        return call_async if inspect.iscoroutinefunction(original) else call

    replace(target, make)


def main() -> int:
    folder, _, _, *arguments = sys.argv[1:]  # between them: -m forebay
    importlib.import_module("forebay.daemon.gateway")
    from forebay.cli.main import main as forebay_main

    for place, seconds in PAUSES.items():
        module, _, name = place.partition(":")
        assert hasattr(importlib.import_module(module), name), f"{place} is not there any more"
        setattr(importlib.import_module(module), name, seconds)
    with (Path(folder) / ARMED).open("r+b") as file:
        any_armed = mmap.mmap(file.fileno(), 1)
    for task, target in TASKS.items():
        raises_on_command(Path(folder), any_armed, task, target)
    sys.argv = ["forebay", *arguments]
    return forebay_main()


if __name__ == "__main__":
    sys.exit(main())
