# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Polls that are in vain stop, and are tried again later."""

from forebay_nbd.server.polling import LOST_IN_A_ROW, WAITS_WITHOUT, Polling


def learned(*, soon: bool = True) -> Polling:
    polling = Polling()
    polling.slept(soon=soon)
    return polling


def test_there_is_a_poll_only_behind_a_short_wait() -> None:
    assert not Polling().pays()
    assert learned().pays()
    assert not learned(soon=False).pays()


def test_polls_that_bring_requests_go_on() -> None:
    polling = learned()
    for _ in range(10 * WAITS_WITHOUT):
        assert polling.pays()
        polling.won()


def test_after_some_lost_in_a_row_there_are_none_for_a_while_and_then_again() -> None:
    polling = learned()
    for _ in range(3):
        for _ in range(LOST_IN_A_ROW):
            assert polling.pays()
            polling.lost()
        for _ in range(WAITS_WITHOUT):
            assert not polling.pays()
            polling.slept(soon=True)
    assert polling.pays()


def test_one_that_brings_a_request_begins_the_row_anew() -> None:
    polling = learned()
    for _ in range(10):
        for _ in range(LOST_IN_A_ROW - 1):
            assert polling.pays()
            polling.lost()
        assert polling.pays()
        polling.won()
