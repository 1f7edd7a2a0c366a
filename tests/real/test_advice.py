# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay status --advice` of a daemon: what readers do reaches it, with the core and without, and is kept."""

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from real.disk_fixture import ask, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, random_image

Connect = Callable[..., Any]
Make = Callable[..., GatewayProcess]

BLOCK = 65536
BLOCKS = 500
AT_ONCE, TURNS = 150, 7


def advice(gateway: GatewayProcess) -> dict[str, Any]:
    told: dict[str, Any] = ask(gateway, "/advice")
    return told


def read(client: Any, seed: int, count: int) -> None:
    dice = random.Random(seed)
    for block in dice.choices(range(BLOCKS), k=count):
        client.pread(4096, block * BLOCK + 4096 * dice.randrange(16))


def read_in_turns(gateway: GatewayProcess, client: Any) -> dict[str, Any]:
    """The same, no more at once than is taken in; what is told then."""
    for turn in range(TURNS):
        read(client, turn, AT_ONCE)
        wait_for(partial(knows, gateway, (turn + 1) * AT_ONCE), "the reads are told of")
    return advice(gateway)


def knows(gateway: GatewayProcess, reads: int) -> bool:
    return bool(advice(gateway)["reads"] >= reads)


@pytest.mark.parametrize("core", [True, False])
def test_a_larger_cache_is_advised_where_it_would_help_and_a_restart_keeps_that(
    make_gateway: Make, connect: Connect, core: bool
) -> None:
    gateway = make_gateway({"cache": {"size": "16 MiB"}, "gateway": {"core": core}})
    random_image(gateway.images / "a.raw", BLOCKS * BLOCK, 1)
    assert "Too little was read" in gateway.cli("status", "--advice").stdout
    gateway.attach("a", "a.raw", "--read-only")
    client = connect(gateway.uri("a"))
    told = read_in_turns(gateway, client)
    assert json.loads(gateway.cli("status", "--advice", "--json").stdout)["sizes"] == told["sizes"]
    assert told["enough"]
    assert told["reads"] == TURNS * AT_ONCE
    assert told["size"] < 16 * MIB
    ratios = [size["hit_ratio"] for size in told["sizes"]]
    assert ratios == sorted(ratios)
    assert ratios[-1] > ratios[1] + 0.02, "all of the image would fit"
    assert ratios[1] == pytest.approx(told["hit_ratio"], abs=0.05), "computed, and seen"
    assert "more you would hit" in gateway.cli("status", "--advice").stdout
    client.shutdown()
    gateway.restart()
    wait_for(lambda: bool(advice(gateway)["since"] == told["since"]), "it knows what it knew")
    wait_for(lambda: bool(advice(gateway)["reads"] == told["reads"]), "and all of it")
    assert [size["hit_ratio"] for size in advice(gateway)["sizes"]] == ratios


def test_a_file_of_advice_that_cannot_be_used_is_one_line_in_the_log(make_gateway: Make) -> None:
    gateway = make_gateway()
    gateway.stop()
    (gateway.state / "advice").write_bytes(b"\0" * 5000)
    gateway.allow_log(r"advice is not used, the advice begins anew")
    gateway.start()
    wait_for(lambda: "begins anew" in gateway.log_text(), "the log says so")
    assert advice(gateway)["reads"] == 0
    gateway.restart()
    assert gateway.log_text().count("begins anew") == 1


def test_the_advice_is_about_all_disks_and_takes_no_name(gateway: GatewayProcess) -> None:
    assert gateway.cli("status", "vm1", "--advice", check=False).returncode == 2
