# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Metrics for whoever may read nothing else: `/metrics` on an address of its own, off by default."""

import logging
import os
import ssl
from collections.abc import Sequence
from typing import Protocol

import trio

from forebay.config.sections import MetricsSection
from forebay.control.prometheus.metrics import PROMETHEUS_TEXT
from forebay.http.connection import serve_connection
from forebay.http.messages import Answer, Request, Response
from forebay.http.routing import Route, Router
from forebay.units import listen_text

log = logging.getLogger("forebay.control")

MOST_CONNECTIONS = 32
"""Scrapers at once. One host has one or two."""

SEND_SECONDS = 30.0
"""How long a scraper may take to read what it asked for, and to agree on TLS."""

AGAIN_SECONDS = 10.0
"""How soon it is tried again to listen, where the address is not there yet, or the port is another program's."""


class Measured(Protocol):
    """What is needed of the daemon."""

    async def metrics(self) -> str:
        """Prometheus text."""


class Scraping:
    """The listener, and its clients."""

    def __init__(self, gateway: Measured, section: MetricsSection) -> None:
        """`section` says where to listen."""
        self._gateway = gateway
        self._section = section
        self._router = Router([Route("GET", "/metrics", self.metrics)])
        self._connections = 0
        self._tls: ssl.SSLContext | None = None
        self._read: Sequence[tuple[int, int]] = ()
        """Inodes and times of change of the files that `_tls` was made of."""

    async def run(self) -> None:
        """Serve until cancelled; without `listen` nothing. What keeps it from listening is told, and tried again."""
        if self._section.listen is None:
            return
        address, port = self._section.listen
        told = ""
        while True:
            try:
                await self._renew_tls()
                listeners = await trio.open_tcp_listeners(port, host=address)
            except OSError as fault:
                why = f"metrics: cannot listen on {listen_text((address, port))}: {fault.strerror or fault}"
                if why != told:
                    log.error("%s: change [metrics], or what is in the way; it is tried again", why)
                told = why
                await trio.sleep(AGAIN_SECONDS)
                continue
            log.info("metrics at %s", listen_text((address, port)))
            await trio.serve_listeners(self._connection, listeners)

    async def metrics(self, _: Request) -> Answer:
        """Prometheus text."""
        return Response((await self._gateway.metrics()).encode(), media_type=PROMETHEUS_TEXT)

    async def _connection(self, stream: trio.SocketStream) -> None:
        """Serve one scraper. trio closes the stream then. Raises nothing."""
        if self._connections >= MOST_CONNECTIONS:
            return
        self._connections += 1
        try:
            await serve_connection(
                await self._secured(stream), self._router.answer, send_seconds=SEND_SECONDS
            )
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as fault:
            log.info("metrics: a client is hung up on: %s", fault.__cause__ or fault)
        except Exception:
            log.exception("metrics: a connection failed")
        finally:
            self._connections -= 1

    async def _secured(self, stream: trio.SocketStream) -> trio.abc.Stream:
        """The stream, with TLS where that is wanted. Raises OSError, BrokenResourceError and TooSlowError."""
        try:
            await self._renew_tls()
        except OSError as fault:
            log.warning("metrics: the certificate of before is used: %s", fault)
        if self._tls is None:
            return stream
        secured = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
        with trio.fail_after(SEND_SECONDS):
            await secured.do_handshake()
        return secured

    async def _renew_tls(self) -> None:
        """Read certificate and key, if there are any and they have changed. Raises OSError (ssl.SSLError is one)."""
        certificate, key = self._section.tls_certificate, self._section.tls_key
        if certificate is None or key is None:
            return

        def renewed() -> tuple[ssl.SSLContext | None, Sequence[tuple[int, int]]]:
            seen = [(found.st_ino, found.st_mtime_ns) for found in map(os.stat, (certificate, key))]
            if seen == self._read:
                return self._tls, seen
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key, password="")  # and never ask a terminal
            return context, seen

        self._tls, self._read = await trio.to_thread.run_sync(renewed)
