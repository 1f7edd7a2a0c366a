# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Reading ahead: what one thread fetches and checks, the other unpacks and writes meanwhile."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

DEPTH = 8
"""Pieces that may wait, of a megabyte at most each."""

_LOOK_SECONDS = 0.2
"""Between two looks whether anybody still wants them."""

END_SECONDS = 2.0
"""How long a thread that nobody wants anything of may take to notice; it is left behind then."""


def ahead(pieces: Iterator[T], depth: int = DEPTH) -> Generator[T, None, None]:
    """The same pieces, asked for in a thread of their own, until it is closed.

    What is raised there is raised here, in its place.
    """
    line: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(what: tuple[T | None, BaseException | None]) -> None:
        while not unwanted.is_set():
            with contextlib.suppress(queue.Full):
                line.put(what, timeout=_LOOK_SECONDS)
                return

    def run() -> None:
        end: BaseException = StopIteration()
        try:
            for piece in pieces:
                put((piece, None))
                if unwanted.is_set():
                    break
        except BaseException as fault:  # noqa: BLE001  (all of it is raised in the other thread)
            end = fault
        put((None, end))

    thread = threading.Thread(target=run, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            piece, fault = line.get()
            if isinstance(fault, StopIteration):
                return
            if fault is not None:
                raise fault
            assert piece is not None
            yield piece
    finally:
        unwanted.set()
        thread.join(END_SECONDS)
