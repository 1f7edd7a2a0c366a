# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How long reads took between two looks, of each disk and of all together."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from forebay_fast.latency import (
    HIT,
    MAX,
    ORIGIN_READ,
    SUM,
    WIDTH,
    Latency,
    difference,
    summary_of,
)

KINDS = {"hit": HIT, "origin_read": ORIGIN_READ}

Figures = dict[str, float]


class Latencies:
    """What was counted at the last look."""

    def __init__(self) -> None:
        self._before: dict[str, list[array[int]]] = {}
        self._counted: dict[str, list[array[int]]] = {}
        self._all = _empty()

    def begin(self) -> None:
        """A look begins: what was seen in the last one is what there was before, and disks that are gone are not."""
        self._before, self._counted, self._all = self._counted, {}, _empty()

    def of(self, name: str, latency: Latency | None) -> Figures:
        """The figures of one disk since the last look; empty where nothing was read."""
        if latency is None:
            return {}
        now = [latency.of(kind) for kind in KINDS.values()]
        before = self._before.get(name)
        self._counted[name] = now
        if before == now:
            return {}
        found = [difference(before[n] if before else None, words) for n, words in enumerate(now)]
        for whole, words in zip(self._all, found, strict=True):
            _add(whole, words)
        return _figures(found)

    def of_all(self) -> Figures:
        """The figures of all disks that were looked at since `begin`."""
        return _figures(self._all)


def _empty() -> list[array[int]]:
    return [array("Q", bytes(8 * WIDTH)) for _ in KINDS]


def _add(whole: array[int], words: Sequence[int]) -> None:
    for n, value in enumerate(words):
        if value:
            whole[n] = max(whole[n], value) if n == MAX else whole[n] + value


def _figures(found: Iterable[Sequence[int]]) -> Figures:
    figures: Figures = {}
    for kind, words in zip(KINDS, found, strict=True):
        if words[SUM]:
            told = summary_of(words)
            figures |= {f"{kind}_{share}": told[share] for share in ("p50_seconds", "p99_seconds")}
    return figures
