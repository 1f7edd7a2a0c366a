# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A web server with a certificate of an authority of its own, and with the faults that real ones have."""

import http.server
import itertools
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SAME = ("-subj", "/CN=test", "-days", "2", "-nodes", "-newkey", "ec", "-pkeyopt")
_KEY = (*_SAME, "ec_paramgen_curve:prime256v1")


def make_authority(folder: Path) -> Path:
    """The certificate of an authority; beside it lies one that it signed, for 127.0.0.1, with its key."""
    authority, key = folder / "ca.pem", folder / "ca.key"
    _openssl("req", "-x509", *_KEY, "-keyout", key, "-out", authority)
    _openssl("req", *_KEY, "-keyout", folder / "server.key", "-out", folder / "server.csr")
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    signed = ("-CA", authority, "-CAkey", key, "-CAcreateserial", "-extfile", folder / "ext")
    request = ("-in", folder / "server.csr", "-out", folder / "server.pem", "-days", "2")
    _openssl("x509", "-req", *request, *signed)
    return authority


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@dataclass
class Web:
    """What the server gives, and how; a test changes it while it serves."""

    content: bytes = b""
    tag: str = '"one"'
    changed: str = "Sat, 28 Nov 2026 01:02:03 GMT"
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    """Bytes of the next answers after which the connection ends, one number for each."""
    statuses: list[int] = field(default_factory=list)
    """Of the next answers, instead of 200."""
    location: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    length: bool = True
    lie: int = 0
    """Bytes by which parts begin elsewhere than asked for."""
    asked: list[str] = field(default_factory=list)
    """The Range of each request."""
    url: str = ""


class _Handler(http.server.BaseHTTPRequestHandler):
    web: Web

    def do_GET(self) -> None:
        web = self.web
        written = self.headers.get("Range", "")
        web.asked.append(written)
        if web.statuses:
            self.send_response(web.statuses.pop(0))
            if web.location:
                self.send_header("Location", web.location)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        at = int(written.removeprefix("bytes=").rstrip("-")) if written and web.ranges else 0
        if at >= len(web.content) > 0:
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if at else 200)
        if at:
            whole = len(web.content)
            self.send_header("Content-Range", f"bytes {at + web.lie}-{whole - 1}/{whole}")
        if web.length:
            self.send_header("Content-Length", str(len(web.content) - at))
        named = {"ETag": web.tag, "Last-Modified": web.changed, **web.headers}
        for name, value in named.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        end = at + web.cuts.pop(0) if web.cuts else len(web.content)
        self.wfile.write(web.content[at:end])
        self.close_connection = True
        return None

    def log_message(self, *_: Any) -> None:
        """Nobody wants to read it."""


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Who hangs up, does."""


@contextmanager
def serving(folder: Path | None, web: Web) -> Iterator[Web]:
    """A server for that, whose certificate lies in the folder; without one by plain HTTP."""
    handler = type("Handler", (_Handler,), {"web": web})
    server = _Server(("127.0.0.1", 0), handler)
    if folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    web.url = f"{'https' if folder else 'http'}://127.0.0.1:{server.server_port}/disk"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def numbered(blocks: int, size: int = 4096) -> bytes:
    """So many blocks, each of which says which it is."""
    return b"".join(
        n.to_bytes(8, "big") * (size // 8) for n in itertools.islice(itertools.count(1), blocks)
    )
