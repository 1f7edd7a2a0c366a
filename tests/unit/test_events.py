# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Events: told, bounded, kept in files that may hold anything, sent to journald, read by those who follow."""

import json
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from forebay.cli.events import run
from forebay.cli.events.arguments import parse_since
from forebay.client import NoDaemonError
from forebay.control import events as control
from forebay.errors import ForebayError
from forebay.events import telling
from forebay.events.files import LONGEST_LINE, Files
from forebay.events.held import Events
from forebay.events.journal import JournalHandler, datagram, is_journal
from forebay.events.kinds import ALWAYS, KEYS, KINDS, LONGEST_TEXT, PAUSE_SECONDS, checked
from forebay.events.ring import Entry, Ring
from forebay.events.states import look
from forebay.events.telling import SUBJECTS, Limits, keep_with, subject_of, tell
from forebay.http.messages import HungUp, Request

PAGE = Path(__file__).resolve().parents[2] / "docs" / "events.md"

EVENT: dict[str, Any] = {
    "id": 7,
    "time": 1000.5,
    "kind": "attach",
    "disk": "vm1",
    "image": "images:a.raw",
    "store": "images",
    "state": "ready",
    "text": "attached",
}


def line(number: int, **differs: Any) -> bytes:
    return json.dumps(EVENT | {"id": number, "time": float(number)} | differs).encode()


def entry(number: int, size: int = 10) -> Entry:
    return Entry(number, float(number), "", b"x" * size)


@pytest.fixture(autouse=True)
def fresh_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "LIMITS", Limits())


class Subject:
    """A disk whose state a test sets."""

    image, store = "images:a.raw", "images"

    def __init__(self) -> None:
        self.now = "ready"

    def state(self) -> str:
        return self.now

    def reason(self) -> str:
        return "because"


@pytest.fixture
def subject() -> Iterator[Subject]:
    SUBJECTS["vm1"] = found = Subject()
    yield found
    SUBJECTS.pop("vm1", None)


@contextmanager
def kept() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    with keep_with(found.append):
        yield found


# ----------------------------------------------------------------------------------------------------------- the tables


def rows(heading: str) -> list[list[str]]:
    text = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in row.strip("|").split(" | ")]
        for row in re.findall(r"^\| `.*", text, re.MULTILINE)
    ]


def test_the_page_has_every_kind_with_its_id() -> None:
    found = {row[0].strip("`"): row[-1].strip("` |") for row in rows("What is told")}
    assert found == {name: kind.message_id for name, kind in KINDS.items()}


def test_the_page_has_every_key() -> None:
    found = {key for row in rows("As JSON") for key in re.findall(r"`(\w+)`", row[0])}
    assert found == set(KEYS)


def test_ids_are_ids() -> None:
    assert len({kind.message_id for kind in KINDS.values()}) == len(KINDS)
    assert all(re.fullmatch("[0-9a-f]{32}", kind.message_id) for kind in KINDS.values())


# -------------------------------------------------------------------------------------------------------------- telling


def test_an_event_says_of_which_disk_and_who_asked(subject: Subject) -> None:
    telling.ASKED.set(telling.Asker(1000, 4321))
    with kept() as found:
        tell("mode", "mode write-back", "vm1", now="write-back")
        telling.by_itself()
        tell("mode", "mode write-through", "vm1")
    assert found[0] == {
        "kind": "mode",
        "text": "mode write-back",
        "disk": "vm1",
        "image": "images:a.raw",
        "store": "images",
        "state": "ready",
        "asked_uid": 1000,
        "asked_pid": 4321,
        "now": "write-back",
    }
    assert "asked_uid" not in found[1]


def test_nothing_that_is_told_raises(
    subject: Subject, expect_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "state", lambda: 1 / 0)
    with kept() as found:
        tell("attach", "x" * 10_000, "vm1", written_bytes=1 << 70)
    assert found[0]["state"] == ""
    assert len(found[0]["text"]) == LONGEST_TEXT
    assert checked(found[0] | {"id": 1, "time": 1.0}) is not None
    expect_log("an event cannot be told")
    tell("no such kind", "")

    def broken(_: object) -> None:
        raise RuntimeError

    with keep_with(broken):
        tell("attach", "", "vm1")


def test_what_happens_in_a_loop_is_counted() -> None:
    now = [0.0]
    limits = Limits(lambda: now[0])
    burst = KINDS["client"].burst
    assert [limits.take("client", "a") for _ in range(burst + 7)] == [0] * burst + [None] * 7
    assert limits.take("client", "b") == 0, "another disk is not counted with it"
    assert limits.take("attach", "a") == 0, "nor another kind"
    now[0] += PAUSE_SECONDS + 0.01
    assert limits.take("client", "a") == 7
    assert limits.take("client", "a") is None


def test_limits_of_many_names_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "MOST_LIMITS", 10)
    limits = Limits()
    for n in range(100):
        limits.take("attach", str(n))
    assert len(limits._left) == 10


async def test_changes_of_state_are_told(subject: Subject) -> None:
    with kept() as found:
        seen = await look({})
        assert found == []
        for state in ("degraded", "degraded", "conflict"):
            subject.now = state
            seen = await look(seen)
    told = [(one["kind"], one["was"], one["now"]) for one in found]
    assert told == [("state", "ready", "degraded"), ("conflict", "degraded", "conflict")]
    assert found[0]["text"] == "degraded, was ready: because"


# ------------------------------------------------------------------------------------------------------------- the ring


def test_the_oldest_go() -> None:
    ring = Ring(most_events=3, most_bytes=100)
    for n in range(1, 6):
        ring.add(entry(n))
    assert [one.id for one in ring.after(0)] == [3, 4, 5]
    assert [one.id for one in ring.after(3)] == [4, 5]
    assert [one.id for one in ring.after(0, 2)] == [3, 4]
    assert ring.dropped == 2
    ring.add(entry(6, 95))
    assert [one.id for one in ring.after(0)] == [6]


def test_what_was_kept_before_comes_in_front() -> None:
    ring = Ring()
    ring.add(entry(10))
    ring.take_in([entry(5), entry(3), entry(10), entry(12)])
    assert [one.id for one in ring.after(0)] == [3, 5, 10, 12]


# ------------------------------------------------------------------------------------------------------------ the files


def ids(files: Files) -> list[int]:
    return sorted(one.id for one in files.read())


def test_files_are_bounded_and_keep_the_newest(tmp_path: Path) -> None:
    files = Files(tmp_path, "rare", most=4000)
    for n in range(1, 201):
        files.write([line(n)])
    found = ids(files)
    assert found == list(range(found[0], 201))
    assert len(found) >= 10
    assert sum(path.stat().st_size for path in (tmp_path / "events").iterdir()) <= 4000


HOSTILE = [
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b"[" * 5000,
    line(1, id="7"),
    line(1, id=True),
    line(1, id=-1),
    line(1, id=1 << 60),
    line(1, time="now"),
    line(1, time=float("inf")),
    line(1, disk=None),
    line(1, text="x" * 2 * LONGEST_TEXT),
    b'{"id": 1, ' + b" " * LONGEST_LINE + line(1)[1:],
    b'{"id":' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("torn", HOSTILE)
def test_what_is_no_event_is_passed_over(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "rare").write_bytes(line(3) + b"\n" + torn)
    files = Files(tmp_path, "rare")
    files.write([line(4)])
    assert ids(files) == [3, 4]


def test_keys_that_no_event_has_are_dropped() -> None:
    found = checked(EVENT | {"asked_pid": "5", "free_bytes": "much", "was": "ready"})
    assert found == EVENT | {"was": "ready"}
    assert set(ALWAYS) == set(EVENT)


@pytest.mark.parametrize("what", ["directory", "pipe", "link", "second name", "folder"])
def test_what_is_no_file_is_neither_read_nor_written(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "events"
    victim = tmp_path / "victim"
    victim.write_bytes(line(1) + b"\n")
    if what == "folder":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        place = folder / "rare"
        if what == "directory":
            place.mkdir()
        elif what == "pipe":
            os.mkfifo(place)
        elif what == "link":
            place.symlink_to(victim)
        else:
            place.hardlink_to(victim)
    files = Files(tmp_path, "rare")
    with pytest.raises(OSError, match=r"Errno"):
        files.read()
    with pytest.raises(OSError, match=r"Errno"):
        files.write([line(2)])
    assert victim.read_bytes() == line(1) + b"\n"


def told(events: Events) -> list[str]:
    return [json.loads(one.line)["text"] for one in events.after(0)]


def keep(events: Events, text: str, kind: str = "attach") -> None:
    events.keep({"kind": kind, "disk": "", "image": "", "store": "", "state": "", "text": text})


async def test_events_come_back_after_a_restart_and_what_is_frequent_drives_nothing_out(
    tmp_path: Path,
) -> None:
    events = Events(tmp_path)
    events.begin()
    keep(events, "first")
    for n in range(5000):
        keep(events, str(n), "client")
        if n % 1000 == 0:
            wait_until_idle(events)  # or what waits drives out what waits
    events.close(10)
    again = Events(tmp_path)
    keep(again, "before it was read")
    again.begin()
    await again.loaded()
    found = told(again)
    assert found[0] == "first"
    assert found[-2:] == ["4999", "before it was read"]
    assert 1000 < len(found) < 5000
    assert again.dropped > 0
    assert again.last == again.after(0)[-1].id
    again.close(10)


async def test_what_is_frequent_drives_nothing_out_while_nothing_can_be_written(
    tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    events = Events(tmp_path)
    keep(events, "first")
    for n in range(5000):  # nobody writes yet
        keep(events, str(n), "client")
    events.begin()
    events.close(10)
    assert [json.loads(one.line)["text"] for one in Files(tmp_path, "rare").read()] == ["first"]
    assert [one.getMessage() for one in caplog.records] == [
        f"{tmp_path / 'events' / 'frequent'}: events are kept there again; 904 were not"
    ]


async def test_a_full_disk_loses_events_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("forebay.events.held.AGAIN_SECONDS", 0.01)
    place = tmp_path / "events"
    place.write_text("in the way")
    expect_log("events are not kept there, and end with the daemon: ")
    events = Events(tmp_path)
    events.begin()
    await events.loaded()
    for n in range(3):
        keep(events, str(n))
        wait_until_idle(events)
    place.unlink()
    keep(events, "again")
    events.close(10)
    assert told(events) == ["0", "1", "2", "again"]
    messages = [one.getMessage() for one in caplog.records]
    assert len([one for one in messages if "are not kept" in one]) == 2, "once for each file"
    assert [one for one in messages if "there again" in one] == [
        f"{place / 'rare'}: events are kept there again; 3 were not"
    ]
    assert [one.id for one in Files(tmp_path, "rare").read()] == [events.last]


def wait_until_idle(events: Events) -> None:
    keeper = events._keeper
    assert keeper is not None
    while any(keeper._waiting.values()) or keeper.is_busy:
        pass


# ------------------------------------------------------------------------------------------------------------- journald


def fields(raw: bytes) -> list[tuple[str, str]]:
    """What journald makes of a datagram (systemd's JOURNAL_EXPORT_FORMATS, and its native protocol)."""
    found = []
    while raw:
        first, _, rest = raw.partition(b"\n")
        if b"=" in first:
            name, _, value = first.partition(b"=")
            raw = rest
        else:
            name, length = first, struct.unpack_from("<Q", rest)[0]
            value, raw = rest[8 : 8 + length], rest[8 + length + 1 :]
        found.append((name.decode(), value.decode()))
    return found


class Journald:
    """A socket that stands for journald's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(5)

    def get(self) -> dict[str, str]:
        found = fields(self.socket.recv(1 << 20))
        assert len(found) == len(dict(found)), "no field twice"
        return dict(found)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    found = Journald(tmp_path / "socket")
    yield found
    found.socket.close()


class Otherwise(logging.Handler):
    """Takes what journald does not."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def otherwise() -> Otherwise:
    return Otherwise()


@pytest.fixture
def logger(journald: Journald, otherwise: Otherwise) -> Iterator[logging.Logger]:
    found = logging.getLogger("forebay.test")
    handler = JournalHandler(journald.path, otherwise, subject_of)
    found.addHandler(handler)
    found.setLevel(logging.INFO)
    yield found
    found.removeHandler(handler)
    handler.close()


def test_an_event_has_fields(subject: Subject, logger: logging.Logger, journald: Journald) -> None:
    tell("mode", "mode write-back", "vm1", log=logger)
    assert journald.get() == {
        "MESSAGE": "INFO forebay.test: vm1: mode write-back",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "forebay",
        "FOREBAY_LOGGER": "forebay.test",
        "FOREBAY_EVENT": "mode",
        "MESSAGE_ID": KINDS["mode"].message_id,
        "DISK": "vm1",
        "IMAGE": "images:a.raw",
        "STORE": "images",
        "STATE": "ready",
    }


def test_other_lines_say_what_they_are_about(
    subject: Subject, logger: logging.Logger, journald: Journald
) -> None:
    logger.info("%s: goes by itself", "vm1")
    assert journald.get()["DISK"] == "vm1"
    logger.info("disk '%s' is well", "vm1")
    assert journald.get()["DISK"] == "vm1"
    logger.info("%s can be reached again", "images:a.raw")
    found = journald.get()
    assert (found["IMAGE"], found["STORE"], "DISK" in found) == ("images:a.raw", "images", False)
    logger.info("%s: no disk of ours", "vm7")
    logger.info("nothing of %s", "vm1")
    assert not {"DISK", "IMAGE"} & (set(journald.get()) | set(journald.get()))


FORGED = "a\nPRIORITY=0\nMESSAGE_ID=00000000000000000000000000000000\nDISK=vm2\n\n_UID=0\nX"


def test_no_name_forges_a_field(
    subject: Subject, logger: logging.Logger, journald: Journald
) -> None:
    subject.image = subject.store = FORGED
    tell("attach", FORGED, "vm1", log=logger)
    found = journald.get()
    assert (found["DISK"], found["IMAGE"], found["PRIORITY"]) == ("vm1", FORGED, "6")
    assert found["MESSAGE"].endswith(FORGED)
    assert "_UID" not in found
    assert fields(datagram([("A", "x\x00y"), ("B", "=\n\n")])) == [("A", "x\x00y"), ("B", "=\n\n")]
    assert dict(fields(datagram([("A", "\udcff")])))["A"] == "\\udcff"


@pytest.mark.expect_log("a fault")
def test_a_traceback_is_one_line_of_the_journal(logger: logging.Logger, journald: Journald) -> None:
    try:
        raise RuntimeError("x" * 300_000)
    except RuntimeError:
        logger.exception("a fault")
    found = journald.get()
    assert "RuntimeError" in found["MESSAGE"]
    assert found["PRIORITY"] == "3"


@pytest.mark.expect_log("lines are missing here")
def test_a_journald_that_reads_nothing_is_not_waited_for(
    logger: logging.Logger, journald: Journald, otherwise: Otherwise
) -> None:
    count = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 50
    for n in range(count):
        logger.info("line %d", n)
    read = 0
    journald.socket.settimeout(0)
    while True:
        try:
            assert journald.get()["MESSAGE"].endswith(f"line {read}")
            read += 1
        except BlockingIOError:
            break
    journald.socket.settimeout(5)
    logger.info("again")
    assert journald.get()["MESSAGE"].endswith("again")
    lost = f"{count - read} lines are missing here: journald did not take them"
    assert journald.get()["MESSAGE"].endswith(lost)
    assert otherwise.texts == []


def test_without_journald_lines_go_to_stderr(
    logger: logging.Logger, journald: Journald, otherwise: Otherwise
) -> None:
    journald.path.unlink()
    logger.info("here")
    assert otherwise.texts == ["here"]


def test_only_a_stderr_that_leads_to_the_journal_counts(
    tmp_path: Path, journald: Journald, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "file").open("w") as file:
        found = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert is_journal(file.fileno(), journald.path)
        assert not is_journal(file.fileno(), tmp_path / "none")
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        assert not is_journal(file.fileno(), journald.path)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("30m", 1800), ("1.5h", 5400), ("90 s", 90), ("today", None), ("00:00", None)],
)
def test_a_moment_of_before(text: str, seconds: float | None) -> None:
    now = 1_700_000_000.0
    found = parse_since(text, now)
    if seconds is None:
        assert 0 <= now - found <= 90_000
    else:
        assert now - found == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "25:00", "2h ago", "9999-12-31", "0001-01-01", "-1h", "1e9", "9" * 400]
)
def test_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="no moment of before"):
        parse_since(text, 1_700_000_000.0)


def test_dates_are_taken() -> None:
    now = 1_700_000_000.0
    first, second = parse_since("2023-11-01", now), parse_since("2023-11-01 00:00:10", now)
    assert second - first == 10
    assert parse_since("yesterday", now) < parse_since("today", now) <= now


class Followed:
    """A daemon that ends twice."""

    def __init__(self, answers: list[list[dict[str, Any] | None]]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def lines(self, target: str) -> Iterator[dict[str, Any] | None]:
        self.asked.append(target)
        if not self.answers:
            raise KeyboardInterrupt
        answer = self.answers.pop(0)
        if not answer:
            raise NoDaemonError("no daemon")
        yield from answer


def test_who_follows_goes_on_after_a_restart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "AGAIN_SECONDS", 0)
    first, second = EVENT | {"id": 5}, EVENT | {"id": 9}
    daemon = Followed([[first], [], [], [second]])
    shown: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        run.follow(daemon, {"disk": "vm1", "since": None, "last": 10}, shown.append)  # type: ignore[arg-type]
    assert shown == [first, second]
    assert daemon.asked[0] == "/events?disk=vm1&last=10&follow=1"
    assert daemon.asked[1:-1] == ["/events?disk=vm1&after=5&follow=1"] * 3
    assert daemon.asked[-1] == "/events?disk=vm1&after=9&follow=1"
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "forebay: the daemon ended; waiting for it",
        "forebay: the daemon is there again",
    ]


def test_a_daemon_that_was_never_there_is_an_error() -> None:
    with pytest.raises(NoDaemonError):
        run.follow(Followed([[]]), {"disk": None}, print)  # type: ignore[arg-type]


def test_no_event_moves_the_cursor() -> None:
    event = EVENT | {
        "text": "\x1b[2J\nforged",
        "asked_uid": 4294967294,
        "asked_pid": 7,
        "untold": 3,
    }
    found = run.line(event)
    assert found.isprintable()
    assert found.endswith("(asked by user 4294967294, process 7; 3 like it before were not told)")


# ---------------------------------------------------------------------------------------------------------- who follows


class Slow:
    """Who follows and reads nothing until it is let."""

    request = Request("GET", "/events", None)  # type: ignore[arg-type]

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.reads = trio.Semaphore(0)
        self.gone = trio.Event()

    async def start(self, status: int, headers: Any) -> None:
        assert status == 200

    async def write(self, data: bytes) -> None:
        self.parts.append(data)
        await self.reads.acquire()

    async def hung_up(self) -> None:
        await self.gone.wait()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(one) for one in b"".join(self.parts).splitlines() if one]


async def following(events: Events, given: dict[str, Any], slow: Slow) -> None:
    with pytest.raises(HungUp):
        await control.Following(events, control.Wanted(given)).send(slow)


async def test_no_more_follow_than_may_however_many_ask_at_once() -> None:
    """Each was answered before any of them is sent something."""
    events, told = Events(), list[int]()
    answers = [control.Following(events, control.Wanted({})) for _ in range(2)]
    events.followers = control.MOST_FOLLOWERS - 1
    first, second = Slow(), Slow()

    async def start(status: int, headers: Any) -> None:
        told.append(status)

    second.start = start  # type: ignore[method-assign]
    second.reads = trio.Semaphore(9)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answers[0].send, first)
        await trio.testing.wait_all_tasks_blocked()
        await answers[1].send(second)
        nursery.cancel_scope.cancel()
    assert told == [503]
    assert b"end one of them" in b"".join(second.parts)
    assert events.followers == control.MOST_FOLLOWERS - 1


async def test_who_reads_slowly_holds_little_and_is_told_what_it_missed(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    events = Events()
    await events.loaded()
    for n in range(100):
        keep(events, str(n))
    slow = Slow()
    nursery.start_soon(following, events, {"after": events.after(0)[0].id}, slow)
    await trio.testing.wait_all_tasks_blocked()
    assert len(slow.lines) == 64, "a piece, and no more, is under way"
    for n in range(100, 10_000):
        keep(events, str(n))
    for _ in range(10_000):
        slow.reads.release()
    await trio.testing.wait_all_tasks_blocked()
    texts = [one["text"] for one in slow.lines]
    assert texts[:64] == [str(n) for n in range(1, 65)]
    assert [one["kind"] for one in slow.lines].count("gap") == 1
    assert texts[64].startswith("some events before this")
    assert texts[65:] == [str(n) for n in range(int(texts[65]), 10_000)]
    keep(events, "another")
    await trio.testing.wait_all_tasks_blocked()
    assert slow.lines[-1]["text"] == "another"
    slow.gone.set()


async def test_who_reads_nothing_at_all_is_hung_up_on(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    events = Events()
    keep(events, "one")
    began = trio.current_time()
    await following(events, {}, Slow())
    assert trio.current_time() - began == control.SEND_SECONDS
    assert events.followers == 0


async def test_where_nothing_happens_a_line_says_so(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    slow = Slow()
    for _ in range(3):
        slow.reads.release()
    nursery.start_soon(following, Events(), {"disk": "vm1"}, slow)
    await trio.sleep(2.5 * control.BEAT_SECONDS)
    assert slow.parts == [b"\n", b"\n"]
    slow.gone.set()


async def test_the_last_ones_and_those_of_a_disk(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    events = Events()
    for n in range(10):
        events.keep(
            {"kind": "mode", "disk": f"vm{n % 2}", "image": "", "store": "", "state": ""}
            | {"text": str(n)}
        )
    wanted = control.Wanted({"disk": "vm1", "last": 2})
    assert [json.loads(one.line)["text"] for one in wanted.of(events.after(0))] == ["7", "9"]
    slow = Slow()
    for _ in range(9):
        slow.reads.release()
    nursery.start_soon(following, events, {"disk": "vm1", "last": 2}, slow)
    nursery.start_soon(following, events, {"last": 0}, Slow())
    await trio.testing.wait_all_tasks_blocked()
    assert [one["text"] for one in slow.lines] == ["7", "9"]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("/disks/vm1?discard=0&force=0", "DELETE /disks/vm1"),
        ("/disks/vm1?discard=1&force=true", "DELETE /disks/vm1 (discard, force)"),
        ("/disks/%0a%1b[2J?image=https://u:secret@h/", "DELETE /disks/\\n\\x1b[2J"),
        ("/" + "x" * 5000, "DELETE /" + "x" * (control.LONGEST_TARGET - 8)),
    ],
)
async def test_what_was_asked_for_is_told_without_secrets(target: str, said: str) -> None:
    async def refuse(_: Request) -> Any:
        raise ForebayError("no such disk")

    with kept() as found:
        call = control.told("DELETE", "/disks/{name}", refuse)
        with pytest.raises(ForebayError):
            await call(Request("DELETE", target, None))  # type: ignore[arg-type]
    assert [one["text"] for one in found] == [f"asked for: {said}", "not done: no such disk"]
    assert [one.get("ok") for one in found] == [None, False]
    read = control.told("GET", "/disks", refuse)
    assert read is refuse, "who only looks is not told"
