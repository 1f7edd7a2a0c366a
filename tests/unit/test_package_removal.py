# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The prerm of the Debian package, run with other directories, over fakes: what it is not removed under."""

import subprocess
from pathlib import Path

import pytest

PRERM = Path(__file__).resolve().parents[2] / "packaging" / "debian" / "prerm"


def removed(folder: Path, *, status: str = "[]", stores: str = "[]", overlays: str = "[]") -> bool:
    """Whether the package may be removed while the daemon answers so."""
    for name in ("run", "state", "bin"):
        (folder / name).mkdir()
    script = PRERM.read_text().replace("/run/systemd/system", str(folder / "run"))
    script = script.replace("/var/lib/forebay", str(folder / "state"))
    script = script.replace("/usr/lib/forebay", str(folder / "lib"))
    for name, told in (("status", status), ("stores", stores), ("overlays", overlays)):
        (folder / name).write_text(told)
    fakes = {
        "forebay": f'[ "$2" != --json ] || cat "{folder}/$1"',
        "systemctl": '[ "$1" != list-units ] || echo "forebay.service loaded active running x"',
    }
    for name, text in fakes.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", "-c", script, "prerm", "remove"],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) != ("VMs use" in done.stderr), done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("what", ["status", "stores"])
def test_the_package_is_not_removed_under_a_vm(tmp_path: Path, what: str) -> None:
    assert not removed(tmp_path, **{what: '[\n  {\n    "clients": 1\n  }\n]\n'})
    assert not (tmp_path / "state" / "removable").exists()


def test_the_package_is_removed_where_nobody_is_connected(tmp_path: Path) -> None:
    assert removed(tmp_path, stores='[{"clients": 0, "refused_clients": 3}]')
    assert (tmp_path / "state" / "removable").exists()


def test_what_disks_and_overlays_have_is_kept(tmp_path: Path) -> None:
    assert removed(tmp_path, status='[{"clients": 0}]')
    assert not (tmp_path / "state" / "removable").exists()
