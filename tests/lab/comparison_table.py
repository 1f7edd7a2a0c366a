# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The table of what the cases of `comparison` found: JSON, and what docs/comparison.md shows of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

COLUMNS = (
    "",
    "cold read",
    "warm read",
    "write",
    "write + flush",
    "server hangs: writes",
    "power cut: what was flushed",
    "its image without the cache",
    "a second host",
)
SPEEDS = ("cold_read", "warm_read", "write", "sync")


class Named(Protocol):
    """A row of the table."""

    @property
    def key(self) -> str: ...

    @property
    def title(self) -> str: ...


def keep(place: Path, rows: Sequence[Named], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Add what was found, by keys of rows, to `comparison.json` in `place`, and write the table anew beside it."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "comparison.json"
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for key, figures in found.items():
        kept.setdefault(key, {}).update(figures)
    file.write_text(json.dumps(kept, indent=2) + "\n")
    (place / "comparison.md").write_text(table(rows, kept))


def table(rows: Sequence[Named], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line([row.title, *cells(found.get(row.key, {}))]) for row in rows]
    return "".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def cells(found: Mapping[str, Any]) -> list[str]:
    """All but the first one of a row; "?" for what was not tried, or did not work."""
    speeds = [
        f"{found[f'{what}_ratio']:.2f}" if f"{what}_ratio" in found else "?" for what in SPEEDS
    ]
    return [*speeds, _hang(found), _cut(found), _alone(found), _second(found)]


def _hang(found: Mapping[str, Any]) -> str:
    if "hang_flushed" not in found:
        return "?"
    if found["hang_flushed"]:
        share = found["hang_flushed"] / max(1, found["hang_before"])
        # the other ones, which stand, leave it more of the processor
        return "go on" if share >= 0.8 else f"go on ({share:.0%} of before)"
    errors = found["hang_errors_after"]
    return f"stand, {errors} errors" if errors else "stand"


def _cut(found: Mapping[str, Any]) -> str:
    cut = found.get("cut")
    if cut is None:
        return "?"
    if "fails" in cut:
        return "cannot be used"
    return f"{cut['lost']} blocks lost" if cut["lost"] else "all there"


def _alone(found: Mapping[str, Any]) -> str:
    alone = found.get("alone")
    if alone is None:
        return "?"
    return f"{alone['unfit']} blocks fit no instant" if alone["unfit"] else "of one instant"


def _second(found: Mapping[str, Any]) -> str:
    if "refused" not in found:
        return "?"
    return "refused" if found["refused"] else "gets it"
