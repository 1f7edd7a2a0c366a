# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""OpenNebula's drivers, installed and taken out again; the probe of the hosts; `forebay-one`."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from real.one_bed import ADDON, HASH, NOTES_CALL, STOCK

ONED = """\
# a comment
VM_MAD = [
    NAME           = "kvm",
    EXECUTABLE     = "one_vmm_exec",
    ARGUMENTS      = "-t 15 -r 0 kvm -p",
    TYPE           = "kvm"
]
VM_MAD = [
    NAME           = "lxc",
    ARGUMENTS      = "-t 15 -r 0 lxc"
]
TM_MAD = [
    EXECUTABLE = "one_tm",
    ARGUMENTS = "-t 15 -d dummy,shared,qcow2,ssh,local"
]
DATASTORE_MAD = [
    ARGUMENTS  = "-t 15 -d dummy,fs -s shared,ssh"
]
"""
RC = 'LIVE_DISK_SNAPSHOTS="kvm-qcow2 kvm-shared"\n'


class FrontEnd:
    def __init__(self, directory: Path, version: str = "7.2.0") -> None:
        self.location = directory / "one"
        self.remotes = self.location / "var" / "remotes"
        for name in STOCK:
            (self.remotes / name).parent.mkdir(parents=True, exist_ok=True)
            (self.remotes / name).write_text(NOTES_CALL)
        for folder in ("vmm/kvm", "im/kvm-probes.d/host/system"):
            (self.remotes / folder).mkdir(parents=True)
        (self.location / "bin").mkdir()
        (self.location / "etc" / "vmm_exec").mkdir(parents=True)
        (self.remotes / "VERSION").write_text(f"{version}\n")
        self.oned = self.location / "etc" / "oned.conf"
        self.oned.write_text(ONED)
        self.rc = self.location / "etc" / "vmm_exec" / "vmm_execrc"
        self.rc.write_text(RC)

    def install(self, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
        names = {"ONE_LOCATION": str(self.location), "ONE_USER": "root", "ONE_GROUP": "root"}
        return subprocess.run(
            [ADDON / "install.sh", *words], capture_output=True, text=True, check=False,
            env={**os.environ, **names, **given}, cwd="/",
        )  # fmt: skip

    def tree(self) -> Mapping[str, str]:
        """All files, with what is in them; links with where they lead."""
        found = [
            x
            for x in self.location.rglob("*")
            if x.is_symlink() or (x.is_file() and x.suffix != ".pyc")
        ]
        return {
            str(x.relative_to(self.location)): f"-> {x.readlink()}" if x.is_symlink() else x.read_text()
            for x in found
        }  # fmt: skip


@pytest.fixture
def front(tmp_path: Path) -> FrontEnd:
    return FrontEnd(tmp_path)


def test_an_install_links_to_what_is_there_and_an_uninstall_leaves_no_trace(
    front: FrontEnd,
) -> None:
    before = front.tree()
    done = front.install()
    assert (done.returncode, done.stderr) == (0, "")
    assert "onehost sync --force" in done.stdout
    installed = front.tree()
    driver = front.remotes / "tm" / "forebay"
    links = [x for x in driver.iterdir() if x.is_symlink()]
    assert len(links) == 28
    assert [x.name for x in links if not x.exists()] == []
    stock = {x.resolve().relative_to(front.remotes) for x in links} - {Path("tm/forebay/clone")}
    assert {str(x) for x in stock} <= set(STOCK)
    assert os.access(driver / "clone", os.X_OK)
    modules = len(list((driver / "forebay_one").glob("*.py")))
    assert len(list((driver / "forebay_one/__pycache__").iterdir())) == modules
    (driver / "driver.conf").write_text("fallback = no\n")
    assert front.install().returncode == 0
    again = {**front.tree(), "var/remotes/tm/forebay/driver.conf": ""}
    assert again == {**installed, "var/remotes/tm/forebay/driver.conf": ""}
    assert (driver / "driver.conf").read_text() == "fallback = no\n", "it is the administrator's"
    done = front.install("--uninstall")
    assert done.returncode == 0
    assert f"{driver} is kept" in done.stdout
    (driver / "driver.conf").unlink()
    driver.rmdir()
    assert front.tree() == before
    assert front.install().returncode == 0
    assert front.install("--uninstall").returncode == 0
    assert front.tree() == before
    assert front.install("--uninstall").returncode == 0


def test_edit_writes_what_it_prints_once_and_uninstall_takes_it_out(front: FrontEnd) -> None:
    for _ in range(2):
        done = front.install("--edit")
        assert (done.returncode, done.stderr) == (0, "")
    text = front.oned.read_text()
    assert '"-t 15 -d dummy,shared,qcow2,ssh,local,forebay"' in text
    assert text.count(",forebay") == text.count('NAME = "forebay"') == 1
    assert 'LN_TARGET_LOCAL = "NONE", CLONE_TARGET_LOCAL = "SYSTEM"' in text
    assert text.count("INHERIT_DATASTORE_ATTR") == 4
    assert "deploy.forebay" not in text
    assert front.rc.read_text() == RC.replace('shared"', 'shared kvm-forebay qemu-forebay"')
    for _ in range(2):
        assert front.install("--edit", "--persistent").returncode == 0
    text = front.oned.read_text()
    option = " -l deploy=deploy.forebay,attach_disk=attach_disk.forebay"
    assert f'"-t 15 -r 0 kvm -p{option}"' in text
    assert text.count(option) == 1
    assert front.oned.with_name("oned.conf.before-forebay").read_text() == ONED
    assert front.install("--uninstall").returncode == 0
    assert (front.oned.read_text(), front.rc.read_text()) == (ONED, RC)


def test_edit_refuses_a_file_that_it_does_not_understand(front: FrontEnd) -> None:
    front.oned.write_text('VM_MAD = [ NAME = "kvm", ARGUMENTS = "-l deploy=mine kvm" ]\n')
    done = front.install("--edit")
    assert done.returncode == 1
    assert "is not as OpenNebula's: write this in by hand" in done.stderr.splitlines()[-1]
    front.oned.write_text(ONED.replace("kvm -p", "kvm -l deploy=mine -p"))
    done = front.install("--edit", "--persistent")
    assert done.returncode == 1
    assert "deploy=deploy.forebay" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("version", "code", "says"),
    [
        ("6.10.4", 1, "OpenNebula 6.10.4 is too old"),
        ("x", 1, "says no version"),
        ("7.0.0", 0, ""),
        ("7.5.0", 0, "is newer than"),
        ("10.0.0", 0, "is newer than"),
    ],
)
def test_versions_of_opennebula(front: FrontEnd, version: str, code: int, says: str) -> None:
    before = front.tree()
    (front.remotes / "VERSION").write_text(version)
    done = front.install()
    assert (done.returncode, says in done.stderr, len(done.stderr.splitlines())) == (
        (code, True, 1 if says else 0)
    )
    assert (front.tree().keys() == before.keys()) == (code == 1)


def test_a_packager_installs_below_a_root_of_his_own(front: FrontEnd, tmp_path: Path) -> None:
    root = tmp_path / "with space"
    done = front.install(ONE_LOCATION="", DESTDIR=str(root))
    assert (done.returncode, done.stderr) == (0, "")
    assert (root / "usr/bin/forebay-one").exists()
    assert (root / "var/lib/one/remotes/tm/forebay/ln").readlink() == Path("../shared/ln")
    assert front.install("--edit", ONE_LOCATION="", DESTDIR=str(root)).returncode == 1
    assert front.install("--uninstall", ONE_LOCATION="", DESTDIR=str(root)).returncode == 0
    assert [x for x in root.rglob("*") if not x.is_dir()] == []


def test_elsewhere_than_on_a_front_end_it_says_so(tmp_path: Path, front: FrontEnd) -> None:
    done = front.install(ONE_LOCATION=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "run this on the front-end, or set ONE_LOCATION" in done.stderr
    assert front.install("--what").returncode == 2
    assert "--persistent" in front.install("--help").stdout


# ------------------------------------------------------------------------------------------------------- probe and rank


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("#!/bin/sh\necho FOREBAY_STATE=ok\n", "FOREBAY_STATE=ok\n"),
        ("#!/bin/sh\nexit 1\n", 'FOREBAY_STATE="down"\nLS_FREE=0\n'),
        ("", 'FOREBAY_STATE="none"\nLS_FREE=0\n'),
    ],
)
def test_the_probe_never_fails_a_host(tmp_path: Path, command: str, says: str) -> None:
    for tool in ("timeout", "bash"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    if command:
        (tmp_path / "forebay").write_text(command)
        (tmp_path / "forebay").chmod(0o755)
    probe = ADDON / "remotes/im/kvm-probes.d/host/system/forebay.sh"
    done = subprocess.run(
        [probe], capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, says, "")


def test_rank_prints_or_writes_the_lines_of_a_template(front: FrontEnd, tmp_path: Path) -> None:
    front.install()
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    template = (
        "<VMTEMPLATE><UNAME>oneadmin</UNAME><TEMPLATE><DISK><IMAGE_ID>3</IMAGE_ID></DISK><DISK>"
        "<IMAGE>web</IMAGE></DISK><DISK><SIZE>1</SIZE></DISK></TEMPLATE></VMTEMPLATE>"
    )
    written = tmp_path / "written"
    image = f"<IMAGE><ID>4</ID><NAME>web</NAME><UNAME>oneadmin</UNAME><SOURCE>/d/100/{HASH}</SOURCE></IMAGE>"
    for name, text in (
        ("onetemplate", f"[ $1 = show ] && echo '{template}'; [ ! -e \"$4\" ] || cat \"$4\" >{written}"),
        ("oneimage", f"[ $1 = show ] && echo '{image}' || echo '<IMAGE_POOL>{image}</IMAGE_POOL>'"),
    ):  # fmt: skip
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    environment = {"ONE_LOCATION": str(front.location), "PATH": f"{bin_}:{os.environ['PATH']}"}
    tool = front.location / "bin" / "forebay-one"

    def called(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tool), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    lines = (
        'SCHED_RANK="FOREBAY_WARM_0123456789AB * 100 + FREE_CPU"\n'
        'SCHED_REQUIREMENTS="FOREBAY_STATE = \\"ok\\" & LS_FREE > 500"\n'
    )
    assert called("rank", "my web", "--free", "500").stdout == lines
    done = called("rank", "my web", "--free", "500", "--update")
    assert (done.returncode, done.stdout) == (
        0,
        "template my web: SCHED_RANK and SCHED_REQUIREMENTS are set\n",
    )
    assert written.read_text() == lines
    for words in (("rank", "-x"), ("rank", ""), ("rank", "a", "--free", "-1"), ()):
        assert called(*words).returncode == 2
    (bin_ / "onetemplate").write_text("#!/bin/sh\necho no such template >&2; exit 255\n")
    done = called("rank", "none")
    assert (done.returncode, done.stderr) == (
        (1, "ERROR: forebay-one: onetemplate show -x: no such template\n")
    )
