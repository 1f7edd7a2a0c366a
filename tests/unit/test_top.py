# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay top` without a terminal: what came to pass between two looks, the tables, one after the other."""

import argparse
import json
from collections.abc import Mapping
from typing import Any, cast

import pytest

from forebay.cli import asking
from forebay.cli.main import build_parser
from forebay.cli.watching import tables, top
from forebay.cli.watching.looking import Look, disk_rows, look, rows_of, totals
from forebay.cli.watching.screen import fitted
from forebay.cli.watching.tables import Order
from forebay.client import NoDaemonError
from forebay.units import MIB
from unit.control_fake import CACHE, IMAGE, STORE, SUMMARY, disk


def at(seconds: float, *disks: dict[str, Any]) -> Look:
    return Look(seconds, "disks", list(disks), CACHE)


def grown(name: str, **by: float) -> dict[str, Any]:
    found = disk(name)
    return found | {key: found.get(key, 0) + value for key, value in by.items()}


# -------------------------------------------------------------------------------------------------- between looks


def test_rates_are_those_of_the_time_between_two_looks() -> None:
    before = at(10.0, disk("a"), disk("b"))
    more = {"reads": 300, "read_bytes": 4 * MIB, "read_hits": 30, "read_misses": 10}
    row, other = disk_rows(at(12.0, grown("a", **more), disk("b")), before)
    assert (row["reads_per_second"], row["read_bytes_per_second"]) == (150, 2 * MIB)
    assert row["hit_percent"] == 75.0
    assert (other["reads_per_second"], other["hit_percent"]) == (0, None)
    found = totals(at(12.0, grown("a", **more), disk("b")), before)
    assert (found["read_bytes_per_second"], found["hit_percent"]) == (2 * MIB, 75.0)


@pytest.mark.parametrize(
    "before", [None, at(10.0), at(10.0, grown("a", reads=7)), at(12.0, disk("a"))]
)
def test_of_a_disk_that_is_new_or_began_anew_no_rate_is_told(before: Look | None) -> None:
    row = disk_rows(at(12.0, disk("a")), before)[0]
    assert row["reads_per_second"] is row["hit_percent"] is None
    assert "-" in tables.lines("disks", [row], Order(), 80)[1]


def test_latency_is_told_where_the_daemon_knows_it() -> None:
    known = {"count": 5, "p99_seconds": 0.0000871}
    none = {"count": 0, "p99_seconds": 0}
    rows = disk_rows(
        at(1.0, disk("a", latency={"hit": known, "origin_read": none}), disk("b", latency={})), None
    )
    assert [row["hit_p99_seconds"] for row in rows] == [0.0000871, None]
    assert rows[0]["origin_read_p99_seconds"] is None
    assert " 87us" in tables.lines("disks", rows, Order(), 100)[1]


# ----------------------------------------------------------------------------------------------------- the tables


def names(order: Order, **find: Any) -> list[str]:
    disks = [
        grown("vm10", reads=50),
        disk("vm9", lag_seconds=5.0, dirty_bytes=MIB),
        grown("vm2", read_bytes=7 * MIB, reads=1),
        disk("vm1", state="conflict", reason="somebody else"),
    ]
    before = at(0.0, *(disk(name) for name in ("vm10", "vm9", "vm2", "vm1")))
    options: dict[str, Any] = {"find": "", "troubled": False} | find
    rows = tables.chosen("disks", disk_rows(at(1.0, *disks), before), **options)
    return [row["name"] for row in tables.ordered("disks", rows, order)]


def test_what_needs_a_look_comes_first_then_what_does_most() -> None:
    assert names(Order()) == ["vm1", "vm2", "vm9", "vm10"]


def test_numbers_fall_texts_rise_and_both_turn_round() -> None:
    assert names(Order("NAME")) == ["vm1", "vm2", "vm9", "vm10"]
    assert names(Order("NAME", reverse=True)) == ["vm10", "vm9", "vm2", "vm1"]
    assert names(Order("R/S"))[:2] == ["vm10", "vm2"]
    assert names(Order("LAG"))[0] == "vm9"
    assert names(Order("LAG", reverse=True))[-1] == "vm9"
    assert len(names(Order("HIT%"))) == 4


def test_rows_are_found_by_name_and_by_trouble() -> None:
    assert names(Order("NAME"), find="VM1") == ["vm1", "vm10"]
    assert names(Order(), troubled=True) == ["vm1"]
    assert names(Order(), find="vm2", troubled=True) == []


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("view", tables.VIEWS)
def test_every_table_fits_with_the_longest_names(view: str, width: int) -> None:
    long = disk("n" * 64, image="images:" + "p" * 200, state="handed-over", mode="write-through")
    images: list[Mapping[str, Any]] = [
        IMAGE | {"image": "images:" + "p" * 200, "tags": ["t" * 64, "u" * 64]}
    ]
    stores: list[Mapping[str, Any]] = [
        STORE | {"store": "s" * 64, "path": "/mnt/" + "p" * 200, "state": "away", "reason": "x"}
    ]
    now = Look(1.0, view, [long], CACHE, images, stores)
    lines = tables.lines(view, rows_of(now, None), Order("DIRTY"), width)
    assert len(lines) == 2
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("view", tables.VIEWS)
def test_the_column_by_which_rows_stand_is_marked(view: str) -> None:
    for column in tables.VIEWS[view]:
        for reverse in (False, True):
            heading = tables.lines(view, [], Order(column.heading, reverse), None)[0]
            mark = "v" if column.right != reverse else "^"
            assert f"{column.heading}{mark}" in heading.split()


def test_a_text_that_has_no_room_is_cut_also_where_characters_take_two_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_, **__: "utf-8")
    assert fitted("日本語", 5) == "日本"
    assert fitted("abc", 2) == "ab"
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_, **__: "ascii")
    assert fitted("日b", 5) == "?b"


# ------------------------------------------------------------------------------------------ one table after another


class Daemon:
    """Has read a MiB more at each look, and is gone at some."""

    def __init__(self, *gone: int) -> None:
        self.gone = gone
        self.looks = 0

    def get(self, target: str) -> Any:
        if target == "/disks":
            self.looks += 1
            if self.looks in self.gone:
                raise NoDaemonError("no daemon at /run/x: start it")
            return [grown("vm1", read_bytes=self.looks * MIB)]
        return {"/cache": CACHE, "/images": [IMAGE], "/stores": [STORE], "/summary": SUMMARY}[
            target
        ]


def run(*words: str, daemon: Daemon | None = None) -> int:
    arguments = build_parser("top").parse_args(["top", "-b", "-d", "100ms", *words])
    return top.top(arguments, cast("asking.Daemon", daemon or Daemon()))


def test_as_many_tables_as_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-n", "3") == 0
    out = capsys.readouterr().out
    assert out.count("\nNAME ") == 3
    assert out.count("\nvm1 ") == 3
    assert "\x1b" not in out


@pytest.mark.parametrize("view", tables.VIEWS)
def test_json_is_one_object_a_look(view: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(view, "--json", "-n", "2") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 2
    assert told[0]["view"] == view
    assert len(told[0][view]) == 1
    assert told[1]["totals"]["disks"] == 1
    assert told[1]["totals"]["read_bytes_per_second"] > 0


def test_a_daemon_that_is_restarted_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-n", "2", daemon=Daemon(2, 3, 5)) == 0
    told = capsys.readouterr()
    assert told.out.count("\nvm1 ") == 2
    assert told.err == 2 * "forebay: no daemon at /run/x: start it; waiting for it\n"


def test_no_daemon_at_the_start_is_an_error() -> None:
    with pytest.raises(NoDaemonError):
        run("-n", "1", daemon=Daemon(1))


@pytest.mark.parametrize(
    "words", [["-n", "0"], ["-n", "x"], ["-d", "0"], ["-d", "2d"], ["nothing"], ["-n", "9" * 20]]
)
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2


def test_an_unknown_column_is_told_with_those_that_there_are() -> None:
    with pytest.raises(
        argparse.ArgumentTypeError,
        match="no column 'LAGG' .did you mean 'LAG'.*: use one of NAME, STATE",
    ):
        run("--sort", "LAGG")
    with pytest.raises(argparse.ArgumentTypeError, match="no column 'R/S'"):
        run("images", "--sort", "R/S")


def test_what_a_view_does_not_show_is_not_asked_for() -> None:
    asked = []

    class Asked(Daemon):
        def get(self, target: str) -> Any:
            asked.append(target)
            return super().get(target)

    look(cast("asking.Daemon", Asked()), "disks")
    assert asked == ["/disks", "/cache"]
