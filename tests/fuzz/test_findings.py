# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What nonsense from outside once did to us, each by its name: now an answer in one line, no traceback, no hang."""

import json
import os
import struct
import threading
import zlib
from pathlib import Path

import pytest
import trio
from xxhash import xxh3_64_intdigest

from forebay.errors import ForebayError
from forebay.origin.calls import SystemCalls
from forebay.sidecar import redo, redo_header
from forebay.sidecar.record import Owner
from forebay_cache import Cache, CacheError, View, open_cache
from forebay_cache.blocks import private
from forebay_cache.format import ops
from forebay_cache.format.entry import slot_of
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_cache.format.records import LayerName
from forebay_cache.format.superblock import JOURNAL_OFFSET, SUPERBLOCK, plan
from fuzz.record import _IDENT

SIZE = 8 << 20


def test_an_owner_marker_nested_too_deeply_is_no_marker() -> None:
    """It ended the daemon at its start: RecursionError is no ValueError."""
    with pytest.raises(ValueError, match="nested"):
        Owner.parse(b"[" * 60_000)


# --- the redo journal ---------------------------------------------------------------------------


def recovered(directory: Path) -> redo_header.Checkpoint | None:
    """As the next gateway does it, with an image of SIZE bytes beside."""
    image = os.open(directory / "image", os.O_RDWR | os.O_CREAT)
    sidecar = os.open(directory, os.O_RDONLY)
    try:
        os.ftruncate(image, SIZE)
        return redo.recover(sidecar, image, "images:a", SystemCalls())
    finally:
        os.close(sidecar)
        os.close(image)


def written(directory: Path, **header: object) -> redo.RedoFile:
    image = directory / "image"
    image.touch()
    fields = {"gateway": "g", "host": "h", "disk": "d", "size": SIZE, "inode": image.stat().st_ino}
    sidecar = os.open(directory, os.O_RDONLY)
    return redo.RedoFile(sidecar, redo_header.Checkpoint(**{**fields, "as_of": "", **header}))  # type: ignore[arg-type]


def test_a_record_beyond_the_image_is_not_applied(tmp_path: Path) -> None:
    """It made the image larger, or failed half-way."""
    for offset, length in ((SIZE - 4096, 8192), (2**64 - 4096, 4096), (0, 2**64 - 1)):
        journal = written(tmp_path)
        journal.add(offset, length, None)
        journal.commit()
        with pytest.raises(ForebayError, match="beyond the end of the image"):
            recovered(tmp_path)
    assert (tmp_path / "image").stat().st_size == SIZE


@pytest.mark.parametrize(
    "text", [b"[1]", b"{}", b'{"format": 1}', b"[" * 4000, b'{"format": 1, "x": 2}']
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, text: bytes) -> None:
    body = (redo_header.MAGIC + text).ljust(redo_header.LENGTH - redo_header.SUM.size, b"\0")
    (tmp_path / redo.NAME).write_bytes(body + redo_header.SUM.pack(xxh3_64_intdigest(body)))
    with pytest.raises(ForebayError, match="makes no sense"):
        recovered(tmp_path)


def test_a_journal_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    """Opening it waited for a writer, for ever."""
    os.mkfifo(tmp_path / redo.NAME)
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            recovered(tmp_path)
        except BaseException as fault:  # noqa: BLE001
            outcome.append(fault)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    if thread.is_alive():  # let it go, or the test run would not end
        os.close(os.open(tmp_path / redo.NAME, os.O_WRONLY | os.O_NONBLOCK))
        pytest.fail("it waits")
    assert isinstance(outcome[0], ForebayError)
    assert "not a file" in str(outcome[0])


# --- the cache device ---------------------------------------------------------------------------


def opened(directory: Path) -> Cache:
    return open_cache(directory / "device", directory / "index", size=SIZE, boot="same")


def refused(directory: Path) -> str:
    with pytest.raises(CacheError) as found:
        opened(directory)
    return str(found.value)


def test_a_whole_superblock_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    """Its checksum says that it was written so, not that it is right."""
    opened(tmp_path).release()
    good = plan(SIZE, _IDENT)
    for slots, journal in ((1 << 40, good.journal_size), (0, good.journal_size), (good.slots, 0)):
        raw = bytearray(good.pack())
        struct.pack_into("<QQQ", raw, 40, journal, good.data_offset, slots)
        raw[-4:] = zlib.crc32(raw[:-4]).to_bytes(4, "little")
        with (tmp_path / "device").open("r+b") as file:
            file.write(raw)
            file.seek(SUPERBLOCK)
            file.write(raw)
        assert "makes no sense" in refused(tmp_path)


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        ops.HEAD.pack(9, 0, 0, 1, 0, 0),
        ops.HEAD.pack(ops.WRITE, 7, 1, 1, 0, 0) + bytes(4),
        ops.HEAD.pack(ops.LAYER, 0, 500, 1, 0, 0) + b"short",
        ops.HEAD.pack(ops.LAYER, 0, 1, 1, 0, 0) + b"\xff",
        ops.write(0, 1, 1, 0, 1 << 30, [1]),
    ],
    ids=["cut", "kind", "side", "name", "text", "slot"],
)
def test_a_whole_frame_that_makes_no_sense_is_refused(tmp_path: Path, payload: bytes) -> None:
    cache = opened(tmp_path)
    layer = cache.layers.make(LayerName.of_disk("d", 1, "images:a"))
    cache.intent.publish()
    assert layer.id == 1
    cache.intent.journal.append(payload)
    cache.release()
    said = refused(tmp_path)
    assert "makes no sense" in said
    assert "forebay cache check" in said


def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    import lmdb

    opened(tmp_path).release()
    for table, key, value in (
        (b"layers", b"\0\0\0\1", b"[]"),
        (b"layers", b"\0\0\0\1", b'{"no": 1}'),
        (b"records", b"disk\0d", b"{"),
        (b"pages", bytes(8), bytes(7)),
        (b"hot", b"x", b""),
    ):
        env = lmdb.open(str(tmp_path / "index"), max_dbs=6)
        with env.begin(write=True) as txn:
            txn.put(key, value, db=env.open_db(table, txn=txn))
        env.close()
        assert "makes no sense" in refused(tmp_path), (table, value)
        env = lmdb.open(str(tmp_path / "index"), max_dbs=6)
        with env.begin(write=True) as txn:
            txn.delete(key, db=env.open_db(table, txn=txn))
        env.close()
    opened(tmp_path).release()


@pytest.mark.expect_log("slot 0 is damaged")
def test_an_acknowledged_write_that_is_damaged_is_an_error_after_a_kill(tmp_path: Path) -> None:
    """The index knew nothing of it yet, so recovery passed it over, and the image's older data were read."""
    cache = opened(tmp_path)
    layer = cache.layers.make(LayerName.of_disk("d", 1, "images:a"))
    layer.pages.adopt(0, None)
    for offset in (0, BLOCK):
        assert private.write(cache, layer, offset, memoryview(b"n" * SECTOR))
        cache.intent.publish()
    at = cache.device.at(slot_of(layer.pages.page(0)[0]))
    cache.release()
    with (tmp_path / "device").open("r+b") as file:
        file.seek(at)
        file.write(b"?")
    cache = opened(tmp_path)

    async def read() -> None:
        found = cache.layers.private_of("d")

        async def older(_offset: int, length: int) -> bytes:
            return b"o" * length

        view = View(cache, found, None, older)
        assert await view.read(BLOCK, SECTOR) == [b"n" * SECTOR]
        with pytest.raises(OSError, match="dirty data in the cache is damaged"):
            await view.read(0, SECTOR)

    try:
        trio.run(read)
    finally:
        cache.release()


def test_what_a_check_says_can_be_printed(tmp_path: Path) -> None:
    """As JSON, whatever lies in the index."""
    from forebay_cache import check

    opened(tmp_path).release()
    with (tmp_path / "device").open("r+b") as file:
        file.seek(JOURNAL_OFFSET)
        file.write(os.urandom(4096))
    json.dumps(check(tmp_path / "device", tmp_path / "index", lambda *_: None).json())
