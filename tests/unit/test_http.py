# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""HTTP on a stream, whatever a client sends, and however it cuts that."""

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.http import connection
from forebay.http.connection import serve_connection
from forebay.http.messages import Exchange, JSONResponse, Request, Response
from forebay.http.routing import Route, Router

Client = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


async def echo(request: Request) -> Response:
    body = await request.body(1 << 16)
    told = {"query": request.query_params, "path": request.path_params, "body": body.decode()}
    return JSONResponse(told)


async def hello(_: Request) -> Response:
    return Response(b"hello", media_type="text/plain")


class Waits:
    """An answer in two parts, that ends with the client."""

    def __init__(self) -> None:
        self.is_over = False

    async def send(self, exchange: Exchange) -> None:
        await exchange.start(200, {})
        await exchange.write(b"begun")
        await exchange.hung_up()
        self.is_over = True


WAITS = Waits()


async def waits(_: Request) -> Waits:
    return WAITS


ROUTER = Router(
    [
        Route("GET", "/", hello),
        Route("POST", "/echo/{name}", echo),
        Route("GET", "/{name}.x", echo),
        Route("GET", "/wait", waits),
    ]
)


@asynccontextmanager
async def served() -> AsyncIterator[Client]:
    """A client of the routes, whose connection ends with the body."""
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_connection(server, ROUTER.answer)
            await server.aclose()

        nursery.start_soon(serve)
        yield client
        await client.aclose()


async def rest(client: Client) -> bytes:
    return b"".join([part async for part in client])


async def said(raw: bytes) -> bytes:
    """All that comes back for that, then the end of what the client sends."""
    async with served() as client:
        await client.send_all(raw)
        await client.send_eof()
        return await rest(client)


async def test_one_request_after_the_other_on_one_connection_however_they_come() -> None:
    post = b"POST /echo/a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    chunked = (
        b"POST /echo/b?x=1&y=%20&x=2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\nde\r\n1\r\nf\r\n0\r\n\r\n"
    )
    last = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    whole = post + chunked + last
    for size in (1, 7, len(whole)):
        async with served() as client:
            for at in range(0, len(whole), size):
                await client.send_all(whole[at : at + size])
            got = await rest(client)
        assert got.count(b"HTTP/1.1 200") == 3
        assert b'{"query":{},"path":{"name":"a"},"body":"abc"}' in got
        assert b'{"query":{"x":"2","y":" "},"path":{"name":"b"},"body":"def"}' in got
        assert got.endswith(b"\r\n\r\nhello")


async def test_head_is_get_without_the_body() -> None:
    got = await said(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert got.count(b"content-length: 5") == 2
    assert got.count(b"hello") == 1


async def test_what_is_no_request_is_refused_after_a_head_too() -> None:
    got = await said(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\nno request\r\n\r\n")
    assert b"HTTP/1.1 400 " in got
    assert got.endswith(b'"}')


async def test_an_answer_of_unknown_length_has_an_end_for_old_clients_too() -> None:
    assert (await said(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")).endswith(b"\r\n0\r\n\r\n")
    assert (await said(b"GET /wait HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\nbegun")


async def test_a_client_that_asks_whether_to_go_on_is_told() -> None:
    async with served() as client:
        head = (
            b"POST /echo/a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"
        )
        await client.send_all(head)
        assert (await client.receive_some()).startswith(b"HTTP/1.1 100")
        await client.send_all(b"z")
        assert b"200" in await client.receive_some()


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"\x00\xff" * 20 + b"\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /" + b"a" * connection.MOST_HEAD + b" HTTP/1.1\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 4000, 431),
        (b"GET /?" + b"a=1&" * 200 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST /echo/a HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /echo/a HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n" + b"a" * 70000, 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /nothing%0a%1b[2J HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /a%0ab.x HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /a/b.x HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /abx HTTP/1.1\r\nHost: x\r\n\r\n", 404),  # a dot is a dot
    ],
)
async def test_what_is_no_request_is_refused_in_one_line_and_heard(raw: bytes, status: int) -> None:
    got = await said(raw)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\ndate: " in head
    if status != 200:
        assert json.loads(body).keys() == {"error"}
        assert json.loads(body)["error"].isprintable()
    if status == 405:
        assert b"\r\nallow: GET\r\n" in head + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"POST /echo/a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab", b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 "),
    ],
)
async def test_a_client_that_sends_no_more_is_let_go(
    sent: bytes, answered: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with served() as client:
        await client.send_all(sent)
        got = await rest(client)
    assert got.startswith(answered)
    assert bool(got) == bool(answered)
    assert trio.current_time() <= connection.REQUEST_SECONDS + connection.LEFT_SECONDS + 1


async def send_much(client: Client) -> None:
    for _ in range(100_000):
        await client.send_all(b"a" * 10)
        await trio.lowlevel.checkpoint()


async def test_a_body_that_nobody_wants_is_read_within_bounds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with mock.patch.object(connection, "MOST_LEFT", 100):
        async with served() as client:
            await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
            async with trio.open_nursery() as nursery:

                async def send_for_ever() -> None:
                    with pytest.raises(trio.BrokenResourceError):
                        await send_much(client)

                nursery.start_soon(send_for_ever)
                assert b"405" in await rest(client)


async def test_who_sends_much_before_an_answer_is_taken_for_gone() -> None:
    WAITS.is_over = False
    async with served() as client:
        await client.send_all(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.send_all(b"a" * (connection.MOST_AHEAD + 1))
        await trio.testing.wait_all_tasks_blocked()
        assert WAITS.is_over


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n", b"\0", b"POST /echo/a HTTP/1.1\r\n",
                                 b"Content-Length: 2\r\n", b"Host: x\r\n", b"Transfer-Encoding: chunked\r\n", b"ab",
                                 b"0\r\n\r\n", b"2\r\n"]) | st.binary(max_size=20), max_size=12))  # fmt: skip
def test_no_input_is_a_fault(parts: list[bytes]) -> None:
    async def ends() -> None:
        got = await said(b"".join(parts))
        assert not got or got.startswith(b"HTTP/1.1 ")

    trio.run(ends, clock=trio.testing.MockClock(autojump_threshold=0.01))


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl_on_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    listener = trio.SocketListener(sock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.serve_listeners, lambda stream: serve_connection(stream, ROUTER.answer), [listener]
        )
        big = "x" * 60000  # curl asks first for some sizes
        command = [
            "curl",
            "-sS",
            "--unix-socket",
            str(path),
            "http://x/",
            "-d",
            big,
            "http://x/echo/q",
        ]
        run = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
        assert b'"error":"no POST / here' in run.stdout
        assert run.stdout.endswith(json.dumps(big).encode() + b"}")
        nursery.cancel_scope.cancel()
