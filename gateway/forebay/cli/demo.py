# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay demo`: the main job on a throw-away directory, with real clients, in less than two minutes.

Needs nbdcopy (libnbd-bin), qemu-io (qemu-utils) and mke2fs (e2fsprogs); with nbdkit it also shows an image that is far
away. Everything it starts it ends, and the directory is removed.
"""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forebay.errors import ForebayError
from forebay.units import format_size

IMAGE_SIZE = 256 << 20
FAR_SIZE = 128 << 20
SETTLE_SECONDS = 120.0
"""For a host that is busy: what ends is noticed at once."""

_CONFIG = """\
[gateway]
state = "{home}/state"
run = "{home}/run"

[cache]
size = "1 GiB"

[defaults]
max_lag = "60s"        # long, so that there is something to see before 'forebay flush'

[stores.images]
path = "{home}/shared"
mode = "write-back"

[origins]
nbd = ["nbd+unix:///?socket={home}/*"]
"""


def main() -> None:
    """Run the demo. Raises ForebayError when a tool is missing or a step goes wrong."""
    for tool, package in (
        ("nbdcopy", "libnbd-bin"),
        ("qemu-io", "qemu-utils"),
        ("mke2fs", "e2fsprogs"),
    ):
        if shutil.which(tool, path=_path()) is None:
            raise ForebayError(f"the demo needs {tool}: apt install {package}")
    with tempfile.TemporaryDirectory(prefix="forebay-demo-") as home:
        _Demo(Path(home)).run()


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


class _Demo:
    """The directory, the daemon that runs in it, and the steps."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "forebay.toml"
        self.image = home / "shared" / "golden.raw"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.step = 0

    def run(self) -> None:
        started = time.monotonic()
        self._make_image()
        self.config.write_text(_CONFIG.format(home=self.home))
        try:
            self._serve()
            self._cold_and_warm()
            self._write_and_flush()
            self._far()
            self._overlays()
            self._kill()
        finally:
            self._stop()
        print(f"\nDone in {time.monotonic() - started:.0f} s; {self.home} is removed.")

    # -- steps ----------------------------------------------------------------------------------------------

    def _make_image(self) -> None:
        self._title("An image on shared storage: an ext4 file system with real files in it")
        content = Path("/usr/lib/python3.11")
        if not content.is_dir():
            content = Path("/usr/share")
        self.image.parent.mkdir()
        raw, size = self.home / "new.raw", f"{IMAGE_SIZE >> 20}M"
        made = self._quiet("mke2fs", "-q", "-t", "ext4", "-d", str(content), str(raw), size)
        if made.returncode:  # too much content: an empty file system does as well
            self._quiet("mke2fs", "-q", "-F", "-t", "ext4", str(raw), size)
        # mke2fs reserves space that it does not write, which is a hole or data as the page cache has it: make it holes.
        self._quiet("cp", "--sparse=always", str(raw), str(self.image))
        raw.unlink()
        used = self.image.stat().st_blocks * 512
        print(f"    {self.image}: {format_size(IMAGE_SIZE)}, {format_size(used)} of it in use")

    def _serve(self) -> None:
        self._title("The daemon, and a disk on that image in write-back mode")
        self._start()
        self._forebay("attach", "vm1", "images:golden.raw")

    def _cold_and_warm(self) -> None:
        self._title("A VM reads all of it: first cold, then warm")
        for name in ("cold", "warm"):
            if name == "cold":
                self._forget_pages()
            before = self._status("vm1")
            seconds = self._copy(self._uri("vm1"), "null:")
            after = self._status("vm1")
            fetched = after["origin_read_bytes"] - before["origin_read_bytes"]
            print(
                f"    {name}: {format_size(int(IMAGE_SIZE / seconds))}/s, "
                f"{_ratio(before, after):.0f} % of the reads answered by the cache, "
                f"{format_size(fetched)} fetched from the image"
            )

    def _write_and_flush(self) -> None:
        self._title("It writes; the data is safe in the cache, and the image gets it later")
        self._qemu_io("vm1", "write -P 0x46 64M 8M", "write -P 0x42 513 1000", "flush")
        self._forebay("status")
        self._title("Until somebody asks for it now")
        self._forebay("flush", "vm1")
        copy = self.home / "copy.raw"
        self._copy(self._uri("vm1"), str(copy))
        same = filecmp.cmp(copy, self.image, shallow=False)
        print(f"    cmp: disk and image are {'the same' if same else 'DIFFERENT'}")
        copy.unlink()
        if not same:
            raise ForebayError("disk and image differ after a flush: please report this")

    def _far(self) -> None:
        if shutil.which("nbdkit") is None:
            return
        self._title("An image behind a 1 Gbit/s link with 1 ms of latency (nbdkit's filters)")
        far = self.home / "far.raw"
        with far.open("wb") as file:
            for _ in range(FAR_SIZE >> 20):
                file.write(os.urandom(1 << 20))
        socket = self.home / "far.sock"
        with self._nbdkit(far, socket):
            self._forebay("attach", "vm2", f"nbd+unix:///?socket={socket}", "--read-only")
            for name in ("cold", "warm"):
                seconds = self._copy(self._uri("vm2"), "null:")
                print(f"    {name}: {format_size(int(FAR_SIZE / seconds))}/s")
            self._forebay("detach", "vm2")

    def _overlays(self) -> None:
        self._title(
            "Many VMs from one image: overlays share its blocks, and each keeps its own writes"
        )
        self._forebay("detach", "vm1")
        names = [f"web{n}" for n in range(1, 5)]
        for name in names:
            self._forebay("attach", name, "images:golden.raw", "--overlay", quiet=True)
            self._qemu_io(name, f"write -P 0x{name[-1]}1 16M 1M", quiet=True)
        self._forebay("status")
        for name in names:
            self._qemu_io(name, f"read -P 0x{name[-1]}1 16M 1M", quiet=True)
            self._forebay("detach", name, quiet=True)
        print(
            "    each read back its own data; detached, their writes are gone and the image untouched"
        )

    def _kill(self) -> None:
        self._title("kill -9, in the middle of things")
        self._forebay("attach", "vm1", "images:golden.raw")
        self._qemu_io("vm1", "write -P 0x99 100M 4M")
        dirty = self._status("vm1")["dirty_bytes"]
        print(f"    {format_size(dirty)} acknowledged, not even flushed; SIGKILL")
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        began = time.monotonic()
        self._start()
        print(f"    serving again after {time.monotonic() - began:.1f} s")
        self._qemu_io("vm1", "read -P 0x99 100M 4M", "read -P 0x46 64M 8M")
        before = self._status("vm1")
        seconds = self._copy(self._uri("vm1"), "null:")
        after = self._status("vm1")
        fetched = after["origin_read_bytes"] - before["origin_read_bytes"]
        print(
            f"    warm: {format_size(int(IMAGE_SIZE / seconds))}/s, {format_size(fetched)} fetched again; "
            f"{format_size(after['dirty_bytes'])} still dirty, none lost"
        )
        self._forebay("detach", "vm1")

    # -- means ----------------------------------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self.step += 1
        print(f"\n{self.step}. {text}", flush=True)

    def _start(self) -> None:
        with (self.home / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "forebay", "serve", "--config", str(self.config)], stderr=log
            )
        control = self.home / "run" / "control.sock"
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._quiet(*self._command("status")).returncode:
            if self.daemon.poll() is not None:
                raise ForebayError(f"the daemon ended: {self._log()}")
            if time.monotonic() > deadline:
                late = f"the daemon does not answer at {control} after {SETTLE_SECONDS:.0f} s"
                raise ForebayError(f"{late}: the last line of its log: {self._log()}")
            time.sleep(0.05)

    def _log(self) -> str:
        lines = (self.home / "daemon.log").read_text().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _stop(self) -> None:
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(SETTLE_SECONDS)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait()

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "forebay", *arguments, "--config", str(self.config)]

    def _forebay(self, *arguments: str, quiet: bool = False) -> None:
        if not quiet:
            print(f"    $ forebay {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            self._command(*arguments), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ForebayError(f"forebay {arguments[0]}: {done.stderr.strip()}")
        if not quiet:
            for line in done.stdout.splitlines():
                print(f"    {line}")

    def _quiet(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": _path()}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    def _status(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(
            self._quiet(*self._command("status", name, "--json")).stdout
        )
        return found[0]

    def _uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.home}/run/disks/{name}.sock"

    def _copy(self, source: str, target: str) -> float:
        began = time.monotonic()
        done = self._quiet("nbdcopy", source, target)
        if done.returncode:
            raise ForebayError(f"nbdcopy: {done.stderr.strip()}")
        return time.monotonic() - began

    def _qemu_io(self, name: str, *commands: str, quiet: bool = False) -> None:
        if not quiet:
            print(f"    $ qemu-io {name}: {'; '.join(commands)}", flush=True)
        parts = [part for command in commands for part in ("-c", command)]
        done = self._quiet("qemu-io", "-f", "raw", *parts, self._uri(name))
        if done.returncode or "failed" in done.stdout:
            raise ForebayError(f"qemu-io: {(done.stderr or done.stdout).strip()}")

    def _forget_pages(self) -> None:
        """Have the kernel forget the image's pages, so that cold means cold."""
        fd = os.open(self.image, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    @contextmanager
    def _nbdkit(self, image: Path, socket: Path) -> Iterator[None]:
        filters = ["--filter=delay", "--filter=rate"]
        settings = ["rdelay=1ms", "rate=1000M"]
        process = subprocess.Popen(
            ["nbdkit", "-f", "-U", str(socket), "-r", *filters, "file", str(image), *settings]
        )
        try:
            deadline = time.monotonic() + SETTLE_SECONDS
            while not socket.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            process.wait()


def _ratio(before: dict[str, Any], after: dict[str, Any]) -> float:
    hits = after["read_hits"] - before["read_hits"]
    misses = after["read_misses"] - before["read_misses"]
    return float(100 * hits / max(1, hits + misses))
