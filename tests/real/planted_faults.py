# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Bugs of isolation: one thing each that keeps disks, tenants and owners apart is taken away. FAULTS is the table.

`pytest -p real.planted_faults` runs each check that it is given without the bug and with it, and writes down how these
ended (`test_planted_faults.py` reads it). The checks are the ordinary tests. What is planted is planted in their own
process, so only those can be named that start no daemon.
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from _pytest.runner import runtestprotocol

OUTCOMES = "FOREBAY_PLANTED_OUTCOMES"
"""The variable that names the file into which the outcomes go."""

PACKAGES = ("forebay", "forebay_cache", "forebay_nbd")


def replace(stack: contextlib.ExitStack, target: str, value: object) -> Any:
    """Put `value` in the place of `module:name` or `module:Class.name` until the stack ends, also where a module has
    imported it by name. What was there.
    """
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one, None)
    assert owner is not None and name in vars(owner), f"{target} is gone: this plants nothing"  # noqa: PT018
    original = vars(owner)[name]
    places = [(owner, name)]
    if not classes and callable(original):
        places += [
            (module, key)
            for key_name, module in list(sys.modules.items())
            if key_name.partition(".")[0] in PACKAGES
            for key, found in list(vars(module).items())
            if found is original and module is not owner
        ]
    for place, key in places:
        setattr(place, key, value)
        stack.callback(setattr, place, key, original)
    return original


@dataclass(frozen=True)
class Fault:
    """A bug, and the check that finds it."""

    check: str
    """The node id of a test."""
    told: str
    """A regular expression: what that test says then. Another failure is none."""
    plant: Callable[[contextlib.ExitStack], object]


def instead(target: str, value: object) -> Callable[[contextlib.ExitStack], object]:
    """A bug that is one thing in the place of another."""
    return lambda stack: replace(stack, target, value)


def _nothing(*_: object, **__: object) -> None:
    pass


def _true(*_: object) -> bool:
    return True


def _false(*_: object) -> bool:
    return False


async def _false_async(*_: object) -> bool:
    await trio.lowlevel.checkpoint()
    return False


async def _nothing_async(*_: object, **__: object) -> None:
    await trio.lowlevel.checkpoint()


# ------------------------------------------------------------------------------------------------------------- budgets


def _unlimited(which: str) -> Callable[[contextlib.ExitStack], object]:
    """A budget of what clients hold that is never used up: `requests`, `status` or `connections`."""

    def plant(stack: contextlib.ExitStack) -> None:
        def init(self: Any, *arguments: object, **named: object) -> None:
            original(self, *arguments, **named)
            getattr(self, which).limit = 1 << 60

        original = replace(stack, "forebay_nbd.server.budget:Budgets.__init__", init)

    return plant


# -------------------------------------------------------------------------------------------------- images and owners


def _ctime_counts(stack: contextlib.ExitStack) -> None:
    content = property(lambda self: (self.size, self.mtime_ns, self.ctime_ns, self.inode))
    replace(stack, "forebay.origin.protocol:Identity.content", content)


def _links_are_followed(stack: contextlib.ExitStack) -> None:
    def opened(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        mask = os.O_NOFOLLOW
        if flags & os.O_CREAT:  # nor is a new file made in the place of what was planted
            mask |= os.O_EXCL
        return int(original(path, flags & ~mask, *arguments, **named))

    original = replace(stack, "forebay.origin.worker.syscalls:open", opened)
    replace(stack, "forebay.sidecar.own_files:_check", _nothing)


def _links_in_state_are_followed(stack: contextlib.ExitStack) -> None:
    class Followed:
        def __getattr__(self, name: str) -> Any:
            return 0 if name == "O_NOFOLLOW" else getattr(os, name)

    replace(stack, "forebay.storage.state:os", Followed())
    replace(stack, "forebay.storage.state:check_is_file", _nothing)


def _tokens_do_not_count(stack: contextlib.ExitStack) -> None:
    replace(stack, "forebay.sidecar.files:Sidecar.check_ours", _nothing)


def _no_limit_of_time(stack: contextlib.ExitStack) -> None:
    def init(self: Any, most: int, timeout: float, *others: Any) -> None:
        original(self, most, 10 * timeout, *others)

    original = replace(stack, "forebay_cache.device.lanes:Lane.__init__", init)


def _given_up_without_waiting(stack: contextlib.ExitStack) -> None:
    async def finish(self: Any) -> None:
        self.is_given_up = True
        await trio.lowlevel.checkpoint()

    replace(stack, "forebay.checkpoint.schedule:WriteBack.finish_committed", finish)


def _by_name_alone(stack: contextlib.ExitStack) -> None:
    @contextlib.asynccontextmanager
    async def turn(self: Any, name: str) -> Any:
        found = self.find(name)
        async with found.busy:
            yield self.find(name)

    replace(stack, "forebay.daemon.disks:Disks.turn", turn)


FAULTS: dict[str, Fault] = {
    "a fault of one task ends them all": Fault(
        "tests/unit/test_boundary.py::test_an_exception_of_a_task_is_kept_and_the_others_go_on",
        r"raise fault\n.*ValueError: x",
        instead("forebay.image.boundary:Boundary._keeps", _false),
    ),
    "no budget of requests": Fault(
        "tests/real/test_memory_budgets.py::test_writes_to_many_disks_have_one_budget",
        r"AssertionError: assert \d+ <= \(4 \* 1048576\)",
        _unlimited("requests"),
    ),
    "no budget of block status": Fault(
        "tests/real/test_memory_budgets.py::test_block_status_of_many_disks_has_one_budget",
        r"AssertionError: assert \d+ <= \(4 \* 1048576\)",
        _unlimited("status"),
    ),
    "no budget of connections": Fault(
        "tests/real/test_memory_budgets.py::test_connections_to_many_disks_have_one_budget",
        "AssertionError: assert 30 == ",
        _unlimited("connections"),
    ),
    "no budget of fills": Fault(
        "tests/sim/test_memory_budgets.py::test_what_was_fetched_and_not_stored_yet_has_one_budget_for_all_images",
        r"AssertionError: assert \d+ <= \(67108864 \+ 1048576\)",
        instead("forebay_cache.read.fill:UNSTORED", 1 << 40),
    ),
    "no budget of records": Fault(
        "tests/sim/test_memory_budgets.py::test_records_that_wait_for_the_index_have_one_budget_for_all_disks",
        r"AssertionError: assert \d+ <= \d+",
        instead("forebay_cache.durable.intent:Intent.has_room", _true),
    ),
    "no budget of kept writes": Fault(
        "tests/sim/test_data_safety.py::test_what_is_kept_of_an_image_has_a_bound[write-through]",
        r"AssertionError: assert \d+ <= \(4 \* 65536\)",
        instead("forebay.image.writes:OwnWrites.make_room", _nothing_async),
    ),
    "metadata is a change": Fault(
        "tests/sim/test_changed_image.py::test_metadata_alone_is_no_change",
        "of metadata",
        _ctime_counts,
    ),
    "a change is none": Fault(
        "tests/sim/test_changed_image.py::test_nothing_of_before_is_read_after_a_change[running]",
        "AssertionError: assert b'ooo",
        instead("forebay.image.identity:KnownIdentity.differs_from", _false),
    ),
    "a journal goes over a newer image": Fault(
        "tests/unit/test_checkpoint_orders.py::test_a_cell_of_the_table[committed-changed in place-attach]",
        "assert 'finished' == 'asks'",
        instead("forebay.sidecar.applying:has_changed", _false),
    ),
    "links beside an image are followed": Fault(
        "tests/unit/test_hostile_sidecar.py::test_a_planted_journal_is_not_applied[link]",
        "DID NOT RAISE ForebayError",
        _links_are_followed,
    ),
    "links in STATE are followed": Fault(
        "tests/unit/test_state_lock.py::test_a_link_in_the_place_of_the_lock_leads_nowhere",
        "DID NOT RAISE ForebayError",
        _links_in_state_are_followed,
    ),
    "numbers of a marker have no bounds": Fault(
        "tests/unit/test_hostile_sidecar.py::test_a_marker_is_within_bounds_or_refused_in_one_short_line",
        "assert 0 <= -",
        instead("forebay.sidecar.record:check_number", _nothing),
    ),
    "tokens do not count": Fault(
        "tests/unit/test_tenure.py::test_a_higher_token_stops_the_owner_before_a_checkpoint_is_committed",
        "DID NOT RAISE TakenOver",
        _tokens_do_not_count,
    ),
    "the device has no limit of time": Fault(
        "tests/sim/test_slow_device.py::test_what_a_hung_thread_writes_late_lands_on_nothing[None]",
        "of a clock that jumps",
        _no_limit_of_time,
    ),
    "a record that was not written is answered": Fault(
        "tests/sim/test_slow_device.py::test_who_waits_while_a_frame_fails_is_told",
        "write: done",
        instead("forebay_cache.device.failure:Failure.check", _nothing),
    ),
    "nobody says why there is a conflict": Fault(
        "tests/real/test_resolve.py::test_what_the_cache_has_is_kept[in place]",
        "assert 'forebay resolve d' in 'None'",
        instead("forebay.disk.status:Status.reason", lambda _: None),
    ),
    "a resolve needs no word of the operator": Fault(
        "tests/real/test_resolve.py::test_what_the_cache_has_is_kept[in place]",
        r'say --yes"\):\n.*DID NOT RAISE ForebayError',
        instead("forebay.daemon.resolving:_check", _nothing),
    ),
    "every process is the tenant": Fault(
        "tests/unit/test_tenant.py::test_what_is_on_record_holds_for_a_process_and_not_for_its_number",
        "assert not True",
        instead("forebay.doors.tenant:Tenant._why_not", lambda *_: None),
    ),
    "labels do not count": Fault(
        "tests/unit/test_tenant.py::test_who_may_by_label_and_user",
        "assert True is False",
        instead("forebay.doors.tenant:Tenant._not_by_label", lambda *_: None),
    ),
    "a discard does not wait for the pass": Fault(
        "tests/real/test_found_by_cuts.py::test_a_discard_waits_for_the_pass_under_way",
        r"assert \[False\] == \[True\]",
        _given_up_without_waiting,
    ),
    "a dead descriptor is believed": Fault(
        "tests/sim/test_unreachable.py::test_a_descriptor_that_is_dead_is_replaced",
        "injected",
        instead("forebay.image.reach:Reach._is_dead", _false_async),
    ),
    "a late command meets another disk of that name": Fault(
        "tests/real/test_late_commands.py::test_a_command_that_waited_leaves_another_disk_of_that_name_alone[detach]",
        "DID NOT RAISE ForebayError",
        _by_name_alone,
    ),
    "old blocks under what went past a failed device": Fault(
        "tests/real/test_found_by_cuts.py::test_what_a_pass_takes_past_a_failed_device_does_not_come_to_lie_under_old_blocks",
        "AssertionError: b'oooooooo'",
        instead("forebay_cache.layers.invalidation:Invalidations.invalidate", _nothing_async),
    ),
}
"""By what the bug is."""


# ---------------------------------------------------------------------------------------------------------- the plugin


class Planter:
    """Runs each item once as it is, and once with each bug that it is to find."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, dict[str, str]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """Instead of pytest's own."""
        node = item.nodeid
        for name, fault in FAULTS.items():
            if fault.check != node and not node.startswith(f"{fault.check}["):
                continue
            with contextlib.ExitStack() as stack:
                fault.plant(stack)
                planted = _run(item)
            found = self._outcomes.setdefault(name, {"planted": "", "sound": ""})
            found["planted"] += planted
            found["sound"] += _run(item)
        return True

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._outcomes))


def _run(item: pytest.Item) -> str:
    """What went wrong in the item; empty where nothing did."""
    item._initrequest()  # type: ignore[attr-defined]
    reports = runtestprotocol(item, log=False, nextitem=None)
    return "\n".join(report.longreprtext for report in reports if report.failed)


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get(OUTCOMES):
        config.pluginmanager.register(Planter(Path(path)))
