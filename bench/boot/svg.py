# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Panels of bars below each other, as SVG."""

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LABELS, FIGURES = 960, 330, 90
LINE, BAR, GAP, HEAD = 19, 13, 14, 30
COLOURS = {True: "#1b6ca8", False: "#b9c0c7"}


class Bar(NamedTuple):
    """A bar of so many seconds. `is_ours` is what is looked at, the others are what it is compared with."""

    label: str
    seconds: float
    is_ours: bool


def panels(parts: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """The picture: (title, bars) for each panel, which has a scale of its own."""
    lines, y = [], GAP
    for title, bars in parts:
        lines.append(f'<text x="{GAP}" y="{y + 14}" font-weight="bold">{escape(title)}</text>')
        y += HEAD
        longest = max((bar.seconds for bar in bars), default=1.0) or 1.0
        for bar in bars:
            length = (WIDTH - LABELS - FIGURES) * bar.seconds / longest
            base = y + BAR - 2
            lines += [
                f'<text x="{LABELS - 8}" y="{base}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect x="{LABELS}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[bar.is_ours]}"/>',
                f'<text x="{LABELS + length + 6:.1f}" y="{base}">{bar.seconds:.1f} s</text>',
            ]
            y += LINE
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12">'
    paper = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, paper, *lines, "</svg>"]) + "\n"
