# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Make the corpus anew: what real clients say to our server, and what real servers say to our client.

`python -m fuzz.record`, from `tests/`. Needs qemu-io, nbdinfo, nbdcopy, nbdkit, qemu-nbd and libnbd's binding.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import uuid
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from forebay.sidecar import redo, redo_header
from forebay.sidecar.record import Owner
from forebay_cache.format import ops
from forebay_cache.format.entry import pack
from forebay_cache.format.records import LayerName, LayerRecord
from forebay_cache.format.superblock import plan
from forebay_nbd.client.negotiation import negotiate
from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.handshake import ClientHandshake
from forebay_nbd.protocol.replies import ReplyReader
from forebay_nbd.protocol.requests import encode_request
from forebay_nbd.protocol.wire import Cmd
from fuzz.targets import ASKED, CONTEXTS, EXPORT, SIZE, requests
from real import processes
from real.nbd_memory import serving

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 200_000
_IDENT = uuid.UUID(int=1)


def keep(target: str, name: str, data: bytes) -> None:
    """One input of the corpus; long ones are cut."""
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[:LONGEST])
    print(f"{target}/{name}: {len(data)} bytes")


# --- what clients say ------------------------------------------------------------------------------


_LIBNBD = """
import sys
sys.path[:] = [p for p in sys.path if not p.endswith("/nbd")]
import nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("forebay:cached")
h.connect_uri(sys.argv[1])
h.pwrite(b"x" * 4096, 8192, nbd.CMD_FLAG_FUA)
h.pread(4096, 8192)
h.zero(65536, 0)
h.trim(65536, 65536)
h.cache(4096, 0)
h.block_status(1 << 20, 0, lambda *_: 0)
h.flush()
h.shutdown()
"""

CLIENTS: dict[str, Callable[[str], list[str]]] = {
    "qemu-io": lambda uri: [
        "qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", "-c", "read 0 4k", "-c", "write -z 64k 64k", "-c",
        "discard 64k 64k", "-c", "flush", uri,
    ],
    "qemu-img-map": lambda uri: ["qemu-img", "map", "--output=json", "-f", "raw", uri],
    "nbdinfo": lambda uri: ["nbdinfo", uri],
    "nbdinfo-list": lambda uri: ["nbdinfo", "--list", uri],
    "nbdinfo-map": lambda uri: ["nbdinfo", "--map", uri],
    "nbdcopy": lambda uri: ["nbdcopy", "--connections=1", "--request-size=65536", uri, "null:"],
    "libnbd": lambda uri: [sys.executable, "-c", _LIBNBD, uri],
    "libnbd-no-such-export": lambda uri: ["nbdinfo", uri.replace("/disk", "/nothing")],
}  # fmt: skip


async def clients() -> None:
    """Each client talks to our server through a proxy that listens."""
    for name, command in CLIENTS.items():
        with tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp") as directory:
            async with serving(Path(directory)) as running, trio.open_nursery() as nursery:
                proxy = f"{directory}/proxy.sock"
                heard: list[bytearray] = []
                await nursery.start(_proxy, proxy, running.path, heard)
                await trio.run_process(
                    command(f"nbd+unix:///disk?socket={proxy}"),
                    check=False,
                    capture_stdout=True,
                    capture_stderr=True,
                )
                nursery.cancel_scope.cancel()
            longest = max(heard, key=len, default=bytearray())
            keep("server", name, bytes(longest[:4096]) if name == "nbdcopy" else bytes(longest))


async def _proxy(
    path: str, server: str, heard: list[bytearray], *, task_status: trio.TaskStatus[None]
) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(8)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    async def one(client: trio.SocketStream) -> None:
        said = bytearray()
        heard.append(said)
        async with await trio.open_unix_socket(server) as there, trio.open_nursery() as nursery:
            nursery.start_soon(_pass_on, there, client, bytearray())
            await _pass_on(client, there, said)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, one, [listener])
        task_status.started()


async def _pass_on(
    here: trio.abc.ReceiveStream, there: trio.abc.SendStream, said: bytearray
) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in here:
            said += data
            await there.send_all(data)


# --- what servers say ------------------------------------------------------------------------------


def servers() -> None:
    """Each server is asked what the target `client` takes for asked."""
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp") as directory:
        image = Path(directory) / "image"
        image.write_bytes(bytes(SIZE // 2) + b"x" * (SIZE // 2))
        starts: dict[str, Callable[[Path], processes.NbdServer]] = {
            "nbdkit": lambda at: processes.nbdkit(at, "file", str(image)),
            "nbdkit-no-sr": lambda at: processes.nbdkit(at, "--no-sr", "file", str(image)),
            "nbdkit-oldest": lambda at: processes.nbdkit(
                at, "--mask-handshake=0", "file", str(image)
            ),
            "qemu-nbd": lambda at: processes.qemu_nbd(at, image, "-x", EXPORT),
            "qemu-nbd-refuses": lambda at: processes.qemu_nbd(at, image, "-x", "another"),
        }
        for number, (name, start) in enumerate(starts.items()):
            at = Path(directory) / f"{number}.sock"
            server = start(at)
            try:
                keep("client", name, _ask(str(at)))
            finally:
                server.stop()


def _ask(path: str) -> bytes:
    heard = bytearray()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        hands = ClientHandshake()

        def hear() -> Any:
            while isinstance(event := hands.next_event(), ev.NeedData):
                data = sock.recv(4096)
                heard.extend(data)
                if not data:
                    raise EOFError
                hands.receive(data)
            return event

        with contextlib.suppress(EOFError, OSError):
            talk = negotiate(hear(), EXPORT, CONTEXTS)
            question = next(talk)
            while True:
                sock.sendall(hands.send(question))
                answers: list[Any] = []
                if not isinstance(question, ev.ClientFlags):
                    while not (
                        answers
                        and isinstance(answers[-1], (ev.Ack, ev.OptionError, ev.ExportBegins))
                    ):
                        answers.append(hear())
                try:
                    question = talk.send(answers)
                except StopIteration as stop:
                    _ask_all(sock, heard, structured=stop.value.structured)
                    break
    return bytes(heard)


def _ask_all(sock: socket.socket, heard: bytearray, *, structured: bool) -> None:
    reader = ReplyReader(structured)
    open_ = set()
    for request in requests():
        if request.command == Cmd.BLOCK_STATUS and not structured:
            continue
        sink = memoryview(bytearray(request.length)) if request.command == Cmd.READ else None
        reader.expect(request, sink)
        open_.add(request.cookie)
        sock.sendall(b"".join(bytes(part) for part in encode_request(request)))
    while open_:
        event = reader.next_event()
        if isinstance(event, ev.NeedData):
            data = sock.recv(4096)
            if not data:
                return
            heard.extend(data)
            left = memoryview(data)
            while left:
                left = left[reader.feed(left) :]
                if left and not isinstance(event := reader.next_event(), ev.NeedData):
                    open_ -= _ended(event)
            continue
        open_ -= _ended(event)


def _ended(event: ev.Reply) -> set[int]:
    whole = isinstance(event, (ev.SimpleReply, ev.NoneChunk)) or event.done
    return {event.cookie} if whole else set()


# --- what we write ourselves -------------------------------------------------------------------------


def files() -> None:
    """Seeds of the other targets."""
    records = b"".join(
        (
            ops.layer_made(3, LayerName.of_disk("d", 1, "images:a.raw")),
            ops.write(0, 0b11, 3, 7, 1, [1, 2]),
            ops.write(1, 0b10, 3, 7, 2, [3]),
            ops.zero(0xFFFF, 3, 8, 0),
            ops.drop(0xF0, 2, 9),
            ops.hot(2, 1),
        )
    )
    keep("journal", "records", records)
    keep("superblock", "good", plan(64 << 20, _IDENT).pack())
    keep("superblock", "summed", plan(64 << 20, _IDENT).pack()[:-4] + b"xxx!")
    keep("owner", "good", _owner())
    keep("owner", "deep", b"[" * 50_000)
    keep("redo", "good", _redo())
    keep(
        "redo",
        "headless",
        b"*" + redo._RECORD.pack(redo._RECORD_MAGIC, redo.ZEROS, 0, 4096) + bytes(8) + b"!",
    )
    keep("index", "tables", _tables())
    for number in range(4):
        rng = random.Random(number)
        keep("turns", str(number), rng.randbytes(8 * 60))
        keep("door", str(number), rng.randbytes(9 * 60))
    write, read = bytes((1, 10, 0, 1, 0, 0, 16, 0)), bytes((0, 0, 0, 0, 0, 0, 1, 0))
    for number in range(4):  # some of them come in one piece
        keep("turns", f"many-{number}", write + read * (1000 + number))
    nonsense, connect = bytes((98,) * 8 + (0,)), bytes((224,) * 9)
    asked = bytes((9, 0, 0, 0, 0, 0, 4, 7, 0)) * 80
    keep("door", "away", nonsense + (asked + connect) * 2)
    for number, text in enumerate(
        (
            "images:a/b.raw", "/srv/images/x", "nbd://host:10810/export", "nbd+unix:///e?socket=/run/x.sock",
            "/dev/vg0/lv", "images:../x", "nbd://[::1]/%2e", "images:a.raw.forebay/owner",
        )
    ):  # fmt: skip
        keep("image", str(number), text.encode())


def imports() -> None:
    """Files as `forebay import` is given them."""
    disk = b"".join(bytes([n]) * 700 + bytes(3000) for n in range(1, 12))
    with tempfile.TemporaryDirectory() as folder:
        raw, made = Path(folder) / "raw", Path(folder) / "qcow2"
        raw.write_bytes(disk.ljust(64 << 10, b"\0"))
        for name, options in QCOW2.items():
            convert: list[str | Path] = [
                "qemu-img",
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                *options,
                raw,
                made,
            ]
            subprocess.run(convert, check=True)
            keep("qcow2", name, made.read_bytes())
        for name, words in PACKERS.items():
            told = subprocess.run(words, input=disk, capture_output=True, check=True).stdout
            keep("packed", name, told + (told if name == "gzip" else b""))


QCOW2 = {
    "plain": ["-o", "cluster_size=512"],
    "zlib": ["-c", "-o", "cluster_size=4k"],
    "zstd": ["-c", "-o", "cluster_size=4k,compression_type=zstd"],
    "parts": ["-o", "cluster_size=16k,extended_l2=on"],
}
"""Options of qemu-img for each kind of cluster."""
PACKERS = {"gzip": ["gzip", "-n"], "xz": ["xz"], "zstd": ["zstd", "-q"]}


def _owner() -> bytes:
    me = Owner.of_this_process("gateway", "disk")
    fixed = asdict(me) | {
        "host": "host",
        "pid": 1,
        "boot_id": "b",
        "since": "2026-01-01T00:00:00+00:00",
    }
    return json.dumps(fixed).encode()


def _redo() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        sidecar = os.open(directory, os.O_RDONLY)
        journal = redo.RedoFile(
            sidecar, redo_header.Checkpoint("g", "h", "d", SIZE, 1, "2026-01-01T00:00:00+00:00")
        )
        journal.add(0, 4096, [b"x" * 4096])
        journal.add(65536, 65536, None)
        journal.commit()
        os.close(sidecar)
        return (Path(directory) / redo.NAME).read_bytes()


def _tables() -> bytes:
    layers = [
        (3, LayerName.of_disk("d", 1, "images:a.raw")),
        (2, LayerName.of_image("images:a.raw")),
    ]
    found = b""

    def entry(table: int, key: bytes, value: bytes) -> bytes:
        return bytes((table, len(key))) + len(value).to_bytes(2, "little") + key + value

    for ident, name in layers:
        private, record = name.is_private, LayerRecord(name, slots=1, sectors=2).pack()
        found += entry(3, ident.to_bytes(4, "big"), record)
        page = array("Q", bytes(1024 if private else 512))
        page[5] = pack(ident, 0, 3)
        found += entry(1, ident.to_bytes(4, "big") + bytes(4), page.tobytes())
    found += entry(4, (2).to_bytes(4, "big") + bytes(4), b"")
    found += entry(5, b"disk\0d", b'{"image": "images:a.raw"}')
    return found + entry(2, bytes(4), bytes(1024))


if __name__ == "__main__":
    assert len(ASKED) == len(requests())
    trio.run(clients)
    servers()
    files()
    imports()
