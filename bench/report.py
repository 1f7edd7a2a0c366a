# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What came out: medians and ratios against the bar, as text, markdown, JSON and a plot."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure import Sample
from bench.rows import CONSTANTS, ROWS, Bar, Field, Row

PAGE = Path(__file__).resolve().parent / "README.md"
"""The page that holds the tables of the last kept runs, between two marks each."""

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"

COLOURS = {"forebay": "#1b6ca8"}
PEER_COLOUR = "#b9c0c7"


@dataclass
class Results:
    """One run: `samples` by row key and server."""

    conditions: dict[str, str]
    samples: dict[str, dict[str, list[Sample]]]
    skipped: dict[str, str] = field(default_factory=dict)

    def median(self, row: Row, server: str) -> float | None:
        """The median of the row's figure over all rounds; a constant's own value; None if not measured."""
        if server in CONSTANTS:
            return CONSTANTS[server]
        values = [
            getattr(sample, row.measures)
            for sample in self.samples.get(row.key, {}).get(server, [])
        ]
        return statistics.median(values) if values else None

    def cpu(self, row: Row, server: str) -> float | None:
        """The median of the server's CPU microseconds per request."""
        samples = self.samples.get(row.key, {}).get(server, [])
        values = [sample.cpu_us_per_request for sample in samples if sample.cpu_us_per_request]
        return statistics.median(values) if values else None

    def spread(self, row: Row, server: str) -> str:
        """Smallest and largest round in percent of the median."""
        values = [
            getattr(sample, row.measures)
            for sample in self.samples.get(row.key, {}).get(server, [])
        ]
        if len(values) < 2:
            return ""
        middle = statistics.median(values)
        low, high = (round((value / middle - 1) * 100) for value in (min(values), max(values)))
        return f"{low:+d}..{high:+d} %"


@dataclass(frozen=True)
class Line:
    """Forebay against one peer in one row."""

    row: Row
    bar: Bar
    forebay: float | None
    peer: float | None
    cpu_forebay: float | None
    cpu_peer: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.forebay / self.peer if self.forebay is not None and self.peer else None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "skipped" if self.note else "not measured"
        return "yes" if self.bar.holds(self.ratio) else "NO"


def lines(results: Results) -> Iterator[Line]:
    """One line for each bar, in the order of the rows; rows that were not asked for are left out."""
    for row in ROWS:
        if row.key not in results.samples and row.key not in results.skipped:
            continue
        for bar in row.bars:
            yield Line(
                row,
                bar,
                results.median(row, "forebay"),
                results.median(row, bar.peer),
                results.cpu(row, "forebay"),
                results.cpu(row, bar.peer),
                results.skipped.get(row.key, ""),
            )


def shown(value: float | None, measures: Field) -> str:
    """The value with its unit, three digits."""
    if value is None:
        return "-"
    match measures:
        case "iops":
            return f"{value / 1000:.3g}k IOPS" if value < 1e6 else f"{value / 1e6:.3g}M IOPS"
        case "bytes_per_second":
            return f"{value / 1e9:.2f} GB/s" if value >= 1e9 else f"{value / 1e6:.0f} MB/s"
        case "mean_us" | "p50_us" | "p99_us":
            return f"{value:.3g} µs" if value < 1000 else f"{value:.0f} µs"
        case "seconds":
            return f"{value:.3f} s"
        case "megabytes":
            return f"{value:.0f} MB"


def _cpu(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


HEADER = ("work", "Forebay", "against", "", "ratio", "bar", "passed", "CPU µs/request")


def _cells(line: Line) -> tuple[str, ...]:
    return (
        line.row.title,
        shown(line.forebay, line.row.measures),
        line.bar.peer,
        shown(line.peer, line.row.measures),
        "-" if line.ratio is None else f"{line.ratio:.2f}",
        f"{line.bar.kind} {line.bar.limit:g}",
        line.verdict,
        f"{_cpu(line.cpu_forebay)} / {_cpu(line.cpu_peer)}",
    )


LIMITS = ("forebay", "C, one thread", "C, a thread each")
"""Columns of the table of limits."""


def limits(results: Results) -> Iterator[tuple[str, ...]]:
    """For each row that was measured on servers in C, too: its title, and each figure with CPU µs per request."""
    for row in ROWS:
        if not set(LIMITS) <= set(results.samples.get(row.key, {})):
            continue
        figures = (shown(results.median(row, server), row.measures) for server in LIMITS)
        spent = (_cpu(results.cpu(row, server)) for server in LIMITS)
        yield (row.title, *(" / ".join(cell) for cell in zip(figures, spent, strict=True)))


def text(results: Results) -> str:
    """The table for a terminal, the conditions and all other figures below it."""
    table = [HEADER, *(_cells(line) for line in lines(results))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    body = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    body += ["", "every server: median (smallest and largest round), CPU µs per request"]
    for row in ROWS:
        for server in results.samples.get(row.key, {}):
            value = shown(results.median(row, server), row.measures)
            cpu = _cpu(results.cpu(row, server))
            body.append(
                f"  {row.key:14} {server:16} {value:>12}  {results.spread(row, server):14} {cpu:>6}"
            )
    titles = {row.key: row.title for row in ROWS}
    body += [f"skipped: {titles[key]}: {reason}" for key, reason in results.skipped.items()]
    body += ["", *(f"{name}: {value}" for name, value in results.conditions.items())]
    return "\n".join(body)


def markdown(results: Results) -> str:
    """The table for bench/README.md."""
    heads = [name or "its figure" for name in HEADER]
    out = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    out += [f"| {' | '.join(_cells(line))} |" for line in lines(results)]
    if beside := list(limits(results)):
        heads = ["work", "Forebay", *LIMITS[1:]]
        out += ["", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        out += [f"| {' | '.join(cells)} |" for cells in beside]
    kept = results.conditions
    versions = f"Python {kept['python']}, {kept['nbdkit']}, {kept['qemu']}, {kept['fio']}"
    out += [
        "",
        f"`make bench`, {kept['date']}: {kept['rounds']}; {kept['image']}; {kept['disk']};",
        f"{kept['machine']}; {versions}.",
        "CPU is the server's, Forebay's before the peer's. Where the figure is a time or a size, less is better.",
    ]
    return "\n".join(out) + "\n"


def keep(results: Results, path: Path) -> None:
    """Write `path` (JSON), and .md and .png beside it."""
    path.parent.mkdir(exist_ok=True)
    dumped = {
        "conditions": results.conditions,
        "skipped": results.skipped,
        "samples": {
            row: {
                server: [sample.dump() for sample in samples] for server, samples in servers.items()
            }
            for row, servers in results.samples.items()
        },
    }
    path.write_text(json.dumps(dumped, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
    plot(results, path.with_suffix(".png"))


def load(path: Path) -> Results:
    """A kept run. Raises FileNotFoundError where none was kept."""
    kept = json.loads(path.read_text())
    samples = {
        row: {
            server: [Sample(**sample) for sample in samples] for server, samples in servers.items()
        }
        for row, servers in kept["samples"].items()
    }
    return Results(kept["conditions"], samples, kept["skipped"])


def fill_readme(readme: Path, results: Results) -> None:
    """Replace what stands between the two marks. Raises ValueError where they are missing."""
    fill_between(readme, BEGIN, END, markdown(results))


def fill_between(page: Path, begin: str, end: str, table: str) -> None:
    """Put `table` between two marks of a page. Raises ValueError where they are missing."""
    before, opening, rest = page.read_text().partition(begin)
    _, closing, after = rest.partition(end)
    if not (opening and closing):
        raise ValueError(f"{page}: no {begin} ... {end}: put them where the table belongs")
    page.write_text(f"{before}{begin}\n{table}{end}{after}")


def plot(results: Results, path: Path) -> None:
    """One panel for each row: a bar for each server at its median, a dot for each round."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second, and only a kept run needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = [row for row in ROWS if results.samples.get(row.key)]
    columns = 3
    height = -(-len(rows) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(14, 2.4 * height), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.remove()
    for axis, row in zip(axes.flat, rows, strict=False):
        servers = results.samples[row.key]
        for place, (server, samples) in enumerate(servers.items()):
            values = [getattr(sample, row.measures) for sample in samples]
            middle = statistics.median(values)
            axis.barh(place, middle, color=COLOURS.get(server, PEER_COLOUR))
            axis.plot(values, [place] * len(values), ".", color="#333", markersize=3)
            ink = "#fff" if server in COLOURS else "#000"
            label = f" {shown(middle, row.measures)}"
            axis.annotate(label, (0, place), va="center", fontsize=8, color=ink)
        for bar in row.bars:
            peer = results.median(row, bar.peer)
            if peer:
                axis.axvline(peer * bar.limit, color="#c0392b", linewidth=1, linestyle="--")
        axis.set_yticks(range(len(servers)), list(servers), fontsize=8)
        axis.set_xticks([])
        better = "more" if row.measures in {"iops", "bytes_per_second"} else "less"
        axis.set_title(f"{row.title}\n({better} is better)", fontsize=8)
    figure.suptitle("Forebay and its peers: medians, rounds as dots, the bar dashed", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
