# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One writer, and a changed image: other programs, other gateways, files swapped under a disk (promises 6 and 7)."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import ask, run, wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import MIB, need

Connect = Callable[..., Any]

SIZE = 4 * MIB
NOTICED = 60.0
"""Seconds. The daemon looks every five; the rest is for a machine that is busy with other things."""


def image(directory: Path, name: str = "a.raw", fill: bytes = b"o") -> Path:
    path = directory / name
    path.write_bytes(fill * SIZE)
    return path


def fails(*command: str | Path) -> str:
    done = run(*command, check=False)
    assert done.returncode != 0 or "Failed to get" in done.stderr, f"{command} worked"
    return done.stdout + done.stderr


@contextlib.contextmanager
def held_by(path: Path, *command: str | Path) -> Iterator[int]:
    """A program that ends when its input does has the image open, and locked. Its pid."""
    need(str(command[0]))
    process = subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: locks(process.pid, path), f"{command[0]} has no lock", 60)
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def locks(pid: int, path: Path) -> bool:
    """Whether the process has a lock on the file."""
    inode = f":{path.stat().st_ino} "
    found = [x.read_text() for x in Path(f"/proc/{pid}/fdinfo").iterdir()]
    return any(f"{inode}100" in text for text in found)


def held_by_qemu_io(path: Path) -> contextlib.AbstractContextManager[int]:
    return held_by(path, "qemu-io", "-f", "raw", path)


def held_by_a_vm(path: Path) -> contextlib.AbstractContextManager[int]:
    """A VM that never starts has it as a read-only disk."""
    machine = ("-accel", "tcg", "-m", "64", "-display", "none", "-S", "-nodefaults")
    drive = f"if=virtio,format=raw,readonly=on,file={path}"
    return held_by(path, "qemu-system-x86_64", *machine, "-drive", drive)


def refused(gateway: GatewayProcess, *arguments: str) -> str:
    """What `forebay attach` says, in one line."""
    done = gateway.cli("attach", *arguments, check=False)
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def stopped(gateway: GatewayProcess, name: str) -> bool:
    return bool(ask(gateway, f"/disks/{name}")["state"] == "conflict")


# ------------------------------------------------------------------------------------------------------- QEMU's locks


def test_qemu_sees_who_writes_and_we_see_qemu(gateway: GatewayProcess) -> None:
    path = image(gateway.images)
    gateway.attach("d", "a.raw", mode="write-through")
    for restarted in (False, True):
        if restarted:
            gateway.restart(kill=True)
        text = fails("qemu-io", "-f", "raw", "-c", "write 0 4k", path)
        assert 'Failed to get "write" lock' in text
        assert "lock" in fails("qemu-img", "resize", "-f", "raw", path, "+1M")
        run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x6f 0 4k", path)
        run("qemu-img", "info", "-f", "raw", path)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", path, path)
    assert path.read_bytes() == b"o" * SIZE
    gateway.cli("detach", "d")
    with held_by_qemu_io(path) as pid:
        for how in ((), ("--read-only",), ("--overlay",)):
            text = refused(gateway, "d", "images:a.raw", *how)
            assert f"images:a.raw is being written by qemu-io (pid {pid})" in text, how
        assert os.listdir(gateway.images) == ["a.raw"]
        told = gateway.cli("recover", "images:a.raw")  # nothing lies beside it: nothing to do
        assert "nothing to recover" in told.stdout
    gateway.attach("d", "a.raw")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", gateway.uri("d"))
    gateway.cli("detach", "d")
    run("qemu-io", "-f", "raw", "-c", "read -P 1 0 4k", "-c", "write -P 2 0 4k", path)


def test_a_golden_image_is_shared_with_vms_that_read_it_and_kept_from_writers(
    gateway: GatewayProcess,
) -> None:
    path = image(gateway.images)
    gateway.attach("one", "a.raw", "--overlay")
    gateway.attach("two", "a.raw", "--read-only")
    assert 'Failed to get "write" lock' in fails("qemu-io", "-f", "raw", "-c", "write 0 4k", path)
    with held_by_a_vm(path) as pid:
        gateway.attach("three", "a.raw", "--overlay")
        for name in ("one", "two", "three"):
            gateway.cli("detach", name)
        text = refused(gateway, "d", "images:a.raw")
        assert f"is held unchanged by qemu-system-x86 (pid {pid})" in text
    gateway.attach("d", "a.raw")


# --------------------------------------------------------------------------------------------------- lost while in use


@dataclass
class Case:
    """A way to lose an image: what happens beside it, and what the reason says."""

    name: str
    says: str

    def happens(self, path: Path) -> None:
        sidecar = path.with_name(path.name + ".forebay")
        if self.name == "taken":
            owner = json.loads((sidecar / "owner").read_text())
            owner |= {"gateway": "other", "host": "elsewhere", "token": owner["token"] + 1}
            (sidecar / "owner.new").write_text(json.dumps(owner))
            (sidecar / "owner.new").rename(sidecar / "owner")
        elif self.name == "truncated":
            os.truncate(sidecar / "owner", 0)
        elif self.name == "newer":
            text = (sidecar / "owner").read_text()
            (sidecar / "owner").write_text(text.replace('"format": 1', '"format": 3'))
        elif self.name == "folder":
            (sidecar / "owner").unlink()
            (sidecar / "owner").mkdir()
        elif self.name == "removed":
            shutil.rmtree(sidecar)
        elif self.name == "replaced":
            other = path.with_name("other")
            other.write_bytes(b"n" * SIZE)
            other.rename(path)
        else:
            os.truncate(path, SIZE // 2)


CASES = [
    Case("taken", "was taken over by host elsewhere"),
    Case("removed", "was taken over"),
    Case("truncated", "owner cannot be read (not JSON text"),
    Case("newer", "owner cannot be read (format 3, this version knows only 2), so another gateway"),
    Case("folder", "owner cannot be read (not a file)"),
    Case("replaced", "replaced"),
    Case("cut", "bytes and had"),
]


def test_a_lost_image_is_neither_read_nor_written_and_its_dirty_data_is_kept(
    make_gateway: Callable[..., GatewayProcess], connect: Connect
) -> None:
    import nbd

    gateway = make_gateway({"defaults": {"max_lag": "1h"}})
    gateway.allow_log(".*")
    clients = {}
    for case in CASES:
        image(gateway.images, f"{case.name}.raw")
        for name, mode in ((case.name, "write-back"), (f"{case.name}-clean", "write-through")):
            if mode == "write-through":
                image(gateway.images, f"{name}.raw")
            gateway.attach(name, f"{name}.raw", mode=mode)
            clients[name] = connect(gateway.uri(name))
            assert clients[name].pread(SIZE, 0) == b"o" * SIZE
        clients[case.name].pwrite(b"d" * 4096, 4096)
        clients[case.name].flush()
    for case in CASES:
        for name in (case.name, f"{case.name}-clean"):
            case.happens(gateway.images / f"{name}.raw")
    kept = {x: x.read_bytes() for x in gateway.images.rglob("*") if x.is_file()}
    # Before the daemon looks by itself: no checkpoint.
    done = gateway.cli("flush", "taken", check=False)
    assert done.returncode == 1
    for case in CASES:
        for name in (case.name, f"{case.name}-clean"):
            wait_for(partial(stopped, gateway, name), f"{name} goes on", NOTICED)
            status = ask(gateway, f"/disks/{name}")
            assert case.says in status["reason"], name
            assert status["dirty_bytes"] == (4096 if name == case.name else 0)
            for offset in (0, 4096):  # cached, and dirty
                with pytest.raises(nbd.Error):
                    clients[name].pread(4096, offset)
            with pytest.raises(nbd.Error):
                clients[name].pwrite(b"x" * 4096, 0)
            assert gateway.cli("flush", case.name, check=False).returncode == 1
    found = {x: x.read_bytes() for x in gateway.images.rglob("*") if x.is_file()}
    assert found == kept, "something was written to an image that was not ours any more"
    gateway.restart(kill=True)
    for case in CASES:
        name = case.name
        assert gateway.status(name)["dirty_bytes"] == 4096, "a restart keeps it too"
        gateway.cli("detach", name, "--discard", "--force")
        gateway.cli("detach", f"{name}-clean", "--discard", "--force")
    owner = json.loads((gateway.images / "taken.raw.forebay" / "owner").read_text())
    assert owner["host"] == "elsewhere", "the marker is another's, and stays"
    gateway.attach("again", "replaced.raw")
    assert connect(gateway.uri("again")).pread(4096, 4096) == b"n" * 4096


# ----------------------------------------------------------------------------------------------------- a changed image


def test_what_a_change_by_somebody_else_does_is_the_operators_choice(
    make_gateway: Callable[..., GatewayProcess], connect: Connect
) -> None:
    import nbd

    gateway = make_gateway(start=False)
    strict = gateway.directory / "strict"
    strict.mkdir()
    gateway.configure({"stores.strict": {"path": str(strict), "on_change": "refuse"}})
    gateway.allow_log("changed by somebody else|replaced by another file")
    gateway.start()
    image(gateway.images, "plain.raw")
    image(gateway.images, "golden.raw")
    image(strict, "strict.raw")
    gateway.attach("plain", "plain.raw", "--read-only")
    gateway.attach("vm", "golden.raw", "--overlay")
    gateway.attach("idle", "golden.raw", "--overlay")
    gateway.attach("strict", "strict:strict.raw", "--read-only")
    clients = {name: connect(gateway.uri(name)) for name in ("plain", "vm", "idle", "strict")}
    for client in clients.values():
        assert client.pread(SIZE, 0) == b"o" * SIZE
    clients["vm"].pwrite(b"v" * 4096, 0)
    for path in (
        gateway.images / "plain.raw",
        gateway.images / "golden.raw",
        strict / "strict.raw",
    ):
        path.write_bytes(b"n" * SIZE)  # a program that knows of no locks

    def new() -> bool:
        found = clients["plain"].pread(SIZE, 0)
        assert found in (b"o" * SIZE, b"n" * SIZE), "a mixture"
        return bool(found == b"n" * SIZE)

    wait_for(new, "the old content is still served", NOTICED)
    for name in ("vm", "idle", "strict"):
        wait_for(partial(stopped, gateway, name), f"{name} goes on", NOTICED)
        with pytest.raises(nbd.Error):
            clients[name].pread(4096, 0)
    assert "on_change is refuse" in ask(gateway, "/disks/strict")["reason"]
    assert "data of a disk on it" in ask(gateway, "/disks/vm")["reason"]
    assert "on every disk of it" in refused(gateway, "new", "images:golden.raw", "--overlay")
    for name in ("vm", "idle", "strict"):
        clients.pop(name).shutdown()
        gateway.cli("detach", name, "--force")
    gateway.attach("strict", "strict:strict.raw", "--read-only")
    gateway.attach("vm", "golden.raw", "--overlay")
    for name in ("strict", "vm"):
        assert connect(gateway.uri(name)).pread(SIZE, 0) == b"n" * SIZE


# -------------------------------------------------------------------------------------------------------------- waiting


def waiting(gateway: GatewayProcess, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "forebay",
        "attach",
        *arguments,
        "--config",
        str(gateway.config),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )


def test_attach_waits_until_the_other_gateway_has_given_the_image_up(
    make_gateway: Callable[..., GatewayProcess], connect: Connect
) -> None:
    first, second = make_gateway(), make_gateway(start=False)
    second.configure({"stores.images": {"path": str(first.images)}})
    second.start()
    image(first.images)
    first.attach("web1", "a.raw", mode="write-back")
    connect(first.uri("web1")).pwrite(b"d" * 4096, 0)
    host = socket.gethostname()
    for text in (
        refused(second, "d", "images:a.raw"),
        refused(second, "d", "images:a.raw", "--wait", "1ms"),
    ):
        for part in (f"host {host}", "disk 'web1', dirty, since 20", "written since 20"):
            assert part in text
    assert "; waited" in text
    one = waiting(second, "stopped", "images:a.raw", "--wait")
    other = waiting(second, "d", "images:a.raw", "--wait", "10m", "--json")
    try:
        for process in (one, other):
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith(f"forebay: waiting: images:a.raw is in use by host {host}")
        one.send_signal(signal.SIGINT)
        _, text = one.communicate(timeout=60)
        assert (one.returncode, len(text.splitlines())) == (1, 1), text
        assert text.startswith("forebay: interrupted"), "between two tries, or in one"
        first.cli("detach", "web1", "--force")
        out, _ = other.communicate(timeout=60)
        assert other.returncode == 0
        assert json.loads(out)["name"] == "d"
        assert connect(second.uri("d")).pread(4096, 0) == b"d" * 4096
        assert [disk["name"] for disk in ask(second, "/disks")] == ["d"]
    finally:
        for process in (one, other):
            process.kill()
            process.communicate()


def test_an_attach_that_is_going_to_fail_refuses_no_other(
    make_gateway: Callable[..., GatewayProcess], short_path: Path
) -> None:
    """Two attaches of one image; the first waits for the store and is then refused: the second serves it."""
    fs = FaultFs(short_path / "fs")
    gateway = make_gateway({"stores.images": {"path": str(fs.path)}})
    try:
        image(fs.backing)
        fs.fail("open", "EIO", name="a.raw", times=1, delay=3.0)
        one = waiting(gateway, "one", "images:a.raw")
        try:
            wait_for(lambda: fs.counts().get("open", 0) >= 1, "it does not open the image", 60)
            gateway.attach("two", "a.raw")
            _, text = one.communicate(timeout=60)
        finally:
            one.kill()
            one.communicate()
        assert one.returncode == 1
        assert os.strerror(errno.EIO) in text
        assert [disk["name"] for disk in ask(gateway, "/disks")] == ["two"]
    finally:
        gateway.kill()
        fs.remove()
