# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Fixtures of the real level: the daemon, the servers it is fed from, and clients it did not come with."""

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from real import processes
from real.gateway_process import GatewayProcess


@pytest.fixture
def make_gateway() -> Iterator[Callable[..., GatewayProcess]]:
    """Call with sections of the configuration: a started daemon. All are ended and checked after the test."""
    with contextlib.ExitStack() as stack:
        made: list[GatewayProcess] = []

        def make(
            settings: Mapping[str, Mapping[str, Any]] | None = None, *, start: bool = True
        ) -> GatewayProcess:
            gateway = GatewayProcess(settings)
            stack.callback(gateway.remove)
            made.append(gateway)
            if start:
                gateway.start()
            return gateway

        yield make
        loud = [line for gateway in made for line in gateway.unexpected_log()]
        assert not loud, "unexpected in the daemon's log:\n" + "\n".join(loud)


@pytest.fixture
def gateway(make_gateway: Callable[..., GatewayProcess]) -> GatewayProcess:
    """A running daemon with the settings of the tests (gateway_process.py)."""
    return make_gateway()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets have addresses short enough (tmp_path's may not)."""
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def start_nbdkit(short_path: Path) -> Iterator[Callable[..., processes.NbdServer]]:
    """`start_nbdkit("file", image, "rdelay=200ms", filters=["delay"])`; ended after the test."""
    yield from _starter(short_path, "kit", processes.nbdkit)


@pytest.fixture
def start_qemu_nbd(short_path: Path) -> Iterator[Callable[..., processes.NbdServer]]:
    """`start_qemu_nbd(image, "--read-only")`; ended after the test."""
    yield from _starter(short_path, "qemu", processes.qemu_nbd)


def _starter(
    directory: Path, prefix: str, start: Callable[..., processes.NbdServer]
) -> Iterator[Callable[..., processes.NbdServer]]:
    with contextlib.ExitStack() as stack:
        count = 0

        def make(*arguments: Any, **options: Any) -> processes.NbdServer:
            nonlocal count
            count += 1
            server = start(directory / f"{prefix}{count}.sock", *arguments, **options)
            stack.callback(server.stop)
            return server

        yield make


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """`connect(uri, "base:allocation")`: a libnbd handle with these meta contexts asked for."""
    pytest.importorskip(
        "libnbdmod", reason="python3-libnbd is not installed: `make setup` installs it"
    )
    import nbd

    with contextlib.ExitStack() as stack:

        def make(uri: str, *contexts: str) -> Any:
            handle = nbd.NBD()
            for context in contexts:
                handle.add_meta_context(context)
            handle.connect_uri(uri)
            stack.callback(_disconnect, handle)
            return handle

        yield make


def _disconnect(handle: Any) -> None:
    import nbd

    with contextlib.suppress(nbd.Error):  # the test may have ended the server
        handle.shutdown()


@pytest.fixture
def random_image(rng: random.Random) -> Callable[..., bytes]:
    """`random_image(path, size, holes=[(offset, length)])`: makes it from the test's seed, returns its content."""

    def make(path: Path, size: int, holes: list[tuple[int, int]] | None = None) -> bytes:
        return processes.random_image(path, size, rng.getrandbits(32), holes or [])

    return make
