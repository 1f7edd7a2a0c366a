# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The compiled core under AddressSanitizer and UBSan: `make fuzz-sanitized SECONDS=60`.

First the tests that go through the core, then each target that does: the corpus, what `make fuzz` has kept, and both
with some damage, until the time is over. What is wrong ends the process of its target, and its input lies in `.fuzz/`.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).parent / "corpus"
KEPT = Path(".fuzz")
NAMES = ("connection", "turns", "door")
"""The targets that go through the core."""
LONGEST = 65536
"""Bytes of an input."""
TESTS = (
    "tests/sim/test_core_twins.py",
    "tests/sim/test_core_turns.py",
    "tests/sim/test_core_door.py",
    "tests/unit/test_fast.py",
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # what Python has at its end is no leak of ours
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONMALLOC": "malloc",  # each object has memory of its own, with forbidden ground around it
}


class CannotSanitizeError(Exception):
    """What is missing, in one line."""


def environment() -> dict[str, str]:
    """That of a process of this Python with the sanitized core, which is compiled if need be."""
    compiled = subprocess.run(
        [sys.executable, ROOT / "fast/build.py", "--sanitized"],
        capture_output=True,
        text=True,
        check=False,
    )
    if compiled.returncode:
        raise CannotSanitizeError(compiled.stderr[-300:].strip())
    libraries = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    path = [str(ROOT / "build/sanitized"), str(ROOT / "tests")]
    return {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join(path),
    }


def _library(name: str) -> str:
    found = subprocess.run(
        ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).exists():
        raise CannotSanitizeError(f"{name} is not there: it comes with gcc")
    return found


def main() -> int:
    """Exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(description="fuzz the core with sanitizers")
    parser.add_argument("--seconds", type=float, default=60, help="of each target, by itself")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--child", help="fuzz this target here (used by this program)")
    parser.add_argument("--without-tests", action="store_true")
    parser.add_argument("target", nargs="*", default=[])
    options = parser.parse_args()
    if options.child:
        _fuzz(options.child, options.seconds, options.seed)
        return 0
    try:
        settings = environment()
    except CannotSanitizeError as why:
        print(f"sanitized: {why}", file=sys.stderr)
        return 1
    commands = (
        [] if options.without_tests else [["-m", "pytest", "-q", "--numprocesses", "0", *TESTS]]
    )
    for name in options.target or NAMES:
        told = ["--child", name, "--seconds", str(options.seconds), "--seed", str(options.seed)]
        commands.append(["-m", "fuzz.sanitized", *told])
    failed = [
        command
        for command in commands
        if subprocess.run([sys.executable, *command], env=settings, check=False).returncode
    ]
    for command in failed:
        print(f"failed: {' '.join(command)}: see above; inputs lie in {KEPT}/")
    return bool(failed)


def _fuzz(name: str, seconds: float, seed: int) -> None:
    import forebay_fast
    from fuzz.targets import TARGETS

    assert "sanitized" in forebay_fast.core.__file__, "this is not the sanitized core"
    KEPT.mkdir(exist_ok=True)
    last = KEPT / f"{name}.sanitized"
    rng = random.Random(seed)
    inputs = [path.read_bytes() for path in _inputs(name)]
    ends, runs = time.monotonic() + seconds, 0
    while runs < len(inputs) or time.monotonic() < ends:
        data = inputs[runs] if runs < len(inputs) else _varied(rng, inputs)
        last.write_bytes(data)
        TARGETS[name](data)
        runs += 1
    last.unlink()
    print(f"{name}: {runs} runs with seed {seed}: clean")


def _inputs(name: str) -> list[Path]:
    return sorted([*(CORPUS / name).glob("*"), *(KEPT / name).glob("*")])


def _varied(rng: random.Random, inputs: list[bytes]) -> bytes:
    """One of them, often behind part of another one, with some damage, or with a part of it again and again."""
    data = damaged(rng, rng.choice(inputs))
    if rng.random() < 0.3:
        at = rng.randrange(len(data) + 1) & -8
        part = data[at : at + 8 * rng.choice((1, 1, 2, 9))]
        data = data[:at] + part * rng.choice((3, 70, 600)) + data[at:]
    if rng.random() < 0.3:
        data = rng.choice(inputs)[: 8 * rng.randrange(60)] + data
    return data[:LONGEST]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The input with some of its bytes changed, and often cut short."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if found:
            found[rng.randrange(len(found))] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
            )
    if rng.random() < 0.3:
        del found[rng.randrange(len(found) + 1) :]
    return bytes(found)


if __name__ == "__main__":
    sys.exit(main())
