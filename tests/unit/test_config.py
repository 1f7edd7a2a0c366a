# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

import grp
import re
import tomllib
from pathlib import Path

import pytest

from forebay.config import client as client_config
from forebay.config.client import run_directory
from forebay.config.model import Config, ConfigError, DiskSettings, Mode
from forebay.config.sections import BLOCK_SIZES, LONGEST_RUN
from forebay.errors import ForebayError
from forebay.units import GIB

ROOT = Path(__file__).resolve().parents[2]

CONTRACT = """
[gateway]
state = "/var/lib/forebay"
run = "/run/forebay"
socket_group = "kvm"
socket_mode = "0660"

[cache]
device = "/dev/vg0/forebay"
size = "20 GiB"
block_size = "64 KiB"

[defaults]
mode = "write-through"
cache_size = "0"
preload = "0"
max_lag = "30s"
max_dirty = "1 GiB"

[stores.images]
path = "/mnt/nfs/images"
mode = "write-back"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "forebay.toml"


def load(file: Path, text: str) -> Config:
    file.write_text(text)
    return Config.load(file)


def faults(file: Path, text: str) -> list[str]:
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        Config.load(file)
    assert str(refused.value).splitlines() == refused.value.faults
    return [fault.removeprefix(f"{file}:") for fault in refused.value.faults]


# --------------------------------------------------------------------------------- what is right


def test_the_contract_is_read(file: Path) -> None:
    config = load(file, CONTRACT)
    assert config.gateway.state == Path("/var/lib/forebay")
    assert config.gateway.socket_mode == 0o660
    assert config.cache_device == Path("/dev/vg0/forebay")
    assert (config.cache.size, config.cache.block_size) == (20 * GIB, 65536)
    assert config.defaults == DiskSettings()
    assert config.stores["images"].path == Path("/mnt/nfs/images")
    assert config.source == file


def test_defaults_work_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOREBAY_CONFIG", raising=False)
    monkeypatch.setattr(client_config, "DEFAULT_CONFIG", str(tmp_path / "absent.toml"))
    config = Config.load()
    assert config.source is None
    assert config.cache_device == Path("/var/lib/forebay/cache.img")
    assert config.defaults.mode is Mode.WRITE_THROUGH
    assert run_directory() == str(config.gateway.run) == "/run/forebay"


def test_group_kvm_is_the_default_and_may_be_missing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = grp.getgrnam("root")

    def none(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(grp, "getgrnam", lambda name: root)
    assert Config().gateway.socket_group == "kvm"
    monkeypatch.setattr(grp, "getgrnam", none)
    assert Config().gateway.socket_group is None
    written = load(file, "[gateway]\nsocket_group = 'kvm'\n")
    assert written.gateway.socket_group is None
    assert "no group 'kvm' on this host" in written.warnings()[0]


def test_disk_inherits_from_its_store_and_the_store_from_the_defaults(file: Path) -> None:
    config = load(
        file,
        '[defaults]\nmax_lag = "5s"\nmax_dirty = "2G"\n'
        '[stores.a]\npath = "/a"\nmode = "wb"\nmax_dirty = "3G"\npreload = "trace"\n',
    )
    settings = config.disk_settings("a", {"max_dirty": 7, "mode": None, "cache_size": "1G"})
    assert settings == DiskSettings(
        mode=Mode.WRITE_BACK, max_lag=5, max_dirty=7, cache_size=GIB, preload="trace"
    )
    assert config.disk_settings(None) == DiskSettings(max_lag=5, max_dirty=2 * GIB)


def test_wrong_override_is_one_line(file: Path) -> None:
    with pytest.raises(ForebayError, match="^mode: 'fast' is not a mode"):
        Config().disk_settings(None, {"mode": "fast"})
    with pytest.raises(ForebayError, match="^no store 'image'.*did you mean 'images'"):
        load(file, CONTRACT).disk_settings("image")


def test_file_is_found(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[gateway]\nrun = "/named"\n')
    other = tmp_path / "other.toml"
    other.write_text('[gateway]\nrun = "/variable"\n')
    monkeypatch.setenv("FOREBAY_CONFIG", str(other))
    assert str(Config.load().gateway.run) == run_directory() == "/variable"
    assert str(Config.load(file).gateway.run) == run_directory(file) == "/named"
    monkeypatch.delenv("FOREBAY_CONFIG")
    monkeypatch.setattr(client_config, "DEFAULT_CONFIG", str(file))
    assert str(Config.load().gateway.run) == run_directory() == "/named"


@pytest.mark.parametrize(
    "text",
    [
        "",
        CONTRACT,
        '[stores."a.b"]\npath = "/a \\"b\\" ü\\u007f"\npreload = "all"\n[stores.c]\npath = "/c"\n',
        '[origins]\nnbd = ["nbd://a/*", "b"]\n[defaults]\nmax_lag = "0.1s"\nmax_dirty = 4097\n',
        '[gateway]\nsocket_mode = "600"\nsocket_owner = "root"\ncontrol_group = "root"\n',
    ],
)
def test_dump_reads_back_equal(file: Path, text: str) -> None:
    config = load(file, text)
    dumped = config.to_toml()
    again = load(file, dumped)
    assert again == config
    assert again.to_toml() == dumped


def test_dump_tells_the_defaults() -> None:
    dumped = tomllib.loads(Config().to_toml())
    assert dumped["cache"] == {"size": "20 GiB", "block_size": "64 KiB", "timeout": "30s"}
    assert dumped["defaults"]["max_lag"] == "30s"
    assert dumped["gateway"]["socket_mode"] == "0660"


def test_shipped_file_shows_every_key_with_its_default(file: Path) -> None:
    shipped = (ROOT / "config" / "forebay.toml").read_text()
    assert load(file, shipped).to_toml() == Config().to_toml()
    shown = re.sub(r"(?m)^#(?=[a-z_]+ = |\[)", "", shipped)
    examples = (
        "purge_after",
        "socket ",
        "socket_owner",
        "socket_group",
        "socket_peers",
        "door_group",
        "control_group",
        "device ",
        "nbd",
        "devices",
        "https",
        "ca_file",
        "owner",
        "group",
        "names",
        "listen",
        "tls_certificate",
        "tls_key",
    )
    for key in (*examples, "path", 'mode = "write-back', 'max_lag = "10s'):
        shown = re.sub(rf"(?m)^{key}.*$", "", shown)
    shown = re.sub(r"\[stores.*\]", "", shown)
    assert load(file, shown).to_toml() == Config().to_toml()
    keys = set(re.findall(r"(?m)^#?([a-z_]+) = ", shipped))
    sections = (
        Config().gateway,
        Config().cache,
        Config().defaults,
        Config().origins,
        Config().fuse,
        Config().hosts,
        Config().metrics,
        Config().staging,
    )
    assert keys == {"path", "purge_after", "socket"}.union(
        *(type(section).model_fields for section in sections)
    )


def test_warnings_name_what_is_missing(file: Path, tmp_path: Path) -> None:
    group = '[gateway]\nsocket_group = "root"\n'
    assert "add a [stores.NAME]" in load(file, group).warnings()[0]
    [warning] = load(file, group + '[stores.a]\npath = "/no/such"\n').warnings()
    assert warning.startswith("stores.a.path: /no/such is no directory now")
    assert load(file, group + f'[stores.a]\npath = "{tmp_path}"\n').warnings() == []


# --------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[gatway]", "1: gatway: unknown section (did you mean 'gateway'?): known are gateway"),
        ("[gateway]\nstat = 1", "2: gateway.stat: unknown key (did you mean 'state'?): known"),
        ("[cache]\n\nmax_dirty = 1", "3: cache.max_dirty: unknown key here: it belongs in [defaul"),
        ("mode = 'wb'", "1: mode: unknown key here: it belongs in [defaults] or [stores.NAME]"),
        ("gateway = 5", "1: gateway: must be a section"),
        ("stores = 5", "1: stores: must be a section"),
        ("[stores]\nimages = '/a'", "2: stores.images: must be a section"),
        ("[gateway]\nrun = 5", "2: gateway.run: must be a path in quotes"),
        ("[gateway]\nrun = 'run'", "2: gateway.run: 'run' is not an absolute path: begin it with"),
        ("[gateway]\nsocket_mode = 660", "2: gateway.socket_mode: 660 is not a file mode: write"),
        ("[gateway]\nsocket_mode = '0888'", "2: gateway.socket_mode: '0888' is not a file mode"),
        ("[gateway]\nsocket_owner = 'rooot'", "2: gateway.socket_owner: no user 'rooot' on this"),
        ("[gateway]\nsocket_group = 'rooot'", "2: gateway.socket_group: no group 'rooot' on th"),
        ("[gateway]\ncontrol_group = ''", "2: gateway.control_group: no group '' on this host"),
        ("[cache]\nsize = '20 GB'", "2: cache.size: '20 GB' is not a size: units are binary"),
        ("[cache]\nsize = 1.5", "2: cache.size: 1.5 is not a size: write 64K"),
        ("[cache]\nsize = '1K'", "2: cache.size: 1 KiB is too small: use at least 4 MiB"),
        ("[cache]\ntimeout = '0.5s'", "2: cache.timeout: 0.5s is not possible: use 1s to 600s"),
        ("[cache]\ntimeout = '11m'", "2: cache.timeout: 660s is not possible: use 1s to 600s"),
        ("[cache]\nblock_size = '12K'", "2: cache.block_size: 12 KiB is not supported: use 64 K"),
        ("[defaults]\nmode = 'writebck'", "2: defaults.mode: 'writebck' is not a mode (did you "),
        ("[defaults]\nmode = 5", "2: defaults.mode: 5 is not a mode: use one of none, write-"),
        ("[defaults]\nmax_lag = '0s'", "2: defaults.max_lag: must be more than zero"),
        ("[defaults]\nmax_lag = true", "2: defaults.max_lag: True is not a duration"),
        ("[defaults]\npreload = 'boot'", "2: defaults.preload: 'boot' is not a size: write 64K"),
        ("[stores.a]\nmode = 'wb'", "1: stores.a.path: is required: add it"),
        ("[stores.'a b']\npath = '/a'", "1: stores.a b: 'a b' is not a name: use 1 to 64 o"),
        (
            "[stores.nbd]\npath = '/a'",
            "1: stores.nbd: 'nbd' cannot name a store, nbd: begins a URI",
        ),
        ("[stores.a]\npath='/a'\n[stores.b]\npath='/a/'", "1: stores: 'a' and 'b' are the same d"),
        (
            "[stores.a]\npath = '/a'\non_change = 'stop'",
            "3: stores.a.on_change: 'stop' is not known",
        ),
        ("[stores.a]\npath = '/a'\nsize = 1", "3: stores.a.size: unknown key"),
        ('[stores."a.b"]\npath = 5', "2: stores.a.b.path: must be a path in quotes"),
        ("[origins]\nnbd = 'nbd://*'", "2: origins.nbd: must be a list, as"),
        ("[origins]\nnbd = [1]", "2: origins.nbd.0: must be text in quotes"),
    ],
)
def test_fault_has_line_path_and_suggestion(file: Path, text: str, fault: str) -> None:
    [found] = faults(file, text)
    assert found.startswith(fault)


def test_every_fault_is_told_at_once(file: Path) -> None:
    text = """
[gateway]
socket_mod = "0660"
run = "relative"
[cache]
size = "lots"
[defaults]
mode = "writebak"
max_lag = "soon"
[stores.images]
mode = 5
["stores"."b c"]
path = 7
"""
    found = faults(file, text)
    assert [fault.split(": ")[:2] for fault in found] == [
        ["3", "gateway.socket_mod"],
        ["4", "gateway.run"],
        ["6", "cache.size"],
        ["8", "defaults.mode"],
        ["9", "defaults.max_lag"],
        ["10", "stores.images.path"],
        ["11", "stores.images.mode"],
        ["12", "stores.b c"],
        ["13", "stores.b c.path"],
    ]


def test_run_must_leave_room_for_a_socket(file: Path) -> None:
    longest = "/" + "r" * (LONGEST_RUN - 1)
    assert str(load(file, f"[gateway]\nrun = '{longest}'").gateway.run) == longest
    [fault] = faults(file, f"[gateway]\nrun = '{longest}r'")
    assert "too long for a Unix socket" in fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("\n[cache]\nsize = 20 GiB\n", "3: not TOML: Expected newline or end of document"),
        ("mode = write-back\n", "1: not TOML: Invalid value: 'mode = write-back': text needs qu"),
        ("[cache\nsize = 1\n", "1: not TOML: Expected ']'"),
        ("[cache]\n[cache]\n", "2: not TOML: Cannot declare"),
        ("a = [1,\n", "1: not TOML: "),
    ],
)
def test_syntax_fault_has_a_line(file: Path, text: str, fault: str) -> None:
    assert faults(file, text)[0].startswith(fault)


def test_file_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    for path, said in (
        (file, "no such file: create it"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        for reader in (Config.load, run_directory):
            with pytest.raises(ConfigError, match=f"^{path}: {said}"):
                reader(path)
    file.write_bytes(b'x = "\xff"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        Config.load(file)


@pytest.mark.parametrize("text", ["gateway = 5", "[gateway]\nrun = 5", "[gateway]\nrun = 'a'"])
def test_command_refuses_a_run_that_it_cannot_use(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match="see 'forebay check-config'"):
        run_directory(file)


def test_command_does_not_mind_faults_elsewhere(file: Path) -> None:
    file.write_text("[cache]\nsize = 'lots'\n[gateway]\nrun = '/r'\n")
    assert run_directory(file) == "/r"


def test_block_sizes_are_powers_of_two() -> None:
    assert all(size & (size - 1) == 0 for size in BLOCK_SIZES)
