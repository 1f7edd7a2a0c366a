# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image with bad sectors, in a file and behind NBD: what guests and operators see of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real.disk_fixture import wait_for
from real.fault_fs import FaultFs
from real.gateway_process import GatewayProcess
from real.processes import NbdServer

SIZE = (2 << 20) + 5 * 4096
BAD = (0x98200, 0x1FFE00, SIZE - 512)
"""Sectors of 512 bytes."""
PAGES = [at // 4096 * 4096 for at in BAD]

MakeGateway = Callable[..., GatewayProcess]
Origin = tuple[GatewayProcess, str, bytes]
"""A gateway, an image for it, and what that holds."""


@pytest.fixture(params=["file", "nbd"])
def origin(
    request: pytest.FixtureRequest,
    short_path: Path,
    make_gateway: MakeGateway,
    random_image: Callable[..., bytes],
    start_nbdkit: Callable[..., NbdServer],
) -> Iterator[Origin]:
    if request.param == "nbd":
        content = random_image(short_path / "a.raw", SIZE)
        lines, at = ["0x0 ? 1"], 0
        for bad in BAD:
            lines += [f"{at:#x} {bad - at:#x} +", f"{bad:#x} 0x200 -"]
            at = bad + 512
        (short_path / "map").write_text("\n".join([*lines, f"{at:#x} {SIZE - at:#x} +", ""]))
        kit = start_nbdkit(
            "file",
            short_path / "a.raw",
            f"ddrescue-mapfile={short_path / 'map'}",
            filters=["ddrescue"],
        )
        gateway = make_gateway()
        gateway.allow_log("the connection broke")  # when the test ends
        yield gateway, kit.uri, content
        return
    fs = FaultFs(short_path / "fs")
    try:
        content = random_image(fs.backing / "a.raw", SIZE)
        for bad in BAD:
            fs.fail("read", "EIO", name="a.raw", start=bad, end=bad + 512)
        yield make_gateway({"stores.images": {"path": str(fs.path)}}), "images:a.raw", content
    finally:
        fs.remove()


def failing(handle: Any, content: bytes, step: int) -> list[int]:
    """Where reads of `step` bytes fail, in order over the image; what the others give is right."""
    import nbd

    failed = []
    for at in range(0, SIZE, step):
        try:
            assert handle.pread(min(step, SIZE - at), at) == content[at : at + step]
        except nbd.Error:
            failed.append(at)
    return failed


@pytest.mark.parametrize(
    "options",
    [("--mode", "write-through"), ("--mode", "write-back"), ("--overlay",)],
    ids=["write-through", "write-back", "overlay"],
)
def test_only_reads_that_touch_a_bad_sector_fail(
    origin: Origin, connect: Callable[..., Any], options: tuple[str, ...]
) -> None:
    gateway, image, content = origin
    gateway.cli(
        "attach", "d", image, *options, *(() if "--overlay" in options else ("--read-only",))
    )
    handle = connect(gateway.uri("d"))
    assert failing(handle, content, 4096) == PAGES
    assert failing(handle, content, 65536) == sorted({at // 65536 * 65536 for at in BAD})
    gateway.cli("detach", "d", "--force")


def test_a_full_copy_has_all_but_the_bad_sectors(
    origin: Origin, connect: Callable[..., Any]
) -> None:
    gateway, image, content = origin
    gateway.allow_log("copying paused: .* bytes of .* could not be read")
    gateway.cli("attach", "d", image, "--mode", "full-copy", "--read-only")
    wait_for(lambda: gateway.status("d")["state"] == "incomplete", "the copy does not end")
    told = gateway.status("d")
    assert told["unreadable_bytes"] == 3 * 4096
    assert f"the first at {PAGES[0]}" in told["reason"]
    before = told["origin_read_bytes"]
    assert failing(connect(gateway.uri("d")), content, 4096) == PAGES
    assert gateway.status("d")["origin_read_bytes"] - before < 16 * 65536, "all else is cached"
    text = gateway.cli("status", "d").stdout
    assert "incomplete" in text


def test_a_preload_ends_with_what_it_could_not_read(origin: Origin) -> None:
    gateway, image, _ = origin
    gateway.cli("attach", "d", image, "--read-only")
    failed = gateway.cli("preload", "d", "all", check=False)
    assert failed.returncode == 1
    assert "12288 bytes of" in failed.stderr
    status = json.loads(gateway.cli("status", "d", "--json").stdout)[0]
    assert status["cached_bytes"] >= SIZE - 3 * 4096
