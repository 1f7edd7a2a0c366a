# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The package for Debian: installed, upgraded under a guest, removed and purged, in a container of its own."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from real.container import REPOSITORY, Container
from real.disk_fixture import wait_for
from real.processes import MIB, accepts, random_image
from real.staging_bed import free_address
from real.steady_guest import SteadyGuest
from real.typed_page import typed

pytestmark = pytest.mark.timeout(900)

DPKG_SECONDS = 300.0
"""What it installs is compiled, 30 s of processor time, and triggers of others run."""

STAGING = free_address()
"""At which the container's host stages: it shares the network."""

CONFIG = f"""
[cache]
size = "128 MiB"
[staging]
listen = "{STAGING}"
[stores.images]
path = "/var/lib/images"
"""

FURTHER = """
[gateway]
state = "/var/lib/forebay-b"
run = "/run/forebay-b"
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package of this checkout, and the same of a later version."""
    for tool in ("dpkg-deb", "strip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    place = tmp_path_factory.mktemp("deb")
    named = {"OUT": str(place), "WORK": str(place / "work"), "VERSION": "1.0"}
    command = [REPOSITORY / "tools/deb.sh"]
    done = subprocess.run(
        command, env={**os.environ, **named}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    control = place / "work/root/DEBIAN/control"
    control.write_text(control.read_text().replace("Version: 1.0\n", "Version: 1.1\n"))
    later = place / "later.deb"
    root = place / "work/root"
    build = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(later)]
    subprocess.run(build, check=True, capture_output=True)
    return next(place.glob("forebay_1.0_*.deb")), later


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    found = Container()
    try:
        found.boot()
        found.run("install", "-d", "-m", "1777", "/var/lib/images")
        yield found
    finally:
        found.remove()


def dpkg(container: Container, *words: str | Path) -> str:
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", *words]
    return container.run(*command, within=DPKG_SECONDS).stdout


def left_of_it(container: Container) -> list[str]:
    """What a purge should have taken, and has not."""
    places = (
        "/etc/forebay /usr/lib/forebay /usr/bin/forebay /usr/share/doc/forebay /run/forebay "
        "/var/lib/forebay /usr/lib/systemd/system/forebay.service "
        "/etc/libvirt/hooks/qemu.d/forebay /etc/systemd/system/multi-user.target.wants/forebay.service"
    )
    return [place for place in places.split() if os.path.lexists(container.inside(place))]


def test_the_first_hour(packages: tuple[Path, Path], container: Container) -> None:
    """docs/first-hour.md, typed into a fresh container, says what it shows; what comes after finds it installed."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86 is not installed")
    shutil.copy(packages[0], container.inside("/root"))
    container.inside("/etc/apt/apt.conf.d/99offline").write_text(
        'APT::Install-Recommends "false";\n'
    )
    commands = typed(REPOSITORY / "docs/first-hour.md")
    began = time.monotonic()
    for one in commands:
        done = container.run(
            "bash", "-c", f"cd /root\n{one.command}", check=False, within=DPKG_SECONDS
        )
        assert done.returncode == 0 or one.command == "forebay doctor", (one.command, done)
        assert one.missing(done.stdout + done.stderr) == [], (one.command, done)
    print(f"\nfrom the package to a VM's disk and back: {time.monotonic() - began:.0f} s")
    images = container.inside("/srv/images")
    assert [path.name for path in images.iterdir()] == ["first.raw"]
    container.run("systemctl", "stop", "forebay")
    container.run("find", "/var/lib/forebay", "-mindepth", "1", "-delete")


def test_its_life(packages: tuple[Path, Path], container: Container) -> None:
    first, later = packages
    for package in packages:
        shutil.copy(package, container.inside("/var/lib/images"))
    if not os.path.lexists(container.inside("/usr/bin/forebay")):  # else by the test before
        told = dpkg(container, "-i", f"/var/lib/images/{first.name}")
        assert "systemctl enable --now forebay" in told
    assert container.run("/usr/bin/forebay", "--version").stdout.startswith("forebay ")
    container.inside("/etc/forebay/forebay.toml").write_text(CONFIG)
    container.run("systemctl", "enable", "--now", "forebay")

    random_image(container.inside("/var/lib/images/a.raw"), 8 * MIB, 1)
    container.run("chown", "forebay:", "/var/lib/images/a.raw")
    container.run("forebay", "attach", "a", "images:a.raw", "--mode", "write-back")
    [status] = json.loads(container.run("forebay", "status", "a", "--json").stdout)
    assert status["mode"] == "write-back"
    assert json.loads(container.run("forebay", "status", "--json").stdout)
    uri = f"nbd+unix:///?socket={container.inside('/run/forebay/disks/a.sock')}"
    pid = container.show("forebay.service", "MainPID")
    container.inside("/etc/forebay/b.toml").write_text(FURTHER + CONFIG)
    container.run("systemctl", "start", "forebay@b", "forebay-fuse")
    door = container.show("forebay-fuse.service", "MainPID")
    with SteadyGuest(uri, length=4 * MIB, depth=4) as guest:
        told = dpkg(container, "-i", f"/var/lib/images/{later.name}")
        assert "forebay-fuse is of the old version" in told
        assert container.show("forebay-fuse.service", "MainPID") == door, "a mount is not cut off"
        control = container.inside("/run/forebay/control.sock")
        wait_for(lambda: accepts(control), "the daemon is back")
        assert container.show("forebay.service", "MainPID") != pid, "the new version runs"
        refused = container.run("dpkg", "--remove", "forebay", check=False)
        assert refused.returncode != 0
        assert "VMs use its disks" in refused.stdout + refused.stderr
        assert container.show("forebay.service", "ActiveState") == "active"
        assert guest.finish()["errors"] == []
    container.run(
        "systemctl", "start", "forebay-stage"
    )  # with the libtorrent that is in the package
    assert container.show("forebay-stage.service", "ActiveState") == "active"
    container.run("systemctl", "stop", "forebay-stage")
    container.run("systemctl", "stop", "forebay-fuse")

    # A further daemon counts as the first one does.
    random_image(container.inside("/var/lib/images/b.raw"), MIB, 2)
    container.run("chown", "forebay:", "/var/lib/images/b.raw")
    container.run("forebay", "attach", "b", "images:b.raw", FOREBAY_CONFIG="/etc/forebay/b.toml")
    further = f"nbd+unix:///?socket={container.inside('/run/forebay-b/disks/b.sock')}"
    with SteadyGuest(further, length=MIB, depth=1) as guest:
        refused = container.run("dpkg", "--remove", "forebay", check=False)
        assert (
            "VMs use its disks, or its stores (forebay@b.service)"
            in refused.stdout + refused.stderr
        )
        assert guest.finish()["errors"] == []

    # With a disk on record, what is in the cache stays, and the image says whose it is.
    told = dpkg(container, "--purge", "forebay")
    assert "images:a.raw" in told
    assert "images:b.raw" in told
    assert "kept: /var/lib/forebay," in told
    assert "kept: /var/lib/forebay-b," in told
    assert left_of_it(container) == ["/etc/forebay", "/var/lib/forebay"], "b.toml is the operator's"
    container.run("rm", "/etc/forebay/b.toml")
    assert container.inside("/var/lib/images/a.raw.forebay").exists()

    dpkg(container, "-i", f"/var/lib/images/{later.name}")
    container.inside("/etc/forebay/forebay.toml").write_text(CONFIG)
    container.run("systemctl", "enable", "--now", "forebay")
    container.run("forebay", "detach", "a")
    assert not container.inside("/var/lib/images/a.raw.forebay").exists()
    assert "kept: /var/lib/forebay," not in dpkg(container, "--purge", "forebay")
    assert left_of_it(container) == []


def test_lintian_finds_no_error(packages: tuple[Path, Path]) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    command = ["lintian", "--allow-root", "--fail-on", "error", str(packages[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_manual_page_is_one_that_man_reads(packages: tuple[Path, Path]) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    pages = list((packages[0].parent / "work/root/usr/share/man").glob("man*/*.gz"))
    named = {"forebay.1.gz", "forebay-attach.1.gz", "forebay.toml.5.gz", "forebay.7.gz"}
    assert named <= {path.name for path in pages}
    plain = {"MANWIDTH": "100", "PATH": os.environ["PATH"]}
    for page in pages:
        command = ["man", "--warnings", "-l", str(page)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        assert done.stderr == "", page.name
        assert "NAME" in done.stdout
