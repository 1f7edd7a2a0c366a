"""From what an operator wrote to an image: which one it is, whether it may be served, and an open descriptor of it.

`resolve` reads text and configuration only. `open_image` and `open_device` touch storage, block, and belong in a
thread. Paths in a store are opened beneath its directory without following any link, so that whoever may create files
there cannot point a disk at something else.
"""

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from forebay.config.model import Config
from forebay.errors import ForebayError
from forebay.origin.calls import Calls, Status, open_beneath

SIDECAR = ".forebay"
"""What the name of the directory beside an image ends in (design section 3)."""

NBD_PORT = 10809
"""Where NBD servers listen when the URI does not say (the URI document beside the NBD protocol)."""

LONGEST_EXPORT = 4096
"""Bytes of an export's name (NBD protocol, "String")."""

_STORE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):(?!//)(.*)", re.DOTALL | re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|[0-9a-f:.]{2,45}", re.ASCII)
_FORMATS = {b"QFI\xfb": "qcow2", b"QED\0": "qed", b"KDMV": "vmdk", b"vhdxfile": "vhdx"}
_LONGEST_MAGIC = 8


# ---------------------------------------------------------------------------------------------------- which image it is


@dataclass(frozen=True)
class FileImage:
    """A file in a store. `path` is relative to `root`, the store's directory, without `.` or `..`."""

    store: str
    root: Path
    path: str

    @property
    def key(self) -> str:
        """The one name of this image, in the index and in messages: STORE:path."""
        return f"{self.store}:{self.path}"


@dataclass(frozen=True)
class DeviceImage:
    """A block device, by its path."""

    path: str
    store: None = None

    @property
    def key(self) -> str:
        """The one name of this image: its path."""
        return self.path


@dataclass(frozen=True)
class NbdImage:
    """An export of an NBD server: over TCP to `host`, or over the Unix socket `socket`."""

    export: str
    host: str = ""
    port: int = NBD_PORT
    socket: str = ""
    store: None = None

    @property
    def key(self) -> str:
        """The one name of this image: a URI that is always written in the same way."""
        place, query = self.place
        return f"{place}/{quote(self.export)}{query}"

    @property
    def place(self) -> tuple[str, str]:
        """What stands before and after the export in the URI."""
        if self.socket:
            return "nbd+unix://", f"?socket={quote(self.socket)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}" + ("" if self.port == NBD_PORT else f":{self.port}"), ""


Image = FileImage | DeviceImage | NbdImage


def resolve(config: Config, text: str) -> Image:
    """The image that `text` names: `STORE:relative/path`, an absolute path, or an NBD URI.

    Looks at no storage. Raises ForebayError: what is wrong with it, and what to write instead.
    """
    if not text or not text.isprintable():
        raise ForebayError(f"{text!r} cannot name an image: write STORE:relative/path")
    if text.startswith(("nbd:", "nbd+", "nbds")):
        return _resolve_nbd(config, text)
    if text.startswith("/"):
        return _resolve_path(config, text)
    match = _STORE.fullmatch(text)
    if match is None:
        raise ForebayError(f"'{text}' is in no store: write STORE:{text}, or the whole path")
    store, path = match.groups()
    return FileImage(store, config.store(store).path, _inside(text, path))


def _inside(text: str, path: str) -> str:
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


def _resolve_path(config: Config, text: str) -> Image:
    path = os.path.normpath("/" + text.lstrip("/"))
    inside = [
        (store.path, name)
        for name, store in config.stores.items()
        if Path(path).is_relative_to(store.path)
    ]
    if inside:
        root, name = max(inside, key=lambda found: len(found[0].parts))
        return FileImage(name, root, _inside(text, os.path.relpath(path, root)))
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in config.origins.devices):
        return DeviceImage(path)
    if path.startswith("/dev/"):
        raise ForebayError(
            f"'{text}' may not be attached: allow it with devices = [\"{path}\"] in [origins]"
        )
    known = ", ".join(f"{name} ({store.path})" for name, store in config.stores.items())
    raise ForebayError(f"'{text}' is in no store: stores are {known or 'not configured, add one'}")


def _resolve_nbd(config: Config, text: str) -> NbdImage:
    image = parse_nbd(text)
    if any(_allowed(pattern, image) for pattern in config.origins.nbd):
        return image
    raise ForebayError(
        f"'{text}' may not be attached: allow it with nbd = [\"{image.key}\"] in [origins]"
    )


def _allowed(pattern: str, image: NbdImage) -> bool:
    """Server and export are matched apart: a `*` for the one must not reach into the other. `*` alone is everything."""
    if pattern == "*":
        return True
    scheme, _, rest = pattern.partition("://")
    server, _, export = rest.partition("/")
    if scheme == "nbd+unix":
        export, _, socket = export.partition("?socket=")
        return bool(image.socket) and _fits(unquote(socket), image.socket) and _fits(export, image)
    place, _ = image.place
    places = {place, f"{place}:{image.port}"}
    return (
        scheme == "nbd"
        and not image.socket
        and any(fnmatch.fnmatchcase(one, f"nbd://{server}") for one in places)
        and _fits(export, image)
    )


def _fits(pattern: str, found: "str | NbdImage") -> bool:
    if isinstance(found, NbdImage):
        return any(fnmatch.fnmatchcase(one, pattern) for one in (found.export, quote(found.export)))
    return fnmatch.fnmatchcase(found, pattern)


def parse_nbd(text: str) -> NbdImage:
    """Read `nbd://host[:port]/export` or `nbd+unix:///export?socket=/path`. Raises ForebayError."""
    try:
        parts = urlsplit(text)
        port = parts.port or NBD_PORT
        export = unquote(parts.path.removeprefix("/"), errors="strict")
    except ValueError as fault:
        raise ForebayError(
            f"'{text}' is not an NBD URI ({fault}): write nbd://host/export"
        ) from None
    if len(export.encode()) > LONGEST_EXPORT or "\0" in export:
        raise ForebayError(f"'{text[:80]}...': no export has such a name: use at most 4096 bytes")
    if parts.scheme == "nbd+unix":
        return NbdImage(export, socket=_socket_of(text, parts.netloc, parts.query))
    if parts.scheme != "nbd":
        raise ForebayError(f"'{text}': {parts.scheme}: is not served: use nbd:// or nbd+unix://")
    host = (parts.hostname or "").lower()
    if parts.query or parts.fragment or "@" in parts.netloc or not _HOST.fullmatch(host):
        raise ForebayError(f"'{text}' is not an NBD URI: write nbd://host[:port]/export")
    return NbdImage(export, host=host, port=port)


def _socket_of(text: str, netloc: str, query: str) -> str:
    name, _, value = query.partition("=")
    socket = unquote(value)
    if netloc or name != "socket" or "&" in value or not socket.startswith("/") or "\0" in socket:
        raise ForebayError(f"'{text}' is not an NBD URI: write nbd+unix:///export?socket=/path")
    return socket


# ------------------------------------------------------------------------------------------------------- an open image


@dataclass
class ImageFile:
    """An open image. `size` in bytes; `sector` is what a device counts in, 1 for a file.

    `look` says what the image's name leads to now; it blocks, and raises OSError.
    """

    fd: int
    size: int
    read_only: bool
    look: Callable[[], Status]
    sector: int = 1
    status: Status | None = field(default=None)


def open_image(
    image: FileImage, *, read_only: bool, any_format: bool = False, calls: Calls | None = None
) -> ImageFile:
    """Open the file. Blocks. Raises ForebayError for what the operator has to change, OSError for failing storage.

    `any_format` skips the look for qcow2 and the like. It is for images that were attached before: a guest may write
    whatever it likes to the start of its disk, and must find it again after a restart.
    """
    calls = calls or Calls()
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = _open_in(image, image.path, flags)
    except OSError as error:
        raise _refusal(image, error, read_only) from error
    try:
        found = calls.status(fd)
        _check_kind(image, found, read_only)
        if not any_format:
            _check_format(image, fd)
    except BaseException:
        os.close(fd)
        raise
    return ImageFile(fd, found.size, read_only, lambda: look(image, calls), status=found)


def open_folder(image: FileImage) -> int:
    """A descriptor of the directory the image lies in. Blocks. Raises OSError."""
    folder = os.path.dirname(image.path)
    return _open_in(image, folder or ".", os.O_RDONLY | os.O_DIRECTORY)


def look(image: FileImage, calls: Calls) -> Status:
    """What the image's name leads to now. Blocks. Raises OSError."""
    fd = _open_in(image, image.path, os.O_PATH | os.O_NOFOLLOW)
    try:
        return calls.status(fd)
    finally:
        os.close(fd)


def _open_in(image: FileImage, path: str, flags: int) -> int:
    root = os.open(image.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_beneath(root, path, flags)
    finally:
        os.close(root)


def _check_kind(image: FileImage, found: Status, read_only: bool) -> None:
    if stat.S_ISDIR(found.mode):
        raise ForebayError(f"{image.key} is a directory: name an image in it")
    if not stat.S_ISREG(found.mode):
        raise ForebayError(f"{image.key} is not a regular file: name a raw image")
    if found.size == 0:
        raise ForebayError(
            f"{image.key} is empty: give it a size with truncate, or copy an image to it"
        )
    if found.links > 1 and not read_only:
        raise ForebayError(
            f"{image.key} has {found.links} names (hard links), and writing would change it under all of them: "
            "copy it, or attach it with --overlay or --read-only"
        )


def _check_format(image: FileImage, fd: int) -> None:
    start = os.pread(fd, _LONGEST_MAGIC, 0)
    for magic, name in _FORMATS.items():
        if start.startswith(magic) and not image.path.endswith(".raw"):
            raise ForebayError(
                f"{image.key} is in {name} format, and a guest would see that format's tables: convert it with "
                "qemu-img convert -O raw, or give it a name that ends in .raw if that is meant"
            )


def _refusal(image: FileImage, error: OSError, read_only: bool) -> Exception:
    number = error.errno
    if not image.root.is_dir():
        return ForebayError(
            f"{image.key}: {image.root} is not there: mount the store '{image.store}'"
        )
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return ForebayError(f"{image.key}: no such image in {image.root}: check the name")
    if number in (errno.ELOOP, errno.EXDEV):
        return ForebayError(
            f"{image.key}: a symbolic link is on the way: name the file it leads to"
        )
    if number == errno.EISDIR:
        return ForebayError(f"{image.key} is a directory: name an image in it")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
        way = "read" if read_only else "read and write"
        return ForebayError(
            f"{image.key}: {os.strerror(number)}: let the daemon's user {way} it"
            + ("" if read_only else ", or attach it with --read-only or --overlay")
        )
    return error


def open_device(image: DeviceImage, *, read_only: bool, calls: Calls | None = None) -> ImageFile:
    """Open the block device; for writing only if nothing else on this host uses it. Blocks.

    Raises ForebayError for what the operator has to change, OSError for failing storage.
    """
    calls = calls or Calls()
    flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_EXCL
    try:
        fd = os.open(image.path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _device_refusal(image, error) from error
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise ForebayError(f"{image.path} is not a block device: put a file into a store")
        size, sector = calls.device_size(fd), calls.sector_size(fd)
        if size == 0:
            raise ForebayError(f"{image.path} has no size: activate or connect it first")
        return ImageFile(fd, size, read_only, lambda: Status.of(os.stat(image.path)), sector)
    except BaseException:
        os.close(fd)
        raise


def _device_refusal(image: DeviceImage, error: OSError) -> Exception:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return ForebayError(f"{image.path}: no such device: check the name")
    if error.errno == errno.EBUSY:
        return ForebayError(f"{image.path} is mounted or in use on this host: unmount it first")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ForebayError(f"{image.path}: {error.strerror}: let the daemon's user open it")
    return error
