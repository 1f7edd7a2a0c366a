# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The routes of settings: what they are and who says so, and those of one disk changed while its VM runs."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from forebay.config.keys import KEYS, parse_change
from forebay.control.arguments import Parse, arguments
from forebay.control.work import Operation, Progress
from forebay.errors import ForebayError
from forebay.http.messages import Answer, HTTPException, JSONResponse, Request, Response

Told = dict[str, Any]


def _changes(value: Any) -> dict[str, Any]:
    """What is to be set, by key; empty, or null, for what the store says. Nothing: other commands are waited for."""
    if not isinstance(value, dict) or len(value) > len(KEYS):
        raise ValueError(f"not an object with at most {len(KEYS)} settings")
    return {key: parse_change(key, given) for key, given in value.items()}


SET: dict[str, Parse] = {"settings": _changes}


class Settings(Protocol):
    """What these routes need of the daemon. Everything raises ForebayError."""

    def told(self, name: str) -> list[Told]:
        """The settings of one disk."""

    def all_told(self) -> AsyncIterator[Told]:
        """Those of all disks."""

    async def set(self, name: str, changes: Mapping[str, Any], progress: Progress) -> Told:
        """Change settings of a disk, all or none of them. The disk's status."""


class Reloading(Protocol):
    """The same."""

    @property
    def settings(self) -> Settings:
        """Those of disks."""

    def running(self) -> Told:
        """The configuration that holds, as `toml`."""

    async def reload(self) -> Told:
        """Take the configuration anew, or nothing of it; what is new."""


class SettingRoutes:
    """The endpoints."""

    def __init__(self, reloading: Reloading) -> None:
        self._settings = reloading.settings
        self._reloading = reloading

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [
            ("GET", "/config", self.config),
            ("POST", "/reload", self.reload),
            ("GET", "/settings", self.all),
            ("GET", "/disks/{name}/settings", self.one),
            ("POST", "/disks/{name}/settings", self.set),
        ]

    async def config(self, _: Request) -> Response:
        """The configuration that holds."""
        return JSONResponse(self._reloading.running())

    async def reload(self, request: Request) -> Response:
        """Take the configuration anew; answers with what is new."""
        await arguments(request, {})
        return JSONResponse(await self._reloading.reload())

    async def all(self, _: Request) -> Response:
        """The settings of all disks, a list."""
        return JSONResponse([row async for row in self._settings.all_told()])

    async def one(self, request: Request) -> Response:
        """Those of one disk."""
        return JSONResponse(self._told(request.path_params["name"]))

    async def set(self, request: Request) -> Operation:
        """Change settings of a disk; answers with its name, and all of them as they are then."""
        name, given = request.path_params["name"], await arguments(request, SET, ("settings",))
        self._told(name)

        async def work(progress: Progress) -> Told:
            await self._settings.set(name, given["settings"], progress)
            return {"name": name, "settings": self._settings.told(name)}

        return Operation(work)

    def _told(self, name: str) -> list[Told]:
        """Raises HTTPException (404) when there is no such disk."""
        try:
            return self._settings.told(name)
        except ForebayError as fault:
            raise HTTPException(404, str(fault)) from None
