# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The server of the page: who may ask for what, and within which bounds.

There is no password. On a loopback address everybody on this host may look, and so may a web page in a browser of this
host, were it not for the `Host` header: another site's name that leads here (DNS rebinding) is refused.
"""

import ipaddress
import logging
import re
import signal
from collections.abc import Sequence
from typing import Any

import trio

from forebay.errors import ForebayError
from forebay.http.connection import serve_connection
from forebay.http.messages import Answer, HTTPException, JSONResponse, Request, Response
from forebay.http.routing import Route, Router
from forebay.page.asking import Asking, Daemon
from forebay.page.document import document, headers_for
from forebay.systemd import notify
from forebay.units import listen_text, parse_name

log = logging.getLogger("forebay.page")

MOST_CONNECTIONS = 64
"""Clients at once. A browser has six at most."""
SEND_SECONDS = 30.0
"""How long a client may take to read what it asked for."""
SPANS = {"1h": 3600.0, "6h": 21600.0, "24h": 86400.0}
"""What charts may show, in seconds."""
LONGEST_FIND = 64
"""Characters of a name that is looked for."""
LOCAL = "localhost"


class Page:
    """What is answered."""

    def __init__(self, daemon: Daemon, names: Sequence[str] = ()) -> None:
        """`names` are those of this host by which browsers may ask, beside its addresses. Raises OSError."""
        self._asking = Asking(daemon)
        self._names = {LOCAL, *(name.lower() for name in names)}
        self._document = document()
        self._headers = headers_for(self._document)
        self._router = Router(
            [
                Route("GET", "/", self.page),
                Route("GET", "/now", self.now),
                Route("GET", "/history", self.history),
            ]
        )

    async def answer(self, request: Request) -> Answer:
        """The answer to one request. Raises nothing expected."""
        try:
            self._check_host(request.headers.get("host", ""))
            return await self._router.answer(request)
        except HTTPException as fault:
            headers = self._headers | fault.headers
            return JSONResponse({"error": fault.detail}, fault.status_code, headers=headers)

    def _check_host(self, header: str) -> None:
        """Raises HTTPException (421) for a name that is not this host's."""
        name = re.sub(r":[0-9]*\Z", "", header).lower().removesuffix(".")
        if name not in self._names and not _is_address(name):
            raise HTTPException(
                421,
                "this is not the host of that name: use its address, or start 'forebay page --name NAME'",
            )

    async def page(self, _: Request) -> Answer:
        """The page."""
        return Response(
            self._document, media_type="text/html; charset=utf-8", headers=self._headers
        )

    async def now(self, request: Request) -> Answer:
        """How the host stands."""
        find = request.query_params.get("find", "")
        if len(find) > LONGEST_FIND:
            raise HTTPException(400, f"find: at most {LONGEST_FIND} characters")
        return self._json(await self._asking.now(find))

    async def history(self, request: Request) -> Answer:
        """What happened lately."""
        given = request.query_params
        span, disk = given.get("span", "24h"), given.get("disk") or None
        if span not in SPANS:
            raise HTTPException(400, f"span: use one of {', '.join(SPANS)}")
        try:
            name = None if disk is None else parse_name(disk)
        except ValueError as fault:
            raise HTTPException(400, f"disk: {fault}") from None
        return self._json(await self._asking.history(SPANS[span], name))

    def _json(self, content: Any) -> Answer:
        return JSONResponse(content, headers=self._headers)


def _is_address(host: str) -> bool:
    """True for an IP address, as a `Host` header has it: nobody can have a name that is one."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return (ipaddress.ip_address(bare).version == 6) == (bare != host)
    except ValueError:
        return False


class Server:
    """The connections of those who look."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._connections = 0

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serve one client. trio closes the stream then. Raises nothing."""
        if self._connections >= MOST_CONNECTIONS:
            return
        self._connections += 1
        try:
            await serve_connection(stream, self._page.answer, send_seconds=SEND_SECONDS)
        except Exception:
            log.exception("a connection failed")
        finally:
            self._connections -= 1


async def listeners_on(listen: tuple[str, int]) -> list[trio.SocketListener]:
    """The listening sockets. Raises ForebayError where there cannot be any."""
    address, port = listen
    try:
        return list(await trio.open_tcp_listeners(port, host=address))
    except OSError as fault:
        cause = fault.__cause__ or fault
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        what = cause.strerror if isinstance(cause, OSError) else cause
        raise ForebayError(
            f"cannot listen on {listen_text(listen)}: {what}: choose another address with --listen"
        ) from None


async def serve(page: Page, listen: tuple[str, int]) -> None:
    """Serve until SIGTERM or SIGINT. Raises ForebayError."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        listeners = await listeners_on(listen)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, Server(page).connection, listeners)
            print(f"forebay page: http://{listen_text(listen)}/", flush=True)
            notify("READY=1")
            await anext(signals)
            notify("STOPPING=1")
            nursery.cancel_scope.cancel()


def run(daemon: Daemon, listen: tuple[str, int], names: Sequence[str]) -> None:
    """Serve the page until SIGTERM or SIGINT. Raises ForebayError and OSError."""
    trio.run(serve, Page(daemon, names), listen)
