# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The route of the summary of this host."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.control.history import History
from forebay.http.messages import Answer, JSONResponse, Request, Response


class Summary(Protocol):
    """What the daemon tells of all of it in one answer."""

    @property
    def history(self) -> History:
        """What happened in the last 24 hours."""

    async def report(self) -> dict[str, Any]:
        """What `forebay summary --json` prints."""


class SummaryRoutes:
    """The endpoint, on one daemon's summary."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [("GET", "/summary", self.summary)]

    async def summary(self, _: Request) -> Response:
        """How this host stands: cache, disks, stores, what is warm."""
        return JSONResponse(await self._summary.report())
