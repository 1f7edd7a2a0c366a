# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`python fault_plants.py PLANT FILE -m forebay serve ...`: the daemon, in one of whose tasks an exception is planted.

The exception is raised in a function of the product, when FILE exists: once, and FILE is gone then; or each time, where
FILE says "always". For the tests only: the daemon itself has no switch for such a thing.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from real.kill_plants import replace

ALWAYS = "always"
TEXT = "planted"

_ASSERTION = "def fail():\n    raise AssertionError('planted')\n"


@dataclass(frozen=True)
class Plant:
    """`target` as kill_plants.Point has it. `in_the_cache`: an assertion fails in the cache's own code."""

    target: str
    in_the_cache: bool = False


PLANTS = {
    "write-back": Plant("forebay.checkpoint.schedule:WriteBack.checkpoint"),
    "watch": Plant("forebay.image.image:Image.look"),
    "copy": Plant("forebay.disk.copy:bring_in"),
    "preload": Plant("forebay.disk.disk:Disk.preload"),
    "change of mode": Plant("forebay.disk.modes:Modes._change"),
    "at once": Plant("forebay.disk.disk:Disk.run"),
    "bring back": Plant("forebay.daemon.arrivals:Arrivals._opened"),
    "fetch": Plant("forebay_cache.blocks.store:store"),
    "listener": Plant("forebay_nbd.server.server:Server._accept"),
    "cache's own": Plant("forebay_cache.durable.commit:Committer.snapshot"),
    "cache's assertion": Plant("forebay_cache.blocks.settle:settle", in_the_cache=True),
    "status": Plant("forebay.disk.status:Status.keys"),
    "request": Plant("forebay_cache.read.view:View.read"),
}
"""By the task that fails."""


def _fail(plant: Plant) -> None:
    if not plant.in_the_cache:
        raise RuntimeError(TEXT)
    names: dict[str, Any] = {"__name__": "forebay_cache.planted"}
    exec(_ASSERTION, names)
    names["fail"]()


def install(plant: Plant, armed: Path) -> None:
    """In the daemon, before it starts."""

    def passing() -> None:
        try:
            again = armed.read_text() == ALWAYS
            if not again:
                armed.unlink()
        except FileNotFoundError:
            return
        _fail(plant)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            passing()
            return original(*arguments, **options)

        @functools.wraps(original)
        async def call_async(*arguments: Any, **options: Any) -> Any:
            passing()
            return await original(*arguments, **options)

        return call_async if inspect.iscoroutinefunction(original) else call

    replace(plant.target, make)


def main() -> int:
    name, armed, _, _, *arguments = sys.argv[1:]  # between them: -m forebay
    importlib.import_module(
        "forebay.daemon.gateway"
    )  # a function is replaced where it was imported, too
    from forebay.cli.main import main as forebay_main

    install(PLANTS[name], Path(armed))
    sys.argv = ["forebay", *arguments]
    return forebay_main()


if __name__ == "__main__":
    sys.exit(main())
