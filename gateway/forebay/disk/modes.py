# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The mode of a disk: which policy it means, and how it is changed while clients are connected."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.schedule import WriteBack
from forebay.checkpoint.steps import Progress
from forebay.config.live import LiveSettings
from forebay.config.model import DiskSettings
from forebay.disk.admission import Admission
from forebay.disk.copy import FullCopy
from forebay.disk.fallback import PrivateOrOrigin
from forebay.disk.origin_writes import OriginWrites
from forebay.disk.private_writes import PrivateWrites
from forebay.disk.ranges import Gate, Ranges
from forebay.disk.reads import arrive
from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay.image.source import Source
from forebay.units import Mode, format_size
from forebay_cache import View
from forebay_cache.durable.sync import Begun
from forebay_cache.format.geometry import BLOCK

PRIVATE_MODES = (Mode.WRITE_BACK, Mode.FULL_COPY)
"""The modes in which writes go to a private layer, to be taken to the image later."""


class Policy(Protocol):
    """Where a disk's writes go. All calls raise OSError; ENOSPC when there is no room and none is coming.

    Offsets and lengths are bytes, any; what is not whole sectors is completed from what the disk reads there.
    """

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """See :meth:`forebay_nbd.Export.write_now`."""

    def answered(self) -> None:
        """See :meth:`forebay_nbd.Export.answered`."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Store the data. The write may be acknowledged when this returns."""

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make the range read as zeros; `may_trim`: also by giving its storage back. May be acknowledged then."""

    def flush_now(self) -> bool:
        """Do what :meth:`flush` does and return True if that takes but a moment; else False, and nothing is done."""

    def begin_flush(self) -> Begun | None:
        """See :meth:`forebay_nbd.Export.begin_flush`."""

    async def flush(self) -> None:
        """Make all that was acknowledged durable."""


class Veil(Protocol):
    """What keeps writes out while what a disk has of its own is another host's, or may be."""

    async def arrive(self) -> None:
        """Wait until it is here. Raises OSError."""


class Veiled:
    """The policy meanwhile: nothing is stored at once, so that each write waits. What was acknowledged is kept."""

    def __init__(self, policy: Policy) -> None:
        """`policy` takes the writes again afterwards."""
        self.policy = policy
        self.write, self.zero = policy.write, policy.zero
        self.begin_flush, self.flush_now, self.flush = (
            policy.begin_flush,
            policy.flush_now,
            policy.flush,
        )

    def write_now(self, _writes: list[tuple[int, memoryview]]) -> int:
        """None of them."""
        return 0

    def answered(self) -> None:
        """Nothing."""


class Modes:
    """The mode of one disk, and all that follows from it.

    `policy` takes the writes; whoever changes it has closed `gate`, through which each write passes. `copy` is the full
    copy, if the mode wants one. `choose` must have been called before the disk is used.
    """

    def __init__(
        self,
        source: Source,
        image: Image,
        settings: LiveSettings,
        view: View,
        dirty: Dirty,
        writeback: WriteBack,
        counters: Counters,
    ) -> None:
        self._source = source
        self._image = image
        self._settings = settings
        self._view = view
        self._dirty = dirty
        self._writeback = writeback
        self._counters = counters
        self._overlay = source.use.overlay
        self._ranges = Ranges()
        self.gate = Gate()
        self._admission = Admission(view, image, dirty, writeback, self.gate, settings)
        self.copy = FullCopy(image, counters, source.use.disk)
        self._nursery: trio.Nursery | None = None
        """For the full copy; None while the disk does not run."""
        self._changing = trio.Lock()
        """Held by whoever changes the mode, the operator or :class:`forebay.disk.watch.Watch`."""
        self.mode = Mode(settings.now.mode)
        self.policy: Policy = self._to_origin(keep=False)
        self.is_held = False
        """True while nobody but a handover is to change the mode."""
        self.veil: Veil | None = None
        """See `put_behind`."""
        self.returns_to: Mode | None = None
        """The mode to go back to, where the disk is in write-through only for the handover."""
        self.on_choice: Callable[[Policy], None] = _nothing
        """Called when `policy` has become another one, before the next await."""

    @property
    def writes_private(self) -> bool:
        """True if writes go to a private layer: in the private modes, and of overlays in all modes."""
        return not self._source.use.read_only and (self._overlay or self.mode in PRIVATE_MODES)

    @property
    def _writes_back(self) -> bool:
        """True if private data is written to the image by itself."""
        return self.mode is Mode.WRITE_BACK and self._source.use.writes

    def choose(self) -> None:
        """Set up the layers, the limits and the policy of the mode; nothing may be written meanwhile."""
        if self.writes_private:
            self._dirty.open_layer()
        self._writeback.automatic = self._writes_back
        self._admission.set_limits()
        self.policy = self._chosen_policy()
        self.show_clean(shown=not (self._source.withheld or self._source.kept_back))
        self.on_choice(self.policy)

    def adopt_limits(self) -> None:
        """Have the limits of the settings as they are now hold."""
        self._admission.set_limits()

    def _chosen_policy(self) -> Policy:
        if not self.writes_private:
            return self._to_origin(keep=self.mode is Mode.WRITE_THROUGH)
        to_cache = self.private_writes(self._view, self._counters)
        if self._overlay:
            return to_cache
        return PrivateOrOrigin(to_cache, self._past_cache, self._image, self._writeback)

    def private_writes(self, view: View, counters: Counters) -> PrivateWrites:
        """What writes to the private layers of that view, which are the disk's."""
        size = self._source.size
        return PrivateWrites(view, size, self._dirty, self._admission, self._ranges, counters)

    def put_behind(self, veil: Veil | None) -> None:
        """Have all writes wait for the veil from now on; None: for none any more. None is under way."""
        self.veil = veil
        if isinstance(self.policy, Veiled):
            self.policy = self.policy.policy
        if veil is not None:
            self.policy = Veiled(self.policy)
        self.on_choice(self.policy)

    def _to_origin(self, *, keep: bool) -> OriginWrites:
        return OriginWrites(self._image, self._dirty, self._ranges, self._counters, keep=keep)

    def _past_cache(self) -> OriginWrites:
        return self._to_origin(keep=False)

    def check_fits(self, mode: Mode, settings: DiskSettings | None = None) -> None:
        """Raise ForebayError where a disk of this size cannot be in that mode, with those settings (None: its own)."""
        if mode is not Mode.FULL_COPY:
            return
        cap = (settings or self._settings.now).cache_size
        key, size = self._image.key, self._source.size
        if 0 < cap < size:
            raise ForebayError(
                f"a full copy of {key} takes {format_size(size)}, and cache_size lets the disk have "
                f"{format_size(cap)}: leave cache_size out, or use write-back"
            )
        room = self._image.cache.device.slots * BLOCK
        if size > room * 9 // 10:  # the rest is for what guests write meanwhile
            raise ForebayError(
                f"a full copy of {key} takes {format_size(size)}, and the cache has {format_size(room)}: "
                "use write-back, or a larger cache device"
            )

    async def arrive_to_write(self) -> None:
        """Wait for an image that cannot be reached, unless the cache takes writes without it.

        It does where the mark beside the image says already that this lacks data. Raises OSError(EIO).
        """
        if self.veil is not None:
            await self.veil.arrive()
        is_announced = self._overlay or self._dirty.mark.is_set
        if not (self.writes_private and is_announced):
            await arrive(self._image, self._settings.now.origin_timeout)

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Around each write that has to wait for anything: for the image, and while the gate is shut. Raises OSError.

        What waited at the gate may find that the image was handed over meanwhile, and waits for that again.
        """
        while True:
            await self.arrive_to_write()
            async with self.gate.passing():
                if not (self._image.reach.withheld or self.veil):
                    yield
                    return

    def show_clean(self, *, shown: bool) -> None:
        """Have the disk read what the cache has of the image, or not: while another host may write that."""
        self._view.clean = self._image.layer if shown and self.mode is not Mode.NONE else None

    async def change(self, mode: Mode, progress: Progress) -> None:
        """Enter another mode while clients are connected; writes wait for the last part of it, reads do not notice.

        `progress` is told of what has to be written back first. Raises ForebayError where the disk cannot be in that
        mode, OSError where what is dirty cannot be taken to the image; the mode is the old one then.
        """
        async with self._changing:
            if mode is not self.mode:
                await self._change(mode, progress)

    async def change_if_free(self, mode: Mode, progress: Progress) -> None:
        """The same, as an operator asks for it: ForebayError, too, where a handover has begun meanwhile.

        A disk that is in write-through for that is in the mode already, and stays in it.
        """
        async with self._changing:
            self.check_may_enter(mode)
            if mode is self.mode:
                self.returns_to = None
            elif mode is not self.returns_to:
                await self._change(mode, progress)

    async def hold(self, progress: Progress) -> None:
        """Leave the private modes for a handover, and let nobody else change the mode until `let_go`.

        Raises as `change` does.
        """
        self.is_held = True
        if self.mode in PRIVATE_MODES:
            await self._writeback.nearly_finish(progress)
        async with self._changing:  # a change that was under way has come to its end
            was = self.mode
            if was in PRIVATE_MODES:
                await self._change(Mode.WRITE_THROUGH, progress)
                self.returns_to = was

    async def let_go(self) -> None:
        """The handover is over: be in the mode of before, unless the operator wants the one that it is in.

        Raises as `change` does, and is called again then.
        """
        async with self._changing:
            if self.returns_to is not None:
                await self._change(self.returns_to, _silent)
                self.returns_to = None
            self.is_held = False

    def check_may_enter(self, mode: Mode, settings: DiskSettings | None = None) -> None:
        """Raise ForebayError where the disk cannot be in that mode, unless it is in it, or comes back to it. `settings`
        as `check_fits`.
        """
        if mode not in (self.mode, self.returns_to):
            if self.is_held or self._source.withheld or self._source.kept_back:
                disk = self._source.use.disk
                raise ForebayError(
                    f"'{disk}' is being handed over to another host, or from it: 'forebay handover abort {disk}' ends "
                    "that, if it can be ended"
                )
            self.check_fits(mode, settings)
            self._source.check_safe(mode)

    async def _change(self, mode: Mode, progress: Progress) -> None:
        self.check_fits(mode)
        self._source.check_safe(mode)
        leaves_private = self.writes_private and not self._overlay and mode not in PRIVATE_MODES
        if leaves_private and self._dirty.bytes:
            await self._writeback.catch_up()  # most of it, while the VM goes on writing
        async with self.gate.closed():
            if leaves_private:
                await self._writeback.finish(progress)
                self._dirty.drop()
            else:
                await self.policy.flush()
                self._source.check_safe(mode)  # the image may have come meanwhile
            was, self.mode = self.mode, mode
            self.choose()
        await self._change_copy(was)

    async def _change_copy(self, was: Mode) -> None:
        """Stop, give up or start the full copy, as the modes before and now want it."""
        self.copy.stop()
        if was is Mode.FULL_COPY:
            await self.copy.release()
        self._start_copy()

    def start(self, nursery: trio.Nursery) -> None:
        """Begin the full copy if the mode wants one. `nursery` runs as long as the disk; later copies use it, too."""
        self._nursery = nursery
        self._start_copy()

    def _start_copy(self) -> None:
        if self.mode is Mode.FULL_COPY and self._nursery is not None:
            self.copy.start(self._nursery)


def _nothing(policy: Policy) -> None:
    pass


def _silent(_done: int, _total: int) -> None:
    pass
