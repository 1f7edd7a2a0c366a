# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A store whose mount can lose writes: told by mountinfo, which is a file of the test's own here."""

import os
from pathlib import Path
from unittest import mock

import pytest
import trio

from forebay.errors import ForebayError
from forebay.image.source import Source
from forebay.image.use import Use
from forebay.origin import mounts
from forebay.origin.addresses import FileAddress
from forebay.origin.threads import StoreThreads
from forebay.units import Mode

LINE = "98 29 {major}:{minor} / {point} rw shared:9 - nfs4 nas:/export rw,{option}\n"


@pytest.mark.parametrize(
    "option", ["soft", "softerr", "nolock", "local_lock=all", "vers=3", "hard"]
)
async def test_write_back_to_a_store_that_may_lose_it_is_refused(
    tmp_path: Path, option: str
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "vm.raw").write_bytes(bytes(1 << 20))
    place = store.stat().st_dev
    line = LINE.format(major=os.major(place), minor=os.minor(place), point=store, option=option)
    (tmp_path / "mountinfo").write_text(line)
    image = FileAddress("images", store, "vm.raw")
    with (
        mock.patch.object(mounts, "_MOUNTINFO", tmp_path / "mountinfo"),
        mock.patch.object(mounts, "has_local_locks", return_value=False),  # its locks are good
    ):
        async with trio.open_nursery() as nursery:
            for use in (
                Use("d", "us"),
                Use("o", "us", overlay=True),
                Use("r", "us", read_only=True),
            ):
                source = Source(
                    image, "vm", use, threads=StoreThreads("s"), timeout=30, nursery=nursery
                )
                await source.prepare()
                for mode in Mode:
                    refused = mode in (Mode.WRITE_BACK, Mode.FULL_COPY) and use.writes
                    if refused and option != "hard":
                        with pytest.raises(ForebayError, match=f"'{option}'.*--mode write-through"):
                            source.check_safe(mode)
                    else:
                        source.check_safe(mode)
                await source.release()
