# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the bench of the doors makes of its figures."""

from pathlib import Path

import pytest
from bench.doors_report import (
    BEGIN,
    END,
    FAR,
    OURS,
    PEER,
    RATE_BARS,
    ROWS,
    Results,
    Sample,
    fill_readme,
    keep,
    lines,
    load,
    markdown,
    text,
)
from bench.report import PAGE

READ = ROWS[0]


def results(**doors: list[tuple[float, float]]) -> Results:
    """Rounds of (MB/s, CPU ms for each MB) in the first row."""
    names = {"fuse": OURS, "nbdfuse": PEER, "gcm": FAR[0], "chacha": FAR[1]}
    samples = {names[door]: [Sample(*one) for one in taken] for door, taken in doors.items()}
    conditions = dict.fromkeys(("date", "rounds", "image", "machine", "versions"), "x")
    return Results(conditions, {READ.key: samples})


def ours_against(peer: str, ours: tuple[float, float], theirs: tuple[float, float]) -> str:
    taken = results(**{"fuse": [ours], peer: [theirs]})
    names = {"nbdfuse": PEER, "gcm": FAR[0], "chacha": FAR[1]}
    return next(line.verdict for line in lines(taken) if line.peer == names[peer])


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    run = results(
        fuse=[(100, 1.0), (900, 2.0), (300, 1.0)], nbdfuse=[(100, 1.0), (1000, 1.0), (100, 1.0)]
    )
    assert run.ratio(READ, PEER, "rate") == 1.0  # of 1, 0.9 and 3; that of the medians were 3
    assert run.ratio(READ, PEER, "cpu") == 1.0


@pytest.mark.parametrize(
    ("peer", "ours", "verdict"),
    [
        ("nbdfuse", (90, 9.0), "yes"),  # its CPU time is shown, and has no bar
        ("nbdfuse", (89, 0.1), "NO"),
        ("gcm", (101, 0.99), "yes"),
        ("gcm", (100, 0.5), "NO"),
        ("gcm", (200, 1.0), "NO"),
        ("chacha", (200, 0.5), "yes"),
        ("chacha", (99, 0.5), "NO"),
    ],
)
def test_bars(peer: str, ours: tuple[float, float], verdict: str) -> None:
    assert ours_against(peer, ours, (100, 1.0)) == verdict


def test_what_was_not_measured_did_not_pass() -> None:
    verdicts = {line.peer: line.verdict for line in lines(results(fuse=[(1, 1)], gcm=[(0.5, 2)]))}
    assert verdicts == {PEER: "not measured", FAR[0]: "yes", FAR[1]: "not measured"}
    assert not list(lines(Results({}, {})))


def test_every_row_has_a_key_of_its_own_and_every_peer_a_bar() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert {PEER, *FAR} == {bar.peer for bar in RATE_BARS}


def test_text_has_every_round_in_its_spread() -> None:
    shown = text(results(fuse=[(90, 1.0), (100, 1.0), (150, 1.0)], nbdfuse=[(100, 1.0)] * 3))
    assert "-10..+50 %" in shown
    assert "1.00        at least 0.9" in shown


@pytest.mark.expect_log("(?i)matplotlib")  # it says so when it builds its font cache, once per user
def test_kept_results_come_back(tmp_path: Path) -> None:
    run = results(fuse=[(300, 1.5), (310, 1.4)], nbdfuse=[(100, 2.0), (90, 2.5)])
    kept = tmp_path / "results" / "doors.json"
    keep(run, kept)
    assert load(kept) == run
    assert kept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert kept.with_suffix(".md").read_text() == markdown(run)


def test_readme_is_filled_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{BEGIN}\nold\n{END}\nafter\n")
    run = results(fuse=[(300, 1.5)], nbdfuse=[(200, 3.0)])
    for _ in range(2):
        fill_readme(readme, run)
    filled = readme.read_text()
    assert filled.startswith(
        f"# before\n{BEGIN}\n| work | {OURS} | {PEER} |\n| --- | --- | --- |\n"
    )
    assert filled.endswith(f"{END}\nafter\n")
    assert "old" not in filled
    assert f"| {READ.title} | 300 / 1.50 | 200 / 3.00 |" in filled
    assert f"| {READ.title} | {PEER} | 1.50 | at least 0.9 | 0.50 |  | yes |" in filled


def test_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    with pytest.raises(ValueError, match="no <!-- doors"):
        fill_readme(readme, results(fuse=[(1, 1)]))
    assert readme.read_text() == "nothing\n"


def test_the_page_has_the_tables_of_the_kept_run() -> None:
    kept = PAGE.parent / "results" / "doors.json"
    if not kept.exists():
        pytest.skip("no results here: the sdist has none")
    inside = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert inside.strip() == markdown(load(kept)).strip(), "make bench-doors-readme"
