# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One boundary around the tasks of each disk: whatever one of them ends with, that disk stops, and no other notices."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real import fault_plants
from real.disk_fixture import ask, ask_text, wait_for
from real.fault_plants import ALWAYS
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image
from real.service_manager import ManagedGateway

Connect = Callable[..., Any]

SIZE = 4 * MIB
BAD = "bad"
OTHERS = {"back": "write-back", "through": "write-through"}

SAID = r"stopped by a fault of Forebay itself|Traceback|Exception Group"
"""What the daemon's log says loudly in these tests."""


class Bed:
    """A daemon with a plant; disks on images of their own, and what they have to hold."""

    def __init__(self, gateway: GatewayProcess, connect: Connect, defaults: dict[str, Any]) -> None:
        self.gateway = gateway
        self.armed = gateway.directory / "armed"
        self.defaults = defaults
        self._connect = connect
        self.contents: dict[str, bytearray] = {}
        self.clients: dict[str, Any] = {}
        gateway.allow_log(SAID)

    def start(self, plant: str) -> None:
        self.gateway.start([str(Path(fault_plants.__file__)), plant, str(self.armed)])

    def restart(self) -> None:
        """Without the plant."""
        self.armed.unlink(missing_ok=True)
        self.gateway.restart()

    def arm(self, text: str = "") -> None:
        """The plant is an exception from now on."""
        self.armed.write_text(text)

    # -- disks

    def make(self, name: str, mode: str | None, *options: str) -> None:
        """An image, and a disk on it."""
        image = self.gateway.images / f"{name}.raw"
        self.contents[name] = bytearray(random_image(image, SIZE, sum(name.encode())))
        self.gateway.attach(name, image.name, *options, mode=mode)

    def make_others(self) -> None:
        for name, mode in OTHERS.items():
            self.make(name, mode)
            self.connect(name)

    def make_dirty(self, name: str = BAD, mode: str | None = "write-back") -> None:
        """A disk that has data which its image lacks."""
        self.make(name, mode)
        self.connect(name)
        self.write(name, MIB, b"w" * MIB)

    def connect(self, name: str) -> Any:
        self.clients[name] = self._connect(self.gateway.uri(name))
        return self.clients[name]

    def write(self, name: str, at: int, data: bytes) -> None:
        """Acknowledged and flushed."""
        self.clients[name].pwrite(data, at)
        self.clients[name].flush()
        self.contents[name][at : at + len(data)] = data

    def image(self, name: str) -> bytes:
        return (self.gateway.images / f"{name}.raw").read_bytes()

    # -- how they are

    def status(self, name: str) -> dict[str, Any]:
        found = ask(self.gateway, f"/disks/{name}")
        assert isinstance(found, dict)
        return found

    def stopped(self) -> list[str]:
        return [one["name"] for one in ask(self.gateway, "/disks") if one["state"] == "stopped"]

    def wait_stopped(self) -> str:
        """The name of the one disk that is stopped."""
        wait_for(lambda: self.stopped() != [], "no disk is stopped", 30)
        [name] = self.stopped()
        return name

    def is_well(self, name: str) -> None:
        """It is read and written by the client that was there before."""
        client = self.clients[name]
        assert client.pread(SIZE, 0) == self.contents[name]
        self.write(name, 3 * MIB, bytes([len(self.contents[name][:1]) + 6]) * 65536)
        assert client.pread(SIZE, 0) == self.contents[name]
        assert self.status(name)["state"] == "ready"


@pytest.fixture
def bed(make_gateway: Callable[..., GatewayProcess], connect: Connect) -> Callable[..., Bed]:
    """`bed(max_lag="1s")`: not started yet."""

    def make(**defaults: Any) -> Bed:
        defaults = {"max_lag": "1h", **defaults}
        return Bed(make_gateway({"defaults": defaults}, start=False), connect, defaults)

    return make


@pytest.fixture
def managed(connect: Connect) -> Iterator[Bed]:
    """The same under a service manager that keeps sockets over a restart."""
    defaults = {"max_lag": "1h"}
    gateway = ManagedGateway({"defaults": defaults})
    try:
        yield Bed(gateway, connect, defaults)
    finally:
        gateway.remove()
    assert not gateway.unexpected_log()


def is_hung_up_on(client: Any) -> bool:
    import nbd

    try:
        client.pread(512, 0)
    except nbd.Error:
        return True
    return False


# ---------------------------------------------------------------------------------------------- every task


def _writes_back(it: Bed) -> None:
    it.arm()
    it.make_dirty()


def _watches(it: Bed) -> None:
    it.make_dirty()
    it.arm()  # whose watch comes first is the bad one


def _copies(it: Bed) -> None:
    it.arm()
    it.make(BAD, "full-copy")


def _preloads(it: Bed) -> None:
    """As soon as the daemon is started again."""
    it.make(BAD, "write-back", "--preload", "all")
    _comes_back(it, "preload")


def _changes_over(it: Bed) -> None:
    """The configuration says another mode than the one that the disk was used in."""
    it.make_dirty(mode=None)
    it.gateway.configure({"defaults": {**it.defaults, "mode": "write-through"}})
    _comes_back(it, "change of mode")


def _comes_back(it: Bed, plant: str) -> None:
    assert it.gateway.stop() == 0
    it.arm()
    it.start(plant)
    it.clients = {}
    for name in OTHERS:
        it.connect(name)


def _accepts(it: Bed) -> None:
    import nbd

    it.make_dirty()
    it.arm()
    with contextlib.suppress(nbd.Error):  # it is accepted, and then nobody any more
        it.connect(BAD)


TASKS: dict[str, Callable[[Bed], None]] = {
    "write-back": _writes_back,
    "watch": _watches,
    "copy": _copies,
    "preload": _preloads,
    "change of mode": _changes_over,
    "listener": _accepts,
}


@pytest.mark.parametrize("task", TASKS)
def test_a_fault_of_a_task_stops_its_disk_and_no_other(bed: Callable[..., Bed], task: str) -> None:
    """The reason is told, its clients are hung up on, the others do not notice; a restart has it as it was."""
    it = bed(mode="write-back", max_lag="1s" if task == "write-back" else "1h")
    it.start(task)
    it.make_others()
    TASKS[task](it)
    name = it.wait_stopped()
    status = it.status(name)
    assert "RuntimeError: planted" in status["reason"]
    assert "restart the daemon" in status["reason"]
    assert status["clients"] == 0
    wait_for(lambda: not it.gateway.sock(name).exists(), "its socket is still there")
    assert name not in it.clients or is_hung_up_on(it.clients[name])
    for other in it.clients.keys() - {name}:
        it.is_well(other)
    log = it.gateway.log_text()
    assert log.count("RuntimeError: planted") == 1
    assert f"disk '{name}': stopped by a fault of Forebay itself" in log
    assert ask_text(it.gateway, "/metrics").count('state="stopped"') == 1
    it.restart()
    again = it.status(name)
    assert again["state"] in ("ready", "copying")
    assert again["dirty_bytes"] == status["dirty_bytes"] or task in ("write-back", "change of mode")
    assert it.connect(name).pread(SIZE, 0) == it.contents[name]
    it.gateway.cli("flush", "--all")
    for one, content in it.contents.items():
        assert it.image(one) == content


def test_a_fault_of_a_fetch_stops_the_disks_of_its_image_and_no_other(
    bed: Callable[..., Bed],
) -> None:
    """The disks share what fetches from the image; who waited for the data has it already."""
    it = bed()
    it.start("fetch")
    it.make_others()
    for name in ("one", "two"):
        if name == "two":
            it.gateway.attach("two", "one.raw", "--overlay")
            it.contents["two"] = it.contents["one"]
        else:
            it.make("one", None, "--overlay")
        it.connect(name)
        it.write(name, 0, name.encode() * 4096)
    contents = {name: bytes(it.clients[name].pread(4 * 65536, 0)) for name in ("one", "two")}
    it.arm()
    it.clients["one"].pread(4096, 2 * MIB)
    wait_for(lambda: set(it.stopped()) == {"one", "two"}, "they are not stopped")
    for name in ("one", "two"):
        assert "RuntimeError: planted" in it.status(name)["reason"]
        assert is_hung_up_on(it.clients[name])
    for name in OTHERS:
        it.is_well(name)
    assert "image images:one.raw: stopped by a fault of Forebay itself" in it.gateway.log_text()
    assert it.gateway.log_text().count("RuntimeError: planted") == 1
    it.restart()
    for name in ("one", "two"):
        assert it.connect(name).pread(4 * 65536, 0) == contents[name]


# ---------------------------------------------------------------------------------------------- a stopped disk


def stopped_by_write_back(it: Bed, *, always: bool) -> None:
    """Two disks as they should be, and one that is stopped, dirty, and cannot be written back, or only now."""
    it.start("write-back")
    it.make_others()
    it.make_dirty()
    it.arm(ALWAYS if always else "")
    it.gateway.cli("mode", BAD, "write-through", check=False)  # an operator's request stops nothing
    if not always:
        it.arm()
    wait_for(lambda: it.stopped() == [BAD], "it is not stopped")


def test_a_stopped_disk_is_written_back_when_it_is_detached(bed: Callable[..., Bed]) -> None:
    it = bed(max_lag="2s")
    it.gateway.allow_log("control API: RuntimeError")
    stopped_by_write_back(it, always=False)
    assert it.status(BAD)["dirty_bytes"] == MIB
    it.gateway.cli("detach", BAD)
    assert it.image(BAD) == it.contents[BAD]
    it.gateway.attach(BAD, f"{BAD}.raw", mode="write-back")
    assert it.connect(BAD).pread(SIZE, 0) == it.contents[BAD]
    assert it.status(BAD)["state"] == "ready"


def test_a_stopped_disk_that_cannot_be_written_back_keeps_its_data(bed: Callable[..., Bed]) -> None:
    """Until the operator gives it up, who is told how; whatever else is asked meanwhile is answered."""
    it = bed(max_lag="2s")
    it.gateway.allow_log("control API: RuntimeError|dirty bytes are dropped as asked")
    stopped_by_write_back(it, always=True)
    dirty = it.status(BAD)["dirty_bytes"]
    assert dirty == MIB
    for command in (["detach", BAD], ["flush", BAD], ["flush", "--all"]):
        refused = it.gateway.cli(*command, check=False)
        assert refused.returncode == 1
        assert "RuntimeError: planted" in refused.stderr
        assert "restart" in refused.stderr
        assert "--discard" in refused.stderr
    for command in (["mode", BAD, "write-through"], ["preload", BAD, "all"]):
        refused = it.gateway.cli(*command, check=False)
        assert refused.returncode == 1
        assert f"'{BAD}' is stopped: a fault of Forebay itself" in refused.stderr
    status = it.status(BAD)
    assert (status["state"], status["dirty_bytes"]) == ("stopped", dirty)
    shown = it.gateway.cli("status").stdout.splitlines()
    assert [line.split()[4] for line in shown if line.startswith(BAD)] == ["stopped"]
    it.gateway.cli("detach", BAD, "--discard")
    assert it.image(BAD) != it.contents[BAD]
    for name in OTHERS:
        it.is_well(name)


def test_a_restart_of_the_daemon_brings_a_stopped_disk_back(managed: Bed) -> None:
    """Its data with it; the clients of the other disks are handed over as ever, and do not notice."""
    it = managed
    it.start("watch")
    it.make_dirty()
    it.arm()
    assert it.wait_stopped() == BAD
    it.make_others()
    it.restart()
    for name in OTHERS:
        it.is_well(name)
    assert it.status(BAD)["state"] == "ready"
    assert it.connect(BAD).pread(SIZE, 0) == it.contents[BAD]
    assert "handed over: 3 disks, 2 clients" in it.gateway.log_text()


def test_an_overlay_that_is_stopped_says_what_a_detach_would_drop(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.start("watch")
    it.make(BAD, None, "--overlay")
    it.connect(BAD)
    it.write(BAD, MIB, b"o" * MIB)
    it.arm()
    assert it.wait_stopped() == BAD
    assert "a detach drops it" in it.status(BAD)["reason"]
    it.restart()
    assert it.connect(BAD).pread(SIZE, 0) == it.contents[BAD]


def test_an_attach_whose_task_fails_at_once_fails(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.gateway.allow_log("control API: RuntimeError")
    it.start("at once")
    it.make_others()
    it.arm()
    random_image(it.gateway.images / "bad.raw", SIZE, 1)
    refused = it.gateway.cli("attach", BAD, "images:bad.raw", "--mode", "write-back", check=False)
    assert refused.returncode == 1
    assert "a fault of forebay itself (RuntimeError)" in refused.stderr
    assert {one["name"] for one in ask(it.gateway, "/disks")} == set(OTHERS)
    assert not it.gateway.sock(BAD).exists()
    it.make_dirty()  # the same disk on the same image, at the second try
    it.is_well(BAD)
    for name in OTHERS:
        it.is_well(name)


def test_a_disk_that_cannot_be_brought_back_is_shown_and_no_other_is_kept_from_coming(
    bed: Callable[..., Bed],
) -> None:
    it = bed()
    it.gateway.allow_log("disk '.*' is not served")
    it.start("bring back")
    it.make_others()
    it.gateway.stop()
    it.arm()
    it.start("bring back")
    states = {one["name"]: one["state"] for one in ask(it.gateway, "/disks")}
    assert sorted(states.values()) == ["failed", "ready"]
    [failed] = [name for name, state in states.items() if state == "failed"]
    assert "a fault of Forebay itself (RuntimeError: planted)" in it.status(failed)["reason"]
    [ready] = states.keys() - {failed}
    it.connect(ready)
    it.is_well(ready)
    it.restart()
    it.connect(failed)
    it.is_well(failed)


# ---------------------------------------------------------------------------------------------- what is no task


def test_a_fault_of_one_request_is_an_error_to_who_asked(bed: Callable[..., Bed]) -> None:
    import nbd

    it = bed()
    it.gateway.allow_log("request 0 at 0.4096 failed")
    it.start("request")
    it.make_others()
    it.arm()
    with pytest.raises(nbd.Error, match="Input/output"):
        it.clients["back"].pread(4096, 0)
    assert it.stopped() == []
    for name in OTHERS:
        it.is_well(name)


def test_a_disk_whose_status_cannot_be_told_hides_no_other(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.gateway.allow_log("its status cannot be told")
    it.start("status")
    it.make_others()
    failed: list[dict[str, Any]] = []
    for _ in range(5):  # the watchdog may look first
        it.arm()
        told = {one["name"]: one for one in ask(it.gateway, "/disks")}
        assert told.keys() == OTHERS.keys()
        if failed := [one for one in told.values() if one["state"] != "ready"]:
            break
    [shown] = failed
    assert shown["state"] == "failed"
    assert "a fault of Forebay itself (RuntimeError: planted)" in shown["reason"]
    it.arm()
    assert all(f'disk="{name}"' in ask_text(it.gateway, "/metrics") for name in OTHERS)
    assert it.stopped() == []
    for name in OTHERS:
        it.is_well(name)


@pytest.mark.parametrize("plant", ["cache's assertion", "cache's own"])
def test_what_all_disks_share_ends_the_daemon(bed: Callable[..., Bed], plant: str) -> None:
    """An assertion that fails in the cache's code, called by a disk's task; and whatever its own tasks end with."""
    it = bed(max_lag="1s" if plant == "cache's assertion" else "1h")
    it.gateway.allow_log("Error")
    it.start(plant)
    it.make_others()
    it.make_dirty()
    it.arm()
    wait_for(lambda: not it.gateway.alive, "it goes on", 30)
    assert it.gateway.process is not None
    assert it.gateway.process.returncode == 1
    it.gateway.start()
    assert it.connect(BAD).pread(SIZE, 0) == it.contents[BAD]


def test_what_lies_in_the_place_of_a_socket_keeps_no_other_disk_away(
    make_gateway: Callable[..., GatewayProcess], connect: Connect
) -> None:
    """A directory there when the daemon starts; and the directory of the sockets is gone when one is made."""
    gateway = make_gateway({})
    gateway.allow_log("cannot make the socket")
    for name in ("a", "b"):
        random_image(gateway.images / f"{name}.raw", MIB, 3)
        gateway.attach(name, f"{name}.raw")
    gateway.kill()
    gateway.sock("a").unlink()
    gateway.sock("a").mkdir()
    gateway.start()
    assert gateway.status("a")["state"] == "failed"
    assert "Is a directory" in gateway.status("a")["reason"]
    connect(gateway.uri("b")).pread(512, 0)
    shutil.rmtree(gateway.sock("b").parent)
    random_image(gateway.images / "c.raw", MIB, 3)
    gateway.attach("c", "c.raw")
    connect(gateway.uri("c")).pread(512, 0)
