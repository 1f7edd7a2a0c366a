# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is fuzzed: everything that reads bytes from outside, each as a function of the bytes.

A target returns, or raises what is a bug. What its code may raise by contract it catches itself. The parsers are fed
twice, as a whole and in pieces, and have to say the same: where the network cuts must not matter.
"""

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from xxhash import xxh3_64, xxh3_64_intdigest

from forebay.config.model import Config, Store
from forebay.config.sections import OriginsSection
from forebay.errors import ForebayError
from forebay.formats import qcow2
from forebay.importing import guest_view
from forebay.importing.sparse import STEP
from forebay.importing.unpack import packed_how, unpack
from forebay.origin.addresses import resolve
from forebay.sidecar import redo, redo_header
from forebay.sidecar.record import LARGEST, Owner
from forebay.sidecar.tenure import next_token
from forebay_cache import CacheError
from forebay_cache.device.device import Device
from forebay_cache.device.superblock import read_superblock
from forebay_cache.durable.journal import Journal, Position
from forebay_cache.format import ops
from forebay_cache.format.records import FORMAT, NAMES_ARE_TEXT, TABLES, Meta
from forebay_cache.format.superblock import JOURNAL_OFFSET, SUPERBLOCK, Superblock
from forebay_cache.offline.report import Report
from forebay_cache.offline.tables import Tables
from forebay_cache.offline.walk import Walk
from forebay_cache.upkeep.medium import Medium
from forebay_nbd import Limits
from forebay_nbd.client.negotiation import Replies, negotiate
from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.handshake import ClientHandshake, ServerHandshake, State
from forebay_nbd.protocol.replies import ReplyReader
from forebay_nbd.protocol.requests import RequestReader, check_request, encode_reply
from forebay_nbd.protocol.wire import Cmd, CmdFlag, ProtocolError, RequestError
from forebay_nbd.server.export import Export
from forebay_nbd.server.negotiation import Negotiation
from fuzz import live

SIZE = 8 << 20
LIMITS = Limits()
MOST_EVENTS = 4000
"""A stream has at most so many; a parser that gives more without being fed runs in circles."""

Said = list[str]


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut where the data says, so that a failing input fails again."""
    step = 1 + zlib.crc32(data) % (97 + len(data) // 64)
    for at in range(0, len(data), step):
        yield data[at : at + step]


def _both(parse: Callable[[list[bytes]], Said], data: bytes) -> None:
    whole, cut = parse([data]), parse(list(_pieces(data)))
    assert whole == cut, f"whole: {whole[-3:]}; in pieces: {cut[-3:]}"


# --- NBD, server --------------------------------------------------------------------------------


class _Export:
    name = "disk"
    size = SIZE
    read_only = False
    rotational = False
    preferred_block = 4096
    contexts = ("forebay:cached",)


_EXPORT = cast("Export", _Export())


def _resolve(name: str) -> Export | None:
    return _EXPORT if name in ("", "disk") else None


def server(data: bytes) -> None:
    """All that a client sends: handshake, then requests."""
    _both(_server, data)


def _server(pieces: list[bytes]) -> Said:
    said: Said = []
    hands = ServerHandshake(LIMITS.option_bytes, LIMITS.queries)
    negotiation = Negotiation(_resolve, lambda: ["disk"], LIMITS.name_bytes)
    hands.send(ev.Greeting(hands.FLAGS))
    options = 0
    rest = iter(pieces)
    try:
        while hands.state is not State.TRANSMISSION:
            event = hands.next_event()
            if isinstance(event, ev.NeedData):
                piece = next(rest, None)
                if piece is None or hands.state is State.CLOSED:
                    return said
                hands.receive(piece)
                continue
            said.append(repr(event))
            if isinstance(event, ev.ClientFlags):
                negotiation.padding = not hands.no_zeroes
                continue
            options += 1
            if options > LIMITS.options:
                raise ProtocolError("too many options")
            for answer in negotiation.answer(event):
                assert len(hands.send(answer)) <= 8192
        assert negotiation.export is not None
        said += _requests([hands.trailing(), *rest], negotiation)
    except ProtocolError as fault:
        said.append(f"hung up: {fault}")
    return said


def _requests(pieces: list[bytes], negotiation: Negotiation) -> Said:
    said: Said = []
    reader = RequestReader(LIMITS.receive_buffer, LIMITS.in_place_bytes)
    for request in _fed(reader, pieces, said):
        assert isinstance(request, ev.Request)
        payload = bytes(request.payload)
        said.append(f"{request.command} {request.flags} {request.offset} {request.length}")
        assert len(payload) == (request.length if request.command == Cmd.WRITE else 0)
        try:
            check_request(request, SIZE, False, negotiation.structured, bool(negotiation.contexts))
        except RequestError as fault:
            if negotiation.structured:
                encode_reply(ev.ErrorChunk(request.cookie, fault.errno or 5, fault.strerror or ""))
            said.append(str(fault))
        else:
            assert request.command == Cmd.FLUSH or request.offset + request.length <= SIZE
        if request.command == Cmd.DISC:
            break
    return said


def _fed(reader: RequestReader | ReplyReader, pieces: list[bytes], said: Said) -> Iterator[Any]:
    """Events of a reader that is given the pieces in turn; what it raises ends them, and is said."""
    events = 0
    rest = iter(pieces)
    left = b""
    try:
        while events < MOST_EVENTS:
            event = reader.next_event()
            if not isinstance(event, ev.NeedData):
                events += 1
                yield event
                continue
            left = left or next(rest, b"")
            if not left:
                left = b"".join(rest)
                if not left:
                    return
            took = reader.feed(left)
            assert took, "data are wanted, and there is no room for them"
            left = left[took:]
    except ProtocolError as fault:
        said.append(f"hung up: {fault}")


# --- NBD, client --------------------------------------------------------------------------------

EXPORT, CONTEXTS = "disk", ("base:allocation",)

ASKED = [
    (Cmd.READ, 0, 512, CmdFlag(0)),
    (Cmd.READ, 4096, 70_000, CmdFlag(0)),
    (Cmd.READ, 0, 8192, CmdFlag.DF),
    (Cmd.BLOCK_STATUS, 0, 1 << 20, CmdFlag(0)),
    (Cmd.BLOCK_STATUS, 0, 1 << 20, CmdFlag.REQ_ONE),
    (Cmd.WRITE, 65536, 512, CmdFlag.FUA),
    (Cmd.WRITE_ZEROES, 4096, 4096, CmdFlag(0)),
    (Cmd.TRIM, 1 << 20, 65536, CmdFlag(0)),
    (Cmd.FLUSH, 0, 0, CmdFlag(0)),
    (Cmd.READ, SIZE, 512, CmdFlag(0)),
]
"""Requests that are out while the client listens: with cookies from 1 on. The last one is an error."""


def requests() -> list[ev.Request]:
    """The requests of ASKED."""
    return [
        ev.Request(command, flags, n, offset, length, bytes(length if command == Cmd.WRITE else 0))
        for n, (command, offset, length, flags) in enumerate(ASKED, 1)
    ]


def client(data: bytes) -> None:
    """All that a server sends: handshake, then replies to ASKED."""
    _both(_client, data)


def _client(pieces: list[bytes]) -> Said:
    said: Said = []
    hands = ClientHandshake()
    rest = iter(pieces)

    def hear() -> Any:
        while isinstance(event := hands.next_event(), ev.NeedData):
            piece = next(rest, None)
            if piece is None:
                raise EOFError
            hands.receive(piece)
        said.append(repr(event))
        return event

    try:
        talk = negotiate(hear(), EXPORT, CONTEXTS)
        question = next(talk)
        while True:
            hands.send(question)
            answers: Replies = []
            if not isinstance(question, ev.ClientFlags):
                while not (
                    answers and isinstance(answers[-1], (ev.Ack, ev.OptionError, ev.ExportBegins))
                ):
                    answers.append(hear())
            question = talk.send(answers)
    except StopIteration as stop:
        said += _replies([hands.trailing(), *rest], structured=stop.value.structured)
    except EOFError:
        said.append("gone")
    except (ProtocolError, OSError) as fault:
        said.append(f"given up: {fault}")
    return said


def _replies(pieces: list[bytes], *, structured: bool) -> Said:
    said: Said = []
    reader = ReplyReader(structured)
    sinks = {}
    for request in requests():
        length = request.length if request.command == Cmd.READ else 0
        sinks[request.cookie] = memoryview(bytearray(length))
        reader.expect(request, sinks[request.cookie])
    for reply in _fed(reader, pieces, said):
        text = repr(reply)
        said.append(
            text[:200] if "memory at" not in text else f"{type(reply).__name__} {reply.cookie}"
        )
    if not any(line.startswith("hung up") for line in said):
        said.append(str(zlib.crc32(b"".join(sinks.values()))))  # of a broken stream nothing is used
    return said


# --- the cache device and its index ---------------------------------------------------------------


class _Ring:
    """A device that has nothing but a journal."""

    def __init__(self, ring: bytes) -> None:
        self.ring = ring
        self.layout = Superblock(uuid.UUID(int=1), 65536, 0, len(ring), 0, 100)

    def read_into(self, offset: int, buffers: list[bytearray]) -> None:
        at = offset - JOURNAL_OFFSET
        for buffer in buffers:
            assert at >= 0
            assert at + len(buffer) <= len(self.ring), "read beyond the ring"
            buffer[:] = self.ring[at : at + len(buffer)]
            at += len(buffer)


def journal(data: bytes) -> None:
    """A journal as it lies on the device. Where the data does not begin with a frame, it becomes the payload of one."""
    if not data.startswith(b"FBJL"):
        seed = zlib.crc32(uuid.UUID(int=1).bytes)
        body = data + bytes(-len(data) % 8)
        head = (1).to_bytes(8, "little") + len(data).to_bytes(4, "little")
        crc = zlib.crc32(body, zlib.crc32(head, seed))
        data = (
            b"FBJL"
            + len(data).to_bytes(4, "little")
            + head[:8]
            + crc.to_bytes(4, "little")
            + bytes(4)
            + body
        )
    ring = _Ring(data + bytes(-len(data) % 4096 + 64))
    reader = Journal(cast("Device", ring), Position(0, 1))
    for payload in reader.replay():
        with contextlib.suppress(ValueError):
            for op in ops.unpack(payload):
                assert op.kind in (ops.WRITE, ops.ZERO, ops.DROP, ops.HOT, ops.LAYER)


def superblock(data: bytes) -> None:
    """The start of a device. The checksum is made right where the last byte of the data says so."""
    raw = bytearray(data[:SUPERBLOCK].ljust(SUPERBLOCK, b"\0"))
    if data[-1:] == b"!":
        raw[-4:] = zlib.crc32(raw[:-4]).to_bytes(4, "little")
    fd = os.memfd_create("superblock")
    try:
        os.write(fd, raw)
        with contextlib.suppress(CacheError):
            layout = read_superblock(fd, Path("device"))
            if layout is not None:
                assert layout.data_offset + layout.slots * 65536 <= layout.size
                assert JOURNAL_OFFSET + layout.journal_size <= layout.data_offset
    finally:
        os.close(fd)


class _TablesOf(Tables):
    """Tables of an index that are lists in memory."""

    def __init__(self, found: dict[str, list[tuple[bytes, bytes]]]) -> None:
        self._found = found
        self._group = (-1, b"")

    def get(self, table: str, key: bytes) -> bytes | None:
        return dict(self._found[table]).get(key)

    def items(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        yield from self._found[table]


class _Nothing:
    """A device of 100 slots that holds zeros."""

    layout = Superblock(uuid.UUID(int=1), 65536, 0, 4096, 0, 100)
    slots = 100

    def read_into(self, _offset: int, buffers: list[bytearray]) -> None:
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    def sums(self, _slot: int) -> list[int]:
        return [0] * 16


def index(data: bytes) -> None:
    """The tables of an index: each entry as `table u8 | key length u8 | value length u16 | key | value`."""
    found: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in TABLES}
    at = 0
    while at + 4 <= len(data):
        table = TABLES[data[at] % len(TABLES)]
        key, value = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "little")
        at += 4
        found[table].append((data[at : at + key], data[at + key : at + key + value]))
        at += key + value
    for version in (FORMAT, NAMES_ARE_TEXT):
        _walk(found, version)


def _walk(tables: dict[str, list[tuple[bytes, bytes]]], version: int) -> None:
    nothing = _Nothing()
    report = Report("device", "index", slots=100)
    walk = Walk(
        report,
        _TablesOf(tables),
        Meta("", frontier=100, format=version),
        cast("Device", nothing),
        cast("Medium", nothing),
        "boot",
    )
    walk.run(lambda _done, _total: None)
    json.dumps(report.json())


# --- the store ------------------------------------------------------------------------------------


def owner(data: bytes) -> None:
    """An owner marker, which lies where tenants may write: what it says is shown, and is written again."""
    with contextlib.suppress(ValueError):
        found = Owner.parse(data)
        assert (str(found) + found.dirty_in_words).isprintable()
        assert len(str(found) + found.dirty_in_words) < 1000
        again = replace(found, token=min(next_token(found.token), LARGEST))
        assert Owner.parse(json.dumps(asdict(again)).encode()) == again


def redo_journal(data: bytes) -> None:
    """A redo journal, from the same place. `*` for a header is a good one; sums are made right where `!` ends it."""
    if data.startswith(b"*"):
        good = redo_header.Checkpoint("g", "h", "d", SIZE, 1, "")
        data = redo_header.packed(good) + data[1:]
    fd = os.memfd_create("redo")
    try:
        os.write(fd, _summed(data) if data.endswith(b"!") else data)
        with contextlib.suppress(ValueError):
            checkpoint = redo_header.read(fd)
            for _kind, offset, length, at in redo._records(fd, checkpoint.size):
                assert offset + length <= checkpoint.size
                assert at < len(data) + 4096
    finally:
        os.close(fd)


def _summed(data: bytes) -> bytes:
    """The journal with the checksum that its header, and each record that is whole, should have."""
    raw = bytearray(data.ljust(redo_header.LENGTH, b"\0"))
    body = redo_header.LENGTH - redo_header.SUM.size
    raw[body : redo_header.LENGTH] = redo_header.SUM.pack(xxh3_64_intdigest(bytes(raw[:body])))
    at = redo_header.LENGTH
    while at + redo._HEAD <= len(raw):
        _, kind, _, length = redo._RECORD.unpack_from(raw, at)
        stored = min(length, len(raw) - at - redo._HEAD) if kind == redo.DATA else 0
        total = xxh3_64(bytes(raw[at : at + redo._RECORD.size]))
        total.update(bytes(raw[at + redo._HEAD : at + redo._HEAD + stored]))
        redo_header.SUM.pack_into(raw, at + redo._RECORD.size, total.intdigest())
        at += redo._HEAD + stored
    return bytes(raw)


_CONFIG = Config(
    origins=OriginsSection(
        nbd=["nbd://*/*", "nbd+unix:///*?socket=/run/*"], devices=["/dev/vg0/*"]
    ),
    stores={"images": Store(path=Path("/srv/images"))},
)


def image(data: bytes) -> None:
    """What names an image: the control API passes on what it was told."""
    with contextlib.suppress(ForebayError):
        found = resolve(_CONFIG, data.decode(errors="surrogateescape"))
        path = getattr(found, "path", "")
        assert ".." not in path.split("/")
        assert not path.startswith("/") or path.startswith("/dev/vg0/")
        assert "\0" not in found.key


# --- what is imported ---------------------------------------------------------------------------


def qcow2_image(data: bytes) -> None:
    """All that a guest would see of a qcow2 image."""

    def read(offset: int, length: int) -> bytes:
        assert offset >= 0 <= length
        return data[offset : offset + length]

    with contextlib.suppress(ValueError):
        header = qcow2.parse(data[: qcow2.HEAD], len(data))
        guest_view.check(header)
        if header.size > SIZE:
            return
        assert 0 <= guest_view.allocated(read, header, 0) <= header.size
        end = 0
        for at, part in guest_view.data(read, header, 0):
            assert not part or end <= at <= at + len(part) <= header.size
            end = at + len(part)


def packed(data: bytes) -> None:
    """A file that is packed, as a whole and in pieces."""
    _both(lambda pieces: _unpacked(packed_how(data) or "gz", pieces), data)


def _unpacked(kind: str, pieces: list[bytes]) -> Said:
    said, length, crc = [], 0, 0
    try:
        for part in unpack(kind, iter(pieces)):
            length, crc = length + len(part), zlib.crc32(part, crc)
            assert len(part) <= STEP
            if length > 64 * SIZE:
                return []  # however it is cut, it is a bomb
    except ValueError:
        return []
    said.append(f"{length} {crc}")
    return said


TARGETS: dict[str, Callable[[bytes], None]] = {
    "server": server,
    "client": client,
    "journal": journal,
    "superblock": superblock,
    "index": index,
    "owner": owner,
    "redo": redo_journal,
    "image": image,
    "connection": live.connection,
    "turns": live.turns,
    "door": live.door,
    "packed": packed,
    "qcow2": qcow2_image,
}
