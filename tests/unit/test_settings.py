# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What can be set of a disk while it is served: the table of keys, what is refused, and what the API takes."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from forebay.config.keys import ELSEWHERE, KEYS, parse_change, parse_changes
from forebay.config.model import Config, DiskSettings, Store
from forebay.control.settings import SET
from forebay.daemon.opening import check_configured
from forebay.daemon.record import DiskRecord
from forebay.daemon.settings import Settings
from forebay.errors import ForebayError
from forebay.events.telling import keep_with
from forebay.origin.addresses import resolve
from forebay.units import GIB, Mode

if TYPE_CHECKING:
    from forebay.image.source import Source

TYPED = {
    "mode": ("WB", "write-back"),
    "cache_size": ("1.5G", 3 * GIB // 2),
    "preload": ("trace", "trace"),
    "max_lag": ("10s", 10.0),
    "max_dirty": ("0", 0),
    "origin_timeout": ("500ms", 0.5),
    "iops": (" 500", 500),
    "bps": ("100M", 100 << 20),
    "iops_burst": ("0", 0),
    "bps_burst": ("1G", GIB),
    "weight": ("10000", 10000),
    "slow": ("0", 0.0),
}
"""By key, what somebody writes, and what is on record then."""


def test_every_key_is_a_setting_of_disks_and_of_stores() -> None:
    """And the other way round: what cannot be set like this is said to be set elsewhere."""
    assert set(KEYS) | set(ELSEWHERE) == set(DiskSettings.model_fields)
    assert set(KEYS) <= set(Store.model_fields)


@pytest.mark.parametrize("key", TYPED)
def test_what_is_written_is_what_the_model_makes_of_it(key: str) -> None:
    """The command and the API parse by the table, the configuration by the model: both have to agree."""
    text, wanted = TYPED[key]
    found = parse_changes([f"{key}={text}"])[key]
    assert found == wanted
    settings = DiskSettings.model_validate({key: text})
    assert getattr(settings, key) == found
    assert getattr(DiskSettings.model_validate({key: found}), key) == found, "from the record"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["max_lag"], "no KEY=VALUE"),
        (["=5s"], "no setting ''"),
        (["max_lg=5s"], "did you mean 'max_lag'"),
        (["max_lag=0"], "more than zero"),
        (["max_lag=-1s"], "not a duration"),
        (["max_lag=1e400"], "not a duration"),
        (["cache_size=9E"], "out of range"),
        (["mode=fast"], "not a mode"),
        (["iops=many"], "iops: 'many' is no number of requests: write a whole number"),
        (["iops=1.5"], "whole number"),
        (["weight=0"], "weight: '0' is no weight: write a whole number from 1 to 10000"),
        (["weight=10001"], "from 1 to 10000"),
        (["weight=1e2"], "from 1 to 10000"),
        (["iops=-1"], "whole number"),
        (["iops=1000000001"], "up to 1000000000"),
        ([f"iops={'9' * 5000}"], "at most 64 characters"),
        (["bps=4K"], "too slow: use at least 64 KiB a second"),
        (["peer=any"], "'forebay peer'"),
        (["on_change=refuse"], "in the configuration"),
        (["max_lag=5s", "max_lag=6s"], "twice"),
        (["max_lag=5s", "max_dirty=lots"], "max_dirty: "),
        ([f"{'x' * 5000}=1"], "no setting 'xxx"),
        ([f"max_lag={'9' * 5000}"], "at most 64 characters"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        parse_changes(words)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_an_empty_value_gives_back_what_is_inherited(empty: Any) -> None:
    assert parse_change("max_lag", empty) is None


@pytest.mark.parametrize(
    "value",
    [None, [], "max_lag=5s", {"max_lag": []}, {"max_lag": True}, {"mode": {}}, {"a": 1}],
)
def test_the_api_refuses_what_is_no_object_of_settings(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        SET["settings"](value)


class Records:
    """The first change is kept, the second one is not."""

    def __init__(self) -> None:
        self.changes: list[tuple[DiskRecord, DiskRecord]] = []

    async def change(self, _name: str, was: DiskRecord, now: DiskRecord) -> None:
        self.changes.append((was, now))
        if len(self.changes) > 1:
            raise ForebayError("the index cannot be written")


@pytest.mark.expect_log("may be on record")
async def test_what_cannot_be_put_back_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The mode cannot be entered, and nor can the record be as it was: a restart would find what was refused."""
    record, records = DiskRecord("s:a", "s:a", 0), Records()
    adopted: list[DiskSettings] = []

    async def set_mode(_mode: Mode, _progress: object) -> None:
        raise OSError(5, "no")

    modes = SimpleNamespace(check_may_enter=lambda _mode, _settings: None)
    disk = SimpleNamespace(settings=DiskSettings(), mode=Mode.WRITE_THROUGH, modes=modes)
    disk.adopt, disk.set_mode = adopted.append, set_mode
    attached = SimpleNamespace(name="vm1", record=record, disk=disk, check_serves=lambda: None)
    attached.source = SimpleNamespace(address=SimpleNamespace(store=None))

    class Disks:
        @asynccontextmanager
        async def turn_attached(self, _name: str) -> AsyncIterator[SimpleNamespace]:
            yield attached

    settings = Settings(Config(), cast("Any", Disks()), cast("Any", records))
    with keep_with((kept := list[dict[str, Any]]()).append), pytest.raises(OSError, match="no"):
        await settings.set("vm1", {"mode": "none"}, lambda _done, _total: None)
    assert records.changes[1] == (record, record)
    assert attached.record is record
    (event,) = kept
    assert (event["kind"], event["disk"], event["ok"]) == ("setting", "vm1", False)
    assert "the index cannot be written" in caplog.text


def test_the_record_keeps_what_was_set_and_forgets_what_is_given_back() -> None:
    config = Config(
        defaults=DiskSettings(max_lag=5.0), stores={"s": Store(path=Path("/s"), max_dirty=7)}
    )
    record = DiskRecord("s:a", "s:a", 0, mode="write-back")

    def settings(record: DiskRecord) -> Mapping[str, Any]:
        again = DiskRecord.read(record.write())
        assert again == record, "it comes back after a restart"
        return again.settings(config, "s").model_dump()

    changed = record.with_settings({"max_lag": 9.0, "cache_size": GIB, "mode": None})
    assert settings(changed)["max_lag"] == 9.0
    assert settings(changed)["cache_size"] == GIB
    assert settings(changed)["mode"] is Mode.WRITE_THROUGH
    assert settings(changed)["max_dirty"] == 7
    back = changed.with_settings({"max_lag": None, "cache_size": None})
    assert settings(back)["max_lag"] == 5.0
    assert back == record.with_settings({"mode": None})


def test_keys_of_another_version_on_record_are_passed_over() -> None:
    record = DiskRecord.read({**DiskRecord("s:a", "s:a", 0).write(), "said": {"of_tomorrow": 1}})
    config = Config(stores={"s": Store(path=Path("/s"))})
    assert record.settings(config, "s") == config.disk_settings("s")


def test_an_attach_that_meets_a_reload_gets_no_image_that_is_not_configured_any_more() -> None:
    record = DiskRecord("s:a", "", 0)
    before = Config(stores={"s": Store(path=Path("/s"))})
    source = cast("Source", SimpleNamespace(address=resolve(before, "s:a")))
    check_configured(before, record, source)
    with pytest.raises(ForebayError, match="try again"):
        check_configured(Config(stores={"s": Store(path=Path("/t"))}), record, source)
    with pytest.raises(ForebayError, match="no store 's'"):
        check_configured(Config(), record, source)
