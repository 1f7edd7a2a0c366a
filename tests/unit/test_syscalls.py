# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whoever touches a file of a store goes by `forebay.origin.worker.syscalls`: a call of its own could hang in the
kernel, and the daemon with it."""

import ast
from pathlib import Path

import pytest

from forebay.origin.threads import StoreThreads
from forebay.origin.worker.process import StoreProcess, here

ROOMS = ("origin", "sidecar", "image")
GATEWAY = Path(__file__).resolve().parents[2] / "gateway" / "forebay"

PURE = {"os.major", "os.minor", "os.makedev", "os.strerror", "os.fsencode", "os.fsdecode"}
"""Functions of `os` that ask nothing but the process itself, as do those below."""
OWN = {"os.getpid", "os.geteuid", "os.getuid", "os.getgrouplist", "os.uname", "os.urandom"}
OWN |= {"os.sysconf", "os.path.basename", "os.path.dirname", "os.path.normpath", "os.path.relpath"}
OWN |= {"os.path.join", "os.path.isabs", "os.path.samestat", "os.devnull", "os.getegid"}
OWN |= {"os.getgroups", "os.setgroups", "os.seteuid", "os.setegid", "os.setresuid", "os.setresgid"}

PATHS = {"exists", "is_dir", "is_file", "lstat", "mkdir", "read_text"}
PATHS |= {"write_text", "read_bytes", "write_bytes", "iterdir", "glob", "touch", "resolve"}
"""Methods of Path that touch files."""

ALLOWED = {
    ("origin/blocking.py", "open"),  # of /sys
    ("origin/blocking.py", "os.path.exists"),
    ("origin/mounts.py", "read_text"),  # of /proc
    ("origin/mounts.py", "os.lstat"),  # of what is local
    ("origin/mounts.py", "os.readlink"),
    ("sidecar/record.py", "read_text"),  # of /proc
    ("sidecar/recover.py", "is_file"),
    ("sidecar/recover.py", "os.path.realpath"),  # of `forebay recover`, which is no daemon
}


def dotted(node: ast.expr) -> str:
    """`os.path.join` of the expression that says so; empty for what is no such name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def touching(tree: ast.AST) -> set[str]:
    """Calls in the source that may touch a file, by their names."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            if isinstance(node, ast.Name) and node.id == "open":
                found.add("open")
            continue
        name = dotted(node)
        if name.startswith(("os.", "fcntl.")) and name[-1].islower():
            found.add(name)
        elif node.attr in PATHS and not name.startswith("syscalls."):
            found.add(node.attr)
    return {one for one in found if one not in PURE | OWN | {"os.path", "os.stat_result"}}


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_stores_are_touched_by_syscalls_alone(room: str) -> None:
    paths = [path for path in (GATEWAY / room).rglob("*.py") if path.parent.name != "worker"]
    assert len(paths) > 5, "this test looks in the wrong place"
    wrong = {
        (str(path.relative_to(GATEWAY)), name)
        for path in paths
        for name in touching(ast.parse(path.read_text()))
    }
    assert wrong <= ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.pread(fd, 1, 0)",
        "f = os.close",
        "open('x')",
        "path.is_dir()",
        "fcntl.fcntl(fd, 1)",
    ],
)
def test_what_touches_a_file_is_found(source: str) -> None:
    assert touching(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["os.O_RDONLY", "os.stat_result", "fcntl.F_RDLCK", "sidecar.open()"]
)
def test_what_touches_none_is_not(source: str) -> None:
    assert not touching(ast.parse(source))


def test_every_call_on_a_store_goes_to_its_process() -> None:
    """Threads of a store that have no process would hang in the kernel themselves, and the daemon could not end."""
    made = {
        str(path.relative_to(GATEWAY))
        for path in GATEWAY.rglob("*.py")
        if "StoreThreads(" in path.read_text().replace("class StoreThreads", "")
    }
    assert made == {"daemon/arrivals.py", "origin/threads.py"}, "use StoreThreads.apart"


async def test_threads_with_limits_of_their_own_have_the_same_process(tmp_path: Path) -> None:
    process = StoreProcess("s", tmp_path, lambda _: True)
    apart = StoreThreads("s", process=process).apart(1, 1)
    assert await apart.run(lambda: here.process) is process
