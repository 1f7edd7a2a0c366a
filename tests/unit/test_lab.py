# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the lab's cases rest on: stamps, the wire that is cut after a call, steps that are kept, a table."""

import json
import socket
import struct
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from lab.build import sources
from lab.case import Case, chosen
from lab.comparison_table import COLUMNS, keep
from lab.debian import closure
from lab.guest.stamps import (
    BLOCK,
    SECTOR,
    content,
    newest,
    place,
    steps_of,
    survey,
    verdict,
)
from lab.nfs_calls import call_of
from lab.steps import ROOT, Builder, Step
from lab.wire import Wire

SEQUENCE = struct.pack(">I", 53) + bytes(32)
PUTFH = struct.pack(">II", 22, 5) + b"abcde\0\0\0"
SAVEFH, RENAME, WRITE = (struct.pack(">I", operation) for operation in (32, 29, 38))


def frame(operations: bytes, count: int, port: int = 2049, kind: int = 0) -> bytes:
    """An Ethernet frame with one NFS call, its operations as given."""
    tag = struct.pack(">I", 3) + b"tag\0"
    credentials = struct.pack(">II", 1, 6) + bytes(8)
    verifier = struct.pack(">II", 0, 0)
    call = struct.pack(">IIIIII", 1, kind, 2, 100003, 4, 1) + credentials + verifier
    call += tag + struct.pack(">II", 2, count) + operations
    record = struct.pack(">I", 1 << 31 | len(call)) + call
    tcp = struct.pack(">HHIIBBHHH", 700, port, 0, 0, 5 << 4, 0, 0, 0, 0) + record
    head = struct.pack(">BBHHHBBH8x", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0)
    return bytes(12) + b"\x08\x00" + head + tcp


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (frame(SEQUENCE + PUTFH + WRITE, 3), "WRITE"),
        (frame(SEQUENCE + PUTFH + SAVEFH + PUTFH + RENAME, 5), "RENAME"),
        (frame(SEQUENCE, 1), None),
        (frame(SEQUENCE + PUTFH + WRITE, 3, port=111), None),
        (frame(SEQUENCE + PUTFH + WRITE, 3, kind=1), None),
        (frame(SEQUENCE + PUTFH, 3), None),
        (b"", None),
        (bytes(60), None),
    ],
)
def test_a_call_is_named_by_what_it_does_to_a_file(given: bytes, name: str | None) -> None:
    assert call_of(given) == name


def test_a_wire_is_cut_right_after_a_call_and_mended(tmp_path: Path) -> None:
    wire = Wire(tmp_path, ("s", "h"))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as host,
    ):
        for end, sock in (("s", server), ("h", host)):
            sock.bind(str(wire.machines(end)))
            sock.connect(str(wire.own(end)))
            sock.settimeout(20)
        wire.start()
        cut = wire.cut_after("h", 2)
        write = frame(SEQUENCE + PUTFH + WRITE, 3)
        for sent in (write, b"no call", write):
            host.send(sent)
            assert server.recv(1 << 16) == sent
        assert cut.wait(20)
        host.send(b"lost")
        server.send(b"lost as well")
        while wire.dropped != {"h": 1, "s": 1}:
            time.sleep(0.001)  # no event tells of a frame that is dropped
        wire.mend()
        host.send(b"arrives")
        assert server.recv(1 << 16) == b"arrives"
        server.send(b"arrives as well")
        assert host.recv(1 << 16) == b"arrives as well"
        assert wire.calls == [("h", "WRITE")] * 2
        wire.close()


def test_stamps_show_what_is_lost_torn_or_foreign() -> None:
    blocks, seed, last = 32, 7, 40
    image = bytearray(blocks * BLOCK)
    for step in range(1, last + 1):
        first, count = place(seed, step, blocks)
        image[first * BLOCK : (first + count) * BLOCK] = content(seed, step, first, count)

    def read(offset: int, length: int) -> bytes:
        return bytes(image[offset : offset + length])

    want = newest(seed, last, blocks)
    assert survey(read, seed, blocks) == [{step} for step in want]
    written = next(block for block, step in enumerate(want) if step)
    at = written * BLOCK
    image[at : at + SECTOR] = bytes(SECTOR)
    assert survey(read, seed, blocks)[written] == {0, want[written]}
    assert steps_of(bytes(image[at : at + BLOCK]), seed, written + 1) == {0, -1}
    assert steps_of(bytes(image[at : at + BLOCK]), seed + 1, written) == {0, -1}


def counted(found: list[set[int]], flushed: int) -> dict[str, int]:
    told = verdict(found, 7, flushed, flushed + 1)
    return {what: count for what, count in told.items() if what != "examples" and count}


def test_the_verdict_counts_what_was_flushed_and_is_not_there() -> None:
    want = newest(7, 40, 32)
    never, once = want.index(0), next(block for block, step in enumerate(want) if step)
    whole = [{step} for step in want]
    assert counted(whole, 40) == {"instant": 40}

    def changed(block: int, steps: set[int]) -> dict[str, int]:
        return counted([*whole[:block], steps, *whole[block + 1 :]], 40)

    assert changed(once, {0}) == {"lost": 1, "unfit": 1, "instant": 40}
    assert changed(once, {-1}) == {"lost": 1, "foreign": 1, "unfit": 1, "instant": 40}
    assert changed(once, {0, want[once]}) == {"lost": 1, "torn": 1, "unfit": 1, "instant": 40}
    # the block was another's before, and is still
    assert changed(never, {-1}) == {"foreign": 1, "unfit": 1, "instant": 40}
    assert changed(never, {50})["future"] == 1


def test_a_step_is_made_again_when_its_inputs_or_those_before_change(tmp_path: Path) -> None:
    made: list[str] = []

    def run(first: str, second: str) -> list[str]:
        made.clear()
        builder = Builder(tmp_path, lambda _: None)
        for name, inputs in (("one", first), ("two", second)):
            builder.run(Step(name, inputs, lambda into: made.append(into.name)))
        return made

    assert run("a", "b") == ["one", "two"]
    assert run("a", "b") == []
    assert run("a", "c") == ["two"]
    assert run("x", "c") == ["one", "two"]


def test_modules_come_after_those_that_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "kernel/a-b.ko: kernel/c.ko kernel/d.ko\nkernel/c.ko: kernel/d.ko\nkernel/d.ko:\nkernel/e.ko:\n"
    )
    assert closure(tmp_path, ["a_b", "builtin"]) == ["kernel/d.ko", "kernel/c.ko", "kernel/a-b.ko"]


def test_cases_are_chosen_by_words() -> None:
    cases = [Case("red one", lambda _: None), Case("blue two", lambda _: None, short=False)]
    assert chosen(cases, []) == cases[:1]
    assert chosen(cases, ["all"]) == cases
    assert chosen(cases, ["two", "three"]) == cases[1:]


def test_a_machine_gets_all_that_the_product_is_built_from() -> None:
    """And nothing that was made here: its core is the one that its own `make install` compiles."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = [ROOT / name for name in project["targets"]["wheel"]["packages"]]
    wanted = {
        path for package in packages for path in package.rglob("*.p*") if path.suffix != ".pyc"
    }
    taken = set(sources())
    assert (
        wanted | {ROOT / "hatch_build.py", ROOT / "requirements.lock", ROOT / "fast" / "build.py"}
        <= taken
    )
    assert set(ROOT.glob("requirements*.lock")) <= taken
    assert not {path for path in taken if path.suffix in {".so", ".c"}}


class Row(NamedTuple):
    key: str
    title: str


def test_what_two_cases_found_stands_in_one_table(tmp_path: Path) -> None:
    rows = [Row("a", "one"), Row("b", "other"), Row("c", "broken")]
    keep(tmp_path, rows, {"a": {"warm_read_ratio": 3.456, "sync_ratio": 0.5}, "c": {"fails": "no"}})
    more = {
        "a": {
            "hang_before": 40, "hang_flushed": 20, "hang_errors_after": 0, "cut": {"lost": 0},
            "alone": {"unfit": 0}, "refused": True,
        },
        "b": {
            "hang_before": 40, "hang_flushed": 0, "hang_errors_after": 3, "cut": {"lost": 7},
            "alone": {"unfit": 9}, "refused": False,
        },
    }  # fmt: skip
    keep(tmp_path, rows, more)
    assert json.loads((tmp_path / "comparison.json").read_text())["a"]["sync_ratio"] == 0.5
    _, _, one, other, broken = (tmp_path / "comparison.md").read_text().splitlines()
    cells = "| one | ? | 3.46 | ? | 0.50 | go on (50% of before) | all there | of one instant | refused |"
    assert one == cells
    assert "| stand, 3 errors | 7 blocks lost | 9 blocks fit no instant | gets it |" in other
    assert broken.count("?") == len(COLUMNS) - 1
