# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What `make bench-doors` measures, and what came out: as text, markdown, JSON and a plot."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from bench.report import fill_between
from bench.rows import Bar

BEGIN, END = "<!-- doors: begin -->", "<!-- doors: end -->"
OURS = "FUSE file"
PEER = "nbdfuse"
FAR = ("sshfs aes128-gcm", "sshfs chacha20-poly1305")

Figure = Literal["rate", "cpu"]

RATE_BARS = (Bar(PEER, "at least", 0.9), *(Bar(far, "above", 1.0) for far in FAR))
CPU_BARS = (*(Bar(far, "below", 1.0) for far in FAR),)

COLOURS = {OURS: "#1b6ca8"}
OTHERS = "#b9c0c7"


@dataclass(frozen=True)
class Row:
    """One kind of work. `job` are fio's options; `timed` ones run for a while, the others go over the image once."""

    key: str
    title: str
    job: dict[str, str | int] = field(default_factory=dict)
    timed: bool = False
    writes: bool = False


def _direct(rw: str, block: str, depth: int, jobs: int = 1) -> dict[str, str | int]:
    job: dict[str, str | int] = {"rw": rw, "bs": block, "iodepth": depth}
    return job | {"numjobs": jobs, "ioengine": "libaio", "direct": 1}


ROWS = (
    Row("read", "read in order, 1 MiB", {"rw": "read", "bs": "1M", "ioengine": "psync"}),
    Row(
        "write",
        "write in order, 1 MiB, fsync at the end",
        {"rw": "write", "bs": "1M", "ioengine": "psync", "end_fsync": 1},
        writes=True,
    ),
    Row("direct-read", "O_DIRECT read in order, 1 MiB, depth 4", _direct("read", "1M", 4)),
    Row(
        "direct-write",
        "O_DIRECT write in order, 1 MiB, depth 4",
        _direct("write", "1M", 4),
        writes=True,
    ),
    Row(
        "mixed",
        "O_DIRECT random read and write, 64 KiB, 4 jobs, depth 4",
        _direct("randrw", "64k", 4, 4),
        timed=True,
        writes=True,
    ),
    Row(
        "small", "O_DIRECT random read, 4 KiB, depth 16", _direct("randread", "4k", 16), timed=True
    ),
)


@dataclass(frozen=True)
class Sample:
    """`rate` in MB/s (10^6), `cpu` in milliseconds of all processes for each MB."""

    rate: float
    cpu: float


@dataclass
class Results:
    """One run: `samples` by row key and door, in the order of the rounds."""

    conditions: dict[str, str]
    samples: dict[str, dict[str, list[Sample]]]

    def values(self, row: Row, door: str, figure: Figure) -> list[float]:
        """The figure of each round; none where it was not measured."""
        return [getattr(one, figure) for one in self.samples.get(row.key, {}).get(door, [])]

    def ratio(self, row: Row, peer: str, figure: Figure) -> float | None:
        """The FUSE file's figure over the peer's: the median of the rounds' ratios.

        What disturbs a round disturbs both, so this scatters less than the ratio of the medians.
        """
        ours, theirs = self.values(row, OURS, figure), self.values(row, peer, figure)
        if not ours or not theirs:
            return None
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))

    def doors(self) -> list[str]:
        """All that were measured."""
        return list(dict.fromkeys(door for doors in self.samples.values() for door in doors))


@dataclass(frozen=True)
class Line:
    """The FUSE file against one peer in one row; None: not measured."""

    row: Row
    peer: str
    rate: float | None
    cpu: float | None

    @property
    def verdict(self) -> str:
        if self.rate is None or self.cpu is None:
            return "not measured"
        held = [bar.holds(self.rate) for bar in RATE_BARS if bar.peer == self.peer]
        held += [bar.holds(self.cpu) for bar in CPU_BARS if bar.peer == self.peer]
        return "yes" if all(held) else "NO"

    def limit(self, bars: tuple[Bar, ...]) -> str:
        return ", ".join(f"{bar.kind} {bar.limit:g}" for bar in bars if bar.peer == self.peer)


def lines(results: Results) -> Iterator[Line]:
    """One line for each row that was measured and each peer with a bar."""
    for row in ROWS:
        if row.key in results.samples:
            for peer in (bar.peer for bar in RATE_BARS):
                rate, cpu = (results.ratio(row, peer, figure) for figure in ("rate", "cpu"))
                yield Line(row, peer, rate, cpu)


# -------------------------------------------------------------------------------------------------------- how it looks


HEADER = ("work", "FUSE file against", "throughput", "bar", "CPU", "bar", "passed")


def _cells(line: Line) -> tuple[str, ...]:
    rate, cpu = ("-" if value is None else f"{value:.2f}" for value in (line.rate, line.cpu))
    title = line.row.title if line.peer == PEER else ""
    return title, line.peer, rate, line.limit(RATE_BARS), cpu, line.limit(CPU_BARS), line.verdict


def _both(results: Results, row: Row, door: str) -> str:
    rates, used = results.values(row, door, "rate"), results.values(row, door, "cpu")
    if not rates:
        return "-"
    return f"{statistics.median(rates):.0f} / {statistics.median(used):.2f}"


def text(results: Results) -> str:
    """The ratios for a terminal, with every door's own figures below them."""
    table = [HEADER, *(_cells(line) for line in lines(results))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    body = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    body += ["", "every door: MB/s (smallest and largest round), CPU ms for each MB"]
    for row in ROWS:
        for door in results.samples.get(row.key, {}):
            rates, used = results.values(row, door, "rate"), results.values(row, door, "cpu")
            middle = statistics.median(rates)
            spread = "..".join(f"{(pick(rates) / middle - 1) * 100:+.0f}" for pick in (min, max))
            cpu = statistics.median(used)
            body.append(f"  {row.key:12} {door:24} {middle:6.0f}  {spread + ' %':14} {cpu:6.2f}")
    body += ["", *(f"{name}: {value}" for name, value in results.conditions.items())]
    return "\n".join(body)


def markdown(results: Results) -> str:
    """Two tables for bench/README.md: what each door did, and how the FUSE file compares."""
    doors, kept = results.doors(), results.conditions
    out = [_line("work", *doors), _line(*["---"] * (len(doors) + 1))]
    rows = [row for row in ROWS if row.key in results.samples]
    out += [_line(row.title, *(_both(results, row, door) for door in doors)) for row in rows]
    out += [
        "",
        "MB/s / CPU milliseconds for each MB, of all processes that took part; medians.",
        "",
        _line(*HEADER),
        _line(*["---"] * len(HEADER)),
        *(_line(*_cells(line)) for line in lines(results)),
        "",
        f"`make bench-doors`, {kept['date']}: {kept['rounds']}; {kept['image']}; {kept['machine']};",
        f"{kept['versions']}. Ratios are the medians of each round's ratio.",
    ]
    return "\n".join(out) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------------------------- what is kept


def keep(results: Results, path: Path) -> None:
    """Write `path` (JSON), and .md and .png beside it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
    plot(results, path.with_suffix(".png"))


def load(path: Path) -> Results:
    """A kept run. Raises FileNotFoundError where none was kept."""
    kept = json.loads(path.read_text())
    samples = {
        row: {door: [Sample(**one) for one in taken] for door, taken in doors.items()}
        for row, doors in kept["samples"].items()
    }
    return Results(kept["conditions"], samples)


def fill_readme(readme: Path, results: Results) -> None:
    """Replace what stands between the two marks. Raises ValueError where they are missing."""
    fill_between(readme, BEGIN, END, markdown(results))


def plot(results: Results, path: Path) -> None:
    """Two panels for each row, throughput and CPU: a bar for each door at its median, a dot for each round."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second, and only a kept run needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = [row for row in ROWS if results.samples.get(row.key)]
    figure, axes = plt.subplots(len(rows), 2, figsize=(12, 1.9 * len(rows)), squeeze=False)
    shown: tuple[tuple[Figure, str, str], ...] = (
        ("rate", "MB/s (more is better)", ".0f"),
        ("cpu", "CPU ms/MB (less is better)", ".2f"),
    )
    for row, pair in zip(rows, axes, strict=True):
        doors = list(reversed(results.samples[row.key]))
        for axis, (what, unit, form) in zip(pair, shown, strict=True):
            for place, door in enumerate(doors):
                values = results.values(row, door, what)
                middle = statistics.median(values)
                axis.barh(place, middle, color=COLOURS.get(door, OTHERS))
                axis.plot(values, [place] * len(values), ".", color="#333", markersize=3)
                ink = "#fff" if door in COLOURS else "#000"
                label = f" {middle:{form}}"
                axis.annotate(label, (0, place), va="center", fontsize=8, color=ink)
            axis.set_yticks(range(len(doors)), doors, fontsize=8)
            axis.set_xticks([])
            axis.set_title(f"{row.title}: {unit}", fontsize=8)
    figure.suptitle("One disk through every door: medians, rounds as dots", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
