# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The routes of staging: what the command orders, and what the process asks that carries it out."""

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import trio

from forebay.control.arguments import LONGEST_STAGING, MARK, ORDER, REPORT, arguments
from forebay.control.work import Operation, Progress
from forebay.http.messages import Answer, JSONResponse, Request, Response

_AT_ONCE = 1000
"""Runs of pieces that are written between two turns of others: a large image may lack tens of thousands."""

Told = dict[str, Any]
"""What is told of one image: the keys of `forebay stage --json`."""


class Staging(Protocol):
    """What these routes need of the daemon. Everything raises ForebayError and OSError."""

    def status(self) -> list[Told]:
        """What is told of each order."""

    async def make(self, image: str, progress: Progress) -> Told:
        """Have a torrent beside the image."""

    async def torrent(self, image: str) -> Told:
        """The torrent, in base64."""

    async def lacking(self, image: str) -> Told:
        """The runs of pieces that the cache lacks."""

    async def order(
        self, image: str, peers: Iterable[tuple[str, int]], *, source: bool, rate: int | None
    ) -> Told:
        """Stage an image with these hosts; `rate` in bytes a second."""

    async def end(self, image: str) -> Told:
        """Stage it no more."""

    def report(self, rows: Iterable[Told], known: int | None) -> Told:
        """Take in how far the orders are; the orders, in short where `known` says that they are known."""


class StagingRoutes:
    """The endpoints."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [
            ("GET", "/stages", self.stages),
            ("POST", "/stages", self.order),
            ("POST", "/stages/end", self.end),
            ("GET", "/stages/torrent", self.torrent),
            ("POST", "/stages/torrent", self.make),
            ("GET", "/stages/lacking", self.lacking),
            ("POST", "/stages/report", self.report),
        ]

    async def stages(self, _: Request) -> Response:
        """All images that are staged, a list."""
        return JSONResponse(self._staging.status())

    async def order(self, request: Request) -> Response:
        """Stage an image; answers with what is told of it."""
        given = await arguments(request, ORDER, ("image", "peers"), LONGEST_STAGING)
        told = await self._staging.order(
            given["image"],
            given["peers"],
            source=given.get("source", False),
            rate=given.get("rate"),
        )
        return JSONResponse(told)

    async def end(self, request: Request) -> Response:
        """Stage an image no more."""
        given = await arguments(request, MARK, ("image",))
        return JSONResponse(await self._staging.end(given["image"]))

    async def make(self, request: Request) -> Operation:
        """Have a torrent beside an image; answers with where it lies."""
        given = await arguments(request, MARK, ("image",))
        return Operation(lambda progress: self._staging.make(given["image"], progress))

    async def torrent(self, request: Request) -> Response:
        """The torrent."""
        given = await arguments(request, MARK, ("image",))
        return JSONResponse(await self._staging.torrent(given["image"]))

    async def lacking(self, request: Request) -> Response:
        """The runs of pieces that the cache lacks."""
        given = await arguments(request, MARK, ("image",))
        told = await self._staging.lacking(given["image"])
        runs = told.pop("lacking")
        text = json.dumps(told)[:-1] + ', "lacking": ['
        for n in range(0, len(runs), _AT_ONCE):
            text += (", " if n else "") + json.dumps(runs[n : n + _AT_ONCE])[1:-1]
            await trio.lowlevel.checkpoint()
        return Response(f"{text}]}}".encode())

    async def report(self, request: Request) -> Response:
        """Take in how far the orders are; answers with the orders."""
        given = await arguments(request, REPORT, ("stages",), LONGEST_STAGING)
        return JSONResponse(self._staging.report(given["stages"], given.get("known")))
