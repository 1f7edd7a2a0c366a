# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which image an operator means: text and configuration turned into the address of a file, a device or an NBD export.

Nothing here touches storage, so nothing blocks. `opening.py` opens what an address names.
"""

import fnmatch
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from forebay.config.model import Config
from forebay.config.urls import is_allowed_url, written_url
from forebay.errors import ForebayError
from forebay.units import FORMATS, parse_size

SIDECAR = ".forebay"
"""What the name of the directory beside an image ends in (design section 3)."""

NBD_PORT = 10809
"""The port at which NBD servers listen when the URI names none (the URI document beside the NBD protocol)."""

LONGEST_EXPORT = 4096
"""The most bytes that the name of an export may have (NBD protocol, "String")."""

SCRATCH = "scratch"
"""What stands in the place of a store where there is no image; a store of that name hides it."""

SCRATCH_UNIT = 4096
"""Bytes of which the size of such a disk is a multiple."""

_STORE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):(?!//)(.*)", re.DOTALL | re.ASCII)
_TCP = re.compile(
    r"(?i:nbd)://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?)(?::([0-9]*))?(?:/([^?#]*))?",
    re.ASCII,
)
"""Host, port and export of a URI. All of the text has to match, so that no part of it is passed over."""
_UNIX = re.compile(r"(?i:nbd\+unix)://(?:/([^?#]*))?\?socket=([^&;#]+)", re.ASCII)
"""Export and socket, likewise. Where a name has `?`, `#`, `&` or `;` in it, these are written %3F, %23, %26 or %3B."""
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", re.ASCII)

_AS = "?format="
"""Stands between the name of an image and its format in its key."""
_KEY = re.compile(rf"(.+)\?format=({'|'.join(FORMATS)})", re.DOTALL)

LONGEST_SOCKET = 107
"""Bytes of a Unix socket's address (unix(7))."""


@dataclass(frozen=True)
class FileAddress:
    """The address of an image that is a file in a store."""

    store: str
    """The name of the store; empty where a command was given a path on a host that has no stores."""
    root: Path
    """The directory of the store."""
    path: str
    """Where the file lies below `root`, without `.` or `..` parts."""
    format: str = "raw"
    """`raw` for the bytes of the file; of any other, the virtual disk in it is meant."""

    @property
    def key(self) -> str:
        """The one name that this image has in the index: STORE:path, and the format where that is not raw.

        So what the cache has of a virtual disk is never taken for the bytes of its file.
        """
        return self.name if self.format == "raw" else f"{self.name}{_AS}{self.format}"

    @property
    def name(self) -> str:
        """How operators name it: STORE:path."""
        return f"{self.store}:{self.path}"


@dataclass(frozen=True)
class DeviceAddress:
    """The address of an image that is a block device: its path."""

    path: str
    store: None = None

    @property
    def key(self) -> str:
        """The one name that this image has in the index and in messages: its path."""
        return self.path


@dataclass(frozen=True)
class NbdAddress:
    """The address of an image that an NBD server exports: over TCP at `host`, or over the Unix socket `socket`."""

    export: str
    """The name of the export; servers have a default one, whose name is empty."""
    host: str = ""
    port: int = NBD_PORT
    socket: str = ""
    store: None = None

    @property
    def key(self) -> str:
        """The one name that this image has in the index and in messages: a URI, always written in the same way."""
        before, after = self.uri_around_export
        return f"{before}/{quote(self.export)}{after}"

    @property
    def uri_around_export(self) -> tuple[str, str]:
        """What stands in the URI before the export and its slash, and what stands after the export."""
        if self.socket:
            return "nbd+unix://", f"?socket={quote(self.socket)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}" + ("" if self.port == NBD_PORT else f":{self.port}"), ""


@dataclass(frozen=True)
class ScratchAddress:
    """The address of no image at all: what a disk has that lies in the cache only, and is empty at first."""

    size: int
    """Bytes."""
    store: None = None

    @property
    def key(self) -> str:
        """The one name that this has in the index and in messages."""
        return f"{SCRATCH}:{self.size}"


@dataclass(frozen=True)
class WebAddress:
    """The address of an image that a web server has: its URL, always written in the same way."""

    url: str
    store: None = None

    @property
    def key(self) -> str:
        """The one name that this image has in the index and in messages: its URL."""
        return self.url


Address = FileAddress | DeviceAddress | NbdAddress | ScratchAddress | WebAddress
"""The address of an image of any kind. `key` names the image for ever; `store` is the name of its store, or None."""


def in_format(address: Address, image_format: str | None) -> Address:
    """The address of the virtual disk in a file of that format; the same address for None, and for raw.

    Raises ForebayError for an image that is no file.
    """
    if image_format in (None, "raw"):
        return address
    if not isinstance(address, FileAddress):
        raise ForebayError(f"{address.key} is no file in a store: leave out --format")
    return replace(address, format=image_format)


def resolve(config: Config, text: str) -> Address:
    """The address that `text` names: `STORE:relative/path`, an absolute path, or an NBD URI.

    Raises ForebayError, which says what is wrong with the text, or that the configuration does not allow that image,
    and what to write instead.
    """
    if not text or not text.isprintable():
        raise ForebayError(f"{text!r} cannot name an image: write STORE:relative/path")
    if text.startswith(("nbd:", "nbd+", "nbds")):
        return _resolve_nbd(config, text)
    if text.startswith("https:"):
        return _resolve_web(config, text)
    if text.startswith("/"):
        return _resolve_path(config, text)
    match = _STORE.fullmatch(text)
    if match is not None and match[1] == SCRATCH not in config.stores:
        return ScratchAddress(_scratch_size(text, match[2]))
    if match is None:
        raise ForebayError(f"'{text}' is in no store: write STORE:{text}, or the whole path")
    store, path = match.groups()
    path, image_format = _split_format(path)
    return FileAddress(store, config.store(store).path, path_in_store(text, path), image_format)


def _split_format(path: str) -> tuple[str, str]:
    """Path and format of what stands in the key of an image after its store."""
    found = _KEY.fullmatch(path)
    return (found[1], found[2]) if found else (path, "raw")


def is_nameable(path: str) -> bool:
    """True if `STORE:path` names the file at that path: the names of some files cannot be those of images."""
    return path.isprintable() and _KEY.fullmatch(path) is None


def keys_of_name(name: str) -> list[str]:
    """The keys that virtual disks in an image of that name, STORE:path, may have."""
    return [f"{name}{_AS}{one}" for one in FORMATS if one != "raw"]


def is_scratch(key: str) -> bool:
    """True if that is the key of an image which is empty, and lies nowhere."""
    return key.startswith(f"{SCRATCH}:") and key.removeprefix(f"{SCRATCH}:").isdecimal()


def _scratch_size(text: str, size: str) -> int:
    """Bytes of a disk that lies in the cache only. Raises ForebayError."""
    try:
        found = parse_size(size)
    except ValueError as fault:
        raise ForebayError(f"'{text}': {fault}: write {SCRATCH}:20G") from None
    if not found or found % SCRATCH_UNIT:
        raise ForebayError(
            f"'{text}' is no size of a disk: write a multiple of {SCRATCH_UNIT} bytes, as in {SCRATCH}:20G"
        )
    return found


def path_in_store(text: str, path: str) -> str:
    """`path` without empty and `.` parts. Raises ForebayError for one that leads out of the store, or to our own files.

    `text` is what the operator wrote, for the message.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts:
        raise ForebayError(
            f"'{text}' leads out of its store: write a path below the store's directory"
        )
    if not parts:
        raise ForebayError(f"'{text}' names a directory: write the path of an image in it")
    if any(part.endswith(SIDECAR) for part in parts):
        raise ForebayError(f"'{text}' is one of Forebay's own files: write the path of an image")
    return "/".join(parts)


def _resolve_path(config: Config, text: str) -> Address:
    """The address of an absolute path: in the store whose directory is the deepest above it, or a device.

    Raises ForebayError for a path in no store that is not an allowed device.
    """
    path = os.path.normpath("/" + text.lstrip("/"))
    inside = [
        (store.path, name)
        for name, store in config.stores.items()
        if Path(path).is_relative_to(store.path)
    ]
    if inside:
        root, name = max(inside, key=lambda found: len(found[0].parts))
        return FileAddress(name, root, path_in_store(text, os.path.relpath(path, root)))
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in config.origins.devices):
        return DeviceAddress(path)
    if path.startswith("/dev/"):
        raise ForebayError(
            f"'{text}' may not be attached: allow it with devices = [\"{path}\"] in [origins]"
        )
    known = ", ".join(f"{name} ({store.path})" for name, store in config.stores.items())
    raise ForebayError(
        f"'{text}' is in no store: write STORE:PATH, or a path in one: stores are {known or 'not configured, add one'}"
    )


def _resolve_nbd(config: Config, text: str) -> NbdAddress:
    address = parse_nbd(text)
    if any(_is_allowed(pattern, address) for pattern in config.origins.nbd):
        return address
    raise ForebayError(
        f"'{text}' may not be attached: allow it with nbd = [\"{address.key}\"] in [origins]"
    )


def _resolve_web(config: Config, text: str) -> WebAddress:
    address = parse_url(text)
    if is_allowed_url(config.origins.https, address.url):
        return address
    server = address.url[: address.url.index("/", len("https://")) + 1]
    raise ForebayError(
        f'{_in_short(text)} may not be attached: allow it with https = ["{server}"] in [origins]'
    )


def parse_url(text: str) -> WebAddress:
    """The address in `https://host[:port]/path`. Raises ForebayError for anything else, and for more than that."""
    url = written_url(text)
    if url is None:
        raise ForebayError(
            f"{_in_short(text)} is no URL of an image: write https://host[:port]/path"
        )
    return WebAddress(url)


def _is_allowed(pattern: str, address: NbdAddress) -> bool:
    """True if a pattern of `origins.nbd` in the configuration allows the export; the pattern `*` allows every one.

    Server and export are matched apart, so that a `*` in the one does not reach into the other.
    """
    if pattern == "*":
        return True
    scheme, _, rest = pattern.partition("://")
    server, _, export = rest.partition("/")
    if scheme == "nbd+unix":
        export, _, socket = export.partition("?socket=")
        return (
            bool(address.socket)
            and fnmatch.fnmatchcase(address.socket, unquote(socket))
            and _matches_export(export, address)
        )
    before, _ = address.uri_around_export
    servers = {before, f"{before}:{address.port}"}
    return (
        scheme == "nbd"
        and not address.socket
        and any(fnmatch.fnmatchcase(one, f"nbd://{server}") for one in servers)
        and _matches_export(export, address)
    )


def _matches_export(pattern: str, address: NbdAddress) -> bool:
    """True if the pattern matches the name of the export, as it is or quoted as in a URI."""
    names = (address.export, quote(address.export))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def parse_nbd(text: str) -> NbdAddress:
    """The address in `nbd://host[:port]/export` or `nbd+unix:///export?socket=/path`.

    Raises ForebayError for anything else: a part that means nothing here, a fragment say, is no detail but another
    image. Does not ask whether the configuration allows it.
    """
    scheme = _SCHEME.match(text)
    kind = scheme[0].lower() if scheme else ""
    if kind not in ("nbd", "nbd+unix"):
        raise ForebayError(f"'{text}': {kind}: is not served: use nbd:// or nbd+unix://")
    try:
        return _over_tcp(text) if kind == "nbd" else _over_unix(text)
    except ValueError as fault:
        form = "nbd://host[:port]/export" if kind == "nbd" else "nbd+unix:///export?socket=/path"
        raise ForebayError(f"{_in_short(text)} is not an NBD URI ({fault}): write {form}") from None


def _over_tcp(text: str) -> NbdAddress:
    """The address in an nbd URI. Raises ValueError."""
    found = _TCP.fullmatch(text)
    if found is None:
        raise ValueError(_superfluous(text) or "no host and export")
    host, port, export = found.groups(default="")
    if port and not 0 < int(port[:6]) < 1 << 16:
        raise ValueError(f"there is no port {port[:20]}")
    name = _decoded(export, "export", LONGEST_EXPORT)
    return NbdAddress(name, host=host.strip("[]").lower(), port=int(port or NBD_PORT))


def _over_unix(text: str) -> NbdAddress:
    """The address in an nbd+unix URI. Raises ValueError."""
    found = _UNIX.fullmatch(text)
    if found is None:
        raise ValueError(_superfluous(text) or "one socket has to follow, and nothing else")
    export, written = found.groups(default="")
    socket = _decoded(written, "socket", LONGEST_SOCKET)
    if not socket.startswith("/"):
        raise ValueError("the socket's path does not begin with /")
    return NbdAddress(_decoded(export, "export", LONGEST_EXPORT), socket=socket)


def _superfluous(text: str) -> str:
    """What a URI has and NBD has no use for; empty where it is something else that is wrong."""
    if "#" in text:
        return "it has a fragment; a # in a name is written %23"
    return "it has a user" if "@" in text.partition("://")[2].partition("/")[0] else ""


def _decoded(written: str, what: str, longest: int) -> str:
    """Text without percent signs, of at most so many bytes. Raises ValueError; `what` is for its text."""
    if _BAD_ESCAPE.search(written):
        raise ValueError(f"the {what} has a % without two digits; % itself is written %25")
    text = unquote(written, errors="strict")
    if "\0" in text:
        raise ValueError(f"the {what} has a zero byte")
    if len(text.encode()) > longest:
        raise ValueError(f"the {what} has more than {longest} bytes")
    return text


def _in_short(text: str) -> str:
    """Text in quotes, for a message in one line."""
    return f"'{text}'" if len(text) <= 200 else f"'{text[:200]}...'"
