# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A file on a web server: fetched by HTTPS, and gone on with where it broke off.

A server's certificate is checked, and a redirection leads to HTTPS only. Servers give less than they should: so a file
that is gone on with has to be the one that was begun, by its size and its ETag or its time, and each wait ends.
"""

import http.client
import ipaddress
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

from forebay import __version__
from forebay.errors import ForebayError
from forebay.units import KIB, printable

LONGEST_URL = 4096

TIMEOUT = 60.0
"""Seconds in which a server has to answer, and to go on."""

SLOWEST = 64 * KIB
"""Bytes that it has to send in each TIMEOUT."""

PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds before a connection that broke is made again, each time without anything received. Then it is given up."""

_OVER = "run the same command again, which starts over"

_TEMPORARY = {408, 429, 500, 502, 503, 504}
_CHUNK = 256 * KIB
_LONGEST_TAG = 1024


class AwayError(ForebayError):
    """The server does not give the file now. What was fetched is of use later."""


class _Broken(Exception):
    """A connection that may be made again. The text says why."""


class _Busy(_Broken):
    """A server that asks to be asked later."""


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Only to where the source itself might be."""

    max_redirections = 10

    def __init__(self, check: Callable[[str], None]) -> None:
        self._check = check

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Implements HTTPRedirectHandler. Raises ForebayError."""
        self._check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class WebFile:
    """One file of a web server."""

    is_here = False

    def __init__(self, url: str, *, ca_file: str | None, allow_http: bool, trust: bool) -> None:
        """Nothing is asked yet. `ca_file`: of whoever signed the server's certificate, instead of the host's own.

        `trust`: True if the operator knows the checksum, so that a server need not tell one file from another.
        Raises ForebayError, and OSError where the file cannot be read.
        """
        self.name = url
        self.size: int | None = None
        self.identity: dict[str, Any] = {}
        self._trust = trust
        self._allow_http = allow_http
        self._check(url, url)
        self._opener = _opener(ca_file, lambda to: self._check(to, url), allow_http=allow_http)
        self._response: http.client.HTTPResponse | None = None
        self._at = 0
        self._ended = threading.Event()

    def _check(self, url: str, of: str) -> None:
        """Raises ForebayError for a URL, which may be a redirection of another, that is not asked for."""
        what = "it" if url == of else f"'{printable(of)}' redirects to a URL that"
        if len(url) > LONGEST_URL:
            raise ForebayError(f"{what} has more than {LONGEST_URL} characters: that is no URL")
        parts = _parts(url)
        if parts is None:
            raise ForebayError(f"'{printable(url)}' is not a URL: write https://host/path")
        if parts.username is not None or parts.password is not None:
            raise ForebayError("a URL with a password would be seen by all users: fetch it first")
        if parts.scheme != "https" and not (
            parts.scheme == "http" and self._allow_http and (url == of or of.startswith("http:"))
        ):
            if url != of:
                raise ForebayError(
                    f"'{printable(of)}' redirects to '{printable(url)}', which is not https"
                )
            plain = parts.scheme == "http"
            hint = "say --allow-http if it may be changed on the way" if plain else "fetch it first"
            raise ForebayError(f"'{printable(url)}' is not https: {hint}")

    # ---------------------------------------------------------------------------------------------------- the beginning

    def begin(self, known: dict[str, Any], at: int) -> bool:
        """Implements Source."""
        size = known.get("size")
        if known.get("url") == self.name and at > 0 and (size is None or at <= size):
            last = at == size
            self._connect(0 if last else at)
            if self._is(known) and (last or self._at == at):
                self._at = at
                if last:
                    self._hang_up()
                return True
            self._hang_up()
        self._connect(0)
        return False

    def _is(self, known: dict[str, Any]) -> bool:
        """True if the file that the server gives now is that one, as far as it tells."""
        if known.get("size") != self.size:
            return False
        if self._trust:
            return True
        return any(
            self.identity[key] and self.identity[key] == known.get(key)
            for key in ("tag", "changed")
        )

    def _connect(self, at: int) -> None:
        """Ask until there is an answer, from byte `at` on or from 0. Raises AwayError, and ForebayError.

        A server that never answered, and is not busy, is asked once: the name may be wrong.
        """
        for pause in (*PAUSES, None):
            try:
                return self._ask(at)
            except _Broken as fault:
                if pause is None or not (self.identity or isinstance(fault, _Busy)):
                    self._give_up(str(fault))
                self._ended.wait(pause)
        raise AssertionError

    def _give_up(self, why: str) -> NoReturn:
        what = "run the same command again, which goes on where it was"
        raise AwayError(
            f"{self.name}: {why}: {what if self._at else 'see that the server answers'}"
        )

    def _ask(self, at: int) -> None:
        """One request. Raises _Broken, and ForebayError."""
        headers = {"Accept-Encoding": "identity", "User-Agent": f"forebay/{__version__}"}
        if at:
            headers["Range"] = f"bytes={at}-"
        request = urllib.request.Request(self.name, headers=headers)  # noqa: S310  (checked)
        try:
            response = self._opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as fault:
            fault.close()
            if fault.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and at:
                return self._ask(0)
            what = f"{fault.code} {printable(str(fault.reason).partition(chr(10))[0])[:80]}"
            if fault.code in _TEMPORARY:
                raise _Busy(what) from None
            raise ForebayError(f"{self.name}: {what}: check the URL") from None
        except ssl.SSLCertVerificationError as fault:
            self._untrusted(fault)
        except (OSError, http.client.HTTPException) as fault:
            reason = getattr(fault, "reason", fault)
            if isinstance(reason, ssl.SSLCertVerificationError):
                self._untrusted(reason)
            raise _Broken(_in_words(reason)) from None
        self._response = response
        try:
            self._take(response, at)
        except BaseException:
            self._hang_up()
            raise

    def _untrusted(self, fault: ssl.SSLCertVerificationError) -> NoReturn:
        raise ForebayError(
            f"{self.name}: its certificate is not trusted ({fault.verify_message}): name the authority that signed it "
            "with --cacert"
        ) from None

    def _take(self, response: http.client.HTTPResponse, at: int) -> None:
        """What the answer's head says. Raises ForebayError for one that is of no use."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise ForebayError(
                f"{self.name}: the server packs it by itself, unasked: fetch it by other means"
            )
        self._at, self.size = 0, response.length
        if response.status == http.client.PARTIAL_CONTENT:
            self._at, self.size = _range_of(headers, self.name)
            if self._at != at:
                raise ForebayError(f"{self.name}: the server gives another part than was asked for")
        elif response.status != http.client.OK:
            raise ForebayError(f"{self.name}: the server answers {response.status}: check the URL")
        if self.size is None and not response.chunked and not self._trust:
            raise ForebayError(
                f"{self.name}: the server does not say how long it is, so nobody knows when it is whole: say --sha256"
            )
        tag = headers.get("ETag", "")[:_LONGEST_TAG]
        self.identity = {
            "url": self.name,
            "size": self.size,
            "tag": "" if tag.startswith("W/") else tag,
            "changed": headers.get("Last-Modified", "")[:_LONGEST_TAG],
        }

    # -------------------------------------------------------------------------------------------------------- the rest

    def chunks(self) -> Iterator[bytes]:
        """Implements Source. A connection that breaks is made again."""
        tries = 0
        while self.size is None or self._at < self.size:
            try:
                for chunk in self._received():
                    self._at += len(chunk)
                    tries = 0
                    yield chunk
                return
            except _Broken as fault:
                self._hang_up()
                if tries == len(PAUSES) or self._ended.is_set():
                    self._give_up(str(fault))
                self._ended.wait(PAUSES[tries])
                tries += 1
                self._go_on()

    def _go_on(self) -> None:
        """Ask for what comes after `_at`. Raises ForebayError where the server gives that not."""
        at, known = self._at, self.identity
        self._connect(at)
        if self._at != at:
            self._at = at
            raise AwayError(
                f"{self.name}: the connection broke, and the server begins from the start only: {_OVER}"
            )
        if not self._is(known):
            told = known["tag"] or known["changed"]
            raise AwayError(
                f"{self.name} was changed while it was fetched: {_OVER}"
                if told or known["size"] != self.size
                else f"{self.name}: the connection broke, and the server does not say whether it has the same file "
                f"still: {_OVER}, or say --sha256"
            )

    def _received(self) -> Iterator[bytes]:
        """What comes on this connection. Raises _Broken where that ends too early, or is too slow."""
        assert self._response is not None
        since, came = time.monotonic(), 0
        while True:
            try:
                chunk = self._response.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as fault:
                raise _Broken(_in_words(fault)) from None
            if not chunk:
                break
            came += len(chunk)
            now = time.monotonic()
            if now - since > TIMEOUT:
                if came < SLOWEST:
                    raise _Broken(f"only {came} bytes came in {TIMEOUT:.0f} s")
                since, came = now, 0
            if self.size is not None and self._at + len(chunk) > self.size:
                raise ForebayError(f"{self.name}: the server sends more than it said")
            yield chunk
        if self.size is not None and self._at < self.size:
            raise _Broken("the connection ended too early")

    def check_unchanged(self) -> None:
        """Implements Source. It was one answer, or several of the same identity."""

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        """Implements Source."""
        self._ended.set()
        self._hang_up()


def _parts(url: str) -> SplitResult | None:
    """The parts of a URL; None for what is none."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        return parts if parts.hostname and parts.port != 0 else None
    except ValueError:
        return None


def _opener(
    ca_file: str | None, check: Callable[[str], None], *, allow_http: bool
) -> urllib.request.OpenerDirector:
    """What asks servers: HTTPS, through the proxy that the environment names. Raises ForebayError."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as fault:
        raise ForebayError(
            f"{ca_file} has no certificates ({fault.reason}): write a PEM file"
        ) from None
    opener = urllib.request.OpenerDirector()
    handlers: list[Any] = [
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPSHandler(context=context),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirections(check),
    ]
    if allow_http:
        handlers.append(urllib.request.HTTPHandler())
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _range_of(headers: Message, name: str) -> tuple[int, int]:
    """First byte, and size of the whole, of a part. Raises ForebayError."""
    written = headers.get("Content-Range", "")
    try:
        unit, _, rest = written.partition(" ")
        span, _, size = rest.partition("/")
        first = int(span.partition("-")[0])
        if unit == "bytes" and 0 <= first < int(size) < 1 << 63:
            return first, int(size)
    except ValueError:
        pass
    raise ForebayError(
        f"{name}: the server gives a part, and not which ({printable(written)[:80]})"
    )


def _in_words(fault: object) -> str:
    """Why a connection failed."""
    if isinstance(fault, TimeoutError):
        return f"no answer for {TIMEOUT:.0f} s"
    if isinstance(fault, http.client.IncompleteRead):
        return "the connection ended too early"
    text = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    return printable(str(text))[:200]


def prepare() -> None:
    """Import what will be needed: later, this process may be a user who cannot read modules."""
    "x".encode("idna")
    ipaddress.ip_address("127.0.0.1")
