# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The token bucket and the rates of a disk, on a clock that only they see; and what a connection holds back."""

import math
import socket
from collections.abc import Iterator
from functools import partial
from typing import cast

import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.disk.rates.bucket import REST_SECONDS, Bucket
from forebay.disk.rates.rates import LEAST_SECONDS, TURN_REQUESTS, Limits, Rates
from forebay_nbd.protocol.events import NeedData, Request
from forebay_nbd.protocol.requests import RequestReader, encode_request
from forebay_nbd.protocol.wire import MAX_PAYLOAD, Cmd
from forebay_nbd.server.limits import Limits as ServerLimits
from forebay_nbd.server.polling import Turns
from forebay_nbd.throttle.held import MOST_AT_ONCE, Held
from forebay_nbd.throttle.turnstile import Turnstile
from forebay_nbd.throttle.words import CLOCK, WAITING

SIZE = 1 << 40


# ------------------------------------------------------------------------------------------ bucket

amounts = st.floats(0.5, 500.0)
pauses = st.floats(0.0, 2.0)


@settings(deadline=None)
@given(
    rate=st.floats(1.0, 10_000.0),
    burst=st.floats(0.0, 20_000.0),
    steps=st.lists(st.tuples(pauses, amounts), min_size=1, max_size=60),
)
def test_in_no_time_is_more_used_than_burst_and_rate_allow(
    rate: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    bucket = Bucket()
    bucket.set(rate, burst, 0.0)
    most = max(burst, rate * REST_SECONDS, 1.0)
    now, used = 0.0, [(0.0, 0.0)]
    for pause, units in steps:
        now += pause
        if bucket.seconds_until(units, now) == 0.0:
            bucket.use(units)
            used.append((now, units))
    for first in range(1, len(used)):
        for last in range(first, len(used)):
            sum_of = sum(units for _, units in used[first : last + 1])
            seconds = used[last][0] - used[first][0]
            beyond = max(0.0, used[last][1] - most)
            assert sum_of - beyond <= (most + rate * seconds) * (1 + 1e-9) + 1e-6


@settings(deadline=None)
@given(
    rate=st.floats(1.0, 10_000.0),
    burst=st.floats(0.0, 20_000.0),
    units=st.lists(amounts, min_size=1),
)
def test_who_waits_as_told_gets_what_the_rate_brings_and_no_less(
    rate: float, burst: float, units: list[float]
) -> None:
    bucket = Bucket()
    bucket.set(rate, burst, 0.0)
    now = 0.0
    for one in units:
        if wait := bucket.seconds_until(one, now):
            now += wait * (1 + 1e-9) + 1e-9
            assert bucket.seconds_until(one, now) == 0.0
        bucket.use(one)
    # never longer than the rate asks for, the burst being there from the start
    assert now <= sum(units) / rate * (1 + 1e-6) + 1e-3


def test_a_bucket_holds_no_more_than_its_burst_however_long_it_rests() -> None:
    bucket = Bucket()
    bucket.set(100, 7, 0.0)
    bucket.use(5)
    assert bucket.most == 10  # a tenth of the rate is more
    assert bucket.seconds_until(10, 1e6) == 0.0
    bucket.use(10)
    assert bucket.seconds_until(1, 1e6) == pytest.approx(0.01)


def test_what_is_larger_than_the_bucket_passes_when_it_is_full_and_is_paid_for_afterwards() -> None:
    bucket = Bucket()
    bucket.set(1000, 0, 0.0)
    assert bucket.seconds_until(5000, 0.0) == 0.0
    bucket.use(5000)
    assert bucket.seconds_until(1, 0.0) == pytest.approx(4.901)


def test_a_new_rate_pays_for_what_was_used_before() -> None:
    bucket = Bucket()
    bucket.set(10, 0, 0.0)
    bucket.use(101)
    assert bucket.seconds_until(1, 0.0) == pytest.approx(10.1)
    bucket.set(1000, 0, 0.0)
    assert bucket.seconds_until(1, 0.0) == pytest.approx(0.101)
    bucket.set(1000, 5000, 0.0)  # a larger bucket is no full one
    assert bucket.seconds_until(1, 0.0) > 0
    bucket.set(0, 0, 0.0)
    assert bucket.seconds_until(1 << 40, 0.0) == 0.0


@settings(deadline=None)
@given(
    iops=st.floats(1.0, 10_000.0) | st.just(0.0),
    bps=st.floats(1.0, 1e7) | st.just(0.0),
    steps=st.lists(st.tuples(pauses, st.integers(1, 1 << 25)), min_size=1, max_size=60),
)
def test_the_core_lets_in_and_counts_as_python_does(
    iops: float, bps: float, steps: list[tuple[float, int]]
) -> None:
    core = pytest.importorskip("forebay_fast.core", reason="the core is not compiled: make setup")
    python, twin = (Rates(1 << 24, lambda: True) for _ in range(2))
    for one in (python, twin):
        one._requests.set(iops, 5.0, 0.0)
        one._bytes.set(bps, 0.0, 0.0)
        one.words[CLOCK] = 100.0
    now = 0.0
    for pause, length in steps:
        now += pause
        units = min(length, 1 << 24)
        wait = python._requests.seconds_until(1, now) or python._bytes.seconds_until(units, now)
        if not wait:
            python._requests.use(1)
            python._bytes.use(units)
        assert core.admit(twin.words, length, now - 100.0) == (not wait)
        assert twin.words.tolist() == pytest.approx(python.words.tolist())
    for word, value in ((WAITING, 1.0), (CLOCK, math.nan)):
        twin.words[WAITING], twin.words[word] = 0.0, value
        assert not core.admit(twin.words, 1, now + 1e9)


# ------------------------------------------------------------------------------------------- rates


def rates(zeros: bool = True, **limits: int) -> Rates:
    made = Rates(SIZE, lambda: zeros)
    made.set(Limits(**limits))
    return made


def nothing() -> None:
    pass


async def test_without_limits_nobody_has_to_ask() -> None:
    made = rates()
    assert not made.is_on
    assert made.enter(nothing).admit(Cmd.READ, 1 << 30) == 0.0


@pytest.mark.parametrize("connections", [1, 3])
async def test_500_requests_a_second_are_that(
    connections: int, autojump_clock: trio.testing.MockClock
) -> None:
    made = rates(iops=500)
    done = [0] * connections

    async def client(n: int) -> None:
        woken = trio.Event()

        def wake() -> None:
            woken.set()

        waiter = made.enter(wake)
        while True:
            if wait := waiter.admit(Cmd.READ, 4096):
                waiter.wait()
                with trio.move_on_after(wait):
                    await woken.wait()
                woken = trio.Event()
                continue
            done[n] += 1
            waiter.pass_on()
            await trio.lowlevel.checkpoint()

    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for n in range(connections):
                nursery.start_soon(client, n)
    assert 4950 <= sum(done) <= 5051
    assert max(done) <= min(done) * 1.5  # nobody starves
    assert 9 < made.seconds <= 10


async def test_both_limits_hold(autojump_clock: trio.testing.MockClock) -> None:
    made = rates(iops=1000, bps=1 << 20)
    waiter, small, large = made.enter(nothing), 0, 0
    while trio.current_time() < 5:
        if wait := waiter.admit(Cmd.WRITE, 64 << 10):
            await trio.sleep(wait)
        else:
            large += 1
    while trio.current_time() < 10:
        if wait := waiter.admit(Cmd.READ, 512):
            await trio.sleep(wait)
        else:
            small += 1
    assert 16 * 5 <= large <= 16 * 5 + 3
    assert 4900 <= small <= 5100


@pytest.mark.parametrize(
    ("command", "zeros", "waits"),
    [
        (Cmd.READ, False, True),
        (Cmd.WRITE, False, True),
        (Cmd.CACHE, False, True),
        (Cmd.WRITE_ZEROES, True, True),
        (Cmd.WRITE_ZEROES, False, False),
        (Cmd.TRIM, True, False),
        (Cmd.BLOCK_STATUS, True, False),
    ],
)
async def test_what_counts_with_its_bytes(command: Cmd, zeros: bool, waits: bool) -> None:
    made = rates(zeros, bps=1 << 20)
    waiter = made.enter(nothing)
    assert waiter.admit(command, 8 << 20) == 0.0
    assert (waiter.admit(command, 8 << 20) > 0.0) is waits


@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS, Cmd.READ, 99])
async def test_everything_counts_as_a_request(command: int) -> None:
    made = rates(iops=1)
    waiter = made.enter(nothing)
    assert waiter.admit(command, 0) == 0.0
    assert waiter.admit(command, 0) > 0.0


async def test_nobody_uses_more_at_once_than_the_disk_has() -> None:
    made = Rates(1 << 20, lambda: True)
    made.set(Limits(bps=1 << 20))
    waiter = made.enter(nothing)
    assert waiter.admit(Cmd.CACHE, (1 << 32) - 1) == 0.0
    assert waiter.admit(Cmd.READ, 1) < 1.0


async def test_a_wait_is_long_enough_to_be_worth_it(mock_clock: trio.testing.MockClock) -> None:
    made = rates(iops=10_000)
    waiter = made.enter(nothing)
    while not (wait := waiter.admit(Cmd.READ, 512)):
        pass
    assert wait == LEAST_SECONDS


async def test_all_look_again_when_a_limit_is_raised_lowered_or_taken_away() -> None:
    made = rates(iops=1)
    woken: list[int] = []
    waiters = [made.enter(partial(woken.append, n)) for n in range(3)]
    assert waiters[0].admit(Cmd.READ, 1) == 0.0
    for waiter in waiters:
        assert waiter.admit(Cmd.READ, 1) > 0.0
        waiter.wait()
    for limits in (Limits(iops=2), Limits(iops=1), Limits()):
        made.set(limits)
        assert sorted(woken) == [0, 1, 2]
        woken.clear()
    made.set(Limits())  # no change
    assert not woken
    assert all(waiter.admit(Cmd.READ, 1) == 0.0 for waiter in waiters[:1])
    assert not made.is_on


async def test_who_waits_comes_in_turn_and_who_leaves_lets_others_come(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = rates(iops=10)
    woken: list[int] = []
    first, second, third = (made.enter(partial(woken.append, n)) for n in range(3))
    assert first.admit(Cmd.READ, 1) == 0.0
    for waiter in (first, second, third):
        waiter.wait()
    assert first.admit(Cmd.READ, 1) == pytest.approx(0.1)
    assert second.admit(Cmd.READ, 1) == math.inf
    await trio.sleep(0.1)
    assert second.admit(Cmd.READ, 1) == math.inf  # although there is one to be had
    first.leave()
    assert woken == [1]
    assert second.admit(Cmd.READ, 1) == 0.0
    second.pass_on()
    assert woken == [1, 2]
    third.pass_on()
    assert woken == [1, 2]
    assert made.waits == 3
    assert made.seconds == pytest.approx(0.1)
    await trio.sleep(1)
    assert made.seconds == pytest.approx(0.1)  # nobody waits


async def test_one_with_much_to_ask_lets_others_come_first_after_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = rates(iops=1000, iops_burst=1000)
    woken: list[int] = []
    busy, other = (made.enter(partial(woken.append, n)) for n in range(2))
    while busy.admit(Cmd.READ, 1) == 0.0:
        pass
    busy.wait()
    other.wait()
    await trio.sleep(1)
    served = 0
    while busy.admit(Cmd.READ, 1) == 0.0:
        served += 1
    assert served == TURN_REQUESTS
    assert woken == [1]
    assert other.admit(Cmd.READ, 1) == 0.0


# -------------------------------------------------------------------------------------- held back

IN_PLACE = 4096
CAPACITY = 16384


def encoded(*requests: Request) -> bytes:
    return b"".join(bytes(part) for one in requests for part in encode_request(one))


def read(cookie: int) -> Request:
    return Request(Cmd.READ, 0, cookie, 0, 512)


def write(cookie: int, size: int) -> Request:
    return Request(Cmd.WRITE, 0, cookie, 0, size, memoryview(bytes([cookie % 256]) * size))


FLUSH = Request(Cmd.FLUSH, 0, 777)
DISC = Request(Cmd.DISC, 0, 778)


class Reading:
    """A reader of which only so many requests may be seen."""

    def __init__(self, allowed: int = 0) -> None:
        self.reader = RequestReader(CAPACITY, IN_PLACE)
        self.held = Held(self.reader, IN_PLACE)
        self.allowed = allowed
        self.asked: list[tuple[int, int]] = []

    def admit(self, command: int, length: int) -> float:
        self.asked.append((command, length))
        if not self.allowed:
            return 0.25
        self.allowed -= 1
        return 0.0

    def feed(self, data: bytes) -> None:
        while data:
            space = self.held.space()
            count = min(len(space), len(data))
            assert count, "the buffer is full"
            space[:count] = data[:count]
            self.reader.received(count)
            data = data[count:]

    def let_in(self) -> float | None:
        return self.held.let_in(self.admit)

    def shown(self) -> Iterator[Request]:
        """What the reader gives, as long as it shows anything."""
        while self.reader.start < self.reader.end or self.reader.large_payload():
            event = self.reader.next_event()
            if not isinstance(event, Request):
                return
            yield event

    def cookies(self) -> list[int]:
        return [one.cookie for one in self.shown()]


def test_the_reader_sees_what_may_be_carried_out_and_no_more() -> None:
    reading = Reading(allowed=2)
    reading.feed(encoded(read(1), write(2, 100), read(3), write(4, 4096)))
    assert reading.let_in() == 0.0
    assert reading.cookies() == [1, 2]
    assert reading.let_in() == 0.25
    reading.held.hide_all()
    assert reading.cookies() == []
    reading.held.show_all()
    assert reading.cookies() == [3, 4]
    assert reading.let_in() is None
    assert reading.asked == [(Cmd.READ, 512), (Cmd.WRITE, 100), *[(Cmd.READ, 512)] * 2]


def test_a_flush_overtakes_what_waits_and_nothing_is_lost() -> None:
    reading = Reading()
    reading.feed(encoded(read(1), write(2, 1000), FLUSH, read(3), FLUSH, write(4, 17)))
    for _ in range(2):
        assert reading.let_in() == 0.0
        assert reading.cookies() == [FLUSH.cookie]
    assert reading.let_in() == 0.25
    reading.feed(encoded(read(5), FLUSH)[:-1])
    assert reading.let_in() == 0.25
    reading.feed(encoded(FLUSH)[-1:])
    assert reading.let_in() == 0.0
    assert reading.cookies() == [FLUSH.cookie]
    reading.allowed = 5
    assert reading.let_in() == 0.0
    found = list(reading.shown())
    assert [one.cookie for one in found] == [1, 2, 3, 4, 5]
    assert [bytes(one.payload) for one in found] == [b"", b"\2" * 1000, b"", b"\4" * 17, b""]


def test_a_flush_is_found_behind_what_was_looked_through_before() -> None:
    reading = Reading()
    reading.feed(encoded(*(read(n) for n in range(1, 6))))
    assert reading.let_in() == 0.25
    for allowed in (1, 2):
        reading.allowed = allowed
        assert reading.let_in() == 0.0
        assert len(reading.cookies()) == allowed
    reading.feed(encoded(FLUSH, read(6)))
    assert reading.let_in() == 0.0
    assert reading.cookies() == [FLUSH.cookie]
    reading.allowed = 3
    assert reading.let_in() == 0.0
    assert reading.cookies() == [4, 5, 6]


def test_the_end_of_a_request_has_room_however_full_the_buffer_was() -> None:
    reading = Reading()
    data = encoded(*(write(n, 4000) for n in range(1, 6)))
    assert len(data) > CAPACITY
    reading.feed(data[:CAPACITY])
    assert reading.let_in() == 0.25
    assert not len(reading.held.space())
    reading.allowed = 4
    assert reading.let_in() == 0.0
    assert reading.cookies() == [1, 2, 3, 4]
    assert reading.let_in() is None
    reading.feed(data[CAPACITY:])
    reading.allowed = 1
    assert reading.let_in() == 0.0
    assert [bytes(one.payload) for one in reading.shown()] == [b"\5" * 4000]


def test_nothing_overtakes_beyond_the_end_of_a_client() -> None:
    reading = Reading()
    reading.feed(encoded(read(1), DISC, FLUSH))
    assert reading.let_in() == 0.25
    reading.allowed = 1
    assert reading.let_in() == 0.0
    assert reading.cookies()[:2] == [1, DISC.cookie]


def test_an_end_does_not_have_to_ask() -> None:
    reading = Reading()
    reading.feed(encoded(DISC))
    assert reading.let_in() == 0.0
    assert reading.cookies() == [DISC.cookie]


def test_what_is_no_request_is_shown_with_all_behind_it() -> None:
    reading = Reading(allowed=1)
    reading.feed(encoded(read(1)) + b"\xff" * 40)
    assert reading.let_in() == 0.0
    assert reading.reader.end - reading.reader.start == 28 + 40
    reading.held.show_all()
    too_large = Request(Cmd.WRITE, 0, 9, 0, MAX_PAYLOAD + 1)
    reading = Reading()
    reading.feed(encoded(too_large))
    assert reading.let_in() == 0.0  # the reader raises ProtocolError


def test_a_payload_with_memory_of_its_own_asks_with_its_header() -> None:
    reading = Reading()
    data = encoded(write(1, IN_PLACE + 1))
    reading.feed(data[:27])
    assert reading.let_in() is None
    reading.feed(data[27:1000])
    assert reading.let_in() == 0.25
    assert not reading.reader.large_payload()
    reading.allowed = 1
    assert reading.let_in() == 0.0
    assert reading.cookies() == []
    assert reading.reader.large_payload() == IN_PLACE + 1
    reading.feed(data[1000:])
    assert reading.cookies() == [1]


def test_so_many_at_once_and_then_others_have_a_turn() -> None:
    reading = Reading(allowed=1000)
    reading.feed(encoded(*(read(n) for n in range(MOST_AT_ONCE + 5))))
    assert reading.let_in() == 0.0
    assert reading.cookies() == [*range(MOST_AT_ONCE)]
    assert reading.let_in() == 0.0
    assert len(reading.cookies()) == 5


requests = st.one_of(
    st.just(FLUSH),
    st.builds(read, st.integers(1, 200)),
    st.builds(write, st.integers(1, 200), st.sampled_from([0, 1, 512, 4096, 5000])),
)


@settings(deadline=None)
@given(
    wanted=st.lists(requests, max_size=40),
    pieces=st.lists(st.integers(1, 6000), min_size=1),
    allowances=st.lists(st.integers(0, 5), min_size=1),
)
def test_every_request_comes_once_whole_and_in_order_but_for_flushes(
    wanted: list[Request], pieces: list[int], allowances: list[int]
) -> None:
    reading, data, found = Reading(), encoded(*wanted), []
    turn = 0
    while data or reading.reader.start < reading.reader.end or reading.reader.large_payload():
        turn += 1
        piece = data[: min(pieces[turn % len(pieces)], len(reading.held.space()))]
        reading.feed(piece)
        data = data[len(piece) :]
        reading.allowed = allowances[turn % len(allowances)] + (turn > 100)
        if reading.reader.large_payload() or reading.let_in() == 0.0:
            found += [(one.command, one.cookie, bytes(one.payload)) for one in reading.shown()]
        reading.held.show_all()
    expected = [(one.command, one.cookie, bytes(one.payload)) for one in wanted]

    def is_flush(one: tuple[int, int, bytes]) -> bool:
        return one[0] == Cmd.FLUSH

    assert [x for x in found if not is_flush(x)] == [x for x in expected if not is_flush(x)]
    assert sum(map(is_flush, found)) == sum(map(is_flush, expected))


# ------------------------------------------------------------------------------------------ whose turn it is


class Enough(Exception):
    """The flood ends the test."""


class Flood:
    """A socket whose client never stops to flush. Raises Enough after so many receives."""

    def __init__(self, receives: int) -> None:
        self.left = receives

    def recv_into(self, space: memoryview) -> int:
        self.left -= 1
        if self.left < 0:
            raise Enough
        data = encoded(Request(Cmd.FLUSH, 0, 1, 0, 0))
        space[: len(data)] = data
        return len(data)


async def test_whoever_floods_beside_a_request_that_waits_gives_others_their_turn() -> None:
    rates = Rates(SIZE, lambda: False)
    rates.set(Limits(iops=1))
    reader = RequestReader()
    sock = cast("socket.socket", Flood(20_000))
    turnstile, others = Turnstile(sock, reader, 4096), 0

    async def look() -> None:
        nonlocal others
        while True:
            others += 1
            await trio.lowlevel.checkpoint()

    async def answer() -> bool:
        while not isinstance(reader.next_event(), NeedData):
            pass
        return True

    async def receive() -> bool:
        raise Enough

    turns = Turns(sock, ServerLimits(turn_seconds=2e-3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with turnstile.of(rates):
            data = encoded(*(Request(Cmd.READ, 0, n, 0, 512) for n in range(3)))
            reader.room()[: len(data)] = data  # all but the first have to wait
            reader.received(len(data))
            with pytest.raises(Enough):
                await turnstile.serve(answer, receive, turns)
        nursery.cancel_scope.cancel()
    assert others > 20, others
