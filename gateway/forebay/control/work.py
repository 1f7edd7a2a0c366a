# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How the control API answers for work that takes long, and for what fails."""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from forebay.errors import ForebayError, InUseError, advice
from forebay.http.messages import Answer, Exchange, HTTPException, HungUp, JSONResponse
from forebay.image.boundary import sole_fault

log = logging.getLogger("forebay.control")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Work = Callable[[Progress], Awaitable[Any]]
"""Given the function that it calls to say how far it is. Raises what `failure` knows to tell."""

PROGRESS_INTERVAL = 0.1
"""Seconds between progress lines. More often is more than eyes can see."""


def failure(fault: Exception, disk: str = "") -> tuple[int, str]:
    """The HTTP status and the one line for a request that failed. A fault of Forebay itself goes to the log.

    `disk` names the disk that was asked for, if one was.
    """
    match fault:
        case HTTPException():
            return fault.status_code, fault.detail
        case ForebayError():
            return 409, str(fault)
        case OSError():
            where = f"'{disk}': " if disk else ""
            then = advice(fault, "the daemon's log says more")
            log.info("control API: %s%r", where, fault)
            return 500, f"{where}{fault.strerror or type(fault).__name__}; {then}"
    log.error("control API: %s", type(fault).__name__, exc_info=fault)
    return 500, f"a fault of forebay itself ({type(fault).__name__}): look at the daemon's log"


def in_words(fault: Exception) -> str:
    """The line for a request that failed, without a word of it in the log: `failure` says that."""
    match fault:
        case HTTPException():
            return fault.detail
        case OSError():
            return fault.strerror or type(fault).__name__
    return str(fault) if isinstance(fault, ForebayError) else type(fault).__name__


def error(status: int, text: str, fault: Exception | None = None) -> Answer:
    """The response that says what is wrong; with `holder` where an image is in somebody else's hands."""
    holder = {"holder": fault.holder} if isinstance(fault, InUseError) else {}
    return JSONResponse({"error": text, **holder}, status)


class Operation:
    """An answer that does some work and tells how far it is. The work is cancelled when the client hangs up."""

    def __init__(self, work: Work) -> None:
        """`work` is called once, when the answer is sent. What it returns is the result, as JSON."""
        self._work = work
        self._scope = trio.CancelScope()
        self._progress: tuple[int, int] | None = None
        self._changed = trio.Event()
        self._finished = trio.Event()
        self._outcome: dict[str, Any] = {}
        self._status = 200
        self.on_refused: Callable[[str], None] = lambda _text: None
        """Called with what is wrong, where the work fails."""

    async def send(self, exchange: Exchange) -> None:
        """Do the work, and answer. Raises HungUp."""
        with sole_fault():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hang_up, exchange)
                nursery.start_soon(self._run, exchange.request.path_params.get("name", ""))
                await self._changed.wait()
                if self._finished.is_set() and "result" not in self._outcome:
                    await self._refuse(exchange)
                else:
                    await self._tell(exchange)
                nursery.cancel_scope.cancel()

    async def _hang_up(self, exchange: Exchange) -> None:
        """Cancel the work when the client hangs up."""
        await exchange.hung_up()
        self._scope.cancel()

    async def _run(self, disk: str) -> None:
        """Do the work, for a disk of that name, and keep what came of it; nothing of it where it was cancelled."""
        with self._scope:
            try:
                self._outcome = {"result": await self._work(self._advance)}
            except Exception as fault:  # noqa: BLE001  (the client is told, and the daemon lives)
                self._status, text = failure(fault, disk)
                self._outcome = {"error": text}
                self.on_refused(text)
        self._finished.set()
        self._changed.set()

    def _advance(self, done: int, total: int) -> None:
        self._progress = (done, total)
        self._changed.set()

    async def _refuse(self, exchange: Exchange) -> None:
        """Answer work that failed before it said anything."""
        if not self._outcome:
            raise HungUp
        await error(self._status, self._outcome["error"]).send(exchange)

    async def _tell(self, exchange: Exchange) -> None:
        """Answer with lines of progress, at most one each PROGRESS_INTERVAL, and the outcome as the last one."""
        await exchange.start(200, {"content-type": "application/x-ndjson"})
        while not self._finished.is_set():
            await self._changed.wait()
            self._changed = trio.Event()
            if self._progress is not None:
                done, total = self._progress
                await exchange.write(_line({"done": done, "total": total}))
            with trio.move_on_after(PROGRESS_INTERVAL):
                await self._finished.wait()
        if not self._outcome:
            raise HungUp
        await exchange.write(_line(self._outcome))


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
