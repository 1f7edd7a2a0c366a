# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image on a web server, read by nbdkit's curl plugin, which is started as the servers of formats are.

Where it lies is found out here, at each opening: redirections are followed to what the configuration allows, and nbdkit
is given the URL at their end, and follows none. What it looked like then, by ETag or time, goes with each request of
nbdkit (If-Match, If-Unmodified-Since): a server that has another file by now refuses, so nothing is ever mixed.

Everything here blocks, and belongs in a thread.
"""

import email.utils
import errno
import http.client
import re
import shutil
import ssl
import stat
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import Any

from xxhash import xxh3_64_intdigest

from forebay.config.urls import is_allowed_url
from forebay.errors import ForebayError
from forebay.formats.magic import RAW, START, detect
from forebay.origin.addresses import WebAddress, parse_url
from forebay.origin.calls import Status
from forebay.origin.opening import OpenImage
from forebay.origin.protocol import Identity
from forebay.origin.virtual.disk import VirtualDisk
from forebay.origin.virtual.header import LARGEST
from forebay.origin.virtual.opening import check_size
from forebay.origin.virtual.origin import BlockingVirtual, VirtualOrigin
from forebay.origin.virtual.servers import Servers, Web
from forebay.origin.worker import syscalls
from forebay.origin.worker.process import Worker, folder_in
from forebay.origin.worker.program import LISTENING
from forebay.origin.worker.server import Connection, Server, start
from forebay.units import printable

PROGRAM = "nbdkit"

LOOK_SECONDS = 60.0
"""How often a server is asked whether it still has the same file, if its requests go well."""

MOST_REDIRECTIONS = 5

ANSWER_SECONDS = 20.0
"""In which a server has to answer each request."""

NETWORK = (
    "ssl",
    "pki",
    "ca-certificates",
    "crypto-policies",
    "resolv.conf",
    "hosts",
    "nsswitch.conf",
    "gai.conf",
)
"""What a client of web servers reads, in /etc."""

_RANGE = re.compile(r"bytes 0-0/([0-9]{1,18})", re.ASCII)
_TAG = re.compile(r'"[!#-~]{0,256}"', re.ASCII)
"""A strong one: only such can be asked for."""
_TIME = re.compile(r"[A-Za-z]{3}, [0-9A-Za-z: ]{10,40} GMT", re.ASCII)

# nbdkit takes a socket as service managers hand them over: descriptor 3 (sd_listen_fds(3))
_WRAPPER = (
    "import os,sys; os.dup2(int(sys.argv[1]),3); os.environ.update(LISTEN_FDS='1',LISTEN_PID=str(os.getpid())); "
    "os.execvp(sys.argv[2],sys.argv[2:])"
)


@dataclass(frozen=True)
class Found:
    """A file on a web server, as it was when it was looked at."""

    url: str
    """Where it lies, at the end of all redirections."""
    size: int
    tag: str
    """Its ETag; empty where it has none that can be asked for."""
    changed: str
    """When it was changed last, as the server writes it; empty where it does not."""

    @property
    def status(self) -> Status:
        """The same as of a file. The inode stands for what the server calls this version of the file."""
        when = email.utils.parsedate_to_datetime(self.changed).timestamp() if self.changed else 0
        inode = xxh3_64_intdigest(self.tag.encode()) >> 1 if self.tag else 0
        times = int(when) * 10**9
        return Status(stat.S_IFREG, 1, inode, self.size, times, times, 0)

    @property
    def conditions(self) -> list[str]:
        """Headers with which a request is refused once there is another file."""
        tag = [f"If-Match: {self.tag}"] if self.tag else []
        return tag or ([f"If-Unmodified-Since: {self.changed}"] if self.changed else [])


class Look:
    """Looks at a file on a web server, and not again while that is fresh."""

    def __init__(self, address: WebAddress, web: Web) -> None:
        self._address = address
        self._web = web
        self._found: Found | None = None
        self._at = 0.0

    def __call__(self) -> Status:
        """What the file is now, or was a moment ago. Raises ForebayError, OSError."""
        return self.found().status

    def found(self) -> Found:
        """The same."""
        if self._found is None or time.monotonic() - self._at > LOOK_SECONDS:
            self._found = look(self._address.url, self._web)
            self._at = time.monotonic()
        return self._found

    def is_stale(self) -> None:
        """A request has failed: look again."""
        self._at = -LOOK_SECONDS


class BlockingWeb(BlockingVirtual):
    """The calls on one image of a web server."""

    def identity(self) -> Identity:
        """Size, time and what stands for the ETag. Raises OSError."""
        try:
            found = self._image.look()
        except ForebayError as fault:
            raise OSError(errno.EIO, str(fault)) from fault
        return Identity(found.size, found.mtime_ns, found.ctime_ns, found.inode)

    def read(self, offset: int, length: int) -> bytearray:
        """As of a file. A server that has another file by now has refused."""
        try:
            return super().read(offset, length)
        except OSError:
            if isinstance(self._image.look, Look):
                self._image.look.is_stale()
            raise


class WebOrigin(VirtualOrigin):
    """An image of a web server. Implements forebay.origin.protocol.Origin."""

    _blocking = BlockingWeb


def open_web(address: WebAddress, servers: Servers, *, first: bool) -> OpenImage:
    """The image, open for reading. `first`: it is just being attached, so its format is looked at.

    Raises ForebayError for what the operator has to change, OSError for a server that does not answer.
    """
    if shutil.which(PROGRAM) is None:
        raise ForebayError(
            f"{address.key} needs nbdkit with its curl plugin: install it (Debian: nbdkit), or bring the image into a "
            "store with forebay import"
        )
    see = Look(address, servers.web())
    found = see.found()
    worker = Worker(address.key, None)
    serve = partial(_serve, found, address, servers)
    disk = VirtualDisk(address.key, worker, 0, found.size, serve, writes=False)
    if first:
        _check_raw(address, disk)
    return OpenImage(disk.handle, found.size, True, see)


def _check_raw(address: WebAddress, disk: VirtualDisk) -> None:
    """Raise ForebayError for an image that is not raw; the disk is closed then."""
    try:
        found = detect(syscalls.pread(disk.handle, START, 0))
    except BaseException:
        disk.close()
        raise
    if found != RAW:
        disk.close()
        raise ForebayError(
            f"{address.key} is in {found} format: bring it into a store with forebay import, and attach it there"
        )


def _serve(found: Found, address: WebAddress, servers: Servers, worker: Worker) -> list[Connection]:
    """Start nbdkit; connections to it. Raises ForebayError, OSError."""
    web = servers.web()
    words = [f"url={found.url}", "protocols=https", "followlocation=false"]
    words += [f"timeout={ANSWER_SECONDS:.0f}", *(f"header={line}" for line in found.conditions)]
    network = [f"/etc/{name}" for name in NETWORK]
    if web.ca_file is not None:
        words.append(f"cainfo={web.ca_file}")
        network.append(str(web.ca_file))
    server = Server(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _WRAPPER,
            LISTENING,
            PROGRAM,
            "--readonly",
            "curl",
            *words,
        ],
        network=network,
        at_once=False,
    )
    connections = start(worker, server, folder_in(servers.run), partial(_refusal, address.key))
    check_size(connections, found.size, f"{address.key}: {PROGRAM}", "its server")
    return connections


def _refusal(key: str, said: str) -> ForebayError:
    """What to raise where nbdkit does not serve it."""
    return ForebayError(
        f"{key}: {PROGRAM} cannot read it ({said[-400:]}): see that its server answers"
    )


# ------------------------------------------------------------------------------------------------------ looking at it


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Followed to what the configuration allows."""

    max_redirections = MOST_REDIRECTIONS

    def __init__(self, url: str, allowed: list[str]) -> None:
        self._url = url
        self._allowed = allowed

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Implements HTTPRedirectHandler. Raises ForebayError."""
        try:
            is_allowed = is_allowed_url(self._allowed, parse_url(newurl).url)
        except ForebayError:
            is_allowed = False
        if not is_allowed:
            raise ForebayError(
                f"{self._url} redirects to {printable(newurl[:200])}, which is not allowed by https in [origins]"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def look(url: str, web: Web) -> Found:
    """The file at a URL. Raises ForebayError for what the operator has to change, OSError for no answer."""
    context = ssl.create_default_context(cafile=None if web.ca_file is None else str(web.ca_file))
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context), _Redirections(url, web.allowed)
    )
    headers = {"Range": "bytes=0-0", "User-Agent": "forebay"}
    asked = urllib.request.Request(url, headers=headers)  # noqa: S310  (parse_url takes https only)
    try:
        with opener.open(asked, timeout=ANSWER_SECONDS) as answer:
            return _found(url, answer)
    except urllib.error.HTTPError as fault:
        fault.close()
        if fault.code in _TEMPORARY:
            raise OSError(errno.EIO, f"{url}: its server says {fault.code}") from None
        what = f"its server says {fault.code}"
        if fault.code in _REDIRECTS:
            what = f"it redirects to what is no https URL, or more than {MOST_REDIRECTIONS} times"
        raise ForebayError(f"{url}: {what}: see that the URL is right") from None
    except urllib.error.URLError as fault:
        if isinstance(fault.reason, ssl.SSLCertVerificationError):
            raise ForebayError(
                f"{url}: the certificate of its server is not good ({fault.reason.verify_message}): see ca_file in "
                "[origins]"
            ) from None
        raise OSError(errno.EIO, f"{url}: {printable(str(fault.reason))}") from None
    except (http.client.HTTPException, ValueError) as fault:
        raise OSError(
            errno.EIO, f"{url}: {printable(str(fault) or type(fault).__name__)}"
        ) from None


_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}
_REDIRECTS = {301, 302, 303, 307, 308}


def _found(url: str, answer: Any) -> Found:
    """What the answer to a request of one byte says. Raises ForebayError."""
    told = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status != http.client.PARTIAL_CONTENT or told is None:
        raise ForebayError(
            f"{url}: its server gives no parts of files: bring the image into a store with forebay import"
        )
    size = int(told[1])
    if not 0 < size <= LARGEST:
        raise ForebayError(
            f"{url}: its server says that it has {size} bytes: see that the URL is right"
        )
    tag, changed = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
    return Found(
        parse_url(answer.url).url,
        size,
        tag if _TAG.fullmatch(tag) else "",
        changed if _TIME.fullmatch(changed) else "",
    )
