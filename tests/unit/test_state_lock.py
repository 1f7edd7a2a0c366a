# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""STATE is one daemon's, and nothing that lies there leads out of it."""

from pathlib import Path

import pytest

from forebay.errors import ForebayError
from forebay.storage import state


def test_a_link_in_the_place_of_the_lock_leads_nowhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of somebody else")
    directory = tmp_path / "state"
    directory.mkdir()
    (directory / "lock").symlink_to(victim)
    with pytest.raises(ForebayError), state.held(directory, None, 0o700):
        pass
    assert victim.read_text() == "of somebody else"
