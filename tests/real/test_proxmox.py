# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The storage plugin for Proxmox VE: on stand-ins for its modules, with a fake command and with a real daemon."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from forebay.units import parse_name
from real.gateway_process import GatewayProcess

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "proxmox"
PLUGIN = ROOT / "config/proxmox/PVE/Storage/Custom/ForebayPlugin.pm"
NOT_INSTALLED = subprocess.run(
    ["perl", "-MJSON", "-e1"], capture_output=True, check=False
).returncode

pytestmark = pytest.mark.skipif(
    bool(NOT_INSTALLED), reason="needs Perl with its module JSON: apt install perl libjson-perl"
)

VOLUME = "100/vm-100-disk-0.raw"
DISK = "pve-share-100-vm-100-disk-0.raw"


class Node:
    """A node of Proxmox VE, as far as the plugin sees one: `command` is its forebay, `share` the mounted share."""

    def __init__(self, command: Path, share: Path, run: str = "/run/forebay") -> None:
        self.command = command
        self.share = share
        self.run = run
        self.scfg: dict[str, Any] = {
            "type": "forebay",
            "path": str(share),
            "content": {"images": 1},
        }
        self.environment: dict[str, str] = {}
        self.api: int | None = None

    def calls(self, *calls: Sequence[Any]) -> list[dict[str, Any]]:
        """What each call of the plugin did (call.pl)."""
        asked = {
            "plugin": str(PLUGIN),
            "commands": [str(self.command)],
            "run": self.run,
            "api": self.api,
            "calls": calls,
        }
        done = subprocess.run(
            ["perl", "-T", "-I", HERE, "-I", PLUGIN.parents[3], HERE / "call.pl"],
            input=json.dumps(asked), capture_output=True, text=True, check=False,
            env={"PATH": os.environ["PATH"], **self.environment}, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def call(self, *call: Any) -> dict[str, Any]:
        return self.calls(call)[0]

    def result(self, *call: Any) -> list[Any]:
        """What the method returned. Raises AssertionError with what it died of."""
        done = self.call(*call)
        assert "died" not in done, done["died"]
        found: list[Any] = done["result"]
        return found

    def died(self, *call: Any) -> str:
        """The one line that the method died of."""
        text = self.call(*call).get("died", "")
        assert text.endswith("\n") and text.count("\n") == 1, text  # noqa: PT018  (one line)
        return str(text)

    def activate(self, volume: str = VOLUME, **settings: str) -> dict[str, Any]:
        return self.call("activate_volume", "share", {**self.scfg, **settings}, volume)

    def deactivate(self, volume: str = VOLUME) -> dict[str, Any]:
        return self.call("deactivate_volume", "share", self.scfg, volume)


# ---------------------------------------------------------------------------------------- with a command that records


class Recorder(Node):
    """A node whose forebay answers what it is told to."""

    def __init__(self, directory: Path) -> None:
        command = directory / "forebay"
        share = directory / "share"
        (share / "images").mkdir(parents=True)
        super().__init__(command, share)
        self.answer("status", "[]")

    def answer(self, command: str, output: str = "", error: str = "", code: int = 0) -> None:
        """What the sub-command prints from now on, and its exit code."""
        place = self.command.parent / f"answer-{command}"
        place.with_suffix(".out").write_text(output)
        place.with_suffix(".err").write_text(error)
        place.with_suffix(".code").write_text(str(code))
        self.command.write_text(
            f"#!/bin/sh\np={self.command.parent}/answer-$1\n"
            "[ -e $p.out ] || exit 0\ncat $p.out; cat $p.err >&2; exit $(cat $p.code)\n"
        )
        self.command.chmod(0o755)

    def disk(self, **values: Any) -> None:
        """There is a disk for VOLUME, which cannot be attached once more."""
        found = {
            "name": DISK, "image": f"pve:images/{VOLUME}", "mode": "write-back", "state": "ready",
            "read_only": False, "overlay": False, "reason": None, "clients": 0,
        }  # fmt: skip
        self.answer("status", json.dumps([found | values]))
        self.answer("attach", error=f"forebay: there is a disk '{DISK}' already\n", code=1)

    def ran(self, done: dict[str, Any]) -> list[list[str]]:
        """The commands, without the path of forebay. Raises AssertionError with what the call died of."""
        assert "died" not in done, done["died"]
        assert all(words[0] == str(self.command) for words in done["ran"])
        return [words[1:] for words in done["ran"]]


@pytest.fixture
def node(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_what_the_plugin_says_of_itself(node: Recorder) -> None:
    done = node.calls(["type"], ["plugindata"], ["options"], ["properties"])
    kind, data, options, properties = (one["result"][0] for one in done)
    assert kind == "forebay"
    assert data["content"] == [{"images": 1}, {"images": 1}]
    assert data["format"] == [{"raw": 1}, "raw"]
    assert set(properties) <= set(options)
    assert all(name.startswith("forebay-") for name in properties), "names are global"


@pytest.mark.parametrize(("host", "says"), [(11, 15), (12, 12), (15, 15), (16, 15)])
def test_it_speaks_the_interface_of_hosts_that_it_was_written_for(
    node: Recorder, host: int, says: int
) -> None:
    node.api = host
    assert node.result("api") == [says]


def test_qemu_reaches_a_volume_by_the_socket_of_its_disk(node: Recorder) -> None:
    path, owner, kind = node.result("path", node.scfg, VOLUME, "share")
    assert path == f"nbd+unix:///{DISK}?socket=/run/forebay/disks/{DISK}.sock"
    assert (owner, kind) == ("100", "images")
    assert node.result("filesystem_path", node.scfg, VOLUME) == [f"{node.share}/images/{VOLUME}"]
    assert node.result("qemu_blockdev_options", node.scfg, "share", VOLUME, "10.1+pve0", {}) == [
        {
            "driver": "nbd",
            "server": {"type": "unix", "path": f"/run/forebay/disks/{DISK}.sock"},
            "export": DISK,
            "reconnect-delay": 30,
        }
    ]


NAMES = [
    ("share", "100/vm-100-disk-0.raw"),
    ("share", "100/vm-100-disk-10.raw"),
    ("share", "100/base-100-disk-0.raw"),
    ("share", "100/vm-100-cloudinit.raw"),
    ("share", "1/100-vm-100-disk-0.raw"),
    ("share-1", "100/vm-100-disk-0.raw"),
    ("share", "7/vm-7-x-100-vm-100-disk-0.raw"),
    ("share-7-vm-7-x", "100/vm-100-disk-0.raw"),
    ("share", "100/vm-101-disk-0.raw"),
    ("share", "100/vm-100-state-before.raw"),
    ("share", "100/a$(reboot).raw"),
    ("share", "100/a-(reboot).raw"),
    ("share", "100/a'b\".raw"),
    ("share", "100/--discard.raw"),
    ("share", "100/..raw"),
    ("share", "100/Ünïcödé.raw"),
    ("share", "100/\x1b[31m.raw"),
    ("share", f"100/vm-100-{'x' * 200}.raw"),
    ("share", f"100/vm-100-{'x' * 201}.raw"),
    ("s" * 90, "100/vm-100-disk-0.raw"),
    ("s" * 91, "100/vm-100-disk-0.raw"),
]


def test_every_volume_has_a_name_of_its_own_that_a_disk_can_have(node: Recorder) -> None:
    done = node.calls(*(["disk_name", *name] for name in NAMES))
    names = [one["result"][0] for one in done]
    for name in names:
        assert parse_name(name) == name
        assert name.startswith("pve-s")
    assert len(set(names)) == len(NAMES)
    assert names[:4] == [f"pve-share-{volume.replace('/', '-')}" for _, volume in NAMES[:4]]


@pytest.mark.parametrize(
    "volume",
    ["100/vm-100-disk-0.qcow2", "iso/debian.iso", "100/base-9-disk-0.raw/101/vm-101-disk-0.qcow2",
     "../../etc/passwd", "100/../x.raw", "", "100/a\nb.raw"],
)  # fmt: skip
def test_what_is_no_raw_image_of_a_guest_is_refused(node: Recorder, volume: str) -> None:
    for call in (
        ("path", node.scfg, volume, "share"),
        ("activate_volume", "share", node.scfg, volume),
        ("free_image", "share", node.scfg, volume),
    ):
        done = node.call(*call)
        assert "died" in done
        assert done["ran"] == []


def test_an_activated_volume_is_attached_as_the_storage_says(node: Recorder) -> None:
    attach = ["attach", DISK, f"{node.share}/images/{VOLUME}", "--wait", "30s"]
    assert node.ran(node.activate()) == [attach]
    settings = {
        "forebay-mode": "write-back",
        "forebay-cache-size": "20G",
        "forebay-preload": "trace",
    }
    assert node.ran(node.activate(**settings)) == [
        [*attach, "--mode", "write-back", "--cache-size", "20G", "--preload", "trace"]
    ]


def test_a_base_image_is_attached_read_only(node: Recorder) -> None:
    (words,) = node.ran(node.activate("100/base-100-disk-0.raw"))
    assert words[-1] == "--read-only"


def test_a_guest_that_comes_by_live_migration_has_its_image_handed_over(node: Recorder) -> None:
    node.environment["PVE_MIGRATED_FROM"] = "ham1"
    (words,) = node.ran(node.activate())
    assert words[:1] + words[3:] == ["attach", "--wait", "30s", "--incoming"]
    (words,) = node.ran(node.activate("100/base-100-disk-0.raw"))
    assert words[-1] == "--read-only"


def test_a_volume_may_be_activated_while_it_is_active(node: Recorder) -> None:
    node.disk(clients=1)
    assert [words[0] for words in node.ran(node.activate())] == ["attach", "status"]


def test_a_mode_that_was_changed_meanwhile_holds_from_the_next_start_on(node: Recorder) -> None:
    node.disk()
    ran = node.ran(node.activate(**{"forebay-mode": "write-through"}))
    assert ran[-1] == ["mode", DISK, "write-through"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image": "pve:images/100/vm-100-disk-1.raw"}, "is attached to another image"),
        ({"image": "pve:xvm-100-disk-0.raw"}, "is attached to another image"),
        ({"image": "nbd://h/x"}, "is attached to another image"),
        ({"image": "pve:"}, "is attached to another image"),
        ({"read_only": True}, "is attached not to be written"),
        ({"overlay": True}, "is attached not to be written"),
        ({"state": "conflict", "reason": "somebody wrote it: resolve"}, "is not served: somebody wrote it"),
        ({"state": "failed", "reason": "no such file"}, "is not served: no such file"),
        ({"state": "handed-over"}, "is not served: it is handed-over: 'forebay detach "),
    ],
)  # fmt: skip
def test_another_disk_of_the_name_is_not_taken_for_the_volume(
    node: Recorder, values: dict[str, Any], said: str
) -> None:
    node.disk(**values)
    died = node.activate()["died"]
    assert died.startswith(f"storage 'share', volume '{VOLUME}': disk '{DISK}' ")
    assert said in died
    assert died.count("\n") == 1


@pytest.mark.parametrize(
    ("output", "error", "code", "said"),
    [
        ("", "forebay: no daemon at /run/forebay/control.sock: start it\n", 1, ": no daemon at /run"),
        ("", "forebay: warning: old libvirt\nforebay: \x1b[31mno\n", 1, ": ?[31mno"),
        ("", "forebay: warning: only that\n", 1, "'forebay attach' failed"),
        ("", "", 127, "'forebay attach' failed"),
    ],
)  # fmt: skip
def test_what_forebay_refuses_is_one_line(
    node: Recorder, output: str, error: str, code: int, said: str
) -> None:
    node.answer("attach", output, error, code)
    died = node.died("activate_volume", "share", node.scfg, VOLUME)
    assert died.startswith(f"storage 'share', volume '{VOLUME}': ")
    assert said in died


@pytest.mark.parametrize("answer", ["", "{", "{}", "null", '[{"name": null}]', "[1]", "[[]]"])
def test_an_answer_that_cannot_be_is_one_line_and_not_an_empty_list(
    node: Recorder, answer: str
) -> None:
    node.answer("status", answer)
    died = node.died("deactivate_volume", "share", node.scfg, VOLUME)
    assert "is no list of disks" in died


def test_a_node_without_forebay_says_so(node: Recorder) -> None:
    node.command.unlink()
    died = node.died("activate_volume", "share", node.scfg, VOLUME)
    assert died.endswith(": forebay is not installed on this node: see its README\n")


def test_a_forebay_that_hangs_is_given_up(node: Recorder) -> None:
    node.command.write_text("#!/bin/sh\nexec sleep 100\n")
    node.environment["SECONDS_FOR_ALL"] = "1"
    died = node.died("activate_volume", "share", node.scfg, VOLUME)
    assert "is not done after 90 s: see 'forebay status'" in died


def test_a_volume_that_is_not_attached_is_deactivated_already(node: Recorder) -> None:
    assert node.ran(node.deactivate()) == [["status", "--json"]]


def test_deactivating_waits_for_connections_of_a_qemu_that_has_ended(node: Recorder) -> None:
    node.disk(clients=1)
    node.command.write_text(
        node.command.read_text().replace(
            "[ -e",
            f"echo x >>{node.share}/asked; [ $(wc -l <{node.share}/asked) = 3 ] && "
            f'sed -i \'s/"clients": 1/"clients": 0/\' $p.out; [ -e',
        )
    )
    ran = node.ran(node.deactivate())
    assert [words[0] for words in ran] == ["status", "status", "status", "detach"]


@pytest.mark.parametrize("gone", [True, False])
def test_a_disk_that_somebody_else_has_detached_meanwhile_is_detached(
    node: Recorder, gone: bool
) -> None:
    node.disk()
    node.answer("detach", error="forebay: no disk of that name\n", code=1)
    if gone:
        status = node.command.parent / "answer-status.out"
        node.command.write_text(
            node.command.read_text().replace("[ -e", f"[ $1 = detach ] && echo [] >{status}; [ -e")
        )
    assert ("died" not in node.deactivate()) == gone


FILE_CALLS = [
    ("free_image", "share", "scfg", VOLUME, 0, "raw"),
    ("create_base", "share", "scfg", VOLUME),
    ("rename_volume", "scfg", "share", VOLUME, "101", None),
    ("volume_resize", "scfg", "share", VOLUME, 2 << 20, 0, None),
]


def with_volume(node: Node, call: Sequence[Any]) -> list[Any]:
    """The call with the storage's configuration, and the file there."""
    file = node.share / "images" / VOLUME
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes(1 << 20))
    return [node.scfg if word == "scfg" else word for word in call]


@pytest.mark.parametrize("call", FILE_CALLS, ids=lambda call: call[0])
def test_the_daemon_has_let_go_before_a_file_is_changed(
    node: Recorder, call: Sequence[Any]
) -> None:
    words = with_volume(node, call)
    node.disk()
    done = node.call(*words)
    assert [ran[0] for ran in node.ran(done)] == ["status", "detach"]
    assert [base[0] for base in done["base"]] == [call[0]]


@pytest.mark.parametrize("call", FILE_CALLS, ids=lambda call: call[0])
def test_a_file_that_a_guest_or_another_node_has_is_left_alone(
    node: Recorder, call: Sequence[Any]
) -> None:
    words = with_volume(node, call)
    node.disk()
    node.answer("detach", error="forebay: 1 client is connected: shut the VM down\n", code=1)
    done = node.call(*words)
    assert "1 client is connected" in done["died"]
    assert done["base"] == []

    node.answer("status", "[]")
    (node.share / "images" / f"{VOLUME}.forebay").mkdir()
    (node.share / "images" / f"{VOLUME}.forebay/owner").write_text("{}")
    done = node.call(*words)
    assert "another node has it" in done["died"]
    assert done["base"] == []


def test_what_lies_beside_an_image_goes_with_it(node: Recorder) -> None:
    words = with_volume(node, FILE_CALLS[0])
    beside = node.share / "images" / f"{VOLUME}.forebay"
    beside.mkdir()
    (beside / "trace").write_text("x")
    (node.share / "precious").write_text("x")
    (beside / "link").symlink_to(node.share)
    assert "died" not in node.call(*words)
    assert list((node.share / "images").iterdir()) == []
    assert (node.share / "precious").exists()


def test_a_running_guest_is_to_be_shut_down_before_its_disk_grows(node: Recorder) -> None:
    died = node.died("volume_resize", node.scfg, "share", VOLUME, 2 << 20, 1)
    assert "shut the guest down first" in died


@pytest.mark.parametrize("mode", [0o2775, 0o775, 0o755])
def test_new_volumes_belong_to_the_group_of_the_images(node: Recorder, mode: int) -> None:
    """Where that may write there: the daemon is in it, and makes a directory of its own beside the image."""
    images = node.share / "images"
    group = 33 if os.geteuid() == 0 else os.getgid()
    os.chown(images, -1, group)
    images.chmod(mode)
    (volume,) = node.result("alloc_image", "share", node.scfg, "100", "raw", None, 1024)
    file = images / volume
    assert file.stat().st_size == 1 << 20
    writable = bool(mode & stat.S_IWGRP)
    for path, bits in ((file, 0o060), (file.parent, mode & 0o2070)):
        assert (path.stat().st_gid == group) >= writable
        assert (path.stat().st_mode & bits == bits) >= writable
        assert bool(path.stat().st_mode & stat.S_IWGRP) == writable


def test_only_raw_images_are_made(node: Recorder) -> None:
    assert "are raw" in node.died("alloc_image", "share", node.scfg, "100", "qcow2", None, 1024)


def test_what_the_storage_cannot_is_not_offered(node: Recorder) -> None:
    features = ["copy", "sparseinit", "rename", "template", "snapshot", "clone", "replicate"]
    done = node.calls(
        *(["volume_has_feature", node.scfg, one, "share", VOLUME] for one in features)
    )
    assert [bool(one["result"][0]) for one in done] == [True] * 4 + [False] * 3
    for call in (
        ("clone_image", node.scfg, "share", VOLUME, "101"),
        ("volume_snapshot", node.scfg, "share", VOLUME, "s"),
        ("volume_snapshot_rollback", node.scfg, "share", VOLUME, "s"),
        ("volume_snapshot_delete", node.scfg, "share", VOLUME, "s"),
        ("map_volume", "share", node.scfg, VOLUME),
        ("volume_export", node.scfg, "share"),
        ("volume_import", node.scfg, "share"),
        ("path", node.scfg, VOLUME, "share", "s"),
        ("activate_volume", "share", node.scfg, VOLUME, "s"),
    ):
        node.died(*call)
    assert node.result("volume_export_formats") == []
    assert node.result("volume_import_formats") == []


def test_a_share_that_is_not_mounted_is_said_and_nothing_is_created(node: Recorder) -> None:
    assert "died" not in node.call("activate_storage", "share", node.scfg)
    (node.share / "images").rmdir()
    assert "does not exist or is unreachable" in node.died("activate_storage", "share", node.scfg)
    assert list(node.share.iterdir()) == []


@pytest.mark.parametrize(
    ("below", "accepted"), [("", True), ("/", True), ("/deeper", False), ("x", False)]
)
def test_a_storage_needs_a_store_that_holds_it(node: Recorder, below: str, accepted: bool) -> None:
    stores = {"other": {"path": "/mnt/x"}, "pve": {"path": f"{node.share}{below}"}}
    node.answer("dump-config", json.dumps({"stores": stores}))
    done = node.call("on_add_hook", "share", node.scfg)
    assert ("died" not in done) == accepted
    elsewhere = node.call("on_add_hook", "share", {**node.scfg, "nodes": {"ham9": 1}})
    assert elsewhere["ran"] == []


# ---------------------------------------------------------------------------------------------------- as it is shipped


def test_the_plugin_is_good_perl() -> None:
    checked = subprocess.run(
        ["perl", "-T", "-I", HERE, "-wc", PLUGIN], capture_output=True, text=True, check=False
    )
    assert checked.stderr == f"{PLUGIN} syntax OK\n"
    if shutil.which("perlcritic") is None:
        pytest.skip("needs perlcritic: apt install libperl-critic-perl")
    found = subprocess.run(
        ["perlcritic", "--noprofile", "--quiet", "--severity", "4", PLUGIN],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout + found.stderr == ""


def installer(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "config/proxmox/install.sh", *words], capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], **environment}, cwd=environment.get("DESTDIR"),
    )  # fmt: skip


def test_it_is_installed_and_taken_out_again(tmp_path: Path) -> None:
    root = tmp_path / "a root"
    root.mkdir()
    for _ in range(2):
        done = installer("install", DESTDIR=str(root))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    put = root / "usr/share/perl5/PVE/Storage/Custom/ForebayPlugin.pm"
    assert put.read_bytes() == PLUGIN.read_bytes()
    assert stat.S_IMODE(put.stat().st_mode) == 0o644
    for _ in range(2):
        assert installer("uninstall", DESTDIR=str(root)).returncode == 0
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_a_package_is_made_of_it(tmp_path: Path) -> None:
    done = installer("deb", DESTDIR=str(tmp_path), VERSION="1.2")
    assert done.stdout == "forebay-proxmox_1.2_all.deb\n", done.stderr
    package = tmp_path / "forebay-proxmox_1.2_all.deb"
    inside = subprocess.run(
        ["dpkg-deb", "-c", package], capture_output=True, text=True, check=True
    ).stdout
    files = {line.split()[-1] for line in inside.splitlines() if line.startswith("-")}
    assert files == {
        "./usr/share/perl5/PVE/Storage/Custom/ForebayPlugin.pm",
        "./usr/share/doc/forebay-proxmox/README.md",
        "./usr/share/doc/forebay-proxmox/copyright",
    }
    assert "drwxr-xr-x" in inside.splitlines()[0]


@pytest.mark.parametrize("words", [(), ("reinstall",), ("--help",)])
def test_the_installer_says_what_it_can(words: tuple[str, ...]) -> None:
    done = installer(*words)
    assert done.returncode == 1
    assert done.stderr == "install.sh: say install, uninstall or deb\n"


# ------------------------------------------------------------------------------------------------- with a real daemon


@pytest.fixture
def daemon(gateway: GatewayProcess) -> Node:
    """A node with a real daemon, whose store is the share."""
    return node_of(gateway)


def node_of(gateway: GatewayProcess, share: Path | None = None) -> Node:
    command = gateway.directory / "forebay"
    command.write_text(
        f'#!/bin/sh\nFOREBAY_CONFIG={gateway.config} exec {sys.executable} -m forebay "$@"\n'
    )
    command.chmod(0o755)
    if share is None:
        (gateway.images / "images").mkdir()
    return Node(command, share or gateway.images, str(gateway.run))


class Guests:
    """QEMU's storage daemons, each in place of a guest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, options: dict[str, Any]) -> str:
        """One with these options of a block device; the URI by which it serves that."""
        socket = self._directory / f"guest{len(self._running)}.sock"
        guest = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev", json.dumps({**options, "node-name": "disk"}),
             "--nbd-server", f"addr.type=unix,addr.path={socket}",
             "--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"],
        )  # fmt: skip
        self._running.append(guest)
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert guest.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return f"nbd+unix:///disk?socket={socket}"

    def end(self, number: int) -> None:
        self._running[number].kill()
        self._running[number].wait()

    def end_all(self) -> None:
        for number in range(len(self._running)):
            self.end(number)


@pytest.fixture
def guests(short_path: Path) -> Iterator[Guests]:
    guests = Guests(short_path)
    yield guests
    guests.end_all()


def io(uri: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *words, uri],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    return done.stdout


def new_volume(node: Node, size: int = 8 << 20) -> dict[str, Any]:
    """Make VOLUME and activate it; what QEMU is told to open."""
    assert node.result("alloc_image", "share", node.scfg, "100", "raw", None, size >> 10) == [
        VOLUME
    ]
    done = node.activate(**{"forebay-mode": "write-back"})
    assert "died" not in done, done
    (options,) = node.result("qemu_blockdev_options", node.scfg, "share", VOLUME, "10.1", {})
    found: dict[str, Any] = options
    return found


def test_a_guest_writes_its_volume_and_the_share_has_it_afterwards(
    daemon: Node, gateway: GatewayProcess, guests: Guests
) -> None:
    io(guests.start(new_volume(daemon)), "write -P 0x41 1M 1M", "flush")
    assert gateway.status(DISK)["mode"] == "write-back"
    assert "died" not in daemon.activate(**{"forebay-mode": "write-back"}), "a backup does that"
    died = daemon.call("free_image", "share", daemon.scfg, VOLUME)["died"]
    assert "client" in died
    assert (daemon.share / "images" / VOLUME).exists()


def test_a_stopped_guest_leaves_its_image_whole(daemon: Node, gateway: GatewayProcess) -> None:
    new_volume(daemon)
    path = daemon.result("path", daemon.scfg, VOLUME, "share")[0]
    io(path, "write -P 0x41 1M 1M", "flush")
    assert "died" not in daemon.deactivate()
    assert gateway.cli("status", "--json").stdout.strip() == "[]"
    file = daemon.share / "images" / VOLUME
    assert file.read_bytes()[1 << 20 : 2 << 20] == b"A" * (1 << 20)
    gateway.allow_log("was changed by somebody else: its cached blocks are dropped")
    assert "died" not in daemon.call("volume_resize", daemon.scfg, "share", VOLUME, 16 << 20, 0)
    assert "died" not in daemon.activate()
    io(path, "read -P 0x41 1M 1M", "read -P 0 8M 8M")
    assert "died" not in daemon.call("free_image", "share", daemon.scfg, VOLUME)
    assert not file.parent.exists()


def test_a_guest_goes_on_when_the_daemon_is_killed(
    daemon: Node, gateway: GatewayProcess, guests: Guests
) -> None:
    uri = guests.start(new_volume(daemon))
    io(uri, "write -P 0x41 0 1M", "flush")
    gateway.kill()
    gateway.start()
    io(uri, "read -P 0x41 0 1M", "write -P 0x42 1M 1M", "flush", "read -P 0x42 1M 1M")
    assert "died" not in daemon.activate(**{"forebay-mode": "write-back"})


def test_a_daemon_that_is_away_is_said_in_one_line(daemon: Node, gateway: GatewayProcess) -> None:
    new_volume(daemon)
    gateway.stop()
    for call in (
        ("activate_volume", "share", daemon.scfg, VOLUME),
        ("deactivate_volume", "share", daemon.scfg, VOLUME),
        ("free_image", "share", daemon.scfg, VOLUME),
    ):
        assert ": no daemon at " in daemon.died(*call)
    assert (daemon.share / "images" / VOLUME).exists()
    gateway.start()
    assert "died" not in daemon.deactivate()


def second_node(make_gateway: Callable[..., GatewayProcess], gateway: GatewayProcess) -> Node:
    """Another node with the same share."""
    second = make_gateway({"stores.images": {"path": str(gateway.images)}})
    shutil.rmtree(second.images)
    return node_of(second, gateway.images)


def test_a_running_guest_moves_to_another_node(
    daemon: Node,
    make_gateway: Callable[..., GatewayProcess],
    gateway: GatewayProcess,
    guests: Guests,
) -> None:
    """In the order of Proxmox VE: the target activates and opens, the source's QEMU ends, the source deactivates.

    A first attempt fails before the target has opened the disk.
    """
    uri = guests.start(new_volume(daemon))
    other = second_node(make_gateway, gateway)
    other.environment["PVE_MIGRATED_FROM"] = "ham0"
    assert "died" not in other.activate()
    assert "died" not in other.deactivate()
    io(uri, "write -P 0x41 0 1M", "flush")
    assert "died" not in other.activate()
    (options,) = other.result("qemu_blockdev_options", other.scfg, "share", VOLUME, "10.1", {})
    target = guests.start(options)
    io(target, "read -P 0x41 0 1M")
    io(uri, "write -P 0x42 1M 1M", "flush")
    guests.end(0)
    io(target, "read -P 0x42 1M 1M", "write -P 0x43 2M 1M", "flush")
    assert "died" not in daemon.deactivate()
    io(target, "read -P 0x41 0 1M", "read -P 0x42 1M 1M", "read -P 0x43 2M 1M")


def test_a_missing_image_and_one_of_another_node_are_said_in_one_line(
    daemon: Node, make_gateway: Callable[..., GatewayProcess], gateway: GatewayProcess
) -> None:
    missing = daemon.died("activate_volume", "share", daemon.scfg, "100/vm-100-disk-7.raw")
    assert "vm-100-disk-7.raw" in missing
    new_volume(daemon)
    other = second_node(make_gateway, gateway)
    assert "another node has it" in other.died("free_image", "share", other.scfg, VOLUME)
    assert "died" not in daemon.deactivate()
    assert "died" not in other.activate()
    assert "died" not in other.deactivate()


def test_an_efi_disk_has_a_size_of_its_own(daemon: Node) -> None:
    new_volume(daemon, 528 << 10)
    path = daemon.result("path", daemon.scfg, VOLUME, "share")[0]
    io(path, "write -P 0x41 520k 8k", "read -P 0x41 520k 8k")


def test_a_template_is_copied_from(daemon: Node, tmp_path: Path) -> None:
    new_volume(daemon)
    io(daemon.result("path", daemon.scfg, VOLUME, "share")[0], "write -P 0x41 0 1M")
    (base,) = daemon.result("create_base", "share", daemon.scfg, VOLUME)
    assert base == "100/base-100-disk-0.raw"
    assert "died" not in daemon.activate(base)
    copy = tmp_path / "copy.raw"
    path = daemon.result("path", daemon.scfg, base, "share")[0]
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", path, copy], check=True)
    assert copy.read_bytes()[: 1 << 20] == b"A" * (1 << 20)
