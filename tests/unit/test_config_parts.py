# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The configuration in several files: `conf.d/*.toml` beside the one that is named; and taken anew."""

import os
from pathlib import Path

import pytest

from forebay.config import client as client_config
from forebay.config import parts
from forebay.config.client import hosts_named, run_directory
from forebay.config.model import FIXED, Config, ConfigError, Mode


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir()
    path = tmp_path / "forebay.toml"
    path.write_text('[defaults]\nmax_lag = "5s"\n[stores.a]\npath = "/a"\nmode = "wb"\n')
    return path


def part(file: Path, name: str, text: str) -> Path:
    path = file.parent / "conf.d" / name
    path.write_text(text)
    return path


def faults(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        Config.load(file)
    return refused.value.faults


def test_tables_are_merged_and_the_later_file_holds(file: Path) -> None:
    late = part(file, "20-b.toml", '[defaults]\nmax_lag = "7s"\n[stores.a]\nmax_dirty = "1G"\n')
    early = part(file, "10-a.toml", '[defaults]\nmax_lag = "6s"\npreload = "all"\n')
    part(file, ".30-hidden.toml", "[defaults]\nmax_lag = 1\n")
    part(file, "40-other.txt", "no TOML\n")
    config = Config.load(file)
    assert config.defaults.max_lag == 7
    assert config.defaults.preload == "all"
    assert config.stores["a"].mode is Mode.WRITE_BACK
    assert config.stores["a"].max_dirty == 1 << 30
    assert config.files == [file, early, late]
    said = [line for line in config.warnings() if "this one holds" in line]
    assert said == [
        f"{early}: defaults.max_lag: is in {file} as well: this one holds",
        f"{late}: defaults.max_lag: is in {early} as well: this one holds",
    ]


def test_a_list_is_one_value(file: Path) -> None:
    part(file, "a.toml", '[origins]\nnbd = ["nbd://a/*"]\n')
    part(file, "b.toml", '[origins]\nnbd = ["nbd://b/*"]\n')
    assert Config.load(file).origins.nbd == ["nbd://b/*"]


def test_each_fault_names_the_file_and_the_line_that_it_is_in(file: Path) -> None:
    first = part(file, "a.toml", '\n[defaults]\nmax_lgg = "6s"\n[stores.b]\nmode = "wb"\n')
    second = part(file, "b.toml", '[stores.a]\nmode = "fast"\n')
    found = faults(file)
    assert [line.split(": ")[0] for line in found] == [f"{first}:3", f"{first}:4", f"{second}:2"]
    assert [line.split(": ")[1] for line in found] == [
        *("defaults.max_lgg", "stores.b.path", "stores.a.mode")
    ]


def test_all_files_that_cannot_be_read_are_told(file: Path) -> None:
    one, two = part(file, "a.toml", "a = b\n"), part(file, "b.toml", "")
    two.write_bytes(b"\xff")
    gone = file.parent / "conf.d" / "c.toml"
    gone.symlink_to("nowhere")
    found = faults(file)
    assert [line.split(":")[0] for line in found] == [str(one), str(two), str(gone)]


@pytest.mark.timeout(20)
def test_what_is_no_plain_file_is_refused_and_not_waited_for(file: Path) -> None:
    os.mkfifo(file.parent / "conf.d" / "a.toml")
    (file.parent / "conf.d" / "b.toml").mkdir()
    assert ["plain file" in line for line in faults(file)] == [True, True]


def test_there_is_a_bound(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.toml", "b.toml", "c.toml"):
        part(file, name, "")
    monkeypatch.setattr(parts, "MOST_PARTS", 2)
    assert "use at most 2" in faults(file)[0]
    monkeypatch.setattr(parts, "MOST_PARTS", 3)
    monkeypatch.setattr(parts, "LONGEST", 10)
    assert "longer than" in faults(file)[0]


def test_a_file_of_nothing_but_brackets_is_refused(file: Path) -> None:
    part(file, "a.toml", "a = " + "[" * 50_000)
    assert len(faults(file)) == 1


def test_a_table_in_one_file_may_be_a_value_in_another(file: Path) -> None:
    part(file, "a.toml", "stores = 3\n")
    assert "stores" in faults(file)[0]
    part(file, "b.toml", '[stores.c]\npath = "/c"\n')
    assert list(Config.load(file).stores) == ["c"]


def test_the_command_finds_the_daemon_by_all_of_them(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(file, "a.toml", '[gateway]\nrun = "/elsewhere"\n[hosts]\nnames = ["h"]\n')
    assert run_directory(file) == str(Config.load(file).gateway.run) == "/elsewhere"
    assert hosts_named(file) == ["h"]
    monkeypatch.delenv("FOREBAY_CONFIG", raising=False)
    monkeypatch.setattr(client_config, "DEFAULT_CONFIG", str(file))
    file.unlink()
    assert run_directory() == str(Config.load().gateway.run) == "/elsewhere"
    wrong = part(file, "b.toml", "[gateway]\nrun = 7\n")
    with pytest.raises(ConfigError, match=f"{wrong}: gateway.run"):
        run_directory()


# -------------------------------------------------------------------------------------------------------- taken anew


def test_one_object_follows_the_files(file: Path) -> None:
    config = Config.load(file).at(state=Path("/there"), run=None)
    stores = config.stores
    part(
        file,
        "a.toml",
        '[stores.b]\npath = "/b"\n[defaults]\nmax_lag = "9s"\n[cache]\nsize = "1G"\n',
    )
    new = config.again()
    assert new.gateway.state == Path("/there")
    assert config.changed(new, FIXED) == ["cache.size"]
    assert config.changed(new, ["defaults"]) == ["defaults.max_lag"]
    assert (config.defaults.max_lag, config.stores) == (5, stores)
    config.follow(new)
    assert config.defaults.max_lag == 9
    assert list(config.stores) == ["a", "b"]
    assert config.cache.size == 20 << 30, "until the next start"
    assert config.files == new.files


def test_a_wrong_file_changes_nothing(file: Path) -> None:
    config = Config.load(file)
    before = config.model_dump()
    part(file, "a.toml", "[defaults]\nmax_lag = 0\n")
    with pytest.raises(ConfigError, match=r"max_lag"):
        config.again()
    assert config.model_dump() == before
