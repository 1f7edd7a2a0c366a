# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""So many places, given by weight to those who wait for one: what trio has as a CapacityLimiter, which knows none."""

import trio

from forebay.origin.sharing.queue import FairQueue, payer


class FairPlaces:
    """The part of trio.CapacityLimiter's interface that `trio.to_thread.run_sync` uses."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._total = total
        self._waiting: FairQueue[trio.lowlevel.Task] = FairQueue()

    @property
    def borrowed_tokens(self) -> int:
        """How many places are taken."""
        return self._total - self._free

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Wait for a place, which the `payer` of this task pays for."""
        del borrower
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._free:
            self._free -= 1
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        task, who = trio.lowlevel.current_task(), payer.get()
        self._waiting.push(who, task, trio.current_time())

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(who, task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def release_on_behalf_of(self, borrower: object) -> None:
        """Give a place back: to the next one who waits, if there is one."""
        del borrower
        if self._waiting:
            trio.lowlevel.reschedule(self._waiting.pop(trio.current_time()))
        else:
            self._free += 1
