# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The corpus of the targets that go through the core, with a core that looks at its memory; `make fuzz-sanitized` has
more of that.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.sanitized import NAMES, CannotSanitizeError, environment


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """Compiled once after each change of the core, in some ten seconds."""
    try:
        return environment()
    except CannotSanitizeError as why:
        pytest.skip(f"no sanitizers: {why}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_the_core_stays_within_its_memory(
    name: str, settings: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.sanitized", "--child", name, "--seconds", "0"],
        env=settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-6000:]


def test_a_read_behind_the_end_of_an_object_ends_the_process(settings: dict[str, str]) -> None:
    """Else the other tests here would say nothing."""
    bad = "import ctypes; ctypes.string_at(ctypes.create_string_buffer(4096), 5000)"
    done = subprocess.run(
        [sys.executable, "-c", bad], env=settings, capture_output=True, text=True, check=False
    )
    assert "AddressSanitizer" in done.stderr
    assert done.returncode
