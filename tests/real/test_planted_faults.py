# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Each bug that takes isolation away is found, by a test that finds nothing without it."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from real.planted_faults import FAULTS, OUTCOMES, replace

ROOT = Path(__file__).parents[2]
Outcomes = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of all checks: one process for them, which the bugs stay in."""
    path = tmp_path_factory.mktemp("planted") / "outcomes"
    checks = sorted({fault.check for fault in FAULTS.values()})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "real.planted_faults", *checks]
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, OUTCOMES: str(path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: Outcomes = json.loads(path.read_text())
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(outcomes: Outcomes, fault: str) -> None:
    assert fault in outcomes, f"{FAULTS[fault].check} did not run"
    assert not outcomes[fault]["sound"]
    assert outcomes[fault]["planted"], "nothing was found"
    assert re.search(FAULTS[fault].told, outcomes[fault]["planted"]), outcomes[fault]["planted"]


@pytest.mark.parametrize("target", ["forebay.units:gone", "forebay.daemon.disks:Disks.gone"])
def test_a_plant_whose_target_is_gone_says_so(target: str) -> None:
    with contextlib.ExitStack() as stack, pytest.raises(AssertionError, match="is gone"):
        replace(stack, target, None)
