# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `make bench-boot` keeps, and the tables, bars and picture that follow from it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.boot import svg
from bench.boot.forebay import COLD, REPLAY, WARM
from bench.boot.rows import Row, table
from bench.boot.storms import COPY
from bench.report import fill_between

BENCH = Path(__file__).resolve().parents[1]
KEPT = BENCH / "results" / "boot.json"
BEGIN, END = "<!-- boot: begin -->", "<!-- boot: end -->"

TITLES = {
    "guest": "A real Linux, emulated, until it asks for a login",
    "storm": "Its recorded reads by many guests at once on one host, with the pauses as recorded",
    "fast": "The same with an eighth of the pauses",
    "check": "One host simulated, beside what was measured",
    "hosts": "Four hosts on one store of 4 Gbit/s, simulated",
    "hosts-fast": "The same with an eighth of the pauses",
}
"""Of each section that can be kept, in the order of the page."""
STORM = 100
"""Guests of the storm that bars are about."""
PROCESSORS = 2.0


@dataclass
class Section:
    """One part of the report: rows that were measured in one go, and when."""

    rows: list[Row]
    conditions: str
    distinct: int
    """Bytes of the blocks that one boot reads."""

    def find(self, what: str, vms: int) -> Row | None:
        """The row of one way and so many guests."""
        return next((row for row in self.rows if (row.what, row.vms) == (what, vms)), None)


@dataclass
class Kept:
    """All of it, by the keys of TITLES."""

    sections: dict[str, Section] = field(default_factory=dict)


def load(path: Path = KEPT) -> Kept:
    """What was kept; nothing where there is no such file."""
    if not path.exists():
        return Kept()
    found: dict[str, Any] = json.loads(path.read_text())
    return Kept(
        {
            key: Section(**{**section, "rows": [Row(**row) for row in section["rows"]]})
            for key, section in found.items()
            if key in TITLES
        }
    )


def keep(kept: Kept, path: Path = KEPT) -> None:
    """Write it, and the picture beside it."""
    path.parent.mkdir(exist_ok=True)
    dumped = {key: asdict(kept.sections[key]) for key in TITLES if key in kept.sections}
    path.write_text(json.dumps(dumped, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".svg").write_text(picture(kept))


def markdown(kept: Kept) -> str:
    """All tables."""
    found = []
    for key, title in TITLES.items():
        if key in kept.sections:
            section = kept.sections[key]
            text = table(section.rows, section.distinct)
            found.append(f"{title}.\n\n{text}\n\n{section.conditions}\n")
    rows = [f"| {' | '.join(line)} |" for line in bars(kept)]
    head = "| bar | figure | at most | passed |\n| --- | --- | --- | --- |"
    found.append(f"{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(found)


def bars(kept: Kept) -> Iterator[tuple[str, str, str, str]]:
    """What was asked for, what was found, the bar, and whether it is kept, as far as it was measured."""
    for key, of in (("storm", "pauses as recorded"), ("fast", "an eighth of the pauses")):
        section = kept.sections.get(key)
        if section is None:
            continue
        for what in (COLD, REPLAY, WARM):
            many, one = section.find(what, STORM), section.find(what, 1)
            if many is not None and one is not None:
                title = f"{STORM} at once against one: {what}, {of}"
                yield _bar(title, many.seconds / one.seconds, 1.5, _limit(many, one))
        replay, warm = section.find(REPLAY, 1), section.find(WARM, 1)
        if replay is not None and warm is not None:
            yield _bar(f"cold with replay against warm, {of}", replay.seconds / warm.seconds, 1.15)
        storm = section.find(REPLAY, STORM)
        if storm is not None and storm.store_bytes is not None:
            title = f"bytes from the store, of one boot's: {STORM} with replay, {of}"
            yield _bar(title, storm.store_bytes / section.distinct, 1.02)
        copied = section.find(COPY, STORM)
        if storm is not None and copied is not None:
            yield _bar(
                f"{STORM} with replay against {COPY}, {of}", storm.seconds / copied.seconds, 0.2
            )


def _bar(
    title: str, figure: float, most: float, least: float | None = None
) -> tuple[str, str, str, str]:
    beside = "" if least is None else f" (processors: {least:.2f})"
    return title, f"{figure:.2f}{beside}", f"{most:g}", "yes" if figure <= most else "NO"


def _limit(many: Row, one: Row) -> float | None:
    """What the ratio is at least, as all that computed shares PROCESSORS and the daemon is one of them at most."""
    if many.daemon_cpu is None or many.client_cpu is None:
        return None
    both = (many.daemon_cpu + many.client_cpu) / PROCESSORS
    return max(both, many.daemon_cpu) / one.seconds


def picture(kept: Kept) -> str:
    """A panel for each section."""
    return svg.panels(
        [
            (
                f"{TITLES[key]}: seconds until the last has booted",
                [
                    svg.Bar(_label(row), row.seconds, row.what.startswith("Forebay"))
                    for row in section.rows
                ],
            )
            for key, section in kept.sections.items()
            if key != "check"
        ]
    )


def _label(row: Row) -> str:
    return row.what if row.vms == 1 else f"{row.vms}: {row.what}"


def fill_page(kept: Kept) -> None:
    """Put it into bench/README.md."""
    fill_between(BENCH / "README.md", BEGIN, END, markdown(kept))
