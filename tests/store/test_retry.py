from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.store.retry import Retries, backoff


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 60))
def test_pauses_grow_and_end(attempt: int) -> None:
    assert 0.05 <= backoff(attempt) <= 5.0


@given(st.floats(0.0, 100.0), st.lists(st.floats(0.0, 10.0), max_size=20))
def test_one_who_asks_is_done_in_time(seconds: float, lasts: list[float]) -> None:
    clock = Clock()
    retries = Retries(seconds, has_answered=True, now=clock)
    for attempt in range(1, 10_000):
        clock.now += lasts[attempt % len(lasts)] if lasts else 0.0
        pause = retries.failed(attempt, 1000.0)
        if pause is None:
            break
        clock.now += pause
    assert clock.now - 1000.0 <= seconds + max([*lasts, 0.0]) + 1e-6
    assert retries.count == attempt - 1


def test_those_who_queue_up_wait_no_longer_than_the_first() -> None:
    clock = Clock()
    retries = Retries(10.0, has_answered=True, now=clock)
    assert retries.failed(1, clock.now) is not None
    clock.now += 11.0 / 2
    assert retries.failed(1, clock.now) is not None
    clock.now += 11.0 / 2
    assert retries.failed(1, clock.now) is None
    retries.succeeded()
    assert retries.failed(1, clock.now) is not None


def test_failures_long_ago_do_not_count() -> None:
    clock = Clock()
    retries = Retries(10.0, has_answered=True, now=clock)
    retries.failed(1, clock.now)
    clock.now += 3600.0
    assert retries.failed(1, clock.now) is not None


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_server_that_has_never_answered_is_not_waited_for(is_busy: bool) -> None:
    clock = Clock()
    retries = Retries(10.0, now=clock)
    if is_busy:
        retries.answered()
    assert (retries.failed(1, clock.now) is not None) is is_busy
    assert retries.count == is_busy
