# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Mounts to which nothing is written back, from mountinfo as kernels write it."""

import os
from pathlib import Path

import pytest

from forebay.origin.mounts import parse, why_not, why_unsafe

NFS = "/mnt/nfs images"
LINE = "98 29 0:{minor} / /mnt/nfs\\040images rw,relatime shared:{minor} - {kind} nas:/export {options}\n"
OTHERS = (
    "29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro\n"
    "30 29 0:26 / /proc rw,nosuid - proc proc rw\n"
    "not a line of this file\n"
)


def mounts(options: str, kind: str = "nfs4") -> str:
    return OTHERS + LINE.format(minor=51, kind=kind, options=options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("rw,vers=4.2,soft,timeo=600,local_lock=none", "'soft'"),
        ("rw,vers=4.2,softerr,timeo=600", "'softerr'"),
        ("rw,vers=3,hard,nolock", "'nolock'"),
        ("rw,vers=3,hard,local_lock=all", "'local_lock=all'"),
        ("rw,vers=3,hard,local_lock=posix", "'local_lock=posix'"),
        ("rw,vers=3,hard,local_lock=none", "'vers=3'"),
    ],
)
@pytest.mark.parametrize("kind", ["nfs", "nfs4"])
def test_a_mount_that_can_lose_writes_is_told_with_what_to_do(
    options: str, word: str, kind: str
) -> None:
    said = why_not(parse(mounts(options, kind)), os.makedev(0, 51))
    assert said is not None
    assert said.startswith("nas:/export is mounted ")
    assert word in said
    assert f"on {NFS}: mount it" in said


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ("rw,vers=4.2,hard,proto=tcp,timeo=600,retrans=2,local_lock=none", "nfs4"),
        ("rw,vers=4.0,hard,local_lock=none", "nfs4"),
        ("rw,vers=4.2,hard,local_lock=flock", "nfs4"),
        ("rw,soft", "ext4"),
        ("rw", "gpfs"),
    ],
)
def test_nothing_is_said_against_others(options: str, kind: str) -> None:
    assert why_not(parse(mounts(options, kind)), os.makedev(0, 51)) is None


def test_an_operator_who_keeps_others_away_needs_no_locks_and_yet_hard() -> None:
    for options, said in (("rw,vers=3,nolock", False), ("rw,nolock,soft", True)):
        found = why_not(parse(mounts(options)), os.makedev(0, 51), locks=False)
        assert bool(found) is said


def test_the_mount_is_that_of_the_file() -> None:
    text = mounts("rw,soft") + LINE.format(minor=52, kind="nfs4", options="rw,hard")
    assert why_not(parse(text), os.makedev(0, 51)) is not None
    assert why_not(parse(text), os.makedev(0, 52)) is None
    assert why_not(parse(text), os.makedev(0, 53)) is None


def test_this_hosts_own_file_is_understood() -> None:
    text = Path("/proc/self/mountinfo").read_text()
    assert len(parse(text)) == len(text.splitlines())
    assert why_unsafe(os.stat("/").st_dev) is None
