# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whether what a machine comes back with after a power cut is worth what was promised.

A state (`crash_log.State`) is written into a directory and opened by the code that a daemon opens its state with: the
same recovery, the same claim on the image with the same redo journal, the same disk. Threads are done by the loop
itself, syncs are those of a memory file system, and time jumps, so that it takes a few milliseconds. The boot id is
another one: nothing of what the page cache held counts.

* The image alone, after `forebay recover`, holds what the disk held at one instant, not before the last finished
  `forebay flush`; where it lacks something that was answered its marker says so, and names no later instant.
* The disk holds in each 512 bytes what was last flushed, or something written later; what was killed, not cut off,
  all that was answered.
* The index is honest: no slot is named twice, every checksum fits, clean blocks show what the image has.
* It stays so: a second reading, and after what is dirty was written back the image, are the same.
* What the operator gave up is gone from the disk, and from nothing else. A backup that was put over the image is
  not written by anybody before the operator has said whose data is kept; until then the cache has what only it had.
"""

import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import trio
import trio.testing
from lmdb.verify import VerifyError, verify

import forebay_cache.cache
from forebay.config.model import Config
from forebay.daemon.arrivals import Arrivals
from forebay.daemon.disks import Disks
from forebay.daemon.record import DiskRecord, DiskRecords
from forebay.disk.disk import Disk
from forebay.doors.returns import Returns
from forebay.errors import ForebayError
from forebay.image.registry import Images
from forebay.origin.calls import Status, SystemCalls
from forebay.sidecar import applying, recover
from forebay_cache import Cache, Damage, View, open_cache, scrub
from forebay_cache.device.device import Device
from forebay_cache.format.checksum import matching
from forebay_cache.format.entry import entry_at
from forebay_cache.format.geometry import BLOCK, FULL, PAGE_BLOCKS, PAGE_SHIFT, SECTORS, Buffer
from forebay_cache.layers.layer import Layer
from forebay_cache.read.check import read_slots
from forebay_nbd import Budgets
from real.crash_ledger import SECTOR, Ledger, Phase
from real.crash_log import WHOLE, Content, File, State
from sim.fake_host import Listener, check_cache, nothing
from sim.fake_loop import Dice, simulated

DISK, STORE, IMAGE = "d", "images", "a.raw"
IMAGE_PATH = f"{STORE}/{IMAGE}"
SIDECAR = f"{IMAGE_PATH}.forebay/"
CACHE_PATH = "state/cache.img"
KEPT = (CACHE_PATH, IMAGE_PATH)
CACHE_SIZE = 4 << 20
DEEP = 0.08
"""Share of the states in which the disk itself is opened, with all that a daemon does about it. In the others the cache
is: recovery, checksums and content are looked at there too, and clean blocks compared with the image."""

DRAINED = 0.5
"""Share of those in which what is dirty is written back in the end."""

EXPECTED = re.compile("copying paused|is damaged")
"""What may be logged: a full copy does not fit beside dirty data; scrub says what it finds below a private layer."""

GOING = {"detaching", "detached"}
BEHIND_A_BACKUP = (Phase.RESTORED, Phase.RESOLVING)

CLOCKS = 0.01
"""Seconds by which an instant may be named wrongly: it is given in milliseconds."""

READ = 1 << 20

LONGEST = 3600.0
"""Seconds, of a clock that jumps, after which what does not come to an end is a fault too."""


class Broken(AssertionError):
    """A promise was broken."""


class _Quick(Dice):
    """Nothing takes any time."""

    async def pause(self, scale: float = 1.0) -> None:
        del scale
        await trio.lowlevel.checkpoint()


class _Have(NamedTuple):
    """What a file holds: of which one, how long, how much of what became durable, and what was added to that."""

    file: File
    size: int
    hardened: int
    added: list[tuple[int, int]]


class Host:
    """The directory in which states are put, and looked at. On a memory file system, that of the recorder's files.

    `image` is the file that the recorder kept the image in: states have it under another name, because a redo journal
    names the inode that it is for.
    """

    def __init__(self, directory: Path, image: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        (directory / STORE).mkdir(parents=True)
        image.rename(directory / IMAGE_PATH)
        self._have: dict[str, _Have] = {}
        self._fresh = (0, 0)  # inode and ctime of the image as it was put there
        self._times = (0, 0)
        disks = {"max_lag": "1000s", "max_dirty": "1 GiB"}
        self.config = Config.model_validate(
            {
                "gateway": {"state": str(self.state), "run": str(directory / "run")},
                "cache": {"size": str(CACHE_SIZE)},
                "defaults": disks,
                "stores": {STORE: {"path": str(directory / STORE)}},
            }
        )

    # -- putting ----------------------------------------------------------------------------------------------

    def put(self, state: State) -> None:
        """Make the directory what a machine came back with."""
        if CACHE_PATH not in state.files:
            self._have.pop(CACHE_PATH, None)
        for path in self.state.iterdir() if self.state.exists() else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "cache.img" or CACHE_PATH not in state.files:
                path.unlink()
        for name in state.directories:
            (self.directory / name).mkdir(exist_ok=True)
        for name, content in state.files.items():
            if not name.startswith(f"{STORE}/"):
                self._put_file(name, content)
        self.put_image(state)

    def put_image(self, state: State) -> None:
        """Only the image and what lies beside it."""
        shutil.rmtree(self.directory / SIDECAR, ignore_errors=True)
        for name in state.directories:  # a directory comes before what lies in it
            if f"{name}/".startswith(SIDECAR):
                (self.directory / name).mkdir()
        for name, content in state.files.items():
            if name.startswith(f"{STORE}/"):
                self._put_file(name, content)
            if name.startswith(SIDECAR) and name in state.times:
                mtime, _ = state.times[name]
                os.utime(self.directory / name, ns=(mtime, mtime))
        found = os.stat(self.directory / IMAGE_PATH)
        self._fresh = found.st_ino, found.st_ctime_ns
        self._times = state.times[IMAGE_PATH]

    def _put_file(self, name: str, content: Content) -> None:
        """The large files are kept from one state to the next: only what differs is written."""
        known = self._have.pop(name, None)
        file, size = content.file, len(content.file.base)
        added = [(offset, WHOLE if data is None else len(data)) for offset, data in content.added]
        old = () if known is None else (*known.added, *file.hardened[known.hardened :])
        fits = all(length != WHOLE and at + length <= size for at, length in (*old, *added))
        if known is None or known.file is not file or known.size != size or not fits:
            _overwrite(self.directory / name, content.whole())
        else:
            with (self.directory / name).open("r+b", buffering=0) as out:
                for at, length in old:
                    os.pwrite(out.fileno(), memoryview(file.base)[at : at + length], at)
                for at, data in content.added:
                    os.pwrite(out.fileno(), data or b"", at)
        if fits and name in KEPT:
            self._have[name] = _Have(file, size, len(file.hardened), added)

    def changed(self, name: str) -> None:
        """Somebody else wrote to that file."""
        self._have.pop(name, None)

    def image(self) -> bytes:
        return (self.directory / IMAGE_PATH).read_bytes()

    def status(self, found: Status) -> Status:
        """With the times that the recorder saw, as long as nobody has changed the image since."""
        if (found.inode, found.ctime_ns) != self._fresh:
            return found
        mtime, ctime = self._times
        return Status(**{**vars(found), "mtime_ns": mtime, "ctime_ns": ctime})


def _overwrite(path: Path, content: bytearray) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        if os.fstat(fd).st_size != len(content):
            os.ftruncate(fd, len(content))
        os.pwrite(fd, content, 0)
    finally:
        os.close(fd)


class Oracle:
    """Looks at one state after the other, inside one trio run (`looking`)."""

    def __init__(
        self, host: Host, rng: random.Random, *, one_instant: bool, mistrust: bool = False
    ) -> None:
        """`one_instant`: nothing but checkpoints has written the image. `mistrust`: LMDB gets no index that may be such
        that it ends the process.
        """
        self._mistrust = mistrust
        self._host = host
        self._random = rng
        self._one_instant = one_instant
        self._logged: list[logging.LogRecord] = []
        self.recovered = 0  # journals that were applied
        self.dropped = 0  # and those that were not complete
        self.boot = (
            _BOOT  # of the kernel that looks at a state: after a power cut it is another one
        )

    async def look(self, state: State, ledger: Ledger, *, killed: bool) -> None:
        """Raises Broken, or whatever the code under test raises."""
        self._logged.clear()
        self.boot = _BOOT if killed else "another"
        self._host.put(state)
        floor = ledger.answered() if killed else ledger.floor
        for name, saved in ledger.saved.items():
            found = state.files.get(f"{STORE}/{name}")
            if found is None or found.whole() != saved:
                raise Broken(f"{name}, which was made of the disk, is not what it was")
        if ledger.phase in BEHIND_A_BACKUP:
            self._backup_stays(ledger, floor)
        else:
            self._without_cache(ledger, floor)
        deep = self._random.random() < DEEP
        if deep and self._random.random() < 0.5:  # else the next daemon finds it recovered
            self._host.put_image(state)
        if self._mistrust:
            self._verify_index()
        cache = open_cache(
            self._host.directory / CACHE_PATH,
            self._host.state / "index",
            size=CACHE_SIZE,
            boot=self.boot,
        )
        try:
            known = cache.records.get("disk", DISK)
            self._check_known(ledger, known)
            if ledger.phase is Phase.RESOLVING or (known is not None and known["leaving"]):
                if ledger.keeps == "mine" and known is not None:
                    self._check_own(cache, DiskRecord.read(known), ledger, floor)
            elif deep or known is None:
                await self._with_disk(cache, known, ledger, floor)
            elif ledger.phase is Phase.RESTORED:
                self._check_own(cache, DiskRecord.read(known), ledger, floor)
            else:
                self._check_cache(cache, DiskRecord.read(known), ledger, floor)
        finally:
            cache.release()
        said = [record.getMessage() for record in self._logged]
        loud = [text for text in said if not EXPECTED.search(text)]
        if loud and ledger.phase not in BEHIND_A_BACKUP:
            raise Broken(f"said: {loud[0]}")

    def _verify_index(self) -> None:
        index = self._host.state / "index"
        if not (index / "data.mdb").exists():
            return
        try:
            problems: list[str] = verify(str(index))  # type: ignore[no-untyped-call]
        except (VerifyError, OSError) as fault:
            problems = [str(fault)]
        if problems:
            raise Broken(f"the index is damaged: {problems[0]}")

    def wrote(self) -> None:
        """The cache device was written to."""
        self._host.changed(CACHE_PATH)

    # -- the image alone --------------------------------------------------------------------------------------

    def _without_cache(self, ledger: Ledger, floor: dict[int, int]) -> None:
        found = recover.run(self._host.config, f"{STORE}:{IMAGE}")._found
        self.recovered += found.finished is not None
        self.dropped += found.dropped
        if found.finished is not None:
            self._host.changed(IMAGE_PATH)
        image = self._host.image()
        discarding = ledger.phase is Phase.DISCARDING
        if "detached" in ledger.said:
            floor = ledger.home if discarding else ledger.answered()
            if found.owner is not None:
                raise Broken("the disk was detached, and the image belongs to somebody")
            if why := ledger.wrong(image, floor):
                raise Broken(f"after detach the image lacks something: {why}")
        if not self._one_instant or ledger.is_past_cache:
            return
        try:
            spans = ledger.instants(image)
        except ValueError as fault:
            raise Broken(f"without its cache the image is of no instant: {fault}") from None
        if why := ledger.wrong(image, ledger.home):
            raise Broken(f"without its cache the image is older than the last flush: {why}")
        if not (found.lacks_data or discarding) and (why := ledger.wrong(image, floor)):
            raise Broken(f"the image lacks something, and its marker does not say so: {why}")
        if found.as_of:
            named = datetime.fromisoformat(found.as_of).timestamp()
            seconds = ledger.seconds(spans)
            if named > max(b for _, b in seconds) + CLOCKS:
                raise Broken(f"the image is said to be of {named}, and is of {seconds}")

    def _backup_stays(self, ledger: Ledger, floor: dict[int, int]) -> None:
        """Nothing is written over a backup but, all of it, what the operator has said is to be."""
        try:
            found = recover.run(self._host.config, f"{STORE}:{IMAGE}", sure=False)._found
        except ForebayError:
            pass  # it says that the image was changed
        else:
            if found.finished is not None:
                self._host.changed(IMAGE_PATH)
        image = self._host.image()
        if image == ledger.backup:
            return
        if ledger.phase is not Phase.RESOLVING or ledger.keeps != "mine":
            raise Broken(f"a backup was written over: {ledger.lacks(image, floor)}")
        if why := ledger.is_torn_over_backup(image):
            raise Broken(f"the disk's own data is in the image in part: {why}")

    # -- the cache and its index ------------------------------------------------------------------------------

    def _check_known(self, ledger: Ledger, known: object) -> None:
        given_up = ledger.phase is Phase.RESOLVING and ledger.keeps == "image"
        if known is None and "attached" in ledger.said and not (ledger.said & GOING or given_up):
            raise Broken("the disk was attached, and is not known")
        if known is not None and "detached" in ledger.said:
            raise Broken("the disk was detached, and is back")

    def _check_cache(
        self, cache: Cache, record: DiskRecord, ledger: Ledger, floor: dict[int, int]
    ) -> None:
        """What the disk would read, as the index has it: from the medium, past everything that is kept in memory."""
        if why := ledger.wrong(self._shown(cache, record), floor):
            raise Broken(f"in mode {record.mode}: {why}")

    def _check_own(
        self, cache: Cache, record: DiskRecord, ledger: Ledger, floor: dict[int, int]
    ) -> None:
        """The disk's own data over a backup: nothing is lacking that only the cache had."""
        if why := ledger.lacks(self._shown(cache, record, only_private=True), floor):
            raise Broken(f"behind a backup, in mode {record.mode}: {why}")

    def _shown(self, cache: Cache, record: DiskRecord, *, only_private: bool = False) -> bytes:
        image = self._host.image()
        private = cache.layers.private_of(DISK)[::-1]
        clean = None if only_private else cache.layers.clean_of(record.key)
        for layer in (*private, *([clean] if clean else ())):
            for number in range(-(-record.size >> PAGE_SHIFT)):
                layer.pages.adopt(number, cache.index.page(layer.id, number))
        parts = list(_parts(private, clean, record.size))
        slots = read_slots(cache, {part.slot: None for part in parts if part.slot >= 0})
        good = {
            slot: matching(sums, cache.sums.get(slot) or stored)
            for slot, (_, sums, stored) in slots.items()
        }
        found = bytearray(image)
        for part in parts:
            data = bytes(SECTOR)
            if part.slot >= 0:
                at = part.offset % BLOCK
                if not good[part.slot] >> at // SECTOR & 1:
                    raise Broken(f"damaged data: {part}")
                data = bytes(slots[part.slot][0][at : at + SECTOR])
            if not part.private and data != image[part.offset : part.offset + SECTOR]:
                raise Broken(f"mode {record.mode}: {part}, clean, is not what the image has")
            found[part.offset : part.offset + SECTOR] = data
        return bytes(found)

    # -- all of it --------------------------------------------------------------------------------------------

    async def _with_disk(
        self, cache: Cache, known: dict[str, Any] | None, ledger: Ledger, floor: dict[int, int]
    ) -> None:
        self._host.changed(IMAGE_PATH)
        self._host.changed(CACHE_PATH)
        async with AsyncExitStack() as stack:
            stack.enter_context(trio.fail_after(LONGEST))
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            await nursery.start(cache.run)
            if known is None:
                await check_cache(cache)
                return
            config, images = self._host.config, Images(cache, nursery)
            records = DiskRecords(cache, config.gateway.state)
            returns = Returns(nursery, cache.records)
            arrivals = Arrivals(
                config, cache, nursery, images, Disks(), records, Budgets(), returns
            )
            record = DiskRecord.read(known)
            source, settings = arrivals.source(DISK, record, record.size)
            disk = await Disk.open(images, source, settings)
            stack.push_async_callback(_let_go, disk)
            if ledger.phase is Phase.RESTORED and (disk.image.conflict or disk.dirty.private_bytes):
                if disk.image.conflict is None:
                    raise Broken("what is dirty would be written over a backup")
                return
            if disk.image.origin is None or disk.image.conflict is not None:
                raise Broken(f"{disk.image.reach.unreachable or disk.image.conflict}")
            work = await stack.enter_async_context(trio.open_nursery())
            stack.callback(work.cancel_scope.cancel)
            await work.start(disk.run)
            await self._contents(disk, ledger, floor)

    async def _contents(self, disk: Disk, ledger: Ledger, floor: dict[int, int]) -> None:
        cache = disk.image.cache
        found = await _read(disk)
        if ledger.phase is Phase.RESTORED:
            if found != ledger.backup:
                raise Broken("blocks of before a backup are shown")
        elif why := ledger.wrong(found, floor):
            raise Broken(f"in mode {disk.mode}: {why}")
        await check_cache(cache)
        await _clean_is_clean(disk, self._host.image())
        below = _below_private(
            disk
        )  # what a pass copied there may be torn (cache/README.md, section 5)
        damage = await scrub(cache, nothing)
        read = [one for one in damage.damage if one.private or not below >= _sectors(one)]
        if damage.damaged_index or read:
            raise Broken(f"scrub: {damage}")
        if self._random.random() < DRAINED:
            await disk.drain(nothing)
            if self._host.image() != found:
                raise Broken("what is written back differs")
        if await _read(disk) != found:
            raise Broken("a second reading differs")


def _below_private(disk: Disk) -> set[int]:
    """Offsets of the sectors that a private layer answers for. All pages are loaded."""
    return {part.offset for part in _parts(disk.view.private, None, disk.size)}


def _sectors(damage: Damage) -> set[int]:
    return set(range(damage.offset, damage.offset + damage.length, SECTOR))


class _Part(NamedTuple):
    """One sector that the cache answers for. `slot` -1: it reads as zeros."""

    offset: int
    slot: int
    private: bool


def _parts(private: list[Layer], clean: Layer | None, size: int) -> Iterator[_Part]:
    """What a disk has of all this, newest layer first. All pages are loaded."""
    for block in range(-(-size // BLOCK)):
        need = FULL
        number, i = divmod(block, PAGE_BLOCKS)
        for layer in (*private, *([clean] if clean else ())):
            entry = entry_at(layer.pages.page(number), i)
            for sector in range(SECTORS):
                if entry.valid & need & 1 << sector:
                    zero = entry.zero >> sector & 1
                    slot = -1 if zero else entry.slots[entry.side >> sector & 1]
                    yield _Part(block * BLOCK + sector * SECTOR, slot, layer.private)
            need &= ~entry.valid


async def _let_go(disk: Disk) -> None:
    if disk.image.origin is not None:
        await disk.image.origin.close()
    await disk.source.leave()


async def _read(disk: Disk) -> bytes:
    parts: list[bytes] = []
    for at in range(0, disk.size, READ):
        parts += [bytes(b) for b in await disk.read(at, min(READ, disk.size - at))]
    return b"".join(parts)


async def _clean_is_clean(disk: Disk, image: bytes) -> None:
    """Where nothing private lies above it, a clean block says what the image says."""
    if disk.view.clean is None:
        return

    async def fetch(offset: int, length: int) -> bytes:
        return image[offset : offset + length]

    await disk.view.load(0, disk.size)
    view = View(disk.image.cache, [], disk.image.layer, fetch)
    for piece in disk.view.plan(0, disk.size):
        if not piece.private and piece.slot >= 0:
            data = b"".join(bytes(part) for part in await view.read(piece.offset, piece.length))
            if data != image[piece.offset : piece.offset + piece.length]:
                raise Broken(f"mode {disk.mode}: {piece}, clean, is not what the image has")


_BOOT = forebay_cache.cache.boot_id()


@contextmanager
def looking(oracle: Oracle) -> Iterator[None]:
    """What stands still while states are looked at: threads, the clock, what the image's times are, the log."""
    status, write, handler = SystemCalls.status, Device.write, Listener(oracle._logged)

    def noted(device: Device, offset: int, data: Buffer) -> None:
        oracle.wrote()
        write(device, offset, data)

    root = logging.getLogger()
    level = root.level
    with ExitStack() as stack:
        stack.enter_context(simulated(_Quick("quick")))
        stack.enter_context(
            mock.patch.object(
                SystemCalls, "status", lambda calls, fd: oracle._host.status(status(calls, fd))
            )
        )
        stack.enter_context(mock.patch.object(Device, "write", noted))
        stack.enter_context(mock.patch.object(applying, "boot_id", side_effect=lambda: oracle.boot))
        root.addHandler(handler)
        root.setLevel(logging.WARNING)
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(level)


def clock() -> trio.testing.MockClock:
    """Time that nobody waits for."""
    return trio.testing.MockClock(autojump_threshold=0)


__all__ = ["Broken", "Host", "Oracle", "clock", "looking"]
