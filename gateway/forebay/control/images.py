# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The routes of images without a disk: which there are, and what is done with them."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import trio

from forebay.boot.files import Found
from forebay.control.arguments import IMAGES, MARK, PURGE, TAG, TRACE, WARM, arguments
from forebay.control.work import Operation, Progress
from forebay.http.messages import Answer, JSONResponse, Request, Response

Told = dict[str, Any]
"""What is told about one image, or one store: the keys of `forebay images --json` and `forebay stores --json`."""


class Traces(Protocol):
    """What these routes need to know of boot traces. Everything raises ForebayError and OSError."""

    async def find(self, image: str) -> Found:
        """What boots from an image read."""

    async def drop(self, image: str) -> Told:
        """Forget that."""


class Catalogue(Protocol):
    """What these routes need of the daemon. Amounts are bytes. Everything raises ForebayError and OSError."""

    @property
    def traces(self) -> Traces:
        """The boot traces."""

    def images(self, store: str | None) -> AsyncIterator[Told]:
        """Each image, of one store or of all."""

    async def warm(
        self, image: str, amount: int | str, rate: int | None, progress: Progress
    ) -> Told:
        """Bring bytes in from the start, what boots read (`trace`), or `all`, at most at that many bytes a second."""

    async def tag(self, image: str, tags: list[str]) -> Told:
        """Give it tags."""

    async def untag(self, image: str, tags: list[str]) -> Told:
        """Take tags away."""

    async def pin(self, image: str) -> Told:
        """Keep it from eviction and purge."""

    async def unpin(self, image: str) -> Told:
        """End that."""

    async def purge(
        self,
        images: list[str] | None,
        *,
        tag: str | None,
        older_than: float | None,
        dry_run: bool,
        traces: bool,
    ) -> Told:
        """Drop the clean blocks of images, and their boot traces; what was dropped, and what was kept."""


class Stores(Protocol):
    """The sockets of stores."""

    def status(self) -> list[Told]:
        """What is told of each store."""


class ImageRoutes:
    """The endpoints, on one catalogue, and on the stores that have the images."""

    def __init__(self, catalogue: Catalogue, stores: Stores) -> None:
        self._catalogue = catalogue
        self._stores = stores

    def table(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        return [
            ("GET", "/stores", self.stores),
            ("GET", "/images", self.images),
            ("POST", "/images/warm", self.warm),
            ("POST", "/images/tag", self.tag),
            ("POST", "/images/untag", self.untag),
            ("POST", "/images/pin", self.pin),
            ("POST", "/images/unpin", self.unpin),
            ("POST", "/images/purge", self.purge),
            ("GET", "/images/trace", self.trace),
            ("POST", "/images/trace/drop", self.drop_trace),
        ]

    async def images(self, request: Request) -> Response:
        """A list of images; written as JSON one by one, since there may be very many."""
        given = await arguments(request, IMAGES)
        told = [
            json.dumps(one).encode() async for one in self._catalogue.images(given.get("store"))
        ]
        return Response(b"[" + b",".join(told) + b"]")

    async def stores(self, _: Request) -> Response:
        """All stores, a list: their sockets, and who reads what by these."""
        return JSONResponse(self._stores.status())

    async def warm(self, request: Request) -> Operation:
        """Bring an image in; answers with what the cache has of it."""
        given = await arguments(request, WARM, ("image",))
        return Operation(
            lambda progress: self._catalogue.warm(
                given["image"], given.get("amount", "all"), given.get("rate"), progress
            )
        )

    async def tag(self, request: Request) -> Response:
        """Give an image tags; answers with the image, as the next three do."""
        given = await arguments(request, TAG, ("image", "tags"))
        return JSONResponse(await self._catalogue.tag(given["image"], given["tags"]))

    async def untag(self, request: Request) -> Response:
        """Take tags away."""
        given = await arguments(request, TAG, ("image", "tags"))
        return JSONResponse(await self._catalogue.untag(given["image"], given["tags"]))

    async def pin(self, request: Request) -> Response:
        """Keep an image from eviction and purge."""
        given = await arguments(request, MARK, ("image",))
        return JSONResponse(await self._catalogue.pin(given["image"]))

    async def unpin(self, request: Request) -> Response:
        """End that."""
        given = await arguments(request, MARK, ("image",))
        return JSONResponse(await self._catalogue.unpin(given["image"]))

    async def trace(self, request: Request) -> Response:
        """What boots from an image read; with `export` every block of it."""
        given = await arguments(request, TRACE, ("image",))
        found = await self._catalogue.traces.find(given["image"])
        if not given.get("export"):
            return JSONResponse(found.told())
        text = await trio.to_thread.run_sync(found.exported)
        return Response(text)

    async def drop_trace(self, request: Request) -> Response:
        """Forget what boots from an image read."""
        given = await arguments(request, MARK, ("image",))
        return JSONResponse(await self._catalogue.traces.drop(given["image"]))

    async def purge(self, request: Request) -> Response:
        """Drop the clean blocks of images; answers with what was dropped and what was kept."""
        given = await arguments(request, PURGE)
        found = await self._catalogue.purge(
            given.get("images"),
            tag=given.get("tag"),
            older_than=given.get("older_than"),
            dry_run=given.get("dry_run", False),
            traces=given.get("traces", False),
        )
        return JSONResponse(found)
