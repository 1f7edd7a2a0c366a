# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The routes of what belongs to all of this host: the summary, and how long requests took."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.control.history import History
from forebay.errors import ForebayError
from forebay.http.messages import Answer, HTTPException, JSONResponse, Request, Response


class Histograms(Protocol):
    """What the daemon knows of how long requests took."""

    async def told(self, name: str | None = None) -> bytes:
        """JSON: of all disks, or of one, and of the cache device. Raises ForebayError: there is none of that name."""


class Summary(Protocol):
    """What the daemon tells of all of it in one answer."""

    @property
    def history(self) -> History:
        """What happened in the last 24 hours."""

    @property
    def latency(self) -> Histograms:
        """How long requests took."""

    async def report(self) -> dict[str, Any]:
        """What `forebay summary --json` prints."""


class SummaryRoutes:
    """The endpoints, on one daemon's summary."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [
            ("GET", "/summary", self.summary),
            ("GET", "/latency", self.latency),
            ("GET", "/disks/{name}/latency", self.latency_of_one),
        ]

    async def latency(self, _: Request) -> Response:
        """How long requests took: the histograms of all disks, and of the cache device."""
        return Response(await self._summary.latency.told())

    async def latency_of_one(self, request: Request) -> Response:
        """The same of one disk, and of the cache device."""
        try:
            return Response(await self._summary.latency.told(request.path_params["name"]))
        except ForebayError as fault:
            raise HTTPException(404, str(fault)) from None

    async def summary(self, _: Request) -> Response:
        """How this host stands: cache, disks, stores, what is warm."""
        return JSONResponse(await self._summary.report())
