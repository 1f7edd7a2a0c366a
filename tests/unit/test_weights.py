# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What disks get beside each other: in the queue in front of a store, on a clock that only it sees, and of the rounds
in which the compiled core serves connections, by counts of requests.
"""

import contextlib
import select
import socket
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import forebay_fast
from forebay.origin.sharing.places import FairPlaces
from forebay.origin.sharing.queue import PATIENCE, FairQueue, payer
from forebay_nbd import Limits, Timing
from forebay_nbd.protocol.requests import RequestReader
from forebay_nbd.protocol.wire import REQUEST, REQUEST_MAGIC, SIMPLE_REPLY, Cmd
from forebay_nbd.server import polling
from forebay_nbd.throttle.weight import MOST, USUAL, Weight
from forebay_nbd.throttle.words import WORDS

DEPTH = 64


def shares_fit(counts: list[int], weights: list[int]) -> None:
    """Each has its share, within 15 %, and two requests more or less."""
    for count, weight in zip(counts, weights, strict=True):
        due = sum(counts) * weight / sum(weights)
        assert abs(count - due) <= 0.15 * due + 2, (counts, weights)


def test_a_weight_is_a_number_from_1_to_10000() -> None:
    assert Weight().value == USUAL
    for wrong in (0, -1, MOST + 1):
        with pytest.raises(ValueError, match="1 to 10000"):
            Weight(wrong)


# ------------------------------------------------------------------------ the queue in front of a store


weights = st.lists(st.integers(1, MOST), min_size=2, max_size=6)


@settings(deadline=None, max_examples=12)
@given(weights=weights, depths=st.data())
def test_those_who_wait_all_the_time_get_places_by_weight(
    weights: list[int], depths: st.DataObject
) -> None:
    queue: FairQueue[int] = FairQueue()
    payers = [Weight(value) for value in weights]
    for n, one in enumerate(payers):
        for _ in range(depths.draw(st.integers(1, DEPTH))):
            queue.push(one, n, 0.0)
    counts = [0] * len(payers)
    for _ in range(3000):
        n = queue.pop(0.0)
        counts[n] += 1
        queue.push(payers[n], n, 0.0)
    shares_fit(counts, weights)


def test_the_lightest_one_advances_beside_the_heaviest() -> None:
    queue: FairQueue[Weight] = FairQueue()
    light, heavy = Weight(1), Weight(MOST)
    for one in [light, heavy] * 8:
        queue.push(one, one, 0.0)
    served: Counter[Weight] = Counter()
    for _ in range(3 * (MOST + 1)):
        one = queue.pop(0.0)
        served[one] += 1
        queue.push(one, one, 0.0)
    assert served[light] == 3


def test_who_has_waited_for_long_is_next_whatever_the_weights() -> None:
    queue: FairQueue[Weight] = FairQueue()
    light, heavy = Weight(1), Weight(MOST)
    queue.push(light, light, 0.0)
    assert queue.pop(0.0) is light, "and has had all that it gets for long"
    queue.push(light, light, 0.0)
    for n in range(10):
        queue.push(heavy, heavy, 0.1 * n)
        assert queue.pop(0.1 * n) is heavy
    queue.push(heavy, heavy, 1.0)
    assert queue.pop(PATIENCE) is light
    assert queue.pop(PATIENCE) is heavy
    assert not len(queue)


def test_nobody_saves_up_while_he_waits_for_nothing() -> None:
    queue: FairQueue[int] = FairQueue()
    early, late = Weight(100), Weight(100)
    for _ in range(500):
        queue.push(early, 0, 0.0)
        queue.push(early, 0, 0.0)
        queue.pop(0.0)
    counts = [0, 0]
    for _ in range(100):
        queue.push(late, 1, 0.0)
        counts[queue.pop(0.0)] += 1
    shares_fit(counts, [1, 1])


def test_another_weight_counts_for_what_waits_already() -> None:
    queue: FairQueue[int] = FairQueue()
    first, second = Weight(1), Weight(1)
    for _ in range(400):
        queue.push(first, 0, 0.0)
        queue.push(second, 1, 0.0)
    first.value = 4
    counts = Counter(queue.pop(0.0) for _ in range(400))
    shares_fit([counts[0], counts[1]], [4, 1])


async def test_places_go_to_the_waiting_by_weight_and_to_anybody_when_nobody_waits() -> None:
    """Two floods on two places: each call of the light one finds others of the heavy one waiting."""
    places = FairPlaces(2)
    done: Counter[str] = Counter()
    enough = trio.Event()

    async def client(name: str, weight: Weight) -> None:
        payer.set(weight)
        async with trio.open_nursery() as nursery:
            for _ in range(DEPTH):
                nursery.start_soon(flood, name)  # tasks that it starts are on its account

    async def flood(name: str) -> None:
        while not enough.is_set():
            await places.acquire_on_behalf_of(object())
            await trio.lowlevel.checkpoint()
            places.release_on_behalf_of(object())
            done[name] += not enough.is_set()
            if done.total() == 3000:
                enough.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client, "light", Weight(50))
        nursery.start_soon(client, "heavy", Weight(500))
    shares_fit([done["light"], done["heavy"]], [50, 500])
    assert places.borrowed_tokens == 0
    done.clear()
    enough = trio.Event()
    with trio.fail_after(10):
        await client("light", Weight(1))
    assert done["light"] >= 3000, "alone it has everything"


async def test_who_is_cancelled_while_he_waits_takes_no_place() -> None:
    places = FairPlaces(1)
    await places.acquire_on_behalf_of("first")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(places.acquire_on_behalf_of, "second")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    places.release_on_behalf_of("first")
    assert places.borrowed_tokens == 0
    with trio.fail_after(1):
        await places.acquire_on_behalf_of("third")
    assert places.borrowed_tokens == 1


# ---------------------------------------------------------------------------------- rounds of the core


class Export:
    """As far as a turn asks for it, and its outbox, too."""

    size, read_only, broken = 1 << 30, False, False
    _unsent: tuple[()] = ()

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.throttle = self
        self.words = array("d", (0.0,) * WORDS)
        self.timing = Timing()
        self.written = 0

    def read_now(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        return False

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        self.written += len(writes)
        return len(writes)

    def publish(self) -> None:
        pass

    def answered(self) -> None:
        pass


class Flood:
    """A client that always has `depth` requests under way, and counts the replies."""

    def __init__(
        self, export: Export, length: int = 512, *, writes: bool = False, depth: int = DEPTH
    ) -> None:
        self._depth = depth
        self.ours, self._theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._theirs.setblocking(False)
        self._under_way = 0
        self.replies = 0
        self._request = REQUEST.pack(
            REQUEST_MAGIC, 0, Cmd.WRITE if writes else Cmd.READ, 7, 0, length
        ) + bytes(length if writes else 0)
        self._reply = SIMPLE_REPLY.size + (0 if writes else length)
        self.turn = forebay_fast.core.Turn(
            RequestReader(),
            export,
            export,
            self.ours.fileno(),
            Limits(),
            structured=False,
            refusal=lambda cookie, error: b"",
            polling=polling,
        )

    def go_on(self) -> None:
        with contextlib.suppress(BlockingIOError):
            got = len(self._theirs.recv(1 << 20))
            assert got % self._reply == 0
            self._under_way -= got // self._reply
            self.replies += got // self._reply
        self._theirs.sendall(self._request * (self._depth - self._under_way))
        self._under_way = self._depth

    def close(self) -> None:
        self.ours.close()
        self._theirs.close()


@contextlib.contextmanager
def rounds(*floods: Flood) -> Iterator[Callable[[int], None]]:
    """What has so many rounds served, before each of which the clients take their replies and ask for more."""
    with select.epoll() as loops:
        wait = forebay_fast.core.Wait(loops)
        told: list[object] = []
        for flood in floods:
            wait.add(flood.turn, told.append)

        def serve(count: int) -> None:
            for _ in range(count):
                for flood in floods:
                    flood.go_on()
                wait.poll(0, 16)
            assert not told, told

        try:
            yield serve
        finally:
            for flood in floods:
                wait.remove(flood.turn)
                flood.close()


with_core = pytest.mark.skipif(bool(forebay_fast.missing), reason="no core: make setup")


@with_core
@pytest.mark.parametrize("values", [(10, 100), (100, 200, 50), (999, 1000), (1, 30)])
@pytest.mark.parametrize("writes", [False, True])
def test_connections_that_always_have_requests_are_served_by_weight(
    values: tuple[int, ...], writes: bool
) -> None:
    floods = [Flood(Export(Weight(value)), writes=writes) for value in values]
    with rounds(*floods) as serve:
        serve(400)
    shares_fit([flood.replies for flood in floods], list(values))


@with_core
def test_large_requests_count_for_more() -> None:
    """64 KiB is five units, and so a disk that reads in these gets fewer of them."""
    floods = [Flood(Export(Weight(100)), 64 << 10), Flood(Export(Weight(200)), 4096)]
    with rounds(*floods) as serve:
        serve(400)
    shares_fit([5 * floods[0].replies, floods[1].replies], [100, 200])


@with_core
def test_more_connections_get_a_disk_no_more_and_each_of_them_its_part() -> None:
    export = Export(Weight(100))
    several, other = [Flood(export) for _ in range(4)], Flood(Export(Weight(200)))
    with rounds(*several, other) as serve:
        serve(800)
    shares_fit([sum(flood.replies for flood in several), other.replies], [100, 200])
    shares_fit([flood.replies for flood in several], [1] * 4)


@with_core
def test_in_the_core_the_lightest_one_advances_beside_the_heaviest() -> None:
    light, heavy = Flood(Export(Weight(1)), 64 << 10), Flood(Export(Weight(MOST)))
    with rounds(light, heavy) as serve:
        serve(3000)  # the first request is for nothing; the next one waits for five units
        first = light.replies
        serve(1500)
    assert 0 < first < light.replies < 10


@with_core
def test_whoever_is_alone_has_everything_whatever_the_weight() -> None:
    """All that one receives is answered in a round, as with nobody else there: also with equal weights beside."""
    light = Flood(Export(Weight(1)))
    with rounds(light, idle := Flood(Export(Weight(MOST)))) as serve:
        serve(1)
        idle.go_on = lambda: None  # type: ignore[method-assign]
        serve(DEPTH)
        before = light.replies
        serve(20)
        assert light.replies - before >= 19 * DEPTH
    equal = [Flood(Export(Weight(7))) for _ in range(3)]
    with rounds(*equal) as serve:
        serve(21)
    assert [flood.replies for flood in equal] == [20 * DEPTH] * 3


@with_core
def test_another_weight_holds_from_the_next_round_on() -> None:
    first, second = Export(Weight(100)), Export(Weight(100))
    floods = [Flood(first), Flood(second)]
    with rounds(*floods) as serve:
        serve(50)
        before = [flood.replies for flood in floods]
        first.weight.value = 300
        serve(400)
        shares_fit(
            [flood.replies - was for flood, was in zip(floods, before, strict=True)], [300, 100]
        )


@with_core
def test_what_had_to_wait_counts_from_when_it_came() -> None:
    """The latency of a light disk has what the weights cost it."""
    light = Flood(export := Export(Weight(1)), depth=1)
    with rounds(light, Flood(Export(Weight(MOST)))) as serve:
        serve(2)  # the second request has come, and waits
        moments = [perf_counter()]
        while light.replies < 2:
            serve(1)
            moments.append(perf_counter())
    assert len(moments) > 100
    assert export.timing.latency.told()["hit"]["max_seconds"] >= moments[-3] - moments[0]
