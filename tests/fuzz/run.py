# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Fuzz with atheris: `make fuzz SECONDS=600`. README.md beside this file says what is what.

Each target runs in a process of its own, for its share of the time; what it finds new is kept in `.fuzz/TARGET/`, not
in the corpus. Exit code 1 when a target failed: the input lies in `.fuzz/TARGET.crash-*`.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
KEPT = Path(".fuzz")

PARSERS = ("server", "client")
"""These get half of the time between them: they are what strangers talk to."""

LONGEST = {
    "server": 65536,
    "client": 131072,
    "journal": 16384,
    "redo": 16384,
    "index": 8192,
    "owner": 65536,
}
"""Bytes of an input; 4096 where nothing stands here."""


def main() -> int:
    """Run the targets that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description="fuzz what reads bytes from outside")
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument(
        "--child", help="fuzz this target here, for --seconds (used by this program)"
    )
    parser.add_argument("target", nargs="*")
    arguments = parser.parse_args()
    if arguments.child:
        return _fuzz(arguments.child, arguments.seconds)
    from fuzz.targets import TARGETS

    names = arguments.target or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}: there are {', '.join(TARGETS)}")
    weights = {name: 3 if name in PARSERS else 1 for name in names}
    failed = [
        name
        for name in names
        if not _run(name, max(1, arguments.seconds * weights[name] // sum(weights.values())))
    ]
    if failed:
        print(f"failed: {', '.join(failed)}: the inputs lie in {KEPT}/")
    return 1 if failed else 0


def _run(name: str, seconds: int) -> bool:
    began = time.monotonic()
    command = [sys.executable, "-m", "fuzz.run", "--child", name, "--seconds", str(seconds)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    found = re.findall(r"stat::number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    runs = int(found[-1]) if found else 0
    took = time.monotonic() - began
    reached = f", {covered[-1][0]} branches" if covered else ""
    print(
        f"{name}: {runs} runs in {took:.0f} s{reached}: {'clean' if not done.returncode else 'FAILED'}"
    )
    if done.returncode:
        print(done.stderr[-6000:])
    return not done.returncode


def _fuzz(name: str, seconds: int) -> int:
    import atheris

    with atheris.instrument_imports(include=["forebay", "forebay_nbd", "forebay_cache", "fuzz"]):
        from fuzz.targets import TARGETS

    kept = KEPT / name
    kept.mkdir(parents=True, exist_ok=True)
    settings = {
        "max_total_time": seconds,
        "max_len": LONGEST.get(name, 4096),
        "timeout": 20,  # one input may take no longer
        "rss_limit_mb": 1024,
        "print_final_stats": 1,
        "artifact_prefix": f"{KEPT}/{name}.",
        "verbosity": 1,
    }
    flags = [f"-{key}={value}" for key, value in settings.items()]
    atheris.Setup([name, *flags, str(kept), str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("ASAN_OPTIONS", "detect_leaks=0")
    sys.exit(main())
