# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who has a way of its own past a cache device that fails: it may hear of the failure at any time."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay_cache.device.failure import Failure

pytestmark = pytest.mark.expect_log("cache device .* failed")


def failed(failure: Failure) -> None:
    failure.fail(OSError(errno.EIO, "planted"))


def recovered(failure: Failure) -> None:
    failed(failure)
    failure.end()


@pytest.mark.parametrize("meanwhile", [failed, recovered])
def test_an_error_passes_where_the_device_failed_meanwhile(
    meanwhile: Callable[[Failure], None],
) -> None:
    failure = Failure(Path("device"))
    with failure.passed_over():
        meanwhile(failure)
        raise OSError(errno.EIO, "told late")


def test_an_error_passes_where_the_device_had_failed_before() -> None:
    failure = Failure(Path("device"))
    failed(failure)
    with failure.passed_over():
        failure.end()
        raise OSError(errno.EIO, "told late")


def test_an_error_of_a_device_that_works_all_the_time_is_told() -> None:
    failure = Failure(Path("device"))
    recovered(failure)
    with pytest.raises(OSError, match="of its own"), failure.passed_over():
        raise OSError(errno.EIO, "of its own")


@pytest.mark.parametrize("meanwhile", [failed, recovered])
async def test_what_has_a_way_for_each_state_is_done_in_one_of_them(
    meanwhile: Callable[[Failure], None],
) -> None:
    failure = Failure(Path("device"))
    seen: list[bool] = []

    async def do() -> None:
        seen.append(failure.error is None)
        if len(seen) == 1:
            meanwhile(failure)

    await failure.in_one_state(do)
    assert seen == [True, failure.error is None]
