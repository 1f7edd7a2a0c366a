# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The server of `forebay page`: who may ask, what is answered, and how often the daemon is asked for it."""

import json
import re
import threading
from typing import Any

import h11
import pytest
import trio
import trio.testing

from forebay.cli.main import build_parser
from forebay.errors import ForebayError
from forebay.http.connection import serve_connection
from forebay.page.asking import FRESH_SECONDS, MOST_DISKS, MOST_KEPT, Asking
from forebay.page.document import document, headers_for
from forebay.page.server import MOST_CONNECTIONS, Page, Server, listeners_on
from unit.control_fake import IMAGE, SUMMARY, disk

# ------------------------------------------------------------------------------------------------------------- requests


class Daemon:
    """Answers from memory, and counts what it is asked for."""

    def __init__(self, *disks: dict[str, Any]) -> None:
        self.disks = list(disks) or [disk("vm1")]
        self.asked: list[str] = []
        self.fault: ForebayError | None = None
        self.go = threading.Event()
        self.go.set()

    def get(self, target: str) -> Any:
        self.asked.append(target)
        assert self.go.wait(30)
        if self.fault is not None:
            raise self.fault
        found: dict[str, Any] = {"/summary": SUMMARY, "/disks": self.disks, "/images": [IMAGE]}
        return found.get(target, {"series": []})


Answered = tuple[int, dict[str, str], bytes]


async def asked(page: Page, *requests: bytes) -> list[Answered]:
    """What is answered to these requests, which come on one connection."""
    found = []
    ours, theirs = trio.testing.memory_stream_pair()
    client = h11.Connection(h11.CLIENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, page.answer)
        for request in requests:
            method, _, rest = request.partition(b" ")
            client.send(
                h11.Request(method=method, target=rest.split(b" ")[0], headers=[("host", "x")])
            )
            client.send(h11.EndOfMessage())
            await ours.send_all(request)
            body, event, status = b"", None, 0
            headers: dict[str, str] = {}
            while not isinstance(event, h11.EndOfMessage):
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(bytes(await ours.receive_some()))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    headers = {k.decode(): v.decode() for k, v in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
            found.append((status, headers, body))
            if client.our_state is h11.DONE:
                client.start_next_cycle()
        await ours.aclose()
    return found


def request(target: str, method: str = "GET", host: str = "127.0.0.1:9789") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


async def one(page: Page, *words: str) -> Answered:
    return (await asked(page, request(*words)))[0]


async def test_page_state_and_history_are_answered() -> None:
    page = Page(Daemon())
    first, now, history = await asked(
        page, *map(request, ("/", "/now", "/history?span=1h&disk=vm1"))
    )
    assert (first[0], first[1]["content-type"], first[2]) == (
        200,
        "text/html; charset=utf-8",
        document(),
    )
    told = json.loads(now[2])
    assert [row["name"] for row in told["disks"]] == ["vm1"]
    assert told["summary"]["state"] == SUMMARY["state"]
    assert json.loads(history[2]) == {"series": []}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("target", ["/", "/now", "/history"])
async def test_nothing_can_be_changed(method: str, target: str) -> None:
    daemon = Daemon()
    status, headers, _ = await one(Page(daemon), target, method)
    assert (status, headers["allow"], daemon.asked) == (405, "GET", [])


async def test_head_is_answered_without_a_body() -> None:
    status, headers, body = await one(Page(Daemon()), "/", "HEAD")
    assert (status, headers["content-length"], body) == (200, str(len(document())), b"")


@pytest.mark.parametrize(
    "target",
    [
        "/nothing",
        "/now/..",
        "/disks",
        "/control.sock",
        "/metrics",
        "/%2e%2e/etc/passwd",
        "//now",
        "/page.html",
    ],
)
async def test_there_is_nothing_else(target: str) -> None:
    assert (await one(Page(Daemon()), target))[0] == 404


@pytest.mark.parametrize(
    "target",
    [
        "/history?span=1y",
        "/history?disk=../x",
        "/history?disk=" + 100 * "a",
        "/now?find=" + 65 * "a",
    ],
)
async def test_what_makes_no_sense_does_not_reach_the_daemon(target: str) -> None:
    daemon = Daemon()
    status, _, body = await one(Page(daemon), target)
    assert (status, daemon.asked) == (400, [])
    assert "error" in json.loads(body)


# ----------------------------------------------------------------------------------------------------- who may look


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9789", 200),
        ("127.0.0.1", 200),
        ("localhost:9789", 200),
        ("LocalHost.:1", 200),
        ("[::1]:9789", 200),
        ("192.0.2.7:80", 200),
        ("hv1.example.org:9789", 200),
        ("HV1.example.org", 200),
        ("evil.test:9789", 421),
        ("evil.test", 421),
        ("127.0.0.1.evil.test:9789", 421),
        ("localhost.evil.test", 421),
        ("127.0.0.1:9789.evil.test", 421),
        ("::1", 421),
        ("[127.0.0.1]", 421),
        ("0x7f000001:9789", 421),
        ("", 421),
    ],
)
async def test_another_sites_name_that_leads_here_is_refused(host: str, status: int) -> None:
    for target in ("/", "/now", "/history"):
        found, headers, body = await one(Page(Daemon(), ["hv1.example.org"]), target, "GET", host)
        assert found == status
        assert "content-security-policy" in headers
        assert status == 200 or b"vm1" not in body


async def test_two_hosts_and_none_are_refused() -> None:
    page = Page(Daemon())
    for head in (
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.test\r\n\r\n",
    ):
        assert (await asked(page, head.encode()))[0][0] == 400
    assert (await asked(page, b"GET / HTTP/1.0\r\n\r\n"))[0][0] == 421


async def test_every_answer_says_that_a_browser_may_do_nothing_else_with_it() -> None:
    page = Page(Daemon())
    for words in (("/",), ("/now",), ("/nothing",), ("/", "POST"), ("/", "GET", "evil.test")):
        headers = (await one(page, *words))[1]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers


def test_the_rule_names_what_is_in_the_page_and_changes_with_it() -> None:
    page = document()
    assert page.count(b"<script>") == page.count(b"<style>") == 1
    other = page.replace(b"</script>", b";</script>")
    policies = [headers_for(one)["content-security-policy"] for one in (page, other)]
    assert policies[0] != policies[1]
    assert policies[0].count("'sha256-") == 2


def test_the_page_has_nothing_from_elsewhere_and_makes_no_html_of_text() -> None:
    text = document().decode()
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "style=",
    ):
        assert way not in text


# ------------------------------------------------------------------------------------------------ asking the daemon


async def test_many_who_look_ask_the_daemon_once(mock_clock: trio.testing.MockClock) -> None:
    daemon = Daemon()
    asking = Asking(daemon)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(asking.now, "")
            nursery.start_soon(asking.history, 3600, None)
    once = ["/disks", "/history", "/images", "/summary"]
    assert sorted(target.partition("?")[0] for target in daemon.asked) == once
    mock_clock.jump(FRESH_SECONDS + 1)
    await asking.now("vm")
    assert daemon.asked.count("/disks") == 2


async def test_a_daemon_that_is_gone_is_told_and_asked_again(
    mock_clock: trio.testing.MockClock,
) -> None:
    daemon = Daemon()
    page = Page(daemon)
    daemon.fault = ForebayError("no daemon at /run: start it")
    status, _, body = await one(page, "/now")
    assert (status, json.loads(body)) == (200, {"error": "no daemon at /run: start it"})
    daemon.fault = None
    mock_clock.jump(FRESH_SECONDS + 1)
    assert "error" not in json.loads((await one(page, "/now"))[2])


async def test_who_waits_is_answered_when_the_one_that_asked_hangs_up(
    mock_clock: trio.testing.MockClock,
) -> None:
    daemon = Daemon()
    asking = Asking(daemon)
    daemon.go.clear()
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def hang_up() -> None:
            with scope:
                await asking.now("")

        nursery.start_soon(hang_up)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(asking.now, "")
        await trio.testing.wait_all_tasks_blocked(0.01)
        scope.cancel()
        daemon.go.set()
    assert (await asking.now(""))["disk_count"] == 1


async def test_of_a_thousand_disks_those_that_need_a_look_come_first() -> None:
    disks = [disk(f"vm{n}") for n in range(1000)]
    disks[700] |= {"state": "conflict", "reason": "somebody else"}
    disks[800] |= {"lag_seconds": 7.0}
    told = await Asking(Daemon(*disks)).now("")
    assert (len(told["disks"]), told["disk_count"], told["troubled_count"]) == (MOST_DISKS, 1000, 1)
    assert [row["name"] for row in told["disks"][:2]] == ["vm700", "vm800"]
    assert [row["troubled"] for row in told["disks"][:2]] == [True, False]
    told = await Asking(Daemon(*disks)).now("vm99")
    assert {row["name"] for row in told["disks"]} == {"vm99", *(f"vm{n}" for n in range(990, 1000))}


async def test_a_bounded_number_of_answers_is_kept() -> None:
    asking = Asking(Daemon())
    for n in range(2 * MOST_KEPT):
        await asking.history(3600, f"vm{n}")
    assert len(asking._answers) == MOST_KEPT


# ------------------------------------------------------------------------------------------------------- connections


async def _is_answered(port: int) -> bool:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        try:
            await stream.send_all(request("/nothing"))
            return bool(await stream.receive_some())
        except trio.BrokenResourceError:
            return False


async def test_more_clients_than_there_may_be_are_hung_up_on() -> None:
    server = Server(Page(Daemon()))
    listeners = await listeners_on(("127.0.0.1", 0))
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.connection, listeners)
        streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(MOST_CONNECTIONS)]
        for stream in streams:
            await stream.send_all(request("/nothing"))
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 404")
        with trio.fail_after(30):
            async with await trio.open_tcp_stream("127.0.0.1", port) as late:
                assert await late.receive_some() == b""
            await streams.pop().aclose()
            while not await _is_answered(port):  # noqa: ASYNC110  (there is no event of it)
                await trio.sleep(0.01)
        for stream in streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_an_address_that_is_taken_is_told() -> None:
    listeners = await listeners_on(("127.0.0.1", 0))
    port = listeners[0].socket.getsockname()[1]
    with pytest.raises(
        ForebayError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use: choose"
    ):
        await listeners_on(("127.0.0.1", port))
    await listeners[0].aclose()


@pytest.mark.parametrize(
    "words",
    [
        ["--listen", "9789"],
        ["--listen", "localhost:9789"],
        ["--listen", "127.0.0.1:0"],
        ["--listen", "127.0.0.1:65536"],
        ["--name", "a:1"],
        ["--name", "root@a"],
        ["--name", "-x"],
    ],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser("page").parse_args(["page", *words])
    assert ended.value.code == 2
    assert "forebay page" in capsys.readouterr().err
