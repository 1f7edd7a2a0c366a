# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import argparse
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from forebay import client
from forebay.cli import stats as cli_stats
from forebay.cli.arguments import COMMANDS
from forebay.cli.commands import RUN
from forebay.cli.main import build_parser, command_in, main
from forebay.cli.stats import Wanted, difference, parse_wanted, rates
from forebay.cli.terminal import progress as render_progress
from forebay.cli.terminal.completion import completion
from forebay.cli.terminal.wait import with_wait_closed
from forebay.doors.tenant import Rule
from forebay.errors import ForebayError
from forebay.units import GIB, MIB
from unit.control_fake import IMAGE, STORE, SUMMARY, FakeGateway, disk, served

ROOT = Path(__file__).resolve().parents[2]

Capture = pytest.CaptureFixture[str]


def run_main(*argv: str) -> int:
    """The exit code, whichever way the command ends."""
    try:
        return main(argv)
    except SystemExit as end:
        return -1 if not isinstance(end.code, int) else end.code


def config_for(run: Path) -> str:
    file = run / "forebay.toml"
    file.write_text(f'[gateway]\nrun = "{run}"\n')
    return str(file)


async def forebay(run: Path, *argv: str) -> int:
    """The command in this process, against the daemon in `run`."""
    words = ["--config", config_for(run), *argv]
    return await trio.to_thread.run_sync(partial(run_main, *words))


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Commands that name no configuration find one whose daemon does not run."""
    file = config_for(tmp_path)
    monkeypatch.setenv("FOREBAY_CONFIG", file)
    return file


# ----------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "required: COMMAND"),
        ("staus", "no command 'staus' (did you mean 'status'?)"),
        ("--conf=x status", "unrecognized arguments: --conf=x"),
        ("status --config", "argument --config: expected one argument"),
        ("status a b", "unrecognized arguments: b"),
        ("status a/b", "argument NAME: 'a/b' is not a name: use 1 to 64"),
        ("attach a", "required: IMAGE"),
        ("attach -- -a images:x", "argument NAME: '-a' is not a name"),
        ("attach a images:x --mode writebck", "argument --mode: 'writebck' is not a mode (did you"),
        ("attach a images:x --cache-size 20GB", "argument --cache-size: '20GB' is not a size"),
        ("attach a images:x --cache-size=-1", "argument --cache-size: '-1' is not a size"),
        ("attach a images:x --preload some", "'some' is not a size"),
        ("attach a images:x --readonly", "unrecognized arguments: --readonly"),
        ("detach", "required: NAME"),
        ("flush a --all", "argument --all: not allowed with argument NAME"),
        ("flush --timeout soon", "argument --timeout: 'soon' is not a duration: write 30s"),
        ("mode a", "required: MODE"),
        ("mode a fast", "argument MODE: 'fast' is not a mode: use one of none, write-around"),
        ("preload a", "required: SIZE|trace|all"),
        ("warm", "required: IMAGE"),
        ("warm images:a --rate 1K", "argument --rate: '1K' is too slow: use at least 64 KiB"),
        ("trace images:a", "argument action: no action 'images:a': use one of 'show'"),
        ("trace show", "required: IMAGE"),
        ("tag images:a", "required: TAG"),
        ("tag images:a a,b", "argument TAG: 'a,b' is not a tag: use 1 to 64"),
        ("purge", "name images, or say --tag or --older-than"),
        ("purge --older-than month", "argument --older-than: 'month' is not a duration"),
        ("images a/b", "argument STORE: 'a/b' is not a name"),
        ("preload a 5 XB", "unrecognized arguments: XB"),
        ("preload a 5XB", "'5XB' is not a size"),
        ("xml a --target 5", "argument --target: '5' is not a target: use vda"),
        ("cache wipe", "argument ACTION: no action 'wipe'"),
        ("cache info --force", "argument --force: is for 'cache format' and 'cache create' only"),
        ("cache info --size 1G", "argument --size: is for 'cache create' and 'cache extend' only"),
        ("cache create", "say one of --vg VG, --device PATH or --file PATH"),
        ("cache create --vg a --file /b --size 1G", "say one of --vg VG, --device PATH or --file"),
        ("cache create --vg vg0", "argument --size: is needed with --vg"),
        ("cache create --vg -x --size 1G", "argument --vg: expected one argument"),
        ("cache create --vg=-x --size 1G", "argument --vg: '-x' is not the name of a volume group"),
        ("cache create --file /b --size 1G --tag @ssd", "argument --tag: goes with --vg"),
        ("cache create --vg a --size 1G --tag @", "argument --tag: '@' is not a tag of LVM"),
        (
            "cache create --device /b --size 1G",
            "argument --size: a block device is used as a whole",
        ),
        ("stats a b", "argument INTERVAL: 'b' is not a duration"),
        ("stats 1 0", "argument COUNT: '0' is no number above 0"),
        ("stats 0", "argument INTERVAL: use 10ms to 1d"),
        ("stats a 1 2 3", "too many arguments: write [NAME] [INTERVAL [COUNT]]"),
        ("stats a/b 1", "argument NAME: 'a/b' is not a name"),
        ("check-config --json", "unrecognized arguments: --json"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2_without_a_daemon(
    argv: str, said: str, capsys: Capture
) -> None:
    assert run_main(*argv.split()) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("forebay")
    assert out == ""


def test_empty_image_is_wrong_usage(capsys: Capture) -> None:
    assert run_main("attach", "a", " ") == 2
    assert "write STORE:PATH, a path in a store, or an nbd:// URI" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- failure

ASKS = (
    "attach a images:x",
    "detach a",
    "status",
    "stats",
    "stats 1",
    "flush",
    "mode a wb",
    "preload a all",
    "xml a",
    "cache",
    "cache scrub",
)


@pytest.mark.parametrize("argv", ASKS)
def test_no_daemon_is_one_line_and_code_1(argv: str, tmp_path: Path, capsys: Capture) -> None:
    assert run_main(*argv.split()) == 1
    out, err = capsys.readouterr()
    assert err == (
        f"forebay: no daemon at {tmp_path}/control.sock: start it with 'forebay serve' or "
        "'systemctl start forebay'\n"
    )
    assert out == ""


@pytest.mark.parametrize("argv", [*ASKS, "check-config", "dump-config", "serve", "cache format"])
def test_missing_configuration_is_one_line_and_code_1(argv: str, capsys: Capture) -> None:
    for words in (["--config", "/no/such", *argv.split()], [*argv.split(), "--config", "/no/such"]):
        assert run_main(*words) == 1
        assert capsys.readouterr().err == (
            "forebay: /no/such: no such file: create it, or name another with --config or "
            "FOREBAY_CONFIG\n"
        )


@pytest.mark.parametrize(
    "argv", ["detach b", "status b", "stats b 1", "flush b", "mode b wb", "preload b 1", "xml b"]
)
async def test_unknown_disk_is_one_line_and_code_1(argv: str, capsys: Capture) -> None:
    gateway = FakeGateway("a")
    gateway.fail = ForebayError("no disk 'b': see 'forebay status'")
    async with served(gateway) as run:
        assert await forebay(run, *argv.split()) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "forebay: no disk 'b': see 'forebay status'\n")


async def test_daemon_that_ends_in_the_middle_is_told(capsys: Capture) -> None:
    gateway = FakeGateway("a")
    gateway.finish, codes = trio.Event(), list[int]()
    async with trio.open_nursery() as nursery, served(gateway) as run:

        async def flush() -> None:
            codes.append(await forebay(run, "flush"))

        nursery.start_soon(flush)
        await gateway.began.wait()
    assert codes == [1]
    assert "went away in the middle" in capsys.readouterr().err


def test_socket_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(client, "Socket", Refused)
    with pytest.raises(client.NoDaemonError, match="run as root, or join the group"):
        client.Client("/x").get("/disks")


async def test_something_else_at_the_socket_is_told(tmp_path: Path) -> None:
    async def babble(stream: trio.SocketStream) -> None:
        await stream.receive_some()  # closed with something unread, the socket would be reset
        await stream.send_all(b"220 smtp ready\r\n\r\n")

    path = tmp_path / "s"
    socket = trio.socket.socket(trio.socket.AF_UNIX)
    await socket.bind(str(path))
    socket.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, babble, [trio.SocketListener(socket)])
        with pytest.raises(client.StrangeAnswerError, match="the daemon's answer is not HTTP"):
            await trio.to_thread.run_sync(client.Client(str(path)).get, "/disks")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["status", "flush"])
def test_interrupt_is_one_line(what: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(RUN, what, interrupt)
    assert run_main(what) == 1
    assert capsys.readouterr().err.startswith("forebay: interrupted: ")


# -------------------------------------------------------------------------------------- commands


async def test_status_is_a_table_and_json(capsys: Capture) -> None:
    gateway = FakeGateway("a", "b")
    gateway.disks["b"] |= {"dirty_bytes": 5 * MIB, "lag_seconds": 12.5, "overlay": True}
    async with served(gateway) as run:
        assert await forebay(run, "status") == 0
        heading, *lines = capsys.readouterr().out.splitlines()
        assert (
            " ".join(heading.split()) == "NAME IMAGE SIZE MODE STATE CACHED DIRTY LAG HIT% CLIENTS"
        )
        assert lines[0].split() == [
            "a",
            "images:a.raw",
            "20G",
            "write-back",
            "ready",
            "3.0G",
            "0",
            "0s",
            "90.0",
            "1",
        ]
        assert lines[1].split()[3] == "write-back,overlay"
        assert lines[1].split()[6:8] == ["5.0M", "12s"]
        assert await forebay(run, "status", "--json") == 0
        assert json.loads(capsys.readouterr().out) == list(gateway.disks.values())
        assert await forebay(run, "status", "b", "--json") == 0
        assert json.loads(capsys.readouterr().out) == [gateway.disks["b"]]


async def test_status_of_one_disk_is_its_page(capsys: Capture) -> None:
    gateway = FakeGateway("a", "b")
    setting = {"key": "mode", "value": "write-back", "from": "store"}
    told = {
        "store": "images",
        "settings": [setting],
        "layers": 2,
        "peer_process": 7,
        "peer": "first",
    }
    gateway.disks["a"] |= told | {
        "connections": [{"pid": os.getpid(), "uid": 0}] * 2,
        "overlay": True,
    }
    gateway.disks["b"] |= {"state": "conflict", "reason": "\x1b[2Jsomebody has it"}
    async with served(gateway) as run:
        assert await forebay(run, "status", "a") == 0
        out = capsys.readouterr().out
        assert "image      images:a.raw, raw, of store images" in out
        assert f"clients    process {os.getpid()} (" in out
        assert ") with 2 connections; process 7 has it (peer first)" in out
        assert "reads      1000, 0, 90.0% without the image" in out
        assert "snapshots  monday" in out
        assert out.splitlines()[-1].split() == ["mode", "write-back", "store"]
        assert await forebay(run, "status", "b") == 0
        out = capsys.readouterr().out
        assert "state      conflict: \\x1b[2Jsomebody has it" in out
        assert "clients    nobody is connected" in out


async def test_attach_sends_what_was_asked_for(capsys: Capture, tmp_path: Path) -> None:
    gateway = FakeGateway()
    async with served(gateway) as run:
        words = "attach vm1 images:a.raw --mode BACK --cache-size 1G --preload all --read-only"
        words += " --iops 500 --bps 10M --iops-burst 0"
        words += " --peer label --label libvirt-1 --user nobody --format raw"
        assert await forebay(run, *words.split(), "--overlay") == 0
        assert capsys.readouterr().out == "vm1: /run/forebay/disks/vm1.sock\n"
        assert await forebay(run, "attach", "vm2", "./a:b.raw", "--json") == 0
        assert json.loads(capsys.readouterr().out)["name"] == "vm2"
        assert await forebay(run, "attach", "vm3", "nbd+unix:///x?socket=/s") == 0
        assert await forebay(run, "attach", "vm1", "images:b.raw") == 1
        assert "'vm1' is attached already" in capsys.readouterr().err
        assert await forebay(run, "attach", "vm1", "images:a.raw") == 0
        told = capsys.readouterr()
        assert told.out == "vm1: /run/forebay/disks/vm1.sock\n"
        assert told.err.startswith("forebay: 'vm1' is attached already, just so\n")
    assert gateway.calls[0][3] == {
        "incoming": False,
        "with_data": False,
        "patience": 30.0,
        "mode": "write-back",
        "cache_size": 1 << 30,
        "preload": "all",
        "rates": {"iops": 500, "bps": 10 << 20, "iops_burst": 0},
        "read_only": True,
        "overlay": True,
        "keep": False,
        "rule": Rule("label", "libvirt-1", 65534),
        "gives_way": False,
        "image_format": "raw",
    }
    images = [call[2] for call in gateway.calls]
    assert images[1:3] == [str(Path.cwd() / "a:b.raw"), "nbd+unix:///x?socket=/s"]


async def test_stores_are_shown_with_who_reads_them(capsys: Capture) -> None:
    async with served(FakeGateway()) as run:
        assert await forebay(run, "stores") == 0
        assert capsys.readouterr().out.splitlines()[0].split()[0] == "STORE"
        assert await forebay(run, "stores", "images") == 0
        assert capsys.readouterr().out.splitlines()[1].split()[0] == "images:golden.raw"
        assert await forebay(run, "stores", "images", "--json") == 0
        assert json.loads(capsys.readouterr().out) == [STORE]
        assert await forebay(run, "stores", "none") == 1
        assert "no store 'none'" in capsys.readouterr().err


async def test_summary_says_how_the_host_stands(capsys: Capture) -> None:
    gateway = FakeGateway()
    async with served(gateway) as run:
        assert await forebay(run, "summary") == 0
        assert capsys.readouterr().out.splitlines()[0] == "state   ok, forebay 0.1.0"
        assert await forebay(run, "summary", "--json") == 0
        assert json.loads(capsys.readouterr().out) == SUMMARY
        assert await forebay(run, "summary", "--opennebula") == 0
        assert 'FOREBAY_STATE="ok"' in capsys.readouterr().out.splitlines()


def test_summary_without_a_daemon_is_a_state_and_code_1(capsys: Capture) -> None:
    assert run_main("summary", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "down"
    assert "start it with" in told["reasons"][0]


async def test_peer_says_who_has_the_disk(capsys: Capture) -> None:
    gateway = FakeGateway("a")
    gateway.disks["a"] |= {"peer": "first", "peer_process": 7}
    async with served(gateway) as run:
        assert await forebay(run, "peer", "a", "first", "--evict", "--user", "0") == 0
        assert capsys.readouterr().out == "a: first, process 7 has it\n"
        gateway.disks["a"] |= {"peer": "any", "peer_process": None}
        assert await forebay(run, "peer", "a", "any", "--label", "libvirt-1") == 0
        assert capsys.readouterr().out == "a: any\n"
        assert await forebay(run, "peer", "a", "any", "--user", "nobody-at-all") == 1
        assert "no user 'nobody-at-all' on this host" in capsys.readouterr().err
    assert gateway.calls == [
        ("peer", "a", Rule("first", None, 0), True),
        ("peer", "a", Rule("any", "libvirt-1"), False),
    ]


async def test_commands_that_move_data(capsys: Capture) -> None:
    gateway = FakeGateway("a", "b")
    gateway.steps = 2
    async with served(gateway) as run:
        gateway.written_back = MIB
        assert await forebay(run, "flush", "a") == 0
        assert capsys.readouterr() == ("a: 1.0M written back, nothing is dirty\n", "")
        gateway.written_back = 0
        for argv, said in (
            ("flush", "all disks: nothing is dirty\n"),
            ("flush --all", "all disks: nothing is dirty\n"),
            ("flush a --timeout 2m", "a: nothing is dirty\n"),
            ("mode a thru", "a: write-through\n"),
            ("preload a 1.5M", "a: 3.0G cached\n"),
            ("detach a --discard", "a: detached\n"),
            ("detach b --force", "b: detached\n"),
        ):
            assert await forebay(run, *argv.split()) == 0
            assert capsys.readouterr() == (said, "")
    assert gateway.calls == [
        ("flush", ["a"], None),
        ("flush", None, None),
        ("flush", None, None),
        ("flush", ["a"], 120.0),
        ("mode", "a", "write-through"),
        ("preload", "a", 3 * MIB // 2),
        ("detach", "a", True, False),
        ("detach", "b", False, True),
    ]


async def test_flush_is_done_only_when_nothing_is_dirty(capsys: Capture) -> None:
    gateway = FakeGateway("a")
    gateway.left_dirty = MIB
    async with served(gateway) as run:
        assert await forebay(run, "flush", "--json") == 1
        out, err = capsys.readouterr()
        assert json.loads(out) == {
            "names": ["a"],
            "written_back_bytes": 0,
            "dirty_bytes": MIB,
            "not_served": [],
        }
        assert err.startswith("forebay: 1.0M are dirty again: guests went on writing; pause them")
        gateway.fail = ForebayError("12M are dirty after 2s: wait longer")
        assert await forebay(run, "flush", "a", "--timeout", "2s") == 1
        assert capsys.readouterr() == ("", "forebay: 12M are dirty after 2s: wait longer\n")


def _saved(*, partial: bool) -> dict[str, object]:
    return {"partial": partial, "form": "raw", "snapshot": None}


async def test_resolve_asks_before_data_is_given_up_and_tells_what_is_missing(
    capsys: Capture,
) -> None:
    gateway = FakeGateway("a")
    async with served(gateway) as run:
        said = "8.0M that only the cache has of 'a' would be given up: say --yes"
        assert await forebay(run, *["resolve", "a", "--keep-image"]) == 1
        assert said in capsys.readouterr().err
        assert await forebay(run, *["resolve", "a", "--keep-image", "--yes"]) == 0
        assert capsys.readouterr().out == "a: goes on with the image as it is now\n"
        assert await forebay(run, *["resolve", "a", "--keep-mine", "--yes", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == "a"
        assert await forebay(run, *["resolve", "a", "--save", "images:new.raw"]) == 0
        assert capsys.readouterr() == ("a: saved as images:new.raw, 3.0M of data\n", "")
        assert await forebay(run, *["resolve", "a", "--save", "images:new.raw", "--partial"]) == 0
        told = capsys.readouterr()
        assert told.err == (
            "a: missing, zeros now: 8192 bytes at 4096\na: 8.0K are missing in images:new.raw\n"
        )
    assert gateway.calls == [
        ("resolve", "a", "image", False),
        ("resolve", "a", "image", True),
        ("resolve", "a", "mine", True),
        ("save", "a", "images:new.raw", _saved(partial=False)),
        ("save", "a", "images:new.raw", _saved(partial=True)),
    ]


@pytest.mark.parametrize("words", ["", "--keep-mine --keep-image", "--save images:x --keep-mine"])
def test_resolve_takes_one_way(words: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["resolve", "a", *words.split()])
    assert ended.value.code == 2
    assert "--keep-mine" in capsys.readouterr().err


async def test_flush_is_not_done_while_a_disk_is_not_served(capsys: Capture) -> None:
    gateway = FakeGateway("a", "b")
    gateway.disks["b"]["state"] = "failed"
    async with served(gateway) as run:
        assert await forebay(run, "flush") == 1
        said = "forebay: b: not served, so what is dirty there stays: see 'forebay status'\n"
        assert capsys.readouterr() == ("", said)
        assert await forebay(run, "flush", "a") == 0


async def test_cache_and_xml(capsys: Capture) -> None:
    async with served(FakeGateway("a")) as run:
        assert await forebay(run, "cache") == 0
        shown = capsys.readouterr().out
        assert re.search(r"(?m)^size +20G \(21474836480\)$", shown)
        assert re.search(r"(?m)^error +-$", shown)
        assert await forebay(run, "cache", "scrub", "--json") == 0
        assert json.loads(capsys.readouterr().out)["damage"] == []
        assert await forebay(run, "cache", "repair", "--json") == 0
        assert json.loads(capsys.readouterr().out)["checked_bytes"]
        assert await forebay(run, "xml", "a", "--target", "sdb") == 0
        assert "<target dev='sdb' bus='scsi'/>" in capsys.readouterr().out


async def test_a_scrub_that_finds_dirty_damage_has_failed(capsys: Capture) -> None:
    gateway = FakeGateway("a")
    where = {"disk": "a", "image": "images:a.raw", "offset": 65536, "length": 4096}
    gateway.damage = [
        where | {"private": True, "what": "checksum"},
        {"disk": "", "image": "images:b.raw", "private": False},
    ]
    async with served(gateway) as run:
        for action in ("scrub", "repair"):
            assert await forebay(run, "cache", action, "--json") == 1
            out, err = capsys.readouterr()
            assert json.loads(out)["damage"] == gateway.damage
            assert err == (
                "forebay: disk 'a' of images:a.raw: 4096 bytes at 65536: checksum\n"
                "forebay: data that only the cache has is damaged, and reads of it fail: write it anew in the guest, "
                "or stop the daemon and drop it with 'forebay cache repair --yes', for what the image has there\n"
            )
            assert await forebay(run, "cache", action) == 1
            capsys.readouterr()
        assert await forebay(run, "cache", "scrub", "--yes") == 2
        assert "argument --yes: is for 'cache repair' only" in capsys.readouterr().err


def test_check_and_dump_config(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[gateway]\nsocket_group = "root"\n[stores.a]\npath = "{tmp_path}"\n')
    assert run_main("check-config", "--config", str(file)) == 0
    assert capsys.readouterr() == (f"{file}: good\n", "")
    assert run_main("dump-config", "--config", str(file)) == 0
    dumped = capsys.readouterr().out
    assert 'mode = "write-through"' in dumped
    assert run_main("dump-config", "--json", "--config", str(file)) == 0
    assert json.loads(capsys.readouterr().out)["stores"]["a"]["path"] == str(tmp_path)
    file.write_text('[cache]\nsize = "lots"\nsise = 1\n')
    assert run_main("check-config", "--config", str(file)) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert run_main("check-config") == 0
    assert "forebay: warning: no image can be attached" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", Wanted()),
        ("vm1", Wanted("vm1")),
        ("1", Wanted(None, 1)),
        ("0.5 3", Wanted(None, 0.5, 3)),
        ("7", Wanted("7")),
        ("7 2", Wanted("7", 2)),
        ("7 2 3", Wanted("7", 2, 3)),
        ("8 2 3", Wanted("8", 2, 3)),
        ("vm1 500ms", Wanted("vm1", 0.5)),
        ("vm1 2 9", Wanted("vm1", 2, 9)),
    ],
)
def test_stats_tells_names_from_numbers(words: str, wanted: Wanted) -> None:
    assert parse_wanted(words.split(), lambda: ["7", "vm1"]) == wanted


def test_difference_counts_new_disks_and_restarts_in_full() -> None:
    before = [disk("a", read_hits=10, read_misses=0), disk("b", read_hits=10, read_misses=5)]
    after = [
        disk("a", read_hits=13, read_misses=1),
        disk("b", read_hits=2, read_misses=0, origin_read_bytes=3),
        disk("c", read_hits=100, read_misses=0, origin_read_bytes=0),
    ]
    moved = difference(before, after)
    assert (moved["read_hits"], moved["read_misses"]) == (3 + 2 + 100, 1)
    assert moved["reads"] == 4 + 2 + 100
    assert moved["origin_read_bytes"] == 3


def test_rates_are_per_second() -> None:
    before = [disk("a", reads=0, read_bytes=0, writes=0, written_bytes=0)]
    after = [disk("a", reads=100, read_bytes=MIB, writes=4, written_bytes=0, read_hits=930)]
    values = rates("a", before, after, 2.0)
    assert values["reads_per_second"] == 50
    assert values["writes_per_second"] == 2
    assert values["read_bytes_per_second"] == MIB / 2
    assert values["hit_ratio"] == 1.0
    assert rates(None, after, after, 1.0)["hit_ratio"] is None
    assert cli_stats.line(values).split()[:5] == ["50", "2", "0.50", "0.00", "100.0"]
    assert len(cli_stats.line(values)) == len(cli_stats.heading())


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch, then: Any = None) -> Iterator[list[float]]:
    """Time goes on by itself while stats sleeps; `then` is called in each sleep."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if then:
            then(len(slept))
        slept.append(seconds)

    slept: list[float] = []
    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now[0], time=lambda: 1.5e9 + now[0])
    monkeypatch.setattr("forebay.cli.stats.time", clock)
    yield slept


async def test_stats_lines(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    gateway = FakeGateway("a", "b")

    def more(_: int) -> None:
        gateway.disks["a"]["read_hits"] += 100
        gateway.disks["b"]["origin_read_bytes"] += 4 * MIB

    async with served(gateway) as run:
        with no_waiting(monkeypatch, more) as slept:
            assert await forebay(run, "stats", "2", "21") == 0
            assert slept == [2.0] * 21
            lines = capsys.readouterr().out.splitlines()
            assert lines[0].split() == list(cli_stats.HEADINGS)
            assert lines[1].split() == [
                "50",
                "0",
                "-",
                "-",
                "100.0",
                "2.00",
                "0.00",
                "0",
                "0s",
                "2",
            ]
            assert (lines[21], len(lines)) == (lines[0], 23)
            assert await forebay(run, "stats", "a", "2", "2", "--json") == 0
            objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert [o["reads_per_second"] for o in objects] == [50, 50]
            assert {o["name"] for o in objects} == {"a"}
        assert await forebay(run, "stats") == 0
        assert capsys.readouterr().out.splitlines()[1].split()[0] == "a"
        assert await forebay(run, "stats", "b", "--json") == 0
        assert [d["name"] for d in json.loads(capsys.readouterr().out)] == ["b"]


async def test_stats_waits_for_a_daemon_that_is_restarted(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    async with served(FakeGateway("a")) as run:
        socket, away = run / "control.sock", run / "away"

        def restart(number: int) -> None:
            if number == 1:
                socket.rename(away)
            if number == 3:
                away.rename(socket)

        with no_waiting(monkeypatch, restart) as slept:
            assert await forebay(run, "stats", "a", "1", "2", "--json") == 0
        assert len(slept) == 4
    out, err = capsys.readouterr()
    assert [json.loads(line)["seconds"] for line in out.splitlines()] == [1.0, 3.0]
    assert err.count("\n") == 1
    assert "waiting for it" in err


# ------------------------------------------------------------------------------------------ images


async def test_images_are_shown_and_changed(capsys: pytest.CaptureFixture[str]) -> None:
    gateway = FakeGateway("a")
    async with served(gateway) as run:
        assert await forebay(run, "images", "images", "--json") == 0
        assert json.loads(capsys.readouterr().out) == [IMAGE]
        assert await forebay(run, "tag", "images:a.raw", "debian", "lts") == 0
        assert capsys.readouterr().out == "images:a.raw: debian lts\n"
        assert await forebay(run, "untag", "images:a.raw", "lts") == 0
        assert capsys.readouterr().out == "images:a.raw: no tags\n"
        assert await forebay(run, "unpin", "images:a.raw") == 0
        assert capsys.readouterr().out == "images:a.raw: not pinned\n"
        assert await forebay(run, "purge", "images:a.raw", "--older-than", "30d") == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "images:b.raw: freed 3.0M",
        "images:a.raw: kept, in use by web",
        "freed 3.0M of 1 images, 1 kept",
    ]
    assert said.err.startswith("forebay: images:a.raw is kept (in use by web): detach its disks")


async def test_a_boot_trace_is_shown_exported_and_dropped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1060.0)
    gateway = FakeGateway("a")
    async with served(gateway) as run:
        assert await forebay(run, "trace", "show", "images:a.raw") == 0
        assert capsys.readouterr().out.splitlines() == [
            "images:a.raw: 3 boots, the last recorded 1m00s ago",
            "most of them read 1.0M in 1.5s, fetched with 1 requests",
            "kept in a.raw.forebay/trace",
        ]
        assert await forebay(run, "trace", "show", "images:a.raw", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["boots"], told["fits"], told["blocks"]) == (3, True, 16)
        assert await forebay(run, "trace", "export", "images:a.raw") == 0
        assert json.loads(capsys.readouterr().out)["trace"][1] == [1, 1500, 2, 3]
        assert await forebay(run, "trace", "drop", "images:a.raw") == 0
        assert capsys.readouterr().out == "images:a.raw: dropped\n"


async def test_the_boot_of_a_disk_is_told_below_its_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gateway = FakeGateway("a")
    boot = {"trace": "replayed", "state": "over", "read_bytes": 143 * MIB, "ready_percent": 97.2}
    async with served(gateway) as run:
        assert await forebay(run, "status", "a") == 0
        assert "boot" not in capsys.readouterr().out
        gateway.disks["a"]["boot"] = boot
        assert await forebay(run, "status", "a") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "boot read 143M, 97% prefetched; trace: replayed"
        gateway.disks["a"]["boot"] = boot | {"read_bytes": 0, "ready_percent": None}
        assert await forebay(run, "status", "a") == 0
        assert "prefetched" not in capsys.readouterr().out


async def test_a_warm_prints_lines_of_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gateway = FakeGateway()
    gateway.steps, gateway.finish = 3, trio.Event()

    async def finish_later() -> None:
        await trio.sleep(0.3)
        assert gateway.finish is not None
        gateway.finish.set()

    async with served(gateway) as run, trio.open_nursery() as nursery:
        nursery.start_soon(finish_later)
        assert await forebay(run, "warm", "images:a.raw", "1G", "--rate", "1M", "--json") == 0
    *progress, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert {line["total"] for line in progress} == {3 * MIB}
    assert last["result"]["cached_bytes"] == GIB
    assert gateway.calls == [("warm", "images:a.raw", GIB, MIB)]


# -------------------------------------------------------------------------- the command as a whole


def test_every_command_of_the_contract_is_there() -> None:
    contract = (
        "serve attach detach status stats flush mode peer preload xml cache check-config dump-config demo "
        "fuse import libvirt-hook recover resolve takeover images stores warm tag untag pin unpin purge "
        "overlays save commit revert snapshot snapshots rollback drop trace summary hosts doctor handover evacuate "
        "stage stager get set events page reload top"
    )
    assert set(COMMANDS) == set(RUN) == set(contract.split())


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ("status", "status"),
        ("--config flush status a", "status"),
        ("--config=flush --json status", "status"),
        ("--help", None),
        ("--config", None),
    ],
)
def test_command_is_found_before_parsing(argv: str, command: str | None) -> None:
    assert command_in(argv.split()) == command


@pytest.mark.parametrize(
    ("argv", "name", "wait"),
    [
        ("attach --wait vm1 images:x", "vm1", float("inf")),
        ("attach --wait 30s vm1 images:x", "vm1", 30),
        ("attach --wait=2m vm1 images:x", "vm1", 120),
        ("attach vm1 --wait images:x", "vm1", float("inf")),
        ("attach vm1 images:x --wait", "vm1", float("inf")),
        ("attach vm1 images:x --wait 1", "vm1", 1),
        ("attach --wait forever vm1 images:x", "vm1", float("inf")),
        ("attach --wait --overlay vm1 images:x", "vm1", float("inf")),
        ("attach vm1 images:x", "vm1", None),
    ],
)
def test_waiting_without_a_time_takes_no_name(argv: str, name: str, wait: float | None) -> None:
    arguments = build_parser("attach").parse_args(with_wait_closed(argv.split()))
    assert (arguments.name, arguments.image, arguments.wait) == (name, "images:x", wait)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_config(command: str, capsys: Capture) -> None:
    assert run_main(command, "--help") == 0
    assert "--config FILE" in capsys.readouterr().out


def test_help_names_every_command(capsys: Capture) -> None:
    assert run_main("--help") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"(?m)^ +{command} ", out) for command in COMMANDS)


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", "forebay.bash"), ("zsh", "_forebay"), ("tcsh", "forebay.tcsh")]
)
def test_shipped_completions_are_those_of_the_command(shell: str, file: str) -> None:
    made = completion(build_parser(), shell)
    shipped = (ROOT / "config" / "completions" / file).read_text()
    # versions of shtab differ in their shell code, not in what is completed
    options, words = r"--[a-z][a-z-]+", rf"\b(?:{'|'.join(COMMANDS)})\b"
    for pattern in (options, words):
        assert set(re.findall(pattern, made)) == set(re.findall(pattern, shipped)), (
            f"make it anew: forebay --print-completion {shell} > config/completions/{file}"
        )


def test_completion_without_shtab_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("forebay: making a completion script needs shtab")
    assert "config/completions" in told.err
    assert told.err.count("\n") == 1


def test_progress_bar_draws() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with render_progress.progress_bar("flush a", console) as advance:
        advance(MIB, 4 * MIB)
    assert isinstance(console.file, io.StringIO)
    assert "flush a" in console.file.getvalue()
    assert "4.0/4.0 MiB" in console.file.getvalue()


def test_no_progress_bar_where_nothing_is_to_do() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with render_progress.progress_bar("flush a", console) as advance:
        advance(0, 0)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


PROBE = """
import sys
from forebay.cli.main import main
code = main(sys.argv[1:])
heavy = {"pydantic", "rich", "h11", "trio", "anyio", "lmdb", "shtab", "http",
         "email", "ssl", "asyncio", "ipaddress", "forebay_nbd", "forebay_cache"}
if "status" in sys.argv:        # which monitoring asks for often
    heavy |= {"socket", "selectors", "pathlib", "shutil", "subprocess",
              "inspect", "dataclasses", "ast", "tempfile", "logging", "difflib"}
print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "argv", ["status", "status --json", "flush", "xml a --libvirt 9.2", "stats", "mode a wb"]
)
async def test_asking_the_daemon_imports_little(argv: str) -> None:
    async with served(FakeGateway("a")) as run:
        done = await trio.run_process(
            [sys.executable, "-c", PROBE, *argv.split(), "--config", config_for(run)],
            capture_stdout=True,
            capture_stderr=True,
        )
    assert done.stderr.decode() == "0 []\n"


async def test_command_as_a_process(tmp_path: Path) -> None:
    gateway = FakeGateway("a")
    gateway.finish = trio.Event()
    async with served(gateway) as run:
        config = config_for(run)
        word = [sys.executable, "-m", "forebay"]
        done = await trio.run_process(
            [*word, "status"], env=os.environ | {"FOREBAY_CONFIG": config}, capture_stdout=True
        )
        assert done.stdout.decode().splitlines()[1].startswith("a     images:a.raw")
        failed = await trio.run_process(
            [*word, "status", "b", "--config", config], check=False, capture_stderr=True
        )
        assert (failed.returncode, failed.stderr) == (
            1,
            b"forebay: no disk 'b': see 'forebay status'\n",
        )
        flush = await trio.lowlevel.open_process(
            [*word, "flush", "--config", config], stderr=subprocess.PIPE
        )
        await gateway.began.wait()
        flush.send_signal(signal.SIGINT)
        assert flush.stderr is not None
        said = b"".join([part async for part in flush.stderr])
        assert (await flush.wait(), said.count(b"\n")) == (1, 1)
        assert said.startswith(b"forebay: interrupted")
        await gateway.ended.wait()
        assert gateway.cancelled == ["flush"]


async def test_reader_of_the_output_may_leave() -> None:
    async with served(FakeGateway(*(f"disk{n}" for n in range(2000)))) as run:
        words = [sys.executable, "-m", "forebay", "status", "--config", config_for(run)]
        process = await trio.lowlevel.open_process(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        await process.stdout.aclose()
        said = b"".join([part async for part in process.stderr])
        assert (await process.wait(), said) == (1, b"")


def test_nothing_that_is_opened_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """A message to stderr would be written into the file that has its number: the cache, or the index."""
    told = tmp_path / "told"
    probe = (
        "import os, sys; from forebay.cli.main import main; code = main(['dump-config']); "
        "told = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]; "
        "open(sys.argv[1], 'w').write(f'{code} {told}')"
    )
    shell = 'exec "$@" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell, "sh", sys.executable, "-c", probe, str(told)], check=False)
    assert told.read_text() == "0 ['/dev/null', '/dev/null', '/dev/null']"


async def test_a_handover_is_asked_for_each_disk_and_an_evacuation_tells_what_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gateway = FakeGateway("a", "b")
    async with served(gateway) as run:
        prepare = ("handover", "prepare", "a", "b", "--to", "ham2", "--timeout", "1m")
        assert await forebay(run, *prepare) == 0
        assert await forebay(run, "handover", "prepare", "a", "--with-data") == 0
        assert await forebay(run, "handover", "abort", "a") == 0
        assert await forebay(run, "evacuate", "--to", "ham2") == 1
    told = capsys.readouterr()
    assert "a: prepared: host ham2 takes it when the VM writes there" in told.out
    assert "a: the image is here, and stays\nnothing was released\n" in told.out
    assert "forebay: b stays: its VM runs" in told.err
    assert gateway.calls[:2] == [("prepare", "a", "ham2", 60.0), ("prepare", "b", "ham2", 60.0)]
    assert gateway.calls[2] == ("prepare", "a", "", 30.0, "with data")
    assert gateway.calls[-1] == ("evacuate", "ham2", 600.0)
