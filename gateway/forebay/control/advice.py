# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The route of what a cache of another size would find."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.http.messages import Answer, JSONResponse, Request, Response


class Advice(Protocol):
    """What the daemon knows about the size of its cache."""

    def report(self) -> dict[str, Any]:
        """What `forebay status --advice --json` prints."""


class AdviceRoutes:
    """The endpoint, on one daemon's advice."""

    def __init__(self, advice: Advice) -> None:
        self._advice = advice

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [("GET", "/advice", self.advice)]

    async def advice(self, _: Request) -> Response:
        """What a cache of another size would find of what is read."""
        return JSONResponse(self._advice.report())
