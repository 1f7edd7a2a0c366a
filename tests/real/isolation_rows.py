# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The rows of the matrix: everything that can go wrong at one disk, made from lists of faults and of modes."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.sidecar.locks import set_lock
from real import isolation_client, nbd_hostile_cases
from real.isolation_bed import COLD, DIRTY, HIT, SIZE, Bad
from real.isolation_client import READ, STATUS, TRIM, WRITE, ZEROES, request
from real.isolation_daemon import TASKS
from real.nbd_raw import go
from real.processes import MIB

Act = Callable[[Bad], object]

Kind = dict[str, Any]
"""Of a disk: what a Row says of it."""

STRANGER = 12345
"""A user who may not write the image."""


@dataclass(frozen=True)
class Row:
    """`do` is what goes wrong; the disk then shows `shows` (a regular expression for "STATE: REASON"), and comes back
    by `back`. `log` are loud lines that belong to it.
    """

    what: str
    fault: str
    mode: str
    do: Act
    shows: str = "^ready"
    back: Act = Bad.by_itself
    store: str = "here"
    dirty: bool = False
    overlay: bool = False
    attached: bool = True
    """False: the fault is in the attach."""
    log: str = ""
    size: int = SIZE
    seconds: float = 0.2
    """Least length of the round."""

    @property
    def id(self) -> str:
        kind = "overlay" if self.overlay else self.mode
        return f"{self.what}: {self.fault}, {kind}{', dirty' if self.dirty else ''}"


WRITES_BACK: Kind = {"mode": "write-back", "dirty": True}
WRITES_THROUGH: Kind = {"mode": "write-through"}
COPIED: Kind = {"mode": "full-copy", "dirty": True}
OVERLAID: Kind = {"mode": "write-through", "overlay": True, "dirty": True}
UNCACHED: Kind = {"mode": "none"}

# ------------------------------------------------------------------------------------------------------------ the image


def _moved_away(bad: Bad) -> Path:
    return bad.path.rename(bad.path.with_suffix(".away"))


def _instead(make: Callable[[Path, Path], object]) -> Act:
    """Something else lies where the image lay: `make(path, what was there)`."""

    def do(bad: Bad) -> None:
        make(bad.path, _moved_away(bad))

    return do


def _rewritten(bad: Bad) -> None:
    """A stranger writes the whole image, with what it has before its end; the disk has that then."""
    data = b"s" * (DIRTY.start - HIT.start)
    with bad.path.open("r+b") as file:
        file.write(data)
    bad.content[HIT.start : DIRTY.start] = data


def _with_image(change: Callable[[Path], object]) -> Act:
    return lambda bad: change(bad.path)


IMAGE_GONE: dict[str, Act] = {
    "deleted": lambda bad: bad.path.unlink(),
    "renamed": _moved_away,
    "replaced by a copy": _instead(lambda path, old: shutil.copyfile(old, path)),
    "replaced by a directory": _instead(lambda path, old: path.mkdir()),
    "replaced by a link to itself": _instead(lambda path, old: path.symlink_to(old)),
    "replaced by a pipe": _instead(lambda path, old: os.mkfifo(path)),
    "replaced by an empty file": _instead(lambda path, old: path.touch()),
    "cut off": _with_image(lambda path: os.truncate(path, SIZE // 2)),
    "emptied": _with_image(lambda path: os.truncate(path, 0)),
    "grown": _with_image(lambda path: os.truncate(path, 2 * SIZE)),
    "its folder renamed": lambda bad: bad.here_away(),
}
"""Another file, or none, or another size: a conflict, whatever the mode."""

IMAGE_THE_SAME: dict[str, Act] = {
    "mode 000": _with_image(lambda path: path.chmod(0)),
    "another user's": _with_image(lambda path: os.chown(path, STRANGER, STRANGER)),
    "a second name": lambda bad: os.link(bad.path, bad.path.with_suffix(".second")),
    "renamed and back": lambda bad: _moved_away(bad).rename(bad.path),
    "an attribute": _with_image(lambda path: os.setxattr(path, "user.note", b"x")),
    "read by others": _with_image(lambda path: path.read_bytes()),
}
"""Nothing of what it holds: nobody notices."""


def image_rows() -> Iterator[Row]:
    for fault, do in IMAGE_GONE.items():
        for kind in (WRITES_BACK, WRITES_THROUGH, OVERLAID):
            yield Row("image", fault, do=do, shows="^conflict: .+", back=Bad.anew, **kind)
    for fault, do in IMAGE_THE_SAME.items():
        for kind in (WRITES_BACK, OVERLAID):
            yield Row("image", fault, do=do, **kind)
    for kind in (WRITES_BACK, OVERLAID, COPIED):
        conflict: Kind = {"shows": "^conflict: .+", "back": Bad.anew}
        yield Row("image", "written by a stranger", do=_rewritten, **conflict, **kind)
    yield Row("image", "written by a stranger", do=_rewritten, **WRITES_THROUGH)


# ---------------------------------------------------------------------------------------------------------- the sidecar


def _owner(text: bytes | Callable[[dict[str, Any]], dict[str, Any]]) -> Act:
    """The owner marker says something else."""

    def do(bad: Bad) -> None:
        path = bad.beside("owner")
        if callable(text):
            path.write_text(json.dumps(text(json.loads(path.read_text()))))
        else:
            path.write_bytes(text)

    return do


def _beside(name: str, make: Callable[[Path], object]) -> Act:
    """Something lies in the place of a file beside the image."""

    def do(bad: Bad) -> None:
        path = bad.beside(name)
        path.unlink(missing_ok=True)
        make(path)

    return do


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(1 << 40)


def _strangers(path: Path) -> None:
    path.write_text("{}")
    os.chown(path, STRANGER, STRANGER)


def _folder_instead(make: Callable[[Path], object]) -> Act:
    """The folder beside the image is something else."""

    def do(bad: Bad) -> None:
        bad.side.rename(bad.side.with_suffix(".away"))
        make(bad.side)

    return do


def _bound(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:  # the path is too long for an address
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


OWNER: dict[str, Act] = {
    "empty": _owner(b""),
    "half of it": lambda bad: os.truncate(bad.beside("owner"), 20),
    "no JSON": _owner(b"\xff\xfe" * 500),
    "deep": _owner(b"[" * 100_000),
    "of a newer format": _owner(lambda owner: owner | {"format": 99}),
    "of another gateway": _owner(lambda owner: owner | {"gateway": "f" * 32, "token": 77}),
    "a token of 4000 digits": _owner(b'{"format": 1, "token": 1' + b"0" * 4000 + b"}"),
    "a negative token": _owner(lambda owner: owner | {"token": -1}),
    "a long host": _owner(lambda owner: owner | {"host": "h\x1b[31m" * 20_000}),
    "a directory": _beside("owner", Path.mkdir),
    "a pipe": _beside("owner", os.mkfifo),
    "a link": _beside("owner", lambda path: path.symlink_to("/etc/passwd")),
    "a terabyte": _beside("owner", _huge),
    "a socket": _beside("owner", _bound),
    "gone": lambda bad: bad.beside("owner").unlink(),
    "a stranger's": _beside("owner", _strangers),
}


REDO: dict[str, Act] = {
    "garbage": _beside("redo", lambda path: path.write_bytes(os.urandom(65536))),
    "a directory": _beside("redo", Path.mkdir),
    "a pipe": _beside("redo", os.mkfifo),
    "a stranger's": _beside("redo", _strangers),
}
FOLDER: dict[str, Act] = {
    "gone": lambda bad: shutil.rmtree(bad.side),
    "a file": _folder_instead(Path.touch),
    "a link": _folder_instead(lambda path: path.symlink_to("/")),
    "a pipe": _folder_instead(os.mkfifo),
}


def sidecar_rows() -> Iterator[Row]:
    for fault, do in OWNER.items():
        for kind in (WRITES_BACK, WRITES_THROUGH) if fault in ("empty", "gone") else (WRITES_BACK,):
            yield Row("owner", fault, do=do, shows="^conflict: .+", back=Bad.anew, **kind)
    for fault, do in REDO.items():
        yield Row("redo", fault, do=do, shows=ANY, back=Bad.anew, **WRITES_BACK)
    for fault, do in FOLDER.items():
        yield Row("sidecar", fault, do=do, shows="^conflict: .+", back=Bad.anew, **WRITES_BACK)


ANY = "^(ready|lagging|conflict)"
"""For what may be noticed, or not: what counts is that nobody else does."""

# ------------------------------------------------------------------------------------------------------------ the store

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "EROFS")


def _fails(call: str, error: str = "", **rule: Any) -> Act:
    """From now on the store does so, and a guest works on."""

    def do(bad: Bad) -> None:
        bad.bed.fs.fail(call, error, **rule)
        bad.try_all()

    return do


def _hangs(call: str) -> Act:
    return _fails(call, hang=True)


def _vanishes(bad: Bad) -> None:
    bad.bed.fs.vanish()
    bad.try_all()


def _mounted_again(bad: Bad) -> None:
    bad.bed.fs.mount()
    bad.detach()
    bad.attach()


STORE: list[tuple[str, Act]] = [
    *((f"{call}: {error}", _fails(call, error)) for call in ("write", "fsync") for error in ERRORS),
    *((f"read: {error}", _fails("read", error)) for error in ("EIO", "ESTALE")),
    *((f"{call}: {error}", _fails(call, error)) for call in ("getattr", "open") for error in ("EIO", "ESTALE")),
    *((f"{call} hangs", _hangs(call)) for call in ("read", "write", "fsync", "open", "getattr")),
    *((f"{call} is slow", _fails(call, delay=0.3)) for call in ("read", "write", "fsync", "getattr")),
    ("writes cut short", _fails("write", short=True)),
    ("an fsync that fails once and loses", _fails("fsync", "EIO", times=1, lose=True)),
]  # fmt: skip


def store_rows() -> Iterator[Row]:
    for fault, do in STORE:
        states = (
            "^(ready|lagging|degraded|conflict)"
            if "ESTALE" in fault
            else "^(ready|lagging|degraded)"
        )
        kinds = (
            [WRITES_BACK, WRITES_THROUGH]
            if fault.split(":")[0] in ("write", "fsync")
            else [WRITES_BACK]
        )
        if "hangs" in fault:
            kinds += [UNCACHED, OVERLAID]
        for kind in kinds:
            yield Row(
                "store", fault, do=do, store="faulty", shows=states, back=Bad.whatever, **kind
            )
    for kind in (WRITES_BACK, OVERLAID):
        yield Row(
            "store",
            "vanishes",
            do=_vanishes,
            back=_mounted_again,
            store="faulty",
            shows="^(ready|lagging|degraded)",
            **kind,
        )


# --------------------------------------------------------------------------------------------------------- the client

HELLO = struct.pack(">I", 3)


def _says(*streams: bytes) -> Act:
    """Each on a connection of its own, after the greeting; what is answered is not read."""

    def do(bad: Bad) -> None:
        for stream in streams:
            with _connected(bad) as sock, contextlib.suppress(OSError):
                sock.recv(18)
                sock.sendall(HELLO + stream)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass

    return do


@contextlib.contextmanager
def _connected(bad: Bad) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(bad.bed.gateway.sock(bad.name)))
        yield sock


def _after_go(streams: Iterable[bytes]) -> list[bytes]:
    return [go(b"") + stream for stream in streams]


def _mute(bad: Bad) -> None:
    """Connections that say nothing, more than there may be."""
    for _ in range(150):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        bad.sockets.append(sock)
        with contextlib.suppress(
            BlockingIOError
        ):  # those that are not accepted yet have a bound, too
            sock.connect(str(bad.bed.gateway.sock(bad.name)))


def _crowd(bad: Bad) -> None:
    """Connections in transmission, more than there may be."""
    for _ in range(120):
        with contextlib.suppress(OSError):
            bad.connect(2)


def _asked(bad: Bad, what: bytes, connections: int, *, structured: bool = False) -> None:
    """Requests on many connections, of whose replies nothing is read."""
    bad.leave()
    for _ in range(connections):
        client = bad.connect(structured=structured)
        client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.sock.send(what)


def _floods(what: bytes, connections: int = 20, **how: Any) -> Act:
    return lambda bad: _asked(bad, what, connections, **how)


def _reads_slowly(bad: Bad) -> None:
    """A few bytes at a time of very much."""
    _asked(bad, request(READ, 0, SIZE) * 64, 8)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        for client in bad.clients:
            with contextlib.suppress(OSError):
                client.sock.recv(100)
        time.sleep(0.01)


def _many_little(bad: Bad) -> None:
    """Reads of 512 bytes as fast as they go, on several connections."""
    _asked(bad, request(READ, 0, 512) * 5000, 4)
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        for client in bad.clients:
            with contextlib.suppress(BlockingIOError):
                while client.sock.recv(1 << 20):
                    client.sock.send(request(READ, 4096, 512) * 500)


def _long(command: int, length: int, flags: int = 0) -> Act:
    """One request of very many bytes, after which the guest goes on."""

    def do(bad: Bad) -> None:
        client = bad.connect(60)
        for at in range(0, bad.size, length):
            client.sock.sendall(request(command, at, min(length, bad.size - at), flags))
            client.receive(16)
        client.write(0, bytes(bad.content))

    return do


def _half(command: int, length: int, sent: int) -> Act:
    """A request whose payload never comes to its end, on many connections."""

    def do(bad: Bad) -> None:
        _asked(bad, request(command, 0, length) + bytes(sent), 20)

    return do


def _killed_in_flight(bad: Bad) -> None:
    """Connections with many requests under way are gone, again and again."""
    for _ in range(20):
        _asked(
            bad, (request(READ, 0, MIB) + request(WRITE, DIRTY.start, 4096) + bytes(4096)) * 32, 2
        )
        bad.leave()


CLIENT: dict[str, Act] = {
    "handshakes that end": _says(*nbd_hostile_cases.ENDS.values()),
    "requests that are refused": _says(*_after_go(one for one, _ in nbd_hostile_cases.ERRORS.values())),
    "requests that break it": _says(*_after_go(nbd_hostile_cases.BREAKS.values())),
    "garbage": _says(*(os.urandom(n) for n in (1, 100, 10_000, 300_000))),
    "garbage after the handshake": _says(*_after_go(os.urandom(n) for n in (1, 27, 28, 100_000))),
    "150 mute connections": _mute,
    "120 clients": _crowd,
    "reads of which nothing is taken": _floods(request(READ, 0, SIZE) * 64),
    "cold reads of which nothing is taken": _floods(request(READ, COLD.start, MIB) * 64),
    "block status of which nothing is taken": _floods(request(STATUS, 0, SIZE) * 2000, structured=True),
    "flushes of which nothing is taken": _floods(request(3) * 2000),
    "payloads that never come": _half(WRITE, 32 * MIB, 100),
    "large payloads that stop": _half(WRITE, 32 * MIB, 200_000),
    "a slow reader": _reads_slowly,
    "a busy one": _many_little,
    "killed with requests under way": _killed_in_flight,
}  # fmt: skip

LARGE = 1 << 30
"""Bytes of a disk of which much is trimmed."""


def client_rows() -> Iterator[Row]:
    for fault, do in CLIENT.items():
        for kind in (WRITES_BACK, WRITES_THROUGH) if "taken" in fault else (WRITES_BACK,):
            yield Row("client", fault, do=do, **kind)
    for name, command, length, flags in (
        ("TRIM of 1 GiB", TRIM, LARGE, 0),
        ("zeroes over 1 GiB", ZEROES, LARGE, 0),
    ):
        for kind in (WRITES_BACK, WRITES_THROUGH, OVERLAID):
            yield Row(
                "client",
                name,
                do=_long(command, length, flags),
                size=LARGE,
                shows=ANY,
                back=Bad.rewritten,
                **{**kind, "dirty": False},
            )


# ----------------------------------------------------------------------------------------------------------- commands


def _refused(**change: Any) -> Act:
    """An attach that is refused, in one line; then the right one."""

    def do(bad: Bad) -> None:
        wanted = bad.wanted()
        for key, value in change.items():
            wanted[key] = value(bad) if callable(value) else value
        why = bad.bed.refused("/disks", **wanted)
        assert why, "it was attached"
        assert why.isprintable()
        assert len(why) < 8192
        assert bad.name not in bad.bed.status()

    return do


def _image_is(make: Callable[[Path], object]) -> Act:
    """The image is something that cannot be served."""

    def do(bad: Bad) -> None:
        bad.path.unlink()
        make(bad.path)
        _refused()(bad)
        shutil.rmtree(bad.path) if bad.path.is_dir() else bad.path.unlink()
        bad.path.write_bytes(bad.content)

    return do


def _sized(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def _beside_before(do: Act) -> Act:
    """Something lies beside the image before it is attached: refused, or not, and nobody else notices."""

    def act(bad: Bad) -> None:
        bad.attach()
        bad.detach()
        bad.side.mkdir(exist_ok=True)
        (bad.side / "owner").write_text('{"format": 1, "token": 1}')
        do(bad)
        bad.answers.append(bad.bed.refused("/disks", **bad.wanted()) or "attached")
        if bad.answers[-1] == "attached":
            bad.detach()
        shutil.rmtree(bad.side) if bad.side.is_dir() and not bad.side.is_symlink() else None
        bad.side.unlink(missing_ok=True)

    return act


def _lock_held(bad: Bad) -> None:
    """By another process, for as long as the attach is tried."""
    with bad.path.open("r+b") as file:
        set_lock(file.fileno(), fcntl.F_WRLCK, 400, 1)
        _refused()(bad)


NOT_IMAGES: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": _bound,
    "a link out of the store": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a character device": lambda path: path.symlink_to("/dev/zero"),
    "empty": _sized(0),
    "qcow2": lambda path: path.write_bytes(b"QFI\xfb" + bytes(8188)),
}


def attach_rows() -> Iterator[Row]:
    refused: Kind = {"attached": False, "shows": "^gone", "back": Bad.attach}
    for fault, do in {
        "a long name": _refused(name="n" * 65),
        "a name with a slash": _refused(name="../x"),
        "a name in use": _refused(name="back"),
        "a long path": _refused(image="here:" + "d/" * 2000 + "x"),
        "a path of long names": _refused(image="here:" + "n" * 300),
        "a path out of the store": _refused(image="here:../state/cache.img"),
        "a path with NUL": _refused(image="here:a\0b"),
        "an unknown store": _refused(image="nowhere:a"),
        "an unknown server": _refused(image="nbd+unix:///?socket=/nowhere"),
        "an image in use": _refused(image="images:back.raw"),
        "no mode": _refused(mode="wb2"),
        "read-only and overlay": _refused(overlay=True, read_only=True),
        "a lock held by another": _lock_held,
    }.items():
        yield Row("attach", fault, "write-back", do, **refused)
    for name, make in NOT_IMAGES.items():
        yield Row("attach", f"an image that is {name}", "write-back", _image_is(make), **refused)
    for table, what in ((OWNER, "owner"), (REDO, "redo"), (FOLDER, "sidecar")):
        for fault, do in table.items():
            if fault in ("deep", "no JSON", "a negative token", "a long host", "half of it"):
                continue  # the same to it
            yield Row(
                "attach", f"beside {what}: {fault}", "write-back", _beside_before(do), **refused
            )
    for call in ("open", "getattr", "read"):
        for how in ({"error": "EIO"}, {"hang": True}):
            fault = f"{call} {'hangs' if 'hang' in how else 'EIO'}"
            do = _attached_anyway(call, **how)
            yield Row(
                "attach",
                fault,
                "write-back",
                do,
                store="faulty",
                attached=False,
                shows="^(gone|ready|degraded|lagging)",
                back=Bad.attached_again,
            )


def _attached_anyway(call: str, **how: Any) -> Act:
    def do(bad: Bad) -> None:
        bad.bed.fs.fail(call, **how)
        bad.answers.append(bad.bed.refused("/disks", **bad.wanted()) or "attached")

    return do


def _beside_a_guest(*commands: Callable[[Bad], object]) -> Act:
    """Commands of the operator while a guest writes and reads as fast as it can."""

    def do(bad: Bad) -> None:
        client = bad.connect(30)
        ended = threading.Event()
        faults: list[BaseException] = []

        def work() -> None:
            try:
                while not ended.is_set():
                    bad.write(client)
                    got = client.read(DIRTY.start, DIRTY.stop - DIRTY.start)
                    assert got == bad.content[DIRTY], "not what was written"
            except (OSError, ConnectionError, AssertionError) as fault:
                faults.append(fault)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for command in commands:
                command(bad)
        finally:
            ended.set()
            thread.join()
        assert not faults, faults

    return do


def _command(path: str, **body: Any) -> Callable[[Bad], object]:
    return lambda bad: bad.bed.post(f"/disks/{bad.name}/{path}", **body)


def _tried(path: str, method: str = "POST", **body: Any) -> Callable[[Bad], object]:
    """It may be refused, but it ends."""

    def do(bad: Bad) -> None:
        why = bad.bed.refused(f"/disks/{bad.name}{path}", method=method, **body)
        bad.answers.append(why or "done")

    return do


ALL_MODES = ("none", "write-around", "write-through", "write-back", "full-copy")


def _while(fault: Act, *commands: Callable[[Bad], object]) -> Act:
    def do(bad: Bad) -> None:
        fault(bad)
        for command in commands:
            command(bad)

    return do


def _hung_up_on(bad: Bad) -> None:
    """A client that asks for much is there when the disk is detached by force."""
    _asked(bad, request(READ, 0, MIB) * 64, 4)
    bad.bed.post(f"/disks/{bad.name}", method="DELETE", force=True)
    bad.leave()


def _all_at_once(bad: Bad) -> None:
    """Attaches and detaches of the same disk at the same time."""
    answers: list[str | None] = []

    def work(one: int) -> None:
        if one % 2:
            answers.append(
                bad.bed.refused(f"/disks/{bad.name}", method="DELETE", discard=True, force=True)
            )
        else:
            answers.append(bad.bed.refused("/disks", **bad.wanted()))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 16


def _large_overlay_gone(bad: Bad) -> None:
    """Very many small writes of an overlay, which a detach drops."""
    client = bad.connect(30)
    for start in range(0, LARGE, LARGE // 16):
        writes = [start + n * 65536 for n in range(100)]
        client.sock.sendall(b"".join(request(WRITE, at, 512) + bytes(512) for at in writes))
        client.receive(16 * len(writes))
    bad.leave()
    bad.bed.post(f"/disks/{bad.name}", method="DELETE", force=True)


def command_rows() -> Iterator[Row]:
    for mode in ALL_MODES:
        changes = [_command("mode", mode=to) for to in ALL_MODES if to != mode]
        yield Row(
            "mode",
            "changed under a guest",
            mode,
            _beside_a_guest(*changes, _command("mode", mode=mode)),
        )
    yield Row(
        "preload", "under a guest", "write-back", _beside_a_guest(_command("preload", amount="all"))
    )
    yield Row(
        "flush",
        "under a guest",
        "write-back",
        _beside_a_guest(*[_tried("/flush", timeout="0.5s")] * 2),
    )
    sick: Kind = {
        "store": "faulty",
        "shows": "^(ready|lagging|copying|incomplete|degraded)",
        "dirty": True,
    }
    to_through = _tried("/mode", mode="write-through")
    for how, fails in (("fails", {"error": "EIO"}), ("hangs", {"hang": True})):
        broken = [_fails(call, **fails) for call in ("write", "read", "fsync")]
        yield Row(
            "mode",
            f"changed while the store {how}",
            "write-back",
            _while(broken[0], to_through),
            **sick,
        )
        yield Row(
            "mode",
            f"to full-copy while the store {how}",
            "write-back",
            _while(broken[1], _tried("/mode", mode="full-copy")),
            **sick,
        )
        yield Row(
            "pass",
            f"fsync {how}",
            "write-back",
            _while(broken[2], _tried("/flush", timeout="1s")),
            **sick,
        )
        yield Row(
            "detach",
            f"while the store {how}",
            "write-back",
            _while(broken[0], _tried("", "DELETE", force=True)),
            back=Bad.attached_again,
            **{**sick, "shows": "."},
        )
        yield Row(
            "detach",
            f"with discard while the store {how}",
            "write-back",
            _while(broken[0], _tried("", "DELETE", discard=True, force=True)),
            back=Bad.attached_again,
            **{**sick, "shows": "."},
        )
        yield Row(
            "preload",
            f"while the store {how}",
            "write-back",
            _while(broken[1], _tried("/preload", amount="all")),
            **sick,
        )
        for name in ("owner.new", "redo.new", "*.dsk"):
            what = {"owner.new": "mark", "redo.new": "pass", "*.dsk": "pass"}[name]
            yield Row(
                what,
                f"{name} {how}",
                "write-back",
                _while(_rule("write", name, **fails), _tried("/flush", timeout="1s")),
                **sick,
            )
    yield Row(
        "full copy",
        "of an image that cannot be read",
        "write-back",
        _while(_fails("read", "EIO"), _tried("/mode", mode="full-copy")),
        **sick,
    )
    yield Row(
        "detach",
        "with clients, by force",
        "write-back",
        _hung_up_on,
        shows="^gone",
        back=Bad.attach,
    )
    yield Row(
        "detach",
        "and attach, sixteen at once",
        "write-back",
        _all_at_once,
        shows=".",
        back=Bad.attached_again,
    )
    yield Row(
        "overlay",
        "large, and detached",
        "write-through",
        _large_overlay_gone,
        overlay=True,
        size=LARGE,
        shows="^gone",
        back=Bad.attach,
    )


def _rule(call: str, name: str, **how: Any) -> Act:
    def do(bad: Bad) -> None:
        bad.bed.fs.fail(call, how.get("error", ""), name=name, hang=how.get("hang", False))
        bad.try_all()

    return do


# --------------------------------------------------------------------------------------------------------------- the VM


def _vm(bad: Bad) -> subprocess.Popen[bytes]:
    """A process that has requests under way all the time."""
    sock, content = bad.bed.gateway.sock(bad.name), bad.below / bad.path.name
    specification = [{"name": bad.name, "socket": str(sock), "content": str(content), "warm": MIB}]
    process = subprocess.Popen(
        [sys.executable, isolation_client.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    bad.processes.append(process)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(specification).encode() + b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"ready\n"
    return process


def _signalled(number: signal.Signals, count: int) -> Act:
    def do(bad: Bad) -> None:
        for _ in range(count):
            _vm(bad).send_signal(number)

    return do


def vm_rows() -> Iterator[Row]:
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        yield Row("vm", name, do=_signalled(number, 3), back=Bad.vm_gone, **WRITES_BACK)


# ------------------------------------------------------------------------------------------------------ Forebay itself


def _raises(task: str, *then: Act) -> Act:
    """The function raises once, for this disk; `then` has it called."""

    def do(bad: Bad) -> None:
        bad.bed.arm(task, bad.name)
        for one in then:
            one(bad)
        bad.bed.wait(lambda: not bad.bed.is_armed(task), f"{task} was not called")

    return do


def _writes(bad: Bad) -> None:
    with contextlib.suppress(OSError):
        bad.write(bad.connect())


def _asks(command: int, at: int = 0, length: int = 4096, *, structured: bool = False) -> Act:
    def do(bad: Bad) -> None:
        with contextlib.suppress(OSError):
            client = bad.connect(structured=structured)
            client.sock.sendall(
                request(command, at, length) + (bytes(length) if command == WRITE else b"")
            )
            client.receive(16)

    return do


def _flushes_twice(bad: Bad) -> None:
    """The compiled core begins the first one; the second one meanwhile is no work for it."""
    with contextlib.suppress(OSError):
        client = bad.connect()
        client.sock.sendall(request(3) * 2)
        client.receive(16)


THEN: dict[str, tuple[list[Act], str]] = {
    "write-back": ([_writes], "^stopped: .*planted"),
    "frozen": ([_writes], "^stopped: .*planted"),
    "pass": ([_writes], "^stopped: .*planted"),
    "watch": ([], "^stopped: .*planted"),
    "full copy": ([_tried("/mode", mode="full-copy")], "^stopped: .*planted"),
    "fetch": ([_asks(READ, COLD.start)], "^stopped: .*planted"),
    "listener": ([_asks(READ)], "^stopped: .*planted"),
    "status": ([], "^(ready|stopped)"),
    "read": ([_asks(READ, COLD.start)], "^ready"),
    "write": ([_asks(WRITE, 4097, 100_000)], "^ready"),
    "trim": ([_asks(TRIM, DIRTY.start)], "^ready"),
    "flush": ([_writes, _flushes_twice], "^(ready|stopped)"),
    "begin flush": ([_writes, _asks(3, 0, 0)], "^(ready|stopped)"),
    "block status": ([_asks(STATUS, structured=True)], "^ready"),
    "change of mode": ([_tried("/mode", mode="none")], "^ready"),
    "preload": ([_tried("/preload", amount="all")], "^ready"),
    "drain": ([_tried("/flush")], "^ready"),
    "close": ([Bad.leave, _tried("", "DELETE", discard=True)], "^stopped: .*planted"),
    "release": ([Bad.leave, _tried("", "DELETE", discard=True)], "."),
    "attach": ([], "^gone"),
    "open": ([], "^gone"),
}
"""By task: what has it called, and what the disk shows then."""


def task_rows() -> Iterator[Row]:
    assert THEN.keys() == TASKS.keys()
    log = r"^RuntimeError: planted|^Traceback|^.*\| +RuntimeError: planted|^\w*ExceptionGroup"
    for task, (then, shows) in THEN.items():
        if task in ("attach", "open"):
            do = _raises(task, _refused())
            yield Row("task", task, "write-back", do, shows, Bad.attach, attached=False, log=log)
        else:
            yield Row(
                "task", task, "write-back", _raises(task, *then), shows, Bad.whatever, log=log
            )


KNOWN: dict[str, str] = {}
"""What is wrong still, by row."""

ROWS = [
    *image_rows(),
    *sidecar_rows(),
    *store_rows(),
    *client_rows(),
    *attach_rows(),
    *command_rows(),
    *vm_rows(),
    *task_rows(),
]
