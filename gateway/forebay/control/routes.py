# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The control API: HTTP with JSON, for the command, for scripts and for a Prometheus scraper.

What takes long (flush, detach, preload, mode, scrub) answers with one JSON object a line: `{"done": bytes,
"total": bytes}` as it goes on, then `{"result": ...}` or `{"error": text}`. What fails before the first such line is
answered as every other error: a 4xx or 5xx status with `{"error": text}`. If a client hangs up, its work is not waited
for any more; no data is lost by that. The routes stand in gateway/README.md.
"""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal, Protocol

from forebay import __version__
from forebay.config.keys import RATES
from forebay.control.advice import Advice, AdviceRoutes
from forebay.control.arguments import (
    ATTACH,
    DETACH,
    FLUSH,
    FLUSH_MANY,
    MODE,
    PEER,
    PRELOAD,
    RESOLVE,
    SAVE,
    arguments,
    rule_in,
)
from forebay.control.cache import CacheDevice, CacheRoutes
from forebay.control.events import EventRoutes, told
from forebay.control.history import HistoryRoutes
from forebay.control.images import Catalogue, ImageRoutes, Stores
from forebay.control.moves import PATIENCE, MoveRoutes, Moves
from forebay.control.overlays import OverlayRoutes, Overlays
from forebay.control.prometheus.metrics import PROMETHEUS_TEXT
from forebay.control.settings import Reloading, SettingRoutes
from forebay.control.staging import Staging, StagingRoutes
from forebay.control.summary import Summary, SummaryRoutes
from forebay.control.work import Operation, Progress, error, failure
from forebay.doors.tenant import Rule
from forebay.errors import ForebayError
from forebay.events.held import Events
from forebay.http.messages import Answer, HTTPException, HungUp, JSONResponse, Request, Response
from forebay.http.routing import Endpoint, Route
from forebay.units import Mode

Status = dict[str, Any]
"""What is told about one disk; the keys of the contract and more."""

NOT_SERVED = "failed"
"""The state of a disk on record that could not be opened; what it has dirty is not known."""

WRITES_BACK = (Mode.WRITE_BACK, Mode.FULL_COPY)
"""Modes in which something is written to the image behind the guest's back."""


class Answers(CacheDevice, Protocol):
    """What the control API needs of the daemon. Amounts are bytes, time-outs seconds.

    Everything raises ForebayError for what cannot be done, and OSError for what the host refused.
    """

    async def attach(
        self,
        name: str,
        image: str,
        *,
        mode: Mode | None,
        cache_size: int | None,
        preload: int | str | None,
        rates: Mapping[str, int],
        read_only: bool,
        overlay: bool,
        keep: bool,
        rule: Rule,
        gives_way: bool,
        image_format: str | None,
        incoming: bool,
        with_data: bool,
        patience: float,
    ) -> Status:
        """Serve an image; None stands for what the store says. `gives_way`: to a disk that writes the image.

        `rates`: those of RATES that it is to have. `image_format`: `raw` for its bytes. `incoming`: another host is to
        hand it over within `patience` seconds, an overlay `with_data` too. The status says `attached_already`.
        """

    async def detach(self, name: str, *, discard: bool, force: bool, progress: Progress) -> None:
        """Drain, or drop what is dirty, and stop serving."""

    def status(self, name: str | None = None) -> list[Status]:
        """All disks, or the one with this name."""

    def statuses(self) -> AsyncIterator[Status]:
        """All disks, in slices of work."""

    async def flush(
        self, names: list[str] | None, *, timeout: float | None, progress: Progress
    ) -> None:
        """Return when none of these disks (None: of all) has anything dirty."""

    async def set_mode(self, name: str, mode: Mode, progress: Progress) -> Status:
        """Change how a disk reads and writes."""

    async def set_peer(self, name: str, rule: Rule, *, evict: bool) -> Status:
        """Change which processes may use a disk; `evict`: hang up on those that do, but for doors."""

    async def resolve(
        self, name: str, keeps: Literal["mine", "image"], *, sure: bool, progress: Progress
    ) -> Status:
        """Go on with an image that was changed, with the disk's own data or without it."""

    async def save(
        self,
        name: str,
        to: str,
        *,
        partial: bool,
        form: str,
        snapshot: str | None,
        progress: Progress,
    ) -> Status:
        """Make a new image of what the disk shows, or showed at a snapshot; `form` is raw or qcow2."""

    async def preload(self, name: str, amount: int | str, progress: Progress) -> None:
        """Bring in bytes from the start, or `trace`, or `all`."""

    def info(self) -> dict[str, Any]:
        """What belongs to no disk, and not to the cache: how much memory clients hold, and may hold."""

    async def metrics(self) -> str:
        """Prometheus text."""

    @property
    def stores(self) -> Stores:
        """The sockets of stores."""

    @property
    def catalogue(self) -> Catalogue:
        """The images, without disks."""

    @property
    def advice(self) -> Advice:
        """What a cache of another size would find."""

    @property
    def moves(self) -> Moves:
        """Handovers of images to other hosts, and from them."""

    @property
    def overlays(self) -> Overlays:
        """The overlays, attached or kept."""

    @property
    def summary(self) -> Summary:
        """How this host stands."""

    @property
    def reloading(self) -> Reloading:
        """The configuration, and the settings of disks."""

    @property
    def staging(self) -> Staging:
        """What is staged with other hosts."""


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint, which answers every fault in JSON: none of them may end the daemon. It raises HungUp alone."""

    async def call(request: Request) -> Answer:
        try:
            return await endpoint(request)
        except HungUp:
            raise
        except Exception as fault:  # noqa: BLE001
            return error(*failure(fault, request.path_params.get("name", "")), fault)

    return call


class Control:
    """The endpoints, on one gateway."""

    def __init__(self, gateway: Answers, events: Events) -> None:
        """`events` are what is told of what has happened."""
        self._gateway = gateway
        self._events = events

    def routes(self) -> list[Route]:
        """Every route; gateway/README.md has the same table."""
        table: list[tuple[str, str, Endpoint]] = [
            ("GET", "/", self.index),
            ("GET", "/metrics", self.metrics),
            ("GET", "/gateway", self.gateway),
            ("GET", "/disks", self.disks),
            ("POST", "/disks", self.attach),
            ("GET", "/disks/{name}", self.disk),
            ("DELETE", "/disks/{name}", self.detach),
            ("POST", "/disks/{name}/flush", self.flush),
            ("POST", "/disks/{name}/mode", self.mode),
            ("POST", "/disks/{name}/peer", self.peer),
            ("POST", "/disks/{name}/preload", self.preload),
            ("POST", "/disks/{name}/resolve", self.resolve),
            ("POST", "/disks/{name}/save", self.save),
            ("POST", "/flush", self.flush_many),
            *EventRoutes(self._events).table(),
            *CacheRoutes(self._gateway).table(),
            *AdviceRoutes(self._gateway.advice).table(),
            *SummaryRoutes(self._gateway.summary).table(),
            *HistoryRoutes(self._gateway.summary.history).table(),
            *ImageRoutes(self._gateway.catalogue, self._gateway.stores).table(),
            *OverlayRoutes(self._gateway.overlays).table(),
            *MoveRoutes(self._gateway.moves).table(),
            *StagingRoutes(self._gateway.staging).table(),
            *SettingRoutes(self._gateway.reloading).table(),
        ]
        return [
            Route(method, path, _guarded(told(method, path, call))) for method, path, call in table
        ]

    def _name(self, request: Request) -> str:
        """The disk in the path. Raises HTTPException (404) when there is none."""
        name: str = request.path_params["name"]
        try:
            self._gateway.status(name)
        except ForebayError as fault:
            raise HTTPException(404, str(fault)) from None
        return name

    async def index(self, _: Request) -> Response:
        """Who answers, for a person with curl."""
        routes = [f"{route.method} {route.path}" for route in self.routes()]
        return JSONResponse({"forebay": __version__, "routes": routes})

    async def metrics(self, _: Request) -> Response:
        """Prometheus text."""
        return Response((await self._gateway.metrics()).encode(), media_type=PROMETHEUS_TEXT)

    async def gateway(self, _: Request) -> Response:
        """What belongs to no disk, and not to the cache."""
        return JSONResponse({"forebay": __version__, **self._gateway.info()})

    async def disks(self, _: Request) -> Response:
        """The status of all disks, a list; written as JSON one by one, since there may be very many."""
        told = [json.dumps(one).encode() async for one in self._gateway.statuses()]
        return Response(b"[" + b",".join(told) + b"]")

    async def disk(self, request: Request) -> Response:
        """The status of one disk."""
        return JSONResponse(self._gateway.status(self._name(request))[0])

    async def attach(self, request: Request) -> Response:
        """Attach an image; answers with the disk's status, and 200 instead of 201 where the very same was there."""
        given = await arguments(request, ATTACH, ("name", "image"))
        status = await self._gateway.attach(
            given["name"],
            given["image"],
            mode=given.get("mode"),
            cache_size=given.get("cache_size"),
            preload=given.get("preload"),
            rates={key: given[key] for key in RATES if key in given},
            read_only=given.get("read_only", False),
            overlay=given.get("overlay", False),
            keep=given.get("keep", False),
            rule=rule_in(given),
            gives_way=given.get("gives_way", False),
            image_format=given.get("format"),
            incoming=given.get("incoming", False),
            with_data=given.get("with_data", False),
            patience=given.get("patience", PATIENCE),
        )
        return JSONResponse(status, 200 if status["attached_already"] else 201)

    async def detach(self, request: Request) -> Operation:
        """Write back what is dirty (or drop it: `discard`) and let the image go."""
        name, given = self._name(request), await arguments(request, DETACH)

        async def work(progress: Progress) -> Status:
            await self._gateway.detach(
                name,
                discard=given.get("discard", False),
                force=given.get("force", False),
                progress=progress,
            )
            return {"name": name}

        return Operation(work)

    async def flush(self, request: Request) -> Operation:
        """Write back what one disk has dirty."""
        name, given = self._name(request), await arguments(request, FLUSH)
        return self._flush([name], given.get("timeout"))

    async def flush_many(self, request: Request) -> Operation:
        """Write back what all disks, or those in `names`, have dirty."""
        given = await arguments(request, FLUSH_MANY)
        return self._flush(given.get("names"), given.get("timeout"))

    def _flush(self, names: list[str] | None, timeout: float | None) -> Operation:
        """Write back what these disks (None: all) have dirty, within `timeout` seconds."""

        async def work(progress: Progress) -> Status:
            before = self._written_back()
            await self._gateway.flush(names, timeout=timeout, progress=progress)
            after = self._written_back()
            disks = [d for d in self._gateway.status() if names is None or d["name"] in names]
            return {
                "names": [disk["name"] for disk in disks],
                "written_back_bytes": sum(
                    # one that has left its mode, or is another by that name, counts for nothing
                    max(0, after.get(disk["name"], 0) - before.get(disk["name"], 0))
                    for disk in disks
                ),
                "dirty_bytes": sum(disk["dirty_bytes"] for disk in disks),
                "not_served": [disk["name"] for disk in disks if disk["state"] == NOT_SERVED],
            }

        return Operation(work)

    def _written_back(self) -> dict[str, int]:
        """By disk, bytes that were written to its image behind the guest's back so far."""
        return {
            disk["name"]: disk["origin_written_bytes"]
            for disk in self._gateway.status()
            if disk["mode"] in WRITES_BACK
        }

    async def mode(self, request: Request) -> Operation:
        """Change the mode; answers with the disk's status."""
        name, given = self._name(request), await arguments(request, MODE, ("mode",))
        return Operation(lambda progress: self._gateway.set_mode(name, given["mode"], progress))

    async def peer(self, request: Request) -> Response:
        """Change which processes may use the disk; answers with the disk's status."""
        name, given = self._name(request), await arguments(request, PEER)
        evict = given.get("evict", False)
        return JSONResponse(await self._gateway.set_peer(name, rule_in(given), evict=evict))

    async def preload(self, request: Request) -> Operation:
        """Bring part of the image in; answers with the disk's status."""
        name, given = self._name(request), await arguments(request, PRELOAD, ("amount",))

        async def work(progress: Progress) -> Status:
            await self._gateway.preload(name, given["amount"], progress)
            return self._gateway.status(name)[0]

        return Operation(work)

    async def resolve(self, request: Request) -> Operation:
        """Go on with an image that was changed; answers with the disk's status."""
        name, given = self._name(request), await arguments(request, RESOLVE, ("keep",))
        sure = given.get("yes", False)
        return Operation(
            lambda progress: self._gateway.resolve(
                name, given["keep"], sure=sure, progress=progress
            )
        )

    async def save(self, request: Request) -> Operation:
        """Make a new image of what the disk shows; answers with what was saved."""
        name, given = self._name(request), await arguments(request, SAVE, ("to",))
        return Operation(
            lambda progress: self._gateway.save(
                name,
                given["to"],
                partial=given.get("partial", False),
                form=given.get("format", "raw"),
                snapshot=given.get("snapshot"),
                progress=progress,
            )
        )
