# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The routes of overlays that stay: which there are, their snapshots, and what becomes of their changes."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.control.arguments import REVERT, ROLLBACK, SNAPSHOT, arguments
from forebay.control.work import Operation, Progress
from forebay.http.messages import Answer, JSONResponse, Request, Response

Told = dict[str, Any]
"""What is told about one overlay, or about one snapshot: the keys of `forebay overlays --json`, and `snapshots`."""


class Overlays(Protocol):
    """What these routes need of the daemon. Everything raises ForebayError and OSError."""

    def all(self) -> list[Told]:
        """Each overlay, attached or kept."""

    def snapshots(self, name: str) -> list[Told]:
        """Each snapshot of one."""

    async def snapshot(self, name: str, snapshot: str) -> Told:
        """Take one."""

    async def rollback(self, name: str, snapshot: str, *, drop_newer: bool, force: bool) -> Told:
        """Go back to one."""

    async def drop(self, name: str, snapshot: str, progress: Progress) -> Told:
        """Forget one."""

    async def revert(self, name: str, *, sure: bool, force: bool) -> Told:
        """Go back to the image."""

    async def commit(self, name: str, progress: Progress) -> Told:
        """Write the changes to the image."""


class OverlayRoutes:
    """The endpoints."""

    def __init__(self, overlays: Overlays) -> None:
        self._overlays = overlays

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [
            ("GET", "/overlays", self.all),
            ("POST", "/overlays/{name}/commit", self.commit),
            ("POST", "/overlays/{name}/revert", self.revert),
            ("GET", "/overlays/{name}/snapshots", self.snapshots),
            ("POST", "/overlays/{name}/snapshots", self.snapshot),
            ("POST", "/overlays/{name}/rollback", self.rollback),
            ("POST", "/overlays/{name}/drop", self.drop),
        ]

    async def all(self, _: Request) -> Response:
        """A list of overlays, attached or kept."""
        return JSONResponse(self._overlays.all())

    async def commit(self, request: Request) -> Operation:
        """Write the changes to the image; answers with the overlay, as the others do."""
        name = request.path_params["name"]
        return Operation(lambda progress: self._overlays.commit(name, progress))

    async def revert(self, request: Request) -> Response:
        """Give up all changes."""
        given = await arguments(request, REVERT)
        told = await self._overlays.revert(
            request.path_params["name"],
            sure=given.get("yes", False),
            force=given.get("force", False),
        )
        return JSONResponse(told)

    async def snapshots(self, request: Request) -> Response:
        """A list of snapshots, the oldest first."""
        return JSONResponse(self._overlays.snapshots(request.path_params["name"]))

    async def snapshot(self, request: Request) -> Response:
        """Take a snapshot; answers with it."""
        given = await arguments(request, SNAPSHOT, ("snapshot",))
        told = await self._overlays.snapshot(request.path_params["name"], given["snapshot"])
        return JSONResponse(told, 201)

    async def rollback(self, request: Request) -> Response:
        """Go back to a snapshot."""
        given = await arguments(request, ROLLBACK, ("snapshot",))
        told = await self._overlays.rollback(
            request.path_params["name"],
            given["snapshot"],
            drop_newer=given.get("drop_newer", False),
            force=given.get("force", False),
        )
        return JSONResponse(told)

    async def drop(self, request: Request) -> Operation:
        """Forget a snapshot, and give back the room of what only it held."""
        name, given = request.path_params["name"], await arguments(request, SNAPSHOT, ("snapshot",))
        return Operation(lambda progress: self._overlays.drop(name, given["snapshot"], progress))
