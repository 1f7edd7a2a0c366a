# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay page` in a real browser: it shows what the daemon says, as text, and nothing but that, on any screen."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import pytest
import trio

from forebay.page.server import Page, Server, listeners_on
from real.browser import PROGRAM, Browser
from real.gateway_process import COMPILED, GatewayProcess
from real.processes import MIB, end, random_image
from real.shared_gateway import SharedGateways
from real.terminal import SHOTS

HOSTILE = "a<script>window.hit=1</script><img src=x onerror=window.hit=1>\"'&{{7*7}}.raw"
TABLE = "document.querySelector('#disks tbody tr') && document.querySelector('svg path')"

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium-headless-shell: make setup")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture
def quiet(browser: Browser) -> Iterator[Browser]:
    """The browser, of which no page may say anything on the console."""
    browser.console.clear()
    browser.asked.clear()
    browser.look_like(1000, 800, "light")
    yield browser
    assert browser.console == []
    browser.open("about:blank")


# ------------------------------------------------------------------------------------------------- a daemon of names


def _disk(name: str, image: str, **more: Any) -> dict[str, Any]:
    counters = ["reads", "writes", "read_bytes", "written_bytes", "read_hits", "read_misses"]
    counters += ["origin_read_bytes", "origin_written_bytes", "origin_errors"]
    told = dict.fromkeys(counters, 1 << 20) | {"name": name, "image": image, "size": 1 << 40}
    told |= {"mode": "write-back", "state": "ready", "reason": None, "overlay": False}
    told |= {"read_only": False, "cached_bytes": 1 << 33, "dirty_bytes": 1 << 30}
    return told | {"lag_seconds": 12.3, "max_lag_seconds": 30, "clients": 1} | more


class Daemon:
    """Says what no daemon would: names of all kinds, and a day that went up and down."""

    def get(self, target: str) -> Any:
        long = "images:" + "x" * 200 + ".raw"
        disks = [_disk("<script>window.hit=1</script>", HOSTILE), _disk("A" * 64, long)]
        disks.append(_disk("vm3", "images:a.raw", state="conflict", reason=HOSTILE * 3))
        image = {"format": "raw", "size": 1 << 40, "cached_bytes": 1 << 33, "cached_percent": 3.1}
        image |= {"pinned": True, "tags": ["<b>", "y" * 64], "disks": ["vm1"]}
        store = {"state": "away", "reason": HOSTILE, "free_bytes": 1 << 41, "size": 1 << 42}
        summary = {"state": "degraded", "reasons": [HOSTILE], "disk_count": 3, "lag_seconds": 12.3}
        summary |= {"dirty_bytes": 3 << 30, "stores": [store | {"store": "s" * 64}]}
        summary["cache"] = {"state": "ok", "used_bytes": 1 << 39, "size": 1 << 40}
        answers = {"/summary": summary, "/disks": disks}
        answers["/images"] = [image | {"image": name} for name in (HOSTILE, long)]
        return answers.get(target) or self._history()

    def _history(self) -> dict[str, Any]:
        figures = ["seconds", "read_hits", "read_misses", "read_bytes", "written_bytes"]
        figures += ["dirty_bytes", "origin_read_bytes", "origin_written_bytes", "origin_errors"]
        figures += ["lag_seconds", "troubled", "conflicts"]
        values = {figure: [abs(n % 48 - 24) * 1e7 for n in range(240)] for figure in figures}
        values |= {"seconds": [360.0 if n % 60 > 2 else 0 for n in range(240)]}
        for number, kind in enumerate(("hit", "origin_read")):
            for share in ("p50", "p99"):
                values[f"{kind}_{share}_seconds"] = [
                    1e-4 * 40**number * (1 + n % 3) for n in range(240)
                ]
        values["lag_seconds"] = [n % 30 for n in range(240)]
        values["troubled"] = values["conflicts"] = [n // 80 for n in range(240)]
        return {
            "now": 1.7e9, "begin": 1.7e9 - 86400, "step_seconds": 360, "disk": None,
            "series": [{"figure": key, "values": found} for key, found in values.items()],
        }  # fmt: skip


@contextmanager
def served(page: Page) -> Iterator[str]:
    """The address of the page, served in a thread."""
    started: list[tuple[int, Callable[[], None]]] = []
    ready = threading.Event()

    async def serve() -> None:
        listeners = await listeners_on(("127.0.0.1", 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, Server(page).connection, listeners)
            token = trio.lowlevel.current_trio_token()
            stop = partial(token.run_sync_soon, nursery.cancel_scope.cancel)
            started.append((listeners[0].socket.getsockname()[1], stop))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{started[0][0]}/"
    finally:
        started[0][1]()
        thread.join(30)


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    with served(Page(Daemon())) as url:
        yield url


def test_names_are_text_whatever_they_look_like(quiet: Browser, hostile: str) -> None:
    quiet.open(hostile)
    quiet.wait_for(TABLE)
    assert quiet.value("window.hit === undefined")
    assert quiet.value("document.querySelectorAll('body script').length") == 1
    assert quiet.value("document.querySelectorAll('img, iframe, b b').length") == 0
    shown = quiet.value("document.body.innerText")
    for text in ("<script>window.hit=1</script>", HOSTILE, "<b>"):
        assert text in shown
    quiet.value("document.querySelector('#disks td button').click()")
    quiet.wait_for("document.getElementById('one-name').textContent.length > 2")
    assert all(url.startswith(hostile) for url in quiet.asked), "something from elsewhere"


def test_it_fits_on_any_screen(quiet: Browser, hostile: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    quiet.open(hostile)
    quiet.wait_for(TABLE)
    for width, scheme in ((320, "light"), (375, "dark"), (768, "light"), (1280, "dark")):
        quiet.look_like(width, 800, scheme)
        quiet.wait_for(
            f"innerWidth === {width} && document.querySelector('svg').clientWidth < {width}"
        )
        quiet.screenshot(SHOTS / f"hostile-{width}-{scheme}.png")
        wide = quiet.value(
            "[...document.querySelectorAll('body *')].filter(x => x.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(x => x.tagName + ' ' + x.className + ' ' + x.textContent.slice(0, 30))"
        )
        assert (width, wide) == (width, [])
        assert quiet.value("document.documentElement.scrollWidth <= innerWidth")


CONTRAST = """(selector => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = x => { for (; x; x = x.parentElement) { const c = getComputedStyle(x).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } };
  return [...document.querySelectorAll(selector)].map(x => {
    const one = light(getComputedStyle(x).color), two = light(behind(x));
    return [(Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05), x.textContent.slice(0, 40)]; });
})('h1, h2, h3, p, li, b, td, th button, td button, .tile span, .at, .state, .bad, .good, .faint')"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(quiet: Browser, hostile: str, scheme: str) -> None:
    quiet.look_like(800, 800, scheme)
    quiet.open(hostile)
    quiet.wait_for(TABLE)
    found = quiet.value(CONTRAST)
    assert len(found) > 40
    assert [one for one in found if one[0] < 4.5] == []
    dark = quiet.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 100")
    assert dark == (scheme == "dark")


def test_tables_are_sorted_by_their_headings_and_kept_so(quiet: Browser, hostile: str) -> None:
    quiet.open(hostile)
    quiet.wait_for(TABLE)
    buttons = "[...document.querySelectorAll('#disks tbody tr td:first-child button')]"
    names = buttons + ".map(x => x.textContent[0]).join('')"
    quiet.value("document.querySelector('#disks th button').click()")
    first = quiet.value(names)
    assert (
        quiet.value("document.querySelector('#disks th').getAttribute('aria-sort')") == "ascending"
    )
    quiet.value("document.querySelector('#disks th button').click()")
    assert quiet.value(names) == first[::-1]
    assert (
        quiet.value("document.querySelector('#disks th').getAttribute('aria-sort')") == "descending"
    )


def test_a_chart_says_what_is_under_the_hand_and_gaps_are_gaps(
    quiet: Browser, hostile: str
) -> None:
    quiet.open(hostile)
    quiet.wait_for(TABLE)
    lag = "document.querySelector('#safe-charts svg')"
    quiet.wait_for(f"{lag}.querySelector('path').getAttribute('d').split('M').length === 5")
    quiet.value(f"{lag}.dispatchEvent(new KeyboardEvent('keydown', {{ key: 'ArrowLeft' }}))")
    quiet.wait_for(f"{lag}.querySelector('.hand')")
    assert re.fullmatch(
        r"Lag: \d\d:\d\d: [\d.]+ s", quiet.value(f"{lag}.getAttribute('aria-label')")
    )


@pytest.mark.parametrize("find", ["vm3", "nothing"])
def test_disks_are_found_by_name(quiet: Browser, hostile: str, find: str) -> None:
    quiet.open(hostile)
    quiet.wait_for(TABLE)
    quiet.value(f"get('find').value = '{find}'; get('find').dispatchEvent(new Event('input'))")
    quiet.wait_for(f"document.querySelectorAll('#disks tbody tr').length === {int(find == 'vm3')}")


def test_another_sites_name_shows_nothing(browser: Browser, hostile: str) -> None:
    browser.open(hostile.replace("127.0.0.1", "rebound.test"))
    browser.wait_for(
        "document.body && document.body.innerText.includes('not the host of that name')"
    )
    text = "fetch('/now').then(x => x.text())"
    assert "vm3" not in browser.value(text)


def test_no_other_page_may_read_or_frame_it(browser: Browser, hostile: str) -> None:
    with served(Page(Daemon())) as other:  # another port: another site
        browser.open(other)
        browser.wait_for(TABLE)
        assert (
            browser.value(f"fetch('{hostile}now').then(x => 'read', x => 'refused')") == "refused"
        )


# -------------------------------------------------------------------------------------------------- the whole of it


class PageProcess:
    """`forebay page` of a gateway, on a port of its own."""

    def __init__(self, gateway: GatewayProcess, *words: str) -> None:
        self.port = _free_port()
        listen = ("--listen", f"127.0.0.1:{self.port}")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forebay", "page", "--config", str(gateway.config), *listen, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **COMPILED},
        )  # fmt: skip

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        self.process.communicate()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it; its exit code, and what it wrote to stderr."""
        self.process.send_signal(how)
        assert self.process.stderr is not None
        return self.process.wait(30), self.process.stderr.read()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def gateways() -> Iterator[SharedGateways]:
    shared = SharedGateways()
    yield shared
    shared.remove()


@pytest.fixture
def gateway(gateways: SharedGateways) -> Iterator[GatewayProcess]:
    with gateways.emptied() as running:
        yield running


def test_a_real_daemon_that_goes_and_comes_back(gateway: GatewayProcess, browser: Browser) -> None:
    random_image(gateway.images / "debian12.raw", 8 * MIB, 1)
    gateway.attach("vm1", "debian12.raw")
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "read 0 4M", "-c", "read 0 4M", gateway.uri("vm1")],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with PageProcess(gateway) as page:
        assert page.said == f"forebay page: http://127.0.0.1:{page.port}/\n"
        browser.open(f"http://127.0.0.1:{page.port}/")
        browser.wait_for(TABLE)
        browser.console.clear()
        row = browser.value("document.querySelector('#disks tbody tr').innerText")
        assert "vm1" in row
        assert "4.00 MiB" in row
        assert browser.value("document.getElementById('state').textContent") == "all is well"
        browser.wait_for(
            "document.getElementById('helps-tiles').innerText.includes('8.00 MiB were read')"
        )
        gateway.kill()
        browser.wait_for("document.getElementById('fault').textContent.includes('no daemon at')")
        gateway.start()
        browser.wait_for("document.getElementById('fault').hidden")
        assert browser.value("document.getElementById('state').textContent") == "all is well"
        assert browser.console == []
        assert page.stop() == (0, "")


def test_a_port_that_is_taken_and_an_address_for_all_are_told(gateway: GatewayProcess) -> None:
    with PageProcess(gateway) as page:
        listen = f"127.0.0.1:{page.port}"
        second = gateway.cli("page", "--listen", listen, check=False)
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr.count("\n") == 1
        assert f"cannot listen on {listen}: Address already in use: choose" in second.stderr
    with PageProcess(gateway, "--listen", f"0.0.0.0:{_free_port()}") as page:
        code, said = page.stop(signal.SIGINT)
        assert code == 0
        assert re.fullmatch(r"forebay: warning: whoever reaches 0\.0\.0\.0:\d+ sees .*\n", said)
