# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What operators wish of the handover of a disk, two at once."""

import pytest

from forebay.errors import ForebayError
from forebay.handover.wishes import Wishes
from real.commands_bed import nothing


def test_who_comes_second_takes_nothing_from_who_came_first() -> None:
    wishes, told = Wishes(), list[tuple[str, int]]()
    with wishes.wish("vm1", "ham2", lambda done, _total: told.append(("first", done))):
        with wishes.wish("vm1", "", lambda done, _total: told.append(("second", done))):
            wishes.advance(1, 2)
            assert not wishes.allow("ham3")
        wishes.advance(2, 2)
        assert (wishes.allow("ham2"), wishes.allow("ham3")) == (True, False)
    assert told == [("first", 1), ("second", 1), ("first", 2)]
    assert wishes.allow("ham3")


def test_two_hosts_at_once_are_refused() -> None:
    wishes = Wishes()
    with wishes.wish("vm1", "ham2", nothing):
        with (
            pytest.raises(ForebayError, match="'vm1' is being prepared for host ham2 already"),
            wishes.wish("vm1", "ham3", nothing),
        ):
            pass
        assert wishes.allow("ham2")
