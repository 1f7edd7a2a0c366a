# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""docs/json.md is true: what it names is there; and no locale and no odd text brings a traceback."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "json.md"


def keys_of(heading: str) -> list[str]:
    """What the first column of the tables below that heading names."""
    text = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What each command of a gateway with disks, images, a store's socket and a snapshot writes."""
    gateway = GatewayProcess({"stores.images": {"socket": True}})
    try:
        for name in ("a.raw", "b.raw", "c.raw"):
            random_image(gateway.images / name, MIB, 1)
        gateway.start()
        gateway.cli("attach", "vm1", "images:a.raw")
        gateway.cli("attach", "ov", "images:b.raw", "--overlay", "--keep")
        gateway.cli("snapshot", "ov", "s1")
        socket = f"nbd+unix:///c.raw?socket={gateway.run}/stores/images.sock"
        subprocess.run(["nbdinfo", socket], check=True, capture_output=True)

        def ask(*words: str) -> Any:
            return json.loads(gateway.cli(*words, "--json=1").stdout)

        return {
            "status": ask("status", "vm1")[0],
            "images": ask("images")[0],
            "stores": ask("stores")[0],
            "overlays": ask("overlays")[0],
            "snapshots": ask("snapshots", "ov")[0],
            "events": ask("events")[0],
            "stats": ask("stats")[0],
            "interval": ask("stats", "0.1", "1"),
            "latency": ask("stats", "-l", "0.1", "1"),
            "histogram": ask("stats", "-w", "0.1", "1"),
            "flush": ask("flush", "vm1"),
            "cache": ask("cache"),
            "reload": ask("reload"),
            "get": ask("get", "vm1")[0],
            "set": ask("set", "vm1", "max_lag=5s")[0],
        }
    finally:
        gateway.remove()


@pytest.mark.parametrize(
    ("heading", "commands"),
    [
        ("`forebay status`, `status NAME`, `status -x`", ["status"]),
        ("`forebay get`, `forebay set`", ["get", "set"]),
        ("`forebay reload`", ["reload"]),
        ("`forebay images`", ["images"]),
        ("`forebay stores`", ["stores"]),
        ("`forebay events`", ["events"]),
        ("`forebay overlays`, `forebay snapshots NAME`", ["overlays", "snapshots"]),
        (
            "`forebay stats`, `forebay flush`, `forebay cache`",
            ["stats", "interval", "latency", "histogram", "flush", "cache"],
        ),
    ],
)
def test_keys_that_are_promised_are_there(
    told: dict[str, Any], heading: str, commands: list[str]
) -> None:
    promised = keys_of(heading)
    assert len(promised) > 3
    there = set().union(*(told[command] for command in commands))
    assert [key for key in promised if key not in there] == []


def test_what_the_contract_names_is_promised() -> None:
    """The keys that every version has had."""
    contract = (
        "name image mode state read_only overlay size cached_bytes dirty_bytes lag_seconds read_hits read_misses "
        "write_hits write_misses origin_read_bytes origin_written_bytes clients socket"
    )
    assert set(contract.split()) <= set(keys_of("`forebay status`, `status NAME`, `status -x`"))


ODD: list[str | bytes] = [
    "images:é漢字.raw:", b"images:\xff\xfe.raw", "images:a\nb.raw", "images:\x1b[31m", "\u202e", "",
]  # fmt: skip

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_no_locale_and_no_odd_text_brings_a_traceback(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = make_gateway()
    random_image(gateway.images / "é漢字.raw", MIB, 1)
    gateway.cli("attach", "vm1", "images:é漢字.raw")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))
    }
    environment |= ASCII | {"FOREBAY_CONFIG": str(gateway.config)}

    def run(*words: str | bytes) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "forebay", *words],
            env=environment,
            capture_output=True,
            check=False,
            timeout=60,
        )
        for said in (done.stdout, done.stderr):
            assert b"Traceback" not in said
            assert b"\x1b" not in said
        assert done.returncode in (0, 1, 2)
        return done

    for words in (["status"], ["status", "-x"], ["status", "vm1"], ["images"], ["xml", "vm1"]):
        assert run(*words).returncode == 0
    [disk] = json.loads(run("status", "--json").stdout)
    environment |= {"LC_ALL": "no_SUCH.locale"}
    assert run("status").returncode == 0
    assert disk["image"] == "images:é漢字.raw"
    for odd in ODD:
        for before in ("attach", "vm2"), ("trace", "show"):
            done = run(*before, odd)
            assert done.returncode != 0
            assert done.stderr.count(b"\n") == 1, done.stderr
