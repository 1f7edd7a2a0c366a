# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whatever goes wrong at one disk, no other notices: a row for each fault, made in isolation_rows.py.

One daemon lives through as many rows as it can. In each of them one disk of each mode, and an overlay, are read all the
time, and have to answer in time and rightly, and to stay `ready`; the control API has to answer; the daemon's memory
has a bound, and its log no traceback that does not belong to the row.
"""

import os
import re
from collections.abc import Iterator

import pytest

from real.isolation_bed import NEIGHBOURS, Bad, Bed, Round
from real.isolation_rows import KNOWN, ROWS, Row

LEAST_ROWS = 60


class Beds:
    """The bed that lives; a new one where the last was broken by a row."""

    def __init__(self) -> None:
        self.bed: Bed | None = None
        self.idle: Round | None = None

    def get(self) -> tuple[Bed, Round]:
        """A bed, and what was seen in it while nothing was wrong."""
        if self.bed is None or self.idle is None:
            self.bed = Bed()
            self.bed.start()
            with self.bed.round(0.5) as found:
                pass
            [self.idle] = found
            print("idle:", self.idle.line())
        return self.bed, self.idle

    def drop(self) -> None:
        if self.bed is not None:
            self.bed.remove()
        self.bed = None


@pytest.fixture(scope="module")
def beds() -> Iterator[Beds]:
    found = Beds()
    yield found
    found.drop()


def test_there_are_enough_rows_and_no_two_are_the_same() -> None:
    names = {row.id for row in ROWS}
    assert len(names) == len(ROWS)
    assert len(_chosen()) >= LEAST_ROWS
    assert names >= KNOWN.keys()


def _chosen() -> list[Row]:
    """One row for each fault, of one disk mode after the other; all rows if FOREBAY_ISOLATION_ALL is set."""
    if os.environ.get("FOREBAY_ISOLATION_ALL"):
        return ROWS
    by_fault: dict[tuple[str, str], list[Row]] = {}
    for row in ROWS:
        by_fault.setdefault((row.what, row.fault), []).append(row)
    return [rows[number % len(rows)] for number, rows in enumerate(by_fault.values())]


def _param(row: Row) -> object:
    why = KNOWN.get(row.id)
    marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
    return pytest.param(row, id=row.id, marks=marks)


@pytest.mark.parametrize("row", [_param(row) for row in _chosen()])
def test_a_fault_of_one_disk_is_noticed_by_no_other(beds: Beds, row: Row) -> None:
    bed, idle = beds.get()
    try:
        _run(bed, idle, row)
    except BaseException:
        print(bed.gateway.log_text()[-4000:])
        beds.drop()
        raise


def _run(bed: Bed, idle: Round, row: Row) -> None:
    logged = bed.gateway.log.stat().st_size
    bad = Bad(bed, row.store, row.mode, row.size, row.overlay)
    if row.id in KNOWN:
        bad.patience = 3.0
    try:
        if row.attached:
            bad.make_ready(dirty=row.dirty)
        with bed.round(row.seconds) as found:
            row.do(bad)
            bad.wait_shown(row.shows)
        [seen] = found
        print(f"{row.id}: {bad.shown()}: {seen.line()}")
        bed.check(seen, idle)
        row.back(bad)
        bad.is_well()
        bed.check_neighbours()
    finally:
        bad.remove()
    loud = [line for line in bed.log_since(logged) if not (row.log and re.search(row.log, line))]
    assert not loud, "\n".join(loud)
    assert set(bed.status()) == set(NEIGHBOURS)
