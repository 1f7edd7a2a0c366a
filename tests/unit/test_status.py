# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay status`: which disks need a look, in which order they are, and how narrow they become."""

import json
import random
from typing import Any

import pytest

from forebay.cli.main import main
from forebay.cli.status import trouble
from forebay.cli.terminal.parser import without_json_version
from forebay.cli.terminal.render import status_table
from forebay.disk.state import DiskState
from forebay.units import HEALTHY, TIB, Mode, natural
from unit.control_fake import FakeGateway, disk, served
from unit.test_cli import forebay

Capture = pytest.CaptureFixture[str]


# ----------------------------------------------------------------------------------------------------- what is not fine


@pytest.mark.parametrize("state", DiskState)
def test_every_state_but_those_of_healthy_disks_needs_a_look(state: DiskState) -> None:
    told = trouble(disk("a", state=state.value, reason="why, and what to do"))
    assert told == (None if state in HEALTHY else f"{state}: why, and what to do")


def test_healthy_states_are_states_of_disks() -> None:
    assert set(HEALTHY) < set(DiskState)


@pytest.mark.parametrize(
    ("lag", "differs", "late"),
    [
        (60.0, {}, False),
        (60.1, {}, True),
        (600.0, {"mode": "full-copy"}, False),
        (600.0, {"max_lag_seconds": 0}, False),
        (600.0, {"max_lag_seconds": None}, False),
        (600.0, {"state": "copying"}, True),
    ],
)
def test_a_disk_may_be_behind_for_twice_its_limit(
    lag: float, differs: dict[str, Any], late: bool
) -> None:
    told = trouble(disk("a", lag_seconds=lag, **{"max_lag_seconds": 30.0} | differs))
    assert (told is not None) == late
    assert told is None or told.startswith("lag: the image is ")


def test_a_daemon_that_tells_no_limit_and_no_reason_is_fine() -> None:
    """An older one."""
    assert trouble(disk("a", lag_seconds=600.0)) is None
    assert trouble(disk("a", state="what is to come")) == (
        "what is to come: the log of the daemon says why"
    )


async def test_all_disks_are_fine_or_those_that_are_not_are_listed(capsys: Capture) -> None:
    gateway = FakeGateway("vm1", "vm2", "vm10")
    async with served(gateway) as run:
        assert await forebay(run, "status", "-x") == 0
        assert capsys.readouterr().out == "all disks are fine\n"
        assert await forebay(run, "status", "-x", "--json") == 0
        assert capsys.readouterr().out == "[]\n"
        gateway.disks["vm10"] |= {"state": "conflict", "reason": "two\x1b\nlines"}
        gateway.disks["vm2"] |= {"lag_seconds": 95.0, "max_lag_seconds": 30.0}
        assert await forebay(run, "status", "-x") == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[:3]] == ["NAME", "vm2", "vm10"]
        assert lines[3:] == [
            "",
            "vm2: lag: the image is 1m35s behind, with max_lag 30s: see with 'forebay stats' what the store takes",
            "vm10: conflict: two\\x1b\\nlines",
        ]
        assert await forebay(run, "status", "-x", "--json") == 1
        assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["vm2", "vm10"]
        assert await forebay(run, "status", "vm1", "-x") == 0
        assert capsys.readouterr().out == "vm1 is fine\n"
        assert await forebay(run, "status", "vm10", "--troubled") == 1
        assert capsys.readouterr().out.count("\n") == 4


# ------------------------------------------------------------------------------------------------------ order and width


@pytest.mark.parametrize(
    "wanted",
    [
        ["vm1", "vm2", "vm10", "vm010", "vm11"],
        ["1a", "2", "10", "a", "a1", "a1b2", "a1b10", "b"],
        ["9" * 5000, "1" + "0" * 5000],
        ["", "0", "00", "1"],
        ["x٣", "x٤"],
    ],
)
def test_numbers_in_names_count_as_such(wanted: list[str]) -> None:
    mixed = list(wanted)
    random.Random(1).shuffle(mixed)
    assert sorted(mixed, key=natural) == sorted(wanted, key=natural)
    order = sorted(mixed, key=natural)
    assert order.index(wanted[0]) < order.index(wanted[-1])
    assert [text for text in order if "010" not in text] == [t for t in wanted if "010" not in t]


async def test_tables_and_json_are_in_that_order(capsys: Capture) -> None:
    async with served(FakeGateway("vm10", "vm9", "vm1")) as run:
        for words in (["status"], ["stats"]):
            assert await forebay(run, *words) == 0
            lines = capsys.readouterr().out.splitlines()[1:]
            assert [line.split()[0] for line in lines] == ["vm1", "vm9", "vm10"]
            assert await forebay(run, *words, "--json") == 0
            told = json.loads(capsys.readouterr().out)
            assert [one["name"] for one in told] == ["vm1", "vm9", "vm10"]


@pytest.mark.parametrize("state", DiskState)
def test_the_table_fits_eighty_columns_whatever_is_in_it(state: DiskState) -> None:
    widest = disk(
        "n" * 64, image=f"s:{'i' * 4000}", mode=Mode.WRITE_BACK.value, overlay=True, read_only=True,
        state=state.value, size=1000 * TIB, cached_bytes=1000 * TIB, dirty_bytes=1000 * TIB,
        lag_seconds=86400 * 99 + 3600 * 23, read_hits=1, read_misses=0, clients=9999,
    )  # fmt: skip
    lines = status_table([widest, disk("b")], width=80)
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("n")


# ------------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_the_version_is_told(word: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main([word])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("forebay ")


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        (["status", "--json=1", "vm1"], ["status", "--json", "vm1"]),
        (["status", "--json", "1"], ["status", "--json", "1"]),
        (["warm", "--", "--json=2"], ["warm", "--", "--json=2"]),
        (["warm", "--", "--json=1"], ["warm", "--", "--json=1"]),
    ],
)
def test_the_version_of_json_may_be_asked_for(words: list[str], plain: list[str]) -> None:
    def refused(text: str) -> Any:
        raise AssertionError(text)

    assert without_json_version(words, refused) == plain


@pytest.mark.parametrize("version", ["2", "", "0", "1.0", "\x1b"])
def test_another_version_of_json_is_wrong_usage(version: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["status", f"--json={version}"])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "this forebay writes version 1 of its JSON, --json=1" in err
    assert err.count("\n") == 1
    assert "\x1b" not in err
