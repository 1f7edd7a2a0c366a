# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The route of events: what has happened, and what happens from now on. And who has asked for what."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from forebay.control.arguments import EVENTS, arguments
from forebay.control.work import Operation, in_words
from forebay.events.held import Events
from forebay.events.ring import Entry
from forebay.events.telling import tell
from forebay.http.messages import Answer, Exchange, HungUp, JSONResponse, Request, Response
from forebay.http.routing import Endpoint
from forebay.image.boundary import sole_fault
from forebay.units import parse_name, printable

MOST_FOLLOWERS = 32
"""Who follow at once. Each has a connection, of which there are not many more."""

SEND_SECONDS = 60.0
"""How long who follows may take to read what is sent; then it is hung up on."""

BEAT_SECONDS = 10.0
"""Where nothing happens, an empty line says so often that this is so."""

_AT_ONCE = 64
"""Events in one piece of an answer: all that is held for one who reads slowly."""

_UNTOLD = {"/stages/report"}
"""What `forebay stager` says once a second changes nothing."""

LONGEST_TARGET = 300
"""Characters of a request that are told."""

FLAGS, NOT_SET = ("discard", "force"), ("0", "false", "no")


class EventRoutes:
    """The endpoint, on the events of one daemon."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [("GET", "/events", self.events)]

    async def events(self, request: Request) -> Answer:
        """The events so far, a list; with `follow` each as a line, and those that come."""
        given = await arguments(request, EVENTS)
        await self._events.loaded()
        wanted = Wanted(given)
        if given.get("follow"):
            return Following(self._events, wanted)
        found = wanted.of(self._events.after(wanted.after))
        return Response(b"[" + b",".join(entry.line for entry in found) + b"]")


class Wanted:
    """Which events are asked for."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._disk: str | None = given.get("disk")
        self._since: float = given.get("since", 0.0)
        self._last: int | None = given.get("last")
        self.after: int = given.get("after", 0)
        """Those with larger ids."""

    @property
    def is_limited(self) -> bool:
        """True if only the last few are asked for."""
        return self._last is not None

    def has(self, entry: Entry) -> bool:
        """True if it is one of them."""
        return entry.time >= self._since and self._disk in (None, entry.disk)

    def of(self, entries: list[Entry]) -> list[Entry]:
        """Those of them that are asked for, the last of them if so many are."""
        found = [entry for entry in entries if self.has(entry)]
        return found if self._last is None else found[max(0, len(found) - self._last) :]


class Following:
    """An answer that goes on until its reader, or the daemon, ends."""

    def __init__(self, events: Events, wanted: Wanted) -> None:
        self._events = events
        self._wanted = wanted

    async def send(self, exchange: Exchange) -> None:
        """Send what there is, and what comes; 503 if too many follow at this moment. Raises HungUp."""
        if self._events.followers >= MOST_FOLLOWERS:
            text = f"{MOST_FOLLOWERS} follow already: end one of them"
            await JSONResponse({"error": text}, 503).send(exchange)
            return
        self._events.followers += 1
        try:
            with sole_fault():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._go_on, exchange)
                    await exchange.hung_up()
                    nursery.cancel_scope.cancel()
        finally:
            self._events.followers -= 1
        raise HungUp

    async def _go_on(self, exchange: Exchange) -> None:
        await exchange.start(200, {"content-type": "application/x-ndjson"})
        events = self._events
        at, may_lack = self._begin()
        gap = 0
        while True:
            if may_lack and events.dropped > max(at, gap):
                gap = events.dropped
                await _write(exchange, [_line_of_gap()])
            moved = events.moved()
            if found := events.after(at, _AT_ONCE):
                at, may_lack = found[-1].id, True
                if lines := [entry.line for entry in found if self._wanted.has(entry)]:
                    await _write(exchange, lines)
                else:
                    await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_after(BEAT_SECONDS) as scope:
                await moved.wait()
            if scope.cancelled_caught:
                await _write(exchange, [])

    def _begin(self) -> tuple[int, bool]:
        """The id behind which it begins; True if one who knows all up to there misses what is not kept any more."""
        at = self._wanted.after
        if at > self._events.last:  # of another STATE, or of before the clock was set back
            at = 0
        if self._wanted.is_limited:
            found = self._wanted.of(self._events.after(at))
            return (found[0].id - 1 if found else self._events.last), False
        return at, at > 0


async def _write(exchange: Exchange, lines: list[bytes]) -> None:
    """Lines, or an empty one. Raises HungUp, also where they are not read in time."""
    try:
        with trio.fail_after(SEND_SECONDS):
            await exchange.write(b"".join(line + b"\n" for line in lines) or b"\n")
    except trio.TooSlowError:
        raise HungUp from None


def _line_of_gap() -> bytes:
    text = "some events before this are not kept any more"
    return json.dumps({"kind": "gap", "disk": "", "text": text}).encode()


def _asked_for(request: Request) -> str:
    """Method, path, and which of FLAGS are set: values may be secrets, as those in URLs of images."""
    set_ = [flag for flag in FLAGS if request.query_params.get(flag, "0") not in NOT_SET]
    target = printable(f"{request.method} {request.path}")[:LONGEST_TARGET]
    return f"{target} ({', '.join(set_)})" if set_ else target


def _disk_in(request: Request) -> str:
    """The disk, or the overlay, in the path; empty where none can have that name."""
    try:
        return parse_name(request.path_params.get("name"))
    except ValueError:
        return ""


def told(method: str, path: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint; where it may change something, who has asked for that is told before, and why it is not done."""
    if method == "GET" or path in _UNTOLD:
        return endpoint

    async def call(request: Request) -> Answer:
        disk = _disk_in(request)
        tell("command", f"asked for: {_asked_for(request)}", disk)

        def refused(text: str) -> None:
            tell("command", f"not done: {text}", disk, ok=False)

        try:
            answer = await endpoint(request)
        except Exception as fault:
            refused(in_words(fault))
            raise
        if isinstance(answer, Operation):
            answer.on_refused = refused
        return answer

    return call
