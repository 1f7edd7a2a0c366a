# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What lies beside an image, at each step of the end of a checkpoint."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from forebay.origin.addresses import FileAddress
from forebay.origin.opening import open_image
from forebay.sidecar import redo
from forebay.sidecar.files import read_owner
from forebay.sidecar.marker import Marker
from forebay.sidecar.record import Owner
from forebay.sidecar.takeover import recover_image

AS_OF = "2026-01-02T03:04:05.678+00:00"


@pytest.mark.parametrize("ended", ["by itself", "at the next start", "by recover"])
def test_while_the_journal_goes_the_marker_names_the_instant_already(
    tmp_path: Path, ended: str
) -> None:
    """A power cut in between: an image that shows that instant must not be said to be of an older one."""
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    image = FileAddress("images", tmp_path, "a.raw")
    file = open_image(image, read_only=False)
    me = Owner.of_this_process("a gateway", "d")
    marker = Marker.take(image, file, me)
    sidecar = tmp_path / "a.raw.forebay"
    seen: list[str] = []
    unlink = os.unlink

    def watched(name: str, **where: int) -> None:
        path = Path(f"/proc/self/fd/{where['dir_fd']}") / name
        if name == redo.NAME and path.is_file() and not path.is_symlink():
            seen.append(json.loads((sidecar / "owner").read_text())["as_of"])
        unlink(name, **where)

    try:
        marker.set_state("dirty")
        journal = marker.begin_redo(AS_OF)
        journal.add(0, 4096, [b"1" * 4096])
        marker.commit_redo(journal)
        with mock.patch.object(os, "unlink", watched):
            if ended == "by itself":
                marker.end_redo(AS_OF)
            elif ended == "at the next start":
                marker.close()
                marker = Marker.take(image, file, me)
            else:
                marker.close()
                recover_image(image, file)
        assert seen == [AS_OF]
        assert not list(sidecar.rglob(redo.NAME))
        owner = read_owner(image)
        assert owner is not None
        assert (owner.as_of, owner.state) == (AS_OF, "dirty")
    finally:
        marker.close()
        os.close(file.fd)
