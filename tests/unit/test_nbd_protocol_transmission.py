# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The transmission phase: requests and replies as (event, bytes), read whole, byte by byte, and with more behind."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.replies import ReplyReader
from forebay_nbd.protocol.requests import RequestReader, check_request, encode_reply, encode_request
from forebay_nbd.protocol.wire import (
    MAX_PAYLOAD,
    REQUEST_MAGIC,
    Buffer,
    Cmd,
    CmdFlag,
    ProtocolError,
    RequestError,
    clipped,
    local_errno,
    wire_errno,
)

MAGIC = bytes.fromhex("25609513")
SIMPLE = bytes.fromhex("67446698")
CHUNK = bytes.fromhex("668e33ef")
COOKIE = 0x0102030405060708
C = bytes.fromhex("0102030405060708")


def h(text: str) -> bytes:
    return bytes.fromhex(text)


REQUESTS = [
    (ev.Request(0, 0, COOKIE, 4096, 512), MAGIC + h("0000 0000") + C + h("0000000000001000 00000200")),
    (ev.Request(0, 4, COOKIE, 0, 1), MAGIC + h("0004 0000") + C + h("0000000000000000 00000001")),
    (ev.Request(1, 1, COOKIE, 5, 3, b"abc"), MAGIC + h("0001 0001") + C + h("0000000000000005 00000003") + b"abc"),
    (ev.Request(1, 0, COOKIE, 0, 0), MAGIC + h("0000 0001") + C + h("0000000000000000 00000000")),
    (ev.Request(2, 0, COOKIE), MAGIC + h("0000 0002") + C + bytes(12)),
    (ev.Request(3, 0, COOKIE), MAGIC + h("0000 0003") + C + bytes(12)),
    (ev.Request(4, 0, COOKIE, 1 << 40, 0xFFFFFFFF), MAGIC + h("0000 0004") + C + h("0000010000000000 ffffffff")),
    (ev.Request(5, 0, COOKIE, 0, 9), MAGIC + h("0000 0005") + C + h("0000000000000000 00000009")),
    (ev.Request(6, 18, COOKIE, 0, 9), MAGIC + h("0012 0006") + C + h("0000000000000000 00000009")),
    (ev.Request(7, 8, COOKIE, 0, 9), MAGIC + h("0008 0007") + C + h("0000000000000000 00000009")),
    (ev.Request(999, 0xFFFF, COOKIE, 0, 9), MAGIC + h("ffff 03e7") + C + h("0000000000000000 00000009")),
]  # fmt: skip

READ = ev.Request(Cmd.READ, 0, COOKIE, 100, 8)
WRITE = ev.Request(Cmd.WRITE, 0, COOKIE, 100, 8)
STATUS = ev.Request(Cmd.BLOCK_STATUS, 0, COOKIE, 0, 4096)

# structured replies agreed on?, the request, its reply, the reply's bytes
REPLIES = [
    (False, WRITE, ev.SimpleReply(COOKIE), SIMPLE + h("00000000") + C),
    (True, WRITE, ev.SimpleReply(COOKIE), SIMPLE + h("00000000") + C),
    (False, READ, ev.SimpleReply(COOKIE, 22), SIMPLE + h("00000016") + C),
    (False, READ, ev.SimpleReply(COOKIE, 0, b"12345678"), SIMPLE + h("00000000") + C + b"12345678"),
    (True, WRITE, ev.NoneChunk(COOKIE), CHUNK + h("0001 0000") + C + h("00000000")),
    (
        True,
        READ,
        ev.DataChunk(COOKIE, 100, b"12345678"),
        CHUNK + h("0001 0001") + C + h("00000010 0000000000000064") + b"12345678",
    ),
    (
        True,
        READ,
        ev.DataChunk(COOKIE, 101, b"234", done=False),
        CHUNK + h("0000 0001") + C + h("0000000b 0000000000000065") + b"234",
    ),
    (
        True,
        READ,
        ev.HoleChunk(COOKIE, 100, 8),
        CHUNK + h("0001 0002") + C + h("0000000c 0000000000000064 00000008"),
    ),
    (
        True,
        STATUS,
        ev.StatusChunk(COOKIE, 1, ((512, 3), (3584, 0))),
        CHUNK + h("0001 0005") + C + h("00000014 00000001 00000200 00000003 00000e00 00000000"),
    ),
    (True, READ, ev.ErrorChunk(COOKIE, 5), CHUNK + h("0001 8001") + C + h("00000006 00000005 0000")),
    (True, STATUS, ev.ErrorChunk(COOKIE, 5, "no"), CHUNK + h("0001 8001") + C + h("00000008 00000005 0002") + b"no"),
    (
        True,
        READ,
        ev.ErrorChunk(COOKIE, 5, "no", 104, done=False),
        CHUNK + h("0000 8002") + C + h("00000010 00000005 0002") + b"no" + h("0000000000000068"),
    ),
]  # fmt: skip


def feed(reader: RequestReader | ReplyReader, data: Buffer) -> None:
    """All of `data`; the reader must have room for it, as it must after NEED_DATA."""
    view = memoryview(data)
    while view:
        count = reader.feed(view)
        assert count, "no room although more was asked for"
        view = view[count:]


def replies(structured: bool, *requests: ev.Request) -> ReplyReader:
    reader = ReplyReader(structured)
    for request in requests:
        reader.expect(request)
    return reader


@pytest.mark.parametrize(
    ("request_", "data"), REQUESTS, ids=lambda row: getattr(row, "command", "")
)
def test_requests(request_: ev.Request, data: bytes) -> None:
    assert b"".join(encode_request(request_)) == data

    reader = RequestReader()
    feed(reader, data + b"behind")
    assert reader.next_event() == request_
    assert reader.unparsed() == b"behind"

    reader = RequestReader()
    for index in range(len(data)):
        assert reader.next_event() is ev.NEED_DATA
        assert reader.unparsed() == data[:index]
        feed(reader, data[index : index + 1])
    assert reader.next_event() == request_
    assert reader.next_event() is ev.NEED_DATA


@pytest.mark.parametrize(("structured", "asked", "reply", "data"), REPLIES)
def test_replies(structured: bool, asked: ev.Request, reply: ev.Reply, data: bytes) -> None:
    assert b"".join(encode_reply(reply)) == data

    reader = replies(structured, asked)
    feed(reader, data + b"behind")
    assert reader.next_event() == reply

    reader = replies(structured, asked)
    for index in range(len(data)):
        assert reader.next_event() is ev.NEED_DATA
        feed(reader, data[index : index + 1])
    assert reader.next_event() == reply
    assert reader.next_event() is ev.NEED_DATA


# --- requests ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [1, 99, 100, 101, 150, 1000])
def test_payloads_around_the_size_of_the_buffer(length: int) -> None:
    """In place up to 100 bytes, in a buffer of their own beyond; the buffer wraps around many times."""
    requests = [ev.Request(Cmd.WRITE, 0, i, i, length, bytes([i]) * length) for i in range(20)]
    data = b"".join(b"".join(encode_request(request)) for request in requests)
    for step in (1, 7, 64, 10_000):
        reader = RequestReader(capacity=150, in_place=100)
        got: list[ev.Request] = []
        view = memoryview(data)
        while view or len(got) < len(requests):
            event = reader.next_event()
            if isinstance(event, ev.NeedData):
                count = reader.feed(view[:step])
                assert count
                view = view[count:]
            else:
                got.append(
                    ev.Request(
                        event.command,
                        event.flags,
                        event.cookie,
                        event.offset,
                        event.length,
                        bytes(event.payload),
                    )
                )
        assert got == requests


def test_a_payload_of_its_own_survives_a_move_to_another_process() -> None:
    data = b"".join(encode_request(ev.Request(Cmd.WRITE, 0, 7, 0, 200, bytes(range(200)))))
    first = RequestReader(150, 100)
    feed(first, data[:150])
    assert first.next_event() is ev.NEED_DATA
    assert first.large_payload() == 200
    feed(first, data[150:170])
    assert first.unparsed() == data[:170]

    second = RequestReader(150, 100)
    view = memoryview(first.unparsed() + data[170:])
    while isinstance(event := second.next_event(), ev.NeedData):
        view = view[second.feed(view) :]
    assert event.payload == bytes(range(200))


def test_runs_of_headers() -> None:
    reader = RequestReader()
    feed(reader, b"".join(REQUESTS[0][1] for _ in range(5)) + b"incomplete")
    prefix = (REQUEST_MAGIC << 32) | Cmd.READ
    assert list(reader.headers(3)) == [(prefix, C, 4096, 512)] * 3
    reader.skip(3)
    assert list(reader.headers(99)) == [(prefix, C, 4096, 512)] * 2
    reader.skip(2)
    assert reader.unparsed() == b"incomplete"


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 28,
        h("25609514") + bytes(24),
        MAGIC + h("0000 0001") + C + h("0000000000000000 02000001"),  # 32 MiB and one byte
        MAGIC + h("0000 0001") + C + h("0000000000000000 ffffffff"),
    ],
)
def test_requests_that_end_the_connection(data: bytes) -> None:
    reader = RequestReader()
    feed(reader, data)
    with pytest.raises(ProtocolError):
        reader.next_event()


SIZE = 10_000
CHECKS = [
    # command, flags, offset, length, errno (None: may be done)
    (Cmd.READ, 0, 0, SIZE, None),
    (Cmd.READ, CmdFlag.FUA, 0, 1, None),
    (Cmd.READ, CmdFlag.DF, 0, 1, None),
    (Cmd.READ, CmdFlag.REQ_ONE, 0, 1, errno.EINVAL),
    (Cmd.READ, 1 << 9, 0, 1, errno.EINVAL),
    (Cmd.READ, 0, SIZE, 0, None),
    (Cmd.READ, 0, SIZE, 1, errno.EINVAL),
    (Cmd.READ, 0, (1 << 64) - 1, 0xFFFFFFFF, errno.EINVAL),
    (Cmd.WRITE, 0, SIZE - 1, 1, None),
    (Cmd.WRITE, CmdFlag.FUA, 0, 1, None),
    (Cmd.WRITE, CmdFlag.NO_HOLE, 0, 1, errno.EINVAL),
    (Cmd.WRITE, 0, SIZE - 1, 2, errno.ENOSPC),
    (Cmd.WRITE_ZEROES, CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO, 0, SIZE, None),
    (Cmd.WRITE_ZEROES, CmdFlag.DF, 0, SIZE, errno.EINVAL),
    (Cmd.WRITE_ZEROES, 0, 1, SIZE, errno.ENOSPC),
    (Cmd.TRIM, 0, 1, SIZE, errno.EINVAL),
    (Cmd.TRIM, CmdFlag.FUA, 0, SIZE, None),
    (Cmd.CACHE, 0, 0, SIZE, None),
    (Cmd.CACHE, 0, 1, SIZE, errno.EINVAL),
    (Cmd.FLUSH, CmdFlag.FUA, 0, 0, None),
    (Cmd.FLUSH, 0, 1, 0, errno.EINVAL),
    (Cmd.FLUSH, 0, 0, 1, errno.EINVAL),
    (Cmd.BLOCK_STATUS, CmdFlag.REQ_ONE, 0, SIZE, None),
    (Cmd.BLOCK_STATUS, 0, 0, 0, errno.EINVAL),
    (Cmd.BLOCK_STATUS, 0, 0, 0xFFFFFFFF, errno.EINVAL),
    (Cmd.RESIZE, 0, 0, 0, errno.EINVAL),
    (9, 0, 0, 0, errno.EINVAL),
    (0xFFFF, 0xFFFF, 0, 0, errno.EINVAL),
]


@pytest.mark.parametrize(("command", "flags", "offset", "length", "code"), CHECKS)
def test_checks(command: int, flags: int, offset: int, length: int, code: int | None) -> None:
    request = ev.Request(command, flags, 1, offset, length)
    if code is None:
        check_request(request, SIZE, False, True, True)
    else:
        with pytest.raises(RequestError) as caught:
            check_request(request, SIZE, False, True, True)
        assert caught.value.errno == code


def test_what_was_not_agreed_on_is_refused() -> None:
    with pytest.raises(RequestError):
        check_request(ev.Request(Cmd.READ, CmdFlag.DF, 1, 0, 1), SIZE, False, False, False)
    with pytest.raises(RequestError):
        check_request(ev.Request(Cmd.BLOCK_STATUS, 0, 1, 0, 1), SIZE, False, True, False)
    with pytest.raises(RequestError):
        check_request(ev.Request(Cmd.READ, 0, 1, 0, MAX_PAYLOAD + 1), 1 << 40, False, True, True)
    for command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES):
        with pytest.raises(RequestError) as caught:
            check_request(ev.Request(command, 0, 1, SIZE, SIZE), SIZE, True, True, True)
        assert caught.value.errno == errno.EPERM
    check_request(ev.Request(Cmd.FLUSH, 0, 1), SIZE, True, True, True)


def test_errors_become_one_of_eight() -> None:
    assert wire_errno(errno.EDQUOT) == wire_errno(errno.EFBIG) == errno.ENOSPC
    assert wire_errno(errno.ESTALE) == wire_errno(errno.ETIMEDOUT) == wire_errno(None) == errno.EIO
    assert wire_errno(errno.ENOMEM) == errno.EIO
    assert wire_errno(errno.EROFS) == errno.EPERM
    assert wire_errno(errno.ENOTSUP) == errno.ENOTSUP
    assert local_errno(12345) == errno.EINVAL
    assert local_errno(errno.ESHUTDOWN) == errno.ESHUTDOWN


# --- replies ----------------------------------------------------------------------------------------
def data_chunk(offset: int, data: bytes, done: bool) -> bytes:
    return b"".join(encode_reply(ev.DataChunk(COOKIE, offset, data, done)))


FATAL_REPLIES = [
    (True, READ, b"\0" * 20),
    (False, READ, REPLIES[5][3]),  # chunks were not agreed on
    (True, READ, SIMPLE + h("00000000") + C),  # a simple reply to a structured READ
    (True, STATUS, SIMPLE + h("00000000") + C),
    (True, READ, SIMPLE + h("00000000") + bytes(8)),  # nobody asked
    (True, READ, CHUNK + h("0001 0000") + C + h("00000001 00")),
    (True, READ, CHUNK + h("0000 0000") + C + h("00000000")),  # empty, and not the last
    (True, READ, CHUNK + h("0001 0000") + C + h("00000000")),  # done, and nothing read
    (True, READ, CHUNK + h("0001 0063") + C + h("00000000")),  # unknown content type
    (True, READ, CHUNK + h("0001 0001") + C + h("00000008 0000000000000064")),  # data of no bytes
    (True, READ, CHUNK + h("0001 0001") + C + h("ffffffff 0000000000000064")),
    (True, READ, data_chunk(99, b"x", False)),
    (True, READ, data_chunk(107, b"xx", False)),
    (True, READ, data_chunk(100, b"1234", True)),  # half of it
    (True, READ, data_chunk(100, b"1234", False) + data_chunk(103, b"5", False)),
    (True, READ, data_chunk(103, b"1234", False) + data_chunk(100, b"5555", False)),
    (True, READ, data_chunk(103, b"1234", False) + data_chunk(103, b"1", False)),
    (True, WRITE, data_chunk(100, b"1234", False)),
    (True, READ, CHUNK + h("0001 0002") + C + h("0000000c 0000000000000064 00000000")),
    (True, READ, CHUNK + h("0001 0002") + C + h("0000000c 0000000000000064 ffffffff")),
    (True, READ, CHUNK + h("0001 0002") + C + h("0000000b 0000000000000064 000000")),
    (True, READ, REPLIES[8][3]),  # extents for a READ
    (True, STATUS, CHUNK + h("0001 0005") + C + h("00000004 00000001")),
    (True, STATUS, CHUNK + h("0001 0005") + C + h("0000000c 00000001 00000000 00000000")),
    (True, STATUS, CHUNK + h("0001 0005") + C + h("0000000d 00000001 00000200 00000000 00")),
    (True, STATUS, CHUNK + h("0001 0000") + C + h("00000000")),
    (True, STATUS, CHUNK + h("0001 0005") + C + h("ffffffff")),
    (True, READ, CHUNK + h("0001 8001") + C + h("00000005 00000005 00")),
    (True, READ, CHUNK + h("0001 8001") + C + h("00000006 00000005 0001")),
    (True, READ, CHUNK + h("0001 8001") + C + h("00000006 00000000 0000")),
    (True, READ, CHUNK + h("0001 8002") + C + h("00000006 00000005 0000")),
    (True, READ, CHUNK + h("0001 8001") + C + h("ffffffff")),
]


@pytest.mark.parametrize(("structured", "asked", "data"), FATAL_REPLIES)
def test_replies_that_end_the_connection(structured: bool, asked: ev.Request, data: bytes) -> None:
    reader = replies(structured, asked)
    feed(reader, data)

    def read_on() -> None:
        while not isinstance(reader.next_event(), ev.NeedData):
            pass

    with pytest.raises(ProtocolError):
        read_on()


def test_an_unknown_error_chunk_is_an_error_of_that_request() -> None:
    reader = replies(True, READ)
    feed(reader, CHUNK + h("0001 8fff") + C + h("00000008 00000016 0000 1234"))
    assert reader.next_event() == ev.ErrorChunk(COOKIE, 22)


def test_data_land_where_they_were_asked_for_in_any_order() -> None:
    other = ev.Request(Cmd.READ, 0, 9, 0, 300_000)
    reader = ReplyReader(True)
    sink, large = bytearray(8), bytearray(b"?" * 300_000)
    reader.expect(READ, memoryview(sink))
    reader.expect(other, memoryview(large))
    content = bytes(range(250)) * 800
    stream: list[ev.Reply] = [
        ev.DataChunk(COOKIE, 104, b"5678", False),
        ev.DataChunk(9, 0, content, False),
        ev.DataChunk(COOKIE, 100, b"12", False),
        ev.HoleChunk(9, 200_000, 100_000, True),
        ev.DataChunk(COOKIE, 102, b"34", False),
        ev.NoneChunk(COOKIE),
    ]
    view = memoryview(b"".join(b"".join(encode_reply(reply)) for reply in stream))
    got: list[object] = []
    while len(got) < len(stream):
        event = reader.next_event()
        if isinstance(event, ev.NeedData):
            view = view[reader.feed(view[:70_000]) :]
        else:
            got.append(event)
    assert got == stream
    assert sink == b"12345678"
    assert large == content + bytes(100_000)


@given(st.binary(max_size=300), st.integers(0, 3))
def test_garbage_raises_nothing_but_protocol_errors(data: bytes, prefix: int) -> None:
    requests = RequestReader(300, 200)
    answers = replies(True, READ, ev.Request(Cmd.BLOCK_STATUS, 0, 0, 0, 4096))
    heads = (b"", MAGIC, SIMPLE, CHUNK + h("0001 0001") + C)
    for reader in (requests, answers):
        view = memoryview(heads[prefix] + data)
        try:
            while view:
                while not isinstance(reader.next_event(), ev.NeedData):
                    pass
                count = reader.feed(view)
                assert count
                view = view[count:]
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    ("text", "most", "sent"),
    [
        ("short", 256, b"short"),
        ("é" * 10, 7, "ééé".encode()),
        ("日本語", 8, "日本".encode()),
        ("x" * 9, 9, b"x" * 9),
        ("\udcff.raw", 256, b"\\udcff.raw"),
    ],
)
def test_an_error_text_is_cut_between_characters(text: str, most: int, sent: bytes) -> None:
    assert clipped(text, most) == sent
