# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The handshake: one table of (state, event, bytes) for both readers and both writers, and what may not be said."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.handshake import (
    OPTION_ANSWERS,
    TRANSITIONS,
    ClientHandshake,
    LocalProtocolError,
    ServerHandshake,
    State,
)
from forebay_nbd.protocol.wire import Opt, ProtocolError, Rep

IHAVEOPT = b"IHAVEOPT"
REPLY = bytes.fromhex("0003e889045565a9")


def n16(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(2) for number in numbers)


def n32(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4) for number in numbers)


def n64(number: int) -> bytes:
    return number.to_bytes(8)


def option(number: int, data: bytes = b"") -> bytes:
    return IHAVEOPT + n32(number, len(data)) + data


def answer(number: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY + n32(number, kind, len(data)) + data


# What a client says: the state in which it may, the event, its bytes.
CLIENT_SAYS = [
    (State.GREETED, ev.ClientFlags(3), n32(3)),
    (State.GREETED, ev.ClientFlags(1), n32(1)),
    (State.GREETED, ev.ClientFlags(0), n32(0)),
    (State.OPTIONS, ev.ExportName("disk"), option(1, b"disk")),
    (State.OPTIONS, ev.ExportName(""), option(1)),
    (State.OPTIONS, ev.ExportName("x" * 4096), option(1, b"x" * 4096)),
    (State.OPTIONS, ev.Abort(), option(2)),
    (State.OPTIONS, ev.ListExports(), option(3)),
    (State.OPTIONS, ev.UnknownOption(4), option(4)),
    (State.OPTIONS, ev.StartTls(), option(5)),
    (State.OPTIONS, ev.InfoOption("d"), option(6, n32(1) + b"d" + n16(0))),
    (State.OPTIONS, ev.InfoOption("", (1, 2)), option(6, n32(0) + n16(2, 1, 2))),
    (State.OPTIONS, ev.GoOption("d", (3,)), option(7, n32(1) + b"d" + n16(1, 3))),
    (State.OPTIONS, ev.GoOption("é"), option(7, n32(2) + "é".encode() + n16(0))),
    (State.OPTIONS, ev.StructuredReplies(), option(8)),
    (State.OPTIONS, ev.ListContexts("d"), option(9, n32(1) + b"d" + n32(0))),
    (
        State.OPTIONS,
        ev.SetContexts("", ("base:allocation", "forebay:cached")),
        option(10, n32(0, 2, 15) + b"base:allocation" + n32(14) + b"forebay:cached"),
    ),
    (State.OPTIONS, ev.UnknownOption(11), option(11)),
    (State.OPTIONS, ev.UnknownOption(0xFFFFFFFF, b"data"), option(0xFFFFFFFF, b"data")),
]

# What a server says: the option under discussion, the event, its bytes.
SERVER_SAYS = [
    (None, ev.Greeting(3), b"NBDMAGIC" + IHAVEOPT + n16(3)),
    (ev.ListExports(), ev.ExportListed(3, "d"), answer(3, 2, n32(1) + b"d")),
    (ev.ListExports(), ev.ExportListed(3, "d", "why"), answer(3, 2, n32(1) + b"dwhy")),
    (ev.ListExports(), ev.Ack(3), answer(3, 1)),
    (ev.Abort(), ev.Ack(2), answer(2, 1)),
    (ev.GoOption("d"), ev.Ack(7), answer(7, 1)),
    (
        ev.GoOption("d"),
        ev.ExportInfo(7, 1 << 40, 0x0D),
        answer(7, 3, n16(0) + n64(1 << 40) + n16(13)),
    ),
    (ev.InfoOption("d"), ev.NameInfo(6, "d"), answer(6, 3, n16(1) + b"d")),
    (ev.InfoOption("d"), ev.OtherInfo(6, 2, b"text"), answer(6, 3, n16(2) + b"text")),
    (ev.InfoOption("d"), ev.OtherInfo(6, 77, b""), answer(6, 3, n16(77))),
    (
        ev.GoOption("d"),
        ev.BlockSizeInfo(7, 1, 4096, 1 << 25),
        answer(7, 3, n16(3) + n32(1, 4096, 1 << 25)),
    ),
    (
        ev.SetContexts("d", ("base:allocation",)),
        ev.ContextListed(10, 1, "base:allocation"),
        answer(10, 4, n32(1) + b"base:allocation"),
    ),
    (ev.StartTls(), ev.OptionError(5, Rep.ERR_POLICY, "no"), answer(5, 0x80000002, b"no")),
    (ev.UnknownOption(99), ev.OptionError(99, Rep.ERR_UNSUP), answer(99, 0x80000001)),
    (ev.ExportName("d"), ev.ExportBegins(512, 3, True), n64(512) + n16(3) + bytes(124)),
    (ev.ExportName("d"), ev.ExportBegins(512, 3, False), n64(512) + n16(3)),
]


def server(state: State, asked: ev.ClientOption | None = None) -> ServerHandshake:
    """A server's half in `state`, told of `asked`."""
    half = ServerHandshake()
    half.fixed = half.no_zeroes = True
    half.state = State.OPTIONS if asked else state
    if asked:
        client = ClientHandshake()
        client.state = State.OPTIONS
        half.receive(client.send(asked))
        assert half.next_event() == asked
    return half


def client(state: State, asked: ev.ClientOption | None = None) -> ClientHandshake:
    half = ClientHandshake()
    half.state = State.OPTIONS if asked else state
    half.no_zeroes = True
    if asked:
        half.send(asked)
    return half


def ids(row: object) -> str:
    return type(row).__name__ if not isinstance(row, bytes | State) else ""


TRAILING = b"what comes next"


@pytest.mark.parametrize(("state", "event", "data"), CLIENT_SAYS, ids=ids)
def test_what_a_client_says(state: State, event: ev.ClientOption, data: bytes) -> None:
    assert client(state).send(event) == data

    whole = server(state)
    whole.receive(data)
    assert whole.next_event() == event
    assert whole.state is TRANSITIONS[state, type(event)]

    slowly = server(state)
    for index in range(len(data)):
        assert slowly.next_event() is ev.NEED_DATA
        slowly.receive(data[index : index + 1])
    assert slowly.next_event() == event

    more = server(state)
    more.receive(data + TRAILING)
    assert more.next_event() == event
    assert more.trailing() == TRAILING


@pytest.mark.parametrize(("asked", "event", "data"), SERVER_SAYS, ids=ids)
def test_what_a_server_says(asked: ev.ClientOption | None, event: Any, data: bytes) -> None:
    def listener() -> ClientHandshake:
        half = client(State.START, asked)
        half.no_zeroes = not (isinstance(event, ev.ExportBegins) and event.zeroes)
        return half

    speaker = server(State.START, asked)
    assert speaker.send(event) == data

    whole = listener()
    whole.receive(data)
    assert whole.next_event() == event
    assert whole.state is speaker.state

    slowly = listener()
    for index in range(len(data)):
        assert slowly.next_event() is ev.NEED_DATA
        slowly.receive(data[index : index + 1])
    assert slowly.next_event() == event

    more = listener()
    more.receive(data + TRAILING)
    assert more.next_event() == event
    assert more.trailing() == TRAILING


def test_go_and_abort_end_the_handshake() -> None:
    for asked, after in (
        (ev.GoOption("d"), State.TRANSMISSION),
        (ev.Abort(), State.CLOSED),
        (ev.InfoOption("d"), State.OPTIONS),
    ):
        half = server(State.OPTIONS, asked)
        half.send(ev.Ack(2))
        assert half.state is after


def test_a_refused_go_goes_on() -> None:
    half = server(State.OPTIONS, ev.GoOption("d"))
    half.send(ev.OptionError(7, Rep.ERR_UNKNOWN))
    assert half.state is State.OPTIONS


# Known options whose data make no sense: answered, and the stream goes on behind them.
BAD_OPTIONS = [
    option(3, b"x"),  # LIST with data
    option(5, b"x"),
    option(8, b"x"),
    option(6, b""),
    option(6, n32(5) + b"d" + n16(0)),  # name longer than the data
    option(6, n32(0xFFFFFFFF) + b"d"),  # CVE-2022-26495
    option(7, n32(0xFFFFFFFF)),
    option(7, n32(1) + b"d" + n16(2, 3)),  # fewer requests than announced
    option(7, n32(1) + b"d" + n16(0) + b"x"),
    option(7, n32(2) + b"\xff\xfe" + n16(0)),  # not UTF-8
    option(7, n32(2) + b"a\0" + n16(0)),
    option(7, n32(4097) + b"x" * 4097 + n16(0)),
    option(9, n32(1) + b"d"),
    option(10, n32(1) + b"d" + n32(1, 99) + b"base:"),
    option(10, n32(1) + b"d" + n32(2, 5) + b"base:"),
    option(10, n32(0, 0xFFFFFFFF)),
]


@pytest.mark.parametrize("data", BAD_OPTIONS)
def test_a_bad_option_is_answered_and_the_next_one_read(data: bytes) -> None:
    half = server(State.OPTIONS)
    half.receive(data + option(2))
    bad = half.next_event()
    assert isinstance(bad, ev.BadOption)
    half.send(ev.OptionError(bad.option, bad.reply, bad.reason))
    assert half.next_event() == ev.Abort()


def test_too_many_queries_are_too_big() -> None:
    half = server(State.OPTIONS)
    queries = b"".join(n32(5) + b"base:" for _ in range(33))
    half.receive(option(10, n32(0, 33) + queries))
    event = half.next_event()
    assert isinstance(event, ev.BadOption)
    assert event.reply == Rep.ERR_TOO_BIG


FATAL_TO_SERVER = [
    (State.GREETED, n32(4)),  # a flag we do not know
    (State.GREETED, n32(0xFFFFFFFF)),
    (State.OPTIONS, b"IHAVEOPX" + n32(7, 0)),
    (State.OPTIONS, IHAVEOPT + n32(7, 0xFFFFFFFF)),  # CVE-2017-15119
    (State.OPTIONS, IHAVEOPT + n32(99, 8193)),
    (State.OPTIONS, option(1, b"x" * 4097)),  # CVE-2017-15118
    (State.OPTIONS, option(1, b"a\0b")),
    (State.OPTIONS, option(1, b"\xff")),
]


@pytest.mark.parametrize(("state", "data"), FATAL_TO_SERVER)
def test_what_ends_a_client(state: State, data: bytes) -> None:
    half = server(state)
    half.receive(data)
    with pytest.raises(ProtocolError):
        half.next_event()


def test_a_client_without_fixed_newstyle_may_only_name_an_export() -> None:
    half = server(State.OPTIONS)
    half.fixed = False
    half.receive(option(3))
    with pytest.raises(ProtocolError):
        half.next_event()


FATAL_TO_CLIENT = [
    (None, b"SSH-2.0-"),
    (None, b"NBDMAGICnonsense"),
    (None, b"NBDMAGIC" + bytes.fromhex("00420281861253") + b"0"),
    (None, b"NBDMAGIC" + bytes.fromhex("0000420281861253")),  # oldstyle
    (ev.ListExports(), b"\0" * 20),
    (ev.ListExports(), answer(4, 1)),  # the answer to another option
    (ev.ListExports(), answer(3, 99)),
    (ev.ListExports(), answer(3, 1, b"data")),
    (ev.ListExports(), answer(3, 2, n32(9) + b"d")),
    (ev.ListExports(), REPLY + n32(3, 2, 0xFFFFFFFF)),
    (ev.GoOption("d"), answer(7, 3, n16(0) + n64(1))),
    (ev.GoOption("d"), answer(7, 3, n16(3) + n32(1, 2, 3, 4))),
    (ev.GoOption("d"), answer(7, 3)),
]


@pytest.mark.parametrize(("asked", "data"), FATAL_TO_CLIENT)
def test_what_ends_a_server(asked: ev.ClientOption | None, data: bytes) -> None:
    half = client(State.START, asked)
    half.receive(data)
    with pytest.raises(ProtocolError):
        half.next_event()


def test_talking_out_of_turn_is_our_own_fault() -> None:
    for half, event in (
        (server(State.OPTIONS), ev.Ack(1)),
        (server(State.START), ev.Ack(1)),
        (server(State.OPTIONS, ev.ListExports()), ev.ExportBegins(1, 1)),
        (server(State.GREETED), ev.Greeting(3)),
        (client(State.START), ev.ClientFlags(3)),
        (client(State.ANSWER), ev.ListExports()),
        (client(State.TRANSMISSION), ev.Abort()),
    ):
        with pytest.raises(LocalProtocolError):
            half.send(event)  # type: ignore[arg-type]


def test_strings_the_protocol_cannot_carry() -> None:
    for name in ("x" * 4097, "a\0b"):
        with pytest.raises(ValueError, match="4096"):
            client(State.OPTIONS).send(ev.GoOption(name))


@given(st.binary(max_size=200), st.integers(0, 5))
def test_garbage_raises_nothing_but_protocol_errors(data: bytes, magic: int) -> None:
    prefixes = (b"", n32(3), n32(3) + IHAVEOPT, n32(3) + IHAVEOPT + n32(magic), b"NBDMAGIC", REPLY)
    for half in (server(State.GREETED), client(State.START), client(State.START, ev.GoOption(""))):
        half.receive(prefixes[magic] + data)
        try:
            while not isinstance(event := half.next_event(), ev.NeedData):
                if isinstance(half, ServerHandshake) and half.state in OPTION_ANSWERS:
                    half.send(ev.OptionError(0, Rep.ERR_UNSUP))
                if half.state is State.ANSWER_EXPORT_NAME and isinstance(half, ServerHandshake):
                    half.send(ev.ExportBegins(1, 1))
                if isinstance(half, ClientHandshake) and half.state is State.OPTIONS:
                    half.send(ev.ListExports())
                assert event is not None
        except ProtocolError:
            pass


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    page = Path(__file__).resolve().parents[2] / "nbd" / "README.md"
    _, _, section = page.read_text().partition("### The states of a handshake\n")
    rows = [
        line.strip("| ").split(" | ")
        for line in section.split("\n#")[0].splitlines()
        if "`" in line
    ]
    documented = {
        (state, event): following
        for state, events, following in (row for row in rows if len(row) == 3)
        for event in events.replace("`", "").split(", ")
    }
    assert documented == {
        (state.value, event.__name__): following.value
        for (state, event), following in TRANSITIONS.items()
    }


def test_every_option_has_a_row() -> None:
    covered = {
        int.from_bytes(data[8:12]) for state, _, data in CLIENT_SAYS if state is State.OPTIONS
    }
    assert covered >= {int(number) for number in Opt}
