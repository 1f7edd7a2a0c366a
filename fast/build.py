#!/usr/bin/env python3
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Compiles forebay_fast/core.pyx, with door.pxi in it, in place.

    fast/build.py [--c-only] [--plants] [--sanitized]

Nothing is done where what was made is of these sources and flags. `--c-only` makes core.c, for an sdist. `--plants`
compiles in what tests need to plant bugs with; never into what is installed. `--sanitized` makes another package beside
it, in build/, whose core looks at its memory. hatch_build.py, tools/setup.sh and tests call it. Wants Cython, unless
core.c is there, a C compiler, and Python's headers.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "forebay_fast"
CODE = ("core.pyx", "door.pxi")
SOURCES = (*CODE, "sector.h")
GENERATED = PACKAGE / "core.c"
LIBRARY = PACKAGE / f"core{sysconfig.get_config_var('EXT_SUFFIX')}"
SANITIZED = PACKAGE.parent.parent / "build/sanitized"
"""What has `forebay_fast` with sanitizers, for the first place of a Python path."""
FLAGS = "-O3 -g1 -shared -fPIC -Wall -Wextra -Wno-unused-parameter -Wno-unused-function"

SANITIZERS = (
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)


class CannotCompileError(Exception):
    """What is missing, in one line."""


def generate() -> Path:
    """core.c, made anew unless it is of this core.pyx. Raises CannotCompileError."""
    digest = _digest(*(PACKAGE / name for name in CODE))
    if not _is_of(GENERATED, digest):
        try:
            from Cython.Compiler.Main import compile_single  # noqa: F401, PLC0415
        except ImportError:
            raise CannotCompileError("Cython is not there") from None
        _run([sys.executable, "-m", "cython", "-3", str(PACKAGE / CODE[0]), "-o", str(GENERATED)])
        _note(GENERATED, digest)
    return GENERATED


def build(*, plants: bool = False, flags: tuple[str, ...] = (), library: Path = LIBRARY) -> Path:
    """The compiled module, made anew unless it is of these sources and flags. Raises CannotCompileError."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    headers = Path(sysconfig.get_paths()["include"])
    if compiler is None:
        raise CannotCompileError("there is no C compiler")
    if not (headers / "Python.h").exists():
        raise CannotCompileError("Python's headers are not there (python3-dev)")
    chosen = [*FLAGS.split(), *flags, *(["-DFOREBAY_PLANTS"] if plants else [])]
    wanted = _digest(*(PACKAGE / name for name in SOURCES), text=f"{sys.version} {chosen}")
    if not _is_of(library, wanted):
        made = library.with_name(library.name + ".new")
        _run([compiler, *chosen, f"-I{headers}", f"-I{PACKAGE}", "-o", str(made), str(generate())])
        made.replace(library)  # a process may have the old one mapped
        _note(library, wanted)
    return library


def build_sanitized() -> Path:
    """SANITIZED, made anew where needed: its core ends the process that reads or writes where it must not.

    That process has to have `libasan` loaded before it. Raises CannotCompileError.
    """
    package = SANITIZED / PACKAGE.name
    package.mkdir(parents=True, exist_ok=True)
    for source in PACKAGE.glob("*.py"):
        link = package / source.name
        if not link.is_symlink():
            link.symlink_to(source)
    build(plants=True, flags=SANITIZERS, library=package / LIBRARY.name)
    return SANITIZED


def _digest(*paths: Path, text: str = "") -> str:
    found = hashlib.sha256(text.encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def _stamp(made: Path) -> Path:
    return made.with_name(f".{made.name}.of")


def _is_of(made: Path, digest: str) -> bool:
    return made.exists() and _stamp(made).exists() and _stamp(made).read_text() == digest


def _note(made: Path, digest: str) -> None:
    _stamp(made).write_text(digest)


def _run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode:
        raise CannotCompileError(f"{command[0]} failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--c-only", action="store_true")
    parser.add_argument("--plants", action="store_true")
    parser.add_argument("--sanitized", action="store_true")
    options = parser.parse_args()
    try:
        if options.c_only:
            generate()
        elif options.sanitized:
            build_sanitized()
        else:
            build(plants=options.plants)
    except CannotCompileError as why:
        print(f"core: not compiled: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
