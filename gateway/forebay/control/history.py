# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The route of the last 24 hours."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.control.arguments import HISTORY, arguments
from forebay.http.messages import Answer, JSONResponse, Request, Response

DAY_SECONDS = 86400.0
DEFAULT_POINTS = 288
"""Five minutes each, of a day."""


class History(Protocol):
    """What the daemon knows of the last 24 hours."""

    async def report(self, seconds: float, points: int, disk: str | None) -> dict[str, Any]:
        """The last `seconds`, in at most `points` buckets, of the host or of one disk. Raises ForebayError."""


class HistoryRoutes:
    """The endpoint, on one daemon's history."""

    def __init__(self, history: History) -> None:
        self._history = history

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [("GET", "/history", self.history)]

    async def history(self, request: Request) -> Response:
        """What happened in the last hours."""
        given = await arguments(request, HISTORY)
        seconds, points = given.get("seconds", DAY_SECONDS), given.get("points", DEFAULT_POINTS)
        return JSONResponse(await self._history.report(seconds, points, given.get("disk")))
