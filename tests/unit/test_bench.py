# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the bench makes of its figures: a wrong ratio in its page would be worse than none."""

from pathlib import Path

import pytest
from bench import report
from bench.measure import Sample
from bench.rows import CONSTANTS, ROWS, Bar

CONDITIONS = dict.fromkeys(
    ("date", "rounds", "image", "disk", "machine", "python", "nbdkit", "qemu", "fio"), "x"
)


def results(forebay: list[float], cache: list[float], file: list[float]) -> report.Results:
    def of(values: list[float]) -> list[Sample]:
        return [Sample(iops=value, cpu_us_per_request=5.0) for value in values]

    servers = {"forebay": of(forebay), "nbdkit cache": of(cache), "nbdkit file": of(file)}
    return report.Results(CONDITIONS, {"read-qd16": servers})


@pytest.mark.parametrize(
    ("kind", "limit", "passes", "fails"),
    [
        ("at least", 3.0, 3.0, 2.99),
        ("at most", 0.8, 0.8, 0.81),
        ("above", 1.0, 1.01, 1.0),
        ("below", 1.0, 0.99, 1.0),
    ],
)
def test_bar(kind: str, limit: float, passes: float, fails: float) -> None:
    bar = Bar("peer", kind, limit)  # type: ignore[arg-type]  # the table's strings are the literals
    assert bar.holds(passes)
    assert not bar.holds(fails)


def test_ratio_is_that_of_the_medians() -> None:
    against_cache, against_file = report.lines(
        results([300_000, 10, 310_000], [100_000, 90_000, 900_000], [290_000, 300_000, 1])
    )
    assert (against_cache.ratio, against_cache.verdict) == (3.0, "yes")
    assert against_file.ratio == pytest.approx(300 / 290)
    assert against_file.verdict == "NO"


def test_what_was_not_measured_did_not_pass() -> None:
    missing = results([1000.0], [1.0], [1.0])
    del missing.samples["read-qd16"]["forebay"]
    assert [line.verdict for line in report.lines(missing)] == ["not measured"] * 2
    skipped = report.Results(CONDITIONS, {}, {"memory": "no helper"})
    assert [line.verdict for line in report.lines(skipped)] == ["skipped"]
    assert "no helper" in report.text(skipped)


def test_a_constant_is_a_bar_of_its_own() -> None:
    run = report.Results(CONDITIONS, {"misses": {"forebay": [Sample(seconds=0.22)]}})
    [line] = report.lines(run)
    assert line.ratio == pytest.approx(1.1)
    assert line.verdict == "yes"


def test_every_row_has_a_bar_and_a_key_of_its_own() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert all(row.bars for row in ROWS)
    assert set(CONSTANTS) <= {bar.peer for row in ROWS for bar in row.bars}


@pytest.mark.expect_log("(?i)matplotlib")  # it says so when it builds its font cache, once per user
def test_kept_results_come_back(tmp_path: Path) -> None:
    run = results([300.0, 310.0], [100.0, 90.0], [1.0, 2.0])
    kept = tmp_path / "results" / "bench.json"
    report.keep(run, kept)
    assert report.load(kept) == run
    assert kept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert kept.with_suffix(".md").read_text() == report.markdown(run)


def test_readme_is_filled_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.fill_readme(readme, results([300_000.0], [100_000.0], [1000.0]))
    text = readme.read_text()
    assert text.startswith(f"# before\n{report.BEGIN}\n| work |")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "| 300k IOPS | nbdkit cache | 100k IOPS | 3.00 | at least 3 | yes | 5.0 / 5.0 |" in text


def test_what_servers_in_c_reach_stands_beside_without_a_bar() -> None:
    found = results([300_000.0], [100_000.0], [1000.0])
    assert not list(report.limits(found)), "a row that they did not take part in has no line"
    samples = next(iter(found.samples.values()))
    for server, iops in (("C, one thread", 400_000.0), ("C, a thread each", 500_000.0)):
        samples[server] = [Sample(iops=iops, cpu_us_per_request=2.5)]
    line = "300k IOPS / 5.0 | 400k IOPS / 2.5 | 500k IOPS / 2.5 |"
    assert line in report.markdown(found)


def test_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    with pytest.raises(ValueError, match="no <!-- bench"):
        report.fill_readme(readme, results([1.0], [1.0], [1.0]))
    assert readme.read_text() == "nothing\n"


def test_the_page_has_the_table_of_the_kept_run() -> None:
    kept = report.PAGE.parent / "results" / "bench.json"
    if not kept.exists():
        pytest.skip("no results here: the sdist has none")
    inside = report.PAGE.read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    assert inside.strip() == report.markdown(report.load(kept)).strip(), "make bench-readme"
