# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Every input of the corpus through its target: what was recorded from real programs, and what once failed.

Without atheris, in a second; `make fuzz` looks for new ones.
"""

import random
from pathlib import Path

import pytest

from fuzz.sanitized import NAMES, damaged
from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for name in TARGETS for path in (CORPUS / name).glob("*"))
MUTATIONS = dict.fromkeys(TARGETS, 20) | dict.fromkeys(NAMES, 3)


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_input(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_inputs(name: str) -> None:
    assert [path for path in INPUTS if path.parent.name == name]


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs(name: str, rng: random.Random) -> None:
    """Each input of a target cut short, and with some of its bytes changed."""
    for path in INPUTS:
        if path.parent.name == name:
            for _ in range(MUTATIONS[name]):
                TARGETS[name](damaged(rng, path.read_bytes()))
