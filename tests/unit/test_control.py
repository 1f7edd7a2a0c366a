# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import json
import os
import re
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from forebay.control.arguments import LONGEST_BODY, MOST_PEERS
from forebay.control.server import serve_control
from forebay.doors.tenant import Rule
from forebay.errors import ForebayError
from forebay.staging.orders import MOST_ORDERS
from forebay.units import MIB, Mode
from unit.control_fake import (
    CACHE,
    GATEWAY,
    IMAGE,
    OTHER_STORE,
    OVERLAY,
    SNAPSHOT,
    STORE,
    FakeGateway,
    disk,
    served,
)

ROOT = Path(__file__).resolve().parents[2]


class Answer:
    """What came back: status, headers, body."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = dict(line.lower().split(": ", 1) for line in rest)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]


async def read_all(stream: trio.SocketStream) -> bytes:
    return b"".join([part async for part in stream])


@asynccontextmanager
async def asked(run: Path, request: str, body: bytes = b"") -> AsyncIterator[trio.SocketStream]:
    head = f"{request} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    async with await trio.open_unix_socket(str(run / "control.sock")) as stream:
        await stream.send_all(head.encode() + body)
        yield stream


async def ask(run: Path, request: str, content: Any = None) -> Answer:
    body = b"" if content is None else json.dumps(content).encode()
    async with asked(run, request, body) as stream:
        return Answer(await read_all(stream))


# ------------------------------------------------------------------------------------ the routes


async def test_what_is_asked_is_answered() -> None:
    gateway = FakeGateway("a", "b")
    async with served(gateway) as run:
        assert (await ask(run, "GET /disks")).json == [disk("a"), disk("b")]
        assert (await ask(run, "GET /disks/b")).json == disk("b")
        assert (await ask(run, "GET /cache")).json == CACHE
        assert GATEWAY.items() <= (await ask(run, "GET /gateway")).json.items()
        index = (await ask(run, "GET /")).json
        assert "POST /disks/{name}/flush" in index["routes"]
        metrics = await ask(run, "GET /metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert b'forebay_dirty_bytes{disk="a"} 0\n' in metrics.body


async def test_attach_hands_checked_values_on() -> None:
    gateway = FakeGateway()
    async with served(gateway) as run:
        content = {
            "name": "vm1",
            "image": "images:a.raw",
            "mode": "wb",
            "cache_size": "1G",
            "preload": "trace",
            "iops": 500,
            "bps_burst": "1M",
            "overlay": True,
            "peer": "label",
            "peer_label": "libvirt-1",
            "peer_user": 107,
        }
        answer = await ask(run, "POST /disks", content)
        assert (answer.status, answer.json["mode"]) == (201, "write-back")
        plain = {"name": "vm2", "image": "x", "mode": None, "cache_size": None}
        assert (await ask(run, "POST /disks", plain)).status == 201
    settings = {"mode": Mode.WRITE_BACK, "cache_size": 1 << 30, "preload": "trace"}
    nothing = dict.fromkeys(settings) | {"rates": {}}
    settings |= {"rates": {"iops": 500, "bps_burst": 1 << 20}}
    flags = {"read_only": False, "overlay": False, "rule": Rule(), "gives_way": False}
    flags |= {"image_format": None, "keep": False, "incoming": False, "with_data": False}
    flags |= {"patience": 30.0}
    rule = Rule("label", "libvirt-1", 107)
    assert gateway.calls == [
        ("attach", "vm1", "images:a.raw", settings | flags | {"overlay": True, "rule": rule}),
        ("attach", "vm2", "x", nothing | flags),
    ]


async def test_stores_are_told_of() -> None:
    async with served(FakeGateway()) as run:
        assert (await ask(run, "GET /stores")).json == [STORE, OTHER_STORE]


async def test_what_is_done_with_overlays_is_handed_on() -> None:
    gateway = FakeGateway("web")
    async with served(gateway) as run:
        assert (await ask(run, "GET /overlays")).json == [OVERLAY]
        path = "/overlays/web"
        assert (await ask(run, f"GET {path}/snapshots")).json == [SNAPSHOT]
        named = {"snapshot": "monday"}
        assert (await ask(run, f"POST {path}/snapshots", named)).status == 201
        assert (await ask(run, f"POST {path}/snapshots", {"snapshot": "../x"})).status == 400
        assert (await ask(run, f"POST {path}/snapshots")).status == 400
        back = named | {"drop_newer": True}
        assert (await ask(run, f"POST {path}/rollback", back)).json == OVERLAY
        assert (await ask(run, f"POST {path}/drop", named)).lines[-1]["result"] == OVERLAY
        assert (await ask(run, f"POST {path}/revert", {"yes": True})).json["freed_bytes"] == 1 << 20
        assert (await ask(run, f"POST {path}/commit")).lines[-1]["result"] == OVERLAY
        wanted = {"to": "images:b", "format": "qcow2", "snapshot": "monday"}
        assert (await ask(run, "POST /disks/web/save", wanted)).status == 200
        assert (await ask(run, "POST /disks/web/save", wanted | {"format": "vmdk"})).status == 400
    assert gateway.calls == [
        ("overlays",),
        ("snapshots", "web"),
        ("snapshot", "web", "monday"),
        ("rollback", "web", "monday", {"drop_newer": True, "force": False}),
        ("drop", "web", "monday"),
        ("revert", "web", {"sure": True, "force": False}),
        ("commit", "web"),
        ("save", "web", "images:b", {"partial": False, "form": "qcow2", "snapshot": "monday"}),
    ]


async def test_what_is_done_with_images_is_handed_on() -> None:
    gateway = FakeGateway()
    async with served(gateway) as run:
        assert (await ask(run, "GET /images")).json == [IMAGE]
        assert (await ask(run, "GET /images?store=images")).json == [IMAGE]
        warm = {"image": "images:a.raw", "amount": "1G", "rate": "10M"}
        lines = (await ask(run, "POST /images/warm", warm)).lines
        assert lines[-1]["result"]["cached_bytes"] == 1 << 30
        assert (await ask(run, "POST /images/warm", {"image": "x"})).status == 200
        for word in ("tag", "untag"):
            content = {"image": "x", "tags": ["a", "b"]}
            assert (await ask(run, f"POST /images/{word}", content)).status == 200
        assert (await ask(run, "POST /images/pin", {"image": "x"})).json["pinned"]
        assert not (await ask(run, "POST /images/unpin", {"image": "x"})).json["pinned"]
        purge = {"images": ["x"], "tag": "a", "older_than": "30d", "dry_run": True}
        purge |= {"traces": True}
        assert (await ask(run, "POST /images/purge", purge)).json["freed_bytes"] == 3 << 20
    which = {"tag": "a", "older_than": 30 * 86400.0, "dry_run": True, "traces": True}
    assert gateway.calls == [
        ("images", None),
        ("images", "images"),
        ("warm", "images:a.raw", 1 << 30, 10 << 20),
        ("warm", "x", "all", None),
        ("tag", "x", ["a", "b"]),
        ("untag", "x", ["a", "b"]),
        ("pin", "x"),
        ("unpin", "x"),
        ("purge", ["x"], which),
    ]


async def test_as_many_hosts_and_images_are_staged_as_may_be_whatever_they_are_called() -> None:
    gateway = FakeGateway("a")
    peers = [f"{n}".rjust(253, "h") for n in range(MOST_PEERS)]
    row = {"state": "failed", "reason": "r" * 1000, "down": 0, "up": 0, "connected": 0}
    rows = [row | {"image": f"images:{n}".ljust(4000, "i")} for n in range(MOST_ORDERS)]
    async with served(gateway) as run:
        order = await ask(run, "POST /stages", {"image": "images:a", "peers": peers})
        report = await ask(run, "POST /stages/report", {"stages": rows})
    assert (order.status, report.status) == (200, 200)


@pytest.mark.parametrize("count", [0, 1, 2500])
async def test_what_an_image_lacks_is_told_in_slices_and_is_one_object(count: int) -> None:
    gateway = FakeGateway("a")
    gateway.staging.lacks = [[2 * n, 1] for n in range(count)]
    async with served(gateway) as run:
        told = (await ask(run, "GET /stages/lacking?image=images:a")).json
    assert told == {"image": "images:a", "pieces": 9, "lacking": gateway.staging.lacks}


async def test_who_may_use_a_disk_is_handed_on() -> None:
    gateway = FakeGateway("a")
    async with served(gateway) as run:
        content = {"peer": None, "peer_label": "libvirt-1", "peer_user": 0, "evict": True}
        assert (await ask(run, "POST /disks/a/peer", content)).status == 200
        assert (await ask(run, "POST /disks/a/peer", {"peer": "any"})).status == 200
    assert gateway.calls == [
        ("peer", "a", Rule(None, "libvirt-1", 0), True),
        ("peer", "a", Rule("any"), False),
    ]


async def test_a_disk_that_leaves_its_mode_during_a_flush_is_no_negative_figure() -> None:
    gateway = FakeGateway("a")
    gateway.disks["a"]["mode"] = "write-back"
    gateway.finish = finish = trio.Event()
    async with served(gateway) as run, trio.open_nursery() as nursery:

        async def leave() -> None:
            await gateway.began.wait()
            gateway.disks["a"]["mode"] = "write-through"
            finish.set()

        nursery.start_soon(leave)
        answer = await ask(run, "POST /disks/a/flush", {})
        assert answer.lines[-1]["result"]["written_back_bytes"] == 0


async def test_work_tells_how_far_it_is_and_what_came_of_it() -> None:
    gateway = FakeGateway("a", "b")
    gateway.steps = 3
    async with served(gateway) as run:
        answer = await ask(run, "POST /disks/a/flush", {"timeout": "2m"})
        assert answer.headers["content-type"] == "application/x-ndjson"
        *progress, result = answer.lines
        assert result == {
            "result": {"names": ["a"], "written_back_bytes": 0, "dirty_bytes": 0, "not_served": []}
        }
        assert all(line["total"] == 3 * MIB and line["done"] < 3 * MIB for line in progress)
        assert (await ask(run, "POST /disks/a/mode", {"mode": "none"})).lines[-1] == {
            "result": disk("a", mode="none")
        }
        assert (await ask(run, "POST /disks/b/preload", {"amount": "1M"})).lines[-1] == {
            "result": disk("b")
        }
        both = {
            "result": {
                "names": ["a", "b"],
                "written_back_bytes": 0,
                "dirty_bytes": 0,
                "not_served": [],
            }
        }
        assert (await ask(run, "POST /flush")).lines[-1] == both
        assert (await ask(run, "POST /flush", {"names": ["a", "b"]})).lines[-1] == both
        assert (await ask(run, "POST /cache/scrub")).lines[-1]["result"]["damage"] == []
        assert (await ask(run, "POST /cache/repair")).lines[-1]["result"]["damage"] == []
        detached = await ask(run, "DELETE /disks/a?discard=1&force=false")
        assert detached.lines[-1] == {"result": {"name": "a"}}
    assert gateway.calls == [
        ("flush", ["a"], 120.0),
        ("mode", "a", Mode.NONE),
        ("preload", "b", MIB),
        ("flush", None, None),
        ("flush", ["a", "b"], None),
        ("scrub",),
        ("repair",),
        ("detach", "a", True, False),
    ]


async def test_progress_comes_while_the_work_goes_on() -> None:
    gateway = FakeGateway("a")
    gateway.steps, gateway.finish = 1, trio.Event()
    async with served(gateway) as run, asked(run, "POST /flush") as stream:
        seen = b""
        while b'"done"' not in seen:
            seen += await stream.receive_some()
        assert not gateway.ended.is_set()
        gateway.finish.set()
        assert b'"result"' in await read_all(stream)


async def test_failure_after_progress_is_the_last_line() -> None:
    gateway = FakeGateway("a")
    gateway.steps, gateway.finish = 1, trio.Event()
    async with served(gateway) as run, asked(run, "POST /flush") as stream:
        seen = b""
        while b'"done"' not in seen:
            seen += await stream.receive_some()
        gateway.fail = ForebayError("the image does not answer: look at the NFS server")
        gateway.finish.set()
        answer = Answer(seen + await read_all(stream))
    assert answer.status == 200
    assert answer.lines[-1] == {"error": "the image does not answer: look at the NFS server"}


async def test_readme_has_every_route() -> None:
    table = (ROOT / "gateway" / "README.md").read_text()
    documented = re.findall(r"(?m)^\| `([A-Z]+ /[^`]*)` \|", table)
    async with served(FakeGateway()) as run:
        assert sorted(documented) == sorted((await ask(run, "GET /")).json["routes"])


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("request_line", "content", "status", "said"),
    [
        ("GET /nowhere", None, 404, "no GET /nowhere here: GET / lists the routes"),
        ("PUT /disks", None, 405, "no PUT /disks here"),
        ("GET /disks/b", None, 404, "no disk 'b': see 'forebay status'"),
        ("GET /disks/a%2Fb", None, 404, "no GET /disks/a/b here"),
        ("DELETE /disks/b", None, 404, "no disk 'b'"),
        ("POST /disks/b/flush", None, 404, "no disk 'b'"),
        ("POST /disks", [], 400, "not a JSON object"),
        ("POST /disks", "name", 400, "not a JSON object"),
        ("POST /disks", {"name": "c"}, 400, "image: is required"),
        ("POST /disks", {"name": "../c", "image": "i"}, 400, "name: '../c' is not a name"),
        ("POST /disks", {"name": 5, "image": "i"}, 400, "name: 5 is not a name"),
        ("POST /disks", {"name": "c", "image": ""}, 400, "image: '' is not text"),
        ("POST /disks", {"name": "c", "image": "i", "mod": 1}, 400, "mod: unknown (did you mean"),
        ("POST /disks", {"name": "c", "image": "i", "mode": 1}, 400, "mode: 1 is not a mode"),
        ("POST /disks", {"name": "c", "image": "i", "cache_size": -1}, 400, "cache_size: '-1' is"),
        (
            "POST /disks",
            {"name": "c", "image": "i", "iops": True},
            400,
            "iops: 'True' is no number",
        ),
        ("POST /disks", {"name": "c", "image": "i", "bps": "1K"}, 400, "bps: '1K' is too slow"),
        ("POST /disks", {"name": "c", "image": "i", "overlay": "x"}, 400, "overlay: 'x' is neith"),
        ("POST /disks", {"name": "c", "image": "i", "peer": "all"}, 400, "peer: 'all' is unknown"),
        ("POST /disks", {"name": "c", "image": "i", "peer": ["any"]}, 400, "peer: ['any'] is unkn"),
        ("POST /disks/b/peer", {"peer": "any"}, 404, "no disk 'b'"),
        ("POST /disks/a/peer", {"peer_label": ""}, 400, "peer_label: not the label"),
        ("POST /disks/a/peer", {"peer_label": "a" * 513}, 400, "peer_label: not the label"),
        ("POST /disks/a/peer", {"peer_label": "\x1b[2J"}, 400, "peer_label: not the label"),
        ("POST /disks/a/peer", {"peer_label": 7}, 400, "peer_label: not the label"),
        ("POST /disks/a/peer", {"peer_user": -1}, 400, "peer_user: not the number of a user"),
        ("POST /disks/a/peer", {"peer_user": (1 << 32) - 1}, 400, "peer_user: not the number"),
        ("POST /disks/a/peer", {"peer_user": True}, 400, "peer_user: not the number of a user"),
        ("POST /disks/a/peer", {"peer_user": "0"}, 400, "peer_user: not the number of a user"),
        ("POST /disks", {"name": "a", "image": "else"}, 409, "'a' is attached already: detach it"),
        ("DELETE /disks/a?forse=1", None, 400, "forse: unknown (did you mean 'force'?)"),
        ("POST /disks/a/mode", {}, 400, "mode: is required"),
        ("POST /disks/a/mode", {"mode": "fast"}, 400, "mode: 'fast' is not a mode"),
        ("POST /disks/a/resolve", {}, 400, "keep: is required"),
        ("POST /disks/a/resolve", {"keep": "both"}, 400, "keep: 'both' is neither mine nor image"),
        ("POST /disks/a/save", {}, 400, "to: is required"),
        ("POST /disks/nobody/save", {"to": "images:b.raw"}, 404, "no disk 'nobody'"),
        ("POST /disks/a/preload", {"amount": "x"}, 400, "amount: 'x' is not a size"),
        ("POST /flush", {"timeout": "soon"}, 400, "timeout: 'soon' is not a duration"),
        ("POST /flush", {"names": "a"}, 400, "names: 'a' is not a list of names"),
        ("POST /flush", {"names": ["a", "/"]}, 400, "names: '/' is not a name"),
        ("POST /disks", {"name": "c" * LONGEST_BODY}, 413, "the request is too long"),
    ],
)
async def test_wrong_request_is_refused_in_one_line(
    request_line: str, content: Any, status: int, said: str
) -> None:
    gateway = FakeGateway("a")
    async with served(gateway) as run:
        answer = await ask(run, request_line, content)
    assert answer.status == status
    assert answer.json.keys() == {"error"}
    assert answer.json["error"].startswith(said) or said in answer.json["error"]
    assert "\n" not in answer.json["error"]
    assert gateway.calls in ([], [("attach", "a", "else", gateway.calls and gateway.calls[0][3])])


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (ForebayError("the image is gone: restore it"), 409, "the image is gone: restore it"),
        (OSError(5, "Input/output error"), 500, "Input/output error; the daemon's log says more"),
        (TimeoutError(), 500, "TimeoutError; the daemon's log says more"),
        (OSError(28, "No space left"), 500, "No space left; make room there, and try again"),
    ],
)
@pytest.mark.parametrize("request_line", ["GET /cache", "POST /flush", "GET /metrics"])
async def test_failure_has_a_status(
    request_line: str, fault: Exception, status: int, said: str
) -> None:
    gateway = FakeGateway("a")
    gateway.fail = fault
    async with served(gateway) as run:
        answer = await ask(run, request_line)
    assert (answer.status, answer.json) == (status, {"error": said})


@pytest.mark.expect_log("control API: ZeroDivisionError")
@pytest.mark.parametrize("request_line", ["GET /cache", "POST /flush"])
async def test_fault_of_our_own_is_logged_and_survived(
    request_line: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = FakeGateway("a")
    gateway.fail = ZeroDivisionError("division by zero")
    async with served(gateway) as run:
        answer = await ask(run, request_line)
        assert (answer.status, "ZeroDivisionError" in answer.json["error"]) == (500, True)
        gateway.fail = None
        assert (await ask(run, request_line)).status == 200
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize("garbage", [b"\0" * 100, b"GET", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 9])
async def test_garbage_hurts_only_its_own_connection(garbage: bytes) -> None:
    async with served(FakeGateway("a")) as run:
        async with await trio.open_unix_socket(str(run / "control.sock")) as stream:
            await stream.send_all(garbage)
            assert (await ask(run, "GET /disks/a")).status == 200
        assert (await ask(run, "GET /disks/a")).status == 200


@pytest.mark.parametrize(
    "sent", [b"Transfer-Encoding: chunked\r\n\r\nno number\r\n", b"Content-Length: 5\r\n\r\nab"]
)
async def test_a_body_that_is_none_is_refused_and_no_fault_of_ours(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        served(FakeGateway("a")) as run,
        await trio.open_unix_socket(str(run / "control.sock")) as stream,
    ):
        await stream.send_all(b"POST /flush HTTP/1.1\r\nHost: x\r\n" + sent)
        await stream.send_eof()
        head, _, body = (await read_all(stream)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"].startswith("no HTTP request: ")
    assert not caplog.records


async def test_a_client_that_is_gone_within_its_body_is_no_fault_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served(FakeGateway("a")) as run:
        gone = trio.socket.socket(trio.socket.AF_UNIX)
        await gone.connect(str(run / "control.sock"))
        await gone.send(
            b"POST /flush HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        )
        with trio.fail_after(10):
            while not (await gone.recv(1, trio.socket.MSG_PEEK)):
                pass
        gone.close()  # with what it has not read
        assert (await ask(run, "GET /disks/a")).status == 200
        await trio.testing.wait_all_tasks_blocked()
    assert not caplog.records


# -------------------------------------------------------------------------------------- hang-ups


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("request_line", "body"),
    [
        ("POST /flush", b""),
        ("POST /disks/a/preload", b'{"amount": "all"}'),
        ("DELETE /disks/a", b""),
    ],
)
async def test_client_that_hangs_up_ends_the_waiting(
    request_line: str, body: bytes, steps: int
) -> None:
    gateway = FakeGateway("a")
    gateway.steps, gateway.finish = steps, trio.Event()
    async with served(gateway) as run:
        async with asked(run, request_line, body):
            await gateway.began.wait()
        with trio.fail_after(5):
            await gateway.ended.wait()
        assert len(gateway.cancelled) == 1
        assert "a" in gateway.disks
        assert (await ask(run, "GET /disks/a")).status == 200


async def test_reader_that_sleeps_does_not_keep_the_daemon_from_ending() -> None:
    with trio.fail_after(10):
        async with served(FakeGateway("a")) as run:
            sleeper = socket.socket(socket.AF_UNIX)
            sleeper.connect(str(run / "control.sock"))
            sleeper.setblocking(False)
            pipelined = b"GET /disks HTTP/1.1\r\nHost: x\r\n\r\n" * 100
            sent = 1
            while sent:  # until the server has stopped reading, as nobody takes its answers
                try:
                    sent = sleeper.send(pipelined)
                except BlockingIOError:
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    try:
                        sent = sleeper.send(pipelined)
                    except BlockingIOError:
                        sent = 0
        sleeper.close()


async def test_ending_while_work_goes_on_cancels_it() -> None:
    gateway = FakeGateway("a")
    gateway.finish = trio.Event()
    with trio.fail_after(5):
        async with served(gateway) as run:
            stream = await trio.open_unix_socket(str(run / "control.sock"))
            await stream.send_all(b"POST /flush HTTP/1.0\r\n\r\n")
            await gateway.began.wait()
    assert gateway.cancelled == ["flush"]
    await stream.aclose()


# ------------------------------------------------------------------------------------ the socket


@pytest.mark.parametrize(("group", "mode"), [(None, 0o600), ("root", 0o660)])
async def test_socket_is_for_its_owner_or_the_control_group(group: str | None, mode: int) -> None:
    async with served(FakeGateway(control_group=group)) as run:
        assert stat.S_IMODE((run / "control.sock").stat().st_mode) == mode
        assert os.listdir(run) == ["control.sock"]


async def test_socket_goes_with_the_daemon_and_a_dead_one_is_replaced() -> None:
    gateway = FakeGateway("a")
    async with served(gateway) as run:
        path = run / "second.sock"
        for leftover in (path, run / "second.sock.new"):
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(leftover))
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, gateway, path)
            async with await trio.open_unix_socket(str(path)):
                pass
            nursery.cancel_scope.cancel()
        assert not path.exists()


async def test_second_daemon_is_refused_and_changes_nothing() -> None:
    gateway = FakeGateway("a")
    async with served(gateway) as run:
        path = run / "control.sock"
        before = path.stat().st_ino
        with pytest.raises(ForebayError, match="another daemon answers at .*: stop it, or"):
            await serve_control(gateway, path)
        assert path.stat().st_ino == before
        assert (await ask(run, "GET /disks/a")).status == 200


async def test_socket_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, FakeGateway(), path)
        path.unlink()
        path.write_text("the successor's")
        nursery.cancel_scope.cancel()
    assert path.read_text() == "the successor's"


async def test_socket_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ForebayError, match="^cannot make the control socket .*: check gateway.run"):
        await serve_control(FakeGateway(), tmp_path / "absent" / "control.sock")
