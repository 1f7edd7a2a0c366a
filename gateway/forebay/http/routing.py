# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which endpoint answers a request."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from forebay.http.messages import Answer, HTTPException, Request
from forebay.units import printable

Endpoint = Callable[[Request], Awaitable[Answer]]
"""Answers one request."""


@dataclass(frozen=True)
class Route:
    """A method and a path, in which `{name}` stands for one part of any name; GET is for HEAD as well."""

    method: str
    path: str
    endpoint: Endpoint

    def match(self, path: str) -> dict[str, str] | None:
        """What stands for the names, or None for another path."""
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(self.path))
        found = re.fullmatch(pattern, path, re.DOTALL)  # re keeps what it compiled
        return None if found is None else found.groupdict()


class Router:
    """The routes of one socket."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    async def answer(self, request: Request) -> Answer:
        """What the endpoint says. Raises HTTPException (404, 405) where there is none, and what that raises."""
        return await self._endpoint(request)(request)

    def _endpoint(self, request: Request) -> Endpoint:
        """The endpoint; what its path has goes into the request."""
        allowed = []
        for route in self._routes:
            found = route.match(request.path)
            if found is None:
                continue
            if request.method in (route.method, "HEAD" if route.method == "GET" else ""):
                request.path_params = found
                return route.endpoint
            allowed.append(route.method)
        text = (
            f"no {printable(request.method)} {printable(request.path)} here: GET / lists the routes"
        )
        if allowed:
            raise HTTPException(405, text, {"allow": ", ".join(allowed)})
        raise HTTPException(404, text)
