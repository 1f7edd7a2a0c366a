# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The AppArmor and SELinux snippets are accepted by those who compile them. Whether a kernel enforces them as meant is
not shown here: it takes one that has AppArmor or SELinux.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CONFIG = Path(__file__).resolve().parents[2] / "config"

SURROUNDINGS = """
(handleunknown allow)
(class process (fork)) (class dir (getattr search)) (class sock_file (getattr write))
(class unix_stream_socket (connectto))
(classorder (process dir sock_file unix_stream_socket))
(sid kernel) (sidorder (kernel))
(sensitivity s0) (sensitivityorder (s0)) (category c0) (categoryorder (c0)) (sensitivitycategory s0 (c0))
(user system_u) (role object_r) (role system_r) (userrole system_u object_r) (userrole system_u system_r)
(userlevel system_u (s0)) (userrange system_u ((s0) (s0 (c0))))
(typeattribute file_type) (typeattribute non_security_file_type) (typeattribute virt_domain)
(type kernel_t) (roletype system_r kernel_t) (type svirt_t) (roletype system_r svirt_t)
(type unconfined_service_t) (roletype system_r unconfined_service_t)
(typeattributeset virt_domain (svirt_t))
(allow kernel_t self (process (fork)))
(sidcontext kernel (system_u system_r kernel_t ((s0) (s0))))
"""
"""What the distribution's policy brings, as far as the module names it."""


def tool(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed (package {package})")
    return found


@pytest.mark.parametrize("name", ["libvirt-qemu", "libvirtd"])
def test_apparmor(name: str, tmp_path: Path) -> None:
    parser = tool("apparmor_parser", "apparmor")
    profile = tmp_path / "profile"
    snippet = (CONFIG / "apparmor" / name).read_text()
    for text, accepted in (
        (snippet, True),
        (snippet.replace(" rw,", " write,"), "rw," not in snippet),
    ):
        profile.write_text(f"profile test {{\n{text}}}\n")
        command = [parser, "--skip-kernel-load", "--skip-cache", "--skip-read-cache", str(profile)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == accepted, done.stderr


def test_selinux(tmp_path: Path) -> None:
    compiler = tool("secilc", "secilc")
    (tmp_path / "base.cil").write_text(SURROUNDINGS)
    contexts = tmp_path / "contexts"
    module = CONFIG / "selinux" / "forebay.cil"
    command = [compiler, "-M", "true", "-o", str(tmp_path / "policy"), "-f", str(contexts)]
    done = subprocess.run(
        [*command, str(tmp_path / "base.cil"), str(module)], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contexts.read_text().split() == [
        "/run/forebay(-[^/]*)?/disks(/.*)?",
        "system_u:object_r:forebay_disk_t:s0",
    ]
