# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay hosts` over a fake ssh, a script in PATH that answers as its host is called."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forebay.cli.hosts import answers
from forebay.cli.hosts.ssh import LONGEST_ANSWER, LONGEST_ERROR, Ended, Fleet, Whole
from forebay.cli.main import main
from forebay.config.client import hosts_named
from forebay.config.model import Config
from forebay.errors import ConfigError
from forebay.units import GIB, MIB, parse_host

Capture = pytest.CaptureFixture[str]

SUMMARY: dict[str, Any] = {
    "format": 1,
    "version": "0.1.0",
    "state": "ok",
    "reasons": [],
    "cache": {"device": "/dev/vg0/forebay", "size": 200 * GIB, "used_bytes": 180 * GIB},
    "hit_percent": 97.1,
    "disk_count": 12,
    "dirty_bytes": 8 * MIB,
    "lag_seconds": 2.1,
    "stores": [{"store": "images", "state": "ok", "reason": None}],
    "images": [{"image": "images:debian12.raw", "size": 20 * GIB, "cached_bytes": 10 * GIB}],
}

SSH = r"""#!/bin/sh
here=$(dirname "$0")
for word; do printf '%s\n' "$word"; done > "$here/words"
while [ "$1" != -- ]; do shift; done
host=$2 command=$3
case $host in
  off*) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255;;
  denied*) echo "$host: Permission denied (publickey)." >&2; exit 255;;
  hang*) sleep 1000 & echo $! $$ > "$here/pids.$host"; wait;;
  none*) exit 127;;
  down*) cat "$here/down"; exit 1;;
  flood*) exec cat /dev/zero;;
  chats*) exec yes;;
  cries*) head -c 1000000 /dev/zero | tr '\0' x >&2; echo >&2; echo "the last line" >&2; exit 1;;
  runs*) exec sh -c "$command";;
  *) cat "$here/answer";;
esac
"""


class Bed:
    """The directory of the fake ssh, and what it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer(SUMMARY)
        (folder / "down").write_text(
            json.dumps({"state": "down", "version": "0.1.0", "reasons": ["no daemon at /x"]})
        )
        ssh = folder / "ssh"
        ssh.write_text(SSH)
        ssh.chmod(0o755)

    def answer(self, content: object) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.folder / "answer").write_bytes(text)

    def words(self) -> list[str]:
        """With which the last ssh was called."""
        return (self.folder / "words").read_text().splitlines()


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bed:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = tmp_path / "forebay.toml"
    config.write_text('[hosts]\nnames = ["ham0", "root@ham1"]\n')
    monkeypatch.setenv("FOREBAY_CONFIG", str(config))
    return Bed(tmp_path)


def hosts(*words: str) -> int:
    return main(["hosts", *words])


# ---------------------------------------------------------------------------------------------------------- many hosts


def test_two_hundred_hosts_are_asked_sixteen_at_a_time(bed: Bed) -> None:
    names = [f"ham{n}" for n in range(200)]
    started: list[str] = []

    def sink(host: str) -> Whole:
        started.append(host)
        return Whole()

    fleet = Fleet("x", jobs=16, timeout=60, sink=sink)
    ended: list[Ended] = []
    most, began = 0, time.monotonic()
    for one in fleet.run(names):
        most = max(most, len(started) - len(ended))
        ended.append(one)
    print(f"200 hosts in {time.monotonic() - began:.1f} s")  # shown with -s
    assert most == 16
    assert {one.host for one in ended} == set(names)
    assert {one.out for one in ended} == {(bed.folder / "answer").read_bytes()}


def test_a_host_that_hangs_is_told_when_its_time_is_up_and_holds_up_nobody(bed: Bed) -> None:
    now = 0.0
    names = ["hang1", *(f"ham{n}" for n in range(8))]
    fleet = Fleet("x", jobs=2, timeout=10, clock=lambda: now)
    ended = []
    for one in fleet.run(names):
        ended.append(one)
        if len(ended) == len(names) - 1:
            now = 10.0
    assert [one.host for one in ended if one.late] == ["hang1"]
    assert ended[-1].late
    assert answers.trouble(ended[-1], 10) == ("hangs", "no answer within 10s")
    assert not left(bed, "hang1")


class Slow:
    """Takes in what a host says more slowly than that says more; a second a piece."""

    def __init__(self) -> None:
        self.pieces = 0

    def feed(self, data: bytes) -> None:
        self.pieces += 1
        assert self.pieces < 1000, "nobody looks whether its time is up"
        time.sleep(0.005)

    def taken(self) -> bytes:
        return b""


def test_a_host_that_says_more_and_more_is_told_when_its_time_is_up(bed: Bed) -> None:
    slow = Slow()
    fleet = Fleet("x", jobs=1, timeout=5, sink=lambda _host: slow, clock=lambda: slow.pieces)
    [ended] = fleet.run(["chats"])
    assert ended.late


def left(bed: Bed, host: str) -> list[int]:
    """Of the processes of that host's ssh, those that are still there, after a moment."""
    pids = [int(word) for word in (bed.folder / f"pids.{host}").read_text().split()]
    tries = 100
    while (alive := [pid for pid in pids if _runs(pid)]) and tries:
        tries -= 1
        time.sleep(0.05)
    return alive


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)]
)
def test_a_signal_to_end_ends_all_children(bed: Bed, number: signal.Signals, code: int) -> None:
    command = [
        sys.executable,
        "-m",
        "forebay",
        "hosts",
        "--hosts",
        "hang1,hang2",
        "--timeout",
        "1h",
    ]
    before = signal.signal(number, signal.SIG_DFL)  # as nohup has it, it would be ignored there
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(number, before)
    for name in ("hang1", "hang2"):
        while not (path := bed.folder / f"pids.{name}").exists() or not path.read_text():
            time.sleep(0.02)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode == code
    assert err.startswith("forebay: interrupted: ") is (number == signal.SIGINT)
    assert err.count("\n") <= 1
    assert not left(bed, "hang1") + left(bed, "hang2")


def test_children_do_not_outlive_a_caller_that_stops_to_listen(bed: Bed) -> None:
    fleet = Fleet("x", jobs=2, timeout=None)
    running = fleet.run(["hang1", "ham0", "ham1"])
    assert next(running).host == "ham0"
    while not (path := bed.folder / "pids.hang1").exists() or not path.read_text():
        time.sleep(0.02)
    running.close()
    assert not left(bed, "hang1")


# -------------------------------------------------------------------------------------------------------- what is told


@pytest.mark.usefixtures("bed")
def test_hosts_are_a_table_and_one_that_is_off_is_no_fault(capsys: Capture) -> None:
    assert hosts("--hosts", "ham0,off1") == 0
    heading, ham, off = capsys.readouterr().out.splitlines()
    words = "HOST STATE VERSION CACHE FULL HIT% DISKS DIRTY LAG WHY"
    assert heading.split() == words.split()
    assert ham.split() == ["ham0", "ok", "0.1.0", "180G/200G", "90%", "97.1", "12", "8.0M", "2.1s"]
    assert off.split()[:2] == ["off1", "off"]
    assert "No route to host" in off


@pytest.mark.parametrize(
    ("host", "state", "why"),
    [
        ("denied", "error", "denied: Permission denied (publickey)."),
        ("hang1", "hangs", "no answer within 500ms"),
        ("none", "error", "no command 'forebay' there"),
        ("down", "down", "no daemon at /x"),
        ("flood", "error", "says more than a Forebay daemon has to say"),
        ("cries", "error", "the last line"),
    ],
)
def test_each_trouble_is_told_and_others_are_shown_beside_it(
    bed: Bed, capsys: Capture, host: str, state: str, why: str
) -> None:
    assert hosts("--hosts", f"{host},ham0", "--timeout", "500ms" if host == "hang1" else "1m") == 1
    bad, good = capsys.readouterr().out.splitlines()[1:]
    assert bad.split()[:2] == [host, state]
    assert why in bad
    assert good.split()[:2] == ["ham0", "ok"]
    del bed


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"state": 5}',
        b'{"state": "' + b"x" * 1000 + b'"}',
        b'{"disk_count": -1}',
        b'{"disk_count": NaN}',
        b'{"disk_count": 1e400}',
        b'{"disk_count": true}',
        b'{"disk_count": ' + b"9" * 5000 + b"}",
        b'{"hit_percent": "all"}',
        b'{"cache": []}',
        b'{"images": [{"image": 5}]}',
        b'{"images": {}}',
        json.dumps({"images": [{}] * 10_001}).encode(),
        b'{"reasons": [[]]}',
        b"\xff\xfe",
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_of_that_host(
    bed: Bed, capsys: Capture, answer: bytes
) -> None:
    bed.answer(answer)
    assert hosts("--hosts", "ham0") == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:2] == ["ham0", "error"]


def test_what_a_host_says_moves_no_cursor_and_is_cut(bed: Bed, capsys: Capture) -> None:
    evil = "\x1b[2J\r\n\u202e" + "x" * 100_000
    bed.answer(SUMMARY | {"version": "\x1b[31m1", "reasons": [evil] * 50, "state": "degraded"})
    assert hosts("--hosts", "ham0") == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out
    assert len(out) < 16 * 400
    images = [{"image": "images:\x1b[2Ja\n", "size": 0, "cached_bytes": 5}]
    bed.answer(SUMMARY | {"images": images})
    assert hosts("--hosts", "ham0", "--images") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_answers_are_bounded_in_memory(bed: Bed) -> None:
    (one,) = Fleet("x", jobs=1, timeout=60).run(["flood"])
    assert one.long
    assert len(one.out) <= LONGEST_ANSWER + (1 << 20)
    (one,) = Fleet("x", jobs=1, timeout=60).run(["cries"])
    assert len(one.err) <= LONGEST_ERROR
    del bed


def test_json_has_each_host_in_the_order_in_which_they_were_named(
    bed: Bed, capsys: Capture
) -> None:
    bed.answer(SUMMARY | {"unknown": "\x1b[2J", "format": 7})
    assert hosts("--hosts", "off1,ham0", "--json") == 0
    off, ham = json.loads(capsys.readouterr().out)
    assert (off["host"], off["state"], ham["host"], ham["state"]) == ("off1", "off", "ham0", "ok")
    assert ham["summary"]["disk_count"] == 12
    assert "unknown" not in ham["summary"]


def test_images_are_shown_with_where_they_are_warm(bed: Bed, capsys: Capture) -> None:
    assert hosts("--hosts", "ham0,ham1,off1", "--images") == 0
    heading, line, off = capsys.readouterr().out.splitlines()
    assert heading.split() == ["IMAGE", "SIZE", "WARM", "ON"]
    assert line.split() == ["images:debian12.raw", "20G", "ham0", "50%", "ham1", "50%"]
    assert off.startswith("off1: off: ")
    assert hosts("--hosts", ",".join(f"h{n}" for n in range(20)), "--images") == 0
    assert capsys.readouterr().out.rstrip().endswith("and 12 more")
    del bed


def test_status_shows_the_disks_of_all_hosts(bed: Bed, capsys: Capture) -> None:
    disk = {"name": "vm1", "image": "images:a.raw", "mode": "write-back", "state": "ready"}
    bed.answer([disk | {"size": GIB, "read_hits": 9, "read_misses": 1, "clients": 1}])
    assert hosts("status", "--hosts", "ham0,off1") == 0
    heading, line, off = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["HOST", "NAME", "IMAGE"]
    assert line.split()[:5] == ["ham0", "vm1", "images:a.raw", "1.0G", "write-back"]
    assert off.startswith("off1: off: ")
    assert bed.words()[-1] == "forebay status --json" or bed.words()[-2] == "off1"
    bed.answer([disk | {"state": "conflict", "reason": "somebody has it"}])
    assert hosts("--hosts", "ham0", "status") == 1
    assert "ham0: degraded: vm1: conflict: somebody has it" in capsys.readouterr().out
    bed.answer([disk | {"state": "handed-over", "reason": "its VM moves"}])
    assert hosts("--hosts", "ham0", "status") == 0
    assert "degraded" not in capsys.readouterr().out
    bed.answer([{"name": "x" * 100}])
    assert hosts("status", "--hosts", "ham0", "--json") == 1
    assert json.loads(capsys.readouterr().out)[0]["state"] == "error"


# ---------------------------------------------------------------------------------------------------------------- work


def test_warm_and_flush_tell_of_each_host_and_fail_where_one_does(
    bed: Bed, capsys: Capture
) -> None:
    result = {"image": "x", "size": GIB, "cached_bytes": GIB, "origin_read_bytes": 5 * MIB}
    lines = [json.dumps({"done": 0, "total": GIB}), json.dumps({"result": result})]
    bed.answer("\n".join(lines).encode())
    assert hosts("warm", "images:a b;$(x).raw", "--hosts", "ham0,off1", "--rate", "1M") == 0
    out = capsys.readouterr().out.splitlines()
    assert "ham0: 1.0G of 1.0G cached, 5.0M read" in out
    assert any(line.startswith("off1: off: ") for line in out)
    assert hosts("--hosts", "ham0,none", "warm", "images:a.raw", "2G", "--json") == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"host": "ham0", "done": 0, "total": GIB} in told
    assert {one["host"]: one["state"] for one in told if "state" in one} == {
        "ham0": "done",
        "none": "error",
    }
    bed.answer({"names": [], "written_back_bytes": 8 * MIB, "dirty_bytes": 0})
    assert hosts("flush", "--hosts", "ham0") == 0
    assert capsys.readouterr().out == "ham0: 8.0M written back, nothing is dirty\n"
    assert bed.words()[-1] == "forebay flush --json"
    assert hosts("flush", "--hosts", "cries") == 1
    assert capsys.readouterr().out == "cries: error: the last line\n"


def test_an_image_is_one_word_for_the_shell_of_a_host(bed: Bed, capsys: Capture) -> None:
    planted = bed.folder / "planted"
    forebay = bed.folder / "forebay"
    forebay.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    forebay.chmod(0o755)
    image = f"images:a b'\";touch {planted} $(touch {planted})\n`touch {planted}`"
    hosts("warm", image, "--hosts", "runs1")
    assert not planted.exists()
    (one,) = Fleet(bed_command(image), jobs=1, timeout=60).run(["runs1"])
    assert json.loads(one.out) == ["warm", "--json", "--", image, "all"]
    capsys.readouterr()


def bed_command(image: str) -> str:
    from forebay.cli.hosts.commands import _command

    return _command(["warm", "--json", "--", image, "all"])


# ------------------------------------------------------------------------------------------------------- who is meant


def test_hosts_come_from_the_configuration_a_file_or_the_command(bed: Bed, capsys: Capture) -> None:
    def asked(*words: str) -> list[str]:
        hosts(*words, "--json")
        return [one["host"] for one in json.loads(capsys.readouterr().out)]

    assert asked() == ["ham0", "root@ham1"]
    listed = bed.folder / "list"
    listed.write_text("ham5 ham6 # the new ones\n\n# nobody\nham5\n192.0.2.7\n")
    assert asked("--hosts-file", str(listed)) == ["ham5", "ham6", "192.0.2.7"]
    assert asked("--hosts", "ham9,ham5", "--hosts-file", str(listed))[0] == "ham9"
    assert asked("--hosts", "ham9, ham8,ham9") == ["ham9", "ham8"]


EVIL = [
    "-oProxyCommand=x",
    "-x",
    "--",
    "",
    "a b",
    "a;b",
    "a\nb",
    "$(x)",
    "u@-x",
    "-u@x",
    "a/b",
    "é",
]
EVIL += ["a" * 300, "u@", "@x", "a@b@c", "ssh://x", "a,b", "a'b"]


@pytest.mark.parametrize("name", EVIL)
def test_a_name_never_becomes_an_option_of_ssh(bed: Bed, capsys: Capture, name: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        parse_host(name)
    config = bed.folder / "forebay.toml"
    config.write_text(f"[hosts]\nnames = [{json.dumps(name)}]\n")
    with pytest.raises(ConfigError, match="hosts.names"):
        hosts_named(str(config))
    with pytest.raises(ConfigError, match="hosts.names"):
        Config.load(config)
    if name not in ("", "--", "a,b"):  # no name, the end of our own options, two names
        with pytest.raises(SystemExit) as end:
            hosts(f"--hosts={name}")
        assert end.value.code == 2
    assert not (bed.folder / "words").exists()
    capsys.readouterr()


@pytest.mark.parametrize("name", ["ham0", "ham0.example.org", "192.0.2.1", "::1", "fe80::1%eth0"])
def test_ssh_is_given_hosts_behind_the_end_of_its_options(bed: Bed, name: str) -> None:
    for host in (name, f"root@{name}"):
        assert hosts("--hosts", host, "--json") == 0
        words = bed.words()
        assert words[-3:] == ["--", host, "forebay summary --json"]
        assert "BatchMode=yes" in words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no hosts: name them"),
        (b"ham0\n-x\n", ":2: '-x' is no host"),
        (b"\x00\xff\x1b", ":1: "),
        (b"a" * ((1 << 20) + 1), "longer than 1 MiB"),
        ("\n".join(f"h{n}" for n in range(10_001)).encode(), "10001 hosts are too many"),
    ],
)
def test_a_wrong_list_of_hosts_is_one_line(
    bed: Bed, capsys: Capture, text: bytes, said: str
) -> None:
    listed = bed.folder / "list"
    listed.write_bytes(text)
    assert hosts("--hosts-file", str(listed)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--jobs 0", "argument --jobs: '0' is no number of hosts: use 1 to 256"),
        ("--jobs 257", "use 1 to 256"),
        ("--jobs ²", "use 1 to 256"),
        ("--timeout 0", "argument --timeout: '0' is out of range"),
        ("--timeout 2d", "is out of range"),
        ("warm", "required: IMAGE"),
        ("dance", "no action 'dance'"),
        ("flush images:a", "unrecognized arguments"),
    ],
)
@pytest.mark.usefixtures("bed")
def test_wrong_usage_of_hosts_is_one_line(capsys: Capture, words: str, said: str) -> None:
    with pytest.raises(SystemExit) as end:
        hosts(*words.split())
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_without_ssh_that_is_said(
    bed: Bed, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bed.folder / "ssh").unlink()
    monkeypatch.setenv("PATH", str(bed.folder))
    assert hosts("--hosts", "ham0") == 1
    assert "ssh: No such file or directory" in capsys.readouterr().err
