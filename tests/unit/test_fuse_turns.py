# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How the FUSE door's tasks wait for requests: on a pipe, where a byte is a request."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

pytest.importorskip("pyfuse3", reason="python3-pyfuse3 is not installed: `make setup` installs it")

from forebay.doors.fuse.turns import Turns

TASKS = 5


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    os.set_blocking(
        reading, False
    )  # a request that is not there is an error here, and a hang with the kernel
    yield reading, writing
    os.close(reading)
    os.close(writing)


Taken = trio.MemorySendChannel[bytes]


async def serve(turns: Turns, descriptor: int, taken: Taken, slow: bool = False) -> None:
    """One of pyfuse3's tasks, until the pipe ends."""
    while True:
        async with turns.Lock():
            await turns.wait_readable(descriptor)
        data = os.read(descriptor, 1)
        if not data:
            return
        taken.send_nowait(data)
        if slow:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("slow", [False, True])
async def test_each_request_is_taken_once(pipe: tuple[int, int], slow: bool) -> None:
    reading, writing = pipe
    turns = Turns()
    taken, seen = trio.open_memory_channel[bytes](100)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(serve, turns, reading, taken, slow)
            for burst in (1, 1, 20, 3, 1, 50):
                os.write(writing, bytes(range(burst)))
                found = [await seen.receive() for _ in range(burst)]
                assert found == [bytes([number]) for number in range(burst)]
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    with pytest.raises(trio.WouldBlock):
        seen.receive_nowait()


async def test_a_task_that_is_busy_leaves_the_waiting_to_another(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    turns = Turns()
    taken, seen = trio.open_memory_channel[bytes](TASKS)

    async def stuck() -> None:
        await turns.wait_readable(reading)
        taken.send_nowait(os.read(reading, 1))
        await trio.sleep_forever()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(stuck)
            for number in range(TASKS):
                os.write(writing, bytes([number]))
                assert await seen.receive() == bytes([number])
            nursery.cancel_scope.cancel()


async def test_all_hear_that_the_mount_is_gone(pipe: tuple[int, int]) -> None:
    """Every task has to find out, or pyfuse3.main() never returns."""
    reading, writing = pipe
    turns = Turns()
    taken, _seen = trio.open_memory_channel[bytes](1)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(serve, turns, reading, taken)
            await trio.testing.wait_all_tasks_blocked()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, writing)  # nobody writes any more
            os.close(nothing)


async def test_closing_ends_all(pipe: tuple[int, int]) -> None:
    turns, ended = Turns(), list[int]()

    async def wait(number: int) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await turns.wait_readable(pipe[0])
        ended.append(number)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for number in range(TASKS):
                nursery.start_soon(wait, number)
            await trio.testing.wait_all_tasks_blocked()
            turns.notify_closing(pipe[0])
    assert sorted(ended) == list(range(TASKS))


def test_it_is_trio_for_everything_else() -> None:
    turns = Turns()
    assert turns.open_nursery is trio.open_nursery
    assert turns.ClosedResourceError is trio.ClosedResourceError
    assert turns.lowlevel.current_task is trio.lowlevel.current_task
