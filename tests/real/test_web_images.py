# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images on web servers, read-only and as overlays: only what is allowed, and never two versions of one file mixed."""

import hashlib
import http.server
import os
import random
import re
import signal
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import run, wait_for
from real.gateway_process import GatewayProcess
from real.processes import MIB, need
from real.test_formats import children
from real.web_bed import make_authority

Connect = Callable[..., Any]
Make = Callable[..., GatewayProcess]

SIZE = 8 * MIB


class Site:
    """What a web server gives: files by path, and how."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.ranges = True
        self.tags = True
        self.is_away = False
        self.url = ""
        self.asked: list[str] = []

    def tag(self, path: str) -> str:
        return f'"{hashlib.sha256(self.files[path]).hexdigest()[:16]}"' if self.tags else ""


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        site, path = self.site, self.path
        site.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}")
        if site.is_away:
            return self.say(503, {})
        if path in site.moved:
            return self.say(302, {"Location": site.moved[path]})
        if path not in site.files:
            return self.say(404, {})
        content, tag = site.files[path], site.tag(path)
        if tag and self.headers.get("If-Match", tag) != tag:
            return self.say(412, {})
        named = {"ETag": tag} if tag else {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not site.ranges:
            return self.say(200, named, content)
        named["Accept-Ranges"] = "bytes"
        if wanted is None:
            return self.say(200, named, content)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        named["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.say(206, named, content[first : last + 1])

    def say(self, code: int, named: dict[str, str], content: bytes = b"") -> None:
        self.send_response(code)
        for name, value in {**named, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nobody wants to read it."""


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Who hangs up, does."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    need("nbdkit", "openssl")
    if subprocess.run(["nbdkit", "curl", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("nbdkit's curl plugin is not installed")
    make_authority(tmp_path)
    site = Site()
    server = QuietServer(("127.0.0.1", 0), type("H", (Handler,), {"site": site}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    site.url = f"https://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def web_gateway(site: Site, tmp_path: Path, make_gateway: Make) -> GatewayProcess:
    """A gateway that may use what lies below /images/ on the site."""
    origins = {"https": [f"{site.url}/images/"], "ca_file": str(tmp_path / "ca.pem")}
    return make_gateway({"origins": origins})


def refused(gateway: GatewayProcess, url: str, *options: str) -> str:
    done = gateway.cli("attach", "d", url, *(options or ("--overlay",)), check=False)
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_an_image_of_a_web_server_is_read_and_lies_under_overlays(
    web_gateway: GatewayProcess, connect: Connect, site: Site, rng: random.Random
) -> None:
    gateway, url = web_gateway, f"{site.url}/images/a.raw"
    content = site.files["/images/a.raw"] = rng.randbytes(SIZE)
    gateway.attach("r", url, "--read-only")
    gateway.attach("o", url, "--overlay")
    assert gateway.status("r")["size"] == SIZE
    overlay, reader = connect(gateway.uri("o")), connect(gateway.uri("r"))
    assert bytes(overlay.pread(SIZE, 0)) == content
    asked = len(site.asked)
    assert bytes(reader.pread(SIZE, 0)) == content
    assert len(site.asked) <= asked + 1, "what one disk has read is there for the other"
    overlay.pwrite(b"x" * 4096, 0)
    gateway.restart(kill=True)
    overlay = connect(gateway.uri("o"))
    assert bytes(overlay.pread(SIZE, 0)) == b"x" * 4096 + content[4096:]
    assert gateway.cli("images").stdout.count(url) == 1


def test_its_server_that_is_killed_is_started_again(
    web_gateway: GatewayProcess, connect: Connect, site: Site, rng: random.Random
) -> None:
    gateway, url = web_gateway, f"{site.url}/images/a.raw"
    content = site.files["/images/a.raw"] = rng.randbytes(SIZE)
    gateway.allow_log(r"WARNING .*(opened anew|reached again)")
    gateway.attach("d", url, "--read-only")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(MIB, 0)) == content[:MIB]
    [server] = [pid for child in children(gateway.pid) for pid in children(child)]
    os.kill(server, signal.SIGKILL)
    assert bytes(client.pread(SIZE, 0)) == content


def test_two_versions_of_a_file_are_never_mixed(
    web_gateway: GatewayProcess, connect: Connect, site: Site, rng: random.Random
) -> None:
    gateway, url = web_gateway, f"{site.url}/images/a.raw"
    old = site.files["/images/a.raw"] = rng.randbytes(SIZE)
    gateway.allow_log("WARNING")
    gateway.attach("d", url, "--read-only")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(MIB, 0)) == old[:MIB]
    new = site.files["/images/a.raw"] = rng.randbytes(SIZE)
    with pytest.raises(Exception, match="Input/output error"):
        client.pread(MIB, SIZE - MIB)
    wait_for(lambda: "was replaced" in gateway.log_text(), "the new version is noticed")
    assert bytes(client.pread(SIZE, 0)) == new


def test_an_overlay_is_never_continued_on_another_version(
    web_gateway: GatewayProcess, connect: Connect, site: Site, rng: random.Random
) -> None:
    gateway, url = web_gateway, f"{site.url}/images/a.raw"
    site.files["/images/a.raw"] = rng.randbytes(SIZE)
    gateway.allow_log("WARNING|ERROR")
    gateway.attach("d", url, "--overlay")
    connect(gateway.uri("d")).pwrite(b"x" * 4096, 0)
    site.files["/images/a.raw"] = rng.randbytes(SIZE)
    gateway.restart()
    wait_for(lambda: gateway.status("d")["state"] == "conflict", "the new version is noticed")


def test_a_web_server_that_is_away_stops_no_warm_disk(
    web_gateway: GatewayProcess, connect: Connect, site: Site, rng: random.Random
) -> None:
    gateway, url = web_gateway, f"{site.url}/images/a.raw"
    content = site.files["/images/a.raw"] = rng.randbytes(SIZE)
    gateway.allow_log("WARNING")
    gateway.attach("d", url, "--overlay", "--preload", "all")
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == content
    client.shutdown()
    site.is_away = True
    gateway.restart()
    client = connect(gateway.uri("d"))
    assert bytes(client.pread(SIZE, 0)) == content
    assert gateway.status("d")["state"] == "degraded"
    site.is_away = False
    wait_for(lambda: gateway.status("d")["state"] == "ready", "it is reached again")


def test_what_is_not_allowed_or_cannot_be_served_is_one_line(
    web_gateway: GatewayProcess, site: Site, tmp_path: Path, make_gateway: Make
) -> None:
    gateway = web_gateway
    site.files |= {"/images/a.raw": b"a" * MIB, "/secret/a.raw": b"s" * MIB}
    site.files["/images/empty"] = b""
    site.moved |= {
        "/images/out": f"{site.url}/secret/a.raw",
        "/images/plain": "http://127.0.0.1:1/a.raw",
        "/images/file": "file:///etc/passwd",
        "/images/else": "https://169.254.169.254/latest",
        "/images/loop": f"{site.url}/images/loop",
    }
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "q", "64M")
    site.files["/images/a.qcow2"] = (tmp_path / "q").read_bytes()
    here = f"{site.url}/images"
    assert "--overlay or --read-only" in refused(gateway, f"{here}/a.raw", "--mode", "write-back")
    assert "may not be attached" in refused(gateway, f"{site.url}/secret/a.raw")
    assert "may not be attached" in refused(gateway, "https://169.254.169.254/images/a.raw")
    for way in ("/../secret/a.raw", "/%2e%2e/secret/a.raw", "/a.raw#x", "/a b", "/a\\b"):
        assert "no URL of an image" in refused(gateway, f"{here}{way}")
    assert "no URL" in refused(gateway, f"https://user:pw@{here[8:]}/a.raw")
    for name in ("out", "plain", "file", "else"):
        assert "redirects to" in refused(gateway, f"{here}/{name}")
    assert "more than" in refused(gateway, f"{here}/loop")
    assert "says 404" in refused(gateway, f"{here}/none")
    assert refused(gateway, f"{here}/empty")
    assert "forebay import" in refused(gateway, f"{here}/a.qcow2")
    assert "is no file in a store" in refused(gateway, f"{here}/a.raw", "--format", "qcow2")
    site.is_away = True
    assert "says 503" in refused(gateway, f"{here}/a.raw")
    site.is_away, site.ranges = False, False
    assert "gives no parts" in refused(gateway, f"{here}/a.raw")
    other = make_gateway({"origins": {"https": [f"{site.url}/"]}})
    assert "certificate" in refused(other, f"{here}/a.raw")
    site.ranges = True
    site.moved["/images/in"] = f"{here}/a.raw"
    gateway.attach("d", f"{here}/in", "--overlay")
    assert gateway.status("d")["size"] == MIB
