# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The listener for metrics: what it gives, to whom, and that nothing about it ends."""

import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from forebay.config.sections import MetricsSection
from forebay.control.prometheus import scraping
from forebay.control.prometheus.scraping import Scraping
from unit.control_fake import FakeGateway


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
        found.bind((address, 0))
        port: int = found.getsockname()[1]
        return port


@asynccontextmanager
async def served(section: MetricsSection) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Scraping(FakeGateway("a"), section).run)
        yield
        nursery.cancel_scope.cancel()


async def ask(where: tuple[str, int], request: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """What comes back, once somebody listens."""
    with trio.fail_after(20):
        stream = None
        while stream is None:
            with suppress(OSError):
                stream = await trio.open_tcp_stream(*where)
            await trio.sleep(0.01)
        async with stream:
            told: trio.abc.Stream = stream
            if tls is not None:
                told = trio.SSLStream(stream, tls, server_hostname="x", https_compatible=True)
            await told.send_all(request)
            return b"".join([part async for part in told])


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_metrics_and_nothing_else(address: str) -> None:
    where = (address, free_port(address))
    async with served(MetricsSection.model_validate({"listen": where})):
        got = await ask(where, GET)
        assert got.startswith(b"HTTP/1.1 200")
        assert b'forebay_dirty_bytes{disk="a"} 0\n' in got
        for wanted in (
            b"GET /disks",
            b"GET /",
            b"POST /metrics",
            b"DELETE /disks/a",
            b"GET //metrics",
        ):
            refused = await ask(where, wanted + b" HTTP/1.0\r\n\r\n")
            assert refused.split()[1] in (b"404", b"405"), refused


@pytest.mark.expect_log("cannot listen")
async def test_a_port_that_is_taken_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scraping, "AGAIN_SECONDS", 0.01)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        where = other.getsockname()
        async with served(MetricsSection.model_validate({"listen": where})):
            await trio.sleep(0.2)
            other.close()
            assert b"200" in await ask(where, GET)
    assert caplog.text.count("cannot listen on") == 1


def made_certificate(directory: Path, name: str) -> None:
    """A key and a certificate that it signs itself, in place of those of before."""
    subprocess.run(
        [*"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1".split(),  # noqa: SIM905
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
         "-keyout", directory / "new.key", "-out", directory / "new.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    os.replace(directory / "new.key", directory / "metrics.key")
    os.replace(directory / "new.pem", directory / "metrics.pem")


def trusting(directory: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(directory / "metrics.pem"))


async def test_tls_and_a_certificate_that_is_renewed(tmp_path: Path) -> None:
    made_certificate(tmp_path, "x")
    where = ("127.0.0.1", free_port())
    files = {"tls_certificate": tmp_path / "metrics.pem", "tls_key": tmp_path / "metrics.key"}
    async with served(MetricsSection.model_validate({"listen": where, **files})):
        assert b"200 " in await ask(where, GET, trusting(tmp_path))
        assert b"HTTP" not in await ask(where, GET)
        made_certificate(tmp_path, "x")
        assert b"200 " in await ask(where, GET, trusting(tmp_path))


@pytest.mark.expect_log("the certificate of before is used")
async def test_a_certificate_that_goes_away_or_is_damaged_keeps_that_of_before(
    tmp_path: Path,
) -> None:
    made_certificate(tmp_path, "x")
    tls = trusting(tmp_path)
    where = ("127.0.0.1", free_port())
    files = {"tls_certificate": tmp_path / "metrics.pem", "tls_key": tmp_path / "metrics.key"}
    async with served(MetricsSection.model_validate({"listen": where, **files})):
        assert b"200 " in await ask(where, GET, tls)
        (tmp_path / "metrics.pem").write_text("rubbish")
        assert b"200 " in await ask(where, GET, tls)
        (tmp_path / "metrics.pem").unlink()
        assert b"200 " in await ask(where, GET, tls)


async def test_more_scrapers_than_there_may_be_are_hung_up_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scraping, "MOST_CONNECTIONS", 1)
    where = ("127.0.0.1", free_port())
    async with served(MetricsSection.model_validate({"listen": where})):
        assert b"200" in await ask(where, GET)
        async with await trio.open_tcp_stream(*where) as first:
            await first.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" in await first.receive_some()
            async with await trio.open_tcp_stream(*where) as second:
                assert await second.receive_some() == b""
        with trio.fail_after(20):
            while b"200" not in await ask(where, GET):  # noqa: ASYNC110
                await trio.sleep(0.01)
