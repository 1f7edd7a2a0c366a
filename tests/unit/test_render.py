# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import io

import pytest

from forebay.cli.terminal.render import (
    Cell,
    Column,
    hit_percent,
    image_shown,
    images_table,
    key_values,
    megabytes,
    mode_of,
    rate,
    reasons,
    served_table,
    status_table,
    stores_table,
    table,
    total_line,
    wants_colour,
)
from forebay.units import MIB
from unit.control_fake import IMAGE, OTHER_STORE, STORE, disk


def test_columns_are_aligned() -> None:
    columns = (Column("NAME"), Column("SIZE", right=True))
    rows = [[Cell("a"), Cell("20G")], [Cell("longer"), Cell("5")]]
    assert table(columns, rows) == ["NAME    SIZE", "a        20G", "longer     5"]
    assert table(columns, []) == ["NAME  SIZE"]


def test_colour_changes_nothing_but_colour() -> None:
    disks = [disk("a", dirty_bytes=5, state="degraded"), disk("b")]
    plain, coloured = status_table(disks), status_table(disks, colour=True)
    assert not any("\x1b" in line for line in plain)
    assert "\x1b[31mdegraded" in coloured[1]
    assert "\x1b[33m" in coloured[1]
    assert "\x1b" not in coloured[2]


def test_what_disks_on_one_image_share_counts_once_in_the_total() -> None:
    shared = [
        disk(name, image="images:a.raw", cached_bytes=cached * MIB, private_bytes=own * MIB)
        for name, cached, own in (("a", 100, 0), ("b", 103, 3), ("c", 105, 5))
    ]
    other = disk("d", cached_bytes=10 * MIB, dirty_bytes=2 * MIB)
    assert total_line([*shared, other]) == (
        "4 disks on 2 images: 118M cached, what they share counted once, 2.0M dirty"
    )


def test_images_have_one_line_each() -> None:
    never = IMAGE | {"image": "nbd://h/b", "size": 0, "cached_percent": None, "last_used": None}
    lines = images_table([IMAGE, never | {"pinned": False, "tags": []}], 1000 + 3600 * 3)
    assert lines == [
        "IMAGE         FORMAT  SIZE  WARM  PINNED  TAGS        DISKS   USED",
        "images:a.raw  raw     2.0G   50%  yes     debian,lts      1  3h00m",
        "nbd://h/b     raw        0     -  -       -               1      -",
    ]
    narrow = images_table([IMAGE | {"image": "images:" + "deep/" * 30 + "a.raw"}], 1000, width=80)
    assert max(map(len, narrow)) == 80


def test_stores_and_what_is_read_by_their_sockets_have_one_line_each() -> None:
    assert stores_table([STORE, OTHER_STORE]) == [
        "STORE   CLIENTS  IMAGES  SOCKET                           PATH",
        "images        3       1  /run/forebay/stores/images.sock  /mnt/nfs/images",
        "bare          0       0  -                                /mnt/b",
    ]
    coming = {"image": "images:b.raw", "clients": 0, "state": "attaching", "reason": None}
    assert served_table([STORE, OTHER_STORE | {"images": [coming]}]) == [
        "IMAGE              SIZE  STATE      CACHED  HIT%  CLIENTS",
        "images:golden.raw   20G  ready        1.0G  97.0        3",
        "images:b.raw          0  attaching       0     -        0",
    ]


def test_a_scratch_disk_is_named_as_operators_write_it() -> None:
    shown = {
        f"scratch:{20 << 30}": "scratch:20G",
        "scratch:4096": "scratch:4K",
        "scratch:x": "scratch:x",
    }
    shown |= {"images:4096": "images:4096", "scratch:": "scratch:", "/dev/sda": "/dev/sda"}
    assert {image: image_shown(image) for image in shown} == shown


def test_image_is_cut_in_the_middle_to_fit_a_terminal() -> None:
    long = disk("a", image="images:" + "deep/" * 30 + "debian-12.raw")
    heading, line = status_table([long], width=100)
    assert max(len(heading), len(line)) == 100
    assert line.split()[1].startswith("images:deep")
    assert line.split()[1].endswith("debian-12.raw")
    assert "…" in line
    assert "…" not in status_table([long])[1]
    assert status_table([long], width=10)[1].split()[1] == "im…aw"  # never to nothing


def test_where_nothing_is_cut_one_long_image_does_not_widen_every_line() -> None:
    long = "images:" + "deep/" * 500
    heading, line, other = status_table([disk("a", image=long), disk("b", image="images:b.raw")])
    assert long in line
    assert len(heading) < 160
    assert len(other) < 160


@pytest.mark.parametrize("name", ["web1", "n" * 64])
@pytest.mark.parametrize("state", ["ready", "pass-through"])
@pytest.mark.parametrize("overlay", [False, True])
def test_a_disk_fits_a_terminal_of_80_columns(name: str, overlay: bool, state: str) -> None:
    one = disk(
        name,
        image="images:golden-image-debian12.raw",
        mode="write-around",
        overlay=overlay,
        state=state,
    )
    assert max(map(len, status_table([one], width=80))) <= 80


def test_a_locale_without_the_mark_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    lines = status_table([disk("a", image="images:" + "x" * 90)], width=80)
    assert "\n".join(lines).isascii()
    assert "~" in lines[1]


def test_what_others_wrote_moves_no_cursor() -> None:
    hostile = disk("a", image="images:\x1b[2J\r\udcff", state="conflict", reason="by \x1b]0;x\x07")
    text = "\n".join(
        [*status_table([hostile]), *reasons([hostile]), *key_values({"a\x1b": "b\x1b"})]
    )
    assert "\x1b" not in text
    assert text.replace("\n", "").isprintable()
    assert "images:\\x1b[2J\\r\\udcff" in text


@pytest.mark.parametrize(
    ("terminal", "variables", "colour"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colour_is_for_terminals(
    terminal: bool, variables: dict[str, str], colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(terminal) is colour


def test_reasons_are_told() -> None:
    disks = [disk("a", state="degraded", reason="ESTALE"), disk("b", reason=None), disk("c")]
    assert reasons(disks) == ["a: degraded: ESTALE"]


def test_words() -> None:
    assert (hit_percent(0, 0), hit_percent(1, 2), hit_percent(5, 0)) == ("-", "33.3", "100.0")
    assert mode_of(disk("a", read_only=True, overlay=True)) == "write-back,overlay,ro"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.4, "0"), (999, "999"), (999.6, "1.0k"), (12345, "12k"), (999_900, "1.0M")],
)
def test_rate(number: float, text: str) -> None:
    assert rate(number) == text


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0.00"), (3.414, "3.41"), (12.34, "12.3"), (1240, "1240")]
)
def test_megabytes(amount: float, text: str) -> None:
    assert megabytes(amount * MIB) == text


def test_keys_and_values_have_units() -> None:
    values = {"size": 2 * MIB, "used_bytes": 5, "age_seconds": 90, "ok": True, "error": None}
    assert key_values(values) == [
        "size         2.0M (2097152)",
        "used_bytes   5",
        "age_seconds  1m30s",
        "ok           yes",
        "error        -",
    ]
    assert key_values({}) == []
