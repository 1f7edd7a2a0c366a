# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Prometheus itself reads a daemon's metrics; what is shipped for it is right, and asks for what there is."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, end, random_image

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "config/prometheus/alerts.yml"
DASHBOARD = ROOT / "config/grafana/forebay.json"
PROGRAMS = Path(sys.prefix) / "prometheus"

Connect = Callable[..., Any]
Make = Callable[..., GatewayProcess]

pytestmark = pytest.mark.skipif(
    not (PROGRAMS / "promtool").exists(), reason="make setup could not fetch prometheus"
)


def promtool(*arguments: str | Path, cwd: Path) -> None:
    run = subprocess.run(
        [PROGRAMS / "promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_alerts_come_when_they_should(tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(ROOT / "tests/data/alerts-test.yml", tmp_path)
    promtool("check", "rules", "--lint-fatal", "alerts.yml", cwd=tmp_path)
    promtool("test", "rules", "alerts-test.yml", cwd=tmp_path)


def test_every_alert_is_tried() -> None:
    shipped = set(re.findall(r"- alert: (\w+)", ALERTS.read_text()))
    tried = set(re.findall(r'alertname="(\w+)"', (ROOT / "tests/data/alerts-test.yml").read_text()))
    assert shipped == tried


def expressions() -> dict[str, str]:
    """Those of the dashboard, by panel, with what Grafana puts in for its variables."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = {}
    for panel in panels:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$host", ".*").replace("$__rate_interval", "1m")
            found[f"{panel['title']} {target['refId']}"] = expression
    return found


class Prometheus:
    """A server with one target, on a port of its own."""

    def __init__(self, directory: Path, target: int) -> None:
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {"job_name": "forebay", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
            ],
        }
        path = directory / "prometheus.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        with (directory / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    PROGRAMS / "prometheus",
                    f"--config.file={path}",
                    f"--storage.tsdb.path={directory / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--log.level=warn",
                ],
                cwd=directory,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "GOMAXPROCS": "1"},
            )

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> list[Any]:
        """Its samples, of now."""
        found: list[Any] = self.get("query", query=expression)["result"]
        return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def prometheus(directory: Path, target: int) -> Iterator[Prometheus]:
    server = Prometheus(directory, target)
    try:
        yield server
    finally:
        end(server.process)


def test_a_busy_daemon_is_scraped_and_every_panel_has_something_to_show(
    make_gateway: Make, connect: Connect, tmp_path: Path
) -> None:
    port = free_port()
    gateway = make_gateway({"metrics": {"listen": f"127.0.0.1:{port}"}})
    random_image(gateway.images / "a.raw", 8 * MIB, 1)
    gateway.attach("a", "a.raw", "--mode", "write-back")
    client = connect(gateway.uri("a"))
    with prometheus(tmp_path, port) as server:

        def shows() -> set[str]:
            """The panels that have nothing yet; the daemon is kept busy meanwhile."""
            client.pread(65536, 65536 * (time.monotonic_ns() % 128))
            client.pwrite(os.urandom(65536), 0)
            time.sleep(0.2)
            return {
                name for name, expression in expressions().items() if not server.value(expression)
            }

        def is_up() -> bool:
            try:
                return server.value("up") != [] and server.value("up")[0]["value"][1] == "1"
            except OSError:
                return False

        wait_for(is_up, "Prometheus scrapes")
        # nothing fails here, so the one panel that shows only what does has nothing to show
        wait_for(
            lambda: shows() == {"Requests that stores failed A"},
            "every panel shows something",
            seconds=90,
        )
        rules = server.get("rules")["groups"][0]["rules"]
        assert [rule["name"] for rule in rules if rule.get("lastError")] == []
        firing = {alert["labels"]["alertname"] for alert in server.get("alerts")["alerts"]}
        assert not firing & {
            "ForebayAway",
            "ForebayConflict",
            "ForebayDiskFailed",
            "ForebayCacheFailed",
        }


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_there_are(make_gateway: Make) -> None:
    port = free_port()
    gateway = make_gateway({"metrics": {"listen": f"127.0.0.1:{port}"}})
    random_image(gateway.images / "a.raw", MIB, 1)
    gateway.attach("a", "a.raw", "--mode", "write-back")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        there = set(re.findall(r"(?m)^# TYPE (\S+)", answer.read().decode()))
    wanted = " ".join([*expressions().values(), ALERTS.read_text()])
    names = set(re.findall(r"\bforebay_\w+", wanted))
    assert {name.removesuffix("_bucket") for name in names} <= there
