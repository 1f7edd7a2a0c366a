# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The routes of the cache device."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.control.arguments import EXTEND, arguments
from forebay.control.work import Operation, Progress
from forebay.http.messages import Answer, JSONResponse, Request, Response


class CacheDevice(Protocol):
    """What these routes need of the daemon. Everything raises ForebayError and OSError."""

    def cache_info(self) -> dict[str, Any]:
        """The cache device and what it holds."""

    async def extend_cache(self, size: int | None, progress: Progress) -> dict[str, Any]:
        """Use all of the cache device, made `size` bytes where it is a file; what it is then."""

    async def release_cache(self, progress: Progress) -> dict[str, Any]:
        """Write back all that is dirty. Raises ForebayError while there are disks."""

    async def scrub(self, progress: Progress) -> dict[str, Any]:
        """Check the whole cache device; what was found."""

    async def repair_cache(self, progress: Progress) -> dict[str, Any]:
        """Use a cache device again that has failed, then check it; what was found."""


class CacheRoutes:
    """The endpoints, on one daemon."""

    def __init__(self, gateway: CacheDevice) -> None:
        self._gateway = gateway

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [
            ("GET", "/cache", self.cache),
            ("POST", "/cache/extend", self.extend),
            ("POST", "/cache/release", self.release),
            ("POST", "/cache/scrub", self.scrub),
            ("POST", "/cache/repair", self.repair),
        ]

    async def cache(self, _: Request) -> Response:
        """What the cache device is and holds."""
        return JSONResponse(self._gateway.cache_info())

    async def extend(self, request: Request) -> Operation:
        """Use a cache device that has grown, or make the file larger first; answers as GET /cache."""
        given = await arguments(request, EXTEND)
        return Operation(lambda progress: self._gateway.extend_cache(given.get("size"), progress))

    async def release(self, _: Request) -> Operation:
        """Make sure that nothing needs the cache any more; answers with the daemon's pid."""
        return Operation(self._gateway.release_cache)

    async def scrub(self, _: Request) -> Operation:
        """Read and check everything on the cache device."""
        return Operation(self._gateway.scrub)

    async def repair(self, _: Request) -> Operation:
        """Use a cache device again that has failed, then do the same."""
        return Operation(self._gateway.repair_cache)
