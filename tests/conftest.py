# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Rules that hold for every test level: no unexpected warning in the log, and a replayable seed."""

import gc
import logging
import os
import random
import re
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

SEED_OPTION = "--seed"
DEFAULT_SEED = 20240229


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        SEED_OPTION,
        type=int,
        default=DEFAULT_SEED,
        help="what `seed` and `rng` give to tests; a failure prints the one it had",
    )


def pytest_configure() -> None:
    """Make the tests behave alike wherever they run.

    - A shell lets what it starts in the background ignore SIGINT, and what tests start would inherit that.
    - Where these variables say that it runs under CI, pytest compares what differs line by line; for lists of
      long byte strings, which the searches for planted bugs compare, that takes minutes.
    - A state that follows one it must not follow is an error, here and in every daemon that a test starts.
    """
    os.environ["FOREBAY_STRICT"] = "1"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)


def pytest_collection_finish() -> None:
    """Have the garbage collector look at what tests make, and not at all the modules and tests each time.

    With those in sight it comes so rarely that the simulations' devices and images add up to many gigabytes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """Where a sync awaits nothing, and is done at once."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="forebay-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """The seed of this run; `pytest --seed N` replays another."""
    value: int = pytestconfig.getoption(SEED_OPTION)
    return value


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """A generator of its own for each test: the same seed and test give the same numbers."""
    return random.Random(f"{seed}:{request.node.nodeid}")


class LogWatch(logging.Handler):
    """Holds the records of level WARNING and above of one test, and what that test expects."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self.expected: list[re.Pattern[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def expect(self, pattern: str) -> None:
        """Records whose message matches `pattern` (a regular expression) are allowed from now on."""
        self.expected.append(re.compile(pattern))

    def unexpected(self) -> list[str]:
        """The records that nothing expects, one line each."""
        return [
            f"{record.levelname} {record.name}: {record.getMessage()}"
            for record in self.records
            if not any(pattern.search(record.getMessage()) for pattern in self.expected)
        ]


WATCH = pytest.StashKey[LogWatch]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Listen from before the first fixture until after the last one is torn down."""
    watch = item.stash[WATCH] = LogWatch()
    for mark in item.iter_markers("expect_log"):
        watch.expect(*mark.args)
    root = logging.getLogger()
    root.addHandler(watch)
    try:
        return (yield)
    finally:
        root.removeHandler(watch)


def fail_on_unexpected_records(item: pytest.Item) -> None:
    watch = item.stash[WATCH]
    lines = watch.unexpected()
    watch.records.clear()
    if lines:
        pytest.fail("unexpected in the log:\n" + "\n".join(lines), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    fail_on_unexpected_records(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    result = yield
    fail_on_unexpected_records(item)
    return result


@pytest.fixture
def expect_log(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call with a regular expression: matching records at WARNING or above are part of the test."""
    watch: LogWatch = request.node.stash[WATCH]
    return watch.expect


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and {"seed", "rng"} & set(getattr(item, "fixturenames", ())):
        report.sections.append(("replay with", f"--seed {item.config.getoption(SEED_OPTION)}"))
    return report
