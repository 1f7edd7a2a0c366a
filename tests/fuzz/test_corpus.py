# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Every input of the corpus through its target: what was recorded from real programs, and what once failed.

Without atheris, in a second; `make fuzz` looks for new ones.
"""

import random
from pathlib import Path

import pytest

from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for path in CORPUS.glob("*/*") if path.is_file())
MUTATIONS = 20


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
            for _ in range(MUTATIONS):
                TARGETS[name](_damaged(rng, path.read_bytes()))


def _damaged(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if found:
            found[rng.randrange(len(found))] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
            )
    if rng.random() < 0.3:
        del found[rng.randrange(len(found) + 1) :]
    return bytes(found)
