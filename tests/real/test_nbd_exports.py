# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Exports that the server has to look for: how long that may take, what a client is told, until when they are held."""

import struct
from functools import partial
from pathlib import Path

import trio

from forebay_nbd import Connection, Export, Limits, Refused
from forebay_nbd.protocol.wire import Rep
from real.nbd_memory import MemoryExport, serving
from real.nbd_raw import Raw, go, option, request, until

ACK = 1


class Looked:
    """What one client may have: each look waits for `gate`, and finds the export of the name `disk`."""

    def __init__(
        self, seen: list[str], gate: trio.Event, export: MemoryExport, _connection: Connection
    ) -> None:
        self.seen = seen
        self.gate = gate
        self.export: Export = export
        self.found: Export | Refused | None = None

    async def look(self, name: str) -> None:
        self.seen.append(f"look {name}")
        await self.gate.wait()
        self.found = self.export if name == "disk" else Refused(f"not {name}\nbut\x1b disk" * 100)

    async def look_around(self) -> None:
        self.seen.append("look around")
        await self.gate.wait()

    def find(self, name: str) -> Export | None:
        self.seen.append(f"find {name}")
        if isinstance(self.found, Refused):
            raise self.found
        return self.found

    def names(self) -> list[str]:
        raise Refused("nobody may see them", Rep.ERR_UNKNOWN)

    def close(self) -> None:
        self.seen.append("closed")


async def test_the_time_to_look_for_an_export_is_not_the_clients(short_path: Path) -> None:
    seen: list[str] = []
    gate = trio.Event()
    limits = Limits(handshake_seconds=0.3)
    make = partial(Looked, seen, gate)
    async with (
        serving(short_path, limits=limits, exports=make) as running,
        Raw(running.path) as client,
        Raw(running.path) as silent,
    ):
        await client.hello()
        await client.send(go(b"disk"))
        await silent.hello()
        assert await silent.hangs_up() == b"", "the time of one that says nothing is over"
        assert seen == ["look disk", "closed"]
        gate.set()
        while (await client.reply())[1] != ACK:
            pass
        await client.send(request(0, 0, 512))
        assert (await client.simple(512))[0] == 0
        assert seen.count("closed") == 1, "what was found is held as long as the client is there"
    assert seen.count("closed") == 2


async def test_many_who_wait_for_their_exports_keep_nobody_else_from_connecting(
    short_path: Path,
) -> None:
    """Who is in the handshake for long is dropped for others, unless it is the server that it waits for."""
    seen: list[str] = []
    gate = trio.Event()
    async with (
        serving(short_path, exports=partial(Looked, seen, gate)) as running,
        trio.open_nursery() as nursery,
    ):
        served = []

        async def one() -> None:
            async with Raw(running.path) as client:
                await client.hello()
                await client.send(go(b"disk"))
                while (await client.reply())[1] != ACK:
                    pass
                served.append(client)

        for _ in range(90):  # 64 may be in the handshake
            nursery.start_soon(one)
        await until(lambda: len(seen) == 90)
        gate.set()
        await until(lambda: len(served) == 90)


async def test_a_client_is_told_why_it_does_not_get_an_export(short_path: Path) -> None:
    seen: list[str] = []
    gate = trio.Event()
    gate.set()
    async with serving(short_path, exports=partial(Looked, seen, gate)) as running:
        async with Raw(running.path) as client:
            await client.hello()
            await client.send(go(b"other"))
            _, kind, text = await client.reply()
            assert kind == Rep.ERR_POLICY
            assert text.decode().isprintable()
            assert text.startswith(b"not other but? disk")
            assert len(text.decode()) <= 500
            await client.send(option(3))
            assert (await client.reply())[1:] == (Rep.ERR_UNKNOWN, b"nobody may see them")
            await client.send(go(b"disk"))
            while (await client.reply())[1] != ACK:
                pass
        async with Raw(running.path) as old:
            await old.hello()
            await old.send(option(1, b"other"))
            assert await old.hangs_up() == b""
        async with Raw(running.path) as long:
            await long.hello()
            await long.send(option(7, struct.pack(">I", 4097) + b"x" * 4097 + b"\0\0"))
            assert (await long.reply())[1] & 1 << 31
    assert not any(len(one) > 200 for one in seen)
