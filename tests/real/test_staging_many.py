# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay stage IMAGE --hosts A,B`: real hosts, told by a script in the place of ssh, which runs that there."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from real.processes import MIB, random_image
from real.staging_bed import StagingHost, hosts

IMAGE = "images:a b.raw"


def fake_ssh(folder: Path, staging: Sequence[StagingHost]) -> dict[str, str]:
    """The environment of a command whose ssh knows these hosts, by their addresses; all others are off."""
    folder.mkdir()
    cases = "".join(
        f"{host.address}) export FOREBAY_CONFIG={shlex.quote(str(host.gateway.config))};;\n"
        for host in staging
    )
    script = f"""#!/bin/sh
while [ "$1" != -- ]; do shift; done
case "$2" in
{cases}*) echo "ssh: connect to host $2 port 22: No route to host" >&2; exit 255;;
esac
forebay() {{ {shlex.quote(sys.executable)} -m forebay "$@"; }}
eval "$3"
"""
    path = folder / "ssh"
    path.write_text(script)
    path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def stage(
    source: StagingHost, environment: dict[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forebay", "--config", str(source.gateway.config), "stage"]
    return subprocess.run(
        [*command, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_one_command_has_all_hosts_have_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    images = tmp_path / "store"
    images.mkdir()
    content = random_image(images / "a b.raw", 8 * MIB + 1, 1)
    with hosts(3, images) as staging:
        environment = fake_ssh(tmp_path / "bin", staging)
        source, *others = staging
        names = ",".join([*(host.address for host in others), "192.0.2.1"])
        done = stage(source, environment, IMAGE, "--hosts", names, "--as", source.address, "--json")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        result = lines[-1]["result"]
        assert (result["hosts"], result["done"], result["off"]) == (3, 2, 1)
        for host in others:
            last = [line for line in lines if line.get("host") == host.address][-1]
            assert (last["state"], last["cached_bytes"]) == ("done", len(content))
            assert host.read("a b.raw") == content
        assert [host.stage() for host in staging] == [[], [], []], "nobody stages any more"

        again = stage(
            source, environment, IMAGE, "--hosts", others[0].address, "--as", source.address
        )
        assert again.returncode == 0
        assert "1 of 1 hosts have it" in again.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([IMAGE, "--hosts", "-oProxyCommand=touch x"], "no host"),
        ([IMAGE, "--hosts", "a;b"], "no host"),
        ([IMAGE, "--peers=-x"], "begins with -"),
        ([IMAGE, "--peers", "a", "--hosts", "b"], "not allowed with"),
        ([IMAGE, "--hosts", "a", "--rate", "0"], "rate"),
    ],
)
def test_words_that_mean_nothing_are_wrong_usage(words: list[str], text: str) -> None:
    command = [sys.executable, "-m", "forebay", "stage", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert text in done.stderr
