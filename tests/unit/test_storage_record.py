# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where the cache's device is looked for."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from forebay.config.model import Config
from forebay.config.sections import GatewaySection
from forebay.storage import lvm
from forebay.storage import record as storage_record
from forebay.storage.record import (
    Kind,
    VolumeRecord,
    VolumeState,
    locate,
    locate_volume,
    read_record,
    write_record,
)
from forebay_cache import CacheError
from forebay_cache.states import IllegalMove

VOLUME = "9r8r3t-zuDm-4JGT-SuTy-CXV1-CPTL-eGmczS"
OTHER = "Wq3h5D-0001-NnTL-cCvB-J1cE-4SDV-vEYQbF"
GROUP = "FFP3SZZ91N8Y1G4YVuu9EgO9Qoyp881t"
RECORD = VolumeRecord(Kind.LVM, "/dev/vg0/forebay", "a218481b", VolumeState.READY, "vg0", VOLUME)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys with two logical volumes and a disk, as recorded; `lvm` is never asked."""
    for number, (name, uuid) in enumerate(
        [
            ("vg0-other", f"LVM-{GROUP}{OTHER}"),
            ("vg0-new", f"LVM-{GROUP}{VOLUME}"),
            ("x", "CRYPT-1"),
        ]
    ):
        directory = tmp_path / f"class/block/dm-{number}/dm"
        directory.mkdir(parents=True)
        (directory / "uuid").write_text(uuid.replace("-", "").replace("LVM", "LVM-") + "\n")
        (directory / "name").write_text(name + "\n")
    monkeypatch.setattr(storage_record, "_SYS", tmp_path)
    monkeypatch.setattr(lvm, "caches", lambda: pytest.fail("lvm was asked"))
    return tmp_path


def test_the_kernel_knows_a_renamed_volume(kernel: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon's user need not be root for that."""
    assert locate_volume(RECORD, None) == "/dev/mapper/vg0-new"
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.expect_log("was on /dev/vg0/forebay and is on /dev/mapper/vg0-new now: correct")
def test_a_configuration_that_has_the_old_name_is_told(kernel: Path) -> None:
    assert locate_volume(RECORD, Path("/dev/vg0/forebay")) == "/dev/mapper/vg0-new"


def test_what_a_block_device_is(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number: the name in /dev may be any."""
    node = Path("/dev/loop0") if Path("/dev/loop0").is_block_device() else Path("/dev/vda")
    if not node.is_block_device():
        pytest.skip("no block device here to look at")
    number = node.stat().st_rdev
    directory = kernel / f"dev/block/{os.major(number)}:{os.minor(number)}/dm"
    directory.mkdir(parents=True)
    (directory / "uuid").write_text(f"LVM-{GROUP}{VOLUME.replace('-', '')}\n")
    assert locate_volume(RECORD, node) == str(node)
    (directory / "uuid").write_text(f"LVM-{GROUP}{OTHER.replace('-', '')}\n")
    assert storage_record.volume_behind(node) == OTHER.replace("-", "")


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    for state in (VolumeState.CREATING, VolumeState.READY, VolumeState.REMOVING):
        record = replace(RECORD, state=state)
        write_record(tmp_path, record)
        assert read_record(tmp_path) == record
    write_record(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_as_it_always_was(tmp_path: Path) -> None:
    write_record(tmp_path, replace(RECORD, state=VolumeState.CREATING))
    assert json.loads((tmp_path / "device.json").read_text()) == {
        "kind": "lvm",
        "path": "/dev/vg0/forebay",
        "uuid": "a218481b",
        "state": "creating",
        "group": "vg0",
        "volume": VOLUME,
        "place": None,
    }


def test_a_volume_that_is_ready_was_created(tmp_path: Path) -> None:
    """What is on record before is looked at: a record cannot claim what never happened."""
    with pytest.raises(IllegalMove, match="unrecorded must not become ready"):
        write_record(tmp_path, RECORD)
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"kind": "lvm"}', '{"what": 1}', '{"kind": "x", "path": "/x", "uuid": ""}',
     '{"kind": "lvm", "path": "/x", "uuid": "", "state": "x"}'],
)  # fmt: skip
def test_a_record_that_is_not_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "device.json").write_text(text)
    with pytest.raises(CacheError, match=r"device\.json: cannot be understood: remove it"):
        read_record(tmp_path)


def test_a_file_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    config = Config(gateway=GatewaySection(state=tmp_path))
    assert locate(config) == tmp_path / "cache.img", "the embedded default is"
    record = VolumeRecord(Kind.FILE, str(tmp_path / "gone"), "a218481b", VolumeState.CREATING)
    write_record(tmp_path, record)
    write_record(tmp_path, replace(record, state=VolumeState.READY))
    with pytest.raises(CacheError, match="gone: no such file: bring it back"):
        locate(config)
