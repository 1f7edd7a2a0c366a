# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The routes of handovers: an image is prepared for another host, taken from it, or stays where it is."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from forebay.control.arguments import EVACUATE, HANDOVER, arguments
from forebay.control.work import Operation, Progress
from forebay.http.messages import Answer, Request

PATIENCE = 30.0
"""Seconds that another host may take, where nobody says how long."""

Status = dict[str, Any]


class Moves(Protocol):
    """What these routes need of the daemon: each returns the disk's status. Everything raises ForebayError, OSError."""

    async def prepare(
        self, name: str, to: str, patience: float, progress: Progress, *, with_data: bool
    ) -> Status:
        """Have the disk prepared for the host that asks for it."""

    async def finish(self, name: str, patience: float) -> Status:
        """Have the disk take its image."""

    async def abort(self, name: str, patience: float) -> Status:
        """End the handover."""

    @property
    def evacuate(self) -> Callable[[str, float, Progress], Awaitable[Status]]:
        """Empties the host: for VMs that go to that host meanwhile, for so many seconds."""


class MoveRoutes:
    """The endpoints."""

    def __init__(self, moves: Moves) -> None:
        self._moves = moves

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [
            ("POST", "/disks/{name}/handover", self.handover),
            ("POST", "/evacuate", self.evacuate),
        ]

    async def evacuate(self, request: Request) -> Operation:
        """Write back what all disks have dirty, and give back what nobody uses; answers with what is left."""
        given = await arguments(request, EVACUATE)
        to, patience = given.get("to", ""), given.get("patience", PATIENCE)
        return Operation(lambda progress: self._moves.evacuate(to, patience, progress))

    async def handover(self, request: Request) -> Operation:
        """Do one step; answers with the disk's status."""
        name, given = request.path_params["name"], await arguments(request, HANDOVER, ("step",))
        step, patience = given["step"], given.get("patience", PATIENCE)

        async def work(progress: Progress) -> Status:
            if step == "prepare":
                to, with_data = given.get("to", ""), given.get("with_data", False)
                return await self._moves.prepare(name, to, patience, progress, with_data=with_data)
            if step == "finish":
                return await self._moves.finish(name, patience)
            return await self._moves.abort(name, patience)

        return Operation(work)
